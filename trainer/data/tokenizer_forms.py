"""Tokenizers of other forms than a tokenizer.json, made into one.

    vocab.json + merges.txt    a byte-level BPE, as GPT-2's
    a SentencePiece .model     through transformers' converter, and compared with SentencePiece

A tokenizer_config.json beside them may name a class that does more than its files say; transformers
makes those.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from etils import epath
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from growkit.checkpoint.files import LFS_POINTER, is_remote, read_json
from growkit.errors import GrowkitError, UsageError, first_line
from trainer.data.special import CONFIG, MAP, USUAL_ENDS, get_token_name

VOCAB = "vocab.json"
MERGES = "merges.txt"
ADDED = "added_tokens.json"
SENTENCEPIECE = ".model"
# The classes of tokenizer_config.json that add nothing to a vocabulary and its merges.
_PLAIN = ("", "GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
_SPACE = "\u2581"  # what SentencePiece writes for a space
_CONTROL, _USER = 3, 4  # kinds of pieces: never in a text; always one piece
_MOST_SYMBOLS = 100  # of a model's own that are tried
# Texts that tell conversions apart: spaces, lines, digits, other scripts, what needs bytes.
_PROBES = (
    "the quick brown fox",
    "  two  spaces at  each place  ",
    "a line\nand\tanother\n\n",
    "3.14159 1,000,000",
    "naïve café, Ａ full width, ﬁ ligature",
    "日本語 и русский",
    "an emoji 🙂 and \u200b nothing",
    "",
    " ",
)


def join_vocabulary(vocab: epath.Path, merges: epath.Path, beside: Mapping[str, bytes]) -> bytes:
    """The tokenizer.json of a byte-level BPE in two files.

    beside: the files beside it by name. Raises GrowkitError for files that are not of such a BPE.
    """
    settings = _read_settings(beside, CONFIG, vocab)
    if _get_class(settings) not in _PLAIN:
        return _make_by_class(vocab, _get_class(settings))
    ids = _read_ids(vocab)
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        pairs = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#ver")]
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=pairs, fuse_unk=False))
    except Exception as problem:  # the library raises the bare class
        raise GrowkitError(
            f"{vocab} and {merges.name} are not of one BPE: {first_line(problem)}"
        ) from None
    prefix = bool(settings.get("add_prefix_space", False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    added = _read_settings(beside, ADDED, vocab)
    for token in sorted(added, key=lambda name: added[name]):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != added[token]:
            raise GrowkitError(
                f"{ADDED} of {vocab.parent} gives {token!r} the id {added[token]}, and the next "
                f"free one is {tokenizer.token_to_id(token)}: the files are not of one tokenizer"
            )
    tokenizer.add_special_tokens(_list_special(tokenizer, beside, vocab))
    return tokenizer.to_str().encode()


def convert_sentencepiece(
    model: epath.Path, beside: Mapping[str, bytes]
) -> tuple[bytes, str | None]:
    """The tokenizer.json of a SentencePiece model, and the piece that ends a text.

    Raises UsageError without the packages that this needs, GrowkitError for what is no such model
    and for one whose tokenizer.json would encode some texts otherwise than SentencePiece does.
    """
    if is_remote(model):
        raise UsageError(f"{model} is in a bucket, and SentencePiece reads files; copy it here")
    with model.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise GrowkitError(f"{model} is a Git LFS pointer; `git lfs pull` brings the file")
    sentencepiece = _import_for(model, "sentencepiece")
    named = _get_class(_read_settings(beside, CONFIG, model))
    if named not in _PLAIN:
        return _make_by_class(model, named), None
    converters = _import_for(model, "transformers.convert_slow_tokenizer")
    try:
        extracted = converters.SentencePieceExtractor(os.fspath(model))
        original = sentencepiece.SentencePieceProcessor(model_file=os.fspath(model))
    except Exception as problem:  # protobuf and the libraries raise many types
        raise GrowkitError(f"{model} is not a SentencePiece model: {first_line(problem)}") from None
    tokenizer = _build_from_pieces(extracted)
    symbols = [piece.piece for piece in extracted.proto.pieces if piece.type == _USER]
    for text in (*_PROBES, *(f"a{symbol}b {symbol} c" for symbol in symbols[:_MOST_SYMBOLS])):
        if tokenizer.encode(text, add_special_tokens=False).ids != original.encode(text):
            raise GrowkitError(
                f"{model} encodes {text!r} otherwise than its tokenizer.json would; load it in "
                f"transformers by its own class, save_pretrained it, and give that directory"
            )
    return tokenizer.to_str().encode(), extracted.proto.trainer_spec.eos_piece or None


def _build_from_pieces(extracted: Any) -> Tokenizer:
    """A tokenizer of the pieces of a SentencePiece model, with that model's own normalisation."""
    trainer = extracted.proto.trainer_spec
    rules = extracted.proto.normalizer_spec
    pieces = [(piece.piece, piece.score) for piece in extracted.proto.pieces]
    if trainer.model_type == 1:
        tokenizer = Tokenizer(models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback))
    else:
        parts = extracted.extract(models.BPE)
        tokenizer = Tokenizer(
            models.BPE(
                vocab=parts["vocab"],
                merges=parts["merges"],
                unk_token=trainer.unk_piece,
                fuse_unk=True,
                byte_fallback=trainer.byte_fallback,
            )
        )
    tokenizer.normalizer = normalizers.Sequence(_list_normalizers(rules))
    steps: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    for piece in extracted.proto.pieces:
        if piece.type == _CONTROL:
            tokenizer.add_special_tokens([AddedToken(piece.piece, normalized=False, special=True)])
        elif piece.type == _USER:
            tokenizer.add_tokens([AddedToken(piece.piece, normalized=False)])
    return tokenizer


def _list_normalizers(rules: Any) -> list[Any]:
    """What SentencePiece does to a text before it looks for pieces, step by step."""
    steps: list[Any] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        # Spaces alone: other white space became spaces by the map above, or stays.
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    steps.append(normalizers.Replace(" ", _SPACE))
    return steps


def _make_by_class(file: epath.Path, name: str) -> bytes:
    """The tokenizer.json that transformers makes of a directory whose class is named."""
    transformers = _import_for(file, "transformers")
    try:
        made = transformers.AutoTokenizer.from_pretrained(os.fspath(Path(file).parent))
        content: str = made.backend_tokenizer.to_str()
    except Exception as problem:  # transformers raises many types
        raise GrowkitError(
            f"transformers cannot make a tokenizer.json of {file.parent} by {name}: "
            f"{first_line(problem)}"
        ) from None
    # For a class that it does not have, transformers takes a general one, which encodes otherwise.
    got = type(made).__name__
    if got.removesuffix("Fast") != name.removesuffix("Fast"):
        raise GrowkitError(
            f"{CONFIG} of {file.parent} names the class {name}, and transformers makes a {got} of "
            f"it; give the tokenizer.json that {name} saves"
        )
    return content.encode()


def _import_for(file: epath.Path, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.split(".")[0]
        raise UsageError(
            f"making a tokenizer.json of {file} needs the package {package}: "
            f"pip install 'growkit[hf]'"
        ) from None


def _read_ids(vocab: epath.Path) -> dict[str, int]:
    """Token -> id. Raises GrowkitError unless it is a byte-level vocabulary."""
    ids = read_json(vocab)
    if not isinstance(ids, dict) or not all(type(number) is int for number in ids.values()):
        raise GrowkitError(f"{vocab} must hold an object of tokens and their ids")
    missing = [byte for byte in pre_tokenizers.ByteLevel.alphabet() if byte not in ids]
    if missing:
        raise GrowkitError(
            f"{vocab} is not of a byte-level BPE: it lacks {len(missing)} of the 256 bytes; give "
            f"the tokenizer.json that transformers saves of it"
        )
    return ids


def _read_settings(beside: Mapping[str, bytes], name: str, file: epath.Path) -> dict[str, Any]:
    """A JSON object beside a tokenizer; empty where there is none."""
    if name not in beside:
        return {}
    content = read_json(file.parent / name)
    if not isinstance(content, dict):
        raise GrowkitError(f"{name} of {file.parent} must hold a JSON object")
    return content


def _get_class(settings: Mapping[str, Any]) -> str:
    return str(settings.get("tokenizer_class") or "")


def _list_special(tokenizer: Tokenizer, beside: Mapping[str, bytes], file: epath.Path) -> list[str]:
    """The special tokens that the files beside a vocabulary name, or the usual end of text."""
    stated: list[str] = []
    for name in (CONFIG, MAP):
        settings = _read_settings(beside, name, file)
        listed = [settings.get(key) for key in _SPECIAL]
        listed += settings.get("additional_special_tokens") or []
        stated += [token for token in map(get_token_name, listed) if token]
    usual = [end for end in USUAL_ENDS if tokenizer.token_to_id(end) is not None]
    return list(dict.fromkeys(stated or usual))

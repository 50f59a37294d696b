"""The text that the trainings learn from, and a tokenizer for it, the same on every machine."""

from __future__ import annotations

import json

import numpy as np

WORDS = """
the of and a to in is that it was for on are as with his they at be this from have or by one had not
but what all were when we there can an your which their said if do will each about how up out them
then she many some so these would other into has more her two like him see time could no make than
first been its who now people my made over did down only way find use may water long little very
after words called just where most know
"""
SPECIAL = ("<|endoftext|>", "<|padding|>")
MERGES = ("t h", "th e", "Ġ the", "Ġ a", "Ġ w", "i n", "e r", "o u")
# The pre-tokenizer and the decoder of byte-level BPE.
LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def text(count: int = 6000) -> str:
    """Words in lines and paragraphs; half of them follow from the one before, to be learnt."""
    words = WORDS.split()
    raw = np.random.Philox(key=2024).random_raw(count)
    place = 0
    lines: list[str] = []
    line: list[str] = []
    for number in raw.tolist():
        drawn = (number >> 8) % len(words)
        # Squares make some words more frequent than others.
        place = (7 * place + 3) % len(words) if number & 1 else drawn * drawn % len(words)
        line.append(words[place])
        ends = number >> 56
        if ends < 25:
            lines.append(" ".join(line) + ".")
            line = []
        if ends < 2:
            lines.append("")
    return "\n".join([*lines, " ".join(line), ""])


def tokenizer() -> str:
    """A tokenizer.json of all bytes and a few merges. A trained one may change with its library."""
    tokens = [*SPECIAL, *_byte_characters(), *(pair.replace(" ", "") for pair in MERGES)]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": MERGES,
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special(place, name) for place, name in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": LEVEL,
        "post_processor": None,
        "decoder": LEVEL,
        "model": model,
    }
    return json.dumps(content)


def _special(place: int, name: str) -> dict[str, int | str | bool]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": place, "content": name, **plain, "special": True}


def _byte_characters() -> list[str]:
    """The character that byte-level BPE writes for each byte: its own where it is printable."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256, 512 - len(printable))
    return [chr(code) for code in (*printable, *others)]

"""Which token ends a text: the one that the user names, or the tokenizer's own.

A tokenizer.json does not say it; the files beside it do (tokenizer_config.json,
special_tokens_map.json), or a model's config.json. Only where none of them does are the usual names
looked for, and more than one of those is a question for the user.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from growkit.checkpoint.files import refuse_pointer
from growkit.errors import GrowkitError, UsageError

USUAL_ENDS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
# What is kept of a tokenizer_config.json: the rest is of classes that rebuild the tokenizer.
KEPT = ("bos_token", "unk_token", "pad_token", "chat_template", "model_max_length")


@dataclass(frozen=True)
class Beside:
    """What lies beside a tokenizer.json and says more of it.

    config: the content of tokenizer_config.json. stated: the name of the end-of-text token, and the
    file that states it.
    """

    config: Mapping[str, Any]
    stated: tuple[str, str] | None = None


def read_beside(files: Mapping[str, bytes], where: str) -> Beside:
    """Read the files beside a tokenizer, by name. Raises GrowkitError for those that are broken."""
    contents = {name: _read_object(files, name, where) for name in (CONFIG, MAP)}
    for name, content in contents.items():
        end = get_token_name(content.get("eos_token"))
        if end:
            return Beside(contents[CONFIG], (end, name))
    return Beside(contents[CONFIG])


def _read_object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    if name not in files:
        return {}
    refuse_pointer(files[name], f"{name} of {where}")
    try:
        content = json.loads(files[name])
    except (ValueError, RecursionError):
        raise GrowkitError(f"{name} of {where} is not valid JSON") from None
    if not isinstance(content, dict):
        raise GrowkitError(f"{name} of {where} must hold a JSON object")
    return content


def get_token_name(stated: Any) -> str | None:
    """The name of a token as tokenizer_config.json gives it: text, or an object with "content"."""
    if isinstance(stated, dict):
        stated = stated.get("content")
    return stated if isinstance(stated, str) and stated else None


BY_OPTION = "name the one that does with --end-of-text"
BY_FILE = f"state it as eos_token in a {CONFIG} beside the model"


def choose_end_of_text(tokenizer: Tokenizer, name: str, beside: Beside, chosen: str | None) -> str:
    """The name of the end-of-text token for a text that is tokenized.

    name: the tokenizer's, for messages. chosen: what the user names. Raises UsageError where none
    is found.
    """
    if chosen is None:
        return _find_stated_end(tokenizer, name, beside, BY_OPTION) or _find_usual_end(
            tokenizer, name, BY_OPTION
        )
    if tokenizer.token_to_id(chosen) is None:
        raise UsageError(
            f"--end-of-text names {chosen!r}, and {name} has no such token"
            f"{_list_special_tokens(tokenizer)}"
        )
    return chosen


def find_model_end_of_text(
    tokenizer: Tokenizer, name: str, beside: Beside, model_id: Any = None
) -> str:
    """The name of the end-of-text token of a model's tokenizer.

    model_id: the eos_token_id of the model's configuration, which may be a list of them. Raises
    UsageError where none is found.
    """
    stated = _find_stated_end(tokenizer, name, beside, BY_FILE)
    if stated is not None:
        return stated
    first = model_id[0] if isinstance(model_id, list) and model_id else model_id
    if type(first) is int and 0 <= first < 1 << 31:
        token: str | None = tokenizer.id_to_token(first)
        if token is not None:
            return token
    return _find_usual_end(tokenizer, name, BY_FILE)


def _find_stated_end(tokenizer: Tokenizer, name: str, beside: Beside, advice: str) -> str | None:
    """The token that the files beside the tokenizer state, None where they state none."""
    if beside.stated is None:
        return None
    end, file = beside.stated
    if tokenizer.token_to_id(end) is None:
        raise UsageError(
            f"{file} says that {end!r} ends a text, and {name} has no such token; {advice}"
            f"{_list_special_tokens(tokenizer)}"
        )
    return end


def _find_usual_end(tokenizer: Tokenizer, name: str, advice: str) -> str:
    found = [end for end in USUAL_ENDS if tokenizer.token_to_id(end) is not None]
    if len(found) == 1:
        return found[0]
    if found:
        raise UsageError(
            f"{name} has {len(found)} tokens that may end a text, {' and '.join(found)}; {advice}"
        )
    raise UsageError(
        f"{name} has no end-of-text token of the usual names ({', '.join(USUAL_ENDS)}); {advice}"
        f"{_list_special_tokens(tokenizer)}"
    )


def _list_special_tokens(tokenizer: Tokenizer, most: int = 8) -> str:
    """A clause that lists the first special tokens; empty where there are none."""
    tokens = tokenizer.get_added_tokens_decoder()
    special = [tokens[number].content for number in sorted(tokens) if tokens[number].special]
    if not special:
        return ""
    more = ["..."] if len(special) > most else []
    return f"; its special tokens are {', '.join(special[:most] + more)}"

"""The models that evaluate asks: what a word of the command names, opened, then loaded.

A word is SRC or NAME=SRC. SRC is a model that growkit opens, or a causal language model that
transformers loads and growkit has no table for, or a file that `evaluate --output` kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from growkit.checkpoint.tensor import Source

LONGEST_LABEL = 100
# Models of the Hub that are known without their owner.
GPT2 = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


class Model(Protocol):
    """A model to be measured. text: what the user named. label: the name given to it, or None."""

    @property
    def text(self) -> str: ...
    @property
    def label(self) -> str | None: ...

    @property
    def window(self) -> int:
        """The tokens that it reads at most."""

    def require_whole(self) -> None:
        """Raise GrowkitError where bytes are not those whose hashes are on record."""

    def load(self, window: int, batch: int) -> Any:
        """The model as the harness asks it."""

    def describe(self) -> dict[str, Any]:
        """What a record keeps of it; after it was loaded."""


@dataclass(frozen=True)
class Opened:
    """A model that growkit opens."""

    text: str
    label: str | None
    source: Source
    tokenizer: Any  # None where transformers' own is taken

    @property
    def window(self) -> int:
        """The tokens that it reads at most."""
        from growkit.cli.checking import choose_length

        return choose_length(self.source.model)

    def require_whole(self) -> None:
        """Raise GrowkitError where bytes are not those whose hashes are on record."""
        self.source.require_whole()

    def describe(self) -> dict[str, Any]:
        """What a record keeps of it."""
        from growkit.evaluation.report import describe_source

        return describe_source(self.source)

    def load(self, window: int, batch: int) -> Any:
        """The model as the harness asks it: in transformers where that loads it, else in JAX."""
        from growkit.cli.description import is_loaded_by_transformers
        from growkit.lineage import Lineage

        source = self.source
        # The trainer begins texts with end-of-text, as Pythia's; other models begin as they say.
        ours = source.model.kind == "gpt_neox" or Lineage.read(source.lineage).trained
        if not is_loaded_by_transformers(source):
            from trainer.evaluate.harness import load_jax_model

            begin = None if ours else source.config.get("bos_token_id")
            return load_jax_model(source, self.tokenizer, window, batch, begin)
        from convert.harness import load_hugging_face_model

        prefix = self.tokenizer.end_of_text_id if ours and self.tokenizer else None
        return load_hugging_face_model(source.here, prefix, window, batch)


def split_label(word: str) -> tuple[str | None, str]:
    """(NAME, SRC) of NAME=SRC, (None, SRC) of a path that has a = in it, and of any other.

    Raises UsageError for a name or a source that is empty.
    """
    from growkit.errors import UsageError

    name, equals, src = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        return None, word
    if not name.strip() or not src or len(name) > LONGEST_LABEL:
        raise UsageError(f"a model is SRC or NAME=SRC, got {word!r}")
    return name.strip(), src


def open_model(text: str, label: str | None = None) -> Model:
    """Open SRC and its tokenizer; refuse here, before loading, what could not be measured.

    Raises UsageError or GrowkitError.
    """
    from growkit.checkpoint.location import open_source
    from growkit.cli.description import is_loaded_by_transformers
    from growkit.errors import GrowkitError, UsageError
    from growkit.evaluation.harness import require_harness
    from growkit.models import require_trained

    try:
        source = open_source(text)
    except UsageError as problem:
        if text in GPT2:
            raise UsageError(f"{problem}; on the Hub it is openai-community/{text}") from None
        raise
    except GrowkitError as problem:
        foreign = _open_foreign(text, label, problem)
        if foreign is None:
            raise
        return foreign
    if not is_loaded_by_transformers(source):
        require_harness()
        require_trained(source.model, source.path)
    else:
        require_harness("torch", "transformers", "accelerate")
        if "tokenizer.json" not in source.files and source.kind == "huggingface":
            return Opened(text, label, source, None)
    return Opened(text, label, source, _open_tokenizer(source))


def _open_tokenizer(source: Source) -> Any:
    """The tokenizer beside a model. Raises GrowkitError for one of another model."""
    from growkit.errors import GrowkitError
    from trainer.data.tokenizer import load_model_tokenizer

    tokenizer = load_model_tokenizer(source.files, source.path, source.config)
    # A tokenizer may have more tokens than the model, as one for padding. A text that has one is
    # refused when it is encoded; every text follows the end of another.
    if tokenizer.end_of_text_id >= source.model.vocab:
        raise GrowkitError(
            f"{tokenizer.end_of_text!r} of {source.path} has the id {tokenizer.end_of_text_id}, "
            f"and the vocabulary of the model is {source.model.vocab}: the tokenizer is not the "
            "one that the model was trained with"
        )
    return tokenizer


def _open_foreign(text: str, label: str | None, problem: Exception) -> Model | None:
    """A causal language model that transformers loads; None for what it knows no such model of.

    problem: why growkit does not open it.
    """
    from importlib.util import find_spec

    from growkit.evaluation.harness import require_harness

    if find_spec("transformers") is None:
        return None
    from convert.foreign import open_foreign

    found = open_foreign(text, label, problem)
    if found is not None:
        require_harness("torch", "transformers", "accelerate")
    return found

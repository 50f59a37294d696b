"""What --check does: run two models on the same tokens, and compare their logits and losses.

`compare_functions` takes two functions from tokens to logits, wherever they come from. A check is
computed on the CPU in float32, whatever accelerator the machine has: it takes seconds there, and
the accelerator may be busy with a training run. JAX computes the models that the trainer knows,
transformers all others.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from growkit.checkpoint.location import open_source
from growkit.checkpoint.tensor import Source
from growkit.cli.description import (
    KINDS,
    is_computed,
    is_loaded_by_transformers,
    is_trained,
)
from growkit.errors import GrowkitError, UsageError
from growkit.growth.vocabulary import EXACT, bound_shift

if TYPE_CHECKING:
    from growkit.cli.checked_text import CheckedText
    from growkit.growth.plan import Plan
    from growkit.models.architecture import Architecture

# Tokens [B, T] to logits [B, T, V].
Function = Callable[[np.ndarray], np.ndarray]

DEVICE = "cpu"
COMPUTED_IN = "float32"
# Tokens of a check, unless told otherwise.
TOKENS = 1024
# Tokens of a sequence for a model that states no context, as one with ALiBi or a recurrence.
LENGTH = 1024
# The part by which a shift of the loss may be above its bound: new rows are rounded to the weights'
# dtype. No shift below EXACT is refused.
SLACK = 0.5
# What tokens are called that are of no text.
RANDOM = "random tokens"
# The most tokens whose logits are in memory at once.
CHUNK = 4096
# How far logits may differ, as a part of the largest logit (of 1, if that is less), when weights
# were rounded to a dtype. A larger difference is a wrong growth or conversion.
TOLERANCES = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-4, "float64": 1e-4}


@dataclass(frozen=True)
class Difference:
    """How two functions differ on the same tokens.

    loss_before, loss_after: mean cross-entropy of the next token, in nats. tolerance: the largest
    difference of logits that rounding explains. shift: by how much the tokens that the second has
    beyond the first's raise the loss, in nats.
    """

    tokens: int
    loss_before: float
    loss_after: float
    largest_logit: float
    largest_difference: float
    tolerance: float
    shift: float = 0.0

    @property
    def negligible(self) -> bool:
        """Whether rounding explains the difference; False if a logit is not a number."""
        return self.largest_difference <= self.tolerance


def compare_functions(
    before: Function, after: Function, tokens_BxT: np.ndarray, rounded_to: str = COMPUTED_IN
) -> Difference:
    """The difference of two functions on tokens [B, T], computed a few rows at a time.

    rounded_to: the dtype that the weights of `after` were rounded to; the default for none. Where
    `after` has more tokens, the first ones are compared.
    """
    losses = np.zeros(2)
    shift = 0.0
    largest_difference = 0.0
    largest_logit = 0.0
    step = max(1, CHUNK // tokens_BxT.shape[1])
    for start in range(0, len(tokens_BxT), step):
        chunk = tokens_BxT[start : start + step]
        ours = before(chunk)
        theirs = after(chunk)
        part = len(chunk) / len(tokens_BxT)
        losses += [part * _mean_loss(ours, chunk), part * _mean_loss(theirs, chunk)]
        shift += part * _measure_shift(theirs, ours.shape[-1])
        theirs = theirs[..., : ours.shape[-1]]
        largest_logit = max(largest_logit, float(np.abs(ours).max()))
        # numpy's maximum, unlike Python's max, keeps a NaN.
        gap = np.abs(ours - theirs).max()
        largest_difference = float(np.maximum(largest_difference, gap))
    return Difference(
        tokens=tokens_BxT.size,
        loss_before=float(losses[0]),
        loss_after=float(losses[1]),
        largest_logit=largest_logit,
        largest_difference=largest_difference,
        tolerance=TOLERANCES[rounded_to] * max(1.0, largest_logit),
        shift=shift,
    )


def _mean_loss(logits_BxTxV: np.ndarray, tokens_BxT: np.ndarray) -> float:
    """The mean cross-entropy of each next token, in nats, in float64."""
    losses = []
    for logits_TxV, tokens_T in zip(logits_BxTxV, tokens_BxT, strict=True):
        wide = logits_TxV[:-1].astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        following = np.take_along_axis(wide, tokens_T[1:, None], -1)[:, 0]
        losses.append(np.log(np.exp(wide).sum(-1)) - following)
    return float(np.mean(losses))


def _measure_shift(logits_BxTxV: np.ndarray, old: int) -> float:
    """How much the tokens after the first `old` add to the loss: the mean of log(1 + their part of
    the softmax's sum over the others'), in float64.
    """
    if logits_BxTxV.shape[-1] == old:
        return 0.0
    shifts = []
    for logits_TxV in logits_BxTxV:
        wide = logits_TxV.astype(np.float64)
        wide -= wide.max(-1, keepdims=True)
        sums = np.exp(wide)
        shifts.append(np.log1p(sums[:, old:].sum(-1) / sums[:, :old].sum(-1)).mean())
    return float(np.mean(shifts))


def load_function(source: Source) -> Function:
    """The function that a model on disk computes, on the CPU in float32.

    Needs torch and transformers for a model that the trainer does not compute.
    """
    if not is_trained(source):
        from convert.reference import load_logits

        return load_logits(source.here, COMPUTED_IN)

    def compute(tokens_BxT: np.ndarray) -> np.ndarray:
        import jax

        from trainer.model.decoder import compute_logits

        with jax.default_device(jax.devices(DEVICE)[0]):
            return compute_logits(source, tokens_BxT, COMPUTED_IN)

    return compute


def require_checkable(
    source: Source, tokens: int = TOKENS, grown: Architecture | None = None
) -> None:
    """Raise UsageError or GrowkitError, before anything is written, if a check could not run.

    grown: the model that is made, where it may be of another type.
    """
    if tokens < 2:
        raise UsageError(
            "--check takes at least 2 tokens, because the loss is that of the next token; got "
            f"{tokens}"
        )
    models = [source.model] if grown is None else [source.model, grown]
    others = [model for model in models if not is_computed(model)]
    if len(others) < len(models):
        platforms = os.environ.get("JAX_PLATFORMS", "")
        if platforms and DEVICE not in platforms.split(","):
            raise UsageError(
                f"--check computes on the CPU, and JAX_PLATFORMS is {platforms!r}; set it to "
                f"'{platforms},{DEVICE}'"
            )
    if not others:
        return
    from convert.reference import require_transformers

    require_transformers()
    if not is_loaded_by_transformers(source):
        raise UsageError(
            f"--check runs a {others[0].kind} model in transformers, which reads no "
            f"{KINDS[source.kind]}"
        )


def select_tokens(source: Source, count: int) -> tuple[np.ndarray, str]:
    """(tokens [B, T] of about `count` tokens, what they are).

    Text that comes with Python, by the model's own tokenizer; random tokens without one.
    """
    vocab = source.model.vocab
    length = min(count, choose_length(source.model))
    rows = count // length
    ids = _tokenize_documentation(source, rows * length)
    if ids is None or max(ids) >= vocab:
        return np.random.default_rng(0).integers(0, vocab, (rows, length)), RANDOM
    # np.resize repeats the text if it is too short.
    tokens_BxT = np.resize(np.asarray(ids, np.int64), (rows, length))
    return tokens_BxT, "tokens of Python's documentation"


def choose_length(model: Architecture) -> int:
    """The tokens of a sequence that a model reads: its context, or LENGTH where it states none."""
    return model.context or LENGTH


def _tokenize_documentation(source: Source, count: int) -> list[int] | None:
    """Up to `count` tokens of Python's documentation; None without a tokenizer that can be read."""
    if "tokenizer.json" not in source.files:
        return None
    from pydoc_data.topics import topics

    from trainer.data.panics import explain_panics
    from trainer.data.tokenizer import parse_tokenizer

    # 16 characters a token are more than any tokenizer needs for text like this.
    text = "\n".join(topics[name] for name in sorted(topics))[: 16 * count]
    try:
        # The whole text, whatever truncation is saved with the tokenizer.
        tokenizer = parse_tokenizer(source.files["tokenizer.json"], "the tokenizer")
        with explain_panics("encoding a text"):
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[:count]
    except GrowkitError:
        return None
    return ids or None


@dataclass(frozen=True)
class GrowthCheck:
    """A grown model compared with its source.

    text: what the tokens are. note: what that says of the loss. promised: whether the plan
    promised the source's function. dtype: of the source's parameters, which the new ones are
    rounded to. added: how many tokens are new. bound: the most by which they raise the loss of old
    ones, as the plan has it; None for unknown.
    """

    difference: Difference
    text: str
    promised: bool
    dtype: str
    added: int = 0
    bound: float | None = 0.0
    note: str = ""

    @property
    def preserved(self) -> bool:
        """Whether the grown model computes the source's function, up to rounding."""
        return self.difference.negligible

    def to_json(self) -> dict[str, Any]:
        """All figures, in JSON's types."""
        found = self.difference
        return {
            "tokens": found.tokens,
            "text": self.text,
            "note": self.note,
            "loss": {"before": found.loss_before, "after": found.loss_after},
            "largest_logit": found.largest_logit,
            "largest_difference": found.largest_difference,
            "rounding": found.tolerance,
            "shift": {"measured": found.shift, "bound": self.bound},
            "promised": self.promised,
            "preserved": self.preserved,
            "dtype": self.dtype,
            "device": DEVICE,
        }

    def describe(self) -> str:
        """A line for a reader at a terminal, after one of the text where there is a note on it."""
        found = self.difference
        if not self.preserved:
            verdict = f"not preserved: {found.loss_after - found.loss_before:+.4f} nats a token"
        elif TOLERANCES[self.dtype] > TOLERANCES[COMPUTED_IN]:
            verdict = f"PRESERVED to the rounding of {self.dtype}"
        else:
            verdict = "PRESERVED"
        if self.added:
            verdict += f" for old tokens; {self.added:,} new ones raise their loss by "
            verdict += f"{found.shift:.1e} nats{self._compare_bound()}"
        text = f"text        {self.note}\n" if self.note else ""
        return (
            f"{text}check       {verdict}; loss {found.loss_before:.4f} -> {found.loss_after:.4f}, "
            f"logits differ by at most {found.largest_difference:.2e} of {found.largest_logit:.2f} "
            f"({found.tokens:,} {self.text}, computed on the {DEVICE.upper()})"
        )

    def _compare_bound(self) -> str:
        return "" if self.bound is None else f" (at most {self.bound:.1e})"

    def require_promise(self, out: Path) -> None:
        """Raise GrowkitError if the plan promised the source's function and `out` has another."""
        if self.promised and not self.preserved:
            raise GrowkitError(
                f"the plan promised the source's function, and the logits of {out} are off by "
                f"{self.difference.largest_difference:.2e}, more than rounding explains "
                f"({self.difference.tolerance:.2e}); do not use it"
            )
        allowed = math.inf if self.bound is None else max(EXACT, self.bound * (1 + SLACK))
        if self.difference.shift > allowed:
            raise GrowkitError(
                f"the new tokens of {out} raise the loss of the old ones by "
                f"{self.difference.shift:.2e}, more than the {self.bound:.2e} that the plan states"
            )


def check_growth(source: Source, out: Path, plan: Plan, text: CheckedText) -> GrowthCheck:
    """Compare what was written to `out` by a plan with its source, on a text."""
    result = open_source(str(out))
    dtype = str(source.dtype)
    before = load_function(source)
    after = load_function(result)
    difference = compare_functions(before, after, text.tokens, rounded_to=dtype)
    return GrowthCheck(
        difference=difference,
        text=text.words,
        note=text.note,
        promised=plan.preserved,
        dtype=dtype,
        added=plan.grown.vocab - plan.model.vocab,
        bound=bound_shift(plan),
    )


def check_export(source: Source, out: Path, dtype: str) -> str:
    """Compare transformers' logits of `out`, written in `dtype`, with those of its source.

    Returns one line for a reader. Raises GrowkitError for more than rounding explains.
    """
    from convert.reference import load_logits

    length = min(128, choose_length(source.model))
    tokens_BxT = np.random.default_rng(0).integers(0, source.model.vocab, (2, length))
    rounded_to = COMPUTED_IN if dtype == str(source.dtype) else dtype
    exported = load_logits(open_source(str(out)).here, COMPUTED_IN)
    found = compare_functions(load_function(source), exported, tokens_BxT, rounded_to)
    if not found.negligible:
        raise GrowkitError(
            f"transformers computes other logits from {out} than growkit from {source.path}: off "
            f"by {found.largest_difference:.2e}, more than rounding explains "
            f"({found.tolerance:.2e})"
        )
    return (
        "check: logits of transformers and of JAX differ by at most "
        f"{found.largest_difference:.2e} ({found.tokens} random tokens, largest logit "
        f"{found.largest_logit:.2f}, computed on the {DEVICE.upper()})"
    )

"""What growkit says of an architecture that it has no table for, and what would help."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from growkit.errors import did_you_mean


def describe_unknown(kind: str, known: Iterable[str]) -> str:
    """The end of a refusal: the command that derives the table, or the nearest known type.

    transformers is imported where it is installed, because it alone knows which types it has.
    """
    if importlib.util.find_spec("transformers") is None:
        hint = "; where transformers has the type, `growkit derive` (extra `hf`) makes its table"
        return did_you_mean(kind, known) or hint
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return (
            f"; transformers has the type: `growkit derive {kind} --out {kind}.txt` makes its "
            f"table where it can be proved, and --table {kind}.txt takes it"
        )
    if kind in CONFIG_MAPPING_NAMES:
        return (
            "; transformers has no causal language model of the type, as of encoders, so that no "
            "table of it can be derived"
        )
    return did_you_mean(kind, known)

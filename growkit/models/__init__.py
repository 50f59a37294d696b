"""From the content of a config.json to the architecture it describes.

Knows which architectures there are; each one's facts are in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from growkit.errors import GrowkitError, did_you_mean
from growkit.models import gpt_neox as neox
from growkit.models import llama
from growkit.models.architecture import Architecture

READERS = {neox.NeoX.kind: neox.read_config, llama.Llama.kind: llama.read_config}


def read_config(config: Mapping[str, Any]) -> Architecture:
    """The model that a config.json describes. Raises GrowkitError for an architecture that is not known."""
    kind = config.get("model_type")
    if kind not in READERS:
        known = " and ".join(repr(name) for name in READERS)
        raise GrowkitError(
            f"the architecture is {kind!r}, and growkit knows {known} only{did_you_mean(str(kind), READERS)}"
        )
    return READERS[kind](config)

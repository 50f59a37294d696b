"""growkit grows trained transformer models in depth and width, with their optimizer state.

    source = growkit.open_source("SRC")                     a model on disk
    plan = growkit.plan_depth(source.model, "18:24")        what growth will do
    growkit.write_grown(source, plan, "OUT")                growth on disk
    growkit.grow(tree, plan)                                growth in memory
    growkit.grow(tree, model, map="18:24")                  the same without a plan

`growkit.describe_model` describes a model of one's own by a table. docs/python.md has examples of
everything named in `__all__`. Each name is imported when it is first used, so that `import growkit`
stays light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from growkit.api import open_source, read_lineage, write_grown
    from growkit.checkpoint.tensor import Source
    from growkit.errors import GrowkitError, UsageError
    from growkit.growth.depth import plan_depth
    from growkit.growth.experts import plan_experts
    from growkit.growth.mixture import plan_mixture
    from growkit.growth.plan import Plan, combine_plans, set_options
    from growkit.growth.tree import grow
    from growkit.growth.vocabulary import plan_vocabulary
    from growkit.growth.width import plan_like, plan_width
    from growkit.lineage import Lineage
    from growkit.models.architecture import Architecture
    from growkit.models.custom import describe_model
    from growkit.models.family import Family

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Family",
    "GrowkitError",
    "Lineage",
    "Plan",
    "Source",
    "UsageError",
    "combine_plans",
    "describe_model",
    "grow",
    "open_source",
    "plan_depth",
    "plan_experts",
    "plan_like",
    "plan_mixture",
    "plan_vocabulary",
    "plan_width",
    "read_lineage",
    "set_options",
    "write_grown",
]

# The module that each name lives in.
_HOMES = {
    "growkit.api": ("open_source", "read_lineage", "write_grown"),
    "growkit.checkpoint.tensor": ("Source",),
    "growkit.errors": ("GrowkitError", "UsageError"),
    "growkit.growth.depth": ("plan_depth",),
    "growkit.growth.experts": ("plan_experts",),
    "growkit.growth.mixture": ("plan_mixture",),
    "growkit.growth.plan": ("Plan", "combine_plans", "set_options"),
    "growkit.growth.tree": ("grow",),
    "growkit.growth.vocabulary": ("plan_vocabulary",),
    "growkit.growth.width": ("plan_like", "plan_width"),
    "growkit.lineage": ("Lineage",),
    "growkit.models.architecture": ("Architecture",),
    "growkit.models.custom": ("describe_model",),
    "growkit.models.family": ("Family",),
}


def __getattr__(name: str) -> Any:
    """A name of `__all__`, imported now that it is asked for."""
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'growkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    # Without what this file imports for itself.
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

"""growkit grows trained transformer models in depth and width, with their optimizer state.

`growkit.grow(tree, plan)` grows parameters and optimizer states in memory; see
`growkit.growth.tree`.
"""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`grow`, imported on first use, so that `import growkit` stays light."""
    if name == "grow":
        from growkit.growth.tree import grow

        return grow
    raise AttributeError(f"module 'growkit' has no attribute {name!r}")

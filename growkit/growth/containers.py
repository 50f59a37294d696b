"""The containers of a training state: their children, and a container like another one.

Children are by field, key or place, of dicts and other mappings, tuples, named tuples, lists and
dataclasses. An nnx module stands for its parameters, an nnx optimizer for its state.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from growkit.growth.layout import fill_container, open_mapping


def set_to_zero(child: Any) -> Any:
    """A count set to zero, in the kind of number or box that it is."""
    if isinstance(child, int | np.ndarray | np.generic):
        number: Any = child
        return number * 0
    import jax

    return jax.tree.map(lambda count: count * 0, child)


def is_array(node: Any) -> bool:
    """Whether a node is an array of one dimension or more, and no container."""
    return list_parts(node) is None and bool(getattr(node, "shape", ()))


def open_module(node: Any) -> Any:
    """The parameters of an nnx module, as nnx.state has them; any other node as it is."""
    # Where flax.nnx was not imported, nobody has made a module of it.
    nnx: Any = sys.modules.get("flax.nnx")
    module = nnx is not None and isinstance(node, nnx.Module) and not is_nnx_optimizer(node)
    return nnx.state(node, nnx.Param) if module else node


def is_nnx_optimizer(node: Any) -> bool:
    """Whether a node is an nnx optimizer, which holds a state of optax in its own classes."""
    nnx: Any = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(node, nnx.Optimizer)


def put_in_optimizer(node: Any, opt_state: Any) -> Any:
    """The nnx.state of an nnx optimizer, with another state of optax in it."""
    nnx: Any = sys.modules["flax.nnx"]
    state = nnx.state(node)
    parts = open_mapping(state) | {"opt_state": open_mapping(nnx.state(opt_state))}
    return type(state)(parts)


def list_parts(node: Any) -> dict[Any, Any] | None:
    """The children of a container of a state by field, key or place; None for a leaf."""
    if isinstance(node, Mapping):
        return open_mapping(node)
    if isinstance(node, tuple) and hasattr(node, "_asdict"):
        return dict(node._asdict())
    if isinstance(node, tuple | list):
        return dict(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        # flax marks the fields that are not part of the tree.
        fields = [
            field for field in dataclasses.fields(node) if field.metadata.get("pytree_node", True)
        ]
        return {field.name: getattr(node, field.name) for field in fields}
    return None


def rebuild(node: Any, children: dict[Any, Any]) -> Any:
    """A container like `node` of other children."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(**children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dataclasses.replace(node, **children)
    return fill_container(node, children)

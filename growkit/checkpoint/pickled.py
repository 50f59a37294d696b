"""`pytorch_model.bin`: weights that torch pickled, of directories that have no safetensors files.

torch reads them, mapped and with `weights_only=True`: a pickle from strangers may hold tensors and
plain containers, and calls nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from growkit.checkpoint.tensor import Tensor
from growkit.errors import GrowkitError, UsageError, first_line

WHOLE = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"
DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Of buffers alone, which no model of today reads.
BUFFER_DTYPES = {name: np.dtype(name) for name in ("bool", "uint8", "int32", "int64")}


def read_pickled(
    path: Path, unread: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """The tensors of one file that torch wrote, by name.

    unread: names of tensors that may be integers or booleans, because no model reads them. Raises
    UsageError where torch is not installed, GrowkitError for what torch does not read.
    """
    torch = _import_torch(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # What torch wrote before 1.6 is no archive, and cannot be mapped.
        held = _load_whole(torch, path)
    except Exception as problem:
        raise _refuse(path, problem) from None
    if not isinstance(held, dict):
        raise GrowkitError(f"{path} holds no tensors by name, but a {type(held).__name__}")
    return {
        name: _wrap(torch, tensor, path, name, unread(name))
        for name, tensor in held.items()
        if isinstance(tensor, torch.Tensor)
    }


def _import_torch(path: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError(
            f"{path} is read by torch, which is not installed; pip install 'growkit[hf]' brings it"
        ) from None
    return torch


def _load_whole(torch: Any, path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:
        raise _refuse(path, problem) from None


def _refuse(path: Path, problem: Exception) -> GrowkitError:
    return GrowkitError(f"torch does not read {path} as weights alone: {first_line(problem)}")


def _wrap(torch: Any, tensor: Any, path: Path, name: str, unread: bool) -> Tensor:
    """A tensor of torch as one that is read by rows."""
    called = str(tensor.dtype).removeprefix("torch.")
    dtype = DTYPES.get(called) or (BUFFER_DTYPES.get(called) if unread else None)
    if dtype is None:
        raise GrowkitError(
            f"{path}: the tensor {name!r} has dtype {called}, and growkit reads {', '.join(DTYPES)}"
        )

    def rows(start: int, stop: int) -> np.ndarray:
        part = tensor[start:stop] if tensor.dim() else tensor
        if tensor.dtype == torch.bfloat16:
            # numpy knows no bfloat16: the same bytes, as integers first.
            return np.array(part.contiguous().view(torch.int16).numpy()).view(dtype)
        return np.array(part.contiguous().numpy())

    return Tensor(tuple(tensor.shape), dtype, rows)

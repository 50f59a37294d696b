"""`pytorch_model.bin`: weights that torch pickled, of directories that have no safetensors files.

They are read by offset, without torch, and nothing of a pickle is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from growkit.checkpoint.tensor import Tensor
from growkit.checkpoint.torch_pickle import Stored
from growkit.checkpoint.torch_zip import TorchFile, open_torch_file
from growkit.errors import GrowkitError

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)
# Of buffers alone, which no model of today reads.
BUFFER_DTYPES = (np.bool_, np.uint8, np.int32, np.int64)


def read_pickled(
    path: Path, unread: Callable[[str], bool] = lambda name: False
) -> dict[str, Tensor]:
    """The tensors of one file that torch wrote, by name.

    unread: names of tensors that may be integers or booleans, because no model reads them. Raises
    GrowkitError for a file that holds anything but tensors and plain containers.
    """
    file = open_torch_file(path)
    if not isinstance(file.value, Mapping):
        kind = type(file.value).__name__
        raise GrowkitError(f"{path} holds no tensors by name, but a {kind}")
    return {
        name: _open(file, name, stored, unread(name))
        for name, stored in file.value.items()
        if isinstance(name, str) and isinstance(stored, Stored)
    }


def _open(file: TorchFile, name: str, stored: Stored, unread: bool) -> Tensor:
    """A tensor of a dtype that growkit grows. Raises GrowkitError for another one."""
    if stored.dtype not in (DTYPES + BUFFER_DTYPES if unread else DTYPES):
        known = ", ".join(str(np.dtype(dtype)) for dtype in DTYPES)
        raise GrowkitError(
            f"{file.path}: the tensor {name!r} has dtype {stored.dtype}, and growkit reads {known}"
        )
    return file.open_tensor(stored, f"the tensor {name!r}")

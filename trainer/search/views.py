"""The loss of a map of layers, computed without making the model: layers are views of the source's.

Shapes in names: B batch, T1 time + 1, N new layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from growkit.checkpoint.tensor import Source
from growkit.models import require_trained
from trainer.config.sections import Mesh, Precision
from trainer.data.sample import Sample
from trainer.devices.sharding import Layout, make_mesh, place
from trainer.model.decoder import Decoder
from trainer.step.loss import sum_token_losses

DTYPE = "float32"


def cut_windows(sample: Sample, context: int, most: int) -> np.ndarray:
    """The first windows of a text, at most so many: int32 [windows, context + 1].

    Neighbours share one token, so that each is predicted once. Where the tokenizer puts a token
    before every text, windows begin with it and share none. Empty where the text is too short.
    """
    shared = int(sample.begin is None)
    count = min(most, max(0, (len(sample.ids) - shared) // context))
    size = context + shared
    rows = [sample.ids[first * context : first * context + size] for first in range(count)]
    windows_WxT1 = np.asarray(rows, np.int32).reshape(count, size)
    if sample.begin is None:
        return windows_WxT1
    return np.insert(windows_WxT1, 0, np.int32(sample.begin), axis=1)


class Views:
    """The losses of one model's layers in other orders, on fixed windows.

    Each device of this machine holds the parameters once, in float32, layers stacked; windows are
    split over the devices. Programs are compiled once for each number of layers.
    """

    def __init__(self, source: Source, windows_WxT1: np.ndarray, batch: int) -> None:
        model = require_trained(source.model, source.path)
        layout = Layout(make_mesh(Mesh(), jax.local_devices()))
        self.layout = layout
        self.network = Decoder(model, Precision(DTYPE, DTYPE), layout=layout)
        self.predicted = windows_WxT1[:, 1:].size
        parameters = model.table.tree(layout.parameter_sharding)
        self.params = jax.device_put(source.stack(dtype=DTYPE), parameters)
        self.batches = _split(windows_WxT1, batch, layout)
        batches = layout.batch_sharding()
        shardings = (parameters, batches, batches, layout.replicated)
        self._sum = jax.jit(
            self._sum_losses, in_shardings=shardings, out_shardings=layout.replicated
        )

    def score(self, index: Sequence[int]) -> float:
        """The mean loss, nats a token, of a model whose layers are these of the source."""
        view_N = place(np.asarray(index, np.int32), self.layout.replicated)
        sums = [self._sum(self.params, tokens, mask, view_N) for tokens, mask in self.batches]
        return math.fsum(float(each) for each in sums) / self.predicted

    def _sum_losses(
        self, params: Any, tokens_BxT1: jax.Array, mask_B: jax.Array, view_N: jax.Array
    ) -> jax.Array:
        network = self.network
        hidden_BxTxE = network.apply(
            {"params": params}, tokens_BxT1[:, :-1], head=False, view=view_N
        )
        head_VxE = network.head_weight(params)
        targets_BxT = tokens_BxT1[:, 1:]
        return sum_token_losses(
            hidden_BxTxE, head_VxE, targets_BxT, mask_B, self.layout, network.logit_cap
        )


def _split(
    windows_WxT1: np.ndarray, batch: int, layout: Layout
) -> list[tuple[jax.Array, jax.Array]]:
    """Batches of windows on the devices, each with its mask; the last is filled up with zeros."""
    size = math.ceil(min(batch, len(windows_WxT1)) / layout.batch_shards) * layout.batch_shards
    sharding = layout.batch_sharding()
    batches = []
    for first in range(0, len(windows_WxT1), size):
        rows = windows_WxT1[first : first + size]
        tokens_BxT1 = np.zeros((size, rows.shape[1]), np.int32)
        tokens_BxT1[: len(rows)] = rows
        mask_B = np.arange(size) < len(rows)
        batches.append((place(tokens_BxT1, sharding), place(mask_B, sharding)))
    return batches

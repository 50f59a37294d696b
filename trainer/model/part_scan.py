"""All layers where only some are trained: frozen ones cost no gradient of their weights.

The layers are taken in runs of trained and of frozen ones. A scan over frozen layers has no
parameters to differentiate: its backward pass computes the gradient of the stream alone, two thirds
of the work of a trained layer. Below the lowest trained layer nothing has a gradient, so there is
no backward pass at all and nothing is kept for one. Equal runs, one after another, are one scan,
so that compile time follows the pattern of the runs and not the number of layers.

With dropout the masks are drawn by layer, and are other ones than `Decoder`'s own scan draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from trainer.model.decoder import Decoder, Layer
from trainer.model.experts import ROUTED, Routed
from trainer.model.kinds import list_kinds, number_kinds


@dataclass(frozen=True)
class Stretch:
    """The same runs, `times` one after another: `trained` trained layers, then `frozen` ones."""

    times: int
    trained: int
    frozen: int

    @property
    def period(self) -> int:
        """The layers of the runs, once."""
        return self.trained + self.frozen


def divide_layers(trained: Sequence[int], layers: int) -> list[Stretch]:
    """The stretches of a model of so many layers, the lowest first. trained: layers' numbers.

    >>> divide_layers([1, 4, 7], 10)
    [Stretch(times=1, trained=0, frozen=1), Stretch(times=3, trained=1, frozen=2)]
    """
    pairs = list(_pair_runs([layer in trained for layer in range(layers)]))
    return [Stretch(len(list(equal)), *pair) for pair, equal in groupby(pairs)]


def _pair_runs(marks: list[bool]) -> Iterator[tuple[int, int]]:
    """(trained layers, frozen layers after them); only the first pair may have no trained ones."""
    trained = 0
    for mark, group in groupby(marks):
        length = len(list(group))
        if mark:
            trained = length
        else:
            yield trained, length
            trained = 0
    if trained:
        yield trained, 0


class PartScan:
    """(stream, rotary tables, deterministic) -> the stream after all layers, as `Decoder` takes it.

    With it comes what each layer of a mixture routed, [layer, X]; None of any other model.

    layers: the numbers of those that are trained. trained: their parameters, stacked. params: those
    of all layers, of which the frozen ones are read. key: of dropout. time: tokens of a sequence.
    """

    def __init__(
        self,
        network: Decoder,
        layers: Sequence[int],
        trained: Any,
        params: Any,
        key: jax.Array | None,
        time: int,
    ):
        self.stretches = divide_layers(layers, network.model.layer)
        self.trained = trained
        self.params = params
        self.key = key
        self.name = network.computation.layers
        kinds, numbers = number_kinds(list_kinds(network.model, time))
        self.kinds = jnp.asarray(numbers) if len(kinds) > 1 else None
        # Made here, outside of the decoder, of which it is no part.
        self.layer = Layer(
            **network.common,
            dropout=network.dropout,
            remat=network.remat,
            kernel=network.kernel,
            kinds=kinds,
        )

    def __call__(
        self, x_BxTxE: jax.Array, rotary: Any, deterministic: bool
    ) -> tuple[jax.Array, Routed | None]:
        apply = partial(self._apply, rotary, deterministic)
        # The next layer, and the next trained one.
        layer, number = 0, 0
        found = []
        for stretch in self.stretches:
            end = number + stretch.times * stretch.trained
            taken = jax.tree.map(partial(_cut, number, end, stretch), self.trained)
            starts = layer + stretch.period * jnp.arange(stretch.times)
            through = partial(self._run, apply, stretch)
            x_BxTxE, routed = jax.lax.scan(through, x_BxTxE, (starts, taken))
            found.append(jax.tree.map(_flatten, routed))
            layer += stretch.times * stretch.period
            number = end
        return x_BxTxE, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def _run(
        self, apply: Any, stretch: Stretch, x: jax.Array, inputs: tuple[jax.Array, Any]
    ) -> tuple[jax.Array, Routed | None]:
        """The trained layers of a stretch once, then its frozen ones. inputs: the first layer's
        number, and the parameters of the trained ones.
        """
        start, trained = inputs

        def pass_trained(x: jax.Array, inputs: tuple[jax.Array, Any]) -> Any:
            return apply(x, *inputs)

        def pass_frozen(x: jax.Array, layer: jax.Array) -> Any:
            # Taken by number from the whole, which is not copied.
            take = partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
            return apply(x, layer, jax.tree.map(take, self.params))

        found = []
        if stretch.trained:
            numbers = start + jnp.arange(stretch.trained)
            x, routed = jax.lax.scan(pass_trained, x, (numbers, trained))
            found.append(routed)
        if stretch.frozen:
            numbers = start + stretch.trained + jnp.arange(stretch.frozen)
            x, routed = jax.lax.scan(pass_frozen, x, numbers)
            found.append(routed)
        return x, jax.tree.map(lambda *parts: jnp.concatenate(parts), *found)

    def _apply(
        self, rotary: Any, deterministic: bool, x: jax.Array, layer: jax.Array, params: Any
    ) -> tuple[jax.Array, Routed | None]:
        """One layer, and what it routed."""
        rngs = {}
        if self.key is not None:
            rngs = {"dropout": jax.random.fold_in(self.key, layer)}
        kind = None if self.kinds is None else self.kinds[layer]
        variables = {"params": {self.name: params}}
        apply = partial(self.layer.apply, rngs=rngs)
        if not self.layer.computation.experts:
            return apply(variables, x, rotary, deterministic, kind), None
        after, kept = apply(variables, x, rotary, deterministic, kind, mutable=[ROUTED])
        return after, kept[ROUTED][self.name][self.layer.computation.mlp]["sums"]


def _flatten(routed: jax.Array) -> jax.Array:
    """[times, period, X] as one dimension of layers."""
    return routed.reshape(-1, *routed.shape[2:])


def _cut(begin: int, end: int, stretch: Stretch, leaf: jax.Array) -> jax.Array:
    """Some trained layers' parameters, [times, trained, ...]."""
    return leaf[begin:end].reshape(stretch.times, stretch.trained, *leaf.shape[1:])

"""A fixed set that is drawn at random, as many blocks of every layer."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.evict.random import mixed
from sim.policies.evict.static import FixedSet


class StaticUniform(FixedSet):
    """Loads as many blocks of each layer, drawn from the seed, before the first event, and never evicts.

    Each layer has its blocks in an order of its own. A pool of one layer takes from its front; the pool of all layers
    takes the first of every layer, then the second, and so on, so that lower layers have one more where it does not
    come out even. Needs no calibration, and so tells what a calibrated set is worth. Source: the uniform placement of
    GPU experts in kTransformers.
    """

    name: ClassVar[str] = "static-uniform"

    def order_of(self, pool: range) -> list[int]:
        experts, seed = self.context.experts, self.context.seed
        layers = [range(first, first + experts) for first in range(pool.start, pool.stop, experts)]
        drawn = [sorted(layer, key=lambda block: (mixed(seed, 0, block), block)) for layer in layers]
        return [block for of_layers in zip(*drawn, strict=True) for block in of_layers]

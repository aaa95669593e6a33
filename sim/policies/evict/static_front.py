"""A fixed set of whole layers, from the first one on."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.evict.static import FixedSet


class StaticFront(FixedSet):
    """Loads the lowest blocks before the first event, and never evicts.

    In the pool of all layers these are the first layers as a whole, and a part of the next one. A pool of one layer is
    filled with the layer's own lowest experts: only a global scope gives whole layers. Needs no calibration. Source:
    the split of llama.cpp by layers, and the front-loading placement of GPU experts in kTransformers.
    """

    name: ClassVar[str] = "static-front"

    def order_of(self, pool: range) -> list[int]:
        return [*pool]

"""The compiled twin of ``lowest-layer``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lowest_layer import LowestLayer


class LowestLayerState(NamedTuple):
    """What the policy knows."""

    experts: Array  # int64 [1]


def build(policy: LowestLayer) -> LowestLayerState:
    """The width of a layer."""
    return LowestLayerState(np.array([policy.context.experts], np.int64))


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return float(block // cache.counts.size)


register(LowestLayer, Twin(LowestLayerState, build, key=key))

"""The compiled twin of ``blend``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.ewma_reuse import observe
from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.blend import Blend


class BlendState(NamedTuple):
    """As of ``ewma-reuse``, with the weights of the terms."""

    last: Array  # int64 [B], event of the last use, -1 before it
    interval: Array  # float64 [B], smoothed, infinite before the second use
    beta: float
    layers: int
    freshness: float
    regularity: float
    height: float


def build(policy: Blend) -> BlendState:
    """No uses."""
    blocks, weight = policy.context.blocks, policy.options
    return BlendState(
        np.full(blocks, -1, np.int64),
        np.full(blocks, np.inf),
        float(weight["beta"]),
        policy.context.layers,
        float(weight["freshness"]),
        float(weight["regularity"]),
        float(weight["height"]),
    )


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    age = event // policy.layers - policy.last[block] // policy.layers
    fresh = policy.freshness * (1.0 / (age + 1))
    regular = policy.regularity * (policy.layers / policy.interval[block])
    high = policy.height * ((block // cache.counts.size + 1) / policy.layers)
    return float(fresh + regular + high)


register(Blend, Twin(BlendState, build, observe=observe, key=key))

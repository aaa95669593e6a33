"""The compiled twin of ``ewma-reuse``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.ewma_reuse import EwmaReuse


class EwmaReuseState(NamedTuple):
    """Uses, and what is between them."""

    last: Array  # int64 [B], event of the last use, -1 before it
    interval: Array  # float64 [B], smoothed, infinite before the second use
    beta: float


def build(policy: EwmaReuse) -> EwmaReuseState:
    """No uses."""
    blocks = policy.context.blocks
    return EwmaReuseState(np.full(blocks, -1, np.int64), np.full(blocks, np.inf), float(policy.options["beta"]))


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    gap = event - policy.last[block]
    if policy.interval[block] < np.inf:
        policy.interval[block] = (1.0 - policy.beta) * policy.interval[block] + policy.beta * gap
    elif policy.last[block] >= 0:
        policy.interval[block] = gap
    policy.last[block] = event


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return float(-policy.interval[block])


register(EwmaReuse, Twin(EwmaReuseState, build, observe=observe, key=key))

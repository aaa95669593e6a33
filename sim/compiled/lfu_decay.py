"""The compiled twin of ``lfu-decay``."""

from __future__ import annotations

from math import ldexp
from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lfu_decay import LfuDecay


class LfuDecayState(NamedTuple):
    """Counts, each as of so many halvings."""

    count: Array  # float64 [B]
    halvings: Array  # int64 [B]
    now: Array  # int64 [1]
    window: int  # events between halvings


def build(policy: LfuDecay) -> LfuDecayState:
    """Before the first event."""
    blocks = policy.context.blocks
    return LfuDecayState(
        np.zeros(blocks), np.zeros(blocks, np.int64), np.zeros(1, np.int64), int(policy.options["window"])
    )


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.now[0] = event // policy.window
    policy.count[block] = ldexp(policy.count[block], policy.halvings[block] - policy.now[0]) + 1.0
    policy.halvings[block] = policy.now[0]


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return ldexp(policy.count[block], policy.halvings[block] - policy.now[0])


register(LfuDecay, Twin(LfuDecayState, build, observe=observe, key=key))

"""The compiled twin of ``lfru``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lfru import Lfru


class LfruState(NamedTuple):
    """Uses over the whole run, and the last of them."""

    uses: Array  # int64 [B]
    last_use: Array  # int64 [B], an event


def build(policy: Lfru) -> LfruState:
    """Before the first event."""
    blocks = policy.context.blocks
    return LfruState(np.zeros(blocks, np.int64), np.full(blocks, -1, np.int64))


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.uses[block] += 1
    policy.last_use[block] = event


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    worth: float = policy.uses[block] / (event - policy.last_use[block] + 1)
    return worth


register(Lfru, Twin(LfruState, build, observe=observe, key=key))

"""The compiled twin of ``lfu-global``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lfu_global import LfuGlobal


class LfuGlobalState(NamedTuple):
    """Counts over the whole run."""

    uses: Array  # int64 [B]


def build(policy: LfuGlobal) -> LfuGlobalState:
    """Before the first event."""
    return LfuGlobalState(np.zeros(policy.context.blocks, np.int64))


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.uses[block] += 1


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    uses: int = policy.uses[block]
    return uses


register(LfuGlobal, Twin(LfuGlobalState, build, observe=observe, key=key))

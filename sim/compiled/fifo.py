"""The compiled twin of ``fifo``: a ring a pool, the first that came in first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.ring import ANY, OTHERS, append, closing, first, nodes, unlink
from sim.compiled.twin import RESIDENT, Array, Cache, Twin, register
from sim.policies.base import NEVER
from sim.policies.evict.fifo import Fifo


class FifoState(NamedTuple):
    """Rings of blocks; that of pool p is closed by the node B + p."""

    before: Array  # uint32 [B + P]
    after: Array  # uint32 [B + P]
    arrival: Array  # int64 [B], number of the block's arrival
    arrivals: Array  # int64 [1], so far


def build(policy: Fifo) -> FifoState:
    """Empty rings."""
    blocks, pools = policy.context.blocks, 1 if policy.context.shared else policy.context.layers
    return FifoState(nodes(blocks, pools), nodes(blocks, pools), np.zeros(blocks, np.int64), np.zeros(1, np.int64))


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return policy.arrival[block] if cache.resident[block] == RESIDENT else NEVER


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    return first(policy.after, closing(cache, pool), cache, decision, OTHERS if guarded else ANY)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    append(policy.before, policy.after, closing(cache, pool), block)
    policy.arrival[block] = policy.arrivals[0]
    policy.arrivals[0] += 1


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    unlink(policy.before, policy.after, block)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """A use does not matter."""


register(Fifo, Twin(FifoState, build, key=key, victim=victim, enter=enter, leave=leave, touch=touch))

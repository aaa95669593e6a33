"""The compiled twin of ``lru``: a doubly linked list a pool, least recently used at its head."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lru import Lru


class LruState(NamedTuple):
    """Links between blocks; pool p is closed into a ring by the node B + p."""

    before: Array  # int32 [B + P]
    after: Array  # int32 [B + P]


def build(policy: Lru) -> LruState:
    """Empty rings."""
    context = policy.context
    nodes = np.arange(context.blocks + (1 if context.shared else context.layers), dtype=np.int32)
    return LruState(nodes.copy(), nodes.copy())


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    ring = cache.resident.size + pool
    block = policy.after[ring]
    while guarded and block != ring and cache.mark[block] == decision:
        block = policy.after[block]
    return block if block != ring else -1


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    ring = cache.resident.size + pool
    last = policy.before[ring]
    policy.before[block], policy.after[block] = last, ring
    policy.after[last] = block
    policy.before[ring] = block


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    before, after = policy.before[block], policy.after[block]
    policy.after[before] = after
    policy.before[after] = before


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    ring = cache.resident.size + pool
    before, after = policy.before[block], policy.after[block]
    if after == ring:
        return
    policy.after[before] = after
    policy.before[after] = before
    last = policy.before[ring]
    policy.before[block], policy.after[block] = last, ring
    policy.after[last] = block
    policy.before[ring] = block


register(Lru, Twin(LruState, build, victim=victim, enter=enter, leave=leave, touch=touch))

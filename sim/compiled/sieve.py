"""The compiled twin of ``sieve``: a ring a pool, oldest first, and its hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.ring import ANY, OTHERS, OWN, append, closing, first, first_absent, may_leave, nodes, unlink
from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.sieve import Sieve


class SieveState(NamedTuple):
    """Rings of blocks; that of pool p is closed by the node B + p."""

    before: Array  # uint32 [B + P]
    after: Array  # uint32 [B + P]
    visited: Array  # uint8 [B]
    hand: Array  # uint32 [P], node at which the search begins; a ring's own stands for its oldest block


def build(policy: Sieve) -> SieveState:
    """Empty rings."""
    blocks, pools = policy.context.blocks, 1 if policy.context.shared else policy.context.layers
    links = nodes(blocks, pools)
    return SieveState(links, links.copy(), np.zeros(blocks, np.uint8), links[blocks:].copy())


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.visited[block] = cache.resident[block]


@jit
def _search(policy: Any, cache: Cache, pool: int, decision: int, who: int) -> int:
    """Moves the hand to the next block that is to leave, of which there is one."""
    ring = closing(cache, pool)
    block: int = policy.hand[pool]
    while True:
        if block == ring:
            block = policy.after[ring]
        if not policy.visited[block] and may_leave(cache, block, decision, who):
            policy.hand[pool] = block
            return block
        policy.visited[block] = 0
        block = policy.after[block]


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    if guarded and first(policy.after, closing(cache, pool), cache, decision, OTHERS) < 0:
        return -1
    return _search(policy, cache, pool, decision, OTHERS if guarded else ANY)


def own_victim(policy: Any, cache: Cache, pool: int, found: int, event: int, misses_first: bool) -> int:
    absent = first_absent(cache, found, event)
    return absent if absent >= 0 else _search(policy, cache, pool, event, OWN)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    append(policy.before, policy.after, closing(cache, pool), block)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    policy.hand[pool] = policy.after[block]
    unlink(policy.before, policy.after, block)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """The bit is set already."""


register(
    Sieve,
    Twin(
        SieveState, build, observe=observe, victim=victim, own_victim=own_victim, enter=enter, leave=leave, touch=touch
    ),
)

"""The compiled twins of ``belady`` and ``belady-forced``: a knock-out tournament a pool, won by what leaves next.

Of two blocks the one with the farther next use wins, else the one that was used longer ago, else the lower one. A hit
moves a block's next use away; it seldom wins more than a round by that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.twin import NOT_NEGATIVE, Array, Cache, Twin, register
from sim.policies.base import NEVER
from sim.policies.evict.belady import Belady
from sim.policies.evict.belady_forced import BeladyForced

LOW = 2**31 - 1
OUT = -1


class BeladyState(NamedTuple):
    """W is the number of blocks of a pool, rounded up to a power of two. Match m of a pool is between the winners of
    2 * m and 2 * m + 1, the last is 1; W + w is the place of the pool's block w."""

    rank: Array  # int64 [P * W], by place: next use in the upper bits, how long not used in the lower ones; or OUT
    winner: Array  # uint32 [P, 2 * W], by match: a block, counted from the first of its pool
    width: int


class BeladyForcedState(NamedTuple):
    """The same, under a name of its own."""

    rank: Array
    winner: Array
    width: int


def _arrays(policy: Belady) -> tuple[Any, ...]:
    pools = 1 if policy.context.shared else policy.context.layers
    width = 1 << (policy.context.blocks // pools - 1).bit_length()
    rounds = [np.arange(0, width, step) for step in (width >> n for n in range(width.bit_length()))]
    matches = np.concatenate([[0], *rounds]).astype(np.uint32)  # while nobody is in, the lower side wins
    return np.full(pools * width, OUT, np.int64), np.tile(matches, (pools, 1)), width


def build(policy: Belady) -> BeladyState:
    """Nobody is in."""
    return BeladyState(*_arrays(policy))


def build_forced(policy: BeladyForced) -> BeladyForcedState:
    """Nobody is in."""
    return BeladyForcedState(*_arrays(policy))


@jit
def _entrant(policy: Any, cache: Cache, pool: int, block: int) -> int:
    """The number of ``block`` in its pool."""
    return (block - pool * cache.counts.size if cache.size.size > 1 else block) & NOT_NEGATIVE


@jit
def _beaten(policy: Any, pool: int, place: int, rank: int) -> bool:
    """Whether the winner of ``place``'s opponent has more than ``rank``, or as much on the lower side."""
    other = policy.winner[pool, place ^ 1]
    other_rank: int = policy.rank[(pool * policy.width + other) & NOT_NEGATIVE]
    return other_rank + (place & 1) > rank


@jit
def _rise(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """Ranks ``block`` anew, no lower than before; no next use at all, -1, is the largest number of the upper bits."""
    entrant = _entrant(policy, cache, pool, block)
    rank = ((cache.upcoming[block] & LOW) << 31) + LOW - decision
    policy.rank[(pool * policy.width + entrant) & NOT_NEGATIVE] = rank
    place = (policy.width + entrant) & NOT_NEGATIVE
    while place > 1 and not _beaten(policy, pool, place, rank):
        place = (place >> 1) & NOT_NEGATIVE
        policy.winner[pool, place] = entrant


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return -cache.upcoming[block] if cache.upcoming[block] >= 0 else -NEVER


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    entrant = policy.winner[pool, 1]
    block = entrant + (pool * cache.counts.size if cache.size.size > 1 else 0)
    # What an event uses was last told to be used next now, sooner than all others: it wins only when it is alone.
    alone = policy.rank[(pool * policy.width + entrant) & NOT_NEGATIVE] == OUT
    return -1 if alone or (guarded and cache.mark[block] == decision) else block


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    _rise(policy, cache, pool, block, decision)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    _rise(policy, cache, pool, block, decision)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    entrant = _entrant(policy, cache, pool, block)
    base, best, rank = pool * policy.width, entrant, OUT
    policy.rank[(base + entrant) & NOT_NEGATIVE] = OUT
    place = (policy.width + entrant) & NOT_NEGATIVE
    while place > 1:  # what is carried along need not be read back, which would take most of the time
        other = policy.winner[pool, place ^ 1] & NOT_NEGATIVE
        other_rank = policy.rank[(base + other) & NOT_NEGATIVE]
        wins = other_rank + (place & 1) > rank
        best, rank = other if wins else best, other_rank if wins else rank
        place = (place >> 1) & NOT_NEGATIVE
        policy.winner[pool, place] = best


register(Belady, Twin(BeladyState, build, key=key, victim=victim, enter=enter, touch=touch, leave=leave))
register(
    BeladyForced,
    Twin(BeladyForcedState, build_forced, key=key, victim=victim, enter=enter, touch=touch, leave=leave),
)

"""The compiled twins of ``belady`` and ``belady-forced``: a knock-out tournament a pool, won by what leaves next.

Of two blocks the one with the farther next use wins, else the one that was used longer ago, else the lower one. The
first round is between the blocks of a box. A hit moves a block's next use away; it seldom wins its box by that, and
then nothing has to be done.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.twin import NOT_NEGATIVE, Array, Cache, Twin, register
from sim.policies.base import NEVER
from sim.policies.evict.belady import Belady
from sim.policies.evict.belady_forced import BeladyForced

BOX = 8
LOW = 2**31 - 1
OUT = -1


class BeladyState(NamedTuple):
    """A pool has M boxes of seats, M a power of two, at least one seat for each of its blocks. Match m of a pool is
    between the winners of 2 * m and 2 * m + 1, the last is 1; M + n is the round within box n."""

    rank: Array  # int64 [P, BOX * M], by seat: next use in the upper bits, how long not used in the lower ones; or OUT
    owner: Array  # int32 [P, BOX * M], by seat: its block; of a free seat the one that is taken after it
    free: Array  # int32 [P], the seat that is taken next
    seat: Array  # int32 [B]
    winner: Array  # uint32 [P, 2 * M], by match: a seat
    uses: Array  # int64 [1], so far


class BeladyForcedState(NamedTuple):
    """The same, under a name of its own."""

    rank: Array
    owner: Array
    free: Array
    seat: Array
    winner: Array
    uses: Array


def _arrays(policy: Belady) -> tuple[Any, ...]:
    blocks, pools = policy.context.blocks, 1 if policy.context.shared else policy.context.layers
    boxes = 1 << ((blocks // pools - 1) // BOX).bit_length()
    rounds = [BOX * np.arange(0, boxes, step) for step in (boxes >> n for n in range(boxes.bit_length()))]
    winner = np.concatenate([[0], *rounds]).astype(np.uint32)  # while nobody is in, the lower side wins
    return (
        np.full((pools, BOX * boxes), OUT, np.int64),
        np.tile(np.arange(1, BOX * boxes + 1, dtype=np.int32), (pools, 1)),
        np.zeros(pools, np.int32),
        np.zeros(blocks, np.int32),
        np.tile(winner, (pools, 1)),
        np.zeros(1, np.int64),
    )


def build(policy: Belady) -> BeladyState:
    """Nobody is in."""
    return BeladyState(*_arrays(policy))


def build_forced(policy: BeladyForced) -> BeladyForcedState:
    """Nobody is in."""
    return BeladyForcedState(*_arrays(policy))


@jit
def _rise(policy: Any, cache: Cache, pool: int, block: int) -> None:
    """Ranks ``block`` anew, no lower than before; no next use at all, -1, is the largest number of the upper bits. The
    blocks of an event come one after the other, the lowest first: no two have the same rank."""
    policy.uses[0] += 1
    rank = ((cache.upcoming[block] & LOW) << 31) + LOW - policy.uses[0]
    seat = policy.seat[block] & NOT_NEGATIVE
    policy.rank[pool, seat] = rank
    match = (policy.winner.shape[1] // 2 + seat // BOX) & NOT_NEGATIVE
    while match > 0 and policy.rank[pool, policy.winner[pool, match]] <= rank:
        policy.winner[pool, match] = seat
        match >>= 1


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return -cache.upcoming[block] if cache.upcoming[block] >= 0 else -NEVER


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    seat = policy.winner[pool, 1]
    # What an event uses was last told to be used next now, sooner than all others: it wins only when it is alone.
    if policy.rank[pool, seat] == OUT:
        return -1
    block = policy.owner[pool, seat] & NOT_NEGATIVE
    return -1 if guarded and cache.mark[block] == decision else block


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    seat = policy.free[pool] & NOT_NEGATIVE
    policy.free[pool] = policy.owner[pool, seat]
    policy.owner[pool, seat] = block
    policy.seat[block] = seat
    _rise(policy, cache, pool, block)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    _rise(policy, cache, pool, block)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    seat = policy.seat[block] & NOT_NEGATIVE
    policy.owner[pool, seat] = policy.free[pool]
    policy.free[pool] = seat
    policy.rank[pool, seat] = OUT
    best, rank = seat, OUT
    for other in range(seat // BOX * BOX, seat // BOX * BOX + BOX):
        other_rank = policy.rank[pool, other]
        best, rank = other if other_rank > rank else best, max(other_rank, rank)
    match = (policy.winner.shape[1] // 2 + seat // BOX) & NOT_NEGATIVE
    policy.winner[pool, match] = best
    while match > 1:  # what is carried along need not be read back, which would take most of the time
        other = policy.winner[pool, match ^ 1] & NOT_NEGATIVE
        other_rank = policy.rank[pool, other]
        best, rank = other if other_rank > rank else best, max(other_rank, rank)
        match = (match >> 1) & NOT_NEGATIVE
        policy.winner[pool, match] = best


register(Belady, Twin(BeladyState, build, key=key, victim=victim, enter=enter, touch=touch, leave=leave))
register(
    BeladyForced,
    Twin(BeladyForcedState, build_forced, key=key, victim=victim, enter=enter, touch=touch, leave=leave),
)

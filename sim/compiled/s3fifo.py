"""The compiled twin of ``s3fifo``: three rings a pool, oldest first."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.ring import (
    ANY,
    OTHERS,
    OWN,
    append,
    closing,
    first,
    first_absent,
    may_leave,
    nodes,
    pool_of,
    unlink,
    weight_of,
    weights_of,
)
from sim.compiled.twin import NOT_NEGATIVE, Array, Cache, Twin, register
from sim.policies.evict.s3fifo import MOST_USES, S3Fifo

SMALL, MAIN, GHOST, RETURNING, NOWHERE = range(5)


class S3FifoState(NamedTuple):
    """Rings of blocks; queue q of pool p is closed by the node B + 3 * p + q."""

    before: Array  # uint32 [B + 3 * P]
    after: Array  # uint32 [B + 3 * P]
    uses: Array  # uint8 [B], since the block came into its queue
    queue: Array  # uint8 [B], one of the above
    weight: Array  # int64 [3 * P], of what is in a queue
    evicted: Array  # uint8 [P], whether anything was
    weights: Array  # int64 [B], of a block; empty when each weighs 1
    small_room: int
    main_room: int
    ghost_room: int
    promotion: int


def build(policy: S3Fifo) -> S3FifoState:
    """Empty rings."""
    context = policy.context
    blocks, pools = context.blocks, 1 if context.shared else context.layers
    pool: Any = policy.new_pool(policy.context)
    return S3FifoState(
        before=nodes(blocks, 3 * pools),
        after=nodes(blocks, 3 * pools),
        uses=np.zeros(blocks, np.uint8),
        queue=np.full(blocks, NOWHERE, np.uint8),
        weight=np.zeros(3 * pools, np.int64),
        evicted=np.zeros(pools, np.uint8),
        weights=weights_of(context),
        small_room=pool.small_room,
        main_room=pool.capacity - pool.small_room,
        ghost_room=pool.ghost_room,
        promotion=pool.promotion,
    )


@jit
def _place(pool: int, queue: int) -> int:
    return (3 * pool + queue) & NOT_NEGATIVE


@jit
def _push(policy: Any, cache: Cache, pool: int, block: int, queue: int) -> None:
    append(policy.before, policy.after, closing(cache, 3 * pool + queue), block)
    policy.queue[block] = queue
    policy.weight[_place(pool, queue)] += weight_of(policy.weights, block)


@jit
def _remove(policy: Any, pool: int, block: int) -> None:
    unlink(policy.before, policy.after, block)
    policy.weight[_place(pool, policy.queue[block])] -= weight_of(policy.weights, block)
    policy.queue[block] = NOWHERE


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    if cache.resident[block]:
        policy.uses[block] += policy.uses[block] < MOST_USES
    elif policy.queue[block] == GHOST:
        _remove(policy, pool_of(cache, block), block)
        policy.queue[block] = RETURNING


@jit
def _from_small(policy: Any, cache: Cache, pool: int, decision: int, who: int) -> int:
    ring = closing(cache, 3 * pool + SMALL)
    block: int = policy.after[ring]
    while block != ring:
        younger = policy.after[block]
        if policy.uses[block] >= policy.promotion:
            _remove(policy, pool, block)
            _push(policy, cache, pool, block, MAIN)
            policy.uses[block] = 0
        elif may_leave(cache, block, decision, who):
            return block
        block = younger
    return -1


@jit
def _from_main(policy: Any, cache: Cache, pool: int, decision: int, who: int) -> int:
    ring = closing(cache, 3 * pool + MAIN)
    used = True
    while used:
        used = False
        last = policy.before[ring]
        block: int = policy.after[ring]
        while block != ring:
            younger = policy.after[block] if block != last else ring
            if policy.uses[block]:
                policy.uses[block] -= 1
                used = True
                unlink(policy.before, policy.after, block)
                append(policy.before, policy.after, ring, block)
            elif may_leave(cache, block, decision, who):
                return block
            block = younger
    return -1


@jit
def _search(policy: Any, cache: Cache, pool: int, decision: int, who: int) -> int:
    """Goes through the queues up to the next block that is to leave, of which there is one."""
    policy.evicted[pool] = 1
    block = -1
    if policy.weight[_place(pool, MAIN)] > policy.main_room:
        block = _from_main(policy, cache, pool, decision, who)
    if block < 0:
        block = _from_small(policy, cache, pool, decision, who)
    return block if block >= 0 else _from_main(policy, cache, pool, decision, who)


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    if (
        guarded
        and first(policy.after, closing(cache, 3 * pool + SMALL), cache, decision, OTHERS) < 0
        and first(policy.after, closing(cache, 3 * pool + MAIN), cache, decision, OTHERS) < 0
    ):
        return -1
    return _search(policy, cache, pool, decision, OTHERS if guarded else ANY)


def own_victim(policy: Any, cache: Cache, pool: int, found: int, event: int, misses_first: bool) -> int:
    absent = first_absent(cache, found, event)
    return absent if absent >= 0 else _search(policy, cache, pool, event, OWN)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    filling = not policy.evicted[pool] and policy.weight[_place(pool, SMALL)] >= policy.small_room
    queue = MAIN if filling or policy.queue[block] == RETURNING else SMALL
    _push(policy, cache, pool, block, queue)
    policy.uses[block] = 0


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    kept = policy.queue[block] == SMALL
    _remove(policy, pool, block)
    if kept:
        _push(policy, cache, pool, block, GHOST)
        ring = closing(cache, 3 * pool + GHOST)
        while policy.weight[_place(pool, GHOST)] > policy.ghost_room:
            _remove(policy, pool, policy.after[ring])


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """The use is counted already."""


def forget(policy: Any, block: int) -> None:
    if policy.queue[block] == RETURNING:
        policy.queue[block] = NOWHERE


register(
    S3Fifo,
    Twin(
        S3FifoState,
        build,
        observe=observe,
        victim=victim,
        own_victim=own_victim,
        enter=enter,
        leave=leave,
        touch=touch,
        forget=forget,
    ),
)

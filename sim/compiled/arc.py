"""The compiled twin of ``arc``: four rings a pool, oldest first."""

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
    nodes,
    pool_of,
    unlink,
    weight_of,
    weights_of,
)
from sim.compiled.twin import NOT_NEGATIVE, Array, Cache, Twin, register
from sim.policies.evict.arc import Arc

ONCE, OFTEN, ONCE_GHOST, OFTEN_GHOST, NOWHERE = range(5)


class ArcState(NamedTuple):
    """Rings of blocks; list q of pool p is closed by the node B + 4 * p + q."""

    before: Array  # uint32 [B + 4 * P]
    after: Array  # uint32 [B + 4 * P]
    list: Array  # uint8 [B], one of the above
    weight: Array  # int64 [4 * P], of what is in a list
    target: Array  # float64 [P], of the list of blocks used once
    favours: Array  # uint8 [P], whether the last miss was found in the ghost of the blocks used often
    weights: Array  # int64 [B], of a block; empty when each weighs 1
    capacity: int


def build(policy: Arc) -> ArcState:
    """Empty rings."""
    context = policy.context
    blocks, pools = context.blocks, 1 if context.shared else context.layers
    return ArcState(
        before=nodes(blocks, 4 * pools),
        after=nodes(blocks, 4 * pools),
        list=np.full(blocks, NOWHERE, np.uint8),
        weight=np.zeros(4 * pools, np.int64),
        target=np.zeros(pools),
        favours=np.zeros(pools, np.uint8),
        weights=weights_of(context),
        capacity=context.capacity,
    )


@jit
def _place(pool: int, which: int) -> int:
    return (4 * pool + which) & NOT_NEGATIVE


@jit
def _push(policy: Any, cache: Cache, pool: int, block: int, which: int) -> None:
    append(policy.before, policy.after, closing(cache, 4 * pool + which), block)
    policy.list[block] = which
    policy.weight[_place(pool, which)] += weight_of(policy.weights, block)


@jit
def _remove(policy: Any, pool: int, block: int) -> None:
    unlink(policy.before, policy.after, block)
    policy.weight[_place(pool, policy.list[block])] -= weight_of(policy.weights, block)
    policy.list[block] = NOWHERE


@jit
def _adapt(policy: Any, pool: int, block: int) -> None:
    """Moves the target by what the ghosts say of a miss."""
    found, step = policy.list[block], weight_of(policy.weights, block)
    once, often = policy.weight[_place(pool, ONCE_GHOST)], policy.weight[_place(pool, OFTEN_GHOST)]
    policy.favours[pool] = found == OFTEN_GHOST
    if found == ONCE_GHOST:
        policy.target[pool] = min(float(policy.capacity), policy.target[pool] + step * max(1.0, often / once))
    elif found == OFTEN_GHOST:
        policy.target[pool] = max(0.0, policy.target[pool] - step * max(1.0, once / often))


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    pool = pool_of(cache, block)
    if not cache.resident[block]:
        _adapt(policy, pool, block)
    elif policy.list[block] == OFTEN:
        unlink(policy.before, policy.after, block)
        append(policy.before, policy.after, closing(cache, 4 * pool + OFTEN), block)
    else:
        _remove(policy, pool, block)
        _push(policy, cache, pool, block, OFTEN)


@jit
def _search(policy: Any, cache: Cache, pool: int, decision: int, who: int) -> int:
    """The next block that is to leave, -1 for none."""
    once, target = policy.weight[_place(pool, ONCE)], policy.target[pool]
    lead = ONCE if once > target or (policy.favours[pool] and once == target) else OFTEN
    block = first(policy.after, closing(cache, 4 * pool + lead), cache, decision, who)
    return (
        block
        if block >= 0
        else first(policy.after, closing(cache, 4 * pool + ONCE + OFTEN - lead), cache, decision, who)
    )


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    return _search(policy, cache, pool, decision, OTHERS if guarded else ANY)


def own_victim(policy: Any, cache: Cache, pool: int, found: int, event: int, misses_first: bool) -> int:
    absent = first_absent(cache, found, event)
    return absent if absent >= 0 else _search(policy, cache, pool, event, OWN)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    ghost = ONCE_GHOST if policy.list[block] == ONCE else OFTEN_GHOST
    _remove(policy, pool, block)
    _push(policy, cache, pool, block, ghost)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    if policy.list[block] == NOWHERE:
        _push(policy, cache, pool, block, ONCE)
    else:
        _remove(policy, pool, block)
        _push(policy, cache, pool, block, OFTEN)
    policy.favours[pool] = 0
    weight = policy.weight
    once = policy.capacity - weight[_place(pool, ONCE)]
    while weight[_place(pool, ONCE_GHOST)] > once:
        _remove(policy, pool, policy.after[closing(cache, 4 * pool + ONCE_GHOST)])
    rest = weight[_place(pool, ONCE)] + weight[_place(pool, ONCE_GHOST)] + weight[_place(pool, OFTEN)]
    while weight[_place(pool, OFTEN_GHOST)] > 2 * policy.capacity - rest:
        _remove(policy, pool, policy.after[closing(cache, 4 * pool + OFTEN_GHOST)])


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    """The block was moved already."""


register(
    Arc,
    Twin(ArcState, build, observe=observe, victim=victim, own_victim=own_victim, enter=enter, leave=leave, touch=touch),
)

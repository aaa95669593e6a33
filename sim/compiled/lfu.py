"""The compiled twin of ``lfu``, in constant time: a ring a pool, sorted by use, and the end of each run of equals."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.ring import ANY, OTHERS, closing, first, nodes
from sim.compiled.twin import RESIDENT, Array, Cache, Twin, register
from sim.policies.evict.lfu import Lfu


class LfuState(NamedTuple):
    """Rings of blocks, fewest uses first, then least recently used; that of pool p is closed by the node B + p.

    A *run* is what has the same number of uses in a pool. Numbers of runs that no block has are kept on a stack.
    """

    before: Array  # uint32 [B + P]
    after: Array  # uint32 [B + P]
    run: Array  # uint32 [B + P], of a block; B, a run without uses, for the nodes that close rings
    uses: Array  # int64 [B + 1], of each block of a run
    last: Array  # uint32 [B], block of a run
    spare: Array  # uint32 [B], stack of numbers
    spares: Array  # int64 [1], height of the stack


def build(policy: Lfu) -> LfuState:
    """Empty rings."""
    blocks, pools = policy.context.blocks, 1 if policy.context.shared else policy.context.layers
    return LfuState(
        before=nodes(blocks, pools),
        after=nodes(blocks, pools),
        run=np.full(blocks + pools, blocks, np.uint32),
        uses=np.zeros(blocks + 1, np.int64),
        last=np.zeros(blocks, np.uint32),
        spare=np.arange(blocks, dtype=np.uint32),
        spares=np.array([blocks], np.int64),
    )


@jit
def _take(policy: Any, block: int) -> None:
    """Takes ``block`` out of its run and its ring."""
    old, young, run = policy.before[block], policy.after[block], policy.run[block]
    policy.after[old], policy.before[young] = young, old
    if policy.last[run] == block:
        policy.last[run] = old
        if policy.run[old] != run:
            policy.spare[policy.spares[0]] = run
            policy.spares[0] += 1


@jit
def _put(policy: Any, block: int, old: int, uses: int) -> None:
    """Puts ``block``, with that many uses, behind ``old``, which has fewer, and those that have as many."""
    run = policy.run[policy.after[old]]
    if policy.uses[run] == uses:
        old = policy.last[run]
    else:
        policy.spares[0] -= 1
        run = policy.spare[policy.spares[0]]
        policy.uses[run] = uses
    young = policy.after[old]
    policy.before[block], policy.after[block] = old, young
    policy.after[old], policy.before[young] = block, block
    policy.run[block] = run
    policy.last[run] = block


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return policy.uses[policy.run[block]] + 1 if cache.resident[block] == RESIDENT else 1


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    return first(policy.after, closing(cache, pool), cache, decision, OTHERS if guarded else ANY)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    _put(policy, block, closing(cache, pool), 1)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    _take(policy, block)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    run = policy.run[block]
    uses, last, next_run = policy.uses[run] + 1, policy.last[run], policy.run[policy.after[policy.last[run]]]
    if last == block and policy.run[policy.before[block]] != run and policy.uses[next_run] != uses:
        policy.uses[run] = uses
        return
    old = last if last != block else policy.before[block]
    _take(policy, block)
    _put(policy, block, old, uses)


register(Lfu, Twin(LfuState, build, key=key, victim=victim, enter=enter, leave=leave, touch=touch))

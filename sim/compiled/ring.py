"""Queues of blocks as doubly linked rings: each is closed by a node of its own, after which its oldest block stands."""

from __future__ import annotations

import numpy as np

from sim.compiled import jit
from sim.compiled.twin import NOT_NEGATIVE, Array, Cache
from sim.policies.base import PolicyContext

ANY, OTHERS, OWN = range(3)
"""Which blocks may leave: all; those that the decision at hand has not marked; only those that it has."""


def nodes(blocks: int, rings: int) -> Array:
    """Links of empty rings, uint32 [blocks + rings]; both directions begin like this."""
    return np.arange(blocks + rings, dtype=np.uint32)


@jit
def append(before: Array, after: Array, ring: int, node: int) -> None:
    """``node`` becomes the youngest of ``ring``."""
    last = before[ring]
    before[node], after[node] = last, ring
    after[last] = node
    before[ring] = node


@jit
def unlink(before: Array, after: Array, node: int) -> None:
    """``node`` leaves its ring."""
    old, young = before[node], after[node]
    after[old] = young
    before[young] = old


@jit
def may_leave(cache: Cache, block: int, decision: int, who: int) -> bool:
    """Whether ``block`` is among those that may leave."""
    return who == ANY or (cache.mark[block] == decision) == (who == OWN)


@jit
def first(after: Array, ring: int, cache: Cache, decision: int, who: int) -> int:
    """The oldest block of ``ring`` that may leave, -1 for none."""
    block: int = after[ring]
    while block != ring and not may_leave(cache, block, decision, who):
        block = after[block]
    return block if block != ring else -1


@jit
def first_absent(cache: Cache, found: int, event: int) -> int:
    """The lowest of the event's blocks, still marked, that is not resident; -1 for none."""
    for index in range(found):
        block: int = cache.union[index]
        if cache.mark[block] == event and not cache.resident[block]:
            return block
    return -1


@jit
def closing(cache: Cache, ring: int) -> int:
    """The node that closes ring number ``ring``: those of the blocks come before."""
    node: int = (cache.resident.size + ring) & NOT_NEGATIVE
    return node


@jit
def pool_of(cache: Cache, block: int) -> int:
    """The pool that ``block`` belongs to."""
    return block // cache.counts.size if cache.size.size > 1 else 0


def weights_of(context: PolicyContext) -> Array:
    """The weight of each block, int64 [B]; empty when all weigh 1, which is quicker to know than to look up."""
    weights = np.repeat(np.array(context.weights, np.int64), context.experts)
    return weights if (weights != 1).any() else weights[:0]


@jit
def weight_of(weights: Array, block: int) -> int:
    """What ``block`` weighs, with the array of :func:`weights_of`."""
    weight: int = weights[block] if weights.size else 1
    return weight

"""The compiled twin of ``lru``: a ring a pool, least recently used first."""

from __future__ import annotations

from typing import Any, NamedTuple

from sim.compiled.ring import ANY, OTHERS, append, closing, first, nodes, unlink
from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.lru import Lru


class LruState(NamedTuple):
    """Rings of blocks; that of pool p is closed by the node B + p."""

    before: Array  # uint32 [B + P]
    after: Array  # uint32 [B + P]


def build(policy: Lru) -> LruState:
    """Empty rings."""
    context = policy.context
    pools = 1 if context.shared else context.layers
    return LruState(nodes(context.blocks, pools), nodes(context.blocks, pools))


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    return first(policy.after, closing(cache, pool), cache, decision, OTHERS if guarded else ANY)


def enter(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    append(policy.before, policy.after, closing(cache, pool), block)


def leave(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    unlink(policy.before, policy.after, block)


def touch(policy: Any, cache: Cache, pool: int, block: int, decision: int) -> None:
    unlink(policy.before, policy.after, block)
    append(policy.before, policy.after, closing(cache, pool), block)


register(Lru, Twin(LruState, build, victim=victim, enter=enter, leave=leave, touch=touch))

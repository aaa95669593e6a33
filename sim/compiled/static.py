"""The compiled twin of all fixed sets: what has come in stays, so that only what is ranked beside it can go."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import RANKED, Array, Cache, Twin, register
from sim.policies.evict.static import FixedSet, Static
from sim.policies.evict.static_front import StaticFront
from sim.policies.evict.static_uniform import StaticUniform


class StaticState(NamedTuple):
    """Nothing to know: the set stands in the cache."""

    blocks: Array  # int64 [1]


def build(policy: FixedSet) -> StaticState:
    """The state."""
    return StaticState(np.array([policy.context.blocks], np.int64))


def victim(policy: Any, cache: Cache, pool: int, event: int, decision: int, guarded: bool) -> int:
    """The lowest of the blocks that are ranked: residents never leave, so that these are the last members."""
    width = cache.members.size // cache.size.size
    place = pool * width + cache.size[pool] - 1
    best = cache.members[place]
    while place >= pool * width and cache.resident[cache.members[place]] == RANKED:
        best = min(best, cache.members[place])
        place -= 1
    return int(best)


for kind in (Static, StaticUniform, StaticFront):
    register(kind, Twin(StaticState, build, victim=victim))

"""The compiled twin of ``static``: what has come in stays, so that only what is ranked beside it can go."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import RANKED, Array, Cache, Twin, register
from sim.policies.evict.static import Static


class StaticState(NamedTuple):
    """Nothing to know: the set stands in the cache."""

    blocks: Array  # int64 [1]


def build(policy: Static) -> StaticState:
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


register(Static, Twin(StaticState, build, victim=victim))

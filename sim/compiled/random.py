"""The compiled twin of ``random``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.stream import mixed
from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.random import Random


class RandomState(NamedTuple):
    """The seed, and what tells the decision at hand."""

    seed: int
    told: Array  # int64 [2]: event, and how many of its blocks were told


def build(policy: Random) -> RandomState:
    """Before the first event."""
    return RandomState(policy.context.seed, np.array([-1, 0], np.int64))


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.told[1] = 1 + (policy.told[1] if policy.told[0] == event else 0)
    policy.told[0] = event


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return mixed(policy.seed, event * (cache.counts.size + 1) + policy.told[1], block)


register(Random, Twin(RandomState, build, observe=observe, key=key))

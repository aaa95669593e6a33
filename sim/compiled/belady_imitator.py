"""The compiled twin of ``belady-imitator``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.belady_imitator import AGES, FADING, RATES, BeladyImitator

SOON, LATE = RATES


class BeladyImitatorState(NamedTuple):
    """What the networks look at, and the networks."""

    last: Array  # int64 [B], event of the last use, -1 before it
    often: Array  # float64 [2, B], frequencies as of the last use
    fading: Array  # float64 [2, AGES + 1]
    into: Array  # float64 [L, 3, H]
    bias: Array  # float64 [L, H]
    out: Array  # float64 [L, H]
    out_bias: Array  # float64 [L]


def build(policy: BeladyImitator) -> BeladyImitatorState:
    """No uses; the networks of the policy."""
    blocks = policy.context.blocks
    networks = map(np.ascontiguousarray, policy.networks)
    return BeladyImitatorState(np.full(blocks, -1, np.int64), np.zeros((len(RATES), blocks)), FADING, *networks)


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    age = min((event - policy.last[block]) // policy.out_bias.size, AGES) if policy.last[block] >= 0 else AGES
    policy.often[0, block] = policy.often[0, block] * policy.fading[0, age] + SOON
    policy.often[1, block] = policy.often[1, block] * policy.fading[1, age] + LATE
    policy.last[block] = event


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    layer = block // cache.counts.size
    age = min((event - policy.last[block]) // policy.out_bias.size, AGES) if policy.last[block] >= 0 else AGES
    recency = 1.0 / (age + 1.0)
    soon = policy.often[0, block] * policy.fading[0, age]
    late = policy.often[1, block] * policy.fading[1, age]
    reuse = policy.out_bias[layer]
    for unit in range(policy.bias.shape[1]):
        level = policy.bias[layer, unit] + policy.into[layer, 0, unit] * recency
        level = level + policy.into[layer, 1, unit] * soon + policy.into[layer, 2, unit] * late
        reuse = reuse + policy.out[layer, unit] * max(level, 0.0)
    return float(-reuse)


register(BeladyImitator, Twin(BeladyImitatorState, build, observe=observe, key=key))

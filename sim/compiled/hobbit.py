"""The compiled twin of ``hobbit``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.hobbit import Hobbit


class HobbitState(NamedTuple):
    """The request's records, and the weights of the terms."""

    last: Array  # int64 [B], pass of the request that used a block last, 0 for none
    uses: Array  # int64 [B], passes of the request that used it
    first: Array  # int64 [1], pass in which the request began, -1 before it
    layers: int
    recency: float
    frequency: float
    high_precision: float
    layer: float


def build(policy: Hobbit) -> HobbitState:
    """No uses."""
    blocks, weight = policy.context.blocks, policy.options
    return HobbitState(
        np.zeros(blocks, np.int64),
        np.zeros(blocks, np.int64),
        np.full(1, -1, np.int64),
        policy.context.layers,
        float(weight["recency"]),
        float(weight["frequency"]),
        float(weight["high_precision"]),
        float(weight["layer"]),
    )


def begin_sequence(policy: Any) -> None:
    policy.first[0] = -1
    for block in range(policy.last.size):
        policy.last[block] = policy.uses[block] = 0


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    number = event // policy.layers
    if policy.first[0] < 0:
        policy.first[0] = number
    policy.last[block] = number - policy.first[0] + 1
    policy.uses[block] += 1


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    layers = policy.layers
    passes = event // layers - policy.first[0] + 1
    near = 1.0 - ((block // cache.counts.size - event % layers) % layers) / layers
    used = policy.uses[block] / passes
    worth = policy.recency * (policy.last[block] / passes) + policy.frequency * used
    return float(worth + policy.high_precision * used + policy.layer * near)


register(Hobbit, Twin(HobbitState, build, begin_sequence=begin_sequence, observe=observe, key=key))

"""The compiled twin of ``eam``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.eam import FLOOR, Eam


class EamState(NamedTuple):
    """Counts of the run and of the request."""

    visits: Array  # int64 [B], events that used a block, in the whole run
    tokens: Array  # int64 [B], of the request
    rows: Array  # int64 [L], sums of ``tokens``
    total: Array  # int64 [1], sum of ``visits``
    as_released: bool


def build(policy: Eam) -> EamState:
    """No uses."""
    counts, rows = np.zeros(policy.context.blocks, np.int64), np.zeros(policy.context.layers, np.int64)
    return EamState(counts, counts.copy(), rows, np.zeros(1, np.int64), bool(policy.options["as_released"]))


def begin_sequence(policy: Any) -> None:
    for block in range(policy.tokens.size):
        policy.tokens[block] = 0
    for layer in range(policy.rows.size):
        policy.rows[layer] = 0


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    policy.visits[block] += 1
    policy.total[0] += 1
    policy.tokens[block] += tokens
    policy.rows[block // cache.counts.size] += tokens


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    layers, experts = policy.rows.size, cache.counts.size
    layer = block // experts
    row = policy.rows[layer]
    share = policy.tokens[block] / row if row > 0 else 1.0 / experts
    now = event % layers
    if policy.as_released:
        later = (layers * (layers - 1) - now * (now + 1)) / 2 / (layers + 1)
        near = (layer / (layers + 1) if layer > now else 1.0) / (experts * (now + 1 + later))
    else:
        near = (1.0 - ((layer - now) % layers) / layers) / (experts * (layers + 1) / 2)
    worth = policy.visits[block] / max(policy.total[0], 1) + FLOOR
    return float(worth * (share / layers + FLOOR) * (near + FLOOR))


register(Eam, Twin(EamState, build, begin_sequence=begin_sequence, observe=observe, key=key))

"""The compiled twin of ``mrs``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled import jit
from sim.compiled.stream import Stream
from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.mrs import BATCHES, Mrs
from traces.schema import NOT_ROUTED

MEAN, FIRST, MAX = range(len(BATCHES))


class MrsState(NamedTuple):
    """The smoothed scores, and room to work out the next ones."""

    scores: Array  # float64 [L, E]
    row: Array  # float64 [E], an event's scores
    token: Array  # float64 [E], those of one of its tokens
    top: Array  # int64 [p], experts with the largest, in order
    alpha: float
    batch: int


def build(policy: Mrs) -> MrsState:
    """No scores."""
    context = policy.context
    return MrsState(
        np.zeros((context.layers, context.experts)),
        np.zeros(context.experts),
        np.zeros(context.experts),
        np.zeros(policy.kept, np.int64),
        float(policy.options["alpha"]),
        list(BATCHES).index(policy.options["batch"]),
    )


def observe_scores(policy: Any, stream: Stream, first: int, last: int, layer: int) -> None:
    row, top = policy.row, policy.top
    row[:] = 0.0
    for index in range(first, first + 1 if policy.batch == FIRST else last):
        _read(stream, stream.rows[index] if stream.rows.size else index, layer, policy.token)
        for expert in range(row.size):
            score = policy.token[expert]
            row[expert] = max(row[expert], score) if policy.batch == MAX else row[expert] + score
    if policy.batch == MEAN:
        for expert in range(row.size):
            row[expert] /= last - first
    _largest(row, top)
    for expert in range(row.size):
        policy.scores[layer, expert] *= 1.0 - policy.alpha
    for place in range(top.size):
        policy.scores[layer, top[place]] += policy.alpha * row[top[place]]


@jit
def _read(stream: Stream, source: int, layer: int, token: Array) -> None:
    """The scores of one token, or the gates of its experts where there are no more."""
    if stream.scores.size:
        for expert in range(token.size):
            token[expert] = stream.halves[stream.scores[source, layer, expert]]
        return
    token[:] = 0.0
    for rank in range(stream.ids.shape[2]):
        expert = stream.ids[source, layer, rank]
        if expert != NOT_ROUTED:
            token[expert] = stream.halves[stream.gates[source, layer, rank]]


@jit
def _largest(row: Array, top: Array) -> None:
    """Fills ``top`` with the places of the largest values, those of equal ones that come first."""
    found = 0
    for expert in range(row.size):
        if found < top.size:
            found += 1
        elif row[expert] <= row[top[found - 1]]:
            continue
        place = found - 1
        while place > 0 and row[expert] > row[top[place - 1]]:
            top[place] = top[place - 1]
            place -= 1
        top[place] = expert


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    return float(policy.scores[block // policy.row.size, block % policy.row.size])


register(Mrs, Twin(MrsState, build, observe_scores=observe_scores, key=key))

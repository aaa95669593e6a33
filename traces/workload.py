"""A trace as the forward passes that an engine runs: one sequence at a time, or lock-step batches.

:mod:`traces.batching` makes other orders of the same passes.

Shapes: T tokens (rows of the trace), L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from traces.schedule import by_sequence, schedule
from traces.schema import NOT_ROUTED, Array, Phase, Trace

NEVER = 1 << 62
"""The event of a next use that does not come: later than any event."""


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One forward pass."""

    index: int  # from 0 over the run
    phase: Phase
    rows: Array  # int64 [n], rows of the trace, grouped by lane, then by position
    sequences: tuple[int, ...]  # one for each lane that is active, in the order of lanes
    tokens: tuple[int, ...]  # tokens of each of these lanes
    context: int  # tokens in the longest KV cache of the batch after this step, lanes that have ended included
    starts: tuple[int, ...]  # sequences whose first step this is
    ends: tuple[int, ...]  # sequences whose last step this is
    others: int = 0  # sequences that have begun, have not ended, and are not in this step

    @property
    def new_batch(self) -> bool:
        """Whether no sequence from before goes on: policies then forget what they know of the requests under way.

        A request that joins others does not make them forget: what they know is of the requests of one lane or another
        since all lanes last began anew, which under a steady load is all of the run.
        """
        return not self.others and self.starts == self.sequences


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The forward passes of a run in order, over ``batch`` lanes.

    ``arrival_s`` has the arrivals by sequence, if anything is known of them, and ``about`` what else a record says.
    """

    trace: Trace
    batch: int
    steps: list[Step]
    batching: str = "lock-step"
    arrival_s: Mapping[int, float] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def describe(self) -> dict[str, Any]:
        """The workload as plain numbers, for the record of a run: order, lanes, steps and tokens by phase."""
        steps: Counter[Phase] = Counter()
        tokens: Counter[Phase] = Counter()
        for step in self.steps:
            steps[step.phase] += 1
            tokens[step.phase] += len(step.rows)
        return {
            "order": "one-at-a-time" if self.batch == 1 else self.batching,
            "batch": self.batch,
            "sequences": sum(len(step.starts) for step in self.steps),
            "prefill_steps": steps[Phase.PREFILL],
            "decode_steps": steps[Phase.DECODE],
            "prompt_tokens": tokens[Phase.PREFILL],
            "new_tokens": tokens[Phase.DECODE],
            **self.about,
        }


def one_at_a_time(trace: Trace) -> Workload:
    """Sequences in order of first appearance; a prompt is one step, and so is every decode token after it."""
    return lock_step(trace, 1)


def lock_step(trace: Trace, batch: int) -> Workload:
    """Batches of ``batch`` sequences, in order of first appearance, as :func:`traces.schedule.schedule` forms them;
    the last batch may be smaller. Raises :class:`InputError` for a ``batch`` below 1 or beyond reason."""
    plan = schedule(trace, batch, whole_prompts=True)
    sequence, position = (np.asarray(array)[plan.rows] for array in (trace.sequence, trace.position))
    last = dict(zip(sequence.tolist(), range(len(sequence)), strict=True))  # place of a sequence's last row
    before = _recorded_later(trace, batch)
    steps: list[Step] = []
    seen: set[int] = set()
    group, context = -1, 0
    for index, (start, end) in enumerate(pairwise(plan.offsets.tolist())):
        if plan.group[index] != group:
            group = int(plan.group[index])
            context = before[group]
        lanes = Counter(sequence[start:end].tolist())
        context = max(context, int(position[start:end].max()) + 1)
        steps.append(
            Step(
                index=index,
                phase=Phase(plan.phase[index]),
                rows=plan.rows[start:end],
                sequences=tuple(lanes),
                tokens=tuple(lanes.values()),
                context=context,
                starts=tuple(lane for lane in lanes if lane not in seen),
                ends=tuple(lane for lane in lanes if last[lane] < end),
            )
        )
        seen |= lanes.keys()
    return Workload(trace=trace, batch=batch, steps=steps)


def _recorded_later(trace: Trace, batch: int) -> list[int]:
    """By batch: the most tokens that a lane has in its KV cache before the first one that was recorded."""
    order = by_sequence(trace)
    before = np.asarray(trace.position)[order.rows[order.starts]]
    return [int(before[first : first + batch].max()) for first in range(0, len(before), batch)]


def sequence_rows(trace: Trace) -> list[Array]:
    """The rows int64 of each sequence, in order of position; sequences in order of first appearance."""
    order = by_sequence(trace)
    order.rows.setflags(write=False)
    return np.split(order.rows, order.starts[1:])


class Routing(NamedTuple):
    """What one MoE layer has to compute in one step."""

    experts: tuple[int, ...]  # the union, ascending
    counts: tuple[int, ...]  # tokens of each of them, in the same order
    assignments: int  # pairs of token and expert
    scores: Any = None  # float64 [n, E], the router's softmax, where a policy asks for it
    ranks: tuple[int, ...] | None = None  # of each, the best place by gate that a token gives it; where asked for


def router_scores(trace: Trace, rows: Array, layer: int) -> Array:
    """The router's scores for ``rows`` in ``layer``, float64 [n, E]; from the gates of the chosen experts, and 0 for
    the others, where the trace has no full scores."""
    if trace.scores is not None:
        return np.asarray(trace.scores[rows, layer], dtype=np.float64)
    scores = np.zeros((len(rows), trace.header.experts + 1))
    if trace.gates is not None:
        ids = np.minimum(trace.expert_ids[rows, layer], trace.header.experts)
        np.put_along_axis(scores, ids.astype(np.int64), trace.gates[rows, layer], axis=1)
    return scores[:, :-1]


def best_ranks(trace: Trace, rows: Array) -> Array:
    """For every layer and expert the best place among a token's experts, by gate, in ``rows``: int64 [L, E].

    0 is the highest gate; of equal gates the lower expert comes first. K where no token was sent. Raises ValueError for
    a trace without gates.
    """
    if trace.gates is None:
        raise ValueError("gates must be there to rank experts, got none")
    ids = np.asarray(trace.expert_ids[rows]).astype(np.int64)  # [n, L, K]
    gates = np.where(ids == NOT_ROUTED, -1.0, np.asarray(trace.gates[rows], dtype=np.float64))
    places = np.argsort(np.lexsort((ids, -gates), axis=-1), axis=-1)
    layers, width = trace.header.layers, trace.header.experts + 1
    best = np.full((layers, width), trace.header.top_k)
    np.minimum.at(best, (np.arange(layers)[:, None], np.minimum(ids, width - 1)), places)
    return best[:, :-1]


def routings(trace: Trace, step: Step) -> list[Routing]:
    """The routing of every layer in ``step``; entries that were not routed do not count."""
    if len(step.rows) == 1:
        return [_one_token(chosen) for chosen in trace.expert_ids[int(step.rows[0])].tolist()]
    return _many_tokens(trace.expert_ids[step.rows], trace.header.experts)


def _one_token(chosen: list[int]) -> Routing:
    chosen.sort()
    while chosen and chosen[-1] == NOT_ROUTED:
        chosen.pop()
    return Routing(tuple(chosen), (1,) * len(chosen), len(chosen))


def _many_tokens(ids: Array, experts: int) -> list[Routing]:
    """Counts ids uint16 [n, L, K] by layer; NOT_ROUTED falls into a column of its own, which is left out."""
    layers, width = ids.shape[1], experts + 1
    places = np.minimum(ids, experts).astype(np.int64) + (np.arange(layers) * width)[:, None]
    table = np.bincount(places.ravel(), minlength=layers * width).reshape(layers, width)[:, :experts]
    layer_of, union = np.nonzero(table)
    counts, chosen = table[layer_of, union].tolist(), union.tolist()
    bounds = np.searchsorted(layer_of, np.arange(layers + 1)).tolist()
    assignments = table.sum(axis=1).tolist()
    pieces = zip(bounds[:-1], bounds[1:], assignments, strict=True)
    return [Routing(tuple(chosen[start:end]), tuple(counts[start:end]), total) for start, end, total in pieces]


class FutureUses:
    """The future of every block, for policies that know it (Belady 1966).

    Block b = layer * E + expert; event = step.index * L + layer. ``events[offsets[b] : offsets[b + 1]]`` are the
    events, ascending, in which block b is in the union.
    """

    def __init__(self, offsets: Array, events: Array) -> None:
        self.offsets = offsets  # int64 [L * E + 1]
        self.events = events  # int64 [sum of unions]
        self._events = array("q", events.astype(np.int64).tobytes())  # gives a Python int faster than numpy does
        self._bounds: list[int] = offsets.tolist()
        self.reset()

    def reset(self) -> None:
        """Goes back to the beginning of the run; answers do not depend on it, only their speed."""
        self._next = self._bounds[:-1]

    def next_use(self, block: int, event: int) -> int:
        """The first use of ``block`` strictly after ``event``, or :data:`NEVER`.

        Amortised O(1) when a block is asked for events that do not decrease; correct in any order.
        """
        events, place, end = self._events, self._next[block], self._bounds[block + 1]
        while place < end and events[place] <= event:
            place += 1
        first = self._bounds[block]
        while place > first and events[place - 1] > event:
            place -= 1
        self._next[block] = place
        return events[place] if place < end else NEVER


def sorted_distinct(keys: Array) -> Array:
    """The distinct values of an array of integers, ascending.

    Several times faster than ``np.unique``, whose hash table does not pay where most values occur once.
    """
    ordered = np.sort(keys, axis=None)
    first = np.ones(len(ordered), dtype=bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    distinct: Array = ordered[first]
    return distinct


def next_uses(workload: Workload) -> FutureUses:
    """All uses of all blocks of ``workload``, worked out layer by layer to bound the memory."""
    trace, steps = workload.trace, len(workload)
    layers, experts = trace.header.layers, trace.header.experts
    rows = np.concatenate([step.rows for step in workload])
    step_of = np.repeat(np.arange(steps), [len(step.rows) for step in workload])
    lengths, events = [], []
    for layer in range(layers):
        ids = trace.expert_ids[:, layer][rows].astype(np.int64)  # [T, K]
        keys = sorted_distinct((ids * steps + step_of[:, None])[ids != NOT_ROUTED])  # by expert, then by step
        lengths.append(np.bincount(keys // steps, minlength=experts))
        events.append(keys % steps * layers + layer)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return FutureUses(offsets, np.concatenate(events))

"""The trace that fitted policies learn from, which must not be the one that they are judged on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from sim.replay.feed import Feed
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Array, Trace

_CHUNK = 1 << 16  # rows that are looked at together, which bounds the memory


@dataclass(frozen=True, eq=False)
class TraceCalibration:
    """A trace as :class:`sim.policies.base.Calibration`; its passes are those of ``feed``."""

    feed: Feed

    @classmethod
    def of(cls, trace: Trace, judged: Trace | None, batch: int = 1) -> TraceCalibration:
        """``trace`` over ``batch`` lanes, to fit policies that will be judged on ``judged``, or on prompts.

        Raises :class:`InputError` unless the two have equal dimensions and different content.
        """
        if judged is not None:
            check_disjoint(trace, judged)
        return cls(Feed.of(trace, batch))

    @property
    def digest(self) -> str:
        """The content digest of the trace."""
        return self.feed.trace.digest

    @property
    def router_means(self) -> str:
        """The mean router inputs that were recorded with it, as in a header; empty for none."""
        return self.feed.trace.header.router_means

    def uses(self) -> Sequence[int]:
        """By block: the events in which it was used."""
        return self._uses

    def events(self) -> Iterator[tuple[int, Sequence[int]]]:
        """Every event in order: its number (pass * layers + layer), and the blocks that it used, ascending."""
        experts = self.feed.trace.header.experts
        blocks = self.feed.trace.header.layers * experts
        for codes in self._codes():
            if not len(codes):
                continue
            event = codes // experts
            bounds = [0, *(np.flatnonzero(np.diff(event)) + 1).tolist(), len(codes)]
            used = (codes % blocks).tolist()
            for first, last in pairwise(bounds):
                yield int(event[first]), used[first:last]

    def requests(self) -> Iterator[Array]:
        """Of every batch in order: the tokens that went to each expert, int64 [L, E]."""
        header, plan = self.feed.trace.header, self.feed.plan
        layers, width = header.layers, header.experts + 1
        begins = [*np.flatnonzero(np.diff(plan.group, prepend=-1)).tolist(), len(plan)]
        for first, last in pairwise(begins):
            ids = self.feed.trace.expert_ids[plan.rows[plan.offsets[first] : plan.offsets[last]]]
            places = np.minimum(ids, width - 1).astype(np.int64) + (np.arange(layers) * width)[:, None]
            yield np.bincount(places.ravel(), minlength=layers * width).reshape(layers, width)[:, :-1]

    @cached_property
    def _uses(self) -> list[int]:
        header = self.feed.trace.header
        blocks = header.layers * header.experts
        counts = np.zeros(blocks, np.int64)
        for codes in self._codes():
            counts += np.bincount(codes % blocks, minlength=blocks)
        uses: list[int] = counts.tolist()
        return uses

    def _codes(self) -> Iterator[Array]:
        """The distinct event * experts + expert, ascending, int64, for one stretch of passes after the other."""
        plan, ids = self.feed.plan, self.feed.trace.expert_ids
        layers, experts = ids.shape[1], self.feed.trace.header.experts
        begin = 0
        while begin < len(plan):
            end = max(begin + 1, int(np.searchsorted(plan.offsets, plan.offsets[begin] + _CHUNK, side="right")) - 1)
            rows = plan.rows[plan.offsets[begin] : plan.offsets[end]]
            number = np.repeat(np.arange(begin, end), np.diff(plan.offsets[begin : end + 1]))
            event = number[:, None] * layers + np.arange(layers)
            chosen = ids[rows]
            codes = event[:, :, None] * experts + chosen
            yield np.unique(codes[chosen != NOT_ROUTED])
            begin = end


def check_disjoint(calibration: Trace, judged: Trace) -> None:
    """Raises :class:`InputError` unless ``calibration`` has the dimensions of ``judged``, and other routing.

    Other bytes of the experts, or another look-ahead, make it no other trace.
    """
    ours, theirs = ((t.header.layers, t.header.experts, t.header.top_k) for t in (calibration, judged))
    if ours != theirs:
        shape = "{} layers, {} experts, top {}".format
        raise InputError(f"calibration trace must have {shape(*theirs)} as the one replayed, got {shape(*ours)}")
    if np.array_equal(calibration.expert_ids, judged.expert_ids):
        raise InputError(f"calibration trace must be another than the one replayed, got {judged.digest[:12]} for both")

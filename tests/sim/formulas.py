"""Policies and replays for the formulas that are worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
from hypothesis import settings

from sim.policies import EVICTION, EvictionPolicy, PolicyContext
from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.result import Replay
from sim.replay.run import replay
from tests.sim.hand import trace_of
from tests.sim.replaying import decisions
from traces.schema import Trace
from traces.shipped import find_trace
from traces.store import load

FEW = settings(max_examples=10)
LEFT, STREAMED = 0, 1  # as in Replay.log


def policy_of(name: str, *, layers: int = 1, experts: int = 4, top_k: int = 1, **rest: Any) -> EvictionPolicy:
    return EVICTION[name](PolicyContext(layers, experts, top_k, weights=(1,) * layers, **rest))


def leaving(policy: EvictionPolicy, blocks: Sequence[int], last_used: Sequence[int]) -> list[int]:
    """The order in which ``blocks`` leave; ``last_used`` names all blocks, least recently used first."""
    recency = [last_used.index(block) for block in range(len(last_used))]
    return policy.order(blocks, recency)


def of_sequence(experts: Sequence[int], *, among: int = 4) -> Trace:
    """One layer; every pass is one token with one expert."""
    return trace_of([[[expert]] for expert in experts], experts=among)


class Counted:
    """A calibration trace of which the uses are written down."""

    def __init__(self, uses: Sequence[int]) -> None:
        self._uses = uses

    def uses(self) -> Sequence[int]:
        return self._uses

    def events(self) -> Iterator[tuple[int, Sequence[int]]]:
        return iter(())

    def requests(self) -> Iterator[Any]:
        return iter(())


@cache
def shipped(name: str) -> Trace:
    return load(find_trace(name))


@cache
def calibration_of_code() -> TraceCalibration:
    return TraceCalibration.of(shipped("code"), shipped("mixed"))


def shipped_replay(name: str, percent: str) -> Replay:
    """``mixed`` per layer under the atomic contract; fitted policies have learned from ``code``."""
    trace = shipped("mixed")
    capacity = Capacity.slots(percent, trace.header, "layer")
    return replay(Feed.of(trace), Settings(name, capacity), calibration=calibration_of_code())


def log_of(trace: Trace, name: str, *, slots: int, options: Mapping[str, Any]) -> list[tuple[int, ...]]:
    way = Settings(name, Capacity(slots, "slots", ""), options=options)
    return decisions(replay(Feed.of(trace), way, log=True).log)


def two_layers() -> Trace:
    return trace_of([[[0], [1]], [[1], [1]]], experts=2)


def with_scores(trace: Trace, rows: Sequence[Sequence[float]]) -> Trace:
    arrays = {**dict(trace.arrays()), "scores": np.array(rows)[:, None]}
    return Trace.of(trace.header, **arrays)


def unequal(trace: Trace) -> Trace:
    """The trace with experts of 100 bytes in layer 0 and 60 in layer 1."""
    return Trace.of(trace.header.model_copy(update={"expert_bytes": (100, 60)}), **dict(trace.arrays()))

"""Things made by hand for the tests of the simulator: costs, traces, plans, and a controller that follows a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sim.controller import ExpertShape
from sim.engine import Engine
from sim.plan import COPY, CPU, EVICT, GPU, READ, LayerPlan, Operation
from sim.results import RunResult
from sim.run import build_controller, predictions_of, routings_of, run_info, simulate
from sim.spec import HostSpec
from sim.systems import Budget, SystemSpec
from traces.schema import NOT_ROUTED, Trace, TraceHeader
from traces.workload import Routing, Workload, lock_step, one_at_a_time, routings

EXPERT_BYTES, DEPTH = 100, 3
HIDDEN_BYTES = 7


def host(**seconds: Any) -> HostSpec:
    """A host that takes no time but the ``seconds`` given."""
    free = {name: 0.0 for name in ("layer_s", "readback_s", "controller_s", "operation_s", "join_s")}
    return HostSpec.model_validate({"source": "by hand", **free, **seconds})


@dataclass
class HandCosts:
    """Costs as plain numbers. ``slow[resource, other]`` multiplies the time of ``resource`` while ``other`` is busy."""

    dense: float = 1.0
    head: float = 1.0
    gpu: float = 1.0
    gpu_token: float = 0.0
    cpu: float = 1.0
    cpu_first: float = 0.0
    copy: float = 1.0
    copy_sizes: Mapping[int, float] = field(default_factory=dict)
    back: float = 1.0
    read: float = 1.0
    cpu_dense: float = 1.0
    chunk_bytes: int = 0
    lookahead: float = 0.0
    deciding: float = 0.0
    slow: Mapping[tuple[str, str], float] = field(default_factory=dict)
    host: HostSpec = field(default_factory=host)
    name: str = "by hand"
    notes: list[str] = field(default_factory=list)

    def dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        return self.dense

    def cpu_dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        return self.cpu_dense

    def head_s(self, lanes: int, context: int, tokens: int = 0) -> float:
        return self.head

    def gpu_expert_s(self, tokens: int) -> float:
        return self.gpu + self.gpu_token * tokens

    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        return self.cpu + (self.cpu_first if first else 0.0)

    def copy_s(self, size_bytes: int) -> float:
        return self.copy_sizes.get(size_bytes, self.copy)

    def write_back_s(self, size_bytes: int) -> float:
        return self.back

    def read_s(self, size_bytes: int) -> float:
        return self.read

    def hidden_bytes(self, tokens: int) -> int:
        return HIDDEN_BYTES * tokens

    def deciding_s(self, experts: int) -> float:
        return self.deciding * experts

    def lookahead_s(self, depth: int) -> float:
        return self.lookahead * depth

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        return float(np.prod([self.slow.get((resource, other), 1.0) for other in sorted(others)]))


def trace_of(
    unions: Sequence[Sequence[Sequence[int]]], *, experts: int = 4, lookahead: Sequence[Any] | None = None
) -> Trace:
    """A trace of one sequence: ``unions[step][layer]`` are the experts of one decode token (one list for all layers
    may stand for each of them by repeating it); ``lookahead[step][layer]`` those that are predicted for layer + 1."""
    steps, layers = len(unions), len(unions[0])
    top_k = max(1, *(len(chosen) for step in (*unions, *(lookahead or ())) for chosen in step))
    arrays: dict[str, Any] = {"expert_ids": _padded(unions, top_k)}
    if lookahead is not None:
        arrays["lookahead"] = _padded(lookahead, top_k)[:, :, None, :]
    header = TraceHeader(
        model="by hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=(EXPERT_BYTES,) * layers
    )
    order = np.arange(steps)
    ones = np.ones(steps)
    return Trace.of(header, token_ids=order, sequence=0 * order, position=order, step=order, phase=ones, **arrays)


def _padded(rows: Sequence[Sequence[Sequence[int]]], width: int) -> np.ndarray:
    return np.array([[[*ids, *[NOT_ROUTED] * (width - len(ids))] for ids in step] for step in rows], dtype=np.uint16)


def run(
    trace: Trace | Workload,
    slots: int,
    costs: HandCosts | None = None,
    *,
    staging: int = 2,
    host_slots: int | None = None,
    closed: bool | None = None,
    **system: Any,
) -> RunResult:
    """A whole run with every table; ``closed`` picks one of the engine's two ways, None lets the engine choose."""
    workload = trace if isinstance(trace, Workload) else one_at_a_time(trace)
    costs = costs or HandCosts()
    spec, budget = SystemSpec(**system), Budget(slots=slots, staging=staging, host_slots=host_slots)
    if closed is None:
        return simulate(workload, spec, budget, costs, hardware="by hand")
    controller = build_controller(workload, spec, budget, costs)
    engine = Engine(controller, costs, closed_form=closed)
    predictions = predictions_of(workload.trace, spec.lookahead_depth)
    routing = routings_of(workload.trace, scored="scores" in spec.needs, ranked="gates" in spec.needs)
    engine.run(workload.steps, routing, predictions)
    info = run_info("simulated", workload, controller, hardware="by hand", packages=("numpy", "simpy"))
    return engine.log.result(info.model_copy(update={"costs": costs.name, "notes": costs.notes}))


def gpu(number: int, expert: int, *after: int, layer: int = 0, tokens: int = 1) -> Operation:
    return Operation(number, GPU, layer, expert, expert, tokens, 0, after)


def cpu(number: int, expert: int, *after: int, layer: int = 0, deferred: bool = False) -> Operation:
    return Operation(number, CPU, layer, expert, -1, 1, 0, after, False, deferred)


def copy(number: int, expert: int, *after: int, layer: int = 0, size: int = EXPERT_BYTES) -> Operation:
    return Operation(number, COPY, layer, expert, expert, 0, size, after)


def prefetch(number: int, expert: int, layer: int, size: int = EXPERT_BYTES, after: tuple[int, ...] = ()) -> Operation:
    return Operation(number, COPY, layer, expert, expert, 0, size, after, True)


def evict(number: int, expert: int, layer: int = 0, size: int = 0) -> Operation:
    return Operation(number, EVICT, layer, expert, expert, 0, size)


def read(number: int, expert: int, *after: int, layer: int = 0) -> Operation:
    return Operation(number, READ, layer, expert, -1, 0, EXPERT_BYTES, after)


class Script:
    """A controller without opinions: layer after layer it hands out the operations that it was given.

    ``transfers[n]`` are the prefetches that may start once ``n`` layers were planned.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Operation]],
        transfers: Mapping[int, Sequence[Operation]] | None = None,
        on_cpu: Sequence[int] = (),
        **system: Any,
    ) -> None:
        prefetching = {"prefetch": "next-router"} if transfers else {}
        self.system = SystemSpec(**prefetching, **system)
        self.shape = ExpertShape(len(layers), 4, 1, EXPERT_BYTES)
        self.reads_disk = any(one.op == READ for operations in layers for one in operations)
        self.layers_on_cpu = frozenset(on_cpu)
        self.arrived: list[int] = []
        self.withdrawn: list[int] = []
        self.kept: set[int] = set()
        self._layers, self._transfers = layers, {count: [*wanted] for count, wanted in (transfers or {}).items()}
        self._planned = 0

    def preload(self) -> list[Operation]:
        return []

    def begin_step(self, step: int, *, new_batch: bool = False) -> None:
        """Nothing is counted."""

    def plan_layer(self, layer: int, routing: Routing, expected: Sequence[Sequence[tuple[int, int]]] = ()) -> LayerPlan:
        operations = [*self._layers[self._planned]]
        self._planned += 1
        return LayerPlan(layer, operations, 0, 0, 0, 0, 0, 0, 0, 0)

    def next_transfer(self) -> tuple[Operation, ...]:
        wanted = self._transfers.get(self._planned, [])
        return (wanted.pop(0),) if wanted else ()

    def on_arrival(self, operation: Operation) -> None:
        self.arrived.append(operation.id)

    def is_stale(self, operation: Operation, layer: int, routing: Routing) -> bool:
        return operation.layer == layer and operation.id not in self.kept

    def on_withdrawal(self, operation: Operation) -> None:
        self.withdrawn.append(operation.id)


Row = tuple[str, str, int, int]
"""(resource, kind, layer, expert)"""


def rows_of(script: Script, costs: HandCosts, *, closed: bool | None = None) -> dict[Row, list[tuple[float, float]]]:
    """Runs one forward pass of the script's layers: when each piece of work began and ended, in seconds."""
    trace = trace_of([[[0]] * len(script._layers)])
    workload = one_at_a_time(trace)
    controller: Any = script
    engine = Engine(controller, costs, closed_form=closed)
    engine.run(workload.steps, lambda step: routings(trace, step), lambda step: ())
    real = build_controller(workload, SystemSpec(), Budget(slots=1), costs)
    events = engine.log.result(run_info("simulated", workload, real, hardware="by hand")).events
    times: dict[Row, list[tuple[float, float]]] = {}
    for *row, start_s, end_s in events[["resource", "kind", "layer", "expert", "start_s", "end_s"]].itertuples(
        index=False
    ):
        times.setdefault(tuple(row), []).append((start_s, end_s))
    return times


def play(script: Script, costs: HandCosts, *, closed: bool | None = None) -> dict[Row, tuple[float, float]]:
    """The same where nothing is done in pieces."""
    times = rows_of(script, costs, closed=closed)
    assert all(len(pieces) == 1 for pieces in times.values())
    return {row: pieces[0] for row, pieces in times.items()}


def total_misses(result: RunResult) -> int:
    return int(result.layers["misses"].sum())


def misses_by_step(result: RunResult) -> list[list[int]]:
    """misses[step][layer]"""
    return [group["misses"].tolist() for _, group in result.layers.groupby("step")]


@st.composite
def workloads(draw: st.DrawFn, *, batch: int | None = None, most_k: int = 4, prompts: bool = True) -> Workload:
    """Small random workloads: prompts and new tokens of a few sequences, some places not routed, with gates, scores and
    look-ahead."""
    layers, experts = draw(st.integers(1, 3)), draw(st.integers(2, 6))
    top_k = draw(st.integers(1, min(most_k, experts)))
    sequences = draw(st.integers(1, 3))
    prompt, new = draw(st.integers(0, 4)) if prompts else 0, draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows = sequences * (prompt + new)
    ids = _distinct(rng, (rows, layers), experts, top_k)
    ids[rng.random((rows, layers, top_k)) < 0.1] = NOT_ROUTED
    guesses = _distinct(rng, (rows, layers, DEPTH), experts, top_k)
    ahead = np.arange(layers)[:, None] + np.arange(DEPTH) + 1
    guesses[:, ahead >= layers] = NOT_ROUTED
    header = TraceHeader(
        model="random",
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=(EXPERT_BYTES,) * layers,
        lookahead_router="residual",
    )
    position = np.tile(np.arange(prompt + new), sequences)
    trace = Trace.of(
        header,
        expert_ids=ids,
        gates=rng.random(ids.shape).round(1),
        lookahead=guesses,
        scores=rng.dirichlet(np.ones(experts), (rows, layers)),
        token_ids=np.zeros(rows),
        sequence=np.repeat(np.arange(sequences), prompt + new),
        position=position,
        step=np.arange(rows),
        phase=position >= prompt,
    )
    return lock_step(trace, batch or draw(st.integers(1, 3)))


def _distinct(rng: np.random.Generator, shape: tuple[int, ...], experts: int, top_k: int) -> np.ndarray:
    """Distinct expert ids uint16 [*shape, top_k], the low ones chosen more often."""
    weights = rng.random((*shape, experts)) * (1.0 + np.arange(experts))
    return np.argsort(weights, axis=-1)[..., :top_k].astype(np.uint16)

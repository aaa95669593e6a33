"""One simulated run: a workload, a system and a budget in; a RunResult out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np

from sim.controller import ExpertShape, OffloadController, Predicted
from sim.costs import Costs
from sim.engine import Engine, Predictions
from sim.policies.base import Calibration
from sim.results import RunInfo, RunResult
from sim.systems import Budget, SystemSpec
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Trace
from traces.workload import Routing, Step, Workload, next_uses, router_scores, routings


def build_controller(
    workload: Workload,
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> OffloadController:
    """The controller of a run whose routing is ``workload``; either clock may run it.

    ``calibration`` is the trace that fitted policies learn from, ``seed`` for what they draw. Raises
    :class:`InputError` when the trace, or the caller, does not give what the system's policies need.
    """
    header = workload.trace.header
    check_needs(workload.trace, system, calibration)
    sizes = set(header.expert_bytes)
    if len(sizes) > 1:
        raise InputError(f"expert_bytes must be equal in all layers to run a trace, got {sorted(sizes)}")
    shape = ExpertShape(header.layers, header.experts, header.top_k, sizes.pop())
    future = next_uses(workload) if "future" in system.needs else None
    predicted = predicted_of(costs, shape.expert_bytes)
    return OffloadController(system, shape, budget, predicted, future, calibration, seed)


def predicted_of(costs: Costs, expert_bytes: int) -> Predicted:
    """What policies may know of ``costs``; until the next router has chosen, a token of a short context is meant."""
    host = costs.host
    router_s = costs.dense_s(1, 1) + host.layer_s + host.readback_s + host.controller_s
    return Predicted(costs.gpu_expert_s, costs.cpu_expert_s, costs.copy_s(expert_bytes), router_s=router_s)


def check_needs(trace: Trace, system: SystemSpec, calibration: Calibration | None = None) -> None:
    """Raises :class:`InputError` unless ``trace`` and ``calibration`` give what the policies of ``system`` ask for."""
    check_calibration(system, calibration)
    if "scores" in system.needs and trace.scores is None and trace.gates is None:
        raise InputError(
            f"trace must have the router's scores, or at least gates, for {system.needing('scores')}, got neither"
        )
    if trace.lookahead_depth < system.lookahead_depth:
        raise InputError(
            f"trace must have look-ahead of depth {system.lookahead_depth} for prefetch {system.needing('lookahead')}, "
            f"got depth {trace.lookahead_depth}"
        )


def check_calibration(system: SystemSpec, calibration: Calibration | None) -> None:
    """Raises :class:`InputError` when a policy of ``system`` has to be fitted, and there is nothing to fit it to."""
    if "calibration" in system.needs and calibration is None:
        raise InputError(
            f"calibration must be given for {system.needing('calibration')}, a trace apart from the one that is run"
        )


def check_causal(system: SystemSpec, calibration: Calibration | None = None) -> None:
    """Raises :class:`InputError` unless ``system`` can run where the routing is not known beforehand."""
    if "future" in system.needs:
        raise InputError(
            f"policies must be causal to decode prompts, got {system.needing('future')} (replay a trace instead)"
        )
    check_calibration(system, calibration)


def predictions_of(trace: Trace, depth: int) -> Callable[[Step], Predictions]:
    """For a step: by layer, by distance, (expert, tokens that the look-ahead gives it), most tokens first.

    Experts named equally often come in the order of the first token that names them, then by rank.
    """

    def of_step(step: Step) -> Predictions:
        if not depth or trace.lookahead is None:
            return ()
        ids = trace.lookahead[step.rows, :, :depth]  # [n, L, D, K]
        return [
            [most_named(ids[:, layer, ahead].ravel().tolist()) for ahead in range(depth)]
            for layer in range(ids.shape[1])
        ]

    return of_step


def routings_of(workload: Workload, *, scored: bool = False) -> Callable[[Step], list[Routing]]:
    """For a step: the routing of every layer, as :func:`traces.workload.routings` gives it, with scores if asked for.

    Steps of one token, which are most of a run, are sorted together beforehand.
    """
    trace = workload.trace
    if scored:
        return lambda step: [
            routing._replace(scores=router_scores(trace, step.rows, layer))
            for layer, routing in enumerate(routings(trace, step))
        ]
    width = trace.header.top_k
    single = [step for step in workload if len(step.rows) == 1]
    rows = np.array([step.rows[0] for step in single], dtype=np.int64)
    chosen = np.sort(trace.expert_ids[rows], axis=-1)  # [n, L, K], NOT_ROUTED last
    routed = (chosen[..., -1] != NOT_ROUTED).all(axis=-1).tolist()
    place = {step.index: index for index, step in enumerate(single) if routed[index]}
    ones = (1,) * width
    routing_of: Callable[[tuple[Any, ...]], Routing] = partial(tuple.__new__, Routing)  # quicker than the class

    def of_step(step: Step) -> list[Routing]:
        index = place.get(step.index)
        if index is None:
            return routings(trace, step)
        return [routing_of((tuple(experts), ones, width, None)) for experts in chosen[index].tolist()]

    return of_step


def most_named(experts: Iterable[int]) -> list[tuple[int, int]]:
    """Distinct experts and how often each is named, most often first; equal ones in the order in which they come.

    NOT_ROUTED is left out.
    """
    counts = Counter(experts)
    counts.pop(NOT_ROUTED, None)
    return counts.most_common()


def simulate(
    workload: Workload,
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    *,
    hardware: str,
    calibration: Calibration | None = None,
    seed: int = 0,
    events: bool = True,
    operations: bool = True,
    progress: Callable[[], None] = lambda: None,
) -> RunResult:
    """Runs ``workload`` in simulated time. ``hardware`` names the machine that ``costs`` describe, ``calibration`` the
    trace that fitted policies learn from.

    Without ``events`` and ``operations`` these two long tables stay empty, which is quicker: for sweeps.
    """
    controller = build_controller(workload, system, budget, costs, calibration, seed=seed)
    engine = Engine(controller, costs, events=events, operations=operations)
    predictions = predictions_of(workload.trace, system.lookahead_depth)
    routing = routings_of(workload, scored="scores" in system.needs)
    engine.run(workload.steps, routing, predictions, progress)
    info = run_info("simulated", workload, controller, hardware=hardware, packages=("numpy", "simpy"))
    return engine.log.result(info.model_copy(update={"costs": costs.name, "notes": [*info.notes, *costs.notes]}))


def run_info(
    source: str,
    workload: Workload,
    controller: OffloadController,
    *,
    hardware: str,
    packages: Sequence[str] = ("numpy",),
) -> RunInfo:
    """The header of a result, filled from what was run; ``packages`` are those whose versions matter to it."""
    header, budget = workload.trace.header, controller.budget
    slots = budget.total(header.layers, controller.system.scope)
    return RunInfo.model_validate(
        {
            "source": source,
            "model": header.model,
            "hardware": hardware,
            "system": controller.system.model_dump(),
            "capacity_slots": slots,
            "capacity_bytes": slots * controller.shape.expert_bytes,
            "staging_slots": budget.staging,
            "trace_digest": workload.trace.digest,
            "workload": workload.describe(),
            "synthetic": header.synthetic,
            "software": {name: version(name) for name in packages},
            "notes": _notes(controller),
        }
    )


def _notes(controller: OffloadController) -> list[str]:
    """What a reader of the result has to know of the policies' own doing."""
    if not controller.fallbacks:
        return []
    return [f"{controller.system.place}: one device alone was quicker in {controller.fallbacks:,} layers, and was used"]

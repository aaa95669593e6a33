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
from sim.needs import check_needs, learned_digest
from sim.policies.base import Calibration
from sim.policies.evict.static_front import StaticFront
from sim.profile import ProfileCosts
from sim.results import RunInfo, RunResult
from sim.systems import Budget, SystemSpec
from traces.batching import InOrder, Requests, known_order
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Array, Phase, Trace
from traces.workload import Routing, Step, Workload, best_ranks, next_uses, router_scores, routings


def build_controller(
    plan: Workload | Requests,
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    calibration: Calibration | None = None,
    *,
    seed: int = 0,
) -> OffloadController:
    """The controller of a run of ``plan``; either clock may run it.

    ``calibration`` is the trace that fitted policies learn from, ``seed`` for what they draw. Raises
    :class:`InputError` when the trace, or the caller, does not give what the system's policies need.
    """
    header = plan.trace.header
    check_needs(plan.trace, system, calibration)
    sizes = set(header.expert_bytes)
    if len(sizes) > 1:
        raise InputError(f"expert_bytes must be equal in all layers to run a trace, got {sorted(sizes)}")
    shape = ExpertShape(header.layers, header.experts, header.top_k, sizes.pop())
    future = next_uses(known_order(plan, system.needing("future"))) if "future" in system.needs else None
    predicted = predicted_of(costs, shape.expert_bytes)
    return OffloadController(system, shape, budget, predicted, future, calibration, seed)


def predicted_of(costs: Costs, expert_bytes: int) -> Predicted:
    """What policies may know of ``costs``; until the next router has chosen, a token of a short context is meant."""
    host = costs.host
    router_s = costs.dense_s(1, 1) + host.layer_s + host.readback_s + host.controller_s
    return Predicted(costs.gpu_expert_s, costs.cpu_expert_s, costs.copy_s(expert_bytes), router_s=router_s)


def predictions_of(trace: Trace, depth: int) -> Callable[[Step], Predictions]:
    """For a step: by layer, by distance, (expert, tokens that the look-ahead gives it), most tokens first.

    Experts named equally often come in the order of the first token that names them, then by rank.
    """

    def of_step(step: Step) -> Predictions:
        if not depth or trace.lookahead is None:
            return ()
        ids = trace.lookahead[step.rows, :, :depth]  # [n, L, D, K]
        if len(step.rows) == 1:  # a token names distinct experts, each once
            return [[[(one, 1) for one in named if one != NOT_ROUTED] for named in layer] for layer in ids[0].tolist()]
        return [
            [most_named(ids[:, layer, ahead].ravel().tolist()) for ahead in range(depth)]
            for layer in range(ids.shape[1])
        ]

    return of_step


def routings_of(trace: Trace, *, scored: bool = False, ranked: bool = False) -> Callable[[Step], list[Routing]]:
    """For a step: the routing of every layer, as :func:`traces.workload.routings` gives it, with scores or ranks if
    asked for.

    Decode tokens, which are most of a run, are sorted together beforehand for steps that are one of them alone.
    """
    if ranked:
        unranked = routings_of(trace, scored=scored)
        return lambda step: [
            routing._replace(ranks=tuple(ranks[[*routing.experts]].tolist()))
            for routing, ranks in zip(unranked(step), best_ranks(trace, step.rows), strict=True)
        ]
    if scored:
        unscored = routings_of(trace)
        return lambda step: [
            routing._replace(scores=scores)
            for routing, scores in zip(unscored(step), _scores_by_layer(trace, step.rows), strict=True)
        ]
    width = trace.header.top_k
    rows = np.flatnonzero(np.asarray(trace.phase) == Phase.DECODE)
    chosen = np.sort(trace.expert_ids[rows], axis=-1)  # [n, L, K], NOT_ROUTED last
    routed = (chosen[..., -1] != NOT_ROUTED).all(axis=-1)
    place = np.full(len(trace), -1)
    place[rows[routed]] = np.flatnonzero(routed)
    place_of: list[int] = place.tolist()
    ones = (1,) * width
    routing_of: Callable[[tuple[Any, ...]], Routing] = partial(tuple.__new__, Routing)  # quicker than the class

    def of_step(step: Step) -> list[Routing]:
        index = place_of[step.rows[0]] if len(step.rows) == 1 else -1
        if index < 0:
            return routings(trace, step)
        return [routing_of((tuple(experts), ones, width, None, None)) for experts in chosen[index].tolist()]

    return of_step


def _scores_by_layer(trace: Trace, rows: Array) -> Iterable[Array]:
    """:func:`traces.workload.router_scores` of every layer; for one token all at once, which is quicker."""
    if trace.scores is None or len(rows) > 1:
        return (router_scores(trace, rows, layer) for layer in range(trace.header.layers))
    return np.asarray(trace.scores[rows[0]], dtype=np.float64)[:, None]  # [L, 1, E]


def most_named(experts: Iterable[int]) -> list[tuple[int, int]]:
    """Distinct experts and how often each is named, most often first; equal ones in the order in which they come.

    NOT_ROUTED is left out.
    """
    counts = Counter(experts)
    counts.pop(NOT_ROUTED, None)
    return counts.most_common()


def simulate(
    plan: Workload | Requests,
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    *,
    hardware: str,
    calibration: Calibration | None = None,
    seed: int = 0,
    events: bool = True,
    operations: bool = True,
    slow: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> RunResult:
    """Runs ``plan`` in simulated time: passes in their order, or requests as they arrive.

    ``hardware`` names the machine that ``costs`` describe, ``calibration`` the trace that fitted policies learn from.
    Without ``events`` and ``operations`` these two long tables stay empty, which is quicker: for sweeps. With ``slow``
    every piece of work takes the 90th percentile of a profile's measurements; policies weigh what they always weigh.
    """
    controller = build_controller(plan, system, budget, costs, calibration, seed=seed)
    if isinstance(costs, ProfileCosts):
        slots = budget.total(controller.shape.layers, system.scope) + budget.staging
        costs = costs.for_run(system, slots)  # after the controller: what policies weigh is the same on both clocks
        costs = costs.slow() if slow else costs
    engine = Engine(controller, costs, events=events, operations=operations)
    predictions = predictions_of(plan.trace, system.lookahead_depth)
    routing = routings_of(plan.trace, scored="scores" in system.needs, ranked="gates" in system.needs)
    if isinstance(plan, Requests):
        lanes = plan.scheduler()
        engine.run(lanes, routing, predictions, progress)
        ran = lanes.ran()
    else:
        engine.run(InOrder(plan), routing, predictions, progress)
        ran = plan
    info = run_info("simulated", ran, controller, hardware=hardware, packages=("numpy", "simpy"))
    told = {"costs": costs.name, "calibration_digest": learned_digest(calibration)}
    return engine.log.result(info.model_copy(update={**told, "notes": [*info.notes, *costs.notes]}))


def run_info(
    source: str,
    workload: Workload,
    controller: OffloadController,
    *,
    hardware: str,
    packages: Sequence[str] = ("numpy",),
    scored: bool | None = None,
) -> RunInfo:
    """The header of a result, filled from what was run; ``packages`` are those whose versions matter to it.

    ``scored`` says whether policies were given the router's full scores; None: as far as the trace has them.
    """
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
            "expert_bytes": controller.shape.expert_bytes,
            "trace_digest": workload.trace.digest,
            "workload": workload.describe(),
            "prefetched_bytes": controller.prefetched * controller.shape.expert_bytes,
            "layers_on_cpu": sorted(controller.layers_on_cpu),
            "synthetic": header.synthetic,
            "software": {name: version(name) for name in packages},
            "notes": _notes(controller, workload.trace.scores is not None if scored is None else scored),
        }
    )


def _notes(controller: OffloadController, scored: bool) -> list[str]:
    """What a reader of the result has to know of the policies' own doing."""
    system, notes = controller.system, []
    if controller.fallbacks:
        layers = f"{controller.fallbacks:,} layers"
        notes.append(f"one device alone was quicker than the schedule of {system.place} in {layers}, and was used")
    if system.place == "static" and not controller.preloaded and system.prefetch == "none":
        notes.append("static: nothing is loaded beforehand and nothing is ever copied, so that the CPU computes it all")
    if system.evict == StaticFront.name and system.scope == "layer":
        notes.append("static-front: in a pool for each layer its lowest experts; with --scope global whole layers")
    empty = controller.budget.total(controller.shape.layers, system.scope) - controller.preloaded
    if system.dense_follows and system.prefetch == "none" and 0 < empty < controller.shape.experts:
        notes.append(f"{empty:,} slots stay empty, as they would hold a part of a layer only")
    if system.deferral:
        notes.append(
            f"deferral changes the model's outputs: of a token's experts on the CPU, those among its {system.deferral} "
            "lowest gates join the next layer's"
        )
    if "scores" in system.needs and not scored:
        notes.append(f"{system.needing('scores')} was given the gates of the chosen experts: the trace has no scores")
    return notes

"""What each policy's decisions cost the host: a controller without a clock, timed on synthetic routing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import median
from typing import NamedTuple

import numpy as np

from real.bench import chilling
from real.decode import Machine
from real.subjects import synthetic_routing
from sim.costs import RooflineCosts
from sim.presets import preset, preset_names
from sim.profile import decided_by
from sim.queues import LINK_WINDOW
from sim.run import build_controller, predictions_of, routings_of
from sim.spec import catalogue
from sim.spec.profile import TOGETHER, Planning
from sim.systems import KINDS, Budget, SystemSpec
from traces.errors import InputError
from traces.standin import MOST_AHEAD
from traces.workload import Workload, one_at_a_time

SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 4, 32, 12
"""Of the routing that is decided; the first sequence gives policies something to remember, and is not counted."""


class Decided(NamedTuple):
    """One layer of one pass: the seconds that its decisions took, and what they were about."""

    seconds: float
    operations: int
    experts: int
    layer: int
    decode: bool


def planning(machine: Machine, slots: int, seed: int = 0) -> tuple[Planning, ...]:
    """Seconds a layer that each policy takes beyond the plainest of its kind, and each published system beyond the
    plainest one: on decode passes, and, for each further distinct expert of a layer, on prompts.

    ``slots`` are those of a layer. On a device whose lanes share the host's caches, each layer is decided with cold
    ones, as in a run. What a policy needs and synthetic routing does not give (a calibration trace) leaves it out: it
    then counts as the plainest.
    """
    workload = _workload(machine, seed)
    plain = _timed(machine, workload, SystemSpec(), slots)
    found = []
    for kind, policy, system in _systems():
        try:
            timed = _timed(machine, workload, system, slots)
        except InputError:
            continue
        layer_s, expert_s = _beyond(plain, timed, machine.loaded.spec.top_k)
        found.append(Planning(kind=kind, policy=policy, layer_s=layer_s, expert_s=expert_s))
    return tuple(found)


def _systems() -> Iterator[tuple[str, str, SystemSpec]]:
    """Kind and name of what is timed, and the system that it is timed in."""
    for kind, registry in KINDS.items():
        for name in registry:
            yield kind, name, SystemSpec.model_validate({kind: name})
    seen = {decided_by(SystemSpec())}
    for name in preset_names():
        system, _ = preset(name).fitted(calibrated=False, residuals=False)
        if system.holds == "cache" and decided_by(system) not in seen:
            seen.add(decided_by(system))
            yield TOGETHER, decided_by(system), system


def _beyond(plain: Sequence[Decided], timed: Sequence[Decided], top_k: int) -> tuple[float, float]:
    """Seconds of a decode layer beyond the plainest's, operations apart; and, beyond that, of each further expert.

    Of several prompts, each layer's median counts; of these the sum, for the last layers have less to look ahead to.
    """
    base_s, operation_s = _line([one for one in plain if one.decode])
    layer_s = max(0.0, median(one.seconds - operation_s * one.operations for one in timed if one.decode) - base_s)
    pairs = [(one, other) for one, other in zip(plain, timed, strict=True) if not one.decode]
    extra_s = further = 0.0
    for _, group in groupby(sorted(pairs, key=lambda pair: pair[0].layer), key=lambda pair: pair[0].layer):
        same = [*group]
        more_s = [b.seconds - a.seconds - operation_s * (b.operations - a.operations) for a, b in same]
        extra_s += median(more_s) - layer_s
        further += median(max(0, a.experts - top_k) for a, _ in same)
    return layer_s, max(0.0, extra_s / further) if further else 0.0


def _line(decided: Sequence[Decided]) -> tuple[float, float]:
    """The median layer without operations, and the seconds of one."""
    seconds = np.array([one.seconds for one in decided])
    operations = np.array([one.operations for one in decided], float)
    slope_s = max(0.0, float(np.polyfit(operations, seconds, 1)[0])) if len({*operations.tolist()}) > 1 else 0.0
    return float(np.median(seconds - slope_s * operations)), slope_s


def _workload(machine: Machine, seed: int) -> Workload:
    lengths = {"sequences": SEQUENCES, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}
    trace = synthetic_routing(machine.loaded.spec, seed, lookahead=MOST_AHEAD, **lengths)
    header = trace.header.model_copy(update={"lookahead_router": "residual"})  # which serves all policies
    return one_at_a_time(replace(trace, header=header))


def _timed(machine: Machine, workload: Workload, system: SystemSpec, slots: int) -> list[Decided]:
    """Every layer of every pass but those of the first sequence."""
    costs = RooflineCosts(machine.loaded.spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))
    budget = Budget(slots=slots * (machine.loaded.spec.moe_layers if system.scope == "global" else 1))
    controller = build_controller(workload, system, budget, costs)
    controller.preload()
    routing = routings_of(workload.trace, scored="scores" in system.needs, ranked="gates" in system.needs)
    predictions, chill = predictions_of(workload.trace, system.lookahead_depth), chilling(machine)
    first, decided = workload.steps[0].sequences, list[Decided]()
    for step in workload:
        expected = predictions(step)
        controller.begin_step(step.index, new_batch=step.new_batch)
        for layer, routed in enumerate(routing(step)):
            next(chill)
            begun_s = time.perf_counter()
            plan = controller.plan_layer(layer, routed, expected[layer] if expected else ())
            copies = [one for _ in range(LINK_WINDOW) for one in controller.next_transfer() if one.prefetch]
            seconds = time.perf_counter() - begun_s
            for copy in copies:
                controller.on_arrival(copy)
            if step.sequences != first:
                decided.append(Decided(seconds, len(plan.operations), plan.union, layer, len(step.rows) == 1))
    return decided

"""What each policy's decisions cost the host: a controller without a clock, timed on synthetic routing."""

from __future__ import annotations

import time

import numpy as np

from real.bench import chilling
from real.decode import Machine
from sim.costs import RooflineCosts
from sim.queues import LINK_WINDOW
from sim.run import build_controller, predictions_of, routings_of
from sim.spec import catalogue
from sim.spec.profile import Planning
from sim.systems import KINDS, Budget, SystemSpec
from traces.errors import InputError
from traces.workload import Workload

Timed = tuple[float, int]
"""Seconds of a layer's decisions, and the operations that came of them."""


def planning(machine: Machine, workload: Workload, slots: int) -> tuple[Planning, ...]:
    """Seconds a layer that each policy takes beyond the plainest of its kind, on the decode passes of ``workload``.

    On a device whose lanes share the host's caches, each layer is decided with cold ones, as in a run. What a policy
    needs and synthetic routing does not give (a calibration trace) leaves it out: it then counts as the plainest.
    """
    plain = SystemSpec()
    base, slope_s = _line(_timed(machine, workload, plain, slots))
    found = []
    for kind, registry in KINDS.items():
        for name in registry:
            try:
                timed = _timed(machine, workload, SystemSpec.model_validate({kind: name}), slots)
            except InputError:
                continue
            extra_s = float(np.median([seconds - slope_s * operations for seconds, operations in timed])) - base
            found.append(Planning(kind=kind, policy=name, layer_s=max(0.0, extra_s)))
    return tuple(found)


def _line(timed: list[Timed]) -> tuple[float, float]:
    """The median layer without operations, and the seconds of one."""
    seconds, operations = (np.array(column, float) for column in zip(*timed, strict=True))
    slope_s = max(0.0, float(np.polyfit(operations, seconds, 1)[0])) if len({*operations.tolist()}) > 1 else 0.0
    return float(np.median(seconds - slope_s * operations)), slope_s


def _timed(machine: Machine, workload: Workload, system: SystemSpec, slots: int) -> list[Timed]:
    costs = RooflineCosts(machine.loaded.spec, catalogue.hardware(catalogue.REFERENCE_MACHINE))
    controller = build_controller(workload, system, Budget(slots=slots), costs)
    controller.preload()
    routing = routings_of(workload.trace, scored="scores" in system.needs, ranked="gates" in system.needs)
    predictions, chill = predictions_of(workload.trace, system.lookahead_depth), chilling(machine)
    timed: list[Timed] = []
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
            if len(step.rows) == 1:
                timed.append((seconds, len(plan.operations)))
    return timed

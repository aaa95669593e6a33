"""Every value of a sweep is looked at before its first run, once each: files, names, numbers, constants."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

from sim.policies.base import PolicyContext
from sim.scenario import Scenario
from sim.spec import catalogue
from sim.spec.catalogue import REFERENCE_MACHINE
from sim.spec.compute_table import ComputeTable
from sim.spec.profile import Profile
from sim.sweep.keys import trace_of
from sim.systems import KINDS, SystemSpec, parse_capacity
from sim.target import model_for, parse_bytes
from traces.batching import POISSON, BatchSpec
from traces.errors import InputError

ANY_EXPERTS = 10**9
"""A pool that every number of slots fits: whether it fits the model is for a run to find."""


def check_values(scenarios: Iterable[Scenario]) -> None:
    """Raises :class:`InputError` for a value that no run could take.

    What depends on how values meet, such as a budget that is too small for a model, is not a mistake: it is told by
    the run that is refused for it.
    """
    seen: set[Hashable] = set()
    for scenario in scenarios:
        for key, look in _looks(scenario):
            if key not in seen:
                look()
                seen.add(key)


def _looks(one: Scenario) -> list[tuple[Hashable, Callable[[], Any]]]:
    """What is to be looked at, each with what tells it from others of the same kind."""
    looks: list[tuple[Hashable, Callable[[], Any]]] = [
        (("trace", one.trace), partial(trace_of, one.trace)),
        (("model", one.trace, one.model, one.quant, *one.model_set.items()), lambda: _model(one)),
        (("hardware", one.hardware, *one.hardware_set.items()), lambda: _hardware(one)),
        (("arrivals", one.arrivals, one.rate_per_s), lambda: _arrivals(one)),
        (("system", one.system.system.model_dump_json()), lambda: _check_constants(one.system.system)),
    ]
    given: dict[str, Callable[[Any], Any]] = {
        "calibration": partial(trace_of, field="calibration"),
        "compute_table": ComputeTable.load,
        "profile": Profile.load,
        "cache": lambda text: parse_capacity(text, layers=1, experts=ANY_EXPERTS),
        "gpu_memory": lambda text: parse_bytes(text, "gpu-memory"),
        "host_memory": lambda text: parse_bytes(text, "host-memory"),
        "lookahead_recall": _check_share,
    }
    for field, look in given.items():
        value = getattr(one, field)
        if value is not None:
            looks.append(((field, value), partial(look, value)))
    return looks


def _model(one: Scenario) -> None:
    spec = model_for(trace_of(one.trace), one.model, one.quant)
    catalogue.overridden_model(spec, one.model_set)


def _hardware(one: Scenario) -> None:
    catalogue.overridden(catalogue.find_hardware(one.hardware or REFERENCE_MACHINE), one.hardware_set)


def _check_share(recall: float) -> None:
    if not 0 <= recall <= 1:
        raise InputError(f"lookahead-recall must be from 0 to 1, got {recall}")


def _arrivals(one: Scenario) -> None:
    """Whether there are as many as a trace has sequences, and not all at once, is for a run to find."""
    spec = BatchSpec.of(**{field: getattr(one, field) for field in BatchSpec.model_fields})
    own = spec if spec.arrivals == POISSON else spec.model_copy(update={"rate_per_s": None})
    own.arrivals_for(1)


class _Nothing:
    """Stands in for what a policy learns from or knows of the future: nothing was ever used, and nothing will be."""

    def uses(self) -> list[int]:
        return [0] * CONTEXT.blocks

    def events(self) -> Iterable[tuple[int, list[int]]]:
        return iter(())

    def requests(self) -> Iterable[Any]:
        return iter(())

    def next_use(self, block: int, event: int) -> int:
        return event + 1


CONTEXT = PolicyContext(layers=2, experts=8, top_k=2, capacity=4, weights=(1, 1))


def _check_constants(system: SystemSpec) -> None:
    """Raises :class:`InputError` for a constant that its policy refuses when it is made."""
    nothing: Any = _Nothing()
    context = replace(CONTEXT, future=nothing, calibration=nothing)
    making = {"evict": system.eviction, "prefetch": system.prefetching, "place": system.placement}
    for kind in KINDS:
        if system.options_of(kind):
            making[kind](context)


def check_some_run(scenarios: Iterable[Scenario]) -> None:
    """Raises :class:`InputError` when not one of ``scenarios`` can run, for the reason of the first."""
    first: InputError | None = None
    for scenario in scenarios:
        try:
            scenario.prepare()
        except InputError as error:
            first = first or error
        else:
            return
    if first is not None:
        raise first

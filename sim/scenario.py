"""A simulated run as plain values: what the command line, a sweep and a file can say, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from sim.costs import Costs, RooflineCosts, TableCosts
from sim.memory import MemoryPlan
from sim.policies.base import Calibration
from sim.presets import Preset
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.run import simulate
from sim.spec import ModelSpec, catalogue
from sim.spec.catalogue import REFERENCE_MACHINE
from sim.spec.compute_table import ComputeTable
from sim.spec.overrides import Value
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, model_for, workload_of
from traces.errors import InputError
from traces.schema import Trace
from traces.shipped import find_trace
from traces.standin import with_lookahead
from traces.store import load as load_trace
from traces.workload import Workload

MOST_SEED = 2**32 - 1


class Scenario(BaseModel):
    """One simulated run. Every field is plain, so that two scenarios with equal fields and files are the same run.

    ``trace`` and ``calibration`` are files or names of shipped traces. ``context`` is the KV cache to make room for,
    where it is to be longer than the trace's own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trace: str
    system: Preset = Preset(system=SystemSpec())
    model: str | None = None
    model_set: dict[str, Value] = Field(default_factory=dict)
    quant: str | None = None
    hardware: str | None = None
    hardware_set: dict[str, Value] = Field(default_factory=dict)
    compute_table: Path | None = None
    profile: Path | None = None
    cache: str | None = None
    gpu_memory: str | None = None
    context: PositiveInt | None = None
    batch: PositiveInt = 1
    calibration: str | None = None
    lookahead_recall: float | None = None
    seed: NonNegativeInt = Field(default=0, le=MOST_SEED)

    def prepare(self) -> Prepared:
        """Reads what the scenario names, and works out what is run; raises :class:`InputError` for what cannot be."""
        recorded = _read_trace(self.trace)
        model = catalogue.overridden_model(model_for(recorded, self.model, self.quant), self.model_set)
        if self.lookahead_recall is not None:
            recorded = with_lookahead(recorded, self.lookahead_recall, seed=self.seed)
        workload, longest = workload_of(recorded, model, self.batch)
        context = self._context(longest)
        calibration = self._calibration(workload.trace)
        system, notes = self.system.fitted(calibrated=calibration is not None)
        budget = self._budget(model, system, context, calibration)
        hardware, costs = self._costs(model)
        plan = MemoryPlan.of(model, budget, scope=system.scope, lanes=self.batch, context=context)
        return Prepared(workload, model, system, budget, hardware, costs, calibration, plan, notes, self.seed)

    def _context(self, longest: int) -> int:
        if self.context is not None and self.context < longest:
            raise InputError(f"context must be at least {longest}, the trace's longest sequence, got {self.context}")
        return self.context or longest

    def _calibration(self, judged: Trace) -> Any:
        if self.calibration is None:
            return None
        from sim.replay.calibration import TraceCalibration  # numba is imported with it

        return TraceCalibration.of(_read_trace(self.calibration), judged, self.batch)

    def _budget(self, model: ModelSpec, system: SystemSpec, context: int, calibration: Any) -> Budget:
        """The slots: the same number in all for every system under the same limit, whatever its scope."""
        even = budget_of(
            model, lanes=self.batch, context=context, cache=self.cache, gpu_memory=self.gpu_memory, scope=system.scope
        )
        if self.system.unlimited:
            return even.model_copy(update={"slots": model.experts})
        if system.holds != "cache":
            held = 2 * model.experts if system.holds == "two layers" else 1
            return even.model_copy(update={"slots": min(even.slots, held)})
        if system.slots_by_layer == "even" or calibration is None:
            return even
        from sim.slots import split_by_misses

        split = split_by_misses(calibration, even.slots * model.moe_layers)
        return even.model_copy(update={"by_layer": split})

    def _costs(self, model: ModelSpec) -> tuple[str, Costs]:
        """The machine's name, and what work of ``model`` takes on it."""
        if self.profile is not None:
            self._check_profile_alone()
            measured = Profile.load(self.profile)
            _check_format(model, measured.model)
            return measured.name, ProfileCosts(measured, model)
        machine = catalogue.overridden(catalogue.find_hardware(self.hardware or REFERENCE_MACHINE), self.hardware_set)
        if self.compute_table is None:
            return machine.name, RooflineCosts(model, machine)
        return machine.name, TableCosts(model, machine, ComputeTable.load(self.compute_table))

    def _check_profile_alone(self) -> None:
        given = {
            "hardware": self.hardware,
            "hardware-set": self.hardware_set or None,
            "compute-table": self.compute_table,
        }
        for name, value in given.items():
            if value is not None:
                raise InputError(f"{name} must not be given together with profile, got {value} and {self.profile}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a scenario comes to, checked and ready to run."""

    workload: Workload
    model: ModelSpec
    system: SystemSpec
    budget: Budget
    hardware: str
    costs: Costs
    calibration: Calibration | None
    memory: MemoryPlan
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    def run(
        self, *, events: bool = True, operations: bool = True, progress: Callable[[], None] = lambda: None
    ) -> RunResult:
        """Simulates it."""
        result = simulate(
            self.workload,
            self.system,
            self.budget,
            self.costs,
            hardware=self.hardware,
            calibration=self.calibration,
            seed=self.seed,
            events=events,
            operations=operations,
            progress=progress,
        )
        notes = [*self.notes, *result.info.notes]
        result.info = result.info.model_copy(update={"notes": notes, "memory": self.memory.model_dump()})
        return result


@lru_cache(maxsize=8)
def _read_file(path: Path, changed_ns: int) -> Trace:
    return load_trace(path)


def _read_trace(name: str) -> Trace:
    """The trace of that name; a file is read once, as long as it does not change."""
    path = find_trace(name)
    return _read_file(path, path.stat().st_mtime_ns) if path.exists() else load_trace(path)


def _check_format(spec: ModelSpec, measured: ModelSpec) -> None:
    """Raises :class:`InputError`, with the way out, when weights were ``measured`` in another format than ``spec``'s.

    A calibration measures all weights in one format, so that following both hints always ends.
    """
    for name, way in (
        ("dtype", f"calibrate with --dtype {spec.dtype}"),
        ("expert_bits", f"simulate with --quant {measured.dtype}"),
    ):
        wanted, got = getattr(spec, name), getattr(measured, name)
        if wanted != got:
            raise InputError(f"profile must be measured with {name} {wanted}, as in the model, got {got} ({way})")

"""A simulated run as plain values: what the command line, a sweep and a file can say, and what it comes to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from sim.card import check_limit
from sim.card import notes_on as notes_on_card
from sim.costs import Costs, RooflineCosts, TableCosts
from sim.memory import MemoryPlan
from sim.needs import check_costs, check_needs, has_residuals
from sim.policies.base import Calibration
from sim.presets import Preset
from sim.profile import ProfileCosts
from sim.results import RunResult
from sim.spec import BITS_PER_WEIGHT, ModelSpec, catalogue
from sim.spec.catalogue import REFERENCE_MACHINE
from sim.spec.compute_table import ComputeTable
from sim.spec.overrides import Value
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec
from sim.target import budget_of, model_for, parse_bytes, plan_of
from traces.batching import BatchSpec, Requests, known_order
from traces.errors import InputError
from traces.limits import MOST_BATCH
from traces.schema import Trace
from traces.shipped import find_trace
from traces.standin import with_lookahead
from traces.store import load as load_trace
from traces.store import notes_on
from traces.workload import Workload

MOST_SEED = 2**32 - 1


class Scenario(BaseModel):
    """One simulated run. Every field is plain, so that two scenarios with equal fields and files are the same run.

    ``trace`` and ``calibration`` are files or names of shipped traces. ``context`` is the KV cache to make room for,
    where it is to be longer than the trace's own. Experts that ``host_memory`` does not hold are read from the disk.
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
    host_memory: str | None = None
    context: PositiveInt | None = None
    batch: PositiveInt = Field(default=1, le=MOST_BATCH)
    batching: Literal["lock-step", "continuous"] = "lock-step"
    prefill_chunk: NonNegativeInt = 0
    arrivals: str | None = None
    rate_per_s: float | None = None
    calibration: str | None = None
    lookahead_recall: float | None = None
    seed: NonNegativeInt = Field(default=0, le=MOST_SEED)

    def prepare(self) -> Prepared:
        """Reads what the scenario names, and works out what is run; raises :class:`InputError` for what cannot be."""
        recorded, changed = _read_trace(self.trace)
        model = catalogue.overridden_model(model_for(recorded, self.model, self.quant), self.model_set)
        if self.lookahead_recall is not None:
            recorded = with_lookahead(recorded, self.lookahead_recall, seed=self.seed)
        plan, lanes, longest = plan_of(recorded, model, self._batch_spec())
        context = self._context(longest)
        calibration = self._calibration(plan.trace)
        system, notes = self.system.fitted(calibrated=calibration is not None, residuals=has_residuals(plan.trace))
        even = budget_of(
            model, lanes=lanes, context=context, cache=self.cache, gpu_memory=self.gpu_memory, scope=system.scope
        )
        budget = self._budget(model, even, calibration)
        hardware, costs = self._costs(model)
        check_needs(plan.trace, system, calibration)
        check_costs(costs, system, budget)
        if "future" in system.needs:
            known_order(plan, system.needing("future"))
        memory = MemoryPlan.of(model, budget, scope=system.scope, lanes=lanes, context=context)
        arrivals = plan.arrivals if isinstance(plan, Requests) else None
        notes = [*changed, *(arrivals.notes if arrivals else ()), *self._notes_on_room(memory, costs), *notes]
        slots = (budget if self.system.unlimited else even).total(model.moe_layers, system.scope)
        return Prepared(plan, model, system, budget, slots, hardware, costs, calibration, memory, notes, self.seed)

    def _notes_on_room(self, memory: MemoryPlan, costs: Costs) -> list[str]:
        """What has to be told of the memory that the run takes; a profile does not say what its machine has.

        Raises :class:`InputError` for a limit that the machine's GPU cannot keep.
        """
        notes = ["every expert is held, whatever the limit"] if self.system.unlimited else []
        if not isinstance(costs, RooflineCosts):
            return notes
        if self.gpu_memory is not None:
            check_limit(self.gpu_memory, costs.hardware.gpu)
        return [*notes, *notes_on_card(memory, costs.hardware.gpu)]

    def _batch_spec(self) -> BatchSpec:
        return BatchSpec.of(
            batch=self.batch,
            batching=self.batching,
            prefill_chunk=self.prefill_chunk,
            arrivals=self.arrivals,
            rate_per_s=self.rate_per_s,
            seed=self.seed,
        )

    def _context(self, longest: int) -> int:
        if self.context is not None and self.context < longest:
            raise InputError(f"context must be at least {longest}, the trace's longest sequence, got {self.context}")
        return self.context or longest

    def _calibration(self, judged: Trace) -> Any:
        if self.calibration is None:
            return None
        from sim.replay.calibration import TraceCalibration

        return TraceCalibration.of(_read_trace(self.calibration, "calibration")[0], judged, self.batch)

    def _budget(self, model: ModelSpec, even: Budget, calibration: Any) -> Budget:
        found = self.system.budget(even, layers=model.moe_layers, experts=model.experts, calibration=calibration)
        return found.model_copy(update={"host_slots": self._host_slots(model)})

    def _host_slots(self, model: ModelSpec) -> int | None:
        """Experts that the host's memory holds; None where it holds them all."""
        if self.host_memory is None:
            return None
        size_bytes = parse_bytes(self.host_memory, "host-memory")
        if size_bytes < model.expert_bytes:
            raise InputError(f"host-memory must hold an expert, {model.expert_bytes} bytes, got {self.host_memory}")
        held = size_bytes // model.expert_bytes
        return None if held >= model.moe_layers * model.experts else held

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


def alongside(scenario: Scenario, systems: Sequence[Preset]) -> list[Scenario]:
    """``scenario`` under each of ``systems``, every one with the same bytes for experts.

    These are the slots that the limit gives to each layer, added up where one pool serves all. Raises
    :class:`InputError` for what is wrong with the scenario whatever the system.
    """
    even = scenario.model_copy(update={"system": Preset(system=SystemSpec())}).prepare()
    slots, layers = even.budget.slots, even.model.moe_layers
    return [
        scenario.model_copy(
            update={
                "system": system,
                "gpu_memory": None,
                "cache": str(slots * (layers if system.system.scope == "global" else 1)),
            }
        )
        for system in systems
    ]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What a scenario comes to, checked and ready to run.

    ``slots`` are those that the limit gives to experts in all, of which ``budget`` is what the system makes.
    """

    plan: Workload | Requests
    model: ModelSpec
    system: SystemSpec
    budget: Budget
    slots: int
    hardware: str
    costs: Costs
    calibration: Calibration | None
    memory: MemoryPlan
    notes: list[str] = field(default_factory=list)
    seed: int = 0

    @property
    def workload(self) -> Workload | None:
        """The forward passes in their order; None where the clock decides it, as requests arrive."""
        return self.plan if isinstance(self.plan, Workload) else None

    @property
    def steps(self) -> int | None:
        """Forward passes; None where the clock decides how many there are."""
        return None if self.workload is None else len(self.workload)

    def run(
        self, *, events: bool = True, operations: bool = True, progress: Callable[[], None] = lambda: None
    ) -> RunResult:
        """Simulates it; on a profile, once more where every piece of work is slow, for the spread of a token's time."""
        result = self._simulated(events=events, operations=operations, progress=progress)
        about: dict[str, Any] = {"notes": [*self.notes, *result.info.notes], "memory": self.memory.model_dump()}
        if isinstance(self.costs, ProfileCosts):
            slow = self._simulated(events=False, operations=False, slow=True)
            about["slow_token_s"] = slow.headline()["time_per_output_token_p50_s"]
        result.info = result.info.model_copy(update=about)
        return result

    def _simulated(self, **options: Any) -> RunResult:
        from sim.run import simulate  # simpy is imported with it

        return simulate(
            self.plan,
            self.system,
            self.budget,
            self.costs,
            hardware=self.hardware,
            calibration=self.calibration,
            seed=self.seed,
            **options,
        )


@lru_cache(maxsize=8)
def _read_file(path: Path, changed_ns: int) -> Trace:
    return load_trace(path)


def _read_trace(name: str, field: str = "trace") -> tuple[Trace, list[str]]:
    """The trace of that name, and what has to be told of it; a file is read once, as long as it does not change."""
    path = find_trace(name, field)
    trace = _read_file(path, path.stat().st_mtime_ns)
    return trace, notes_on(trace, path)


def _check_format(spec: ModelSpec, measured: ModelSpec) -> None:
    """Raises :class:`InputError`, with the way out, when weights were ``measured`` in another format than ``spec``'s.

    A calibration has all weights in one format, or its experts in another, so that following both hints always ends.
    """
    kept = (name for name, bits in BITS_PER_WEIGHT.items() if bits == measured.expert_bits)
    quant = measured.dtype if BITS_PER_WEIGHT[measured.dtype] == measured.expert_bits else next(kept, None)
    chosen = f"--quant {quant}" if quant else f"--model-set expert_bits={measured.expert_bits:g}"
    for name, way in (
        ("dtype", f"calibrate with --dtype {spec.dtype}"),
        ("expert_bits", f"simulate with {chosen}"),
    ):
        wanted, got = getattr(spec, name), getattr(measured, name)
        if wanted != got:
            raise InputError(f"profile must be measured with {name} {wanted}, as in the model, got {got} ({way})")

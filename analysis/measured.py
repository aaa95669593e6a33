"""Folders of measured runs: which of them are repeats of the same work, and what the simulator says of each.

A run tells what it ran (model, system, slots, trace, workload) but holds no trace. The one that was replayed is found
by content among files, beside the runs and among the recordings that ship. No run tells what fitted systems learned
from: that is the file given for it, or the nearest ``calibration.safetensors`` in the folder of the runs or above it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.compare import compare
from analysis.frames import fastest, step_frame
from analysis.validation import Judged
from sim.profile import ProfileCosts
from sim.results import RunInfo, RunResult
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec
from sim.target import retarget
from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.shipped import SHIPPED_TRACES
from traces.store import load as load_trace
from traces.workload import Workload, lock_step

if TYPE_CHECKING:
    from sim.replay.calibration import TraceCalibration

TRACE_FILE, CALIBRATION_FILE, PROFILE_FILE = "trace.safetensors", "calibration.safetensors", "profile.toml"
"""What stands beside the runs of a validation."""

DIGEST_LETTERS = 8

LEVELS = 4
"""How far above a run those files may stand."""

CONSTANTS = "constants"
"""Folder of a validation's runs on synthetic routing."""

WORK = (
    "model",
    "hardware",
    "system",
    "capacity_slots",
    "capacity_bytes",
    "staging_slots",
    "trace_digest",
    "workload",
)
"""Fields of a run that are equal in all repeats of the same work."""


@dataclass(frozen=True)
class Group:
    """Folders of measured runs of the same work, in the order of their names; ``info`` is that of the first."""

    folders: tuple[Path, ...]
    info: RunInfo

    def runs(self) -> list[RunResult]:
        return [RunResult.load(folder) for folder in self.folders]

    @property
    def system(self) -> str:
        """The system's name, or that of its policies."""
        return SystemSpec(**self.info.system).label()

    @property
    def cache(self) -> str:
        """The cache size as it was asked for, where the run tells it, and else its slots."""
        return str(self.info.workload.get("cache", f"{self.info.capacity_slots} slots"))


def groups_of(folder: Path) -> list[Group]:
    """Every measured run in ``folder`` and below it, repeats of the same work together, in the order of their names.

    Runs on synthetic routing for a validation's constants are left out. Raises :class:`InputError` where there is none.
    """
    if not folder.is_dir():
        raise InputError(f"measured must be a folder of runs, got {folder}")
    found: dict[str, list[tuple[Path, RunInfo]]] = {}
    for file in sorted(folder.rglob("run.json"), key=_natural):
        parts = file.relative_to(folder).parts
        if CONSTANTS in parts or any(part.startswith(".") for part in parts):  # hidden: half-written
            continue
        info = RunResult.load_info(file.parent)
        if info.source == "measured":
            found.setdefault(_work(info), []).append((file.parent, info))
    if not found:
        raise InputError(f"measured must hold measured runs, got none in {folder}")
    return [Group(tuple(path for path, _ in members), members[0][1]) for members in found.values()]


def workloads_of(groups: Sequence[Group]) -> list[str]:
    """What names each group's workload among the others: its trace and its batch, as far as they differ, or nothing.

    Raises :class:`InputError` for two groups that differ in what no table names, so that nobody could tell them apart.
    """
    told = [
        {"trace": one.info.trace_digest[:DIGEST_LETTERS], "batch": str(one.info.workload["batch"])} for one in groups
    ]
    differ = [name for name in ("trace", "batch") if len({one[name] for one in told}) > 1]
    words = [", ".join(f"{name} {one[name]}" for name in differ) for one in told]
    seen: dict[tuple[str, ...], Group] = {}
    for group, workload in zip(groups, words, strict=True):
        other = seen.setdefault((group.info.model, group.system, group.cache, workload), group)
        if other is not group:
            raise InputError(
                f"measured must hold repeats of the same work under {group.system} at {group.cache}, got "
                f"{group.folders[0]} with another {_difference(other.info, group.info)} than {other.folders[0]}"
            )
    return words


def _difference(one: RunInfo, other: RunInfo) -> str:
    return " and ".join(name for name in WORK if getattr(one, name) != getattr(other, name))


def _natural(path: Path) -> tuple[tuple[bool, int, str], ...]:
    """Parts of a path in the order in which people count: r2 before r10."""
    parts = (part.rstrip("0123456789") for part in path.parts)
    return tuple(
        (True, int(part[len(word) :] or 0), word) if part != word else (False, 0, part)
        for part, word in zip(path.parts, parts, strict=True)
    )


def _work(info: RunInfo) -> str:
    return info.model_dump_json(include=set(WORK))


@dataclass(frozen=True)
class Twin:
    """What simulates measured runs: a profile, and the traces that runs may have replayed or learned from."""

    profile: Profile
    traces: Sequence[Path]
    learned: Sequence[Path]

    @classmethod
    def of(cls, folder: Path, profile: Path, trace: Path | None = None, calibration: Path | None = None) -> Twin:
        """``folder`` is that of the runs; a file given is taken alone; else what stands there or ships is tried."""
        return cls(
            Profile.load(profile),
            [trace] if trace is not None else [*_beside(folder, TRACE_FILE), *SHIPPED_TRACES.values()],
            [calibration] if calibration is not None else [*_beside(folder, CALIBRATION_FILE)],
        )

    def simulate(self, info: RunInfo) -> RunResult:
        """The run that ``info`` tells of, in simulated time on the profile.

        Raises :class:`InputError` when its trace, or the profile's model, is another one.
        """
        from sim.run import simulate  # simpy is imported with it

        spec = self.profile.model
        trace = self._trace(info)
        workload = _workload(trace, info)
        system = SystemSpec(**info.system)
        learned = self._learned(trace, system, workload.batch)
        budget = _budget(info, system, spec.moe_layers, learned)
        costs = ProfileCosts(self.profile, spec)
        return simulate(workload, system, budget, costs, hardware=self.profile.name, calibration=learned)

    def _trace(self, info: RunInfo) -> Trace:
        for path in self.traces:
            trace = load_trace(path)
            for one in _as_run(trace, self.profile):
                if one.digest == info.trace_digest:
                    return one
        tried = ", ".join(str(path) for path in self.traces) or "none"
        raise InputError(
            f"trace must be the one that was replayed ({info.trace_digest[:12]}) on the profile's model, got {tried}"
        )

    def _learned(self, judged: Trace, system: SystemSpec, batch: int) -> TraceCalibration | None:
        if "calibration" not in system.needs:
            return None
        from sim.replay.calibration import TraceCalibration  # numba is imported with it

        for path in self.learned:
            return TraceCalibration.of(next(reversed([*_as_run(load_trace(path), self.profile)])), judged, batch)
        raise InputError(
            f"calibration must be given for {system.label()}, which was fitted to a trace that no run tells, got no "
            f"{CALIBRATION_FILE} beside the runs"
        )


def _beside(folder: Path, name: str) -> Iterator[Path]:
    """Files of that name in ``folder``, and in the folders that it is in, nearest first."""
    resolved = folder.resolve()
    return (place / name for place in (resolved, *resolved.parents[:LEVELS]) if (place / name).is_file())


def _as_run(trace: Trace, profile: Profile) -> Iterator[Trace]:
    """The trace as it is, and with the expert bytes of the profile's model when its dimensions are the same."""
    yield trace
    spec, header = profile.model, trace.header
    if (header.layers, header.experts, header.top_k) == (spec.moe_layers, spec.experts, spec.top_k):
        yield retarget(trace, spec)


def _workload(trace: Trace, info: RunInfo) -> Workload:
    """The passes of the run; raises :class:`InputError` when the trace's own would be others."""
    workload = lock_step(trace, int(info.workload["batch"]))
    told = workload.describe()
    for field in told.keys() & info.workload.keys():
        if told[field] != info.workload[field]:
            raise InputError(f"{field} must be {info.workload[field]} as in the measured run, got {told[field]}")
    return workload


def _budget(info: RunInfo, system: SystemSpec, layers: int, learned: TraceCalibration | None) -> Budget:
    shared = system.scope == "global"
    even = Budget(slots=info.capacity_slots if shared else info.capacity_slots // layers, staging=info.staging_slots)
    if system.slots_by_layer == "even" or learned is None:
        return even
    from sim.slots import split_by_misses  # numba is imported with it

    return even.model_copy(update={"by_layer": split_by_misses(learned, info.capacity_slots)})


def comparisons(
    folder: Path, groups: Sequence[Group], twin: Twin, advance: Callable[[], None] = lambda: None
) -> Iterator[Judged]:
    """Every group of measured runs in ``folder`` against its simulation, with the system's constant where the folder
    holds one. Raises :class:`InputError` as :func:`workloads_of` does."""
    for group, workload in zip(groups, workloads_of(groups), strict=True):
        runs = group.runs()
        outcome = compare(runs[0], twin.simulate(group.info), repeats=runs[1:])
        yield Judged(outcome, group.cache, workload, constant_s(folder, group.system))
        advance()


def constant_s(folder: Path, system: str) -> float | None:
    """Mean seconds of a decode token of ``system`` on synthetic routing, each step in its fastest repeat."""
    runs = sorted((folder / CONSTANTS / system).glob("*/run.json"))
    if not runs:
        return None
    steps = fastest([step_frame(RunResult.load(file.parent)) for file in runs])
    return float(steps.loc[steps["phase"] == Phase.DECODE, "latency_s"].mean())

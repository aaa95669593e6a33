"""Folders of measured runs: which of them are repeats of the same work, and what the simulator says of each.

A run tells what it ran (model, system, slots, trace, workload) but holds no trace. The one that was replayed, and the
one that fitted systems learned from, are found by content among files: in the run's folder and those above it, and
among the recordings that ship. An older run does not tell what it learned from: that is then the nearest file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.compare import compare
from analysis.decisions import promises_counts
from analysis.frames import fastest, step_frame
from analysis.validation import Judged
from sim.needs import check_needs
from sim.profile import ProfileCosts, other_threads
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
"""What stands beside the runs of a validation, or above them."""

DIGEST_LETTERS = 8

LEVELS = 6
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
    "cpu_threads",
    "costs",
    "calibration_digest",
    "recorded",
)
"""Fields of a run that are equal in all repeats of the same work: what was run, and what it was told beforehand."""

IN_WORDS = {
    "costs": "profile (the costs that policies weigh)",
    "calibration_digest": "calibration trace",
    "recorded": "recording of the routing (prompts, or a trace's routing forced)",
}
"""Fields of :data:`WORK` whose names do not say enough."""

DECIDED = ["step", "layer", "op", "expert", "tokens", "bytes"]
"""Columns of the operations that repeats without prefetch have in common; slots and their order follow from these."""


@dataclass(frozen=True)
class Group:
    """Folders of measured runs of the same work, in the order of their names; ``info`` is that of the first."""

    folders: tuple[Path, ...]
    info: RunInfo

    def runs(self) -> list[RunResult]:
        return [RunResult.load(folder) for folder in self.folders]

    @property
    def where(self) -> str:
        """The first folder, and how many there are beside it."""
        others = len(self.folders) - 1
        return f"{self.folders[0]}" + (f" and {others} more" if others else "")

    @property
    def system(self) -> str:
        """The system's name, or that of its policies."""
        return SystemSpec(**self.info.system).label()

    @property
    def cache(self) -> str:
        """The cache size as it was asked for, where the run tells it, and else its slots."""
        return str(self.info.workload.get("cache", f"{self.info.capacity_slots} slots"))


def groups_of(folder: Path, left_out: dict[str, str] | None = None) -> list[Group]:
    """Every measured run in ``folder`` and below it, repeats of the same work together, in the order of their names.

    Runs on synthetic routing for a validation's constants are passed over, and those that cannot be read go into
    ``left_out``: their folder, and why. Raises :class:`InputError` where no others are.
    """
    unreadable: dict[str, str] = {} if left_out is None else left_out
    if not folder.is_dir():
        raise InputError(f"measured must be a folder of runs, got {folder}")
    found: dict[str, list[tuple[Path, RunInfo]]] = {}
    for file in sorted(folder.rglob("run.json"), key=_natural):
        parts = file.relative_to(folder).parts
        if CONSTANTS in parts or any(part.startswith(".") for part in parts):  # hidden: half-written
            continue
        try:
            info = _info_of(file.parent)
        except InputError as error:
            unreadable[str(file.parent)] = str(error)
            continue
        if info.source == "measured":
            found.setdefault(_work(info), []).append((file.parent, info))
    if not found:
        why = "".join(f"; {reason}" for reason in unreadable.values())
        raise InputError(f"measured must hold measured runs, got none in {folder}{why}")
    return [Group(tuple(path for path, _ in members), members[0][1]) for members in found.values()]


def _info_of(folder: Path) -> RunInfo:
    info = RunResult.load_info(folder)
    if not isinstance(info.workload.get("batch"), int):
        raise InputError(f"{folder} must be a run that tells its batch, got {info.workload.get('batch')}")
    return info


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
                f"{group.folders[0]} with another {_difference(other.info, group.info)} than {other.folders[0]}: "
                "judge each in a folder of its own"
            )
    return words


def _difference(one: RunInfo, other: RunInfo) -> str:
    return " and ".join(IN_WORDS.get(name, name) for name in WORK if getattr(one, name) != getattr(other, name))


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
    """What simulates measured runs: a profile, and the one trace that they replayed or learned from, where one is given
    for all of them; else each run's is sought in its folder, in those above it, and among those that ship."""

    profile: Profile
    trace: Path | None = None
    calibration: Path | None = None

    @classmethod
    def of(cls, profile: Path, trace: Path | None = None, calibration: Path | None = None) -> Twin:
        """Reads the profile."""
        return cls(Profile.load(profile), trace, calibration)

    def ready(self, info: RunInfo, folder: Path) -> Callable[[], RunResult]:
        """What simulates the run that ``info`` tells of, and that lies in ``folder``.

        Raises :class:`InputError` when its traces are not found, or the profile's model is another one.
        """
        from sim.run import simulate  # simpy is imported with it

        spec = self.profile.model
        expert_bytes = info.bytes_of_expert
        if expert_bytes and expert_bytes != spec.expert_bytes:
            raise InputError(
                f"profile must be measured with experts of {expert_bytes:,} bytes as in the run, got "
                f"{spec.expert_bytes:,}"
            )
        trace, system = self._trace(info, folder), SystemSpec(**info.system)
        workload = _workload(trace, info)
        learned = self._learned(info, folder, workload) if "calibration" in system.needs else None
        check_needs(trace, system, learned)
        budget = _budget(info, system, spec.moe_layers, learned)
        costs, name = ProfileCosts(self.profile, spec), self.profile.name
        return partial(simulate, workload, system, budget, costs, hardware=name, calibration=learned)

    def simulate(self, info: RunInfo, folder: Path) -> RunResult:
        """The run that ``info`` tells of in simulated time; raises as :meth:`ready`."""
        run = self.ready(info, folder)()
        run.info.notes.extend(other_threads(self.profile, info.cpu_threads))
        return run

    def _trace(self, info: RunInfo, folder: Path) -> Trace:
        tried = [self.trace] if self.trace is not None else [*_above(folder, TRACE_FILE), *SHIPPED_TRACES.values()]
        unreadable: list[str] = []
        for trace in _loaded(tried, unreadable):
            for one in _as_run(trace, self.profile):
                if one.digest == info.trace_digest:
                    return one
        raise InputError(
            f"trace must be the one that was replayed ({info.trace_digest[:12]}) on the profile's model, got "
            f"{'; '.join([', '.join(map(str, tried)), *unreadable])}"
        )

    def _learned(self, info: RunInfo, folder: Path, judged: Workload) -> TraceCalibration:
        """What fitted policies learned from, over as many lanes as the run had."""
        from sim.replay.calibration import TraceCalibration

        wanted = info.calibration_digest
        shipped = SHIPPED_TRACES.values() if wanted else ()
        tried = [self.calibration] if self.calibration is not None else [*_above(folder, CALIBRATION_FILE), *shipped]
        unreadable: list[str] = []
        for trace in _loaded(tried, unreadable):
            found = _as_run(trace, self.profile) or [trace]
            if not wanted or wanted in [one.digest for one in found]:
                return TraceCalibration.of(found[-1], judged.trace, judged.batch)
        label = SystemSpec(**info.system).label()
        if wanted:
            raise InputError(
                f"calibration must be the trace that {label} learned from ({wanted[:12]}), got "
                f"{'; '.join([', '.join(map(str, tried)), *unreadable])}"
            )
        raise InputError(
            f"calibration must be given for {label}, which was fitted to a trace that the run does not tell, got no "
            f"{CALIBRATION_FILE} beside the run"
        )


def _above(folder: Path, name: str) -> Iterator[Path]:
    """What has that name in ``folder``, and in the folders that it is in, nearest first."""
    resolved = folder.resolve()
    return (place / name for place in (resolved, *resolved.parents[:LEVELS]) if (place / name).exists())


def _loaded(paths: Sequence[Path], unreadable: list[str]) -> Iterator[Trace]:
    """The traces of ``paths``; what is wrong with those that are none goes to ``unreadable``."""
    for path in paths:
        try:
            yield load_trace(path)
        except InputError as error:
            unreadable.append(str(error))


def _as_run(trace: Trace, profile: Profile) -> list[Trace]:
    """The trace as it is, and with the expert bytes of the profile's model; none when its dimensions are others."""
    spec, header = profile.model, trace.header
    if (header.layers, header.experts, header.top_k) != (spec.moe_layers, spec.experts, spec.top_k):
        return []
    return [trace, retarget(trace, spec)]


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
    groups: Sequence[Group], twin: Twin, left_out: dict[str, str], advance: Callable[[], None] = lambda: None
) -> Iterator[Judged]:
    """Every group of measured runs against its simulation, with the system's constant where there is one above them.

    A group that cannot be simulated, or whose repeats decided differently, goes into ``left_out``: its folders, and
    why. Raises :class:`InputError` as :func:`workloads_of` does for the others.
    """
    ready = []
    for group in groups:
        try:
            twin.ready(group.info, group.folders[0])
            ready.append(group)
        except InputError as error:
            left_out[group.where] = str(error)
            advance()
    for group, workload in zip(ready, workloads_of(ready), strict=True):
        try:
            yield _judged(group, twin, workload)
        except InputError as error:
            left_out[group.where] = str(error)
        advance()


def _judged(group: Group, twin: Twin, workload: str) -> Judged:
    runs = group.runs()
    check_repeats(group, runs)
    outcome = compare(runs[0], twin.simulate(group.info, group.folders[0]), repeats=runs[1:])
    return Judged(outcome, group.cache, workload, constant_s(group.folders[0], group.system))


def check_repeats(group: Group, runs: Sequence[RunResult]) -> None:
    """Raises :class:`InputError` for repeats that decided differently where no arrival decides: without prefetch.

    Then they are not the same work, whatever they tell of it. Only runs that kept their operations are looked at.
    """
    if not promises_counts(group.info):
        return
    first, *others = (Counter(run.operations[DECIDED].itertuples(index=False, name=None)) for run in runs)
    for folder, other in zip(group.folders[1:], others, strict=True):
        if first and other and first != other:
            step, layer, *_ = min((first - other) | (other - first))
            raise InputError(
                f"repeats must have decided the same under {group.system}, which does not prefetch, got {folder} with "
                f"other operations than {group.folders[0]} from step {step}, layer {layer}, on"
            )


def constant_s(folder: Path, system: str) -> float | None:
    """Mean seconds of a decode token of ``system`` on synthetic routing, each step in its fastest repeat.

    Those runs are sought above the measured run in ``folder``; None where there are none.
    """
    nearest = next(_above(folder, f"{CONSTANTS}/{system}"), folder / CONSTANTS)
    runs = sorted(nearest.glob("*/run.json"))
    if not runs:
        return None
    steps = fastest([step_frame(RunResult.load(file.parent)) for file in runs])
    return float(steps.loc[steps["phase"] == Phase.DECODE, "latency_s"].mean())

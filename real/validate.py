"""The measuring half of a validation: calibrate a model on this machine, then run every configuration for real.

Every finished piece (the profile, each run) is written at once, so that an interrupt loses one run at the most, and
the same call goes on where it stopped. A folder holds one validation: its settings stand in ``settings.json``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from real.calibrate import calibrate
from real.decode import Machine, replay
from real.device import open_device
from real.estimates import Took
from real.memory import workspace_bytes
from real.subjects import Subject, check_different, model_content, synthetic_routing, system_content
from real.validation_folder import CONSTANTS, PROFILE_FILE, RUNS, check_weighed, claim, is_there
from sim.memory import MemoryPlan
from sim.needs import check_needs, has_residuals, learned_digest
from sim.presets import Preset, find_preset
from sim.profile import ProfileCosts
from sim.spec.profile import Profile
from sim.systems import Budget, SystemSpec, parse_capacity
from traces.errors import InputError
from traces.store import save as save_trace
from traces.workload import Workload, one_at_a_time

if TYPE_CHECKING:
    from sim.replay.calibration import TraceCalibration

PROTOCOL_VERSION = 2
DEFAULT_SYSTEMS = (
    "on-demand",
    "mixtral-offloading",
    "adapmoe",
    "ktransformers",
    "fiddler",
    "hybrimoe",
    "dali",
    "freetoken",
)
DEFAULT_CACHES = ("25%", "50%", "75%")
CONSTANT_REPEATS, CONSTANT_SEED = 3, 7
CONSTANT_SIZES: dict[str, Any] = {"sequences": 1, "prompt_tokens": 32, "new_tokens": 12, "lookahead": 3}
"""Runs of each system on synthetic routing, whose mean token is the constant that skill is measured against."""
JUDGING_S = 3.0
"""Seconds that are set aside for judging one configuration, within a time limit."""


@dataclass(frozen=True)
class Settings:
    """What decides the content of a validation; two calls with equal settings fill the same folder.

    ``content`` tells, with a digest each, what the models and systems named are: :class:`Validation` fills it in.
    """

    device: str
    models: tuple[str, ...]
    dtype: str
    systems: tuple[str, ...]
    caches: tuple[str, ...]
    repeats: int
    tokens: int
    sequences: int
    trace: str
    calibration: str
    seed: int = 0
    protocol: int = PROTOCOL_VERSION
    content: tuple[str, ...] = ()
    cpu_threads: int | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Progress:
    """How far a validation has come: pieces that are there, of all, and what is missing, by the model's name.

    ``notes`` says in words what a time limit left no room to begin.
    """

    done: int
    total: int
    missing: dict[str, list[str]]
    notes: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        return self.done == self.total


@dataclass(frozen=True)
class _Piece:
    """One run to be measured: where it goes, and what it is."""

    folder: Path
    preset: Preset
    cache: str
    constant: bool


class Validation:
    """A validation in the folder ``out``; ``say`` is told what is being done, ``advance`` of every finished run."""

    def __init__(self, out: Path, settings: Settings, subjects: Sequence[Subject]) -> None:
        """Raises :class:`InputError` for two models or systems of one name, which would share their folders, for a
        system that cannot run here, and for a folder that holds something else, or runs of another profile."""
        self._presets = [find_preset(name) for name in settings.systems]
        check_different("models", [one.name for one in subjects])
        check_different("systems", [one.name for one in self._presets])
        content = (
            *map(model_content, settings.models, subjects),
            *map(system_content, settings.systems, self._presets),
        )
        self.out, self.settings, self.subjects = out, replace(settings, content=content), subjects
        for one in subjects:
            self._check(one)
        claim(out, {"digest": self.settings.digest, **asdict(self.settings)})
        for one in subjects:
            check_weighed(out / one.name)

    def run(
        self,
        *,
        limit_s: float | None = None,
        say: Callable[[str], None] = lambda text: None,
        advance: Callable[[], None] = lambda: None,
        now_s: Callable[[], float] = time.monotonic,
    ) -> Progress:
        """Measures what is missing, and stops cleanly before ``limit_s`` seconds have passed.

        A model is loaded, and calibrated, only where that is estimated to fit (:mod:`real.estimates`).
        """
        clock = _Clock(limit_s, JUDGING_S * len(self._points()) * len(self.subjects), now_s)
        took, notes = Took(self.out, self.settings.device, self.settings.repeats), list[str]()
        for one in self.subjects:
            missing = [piece for piece in self._pieces(one) if not is_there(piece.folder)]
            if not missing and self._profile_of(one).exists():
                continue
            needed_s = sum(took.estimate(one.spec, what) for what in self._ahead(one))
            if not clock.fits(needed_s):
                told = f"about {needed_s:.0f} s for its first piece, and {clock.left_s():.0f} s are left"
                notes.append(f"{one.name} was not begun: it needs {told} beside judging")
                continue
            self._keep_routing(one)
            say(f"loading {one.name}")
            self._open(one, missing, clock, took, say, advance)
            gc.collect()  # one model's memory is needed for the next
        return replace(self.progress(), notes=tuple(notes))

    def _ahead(self, one: Subject) -> tuple[str, ...]:
        """What has to be done before a model's next piece is there."""
        return ("load", "run") if self._profile_of(one).exists() else ("load", "calibrate")

    def progress(self) -> Progress:
        """What is there, and what is not."""
        missing: dict[str, list[str]] = {}
        total = 0
        for one in self.subjects:
            pieces = self._pieces(one)
            left = [str(piece.folder.relative_to(self.out)) for piece in pieces if not is_there(piece.folder)]
            left = left if self._profile_of(one).exists() else ["profile", *left]
            total += len(pieces) + 1
            if left:
                missing[one.name] = left
        return Progress(total - sum(map(len, missing.values())), total, missing)

    def _open(
        self, one: Subject, missing: Sequence[_Piece], clock: _Clock, took: Took, *told: Callable[..., None]
    ) -> None:
        with clock.timing() as opening:
            opened = open_device(self.settings.device, self.settings.cpu_threads)
        with opened as device:
            with clock.timing() as loading:
                machine = Machine.prepare(one.load(), device, seed=self.settings.seed)
            took.keep(one.spec, load=opening.seconds + loading.seconds)
            self._measure(one, machine, missing, clock, took, *told)

    def _measure(
        self,
        one: Subject,
        machine: Machine,
        missing: Sequence[_Piece],
        clock: _Clock,
        took: Took,
        say: Callable[[str], None],
        advance: Callable[[], None],
    ) -> None:
        known = self._profile_of(one).exists()
        if not known and not clock.fits(took.estimate(one.spec, "calibrate")):
            return
        with clock.timing() as calibrating:
            profile = self._calibrated(one, machine, say)
        if not known:
            took.keep(one.spec, calibrate=calibrating.seconds)
        costs, learned = ProfileCosts(profile, one.spec), _learned(one)
        workloads = {True: constant_workload(machine), False: one_at_a_time(one.judged)}
        advance()
        for piece in missing:
            if not clock.fits(1.2 * took.estimate(one.spec, "run")):
                return
            with clock.timing() as running:
                say(f"{one.name}: {piece.preset.name} at {piece.cache}")
                workload = _labelled(workloads[piece.constant], piece.cache)
                (system, notes), budget = _fitted(piece.preset, one, learned), _budget(piece, one, learned)
                run = replay(machine, workload, system, budget, costs, calibration=learned)
                memory = _memory(one, workload, budget, system.scope, gpu=machine.device.torch_device.type == "cuda")
                about = {"costs": costs.name, "calibration_digest": learned_digest(learned), "memory": memory}
                run.info = run.info.model_copy(update={**about, "notes": [*notes, *run.info.notes]})
                run.save(piece.folder)
            took.keep(one.spec, run=running.seconds)
            advance()

    def _calibrated(self, one: Subject, machine: Machine, say: Callable[[str], None]) -> Profile:
        path = self._profile_of(one)
        if not path.exists():
            calibrate(
                machine,
                name=machine.hardware,
                repeats=self.settings.repeats,
                seed=self.settings.seed,
                progress=lambda text: say(f"calibrating {one.name}: {text}"),
            ).save(path)
        return Profile.load(path)

    def _keep_routing(self, one: Subject) -> None:
        for name, trace in (("trace", one.judged), ("calibration", one.learned)):
            path = self.out / one.name / f"{name}.safetensors"
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                save_trace(trace, path)

    def _pieces(self, one: Subject) -> list[_Piece]:
        """All runs: those of the constants first, then every repeat of every configuration in turn."""
        return [*self._constants(one), *self._judged(one)]

    def _constants(self, one: Subject) -> Iterator[_Piece]:
        slots = str(max(1, 3 * one.spec.experts // 8))
        for repeat in range(1, CONSTANT_REPEATS + 1):
            for chosen in self._presets:
                yield _Piece(self.out / one.name / CONSTANTS / chosen.name / f"r{repeat}", chosen, slots, True)

    def _judged(self, one: Subject) -> Iterator[_Piece]:
        for repeat in range(1, self.settings.repeats + 1):
            for chosen, cache in self._points():
                folder = self.out / one.name / RUNS / chosen.name / cache.replace("%", "pct") / f"r{repeat}"
                yield _Piece(folder, chosen, cache, False)

    def _points(self) -> list[tuple[Preset, str]]:
        return [(chosen, cache) for chosen in self._presets for cache in self.settings.caches]

    def _profile_of(self, one: Subject) -> Path:
        return self.out / one.name / PROFILE_FILE

    def _check(self, one: Subject) -> None:
        learned = _learned(one)
        for chosen, cache in self._points():
            if chosen.sim_only:
                raise InputError(f"systems must be ones that real models can run, got {chosen.name}, simulated only")
            parse_capacity(cache, layers=one.spec.moe_layers, experts=one.spec.experts, field="caches")
            check_needs(one.judged, _fitted(chosen, one, learned)[0], learned)


def constant_workload(machine: Machine) -> Workload:
    """Synthetic routing at the model's dimensions, from a seed that neither calibration nor judging uses."""
    return one_at_a_time(synthetic_routing(machine.loaded.spec, CONSTANT_SEED, **CONSTANT_SIZES))


@dataclass
class _Timing:
    """What a piece of work took."""

    seconds: float = 0.0


class _Clock:
    """Says what fits a time limit, with ``reserve_s`` set aside for what follows."""

    def __init__(self, limit_s: float | None, reserve_s: float, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._end_s = math.inf if limit_s is None else now_s() + limit_s - min(reserve_s, limit_s / 4)

    def left_s(self) -> float:
        """Seconds until the limit, without what is set aside."""
        return max(0.0, self._end_s - self._now_s())

    def fits(self, seconds: float) -> bool:
        """Whether work of that length ends in time."""
        return seconds < self.left_s()

    @contextmanager
    def timing(self) -> Iterator[_Timing]:
        """Measures what is done within."""
        found, begun_s = _Timing(), self._now_s()
        yield found
        found.seconds = self._now_s() - begun_s


def _learned(one: Subject) -> TraceCalibration | None:
    """What fitted systems learn from; None where numba is not installed, without which they have their stand-ins."""
    if find_spec("numba") is None:
        return None
    from sim.replay.calibration import TraceCalibration

    return TraceCalibration.of(one.learned, one.judged)


def _fitted(chosen: Preset, one: Subject, learned: TraceCalibration | None) -> tuple[SystemSpec, list[str]]:
    return chosen.fitted(calibrated=learned is not None, residuals=has_residuals(one.judged))


def _budget(piece: _Piece, one: Subject, learned: TraceCalibration | None) -> Budget:
    """The slots of a run: a share of each layer's experts, and the same bytes in one pool where a system has one."""
    spec = one.spec
    even = parse_capacity(piece.cache, layers=spec.moe_layers, experts=spec.experts)
    if piece.preset.system.scope == "global":
        even = even.model_copy(update={"slots": even.slots * spec.moe_layers})
    return piece.preset.budget(even, layers=spec.moe_layers, experts=spec.experts, calibration=learned)


def _memory(one: Subject, workload: Workload, budget: Budget, scope: str, *, gpu: bool) -> dict[str, int]:
    """The bytes that a run was planned to need on the device."""
    context, rows = (max(values) for values in zip(*((step.context, len(step.rows)) for step in workload), strict=True))
    workspace = workspace_bytes(one.spec, lanes=1, rows=rows, context=context, gpu=gpu)
    plan = MemoryPlan.of(one.spec, budget, scope=scope, lanes=1, context=context, workspace_bytes=workspace)
    return dict(plan.model_dump())


def _labelled(workload: Workload, cache: str) -> Workload:
    """The workload with the cache size as it was asked for, which a system's slots do not always tell."""
    return replace(workload, about={**workload.about, "cache": cache})

"""Measured against simulated: first the decisions, exactly; then the seconds, token by token and by component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis import metrics
from analysis.decisions import Decisions, compare_decisions
from analysis.frames import COMPONENTS, OVERLAPPED, fastest, requests_frame, step_frame, token_frame
from analysis.metrics import ErrorSummary, RunSummary
from sim.results import RunInfo, RunResult
from sim.systems import SystemSpec
from traces.errors import InputError
from traces.schema import Phase

SAME_FIELDS = ("model", "trace_digest", "capacity_slots", "capacity_bytes", "staging_slots")
"""Fields of RunInfo, beside the system, that must be equal before two runs are compared."""


@dataclass(frozen=True)
class ComponentError:
    """One component of a decode token's time: means over tokens in ms, and its share of the whole error.

    ``of_token`` is the signed difference over the mean measured latency of a token; over the critical-path components
    these add up to the difference of the mean latencies. ``critical`` is False for work that overlaps other work.
    """

    name: str
    label: str
    measured_ms: float
    simulated_ms: float
    difference_ms: float
    of_token: float
    critical: bool


@dataclass(frozen=True)
class Comparison:
    """The outcome of :func:`compare`.

    ``tokens`` has a row a decode token: step, sequence, measured_s (its fastest repeat), median_s (of the repeats; nan
    for one alone), simulated_s, error (signed, a share of measured).
    ``steps`` holds the step frames of both clocks; that of the measured one is the fastest of the repeats.
    """

    measured: RunInfo
    simulated: RunInfo
    decisions: Decisions
    tokens: pd.DataFrame
    steps: dict[str, pd.DataFrame]
    error: ErrorSummary
    prefill: ErrorSummary
    prefill_ms: tuple[float, float]
    components: tuple[ComponentError, ...]
    measured_summary: RunSummary
    simulated_summary: RunSummary
    repeats: int
    noise: float
    skill: float

    @property
    def label(self) -> str:
        """The system's name, or that of its policies."""
        return SystemSpec(**self.measured.system).label()

    def critical(self) -> tuple[ComponentError, ...]:
        """The components that add up to the latency of a token."""
        return tuple(part for part in self.components if part.critical)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form, without the rows of ``tokens`` and ``steps``; nan becomes None."""
        names = ("error", "prefill", "measured_summary", "simulated_summary")
        result = {
            "measured": self.measured.model_dump(mode="json"),
            "simulated": self.simulated.model_dump(mode="json"),
            "decisions": {"exact": self.decisions.exact, **asdict(self.decisions)},
            **{name: asdict(getattr(self, name)) for name in names},
            "prefill_ms": dict(zip(("measured", "simulated"), self.prefill_ms, strict=True)),
            "components": [asdict(part) for part in self.components],
            "repeats": self.repeats,
            "noise": self.noise,
            "skill": self.skill,
        }
        return dict(json_ready(result))


def compare(
    measured: RunResult,
    simulated: RunResult,
    *,
    repeats: Sequence[RunResult] = (),
    calibration_mean_s: float | None = None,
) -> Comparison:
    """Compares a measured run with a simulated one of the same trace, system and capacity.

    ``repeats`` are further measured runs of the same work: each step's point is then its fastest repeat, and the
    spread of the repeats gives the noise floor (``measured`` itself counts as one, and is not counted twice). Decisions
    that are promised to be equal are compared in every repeat.
    ``calibration_mean_s`` is the mean decode latency of the calibration runs, against which skill is measured.
    Raises InputError, naming the field and both values, when the runs do not belong together.
    """
    runs = [measured, *(run for run in repeats if run is not measured)]
    _check_sources(runs, simulated)
    for run in [*runs[1:], simulated]:
        check_same(measured, run)
    frames = [step_frame(run) for run in runs]
    steps = {"measured": fastest(frames), "simulated": step_frame(simulated)}
    tokens = {side: token_frame(measured, frame) for side, frame in steps.items()}
    ours, theirs = (tokens[side]["latency_s"].to_numpy(float) for side in ("measured", "simulated"))
    repeated = [token_frame(measured, frame)["latency_s"].to_numpy(float) for frame in frames]
    return Comparison(
        measured=measured.info,
        simulated=simulated.info,
        decisions=compare_decisions(measured, simulated, runs[1:]),
        tokens=_paired(tokens["measured"], ours, theirs, repeated),
        steps=steps,
        error=metrics.summarise_errors(ours, theirs),
        **_prefill(steps),
        components=_components(tokens["measured"], tokens["simulated"]),
        measured_summary=_summary(measured, steps["measured"]),
        simulated_summary=_summary(simulated, steps["simulated"]),
        repeats=len(runs),
        noise=metrics.noise_floor(repeated),
        skill=math.nan if calibration_mean_s is None else metrics.skill(ours, theirs, calibration_mean_s),
    )


def _check_sources(measured: Sequence[RunResult], simulated: RunResult) -> None:
    for run in measured:
        if run.info.source != "measured":
            raise InputError(f"source of the measured run must be 'measured', got {run.info.source!r}")
    if simulated.info.source != "simulated":
        raise InputError(f"source of the simulated run must be 'simulated', got {simulated.info.source!r}")


def check_same(first: RunResult, second: RunResult) -> None:
    """Raises InputError unless both runs did the same work: model, trace, capacity, system, and the same tokens."""
    for name in SAME_FIELDS:
        _check_equal(name, first, second, getattr(first.info, name), getattr(second.info, name))
    _check_system("system", first, second, first.info.system, second.info.system)
    keys = ["step", "phase", "sequence", "tokens"]
    ours, theirs = (run.tokens[keys].reset_index(drop=True) for run in (first, second))
    _check_equal("rows of tokens", first, second, len(ours), len(theirs))
    wrong = np.flatnonzero((ours != theirs).any(axis=1).to_numpy(bool))
    if wrong.size:
        place = int(wrong[0])
        values = [", ".join(f"{key} {table.at[place, key]}" for key in keys) for table in (ours, theirs)]
        _check_equal(f"row {place} of tokens", first, second, *values)
    if not (ours["phase"] == Phase.DECODE).any():
        raise InputError("tokens must have decode rows, got none")


def _check_system(name: str, first: RunResult, second: RunResult, ours: Any, theirs: Any) -> None:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}, key=str):
            _check_system(f"{name}.{key}", first, second, ours.get(key, "absent"), theirs.get(key, "absent"))
        return
    plain = [list(value) if isinstance(value, tuple) else value for value in (ours, theirs)]
    _check_equal(name, first, second, *plain)


def _check_equal(name: str, first: RunResult, second: RunResult, ours: Any, theirs: Any) -> None:
    if ours != theirs:
        sides = ("the first", "the second") if first.info.source == second.info.source else ("measured", "simulated")
        raise InputError(f"{name} must be equal in both runs, got {ours} ({sides[0]}) and {theirs} ({sides[1]})")


def _paired(
    keys: pd.DataFrame, measured: metrics.Floats, simulated: metrics.Floats, repeated: Sequence[metrics.Floats]
) -> pd.DataFrame:
    frame = keys[["step", "sequence"]].copy()
    frame["measured_s"] = measured
    frame["median_s"] = np.median(repeated, axis=0) if len(repeated) > 1 else math.nan
    frame["simulated_s"] = simulated
    frame["error"] = metrics.signed_errors(measured, simulated)
    return frame


def _prefill(steps: dict[str, pd.DataFrame]) -> dict[str, Any]:
    rows = [steps[side][steps[side]["phase"] == Phase.PREFILL]["latency_s"] for side in ("measured", "simulated")]
    means = [float(row.mean() * 1e3) if len(row) else math.nan for row in rows]
    return {"prefill": metrics.summarise_errors(*rows), "prefill_ms": (means[0], means[1])}


def _components(measured: pd.DataFrame, simulated: pd.DataFrame) -> tuple[ComponentError, ...]:
    token_ms = float(measured["latency_s"].mean() * 1e3)
    parts = []
    for name, label in {**COMPONENTS, **OVERLAPPED}.items():
        ours, theirs = (float(frame[name].mean() * 1e3) for frame in (measured, simulated))
        share = metrics.ratio(theirs - ours, token_ms)
        parts.append(ComponentError(name, label, ours, theirs, theirs - ours, share, name in COMPONENTS))
    return tuple(parts)


def _summary(run: RunResult, steps: pd.DataFrame) -> RunSummary:
    return metrics.summarise_run(steps, requests_frame(run), run.events)


def json_ready(value: Any) -> Any:
    """Plain numbers, text, lists and objects; nan and infinities become None."""
    if isinstance(value, Mapping):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value

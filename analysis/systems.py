"""Several systems on the same work, side by side: one record each, with intervals, differences and regret.

Every figure is defined in ``docs/metrics.md``. Systems are compared under one budget; what stands outside it (the
ceiling that holds every expert, who knows the future), and who computes something else than the model, is marked, and
competes with nobody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.files import write_figure
from analysis.frames import step_frame
from analysis.metrics import busy_within, ratio, waits
from analysis.systems_table import systems_table, verdicts
from analysis.uncertainty import Resampled, caveat
from sim.bounds import Bounds, regret_of
from sim.busy import busy_s
from sim.costs import Costs
from sim.groups import decode_by_group
from sim.presets import CEILING, SYSTEM, Preset
from sim.results import RunResult
from traces.errors import InputError
from traces.schema import Phase

__all__ = ["Entry", "side_by_side", "systems_plot", "systems_table", "verdicts"]

COMPONENTS = ("dense", "GPU experts", "CPU wait", "transfer wait", "host", "head", "other")
"""Parts of a decode token's mean time, in the order in which they are drawn; they add up to it."""


@dataclass(frozen=True, eq=False)
class Entry:
    """One system's run, the costs that it ran at, and the bounds of its budget."""

    preset: Preset
    run: RunResult
    costs: Costs
    bounds: Bounds | None = None

    @property
    def name(self) -> str:
        """What the system is called."""
        return self.preset.name or self.preset.system.label()


def side_by_side(entries: Sequence[Entry], *, seed: int = 0) -> list[dict[str, Any]]:
    """One record a system, in the order given, ready for JSON; None stands where nothing was observed.

    ``seed`` draws the resamples of the intervals. Raises :class:`InputError` unless all ran the same passes, and those
    that use all of their slots as a cache have the same bytes of GPU memory.
    """
    _check_same_work(entries)
    records = [_record(entry) for entry in entries]
    _check_equal_memory(entries, records)
    _compare(entries, records, np.random.default_rng(seed))
    return [{key: _plain(value) for key, value in record.items()} for record in records]


def systems_plot(records: Sequence[dict[str, Any]], path: Path, title: str = "") -> None:
    """Writes the figure of :func:`analysis.plots_systems.plot`, as PNG or SVG by the ending of ``path``."""
    from analysis.plots_systems import plot

    write_figure(plot(records, title), path)


def _check_same_work(entries: Sequence[Entry]) -> None:
    if not entries:
        raise InputError("systems must be at least one, got none")
    first = entries[0]
    for entry in entries:
        for field, wanted in _work(first.run).items():
            got = _work(entry.run)[field]
            if wanted != got:
                raise InputError(
                    f"systems must have run the same {field}, got {wanted} for {first.name} and {got} for {entry.name}"
                )


def _work(run: RunResult) -> dict[str, Any]:
    """What has to be equal; how many passes it takes may depend on the system where requests arrive over time."""
    info = run.info
    workload = {key: value for key, value in info.workload.items() if not key.endswith("_steps")}
    return {"trace": info.trace_digest, "workload": workload, "hardware": info.hardware, "costs": info.costs}


def _check_equal_memory(entries: Sequence[Entry], records: Sequence[dict[str, Any]]) -> None:
    """Equal bytes for all that fill their budget; who does not may have less, but never more."""
    limited = [pair for pair in zip(entries, records, strict=True) if pair[0].preset.role != CEILING]
    filled = [pair for pair in limited if pair[0].preset.system.holds == "cache"]
    for some, equal in ((filled, True), (limited, False)):
        if not filled:
            return
        most = filled[0][1]["gpu_bytes"]
        for entry, record in some:
            if record["gpu_bytes"] > most or (equal and record["gpu_bytes"] != most):
                raise InputError(
                    f"GPU memory must be equal for all systems, got {most} bytes for {filled[0][0].name} and "
                    f"{record['gpu_bytes']} for {entry.name}"
                )


def _record(entry: Entry) -> dict[str, Any]:
    run, info = entry.run, entry.run.info
    steps = step_frame(run)
    decode = steps[steps["phase"] == Phase.DECODE]
    seconds, tokens = float(decode["latency_s"].sum()), int(decode["tokens"].sum())
    busy = _busy(entry, decode)
    known = {name: share for name, share in busy.items() if share is not None}
    figures = run.headline()
    copied, written = _moved(run, decode)
    return {
        "system": entry.name,
        "role": entry.preset.role,
        "summary": entry.preset.summary,
        **{name: getattr(info, name) for name in ("source", "model", "hardware", "costs", "synthetic")},
        "token_s": ratio(seconds, tokens),
        **figures,
        "bytes_per_token": ratio(copied, tokens),
        "written_back_bytes_per_token": ratio(written, tokens),
        "busy": busy,
        "binding": max(known, key=known.__getitem__) if known and len(known) == len(busy) else None,
        "components_s": {name: ratio(part, tokens) for name, part in _components(run, decode).items()},
        "resident_experts": info.capacity_slots,
        "gpu_bytes": _gpu_bytes(run),
        "fills_budget": entry.preset.system.holds == "cache",
        **regret_of(run, entry.bounds),
        "bound_by": None if entry.bounds is None else entry.bounds.decode.binding,
        "bound_with_dense_on_cpu": None if entry.bounds is None else entry.bounds.dense_follows,
        "bound_with_deferral": None if entry.bounds is None else entry.preset.system.deferral > 0,
    }


def _gpu_bytes(run: RunResult) -> int:
    """All that the plan of the GPU's memory holds; without a plan, the experts and the staging slots."""
    info = run.info
    if info.memory:
        return sum(size for name, size in info.memory.items() if name.endswith("_bytes"))
    return info.capacity_bytes + info.staging_slots * info.bytes_of_expert


def _moved(run: RunResult, decode: pd.DataFrame) -> tuple[float, float]:
    """Bytes to and from the device that decode steps asked for; nan where the operations were not kept."""
    if run.operations.empty:
        return math.nan, math.nan
    rows = run.operations[run.operations["step"].isin(decode["step"])]
    sums = rows.groupby("op")["bytes"].sum()
    return float(sums.get("copy", 0)), float(sums.get("evict", 0))


def _busy(entry: Entry, decode: pd.DataFrame) -> dict[str, float | None]:
    """Share of the decode time in which each resource worked; None where it was not recorded."""
    run = entry.run
    seconds = float(decode["latency_s"].sum())
    if not seconds:
        return {}
    host = float(decode["host_s"].sum()) / seconds
    if not run.events.empty:
        spans = decode[["start_s", "end_s"]].to_numpy(float)
        return {"gpu": 0.0, "cpu": 0.0, "link": 0.0, **busy_within(run.events, spans), "host": host}
    layers = run.layers[run.layers["phase"] == Phase.DECODE]
    worked_s = busy_s(run, layers, run.tokens[run.tokens["phase"] == Phase.DECODE], entry.costs)
    return {**{name: None if s is None else s / seconds for name, s in worked_s.items()}, "host": host}


def _components(run: RunResult, decode: pd.DataFrame) -> dict[str, float]:
    """Seconds of :data:`COMPONENTS` over all decode steps."""
    layers = run.layers[run.layers["phase"] == Phase.DECODE]
    cpu_s, transfer_s = (float(wait.sum()) for wait in waits(layers))
    sums = decode[["dense_s", "gpu_experts_s", "host_s", "head_s", "other_s"]].sum()
    parts = (sums["dense_s"], sums["gpu_experts_s"], cpu_s, transfer_s, sums["host_s"], sums["head_s"], sums["other_s"])
    return {name: float(part) for name, part in zip(COMPONENTS, parts, strict=True)}


def _compare(entries: Sequence[Entry], records: Sequence[dict[str, Any]], rng: np.random.Generator) -> None:
    """Adds intervals over sequences to the records, and paired differences to the best system."""
    seconds, tokens = decode_by_group([entry.run for entry in entries])
    found = Resampled.of(seconds, tokens, rng=rng)
    fair = [place for place, entry in enumerate(entries) if entry.preset.role == SYSTEM]
    decoded = [place for place in fair if records[place]["decode_tokens"]]
    best = min(decoded, key=lambda place: records[place]["token_s"], default=None)
    for place, record in enumerate(records):
        own = found.interval(place)
        beyond = None if best is None or place == best else found.difference(place, best)
        alike = None if best is None else place == best or found.alike(place, best)
        record |= {
            "token_low_s": None if own is None else own.low,
            "token_high_s": None if own is None else own.high,
            "best": place == best,
            "behind_best_low_s": None if beyond is None else beyond.low,
            "behind_best_high_s": None if beyond is None else beyond.high,
            "not_distinguishable_from_best": alike if place in fair else None,
            "groups": found.sequences,
            "caveat": caveat(found.sequences),
        }


def _plain(value: Any) -> Any:
    """``value`` as JSON has it: nan becomes None."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value

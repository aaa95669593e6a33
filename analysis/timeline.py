"""Runs as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open: a process a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.files import write_text
from analysis.overlay import RESOURCES
from sim.results import RunResult
from traces.schema import Phase

STEPS, LAYERS = "steps", "layers"
_MICROSECONDS = 1e6


def to_perfetto(runs: Sequence[RunResult]) -> dict[str, Any]:
    """The runs in the JSON form of the Trace Event Format (complete events, "ph": "X", times in microseconds).

    Each run is a process, named after its clock and system. Its threads are the steps, the layers, and one for each
    resource; work that overlaps on one resource gets further threads, since a thread's slices may not overlap.
    """
    events: list[dict[str, Any]] = []
    for pid, run in enumerate(runs, start=1):
        events.extend(_process(run, pid))
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_perfetto(path: Path, runs: Sequence[RunResult], *, force: bool = False) -> Path:
    """Writes :func:`to_perfetto` as a file, complete or not at all; an existing file needs ``force``."""
    return write_text(path, json.dumps(to_perfetto(runs), allow_nan=False), force=force)


def cut(run: RunResult, steps: range) -> RunResult:
    """The rows of ``run`` that belong to ``steps``; a prefetch belongs to the pass that asked for it."""
    tables = {
        name: table[(table["step"] >= steps.start) & (table["step"] < steps.stop)]
        for name in ("tokens", "layers", "events", "operations")
        for table in (getattr(run, name),)
    }
    return replace(run, **tables)


def system_name(system: Mapping[str, Any]) -> str:
    """A system in few words: its name, or such as ``lru + fetch + next-router``."""
    if system.get("name"):
        return str(system["name"])
    policies = [system.get(kind, "none") for kind in ("evict", "place", "prefetch")]
    named = [str(policy).rpartition(":")[2] for policy in policies if policy != "none"]
    return " + ".join(named) or "default system"


def _process(run: RunResult, pid: int) -> Iterator[dict[str, Any]]:
    name = f"{run.info.source}: {system_name(run.info.system)}, {run.info.model} on {run.info.hardware}"
    yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "args": {"sort_index": pid}}
    tid = 0
    for title, slices in _threads(run):
        for lane, members in enumerate(_lanes(slices)):
            tid += 1
            label = title if not lane else f"{title} {lane + 1}"
            yield {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": label}}
            yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
            yield from ({**entry, "pid": pid, "tid": tid} for entry in members)


def _threads(run: RunResult) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    steps = run.tokens.drop_duplicates("step")
    yield STEPS, [_slice(f"{Phase(int(row.phase)).name.lower()} {row.step}", STEPS, row) for row in _rows(steps)]
    yield LAYERS, [_slice(f"layer {row.layer}", LAYERS, row) for row in _rows(run.layers)]
    found = {str(name) for name in run.events["resource"]}
    for resource in [*(name for name in RESOURCES if name in found), *sorted(found - set(RESOURCES))]:
        rows = _rows(run.events[run.events["resource"] == resource])
        yield resource, [_slice(_event_name(row), str(row.kind), row) for row in rows]


def _rows(table: pd.DataFrame) -> Iterator[Any]:
    return iter(table.sort_values("start_s", kind="stable").itertuples(index=False))


def _event_name(row: Any) -> str:
    return str(row.kind) if row.expert < 0 else f"{row.kind} {row.expert}"


def _slice(name: str, category: str, row: Any) -> dict[str, Any]:
    keys = ("step", "layer", "expert", "sequence", "tokens", "misses", "bytes")
    start, end = float(row.start_s) * _MICROSECONDS, float(row.end_s) * _MICROSECONDS
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "ts": round(start, 3),
        "dur": round(max(end - start, 0.0), 3),
        "args": {key: int(getattr(row, key)) for key in keys if hasattr(row, key)},
    }


def _lanes(slices: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Deals slices, ascending by start, to the first lane that is free; rounding to 1 ns is allowed for."""
    lanes: list[list[dict[str, Any]]] = []
    for entry in slices:
        for lane in lanes:
            if entry["ts"] >= lane[-1]["ts"] + lane[-1]["dur"] - 0.002:
                lane.append(entry)
                break
        else:
            lanes.append([entry])
    return lanes

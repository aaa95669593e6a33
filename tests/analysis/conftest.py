"""Two small runs of the same work, with numbers that can be added up by hand.

Two layers of four experts, top 2; one sequence: a prefill of three tokens, then three decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.results import RunInfo, RunResult
from tests.analysis.caching import OWN, SIZES, golden
from traces import store
from traces.schema import Trace, TraceHeader
from traces.synthetic import Sizes, generate

MEASURED_MS = [(0, 3, 20, 4, 8, 1, 5), (1, 1, 10, 2, 4, 1, 2), (1, 1, 12, 2, 4, 1, 3.5), (1, 1, 8, 2, 4, 1, 0)]
SIMULATED_MS = [(0, 3, 22, 4, 8, 1, 8), (1, 1, 11, 2, 4, 1, 3), (1, 1, 12, 2, 4, 1, 4), (1, 1, 6, 2, 2, 1, 0)]
"""A step a row: phase, tokens, latency, dense, GPU experts, host, stall. The stall is layer 0's; the head takes 1."""

COUNTS = [
    [(6, 3, 0, 0, 0, 3, 0, 300), (6, 4, 0, 0, 0, 4, 0, 400)],
    [(2, 2, 1, 1, 0, 1, 0, 100), (2, 2, 2, 2, 0, 0, 0, 0)],
    [(2, 2, 1, 1, 1, 0, 0, 0), (2, 2, 0, 0, 0, 2, 1, 100)],
    [(2, 2, 2, 2, 0, 0, 0, 0), (2, 2, 2, 2, 0, 0, 0, 0)],
]
"""By step and layer: assignments, union, hits by union and by assignment, late hits, misses, CPU experts, bytes."""

INFO: dict[str, Any] = {
    "model": "tiny-moe",
    "hardware": "bench",
    "system": {"evict": "lru", "prefetch": "none", "place": "fetch", "scope": "layer", "synchronous": True},
    "capacity_slots": 4,
    "capacity_bytes": 400,
    "staging_slots": 2,
    "trace_digest": "d1",
    "workload": {"batch": 1},
    "software": {"simpy": "4.1"},
}


def build(source: str, steps_ms: list[tuple[float, ...]], **info: Any) -> RunResult:
    tables: dict[str, list[tuple[Any, ...]]] = {"tokens": [], "layers": [], "events": [], "operations": []}
    now = 0.0
    for step, (phase, tokens, *times) in enumerate(steps_ms):
        latency, dense, experts, host, stall = (value / 1e3 for value in times)
        tables["tokens"].append((step, phase, 0, tokens, now, now + latency, 1e-3))
        begin = now
        for layer, counts in enumerate(COUNTS[step]):
            wait = stall if layer == 0 else 0.0
            end = begin + (dense + experts + host) / 2 + wait
            copy = wait / 2
            times_s = (dense / 2, experts / 2, 0.0, copy, host / 2, wait, host / 2)
            tables["layers"].append((step, layer, phase, *counts, begin, end, *times_s))
            after = begin + (dense + host) / 2
            tables["events"] += [
                ("gpu", "dense", step, layer, -1, begin, begin + dense / 2),
                ("host", "plan", step, layer, -1, begin + dense / 2, after),
                ("gpu", "expert", step, layer, 1, after + wait, end),
            ]
            if copy:
                tables["events"].append(("link", "copy", step, layer, 1, after, after + copy))
                tables["operations"].append((len(tables["operations"]), step, layer, "copy", 1, 2 * layer, 0, 100))
            tables["operations"].append((len(tables["operations"]), step, layer, "gpu", 1, 2 * layer, tokens, 0))
            begin = end
        now += latency
    first_s = steps_ms[0][2] / 1e3
    tables["requests"] = [(0, 0.0, 0.0, first_s, now, 3, 4)]
    return RunResult.of(RunInfo(source=source, **{**INFO, **info}), **tables)


@pytest.fixture
def make_run() -> Callable[..., RunResult]:
    """Builds a run from its source ("measured" or "simulated"); ``steps_ms`` and fields of RunInfo may be replaced."""

    def make(source: str, *, steps_ms: list[tuple[float, ...]] | None = None, **info: Any) -> RunResult:
        return build(source, steps_ms or (MEASURED_MS if source == "measured" else SIMULATED_MS), **info)

    return make


@pytest.fixture
def measured(make_run: Callable[..., RunResult]) -> RunResult:
    return make_run("measured")


@pytest.fixture
def simulated(make_run: Callable[..., RunResult]) -> RunResult:
    return make_run("simulated")


@pytest.fixture
def slower(make_run: Callable[..., RunResult]) -> RunResult:
    """A repeat of the measured run, 10% slower in every latency."""
    steps = [(*row[:2], row[2] * 1.1, *row[3:]) for row in MEASURED_MS]
    return make_run("measured", steps_ms=steps)


@pytest.fixture
def trace() -> Trace:
    """Three prefill and three decode tokens; in both layers expert 0 has half of the load, expert 3 none."""
    header = TraceHeader(model="tiny-moe", layers=2, experts=4, top_k=2, expert_bytes=(100, 100))
    one_layer = [(0, 1), (0, 2), (0, 1), (0, 2), (0, 1), (0, 2)]
    return Trace.of(
        header,
        expert_ids=np.array([[pair, pair] for pair in one_layer]),
        token_ids=np.arange(6),
        sequence=np.zeros(6),
        position=np.arange(6),
        step=np.array([0, 0, 0, 1, 2, 3]),
        phase=np.array([0, 0, 0, 1, 1, 1]),
    )


@pytest.fixture
def folders(tmp_path: Path, measured: RunResult, simulated: RunResult) -> tuple[Path, Path]:
    """Both runs as result folders."""
    return measured.save(tmp_path / "measured"), simulated.save(tmp_path / "simulated")


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder with two traces, and policies of a user's own."""
    monkeypatch.chdir(tmp_path)
    store.save(golden(), "golden.safetensors")
    store.save(generate("zipf", 1, SIZES), "t.safetensors")
    Path("own.py").write_text(OWN)


@pytest.fixture
def other_traces(cache_folder: None) -> None:
    """Traces that lack what some policies need, or have too much."""
    store.save(generate("zipf", 2, SIZES), "other.safetensors")
    store.save(generate("zipf", 1, replace(SIZES, scores=True)), "scored.safetensors")
    bare = generate("zipf", 1, SIZES)
    store.save(Trace.of(bare.header, **{n: a for n, a in bare.arrays() if n != "gates"}), "bare.safetensors")
    small = Sizes(sequences=2, prompt_tokens=0, new_tokens=4, layers=3, experts=8, top_k=2)
    store.save(generate("zipf", 1, small), "small.safetensors")

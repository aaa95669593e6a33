"""The main job from end to end, and the benchmarks, as a user starts them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.replay_memory import line_of
from benchmarks.simpy_floor import shown
from sim.results import RunResult
from traces.store import load

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def python(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )


def test_the_demo_runs_on_both_clocks_and_writes_its_report(tmp_path: Path) -> None:
    outcome = python("-m", "moetwin", "demo", "--device", "cpu", "--repeats", "2", "--out", "demo", folder=tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert "Both clocks decided the same" in outcome.stdout
    assert "no GPU was found or asked for" in outcome.stdout
    demo = tmp_path / "demo"
    assert "<svg" in (demo / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in demo.iterdir()} == {
        "measured", "profile.toml", "report.html", "report.md", "simulated", "timeline.perfetto.json",
        "trace.safetensors",
    }  # fmt: skip
    measured, simulated = (RunResult.load(demo / name) for name in ("measured", "simulated"))
    assert measured.info.trace_digest == simulated.info.trace_digest == load(demo / "trace.safetensors").digest
    assert measured.operations.equals(simulated.operations)
    again = python("-m", "moetwin", "demo", "--out", "demo", folder=tmp_path)
    assert again.returncode == 2
    assert again.stderr.strip().startswith("error: out must be")


def test_the_floor_benchmark_prints_engine_and_skeleton(tmp_path: Path) -> None:
    out = tmp_path / "floor.json"
    outcome = python("-m", "benchmarks.simpy_floor", "--repeats", "1", "--out", str(out))
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.splitlines() == shown(json.loads(out.read_text(encoding="utf-8")))
    assert [line.split("  ")[0].strip() for line in outcome.stdout.splitlines()] == [
        "engine", "engine, by events", "skeleton", "hybrimoe, impact",
    ]  # fmt: skip


def test_memory_of_a_replay_grows_by_a_tenth_of_a_gibibyte_for_ten_million_accesses(tmp_path: Path) -> None:
    """The bar, 1 GiB above the mapped file for a hundred million, scaled down: what two lengths differ in."""

    def rows(tokens: int) -> list[dict[str, Any]]:
        out = tmp_path / f"{tokens}.json"
        words = ("-m", "benchmarks.replay_memory", "--tokens", str(tokens), "--out", str(out))
        outcome = python(*words)
        assert outcome.returncode == 0, outcome.stderr
        found: list[dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["policies"]
        assert outcome.stdout.splitlines() == [line_of(row) for row in found]
        return found

    for short, long in zip(rows(20_000), rows(220_000), strict=True):
        assert long["assignments"] - short["assignments"] == 200_000 * 48
        grown_bytes = long["above_mapped_bytes"] - short["above_mapped_bytes"]
        assert grown_bytes <= (1 << 30) / 1e8 * 200_000 * 48, long["policy"]

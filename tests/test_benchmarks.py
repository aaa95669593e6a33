"""What the benchmarks of replay print and keep, with a rival that is no rival."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from benchmarks import evidence, replay_speed


class Rival:
    """As much of libCacheSim as the benchmark asks for: it misses every second access."""

    def __init__(self, slots: int) -> None:
        assert slots == replay_speed.SLOTS

    def process_trace(self, reader: Path) -> tuple[float, float]:
        assert Path(reader).stat().st_size == 50 * replay_speed.ORACLE_GENERAL.itemsize
        return 0.5, 0.5


@pytest.fixture(autouse=True)
def _rival(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(
        LRU=Rival,
        Belady=Rival,
        TraceReader=lambda path, kind: path,
        TraceType=SimpleNamespace(ORACLE_GENERAL_TRACE=0),
    )
    monkeypatch.setattr(replay_speed, "their_package", lambda: package)
    monkeypatch.setattr(evidence, "version", lambda name: f"version of {name}")


def run(*words: str) -> Result:
    app = typer.Typer()
    app.command()(replay_speed.main)
    return CliRunner().invoke(app, ["--accesses", "50", "--repeats", "1", "--policies", "lru,belady", *words])


def test_the_figures_that_are_kept_are_those_that_are_printed(tmp_path: Path) -> None:
    out = tmp_path / "kept" / "speed.json"
    result = run("--out", str(out))
    assert result.exit_code == 0, result.output
    kept: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    assert result.stdout.splitlines() == [replay_speed.line_of(row) for row in kept["policies"]]
    assert [row["policy"] for row in kept["policies"]] == ["lru", "belady"]
    assert {row["their_misses"] for row in kept["policies"]} == {25}
    assert (kept["accesses"], kept["repeats"]) == (50, 1)
    assert kept["machine"]["libcachesim"] == "version of libcachesim"
    assert kept["machine"]["processor"]
    assert kept["date"]


def test_figures_are_not_replaced_unasked(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    out.write_text("mine", encoding="utf-8")
    result = run("--out", str(out))
    assert "out must be a new file" in str(result.exception)
    assert out.read_text(encoding="utf-8") == "mine"
    assert run("--out", str(out), "--force").exit_code == 0
    assert json.loads(out.read_text(encoding="utf-8"))["policies"]

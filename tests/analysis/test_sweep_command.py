"""``moetwin sweep`` as a user has it: the lines that are shown, mistakes in one line, and the examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from sim.sweep.grid import Grid
from sim.sweep.point import prepared_of
from sim.sweep.run import Sweep
from tests.commanding import refused, run
from tests.sim.sweeping import COUNTING, write_trace

ROOT = Path(__file__).resolve().parents[2]
GRID = """
[base]
trace = "t.safetensors"
model = "moetwin-small"

[axes]
cache = ["25%", "1%"]
"hardware.link_gb_per_s" = [4, 16]
"""


@pytest.fixture(autouse=True)
def _folder(own_folder: None, tmp_path: Path) -> None:
    write_trace(tmp_path)
    Path("g.toml").write_text(GRID)


def test_a_grid_is_run_told_and_plotted() -> None:
    done = run("sweep", "g.toml", "--jobs", "1", "--out", "s")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "4 points: 2 ok, 2 refused",
        "2 x cache must be between 1 and 32 slots, got 1% which is 0",
        "GPU memory of what is compared: 16.3 MB",
        "2 of 4 points: on synthetic routing",
        "out: s/sweep.parquet",
    ]
    assert done.stderr == ""
    again = run("sweep", "run", "g.toml", "--jobs", "1", "--out", "s", "--resume", "--json")
    assert again.stderr == "note: 4 runs are known, 0 are left\n"
    rows = [json.loads(line) for line in again.stdout.splitlines()]
    table = pd.read_parquet("s/sweep.parquet")
    assert [row["tokens_per_s"] for row in rows[:2]] == pytest.approx(table.tokens_per_s[:2].tolist(), rel=1e-12)
    assert (rows[2]["status"], rows[2]["tokens_per_s"]) == ("refused", None)
    drawn = run("sweep", "plot", "s", "--out", "s.png")
    assert drawn.exit_code == 0, drawn.output
    assert "left out: 2 points that did not run" in drawn.stdout.splitlines()
    assert drawn.stdout.splitlines()[-1] == "out: s.png"
    assert Path("s.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_end_keeps_what_is_done_and_leaves_no_process() -> None:
    Path("own.py").write_text(COUNTING)
    slow = '"system.evict" = "own.py:Counting"\n"system.options.evict.pause_s" = 0.3\n'
    Path("slow.toml").write_text(GRID.replace("\n[axes]", slow + "\n[axes]\nseed = [1, 2, 3, 4, 5, 6]"))
    words = [sys.executable, "-m", "moetwin", "sweep", "slow.toml", "--jobs", "2", "--out", "s"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while len([*Path("s").glob("points/*.json")]) < 3:
        assert process.poll() is None, "it ended before it could be asked to"
        time.sleep(0.005)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert (process.returncode, told.splitlines()[-1]) == (130, "error: interrupted")
    assert 2 <= len(pd.read_parquet("s/sweep.parquet")) < 24
    for _ in range(600):
        if is_gone(process.pid):
            return
        time.sleep(0.05)
    pytest.fail("a process of the sweep lives on")


def is_gone(group: int) -> bool:
    """Whether no process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("sweep grid --out s", "error: grid or command must be a known name, got 'grid' (one of plot, run)"),
        ("sweep none.toml --out s", "error: grid file must be readable, got none.toml (No such file or directory)"),
        ("sweep g.toml", "error: out must be given, got nothing"),
        ("sweep g.toml --out afile", "error: out must be a folder that can be written, got afile: it is a file"),
        ("sweep g.toml --out .", "error: out must be a new folder (or give --resume to go on with its sweep), got ."),
        ("sweep g.toml --out s --backend dusk", "error: backend must be a known name, got 'dusk' (did you mean dask?)"),
        ("sweep g.toml --out s --scheduler x", "error: scheduler must come with the backend dask, got x"),
        ("sweep bad.toml --out s", "error: bad.toml: field must be a known name, got 'cach' (did you mean cache"),
        ("sweep empty.toml --out s", "error: empty.toml: cache must have at least one value as an axis, got none"),
        ("sweep plot .", "error: out must be a folder of a sweep, with sweep.toml, got .: none"),
        ("sweep plot . --out x.pdf", "error: out must end in one of .png, .svg, got x.pdf"),
    ],
)
def test_mistakes_are_one_line(words: str, line: str) -> None:
    Path("bad.toml").write_text(GRID.replace("cache", "cach"))
    Path("empty.toml").write_text(GRID.replace('["25%", "1%"]', "[]"))
    assert refused(*words.split()).startswith(line)
    assert not Path("s").exists()


def test_a_failure_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scenario: object) -> None:
        raise ZeroDivisionError("no way")

    monkeypatch.setattr("sim.sweep.point.prepared_of", broken)
    done = run("sweep", "g.toml", "--jobs", "1", "--out", "s")
    assert done.exit_code == 1
    assert done.stdout.startswith("4 points: 4 failed\n4 x ZeroDivisionError: no way (test_sweep_command.py, line ")


def test_help_shows_the_commands_and_the_options_of_a_run() -> None:
    text = run("sweep", "--help").stdout
    for word in ("plot", "--jobs", "--resume", "--scheduler", "system.options.prefetch.depth"):
        assert word in text


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.toml")))
def test_every_point_of_an_example_can_run(name: str) -> None:
    path = ROOT / "examples" / name
    if "[axes]" not in path.read_text(encoding="utf-8"):
        pytest.skip("no grid")
    sweep = Sweep.of(Grid.load(path))
    assert len(set(sweep.keys)) == len(sweep.keys) <= 30
    assert all(prepared_of(scenario).plan for scenario in sweep.scenarios)

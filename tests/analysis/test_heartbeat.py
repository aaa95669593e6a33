"""Lines about how far some work is, where nobody watches a bar."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import heartbeat
from analysis.heartbeat import Heartbeat
from tests.commanding import run
from tests.sim.sweeping import write_trace


def test_a_line_comes_now_and_then() -> None:
    now, told = [100.0], list[str]()
    beat = Heartbeat("points", told.append, clock=lambda: now[0])
    for seconds, count in ((1, 1), (29, 2), (31, 3), (60, 4), (62, 5)):
        now[0] = 100.0 + seconds
        beat.done(count, 1200 if count < 5 else None)
    assert told == ["points: 3 of 1,200 after 31 s", "points: 5 after 62 s"]


def test_work_that_is_not_watched_says_how_far_it_is(
    own_folder: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_trace(tmp_path)
    words = '[base]\ntrace = "t.safetensors"\nmodel = "moetwin-small"\n[axes]\nseed = [1, 2]\n'
    (tmp_path / "g.toml").write_text(words)
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.0)
    swept = run("sweep", "g.toml", "--jobs", "1", "--out", "s")
    assert [line.partition(" after")[0] for line in swept.stderr.splitlines()] == ["points: 1 of 2", "points: 2 of 2"]
    done = run("simulate", "mixed", "--cache", "25%")
    assert "forward passes: 64 of " in done.stderr

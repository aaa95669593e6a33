"""Where points run: processes that die, and Dask, on a cluster of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.sweep import backends
from sim.sweep.backends import backend_of
from tests.sim.sweeping import LINKS, Seen, grid, untimed, write_trace
from traces.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

MURDEROUS = """
import os
from sim.policies.base import EvictionPolicy


class Murderous(EvictionPolicy):
    def begin_sequence(self):
        if os.getpid() != {keep}:
            os._exit(9)

    def key(self, block):
        return block
"""


@pytest.fixture(autouse=True)
def _trace(tmp_path: Path) -> None:
    write_trace(tmp_path)


def test_a_process_that_is_killed_ends_the_sweep_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(MURDEROUS.format(keep=os.getpid()))
    wanted = grid(tmp_path, {"seed": [1, 2]}, system__evict="own.py:Murderous")
    with pytest.raises(InputError, match="jobs must leave memory for each process, got 2"):
        Seen().sweep(wanted, tmp_path / "out", jobs=2)
    assert len(pd.read_parquet(tmp_path / "out" / "sweep.parquet")) == 0
    assert len(Seen().sweep(wanted, tmp_path / "out", resume=True)) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "dusk"}, r"backend must be a known name, got 'dusk' \(did you mean dask\?\)"),
        ({"name": "processes", "scheduler": "tcp://x:1"}, "scheduler must come with the backend dask, got tcp://x:1"),
    ],
)
def test_backends_that_there_are_not(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words), backend_of(jobs=1, **settings):
        pass


def test_dask_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match=r"without the extra moetwin\[cluster\]"), backend_of("dask", jobs=1):
        pass


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # its own housekeeping is not ours to judge
def test_dask_gives_what_one_process_gives(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra moetwin[cluster]")
    wanted = grid(tmp_path, {"cache": ["1%", "25%"], **LINKS})
    here = Seen().sweep(wanted, tmp_path / "here")
    seen = Seen()
    there = seen.sweep(wanted, tmp_path / "there", name="dask", jobs=2)
    pd.testing.assert_frame_equal(untimed(there), untimed(here), check_exact=True)
    assert len(seen.outcomes) == 4


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_scheduler_that_is_there_is_used_and_left_running(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra moetwin[cluster]")
    wanted = grid(tmp_path, {"seed": [1, 2]})
    quiet = {"dashboard_address": ":0", "threads_per_worker": 1, "processes": False}
    with distributed.LocalCluster(n_workers=1, **quiet) as cluster:
        for out in ("one", "two"):
            table = Seen().sweep(wanted, tmp_path / out, name="dask", scheduler=cluster.scheduler_address)
            assert set(table.status) == {"ok"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_scheduler_without_workers_is_told_and_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra moetwin[cluster]")
    monkeypatch.setattr(backends, "SILENCE_S", 0.1)
    monkeypatch.setattr(backends, "WORKERS_S", 0.3)
    wanted, told = grid(tmp_path, {"seed": [1]}), list[str]()
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0", processes=False) as cluster:
        address = cluster.scheduler_address
        with pytest.raises(InputError, match=f"scheduler must have a worker within 0.3 s, got none at {address}"):
            Seen().sweep(wanted, tmp_path / "out", name="dask", scheduler=address, tell=told.append)
    assert told == [f"the scheduler at {address} has no workers yet: waiting for one, 0.3 s at most"]
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "nonsense://x", "127.0.0.1:99999"])
def test_a_scheduler_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    pytest.importorskip("distributed", reason="needs the extra moetwin[cluster]")
    monkeypatch.setattr(backends, "PATIENCE_S", 0.2)
    with pytest.raises(InputError, match=rf"scheduler must be one that answers within .* got {address}"):
        Seen().sweep(grid(tmp_path, {"seed": [1]}), tmp_path / "out", name="dask", scheduler=address)
    assert not (tmp_path / "out").exists()


IMPATIENT = """
import sys
import moetwin
from sim.sweep import backends
backends.PATIENCE_S = 0.2
moetwin.app(sys.argv[1:])
"""


@pytest.mark.parametrize("address", ["nonsense", "tls://127.0.0.1:9"])
def test_the_end_of_the_process_adds_nothing_to_the_one_line(tmp_path: Path, address: str) -> None:
    """A client that is left half made is closed by the interpreter when it ends, which it would tell of."""
    pytest.importorskip("distributed", reason="needs the extra moetwin[cluster]")
    (tmp_path / "k.toml").write_text('[base]\ntrace = "t.safetensors"\nmodel = "moetwin-small"\n[axes]\nseed = [1]\n')
    words = ["sweep", "k.toml", "--backend", "dask", "--scheduler", address, "--out", "out"]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == f"error: scheduler must be one that answers within 0.2 s, got {address}\n"
    assert (done.returncode, done.stdout) == (2, "")

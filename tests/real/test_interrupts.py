"""Ctrl-C in a run: the whole result is there, or nothing of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import moetwin
from real.generate import TextStream, _Batch
from real.models import load
from real.store import HostStore
from sim.logs import RunLog
from sim.results import RunResult
from tests.commanding import run
from traces import store

WORDS = ("decode", "--prompt", "def add(a, b):", "--device", "cpu", "--max-new-tokens", "8")
OUT = ("--out", "run", "--trace-out", "t.safetensors")
MOMENTS: dict[str, tuple[Any, ...]] = {
    "loading": (load, "load"),
    "packing": (HostStore, "__init__", 0),
    "prefill": (_Batch, "forward", 0),
    "decode": (_Batch, "forward", 3),
    "text": (TextStream, "push", 2),
    "tables": (RunLog, "result", 0),
}
"""What is called when the interrupt comes: an object's function, and how many calls of it have gone before."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None) -> None:
    monkeypatch.chdir(tmp_path)


def interrupt_in(monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, call: int = 0) -> None:
    """Lets an interrupt come when ``name`` of ``holder`` is called after ``call`` calls."""
    real, calls = getattr(holder, name), []

    def calling(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == call + 1:
            signal.raise_signal(signal.SIGINT)
        return real(*given, **named)

    monkeypatch.setattr(holder, name, calling)


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupted_run_writes_nothing(moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    interrupt_in(monkeypatch, *MOMENTS[moment])
    result = run(*WORDS, *OUT)
    assert result.exit_code == 130, result.output
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in result.output
    assert [*tmp_path.iterdir()] == []
    assert [thread for thread in threading.enumerate() if thread.name.startswith("moetwin")] == []


@pytest.mark.parametrize("words", [WORDS, (*WORDS, "--systems", "mixtral-offloading")])
def test_an_interrupt_waits_until_all_is_saved(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt_in(monkeypatch, RunResult, "save")
    result = run(*words, *OUT)
    assert result.exit_code == 130, result.output
    folder = Path("run") if words == WORDS else Path("run/mixtral-offloading")
    assert RunResult.load(folder).info.trace_digest == store.load(Path("t.safetensors")).digest
    assert sorted(path.name for path in Path().iterdir()) == ["run", "t.safetensors"]


def test_an_interrupt_from_the_keyboard_is_one_line(tmp_path: Path) -> None:
    """In a process of its own, once the first text has come."""
    words = [sys.executable, "-m", "moetwin", *WORDS[:-1], "2000", *OUT]
    root = {**os.environ, "PYTHONPATH": str(Path(moetwin.__file__).parent)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=root) as process:
        assert process.stdout is not None
        prompt = process.stdout.read(24)
        process.send_signal(signal.SIGINT)
        rest, told = process.communicate(timeout=60)
    assert "def add(a, b):" in prompt
    assert rest.endswith("\n")
    assert (process.returncode, told) == (130, "error: interrupted\n")
    assert [*tmp_path.iterdir()] == []

"""A small trace, grids over it, and sweeps of them, for the tests of sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sim.sweep.backends import backend_of
from sim.sweep.grid import Grid
from sim.sweep.point import Outcome
from sim.sweep.run import run_sweep
from traces import store
from traces.synthetic import Sizes, generate

SIZES = Sizes(sequences=2, prompt_tokens=2, new_tokens=6, layers=8, experts=32, top_k=4)
BASE = {"trace": "t.safetensors", "model": "moetwin-small"}
LINKS = {"hardware.link_gb_per_s": [4, 16]}

COUNTING = """
from pathlib import Path
from sim.policies.base import EvictionPolicy


class Counting(EvictionPolicy):
    defaults = {"pause_s": 0.0}

    def begin_sequence(self):
        import time
        time.sleep(self.options["pause_s"])
        with Path(__file__).with_name("runs.txt").open("a") as file:
            file.write("run\\n")

    def key(self, block):
        return block
"""
"""A policy that notes each sequence that it sees in a file beside it."""


def write_trace(folder: Path, name: str = "t.safetensors", seed: int = 1) -> Path:
    return store.save(generate("zipf", seed, SIZES), folder / name)


def grid(folder: Path, axes: dict[str, Any], **base: Any) -> Grid:
    """A grid over the small trace, which lies in ``folder``; ``base`` has dots as double underscores."""
    own = {name.replace("__", "."): value for name, value in base.items()}
    return Grid.of({"base": BASE | own, "axes": axes}, folder)


class Seen:
    """Runs a sweep in this process, and remembers what it was told."""

    def __init__(self) -> None:
        self.known = self.todo = 0
        self.outcomes: list[Outcome] = []

    def sweep(self, wanted: Grid, out: Path, *, resume: bool = False, **backend: Any) -> pd.DataFrame:
        where = backend_of(**{"name": "processes", "jobs": 1, **backend})
        return run_sweep(wanted, out, where, resume=resume, begun=self._begun, ended=self.outcomes.append)

    def _begun(self, known: int, todo: int) -> None:
        self.known, self.todo = known, todo


def untimed(table: pd.DataFrame) -> pd.DataFrame:
    """A table without what differs from run to run."""
    return table.drop(columns="seconds")

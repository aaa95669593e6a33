"""The folder of a sweep: outcomes by key, each safe on the disk before it counts, and the one table of them all."""

from __future__ import annotations

import fcntl
import json
import os
import tomllib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pandas as pd
import tomli_w

from sim.results import ResultError
from sim.sweep.grid import Grid
from sim.sweep.point import Outcome
from traces.paths import fault_of_target

MANIFEST = "sweep.toml"
TABLE = "sweep.parquet"
POINTS = "points"
PARTIAL = ".partial"


class Store:
    """The folder ``out`` while a sweep works in it; see :func:`opened`."""

    def __init__(self, out: Path) -> None:
        self.folder = out
        self._points = out / POINTS

    def outcomes(self, keys: Iterable[str]) -> dict[str, Outcome]:
        """What is known of ``keys``; failures are not."""
        found = {}
        for key in keys:
            with suppress(OSError, ValueError, TypeError):
                outcome = Outcome(**json.loads((self._points / f"{key}.json").read_text(encoding="utf-8")))
                if outcome.key == key and outcome.status != "failed":
                    found[key] = outcome
        return found

    def add(self, outcome: Outcome) -> None:
        """Keeps an outcome: when this returns, it outlives the process and the machine's power."""
        _write(self._points / f"{outcome.key}.json", json.dumps(outcome.record()).encode())

    def write_table(self, table: pd.DataFrame) -> Path:
        """Writes the table, whole or not at all."""
        draft = self.folder / f".{TABLE}{PARTIAL}"
        table.to_parquet(draft, index=False)
        return draft.replace(self.folder / TABLE)


@contextmanager
def opened(out: Path, grid: Grid, *, resume: bool) -> Iterator[Store]:
    """The folder ``out`` for a sweep over ``grid``, closed to other processes as long as the block runs.

    With ``resume`` it may hold a sweep of the same base, whose outcomes are used where the grid asks for them; a folder
    that is new or empty will do, too. Raises :class:`ResultError` for any other folder, and when it cannot be written.
    """
    check_out(out, grid, resume=resume)
    try:
        (out / POINTS).mkdir(parents=True, exist_ok=True)
        with (out / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ResultError(f"out must not be in use by another sweep, got {out}") from None
            for draft in out.rglob(f".*{PARTIAL}"):
                draft.unlink()
            _write(out / MANIFEST, tomli_w.dumps(_tables(grid)).encode())
            yield Store(out)
    except OSError as error:
        raise ResultError(f"out must be a folder that can be written, got {out}: {error.strerror or error}") from error


def check_out(out: Path, grid: Grid, *, resume: bool) -> None:
    """Raises :class:`ResultError` when :func:`opened` would; changes nothing."""
    fault = fault_of_target(out)
    if fault is None and out.exists() and not out.is_dir():
        fault = "it is a file"
    if fault is not None:
        raise ResultError(f"out must be a folder that can be written, got {out}: {fault}")
    if not out.exists() or not any(out.iterdir()):
        return
    if not resume:
        raise ResultError(f"out must be a new folder (or give --resume to go on with its sweep), got {out}")
    stored = manifest_of(out)
    if stored.get("base") == _tables(grid)["base"]:
        return
    base = stored.get("base", {})
    differing = [name for name in {**base, **grid.base} if base.get(name) != grid.base.get(name)]
    raise ResultError(
        f"out must hold a sweep of the same base (axes may differ), got {out} with another {', '.join(differing)}"
    )


def manifest_of(out: Path) -> dict[str, Any]:
    """The base and the axes of the sweep that ``out`` holds; raises :class:`ResultError` when it holds none."""
    try:
        tables = tomllib.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "none" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise ResultError(f"out must be a folder of a sweep, with {MANIFEST}, got {out}: {reason}") from error
    return tables


def _tables(grid: Grid) -> dict[str, Any]:
    return {"base": grid.base, "axes": {name: list(values) for name, values in grid.axes.items()}}


def _write(path: Path, content: bytes) -> None:
    """Writes under a temporary name and renames; content and name are on the disk when this returns."""
    draft = path.with_name(f".{path.name}{PARTIAL}")
    with draft.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)

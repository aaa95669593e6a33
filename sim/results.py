"""What a run produced: the same tables for the simulated and for the measured clock, and how they are stored."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict

from traces.errors import InputError
from traces.paths import fault_of_target
from traces.schema import Phase

RESULT_VERSION = 2
DECODE = int(Phase.DECODE)

COLUMNS: dict[str, tuple[str, ...]] = {
    "requests": ("sequence", "arrival_s", "start_s", "first_token_s", "end_s", "prompt_tokens", "new_tokens"),
    "tokens": ("step", "phase", "sequence", "tokens", "start_s", "end_s", "head_s"),
    "layers": (
        "step",
        "layer",
        "phase",
        "assignments",
        "union",
        "hits_union",
        "hits_assignments",
        "late_hits",
        "misses",
        "cpu_experts",
        "bytes",
        "start_s",
        "end_s",
        "dense_s",
        "gpu_experts_s",
        "cpu_experts_s",
        "transfer_s",
        "host_s",
        "stall_s",
        "python_s",
    ),
    "events": ("resource", "kind", "step", "layer", "expert", "start_s", "end_s"),
    "operations": ("n", "step", "layer", "op", "expert", "slot", "tokens", "bytes"),
}
"""Columns of every table, in order; ``docs/metrics.md`` defines each one."""


class ResultError(InputError):
    """A stored result cannot be read, or would overwrite something else."""


class RunInfo(BaseModel):
    """Where a result comes from: enough to tell whether two results may be compared."""

    model_config = ConfigDict(extra="forbid")

    result_version: int = RESULT_VERSION
    source: Literal["simulated", "measured"]
    model: str
    hardware: str
    system: dict[str, Any]
    capacity_slots: int
    capacity_bytes: int
    staging_slots: int
    expert_bytes: int = 0  # of one; results that do not tell it have it in their capacity
    trace_digest: str
    workload: dict[str, Any]
    costs: str = ""
    memory: dict[str, int] = {}
    peak: dict[str, int] = {}
    prefetched_bytes: int = 0
    layers_on_cpu: list[int] = []
    synthetic: bool = False
    slow_token_s: float | None = None
    bounds_s: dict[str, float] = {}
    cpu_threads: int | None = None
    calibration_digest: str = ""
    recorded: str = ""
    software: dict[str, str] = {}
    notes: list[str] = []

    @property
    def bytes_of_expert(self) -> int:
        """The size of one expert; 0 for a result that does not tell it."""
        return self.expert_bytes or self.capacity_bytes // max(self.capacity_slots, 1)


@dataclass
class RunResult:
    """One run, on either clock. All times are seconds since the run began; a table may have no rows."""

    info: RunInfo
    requests: pd.DataFrame
    tokens: pd.DataFrame
    layers: pd.DataFrame
    events: pd.DataFrame
    operations: pd.DataFrame

    @classmethod
    def of(cls, info: RunInfo, **rows: list[tuple[Any, ...]]) -> RunResult:
        """Builds the tables from lists of tuples in the order of :data:`COLUMNS`; tables left out are empty."""
        return cls(info=info, **{name: _table(columns, rows.get(name, [])) for name, columns in COLUMNS.items()})

    def save(self, folder: Path, *, force: bool = False) -> Path:
        """Writes ``run.json`` and one Parquet file a table; the folder appears complete or not at all.

        Raises :class:`ResultError` when ``folder`` holds other files and ``force`` is not given, or cannot be written.
        """

        def write(target: Path) -> None:
            for name in COLUMNS:
                getattr(self, name).to_parquet(target / f"{name}.parquet", index=False)
            (target / "run.json").write_text(self.info.model_dump_json(indent=2) + "\n", encoding="utf-8")

        return write_folder(folder, write, force=force)

    def headline(self) -> dict[str, float | None]:
        """The figures that a command prints of a run, as in ``docs/metrics.md``; None where nothing was decoded."""
        layers = self.layers[self.layers.phase == DECODE]
        counts = layers.drop(columns=["step", "layer", "phase"]).sum()
        union, rows = counts["union"], self.tokens[self.tokens.phase == DECODE]
        token_s, tokens = rows.end_s - rows.start_s, int(rows.tokens.sum())  # one value a token: lanes share a step
        steps_s = float(token_s[~rows.step.duplicated()].sum())
        figures = {
            "decode_tokens": tokens,
            "tokens_per_s": tokens / steps_s if tokens else None,
            "time_per_output_token_p50_s": token_s.quantile(0.5),
            "time_per_output_token_p99_s": token_s.quantile(0.99),
            **self._by_request(),
            "hit_ratio_union": counts["hits_union"] / union if union else None,
            "hit_ratio_assignments": counts["hits_assignments"] / counts["assignments"] if union else None,
            "late_hits": counts["late_hits"],
            "misses": counts["misses"],
            "misses_fetched": self._experts_of(counts["bytes"]),
            "cpu_experts": counts["cpu_experts"],
            "demand_bytes_per_token": counts["bytes"] / tokens if tokens else None,
            "stall_share": counts["stall_s"] / steps_s if tokens else None,
        }
        return {name: None if pd.isna(value) else float(value) for name, value in figures.items()}

    def _experts_of(self, size_bytes: float) -> float | None:
        """How many experts so many bytes are; None for a result that does not say how large one is."""
        info = self.info
        one_bytes = info.bytes_of_expert
        return round(size_bytes / one_bytes) if one_bytes else None

    def _by_request(self) -> dict[str, float | None]:
        """What the requests saw, waiting for a lane and for other requests' passes included.

        The first token comes with the end of the prompt, so that every new token of the table has a pass after it; in
        a trace without prompts it is the first of them.
        """
        requests = self.requests
        wait_s = requests.first_token_s - requests.arrival_s
        later = requests.new_tokens - (requests.prompt_tokens == 0)
        token_s = (requests.end_s - requests.first_token_s) / later.where(later > 0)
        span_s = requests.end_s.max() - requests.arrival_s.min()
        return {
            "time_to_first_token_p50_s": wait_s.quantile(0.5),
            "time_to_first_token_p99_s": wait_s.quantile(0.99),
            "time_per_output_token_by_request_p50_s": token_s.quantile(0.5),
            "time_per_output_token_by_request_p99_s": token_s.quantile(0.99),
            "requests_per_s": len(requests) / span_s if span_s > 0 else None,
            "throughput_tokens_per_s": requests.new_tokens.sum() / span_s if span_s > 0 else None,
        }

    @classmethod
    def load(cls, folder: Path) -> RunResult:
        """Reads what :meth:`save` wrote; raises :class:`ResultError` naming the file that is missing or wrong."""
        tables = {name: _read(folder / f"{name}.parquet", _read_table) for name in COLUMNS}
        return cls(info=cls.load_info(folder), **tables)

    @staticmethod
    def load_info(folder: Path) -> RunInfo:
        """The header alone of what :meth:`save` wrote; raises as :meth:`load`."""
        return _read(folder / "run.json", _read_info)


Content = TypeVar("Content")


def _read(path: Path, read: Callable[[Path], Content]) -> Content:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        reason = "nothing" if isinstance(error, FileNotFoundError) else " ".join(str(error).split())
        raise ResultError(f"{path.parent} must be a result folder of moetwin, got {path.name}: {reason}") from error


def _read_info(path: Path) -> RunInfo:
    values = json.loads(path.read_text(encoding="utf-8"))
    version = values.get("result_version") if isinstance(values, dict) else None
    if version != RESULT_VERSION:
        raise ResultError(f"result_version must be {RESULT_VERSION}, got {version!r}")
    return RunInfo.model_validate(values)


def _read_table(path: Path) -> pd.DataFrame:
    table, columns = pd.read_parquet(path), COLUMNS[path.stem]
    if tuple(table.columns) != columns:
        raise ResultError(f"columns must be {', '.join(columns)}, got {', '.join(map(str, table.columns))}")
    return table


TEXT_COLUMNS = frozenset({"resource", "kind", "op"})
"""Columns of words; those that end in ``_s`` are float64, all others int64."""


def _table(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> pd.DataFrame:
    values = [*zip(*rows, strict=True)] or [()] * len(columns)
    return pd.DataFrame({name: _column(name, column) for name, column in zip(columns, values, strict=True)})


def _column(name: str, values: Sequence[Any]) -> Any:
    if name in TEXT_COLUMNS:
        return pd.Series(values, dtype=str)
    return np.array(array("d" if name.endswith("_s") else "q", values))  # twice as fast as numpy on Python numbers


def check_folder(folder: Path, *, force: bool) -> None:
    """Raises :class:`ResultError` when ``folder`` holds something and ``force`` is not given, or cannot be written."""
    fault = fault_of_target(folder)
    if fault is not None:
        raise ResultError(f"out must be a folder that can be written, got {folder}: {fault}")
    if folder.exists() and not folder.is_dir():
        raise ResultError(f"out must be a folder, got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise ResultError(f"out must be an empty or new folder (or give --force), got {folder} with files in it")


def write_folder(folder: Path, write: Callable[[Path], None], *, force: bool = False) -> Path:
    """Calls ``write(temporary folder)`` and moves the outcome to ``folder``, so that no partial result is ever seen.

    With ``force`` what is written replaces entries of the same name in a folder that exists; others stay untouched.
    Interrupts (SIGINT, SIGTERM) wait while entries are moved. Raises :class:`ResultError` as :func:`check_folder`
    does, and for an error of the file system.
    """
    check_folder(folder, force=force)
    try:
        _write_whole(folder.resolve(), write)
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise ResultError(f"out must be a folder that can be written, got {folder}: {reason}") from error
    return folder


def _write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """A new folder is renamed; one that exists keeps its place (it may be where the user stands) and is filled.

    In that case the draft is made inside, so that moving never crosses into another file system.
    """
    exists = folder.exists()
    draft = (folder if exists else folder.parent) / f".{folder.name}.{os.getpid()}.partial"
    old = draft.with_suffix(".old")
    shutil.rmtree(draft, ignore_errors=True)  # of a process that was killed, and had the same id
    try:
        draft.mkdir(parents=True)
        write(draft)
        with signals_held():
            if exists:
                old.mkdir(exist_ok=True)
                _move_into(draft, folder, old)
            else:
                draft.replace(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _move_into(draft: Path, folder: Path, old: Path) -> None:
    """Moves all entries of ``draft`` to ``folder``, and those that they replace to ``old``; undoes it on an error."""
    moved: list[tuple[Path, Path]] = []
    try:
        for entry in sorted(draft.iterdir()):
            target = folder / entry.name
            if os.path.lexists(target):
                target.replace(old / entry.name)
                moved.append((target, old / entry.name))
            entry.replace(target)
            moved.append((entry, target))
    except OSError:
        for source, place in reversed(moved):
            place.replace(source)
        raise


@contextmanager
def signals_held() -> Iterator[None]:
    """Lets an interrupt, or a request to end, wait until the block is over.

    Handlers are replaced instead of blocking the signals of this thread: with other threads around, the system hands
    a blocked signal to one of those, and Python would act on it here all the same. Only the main thread ever does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in held:
            signal.signal(number, lambda caught, _: came.append(caught))
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for received in came:
            signal.raise_signal(received)

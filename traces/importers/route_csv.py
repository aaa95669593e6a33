"""``route-csv``: one row a routed expert, with the verdict (hit or miss) of the engine that wrote it.

Lines of ``# name=value ...`` say the model, its dimensions and, for each layer, ``layer=L expert_bytes=B``. Then come
the columns ``turn,phase,step,layer,slot,expert,weight,residency,expert_bytes``, found by name; others are left aside.
``step`` is the token's position in the context; a turn is a sequence, and its prefill rows are one batch. The last
layer may route the last token of a prompt alone: engines leave out the tokens whose output nobody reads. ``weight`` is
``nan`` where the engine could not tell. ``residency`` is 0 for a miss, 1 for a hit, 2 for the first use of a prefetch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from traces.importers.base import Job, Part
from traces.importers.checks import as_gates, as_ids, check_distinct
from traces.importers.files import open_text
from traces.schema import NOT_ROUTED, Array, Phase, TraceError

COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
MOST = {"phase": 1, "residency": 2, "expert_bytes": 2**62, "layer": 65_534, "slot": 65_534}
MOST_OTHERS = 2**31 - 1
CHUNK_ROWS = 500_000


def read(job: Job) -> Iterator[Part]:
    """Yields one part a file, with the other engine's residency. Raises :class:`TraceError` with the line."""
    for file in job.files:
        bytes_by_layer = _preamble(job, file)
        rows = _rows(job, file)
        yield _File(job, file, rows).part(bytes_by_layer)


def _preamble(job: Job, file: Path) -> dict[int, int]:
    """Takes the facts from the ``#`` lines at the top; returns the bytes of an expert by layer.

    Raises :class:`TraceError` unless the line after them names the columns.
    """
    sizes: dict[int, int] = {}
    with open_text(file) as (_, text):
        for line in text:
            if line.strip() and not line.startswith("#"):
                _check_names(file, line.strip())
                return sizes
            values = dict(re.findall(r"(\w+)=(\S+)", line))
            for name, field in (("n_expert", "experts"), ("n_expert_used", "top_k")):
                if values.get(name, "").isdecimal():
                    job.say(field, int(values[name]), file)
            if "model" in values:
                job.facts.setdefault("model", re.split(r"[/\\]", values["model"])[-1] or "route-csv")
            if values.get("layer", "").isdecimal() and values.get("expert_bytes", "").isdecimal():
                sizes[int(values["layer"])] = int(values["expert_bytes"])
    raise TraceError(f"{file}: must have the columns {','.join(COLUMNS)}, got an empty file")


def _check_names(file: Path, line: str) -> None:
    names = line.split(",")
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise TraceError(f"{file}: must have the columns {','.join(COLUMNS)}, got {line[:100]!r} without {missing[0]}")


def _rows(job: Job, file: Path) -> dict[str, Array]:
    """All rows, by column, as compact arrays; raises :class:`TraceError` with the line of the first bad one."""
    pieces: list[dict[str, Array]] = []
    count = done = 0
    with open_text(file) as (raw, text):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # a bad value is named below, with its line
                warnings.simplefilter("error", pd.errors.ParserWarning)
                for table in pd.read_csv(text, comment="#", chunksize=CHUNK_ROWS, index_col=False):
                    pieces.append({name: _column(file, table, name, count) for name in COLUMNS})
                    count += len(table)
                    job.advance(raw.tell() - done)
                    done = raw.tell()
        except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
            _read_through(file)
            raise TraceError(f"{file}: must be rows of the same fields, got: {str(error).strip()}") from error
    if not count:
        raise TraceError(f"{file}: must have a row below the names of its columns, got none")
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in COLUMNS}


def _read_through(file: Path) -> None:
    """Raises what is wrong with the file itself, which the parser's error hides: a truncated archive, say."""
    with open_text(file) as (_, text):
        for _ in text:
            pass


def _column(file: Path, table: Any, name: str, before: int) -> Array:
    """One checked column of a piece that follows on ``before`` rows."""
    values: Array = pd.to_numeric(table[name], errors="coerce").to_numpy(dtype=np.float64)
    if name == "weight":
        bad = np.isnan(values) & (table[name].notna().to_numpy())
    else:
        most = MOST.get(name, MOST_OTHERS)
        bad = ~((values >= 0) & (values <= most) & (values == np.trunc(values)))
    if bad.any():
        row = int(bad.argmax())
        rule = "a number or nan" if name == "weight" else f"a whole number from 0 to {MOST.get(name, MOST_OTHERS)}"
        raise TraceError(f"{_line(file, before + row)}: {name} must be {rule}, got {table[name].iloc[row]}")
    if name == "weight":
        return values
    return values.astype(np.int64 if name == "expert_bytes" else np.int32)


def _line(file: Path, row: int) -> str:
    """Where data row ``row`` stands; the file is read again for it."""
    seen = -2  # the names of the columns come first
    with open_text(file) as (_, text):
        for number, line in enumerate(text, 1):
            seen += bool(line.strip()) and not line.startswith("#")
            if seen == row:
                return f"{file}, line {number}"
    return f"{file}, row {row}"


class _File:
    """The rows of one file, about to become tokens; T tokens, L layers that occur, K slots."""

    def __init__(self, job: Job, file: Path, rows: dict[str, Array]) -> None:
        self._job = job
        self._file = file
        self._rows = rows
        self._layers, self._layer = np.unique(rows["layer"], return_inverse=True)
        key = rows["turn"].astype(np.int64) << 31 | rows["step"]
        _, self._first, self._token = np.unique(key, return_index=True, return_inverse=True)  # by turn, then position
        self._top_k = job.dimension("top_k") or int(rows["slot"].max()) + 1
        self._shape = (len(self._first), len(self._layers), self._top_k)
        self._by_row = (len(self._token), 1, 1)

    def part(self, bytes_by_layer: dict[int, int]) -> Part:
        """All tokens of the file."""
        rows, job = self._rows, self._job
        job.say("layers", len(self._layers), self._file)
        job.say("top_k", self._top_k, self._file)
        if all(int(layer) in bytes_by_layer for layer in self._layers):
            job.say("expert_bytes", tuple(bytes_by_layer[int(layer)] for layer in self._layers), self._file)
        turn, position, phase = (rows[name][self._first] for name in ("turn", "step", "phase"))
        self._check_tokens(turn, position, phase)
        cell = (self._token.astype(np.int64) * len(self._layers) + self._layer) * self._top_k + rows["slot"]
        self._check_cells(cell, turn, phase)
        ids = np.full(self._shape, NOT_ROUTED, dtype=np.uint16)
        ids.reshape(-1)[cell] = as_ids(rows["expert"], self._by_row, self._row, job.dimension("experts")).reshape(-1)
        check_distinct(ids, self._place)
        numbers, sequence = np.unique(turn, return_inverse=True)
        new = np.ones(len(turn), dtype=bool)
        new[1:] = (turn[1:] != turn[:-1]) | (phase[1:] == Phase.DECODE) | (phase[:-1] == Phase.DECODE)
        return Part(
            expert_ids=ids,
            position=position,
            step=np.cumsum(new) - 1,
            phase=phase,
            sequence=sequence,
            sequences=len(numbers),
            gates=self._gates(cell),
            residency=self._residency(sequence),
        )

    def _row(self, row: int, _: int) -> str:
        return _line(self._file, row)

    def _place(self, token: int, layer: int) -> str:
        row = np.flatnonzero((self._token == token) & (self._layer == layer))
        return _line(self._file, int(row[0]))

    def _check_tokens(self, turn: Array, position: Array, phase: Array) -> None:
        """Phases agree among the rows of a token, and positions count up by one within a turn."""
        wrong = np.flatnonzero(self._rows["phase"] != phase[self._token])
        if wrong.size:
            raise TraceError(f"{_line(self._file, int(wrong[0]))}: phase must be that of the step's other rows")
        jump = np.flatnonzero((turn[1:] == turn[:-1]) & (np.diff(position) != 1))
        if jump.size:
            before, after = position[jump[0]], position[jump[0] + 1]
            where = _line(self._file, int(self._first[jump[0] + 1]))
            raise TraceError(f"{where}: step must count up by one within a turn, got {after} after {before}")

    def _check_cells(self, cell: Array, turn: Array, phase: Array) -> None:
        """Every slot of a token is there once in every layer, but for the last layer's prompt tokens."""
        beyond = np.flatnonzero(self._rows["slot"] >= self._top_k)
        if beyond.size:
            row = int(beyond[0])
            got = self._rows["slot"][row]
            raise TraceError(f"{_line(self._file, row)}: slot must be from 0 to {self._top_k - 1}, got {got}")
        counts = np.bincount(cell, minlength=int(np.prod(self._shape))).reshape(self._shape)
        if counts.max() > 1:
            row = int(np.flatnonzero(cell == counts.argmax())[1])
            raise TraceError(f"{_line(self._file, row)}: must be the only row of its turn, step, layer and slot")
        filled = counts.sum(axis=2)
        lacking = filled < self._top_k
        last = np.append(turn[1:] != turn[:-1], True) | np.append(phase[1:] != phase[:-1], True)
        lacking[:, -1] &= ~((phase == Phase.PREFILL) & ~last & (filled[:, -1] == 0))
        if lacking.any():
            token, layer = (int(i) for i in np.argwhere(lacking)[0])
            what = f"turn {turn[token]}, step {self._rows['step'][self._first[token]]}, layer {self._layers[layer]}"
            raise TraceError(f"{self._file}: must have {self._top_k} rows for {what}, got {filled[token, layer]}")

    def _gates(self, cell: Array) -> Array | None:
        """The weights, None where the engine told none at all."""
        weight = self._rows["weight"]
        if np.isnan(weight).all():
            self._job.notes.append(f"note: {self._file.name} has no weights, so the trace has no gates")
            return None
        gates = np.zeros(self._shape, dtype=np.float16)
        gates.reshape(-1)[cell] = as_gates(weight, self._by_row, self._row).reshape(-1)
        return gates

    def _residency(self, sequence: Array) -> dict[str, Array]:
        rows = self._rows
        order = np.lexsort((rows["slot"], self._layer, self._token))
        table = {"token": self._token, "sequence": sequence[self._token], "position": rows["step"]}
        table |= {"layer": self._layer, "rank": rows["slot"]}
        table |= {name: rows[name] for name in ("expert", "residency", "expert_bytes")}
        return {name: np.asarray(values)[order] for name, values in table.items()}

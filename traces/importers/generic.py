"""The rows of the generic formats, one a (sequence, position, layer), gathered into arrays.

Shapes: R rows, T tokens, L MoE layers, K experts a token.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.importers.base import Job, Part
from traces.importers.checks import as_gates, as_ids, check_distinct
from traces.schema import NOT_ROUTED, Array, Phase, TraceError, TraceHeader

COLUMNS = ("sequence", "position", "layer", "phase", "step", "token_id", "expert_ids", "gates")
"""The columns of CSV, and the keys of a row of JSONL, in order."""

REQUIRED = ("sequence", "position", "layer", "expert_ids")
PHASES = {"prefill": int(Phase.PREFILL), "decode": int(Phase.DECODE)}
NUMBERS = ("sequence", "position", "layer", "phase", "step", "token_id", "line", "count")
NO_STEP = -1
"""Stands in ``step`` for a row that has none."""

CHUNK_ROWS = 65_536
MOST = 2**31 - 1


def take_header(job: Job, values: Any, file: Path) -> TraceHeader:
    """Reads the header of a file into the facts of ``job``; raises :class:`TraceError` that names the file."""
    try:
        header = TraceHeader.of(values)
    except TraceError as error:
        raise TraceError(f"{file}, header: {error}") from error
    for name in ("layers", "experts", "top_k", "expert_bytes"):
        job.say(name, getattr(header, name), file)
    for name in ("model", "revision", "dtype", "made_by", "synthetic", "prompts_digest", "software", "licence"):
        job.facts.setdefault(name, getattr(header, name))
    return header


class Rows:
    """The rows of one file: numbers kept as compact arrays; ids and gates are checked piece by piece."""

    def __init__(self, job: Job, file: Path) -> None:
        self._job = job
        self._file = file
        self._pieces: list[dict[str, Array]] = []
        self._with_gates: bool | None = None
        self._clear()

    def _clear(self) -> None:
        self._numbers = {name: array("q") for name in NUMBERS}
        self._ids: list[Any] = []
        self._gates: list[Any] = []

    def add(self, numbers: Sequence[Any], ids: list[Any], gates: list[Any]) -> None:
        """Takes in a row: the values of :data:`NUMBERS` but the last, and its lists in rank order.

        Raises :class:`TraceError` with the line for what does not fit. Whole numbers are taken for granted.
        """
        if ids:
            self._check_gates(numbers[-1], len(ids), len(gates))
        try:
            for column, value in zip(self._numbers.values(), (*numbers, len(ids)), strict=True):
                column.append(value)
        except OverflowError as error:
            raise TraceError(f"{self._file}, line {numbers[-1]}: numbers must be at most {MOST}, got more") from error
        self._ids += ids
        self._gates += gates
        if len(self._numbers["line"]) >= CHUNK_ROWS:
            self._flush()

    def _check_gates(self, line: int, ids: int, gates: int) -> None:
        self._with_gates = bool(gates) if self._with_gates is None else self._with_gates
        wanted = ids if self._with_gates else 0
        if gates != wanted:
            raise TraceError(f"{self._file}, line {line}: must have {wanted} gates, as other rows do, got {gates}")

    def _flush(self) -> None:
        piece = {name: np.frombuffer(values, dtype=np.int64) for name, values in self._numbers.items()}
        lines = np.repeat(piece["line"], piece["count"])

        def place(entry: int, _: int) -> str:
            return f"{self._file}, line {lines[entry]}"

        for name in ("sequence", "position", "layer", "step", "token_id"):
            self._check_range(name, piece[name], piece["line"], NO_STEP if name == "step" else 0)
        shape = (len(lines), 1, 1)
        piece["ids"] = as_ids(self._ids, shape, place, self._job.dimension("experts")).reshape(-1)
        if self._with_gates:
            piece["gates"] = as_gates(self._gates, shape, place).reshape(-1)
        kept = ("ids", "gates")
        self._pieces.append({name: v if name in kept else v.astype(np.int32) for name, v in piece.items()})
        self._clear()

    def _check_range(self, name: str, values: Array, lines: Array, least: int) -> None:
        wrong = np.flatnonzero((values < least) | (values > MOST))
        if wrong.size:
            row = int(wrong[0])
            raise TraceError(f"{self._file}, line {lines[row]}: {name} must be from 0 to {MOST}, got {values[row]}")

    def part(self, header: TraceHeader | None) -> Part:
        """All rows as tokens in the order of their first rows, or sequence by sequence where rows have no step.

        The sequences keep their numbers when the job has no other file, else they are numbered from 0. Raises
        :class:`TraceError`, with the line, unless every token has one row in every layer, and its rows agree.
        """
        if len(self._numbers["line"]):
            self._flush()
        if not self._pieces:
            raise TraceError(f"{self._file}: must have a row, got none")
        rows = {name: np.concatenate([piece[name] for piece in self._pieces]) for name in self._pieces[0]}
        self._pieces.clear()
        return _Table(self._job, self._file, rows).part(header)


class _Table:
    """The gathered rows of a file, about to become tokens."""

    def __init__(self, job: Job, file: Path, rows: dict[str, Array]) -> None:
        self._job = job
        self._file = file
        self._rows = rows
        key = rows["sequence"].astype(np.int64) << 31 | rows["position"]
        _, first_row, token = np.unique(key, return_index=True, return_inverse=True)  # tokens by (sequence, position)
        order = np.argsort(first_row, kind="stable")
        self._first = first_row[order]  # [T] the first row of each token
        self._token = np.argsort(order, kind="stable")[token]  # [R]

    def _at(self, row: int) -> str:
        return f"{self._file}, line {self._rows['line'][row]}"

    def part(self, header: TraceHeader | None) -> Part:
        """The tokens as a part."""
        for name in ("phase", "step", "token_id"):
            self._check_agree(name)
        cells = self._cells()
        ids, gates = self._lists(cells)
        order, step = self._steps()
        columns = {name: self._rows[name][self._first][order] for name in ("sequence", "position", "phase", "token_id")}
        sequence, domains = columns["sequence"], header.domains if header else ()
        if domains and int(sequence.max()) >= len(domains):
            rule = f"be below the {len(domains)} domains of the header"
            raise TraceError(f"{self._file}: sequence must {rule}, got {int(sequence.max())}")
        if len(self._job.files) > 1:
            numbers, sequence = np.unique(sequence, return_inverse=True)
            domains = tuple(domains[number] for number in numbers) if domains else ()
        return Part(
            expert_ids=ids[order],
            position=columns["position"],
            step=step,
            phase=columns["phase"],
            sequence=sequence,
            sequences=max(len(domains), int(sequence.max()) + 1),
            token_ids=columns["token_id"],
            gates=None if gates is None else gates[order],
            domains=domains,
        )

    def _check_agree(self, name: str) -> None:
        """Raises TraceError unless all rows of a token have the same ``name``."""
        values = self._rows[name]
        expected = values[self._first][self._token]
        wrong = np.flatnonzero(values != expected)
        if wrong.size:
            row = int(wrong[0])
            rule, got = (
                Phase(value).name.lower() if name == "phase" else value for value in (expected[row], values[row])
            )
            raise TraceError(f"{self._at(row)}: {name} must be {rule}, as in the token's other rows, got {got}")

    def _cells(self) -> Array:
        """The place token * L + layer of each row; every place is taken once: int64 [R]."""
        layer = self._rows["layer"]
        layers = self._job.dimension("layers") or int(layer.max()) + 1
        beyond = np.flatnonzero(layer >= layers)
        if beyond.size:
            row = int(beyond[0])
            raise TraceError(f"{self._at(row)}: layer must be from 0 to {layers - 1}, got {layer[row]}")
        cells = self._token.astype(np.int64) * layers + layer
        counts = np.bincount(cells, minlength=len(self._first) * layers)
        self._check_taken(cells, counts, layers)
        self._job.facts.setdefault("layers", layers)
        return cells

    def _check_taken(self, cells: Array, counts: Array, layers: int) -> None:
        sequence, position = (self._rows[name][self._first] for name in ("sequence", "position"))
        if counts.max() > 1:
            row = int(np.flatnonzero(cells == counts.argmax())[1])
            token, layer = divmod(int(counts.argmax()), layers)
            what = f"sequence {sequence[token]}, position {position[token]}, layer {layer}"
            raise TraceError(f"{self._at(row)}: must be the only row of its token and layer, got {what} again")
        if counts.min() < 1:
            token, layer = divmod(int(counts.argmin()), layers)
            got = f"{int(counts[layer::layers].sum())}: none for sequence {sequence[token]}, position {position[token]}"
            rule = f"have a row for each of {len(self._first)} tokens"
            raise TraceError(f"{self._file}: layer {layer} must {rule}, got {got}")

    def _lists(self, cells: Array) -> tuple[Array, Array | None]:
        """Ids and gates [T, L, K] from the rows' lists."""
        count = self._rows["count"]
        layers, top_k = int(self._job.facts["layers"]), self._job.dimension("top_k") or max(1, int(count.max()))
        long = np.flatnonzero(count > top_k)
        if long.size:
            row = int(long[0])
            raise TraceError(f"{self._at(row)}: must have at most {top_k} expert ids (top_k), got {count[row]}")
        rank = np.arange(int(count.sum())) - np.repeat(np.cumsum(count) - count, count)
        place = np.repeat(cells, count) * top_k + rank
        shape = (len(self._first), layers, top_k)
        ids = np.full(shape, NOT_ROUTED, dtype=np.uint16)
        ids.reshape(-1)[place] = self._rows["ids"]
        check_distinct(ids, lambda token, layer: self._at(int(np.flatnonzero(cells == token * layers + layer)[0])))
        if "gates" not in self._rows:
            return ids, None
        gates = np.zeros(shape, dtype=np.float16)
        gates.reshape(-1)[place] = self._rows["gates"]
        return ids, gates

    def _steps(self) -> tuple[Array, Array]:
        """The order of the tokens, and the forward pass of each in that order."""
        step, sequence, position, phase = (
            self._rows[name][self._first] for name in ("step", "sequence", "position", "phase")
        )
        given = step != NO_STEP
        if given.all():
            back = np.flatnonzero(np.diff(step) < 0)
            if back.size:
                row = int(self._first[back[0] + 1])
                rule = f"not decrease from token to token ({step[back[0]]} before)"
                raise TraceError(f"{self._at(row)}: step must {rule}, got {step[back[0] + 1]}")
            order = np.arange(len(step))
        elif given.any():
            row = int(self._first[np.flatnonzero(~given)[0]])
            raise TraceError(f"{self._at(row)}: step must be given in every row or in none, got none")
        else:
            _, appearance = np.unique(sequence, return_index=True)
            lane = np.searchsorted(np.unique(sequence), sequence)
            order = np.lexsort((position, appearance[lane]))
            step = _own_steps(sequence[order], phase[order])[np.argsort(order, kind="stable")]
        self._check_positions(order, sequence, position)
        return order, step[order]

    def _check_positions(self, order: Array, sequence: Array, position: Array) -> None:
        by_sequence = order[np.argsort(sequence[order], kind="stable")]
        same = sequence[by_sequence][1:] == sequence[by_sequence][:-1]
        jump = np.flatnonzero(same & (np.diff(position[by_sequence]) != 1))
        if jump.size:
            before, token = (int(by_sequence[jump[0] + i]) for i in (0, 1))
            rule = f"count up by one within sequence {sequence[token]}"
            got = f"{position[token]} after {position[before]}"
            raise TraceError(f"{self._at(int(self._first[token]))}: position must {rule}, got {got}")


def _own_steps(sequence: Array, phase: Array) -> Array:
    """Forward passes of tokens that stand sequence by sequence: one a prompt, and one a decoded token."""
    new = np.ones(len(sequence), dtype=bool)
    new[1:] = (sequence[1:] != sequence[:-1]) | (phase[1:] == Phase.DECODE) | (phase[:-1] == Phase.DECODE)
    steps: Array = np.cumsum(new) - 1
    return steps

"""A measured table of MoE layer times by tokens and activated experts, read from a user's file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.spec.model import BITS_PER_WEIGHT
from traces.errors import InputError, unknown_name

SIZES = ("tokens", "activated_experts")
TIMES = {"time_us": 1e-6, "time_ms": 1e-3, "time_s": 1.0}
"""Columns that a time may stand in, and what one of their units is in seconds."""

Row = tuple[int, int, float]


@dataclass(frozen=True)
class ComputeTable:
    """Seconds that the experts of one layer take together, all of them resident on the GPU.

    ``columns[activated]`` holds the numbers of tokens, ascending, and their seconds: not every number of experts can be
    activated by any number of tokens, so that columns differ in length. ``model`` is empty where the file does not say,
    and so is ``quant``, a key of :data:`BITS_PER_WEIGHT`, which then is taken to be bf16.
    """

    name: str
    columns: Mapping[int, tuple[tuple[int, ...], tuple[float, ...]]]
    model: str = ""
    quant: str = ""

    @property
    def most_tokens(self) -> int:
        """The largest batch that was measured, with however many experts."""
        return max(tokens[-1] for tokens, _ in self.columns.values())

    def doubts(self, model: str, activated: int, expert_bits: float) -> list[str]:
        """What is doubtful about layers of ``model`` that activate so many experts, one sentence each.

        ``expert_bits`` are those of a weight of its experts.
        """
        found = []
        if not self.model:
            found.append(f"{self.name} does not say of which model it is (column model): it is taken for {model}")
        elif self.model.lower() != model.lower():
            found.append(f"{self.name} was measured on {self.model}, and is taken for {model}")
        if BITS_PER_WEIGHT[self.quant or "bf16"] != expert_bits:
            assumed = "does not say in what its experts were kept (column quant; bf16 is assumed)"
            measured = f"was measured on experts in {self.quant}" if self.quant else assumed
            found.append(f"{self.name} {measured}, and is taken for experts of {expert_bits:g} bits a weight")
        first, last = min(self.columns), max(self.columns)
        if not first <= activated <= last:
            known = f"{first}" if first == last else f"{first} to {last}"
            found.append(
                f"{self.name} was asked for {activated} activated experts, measured for {known}: times are taken in "
                "proportion"
            )
        return found

    def layer_s(self, tokens: float, activated: float) -> float:
        """Seconds of a layer in which ``tokens`` tokens activate ``activated`` experts.

        Between measured points the logarithm of the time is linear in the logarithm of the tokens, and then of the
        experts. Beyond a column's last batch the time is in proportion to the tokens, below its first batch as there;
        beyond the outermost columns it is in proportion to the experts.
        """
        known = sorted(self.columns)
        inside = min(max(activated, known[0]), known[-1])
        logs = [math.log(self._column_s(column, tokens)) for column in known]
        return math.exp(np.interp(math.log(inside), np.log(known), logs)) * activated / inside

    def _column_s(self, activated: int, tokens: float) -> float:
        sizes, seconds = self.columns[activated]
        inside = min(max(tokens, sizes[0]), sizes[-1])
        return math.exp(np.interp(math.log(inside), np.log(sizes), np.log(seconds))) * max(1.0, tokens / sizes[-1])

    @classmethod
    def of(cls, name: str, rows: Iterable[Row], model: str = "", quant: str = "") -> ComputeTable:
        """From rows of tokens, activated experts and seconds; raises :class:`InputError` for a pair given twice."""
        found: dict[int, dict[int, float]] = {}
        for tokens, activated, seconds in rows:
            column = found.setdefault(activated, {})
            if tokens in column:
                raise InputError(f"{name}: tokens and activated_experts must be given once, got {tokens}, {activated}")
            column[tokens] = seconds
        if not found:
            raise InputError(f"{name}: compute table must have rows, got none")
        columns = {activated: sorted(column.items()) for activated, column in sorted(found.items())}
        sorted_columns = {key: (tuple(n for n, _ in one), tuple(s for _, s in one)) for key, one in columns.items()}
        return cls(name, sorted_columns, model, quant)

    @classmethod
    def load(cls, path: Path) -> ComputeTable:
        """Reads CSV with a header, or JSON as a list of objects when the name ends in ``.json``.

        The columns are ``tokens``, ``activated_experts`` and one of :data:`TIMES`; where the file has them, also
        ``model`` and ``quant``, each the same in all rows. Others are passed over. Raises :class:`InputError` naming
        the file, the row and what was expected.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"compute-table must be readable, got {path} ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise InputError(f"compute-table must be text in UTF-8, got {path} ({error.reason})") from error
        records = _json_records(path, text) if path.suffix == ".json" else list(csv.DictReader(text.splitlines()))
        quant = _same(path, records, "quant").lower()
        if quant and quant not in BITS_PER_WEIGHT:
            raise InputError(f"{path}: {unknown_name('quant', quant, BITS_PER_WEIGHT)}")
        return cls.of(str(path), _rows(path, records), _same(path, records, "model"), quant)


def _same(path: Path, records: list[dict[str, Any]], field: str) -> str:
    """What all rows have in the column ``field``, empty where there is none."""
    found = {str(record.get(field) or "").strip() for record in records} or {""}
    if len(found) > 1:
        raise InputError(f"{path}: {field} must be the same in all rows, got {', '.join(sorted(found))}")
    return found.pop()


def _json_records(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        records = json.loads(text)
    except ValueError as error:
        raise InputError(f"compute-table must be JSON, got {path} ({error})") from error
    if not isinstance(records, list) or not all(isinstance(one, dict) for one in records):
        raise InputError(f"{path}: compute table must be a list of objects, got another shape")
    return records


def _rows(path: Path, records: list[dict[str, Any]]) -> Iterator[Row]:
    for number, record in enumerate(records, 1):
        times = [name for name in TIMES if record.get(name) is not None]
        if len(times) != 1:
            found = ", ".join(map(str, record)) or "nothing"
            raise InputError(f"{path}: row {number}: must have one of the columns {', '.join(TIMES)}, got {found}")
        tokens, activated, time = (_positive(path, number, record, name) for name in (*SIZES, *times))
        for name, size in zip(SIZES, (tokens, activated), strict=True):
            if size != int(size):
                raise InputError(f"{path}: row {number}: {name} must be a whole number, got {size:g}")
        yield int(tokens), int(activated), time * TIMES[times[0]]


def _positive(path: Path, number: int, record: dict[str, Any], name: str) -> float:
    value = record.get(name)
    try:
        size = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        size = 0.0
    if isinstance(value, bool) or not (0 < size < math.inf):
        raise InputError(f"{path}: row {number}: {name} must be a positive number, got {value!r}")
    return size

"""``jsonl``: the generic format with one JSON object a line, described in docs/trace-format.md.

The first line may be ``{"header": {...}}``; the keys of a row are the columns of the generic CSV, with lists as lists.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from traces.errors import unknown_name
from traces.importers.base import Job, Part
from traces.importers.files import numbered_lines
from traces.importers.generic import COLUMNS, NO_STEP, NUMBERS, PHASES, REQUIRED, Rows, take_header
from traces.schema import TraceError

DEFAULTS = {"phase": "decode", "step": NO_STEP, "token_id": 0, "gates": []}
"""What a key that is missing, or null, stands for."""

_KEYS = frozenset(COLUMNS)


def read(job: Job) -> Iterator[Part]:
    """Yields one part a file. Raises :class:`TraceError` with the line of what is wrong."""
    for file in job.files:
        rows, header = Rows(job, file), None
        for index, (number, line) in enumerate(numbered_lines(file, job.advance)):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise TraceError(f"{file}, line {number}: must be a JSON object, got {line[:60]!r}") from error
            if not index and isinstance(row, dict) and row.keys() == {"header"}:
                header = take_header(job, row["header"], file)
                continue
            rows.add(*_taken(file, number, row))
        yield rows.part(header=header)


def _taken(file: Path, line: int, row: Any) -> tuple[Any, ...]:
    """The arguments of :meth:`Rows.add`."""
    where = f"{file}, line {line}"
    if not isinstance(row, dict):
        raise TraceError(f"{where}: must be a JSON object, got {str(row)[:60]!r}")
    if not row.keys() <= _KEYS:
        wrong = next(name for name in row if name not in _KEYS)
        raise TraceError(f"{where}: {unknown_name('key', wrong[:40], COLUMNS)}")
    for name in REQUIRED:
        if row.get(name) is None:
            raise TraceError(f"{where}: must have the keys {', '.join(REQUIRED)}, got none named {name}")
    row = DEFAULTS | {name: value for name, value in row.items() if value is not None}
    numbers = [row[name] for name in NUMBERS[:6]]
    for name, value in zip(NUMBERS, numbers, strict=False):
        if name != "phase" and type(value) is not int:
            raise TraceError(f"{where}: {name} must be a whole number, got {value!r}")
    if not isinstance(numbers[3], str) or numbers[3] not in PHASES:
        raise TraceError(f"{where}: phase must be prefill or decode, got {numbers[3]!r}")
    numbers[3] = PHASES[numbers[3]]
    ids, gates = row["expert_ids"], row["gates"]
    if not isinstance(ids, list) or not isinstance(gates, list):
        raise TraceError(f"{where}: expert_ids and gates must be lists, got {str(ids)[:30]} and {str(gates)[:30]}")
    return (*numbers, line), ids, gates

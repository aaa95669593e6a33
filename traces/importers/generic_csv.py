"""``csv``: the generic format for everything else, described in docs/trace-format.md.

The first line may be ``# {header as JSON}``; then come the names of the columns, then one row a (sequence, position,
layer), with lists separated by spaces.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from traces.errors import unknown_name
from traces.importers.base import Job, Part
from traces.importers.files import fields_of, numbered_lines
from traces.importers.generic import COLUMNS, NO_STEP, PHASES, REQUIRED, Rows, take_header
from traces.schema import TraceError, TraceHeader


def read(job: Job) -> Iterator[Part]:
    """Yields one part a file. Raises :class:`TraceError` with the line of what is wrong."""
    for file in job.files:
        lines = numbered_lines(file, job.advance)
        number, title = next(lines)
        header = None
        if title.startswith("#"):
            header = _header(job, file, title)
            number, title = next(lines, (number, ""))
        take = _taker(file, number, title)
        rows = Rows(job, file)
        for number, line in lines:
            try:
                rows.add(*take(number, fields_of(line)))
            except TraceError:
                raise
            except (ValueError, KeyError, IndexError, csv.Error) as error:
                raise TraceError(f"{file}, line {number}: {_fault(error, title)}, got {line[:80]!r}") from error
        yield rows.part(header=header)


def _header(job: Job, file: Path, line: str) -> TraceHeader:
    try:
        values = json.loads(line.lstrip("#"))
    except ValueError as error:
        raise TraceError(f"{file}, line 1: must be '# ' and the header as JSON, got {line[:60]!r}") from error
    return take_header(job, values, file)


def _taker(file: Path, number: int, title: str) -> Callable[[int, list[str]], tuple[Any, ...]]:
    """What turns the fields of a line into the arguments of :meth:`Rows.add`."""
    try:
        names = [name.strip() for name in fields_of(title)]
    except csv.Error as error:
        raise TraceError(f"{file}, line {number}: {_fault(error, title)}, got {title[:80]!r}") from error
    for name in names:
        if name not in COLUMNS:
            raise TraceError(f"{file}, line {number}: {unknown_name('column', name[:40], COLUMNS)}")
    missing = [name for name in REQUIRED if name not in names]
    if missing or len(set(names)) != len(names):
        rule = f"name each column once, {', '.join(REQUIRED)} among them"
        raise TraceError(f"{file}, line {number}: must {rule}, got {title[:80]!r}")
    places = {name: names.index(name) for name in names}
    sequence, position, layer, ids = (places[name] for name in REQUIRED)
    phase, step, token, gates = (places.get(name, len(names)) for name in ("phase", "step", "token_id", "gates"))
    width = len(names)

    def take(line: int, fields: list[str]) -> tuple[Any, ...]:
        if len(fields) != width:
            raise IndexError
        fields.append("")  # what a column that is missing has
        numbers = (
            int(fields[sequence]),
            int(fields[position]),
            int(fields[layer]),
            PHASES[fields[phase] or "decode"],
            int(fields[step] or NO_STEP),
            int(fields[token] or 0),
            line,
        )
        return numbers, list(map(int, fields[ids].split())), list(map(float, fields[gates].split()))

    return take


def _fault(error: Exception, title: str) -> str:
    if isinstance(error, KeyError):
        return "phase must be prefill or decode"
    if isinstance(error, csv.Error):
        return f"must be a line of CSV, with quotes that are closed ({error})"
    if isinstance(error, IndexError):
        return f"must have the {len(fields_of(title))} fields {title}"
    return f"must hold whole numbers, and gates as numbers ({error})"

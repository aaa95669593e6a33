"""A trace as plain text for other tools: one line a (token, layer), as CSV or as JSON Lines.

The formats are described in ``docs/trace-format.md``; ``moetwin trace import`` reads them back.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from traces.errors import InputError
from traces.paths import whole_file
from traces.schema import NOT_ROUTED, Phase, Trace
from traces.store import check_target

CSV_COLUMNS = "sequence,position,layer,phase,step,token_id,expert_ids,gates"
"""The header line of the CSV."""

CHUNK_LINES = 20_000
"""About how many lines are made and written together."""

Progress = Callable[[int, int], None]
"""Is told the tokens written and all tokens."""


class _Line(NamedTuple):
    """One token in one layer; what was not routed is left out of both lists."""

    sequence: int
    position: int
    layer: int
    phase: str
    step: int
    token_id: int
    expert_ids: list[str]  # in rank order
    gates: list[str] | None  # of the same experts; None when the trace has no gates


def _csv_line(line: _Line) -> str:
    *numbers, ids, gates = line
    return f"{','.join(map(str, numbers))},{' '.join(ids)},{' '.join(gates or ())}\n"


def _json_line(line: _Line) -> str:
    gates = "" if line.gates is None else f', "gates": [{", ".join(line.gates)}]'
    return (
        f'{{"sequence": {line.sequence}, "position": {line.position}, "layer": {line.layer}, "phase": "{line.phase}", '
        f'"step": {line.step}, "token_id": {line.token_id}, "expert_ids": [{", ".join(line.expert_ids)}]{gates}}}\n'
    )


def _csv_head(trace: Trace) -> str:
    return f"# {trace.header.model_dump_json()}\n{CSV_COLUMNS}\n"


def _json_head(trace: Trace) -> str:
    return f'{{"header": {trace.header.model_dump_json()}}}\n'


FORMATS: dict[str, tuple[Callable[[Trace], str], Callable[[_Line], str]]] = {
    ".csv": (_csv_head, _csv_line),
    ".jsonl": (_json_head, _json_line),
}
"""What writes the first lines and the others, by the ending of the file's name."""


def export(trace: Trace, path: Path, *, force: bool = False, progress: Progress | None = None) -> int:
    """Writes ``trace`` as ``.csv`` or ``.jsonl``, gzipped when ``.gz`` follows; returns the number of its rows.

    ``expert_ids`` and ``gates`` are in rank order, without places that were not routed; gates have the shortest
    decimals that give the same float16 again. ``scores`` and ``lookahead`` have no place in these formats. The file
    appears complete or not at all, and equal traces give equal bytes. Raises :class:`InputError` for another ending,
    and when ``path`` exists and ``force`` is not given or it cannot be written.
    """
    head, text = FORMATS[format_of(path)]
    check_target(path, force=force)
    layers = trace.header.layers
    piece = max(1, CHUNK_LINES // layers)
    with whole_file(path) as draft, _opened(draft, packed=path.suffix == ".gz") as file:
        file.write(head(trace).encode())
        for start in range(0, len(trace), piece):
            rows = slice(start, start + piece)
            file.write("".join(map(text, _lines(trace, rows))).encode())
            if progress is not None:
                progress(min(rows.stop, len(trace)), len(trace))
    return len(trace) * layers


def format_of(path: Path) -> str:
    """The ending that tells the format, ``.gz`` apart; raises :class:`InputError` for another."""
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in FORMATS:
        endings = ", ".join(f"{known}, {known}.gz" for known in FORMATS)
        raise InputError(f"out must end in one of {endings}, got {path.name}")
    return ending


@contextmanager
def _opened(path: Path, *, packed: bool) -> Iterator[BufferedIOBase]:
    """The file to write into; packed without name and time in it, so that equal content gives equal bytes."""
    with path.open("wb") as raw:
        if not packed:
            yield raw
            return
        with gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=6, mtime=0) as file:
            yield file


def _lines(trace: Trace, rows: slice) -> Iterator[_Line]:
    names = {int(phase): phase.name.lower() for phase in Phase}
    columns = (trace.sequence, trace.position, trace.phase, trace.step, trace.token_ids)
    chosen = trace.expert_ids[rows].tolist()  # [n, L, K]
    weights = None if trace.gates is None else np.ascontiguousarray(trace.gates[rows]).view(np.uint16).tolist()
    for n, (sequence, position, phase, step, token) in enumerate(
        zip(*(c[rows].tolist() for c in columns), strict=True)
    ):
        for layer, ids in enumerate(chosen[n]):
            routed = [str(expert) for expert in ids if expert != NOT_ROUTED]
            gates = None if weights is None else _gates(ids, weights[n][layer])
            yield _Line(sequence, position, layer, names[phase], step, token, routed, gates)


def _gates(ids: list[int], bits: list[int]) -> list[str]:
    decimals = _decimals()
    return [decimals[gate] for expert, gate in zip(ids, bits, strict=True) if expert != NOT_ROUTED]


@cache
def _decimals() -> list[str]:
    """The text of every float16 by its 16 bits: looking up is far quicker than formatting each gate."""
    return [str(value) for value in np.arange(1 << 16, dtype=np.uint16).view(np.float16)]

"""``layer-csv``: one CSV a prompt, ``Layer ID,Batch Number,Token,Activated Expert IDs``, layer after layer.

The ids are a quoted list, ``"[3, 17]"``. The rows of a layer are the tokens in order, and align across layers. A
batch number is read as the number of the forward pass: batches up to the last with several tokens are the prompt, the
single tokens after it are decode.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from traces.importers.base import Job, Part
from traces.importers.checks import as_ids
from traces.importers.files import domain_of, fields_of, numbered_lines, root_of, without_gap
from traces.schema import Array, Phase, TraceError

COLUMNS = ["Layer ID", "Batch Number", "Token", "Activated Expert IDs"]
BRACKETS = str.maketrans("[](),;", "      ")


class _Row(NamedTuple):
    line: int
    batch: int
    token: str
    ids: list[int]


def read(job: Job) -> Iterator[Part]:
    """Yields one sequence a file; its domain is the file's folder. Raises :class:`TraceError`."""
    root = root_of(job.files)
    for file in job.files:
        yield _sequence(job, file, _by_layer(job, file), domain_of(file, root))


def _by_layer(job: Job, file: Path) -> dict[int, list[_Row]]:
    """The rows of every layer, in the order of the file."""
    lines = numbered_lines(file, job.advance)
    _, title = next(lines)
    if [name.strip(' "') for name in title.split(",")] != COLUMNS:
        raise TraceError(f"{file}, line 1: must be {','.join(COLUMNS)}, got {title[:80]}")
    layers: dict[int, list[_Row]] = {}
    for number, line in lines:
        try:
            layer, batch, token, ids = fields_of(line)
            row = _Row(number, int(batch), token, list(map(int, ids.translate(BRACKETS).split())))
            layers.setdefault(int(layer), []).append(row)
        except (ValueError, csv.Error) as error:
            rule = 'layer,batch,token,"[ids]" with whole numbers'
            raise TraceError(f"{file}, line {number}: must be {rule}, got {line[:60]!r}") from error
    if not layers:
        raise TraceError(f"{file}: must have a row below its title, got none")
    return layers


def _sequence(job: Job, file: Path, layers: dict[int, list[_Row]], domain: str) -> Part:
    rows = [layers[number] for number in without_gap(list(layers), str(file))]
    first = rows[0]
    job.say("layers", len(rows), file)
    job.say("top_k", len(first[0].ids), file)
    for number, layer in zip(sorted(layers), rows, strict=True):
        _check_aligned(file, number, layer, first, len(first[0].ids))
    shape = (len(first), len(rows), len(first[0].ids))
    flat = [expert for token in range(len(first)) for layer in rows for expert in layer[token].ids]

    def place(token: int, layer: int) -> str:
        return f"{file}, line {rows[layer][token].line}"

    ids = as_ids(flat, shape, place, job.dimension("experts"))
    batch = np.array([row.batch for row in first])
    return Part(
        expert_ids=ids,
        position=np.arange(len(first)),
        step=np.unique(batch, return_inverse=True)[1] if job.options.prefill_as_batch else np.arange(len(first)),
        phase=_phases(batch),
        sequence=np.zeros(len(first), dtype=np.int32),
        domains=(domain,),
    )


def _check_aligned(file: Path, number: int, layer: list[_Row], first: list[_Row], top_k: int) -> None:
    """Raises TraceError unless a layer has the tokens of the first one, row by row, and as many ids in each."""
    for row, other in zip(layer, first, strict=False):
        if (row.batch, row.token) != (other.batch, other.token):
            rule = f"batch {other.batch}, token {other.token!r} as line {other.line}"
            raise TraceError(f"{file}, line {row.line}: must be {rule}, got batch {row.batch}, token {row.token!r}")
        if len(row.ids) != top_k or not top_k:
            raise TraceError(f"{file}, line {row.line}: must have {max(top_k, 1)} expert ids, got {len(row.ids)}")
    if len(layer) != len(first):
        raise TraceError(f"{file}: layer {number} must have {len(first)} rows, as the first layer, got {len(layer)}")
    back = [row for before, row in pairwise(layer) if row.batch < before.batch]
    if back:
        raise TraceError(f"{file}, line {back[0].line}: batches must not decrease in a layer, got {back[0].batch}")


def _phases(batch: Array) -> Array:
    """Prefill up to the last batch of several tokens, decode after it: uint8 [n]."""
    same = np.flatnonzero(batch[1:] == batch[:-1])
    prompt = int(same[-1]) + 2 if same.size else 0
    phase = np.full(len(batch), Phase.DECODE, dtype=np.uint8)
    phase[:prompt] = Phase.PREFILL
    return phase

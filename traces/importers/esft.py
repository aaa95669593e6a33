"""``esft``: a folder of ``expert_weights_<layer>.txt[.gz]``, one line a sequence, as the ESFT repository writes them.

A line is the tab-separated expert ids of all tokens (K a token), two tabs, and the raw softmax scores of the same
experts. Lines align across the layers' files. The tokens were computed teacher-forced, so all are prefill.
Source: Wang et al., "Let the Expert Stick to His Last" (arXiv 2407.01906), repository deepseek-ai/ESFT.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np

from traces.importers.base import Job, Part
from traces.importers.checks import as_gates, as_ids
from traces.importers.files import domain_of, layers_by_folder, numbered_lines, root_of
from traces.schema import Array, Phase, TraceError

NAME = r"expert_weights_(\d+)\.txt(?:\.gz)?$"
TOP_K = 6
"""Experts a token of the one model that the format was made for, DeepSeek-V2-Lite."""


def read(job: Job) -> Iterator[Part]:
    """Yields one part a sequence; the files of a folder are its layers, and the folder's name its domain.

    Raises :class:`TraceError` when lines, or the ids of a line, do not align across layers.
    """
    root = root_of(job.files)
    if job.options.top_k is None:
        job.notes.append(f"note: top_k is {TOP_K}, that of DeepSeek-V2-Lite (--top-k tells otherwise)")
    job.facts["top_k"] = job.options.top_k or TOP_K
    for layers in layers_by_folder(job.files, NAME):
        job.say("layers", len(layers), layers[0])
        for line, texts in _aligned(job, layers):
            yield _sequence(job, layers, line, texts, domain_of(layers[0], root))


def _aligned(job: Job, files: list[Path]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yields (line number, the line of every file); raises TraceError unless all files have as many lines."""
    for row, entries in enumerate(zip_longest(*(numbered_lines(file, job.advance) for file in files))):
        for file, entry in zip(files, entries, strict=True):
            if entry is None:
                raise TraceError(f"{file}: must have as many lines as the other layers' files, got {row}")
        yield entries[0][0], tuple(text for _, text in entries)


def _sequence(job: Job, files: list[Path], line: int, texts: tuple[str, ...], domain: str) -> Part:
    ids, gates, tokens = [], [], None
    for file, text in zip(files, texts, strict=True):
        layer_ids, layer_gates = _layer(job, file, line, text)
        tokens = len(layer_ids) if tokens is None else tokens
        if len(layer_ids) != tokens:
            raise TraceError(f"{file}, line {line}: must have {tokens} tokens, as {files[0]}, got {len(layer_ids)}")
        ids.append(layer_ids)
        gates.append(layer_gates)
    return Part.one_sequence(
        np.concatenate(ids, axis=1),
        phase=Phase.PREFILL,
        as_batch=job.options.prefill_as_batch,
        gates=np.concatenate(gates, axis=1),
        domains=(domain,),
    )


def _layer(job: Job, file: Path, line: int, text: str) -> tuple[Array, Array]:
    """Ids and gates [n, 1, K] of one sequence in one layer."""
    top_k, halves = int(job.facts["top_k"]), text.split("\t\t")
    where = f"{file}, line {line}"
    if len(halves) != 2:
        raise TraceError(f"{where}: must be ids, two tabs, and scores, got {len(halves) - 1} pairs of tabs")
    try:
        ids = list(map(int, halves[0].split("\t")))
        scores = list(map(float, halves[1].rstrip("\t").split("\t")))
    except ValueError as error:
        raise TraceError(f"{where}: must hold tab-separated numbers, got: {error}") from error
    if len(ids) != len(scores):
        raise TraceError(f"{where}: must have a score for each of {len(ids)} ids, got {len(scores)} (truncated?)")
    if len(ids) % top_k:
        raise TraceError(f"{where}: must have a multiple of {top_k} ids (top_k), got {len(ids)}")

    def place(token: int, _: int) -> str:
        return f"{where}, token {token}"

    shape = (len(ids) // top_k, 1, top_k)
    return as_ids(ids, shape, place, job.dimension("experts")), as_gates(scores, shape, place)

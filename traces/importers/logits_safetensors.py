"""``logits-safetensors``: one file a layer, in it for each dataset the router's logits [sequences, tokens, experts].

The number of the layer is the last one in the file's name. The experts of a token are the top-k of its logits (of
equal ones the lowest id); its gates are their share of the softmax over all experts, which is kept as ``scores``, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from traces.importers.base import Job, Part
from traces.importers.checks import as_gates, as_ids
from traces.importers.files import layers_by_folder, reading
from traces.schema import Array, Phase, TraceError

NAME = r"(\d+)\D*$"  # the last number
TYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64, "BF16": np.uint16}


def read(job: Job) -> Iterator[Part]:
    """Yields one part a sequence, dataset by dataset in the order of their names; a dataset is a domain.

    Raises :class:`TraceError` without ``top_k``, or when the layers' files do not align.
    """
    if job.options.top_k is None:
        raise TraceError("top_k must be given for logits-safetensors (--top-k), got nothing")
    for layers in layers_by_folder(job.files, NAME):
        job.say("layers", len(layers), layers[0])
        yield from _folder(job, layers, job.options.top_k)


def _folder(job: Job, files: list[Path], top_k: int) -> Iterator[Part]:
    layers = [_datasets(file) for file in files]
    for file, layer in zip(files, layers, strict=True):
        _check_aligned(file, layer, files[0], layers[0])
    for name in sorted(layers[0]):
        sequences, _, experts = layers[0][name].shape
        job.say("experts", experts, files[0])
        if top_k > experts:
            raise TraceError(f"top_k must be at most {experts}, as {files[0]} has experts, got {top_k}")
        for sequence in range(sequences):
            yield _sequence(job, files, [layer[name][sequence] for layer in layers], (name, sequence), top_k)
            job.advance(sum(layer[name][sequence].nbytes for layer in layers))


def _datasets(file: Path) -> dict[str, Array]:
    """The tensors of a file by name, mapped into memory; bfloat16 as its bits."""
    try:
        with reading(file), safe_open(file, framework="numpy"):  # checks offsets, sizes and overlaps
            pass
    except SafetensorError as error:
        raise TraceError(f"{file}: must be a complete safetensors file, got: {error}") from error
    with reading(file), file.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        layout = json.loads(raw.read(length))
    layout.pop("__metadata__", None)
    if not layout:
        raise TraceError(f"{file}: must hold a dataset, got none")
    tensors: dict[str, Array] = {}
    for name, entry in layout.items():
        if entry["dtype"] not in TYPES or len(entry["shape"]) != 3 or 0 in entry["shape"]:
            got = f"{entry['dtype']} {entry['shape']}"
            raise TraceError(f"{file}, {name}: must be floats of [sequences, tokens, experts], got {got}")
        start = 8 + length + entry["data_offsets"][0]
        tensors[name] = np.memmap(file, dtype=TYPES[entry["dtype"]], mode="r", offset=start, shape=(*entry["shape"],))
    return tensors


def _check_aligned(file: Path, layer: dict[str, Array], first_file: Path, first: dict[str, Array]) -> None:
    if layer.keys() != first.keys():
        raise TraceError(f"{file}: must have the datasets of {first_file} ({', '.join(first)}), got {', '.join(layer)}")
    for name, array in layer.items():
        if array.shape != first[name].shape:
            rule = f"shape {list(first[name].shape)}, as {first_file}"
            raise TraceError(f"{file}, {name}: must have {rule}, got {list(array.shape)}")


def _sequence(job: Job, files: list[Path], layers: list[Array], where: tuple[str, int], top_k: int) -> Part:
    name, sequence = where

    def place(token: int, layer: int) -> str:
        return f"{files[layer]}, {name}, sequence {sequence}, token {token}"

    logits = np.stack([_floats(layer) for layer in layers], axis=1)  # [n, L, E]
    wrong = ~np.isfinite(logits)
    if wrong.any():
        token, layer, expert = (int(i) for i in np.argwhere(wrong)[0])
        raise TraceError(f"{place(token, layer)}: logits must be finite, got {logits[token, layer, expert]}")
    scores = np.exp(logits - logits.max(axis=-1, keepdims=True))
    scores /= scores.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    gates = np.take_along_axis(scores, chosen, axis=-1)
    return Part.one_sequence(
        as_ids(chosen, chosen.shape, place, job.dimension("experts")),
        phase=Phase.PREFILL,
        as_batch=job.options.prefill_as_batch,
        gates=as_gates(gates, chosen.shape, place),
        scores=scores.astype(np.float16),
        domains=(name,),
    )


def _floats(layer: Array) -> Array:
    """Logits as float32; a uint16 holds the bits of a bfloat16, the upper half of a float32."""
    if layer.dtype == np.uint16:
        upper: Array = layer.astype(np.uint32) << 16
        return upper.view(np.float32)
    return layer.astype(np.float32)

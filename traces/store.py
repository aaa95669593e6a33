"""One ``.safetensors`` file a trace: written whole or not at all, read memory-mapped.

The file's metadata has two entries: ``moetwin_trace``, the header as JSON, and ``digest``, the content digest. The
format is described in ``docs/trace-format.md``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from traces.errors import unknown_name
from traces.paths import fault_of_target, whole_file
from traces.schema import DTYPES, REQUIRED, Array, Trace, TraceError, TraceHeader

HEADER_KEY = "moetwin_trace"
DIGEST_KEY = "digest"
MOST_HEADER_BYTES = 100_000_000
"""The longest JSON header that the safetensors format allows."""

_STORED = {"uint16": "U16", "int32": "I32", "uint8": "U8", "float16": "F16"}


def save(trace: Trace, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Checks ``trace`` and writes it to ``path``, which appears complete or not at all; returns the path.

    Raises :class:`TraceError` when the trace breaks a rule, or when ``path`` exists and ``force`` is not given.
    """
    target = Path(path)
    check_target(target, force=force)
    trace.check()
    tensors = {name: np.ascontiguousarray(array) for name, array in trace.arrays()}
    metadata = {HEADER_KEY: trace.header.model_dump_json(), DIGEST_KEY: trace.digest}
    with whole_file(target) as draft:
        draft.touch()
        mode = draft.stat().st_mode  # the library writes files that only their owner may read
        try:
            save_file(tensors, draft, metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        _order_metadata(draft)
        draft.chmod(mode)
    return target


def _order_metadata(path: Path) -> None:
    """Puts the entries of the metadata in the order of their names, in place: the library's order is left to chance,
    and a trace that is made again should have the same bytes."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        layout = json.loads(file.read(length))
        layout["__metadata__"] = dict(sorted(layout["__metadata__"].items()))
        text = json.dumps(layout, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # both write JSON in the shortest form; the library fills up with blanks
            file.seek(8)
            file.write(text.ljust(length))


def check_target(path: Path, *, force: bool) -> None:
    """Raises :class:`TraceError` when ``path`` is a folder, is a file and ``force`` is not given, or cannot be made."""
    fault = fault_of_target(path)
    if fault is not None:
        raise TraceError(f"out must be a file that can be written, got {path}: {fault}")
    if path.is_dir():
        raise TraceError(f"out must be a file, got the folder {path}")
    if path.exists() and not force:
        raise TraceError(f"out must be a new file (or give --force), got {path}, which exists")


def check_trace_target(path: Path, *, force: bool) -> None:
    """As :func:`check_target`, for a trace: ``path`` must end in .safetensors, too."""
    check_target(path, force=force)
    if path.suffix != ".safetensors":
        raise TraceError(f"out must end in .safetensors, as a trace is such a file, got {path}")


def load(path: str | os.PathLike[str], *, check: bool = True, verify: bool = False) -> Trace:
    """Reads a trace whose arrays are read-only views of the file, mapped into memory.

    Layout, types and shapes are always checked. ``check`` also looks at every value, in bounded memory; without it
    the arrays are not read, and a trace of any size loads at once. ``verify`` compares the content with the digest
    in the file, when it has one. Raises :class:`TraceError` with one line that names the file.
    """
    source = Path(path)
    layout, offset = _read_layout(source)
    try:
        metadata = layout.pop("__metadata__", None) or {}  # the library lets it be null
        header = _header(metadata)
        _check_tensors(layout)
        trace = Trace(header=header, **{name: _map(source, offset, entry, name) for name, entry in layout.items()})
        trace.check_shapes()
        if check:
            trace.check()
        if verify:
            _check_digest(trace, metadata)
    except TraceError as error:
        raise TraceError(f"{source}: {error}") from error
    return trace


def stored_digest(path: str | os.PathLike[str]) -> str | None:
    """The digest that was written into the file, or None; raises :class:`TraceError` when the file is malformed."""
    layout, _ = _read_layout(Path(path))
    digest = (layout.get("__metadata__") or {}).get(DIGEST_KEY)
    return None if digest is None else str(digest)


def notes_on(trace: Trace, path: str | os.PathLike[str]) -> list[str]:
    """What has to be told where the digest of a ``trace`` read from ``path`` serves to tell it from others: nothing,
    unless its content is no longer what was written."""
    stored = stored_digest(path)
    if stored in (None, trace.digest):
        return []
    return [f"{path}: the digest is {trace.digest} and not {stored} as stored, so that the content was changed"]


def _read_layout(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, as the library accepts it, and the byte where its data begin."""
    if not path.is_file():
        raise TraceError(f"trace must be an existing file, got {path}")
    try:
        layout, offset = _parse_layout(path)
        with safe_open(path, framework="numpy"):  # checks offsets, sizes and overlaps of the tensors
            return layout, offset
    except OSError as error:
        raise TraceError(f"trace must be a readable file, got {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise TraceError(f"{path}: must be a well-formed safetensors file, got: {error}") from error


def _parse_layout(path: Path) -> tuple[dict[str, Any], int]:
    """Splits the file; tells a truncated file from one of another kind, which the library's errors do not."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(9)
        length = int.from_bytes(prefix[:8], "little")
        if size < 8 or length > MOST_HEADER_BYTES or prefix[8:9] not in (b"{", b""):
            raise TraceError(f"{path}: must be a safetensors file, got {size} bytes that do not begin like one")
        if size < 8 + length:
            raise TraceError(f"{path}: must be a complete file, got {size} bytes where the header ends at {8 + length}")
        file.seek(8)
        text = file.read(length)
    try:
        layout = json.loads(text)
        end = max((entry["data_offsets"][1] for name, entry in layout.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise TraceError(f"{path}: must be a safetensors file, got a header that is not its JSON") from error
    if isinstance(end, int) and size < 8 + length + end:
        raise TraceError(f"{path}: must be a complete file of {8 + length + end} bytes, got {size} (truncated)")
    return layout, 8 + length


def _header(metadata: dict[str, str]) -> TraceHeader:
    if HEADER_KEY not in metadata:
        raise TraceError(f"metadata must have the entry {HEADER_KEY}, got {', '.join(sorted(metadata)) or 'none'}")
    try:
        values = json.loads(metadata[HEADER_KEY])
    except ValueError as error:
        raise TraceError(f"metadata {HEADER_KEY} must be JSON, got: {error}") from error
    return TraceHeader.of(values)


def _check_tensors(layout: dict[str, Any]) -> None:
    """Names and types, before anything is mapped; :meth:`Trace.check_shapes` does the shapes."""
    for name in layout:
        if name not in DTYPES:
            raise TraceError(str(unknown_name("tensor", name, DTYPES)))
    for name in REQUIRED:
        if name not in layout:
            raise TraceError(f"tensor {name} must be given, got {', '.join(sorted(layout)) or 'none'}")
    for name, entry in layout.items():
        wanted = _STORED[np.dtype(DTYPES[name]).name]
        if entry["dtype"] != wanted:
            raise TraceError(f"tensor {name} must be {wanted}, got {entry['dtype']}")


def _map(path: Path, offset: int, entry: dict[str, Any], name: str) -> Array:
    """A plain read-only array over the mapped bytes: indexing a ``np.memmap`` itself is several times slower."""
    shape = tuple(entry["shape"])
    if 0 in shape:
        return np.empty(shape, dtype=DTYPES[name])
    start = offset + int(entry["data_offsets"][0])
    return np.memmap(path, dtype=DTYPES[name], mode="r", offset=start, shape=shape).view(np.ndarray)


def _check_digest(trace: Trace, metadata: dict[str, str]) -> None:
    stored = metadata.get(DIGEST_KEY)
    if stored is not None and stored != trace.digest:
        raise TraceError(f"digest must be {stored} as stored, got {trace.digest} (the content was changed)")

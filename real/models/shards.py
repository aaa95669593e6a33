"""The safetensors files of a checkpoint folder: what tensors they hold, and the reading of one, or of a part of one.

Tensors are read, not mapped: what has been read is not counted in the process's memory beside its copy, and takes no
page faults. Format: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from io import BufferedReader
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from traces.errors import InputError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I64": torch.int64}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file, whose bytes begin at ``offset``."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Shards:
    """The tensors in the files of a checkpoint, by their names there; headers alone are in memory."""

    entries: dict[str, Entry]
    _open: dict[Path, BufferedReader] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Shards:
        """The tensors of a folder; raises :class:`InputError` when a file is missing, torn, or lacks a tensor."""
        named = _weight_map(folder)
        entries: dict[str, Entry] = {}
        for path in sorted(set(named.values())) or [folder / SINGLE]:
            if not path.is_file():
                raise InputError(f"{path} must exist, as {INDEX} beside it names it, got no such file")
            entries.update(_header(path))
        for key, path in named.items():
            if key not in entries:
                raise InputError(f"{path} must hold {key}, as {INDEX} says, got a file without it")
        return cls(entries)

    def read(self, key: str, at: int | None = None) -> Tensor:
        """A tensor, or only row ``at`` of its first dimension (which stays, with length 1)."""
        entry = self.entries[key]
        shape = entry.shape if at is None else (1, *entry.shape[1:])
        data = torch.empty(prod(shape) * entry.dtype.itemsize, dtype=torch.uint8)
        if entry.file not in self._open:
            self._open[entry.file] = entry.file.open("rb")
        file = self._open[entry.file]
        file.seek(entry.offset + (at or 0) * len(data))
        if file.readinto(data.numpy().data) != len(data):
            raise InputError(f"{entry.file} must not change while it is read, got an end within {key}")
        return data.view(entry.dtype).view(shape)

    def close(self) -> None:
        """Closes the files; the next reading opens them again."""
        for file in self._open.values():
            file.close()
        self._open.clear()


def _weight_map(folder: Path) -> dict[str, Path]:
    """The file of every tensor by the index of the shards; empty for a checkpoint of one file."""
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise InputError(f"{folder} must hold {SINGLE} or {INDEX}, got neither")
        return {}
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(key): folder / name for key, name in named.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{index} must be JSON with a weight_map, got: {type(error).__name__}: {error}") from error


def _header(path: Path) -> dict[str, Entry]:
    """What a file holds, when the library finds nothing wrong with it; it hides where a tensor begins."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} must be a whole safetensors file, got: {error or type(error).__name__}") from error
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        begin = file.tell()
    header.pop("__metadata__", None)
    for key, one in header.items():
        if one["dtype"] not in DTYPES:
            raise InputError(f"{path}: {key} must be of a dtype among {', '.join(DTYPES)}, got {one['dtype']}")
    return {
        key: Entry(path, begin + one["data_offsets"][0], tuple(one["shape"]), DTYPES[one["dtype"]])
        for key, one in header.items()
    }

"""The recorded traces that ship with the project, by name."""

from __future__ import annotations

from pathlib import Path

from traces.errors import unknown_name

_FOLDER = Path(__file__).parent / "data"

SHIPPED_TRACES: dict[str, Path] = {path.stem: path for path in sorted(_FOLDER.glob("*.safetensors"))}
"""Recordings of the small model; ``moetwin trace record --like FILE`` makes each one again."""


def find_trace(name_or_path: str) -> Path:
    """A file, or a recording that ships, by its name; raises an InputError with the near names when it is neither."""
    path = Path(name_or_path)
    if path.exists() or path.suffix:
        return path
    if name_or_path not in SHIPPED_TRACES:
        raise unknown_name("trace", name_or_path, SHIPPED_TRACES)
    return SHIPPED_TRACES[name_or_path]

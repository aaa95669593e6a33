"""The recorded traces that ship with the project, by name."""

from __future__ import annotations

from pathlib import Path

from traces.errors import InputError, unknown_name

_FOLDER = Path(__file__).parent / "data"

SHIPPED_TRACES: dict[str, Path] = {path.stem: path for path in sorted(_FOLDER.glob("*.safetensors"))}
"""Recordings of the small model; ``moetwin trace record --like FILE`` makes each one again."""


def find_trace(name_or_path: str, field: str = "trace") -> Path:
    """A file, or a recording that ships, by its name; raises an InputError with the near names when it is neither.

    ``field`` is what the error calls it.
    """
    path = Path(name_or_path)
    if path.exists():
        return path
    if path.suffix:
        raise InputError(f"{field} must be an existing file, got {path}")
    if name_or_path not in SHIPPED_TRACES:
        raise unknown_name(field, name_or_path, SHIPPED_TRACES)
    return SHIPPED_TRACES[name_or_path]

"""Files that appear complete or not at all, and never replace another one unasked."""

from __future__ import annotations

import os
from pathlib import Path

from traces.errors import InputError


def check_file(path: Path, *, force: bool, field: str = "out") -> None:
    """Raises InputError when ``path`` is a folder, or a file that exists while ``force`` is not given."""
    if path.is_dir():
        raise InputError(f"{field} must be a file name, got the folder {path}")
    if path.exists() and not force:
        raise InputError(f"{field} must be a new file (or give --force), got {path} that exists")


def write_text(path: Path, text: str, *, force: bool = False, field: str = "out") -> Path:
    """Writes ``text`` under a temporary name beside ``path``, then renames it; its folder is made when missing."""
    check_file(path, force=force, field=field)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            draft.write_text(text, encoding="utf-8")
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{field} must be a place that can be written, got {path} ({error.strerror})") from error
    return path

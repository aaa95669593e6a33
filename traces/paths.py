"""Where a file or a folder can be written, asked before the work whose outcome it is to hold; files that are whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from traces.errors import InputError


def fault_of_target(path: Path) -> str | None:
    """Why nothing can be made at ``path``, or None: its nearest parent that exists must be a folder to write into.

    A path that exists is judged itself when it is a folder, and else by the folder that it is in.
    """
    try:
        return _fault(path.resolve())
    except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
        return getattr(error, "strerror", None) or str(error)


def _fault(path: Path) -> str | None:
    places = path.parents if path.exists() and not path.is_dir() else (path, *path.parents)
    nearest = next(place for place in places if place.exists())
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} may not be written to"


@contextmanager
def whole_file(path: Path, field: str = "out") -> Iterator[Path]:
    """Gives a name beside ``path`` to write under, which becomes ``path`` when the block ends well: a file is there
    complete or not at all. Its folder is made when missing. An OSError in the block becomes :class:`InputError`.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield draft
        draft.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{field} must be a file that can be written, got {path}: {reason}") from error
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)

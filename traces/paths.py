"""Where a file or a folder can be written: asked before the work whose outcome it is to hold."""

from __future__ import annotations

import os
from pathlib import Path


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

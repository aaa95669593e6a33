"""The files that commands of this room write: none replaces another one unasked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from traces.errors import InputError
from traces.paths import whole_file
from traces.store import check_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = (".png", ".svg")


def check_out(path: Path | None, endings: Sequence[str], *, force: bool) -> None:
    """Raises :class:`InputError` when ``path`` has another ending, exists, or cannot be written."""
    if path is None:
        return
    if path.suffix not in endings:
        raise InputError(f"out must end in one of {', '.join(endings)}, got {path}")
    check_target(path, force=force)


def check_file(path: Path, *, force: bool, field: str = "out") -> None:
    """Raises InputError when ``path`` is a folder, or a file that exists while ``force`` is not given."""
    if path.is_dir():
        raise InputError(f"{field} must be a file name, got the folder {path}")
    if path.exists() and not force:
        raise InputError(f"{field} must be a new file (or give --force), got {path} that exists")


def write_text(path: Path, text: str, *, force: bool = False, field: str = "out") -> Path:
    """Writes ``text``, as :func:`check_file` allows it; returns the path."""
    check_file(path, force=force, field=field)
    with whole_file(path, field) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_figure(figure: Figure, path: Path) -> None:
    """Writes a matplotlib figure, by the ending of ``path``."""
    from analysis.style import PAPER

    with whole_file(path) as draft:
        figure.savefig(draft, format=path.suffix[1:], dpi=160, facecolor=PAPER)

"""From folders of measured runs to a judged validation on the disk: what `moetwin validate` and `compare` end with."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import typer
from rich.console import Console
from rich.progress import Progress

from analysis.compare import json_ready
from analysis.measured import PROFILE_FILE, Twin, comparisons, groups_of
from analysis.validation import Tables, figures
from analysis.validation_report import Outcome, cards, point_table, render_html, render_markdown, verdict
from sim.printing import console_for
from sim.results import write_folder
from sim.spec.profile import Profile
from traces.errors import InputError
from traces.paths import whole_file

PAGE = "report.html"
ARCHIVE = ".tar.gz"


class Measured(Protocol):
    """What the measuring half of a validation hands over."""

    folder: Path
    missing: dict[str, list[str]]
    done: int
    total: int
    archive: Path | None
    as_json: bool


def judge(measured: Measured) -> None:
    """Simulates and judges what a validation has measured so far, writes it into its folder, and tells the outcome."""
    folder = measured.folder
    parts = [(path.parent, path) for path in sorted(folder.glob(f"*/{PROFILE_FILE}")) if _has_runs(path.parent)]
    if parts:
        outcome = outcome_of(parts, facts=_facts(folder), missing=_missing(measured))
        write_folder(folder, lambda draft: _write(draft, outcome), force=True)
    if measured.archive is not None:
        pack(folder, measured.archive)
    if parts:
        show(outcome, folder / PAGE, as_json=measured.as_json)
    else:
        _show_nothing(measured)


def _show_nothing(measured: Measured) -> None:
    """Tells that there is nothing to judge, as JSON with the fields of a summary that are known."""
    told = f"nothing to judge yet: {measured.done} of {measured.total} pieces are measured; call again to go on"
    if measured.as_json:
        typer.echo(json.dumps({"complete": False, "missing": [told], "overall": None, "report": None}))
    else:
        typer.echo(told)


def outcome_of(
    parts: Sequence[tuple[Path, Path]],
    *,
    facts: dict[str, str],
    missing: Sequence[str] = (),
    trace: Path | None = None,
    calibration: Path | None = None,
) -> Outcome:
    """Judges every measured run in each (folder, profile); files not given are sought as :class:`Twin` does.

    Runs that cannot be judged are left out, and told on stderr and in the outcome. Raises :class:`InputError` when
    no others are left.
    """
    left_out: dict[str, str] = {}
    work = [(groups_of(folder, left_out), Twin.of(profile, trace, calibration)) for folder, profile in parts]
    points = sum(len(groups) for groups, _ in work) + len(left_out)
    with _bar(points) as advance:
        judged = [one for groups, twin in work for one in comparisons(groups, twin, left_out, advance)]
    if not judged:
        where, reason = next(iter(left_out.items()))
        raise InputError(f"measured must hold runs that can be judged, got none of {points}; {where}: {reason}")
    for where, reason in left_out.items():
        typer.echo(f"left out: {where}: {reason}", err=True)
    tables, profiles = Tables.of(judged), [twin.profile for _, twin in work]
    facts = {**facts, **{f"profile of {one.model.name}": _about(one) for one in profiles}}
    facts |= {f"left out: {where}": reason for where, reason in left_out.items()}
    missing = [*missing, *([_left_out(len(left_out), points)] if left_out else [])]
    return Outcome(tables, figures(tables), facts, profiles[0].device, missing)


def _left_out(count: int, points: int) -> str:
    return f"{count} of {points} points could not be judged and {'was' if count == 1 else 'were'} left out."


def write_report(out: Path, outcome: Outcome, *, force: bool) -> None:
    """Writes the page, the tables and the figures into a folder of their own, complete or not at all."""
    write_folder(out, lambda draft: _write(draft, outcome), force=force)


def show(outcome: Outcome, page: Path, *, as_json: bool) -> None:
    """Prints the outcome, or all figures as one JSON object."""
    if as_json:
        typer.echo(json.dumps({**summary(outcome), "report": str(page)}))
        return
    table = point_table(outcome)
    console = console_for(table)
    console.print(table)
    console.print(verdict(outcome))
    for card in cards(outcome):
        console.print(f"{card.title}: {card.value} ({card.outcome})")
    console.print(f"report: {page}", soft_wrap=True)


def summary(outcome: Outcome) -> dict[str, Any]:
    """What ``summary.json`` holds: the figures, what is missing, and where it comes from; nan becomes None."""
    told = {"complete": not outcome.missing, "missing": list(outcome.missing), "bars": outcome.bars}
    return dict(json_ready({**told, **outcome.figures, "facts": dict(outcome.facts)}))


def pack(folder: Path, archive: Path) -> None:
    """Writes the whole ``folder`` as one ``.tar.gz`` file, complete or not at all; equal content gives equal bytes.

    Left out are hidden files and folders, which are half-written, and archives, this one and others.
    """
    with (
        whole_file(archive, "archive") as draft,
        draft.open("wb") as file,
        gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for path in sorted(folder.rglob("*")):
            inside = path.relative_to(folder)
            if not (path.name.endswith(ARCHIVE) or _is_hidden(inside)):
                tar.add(path, f"{folder.resolve().name}/{inside}", recursive=False, filter=_plain)


def _is_hidden(inside: Path) -> bool:
    return any(part.startswith(".") for part in inside.parts)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def _write(folder: Path, outcome: Outcome) -> None:
    outcome.tables.save(folder)
    (folder / "summary.json").write_text(json.dumps(summary(outcome), indent=1) + "\n", encoding="utf-8")
    (folder / PAGE).write_text(render_html(outcome), encoding="utf-8")
    (folder / "report.md").write_text(render_markdown(outcome), encoding="utf-8")


def _has_runs(folder: Path) -> bool:
    return any(not _is_hidden(path.relative_to(folder)) for path in (folder / "runs").rglob("run.json"))


def _facts(folder: Path) -> dict[str, str]:
    """The environment and the settings of a validation, as its files tell them."""
    found: dict[str, str] = {}
    for name in ("environment.json", "settings.json"):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        told = {key: value for key, value in content.items() if value is not None}
        found |= {key: ", ".join(map(str, v)) if isinstance(v, list) else str(v) for key, v in told.items()}
    return found


def _missing(measured: Measured) -> list[str]:
    if not measured.missing:
        return []
    left = measured.total - measured.done
    models = ", ".join(f"{len(pieces)} of {model}" for model, pieces in measured.missing.items())
    return [f"Not complete: {left} of {measured.total} pieces are missing ({models}); call again to go on."]


def _about(profile: Profile) -> str:
    return f"{profile.name}, measured {profile.date}, digest {profile.digest[:12]}"


@contextmanager
def _bar(steps: int) -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=steps)
        yield lambda: progress.advance(task)

"""``moetwin timeline``: result folders in, a file for a trace viewer out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from analysis.files import check_file
from analysis.timeline import cut, to_perfetto, write_perfetto
from sim.results import RunResult
from traces.errors import InputError

_RANGE = re.compile(r"(?P<one>\d{1,18})|(?P<first>\d{0,18}):(?P<end>\d{0,18})")


def timeline(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Result folders.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("timeline.perfetto.json"),
    steps: Annotated[
        str | None, typer.Option(help="Only these forward passes, as 10:20 (20 left out), 10: or 7.", metavar="RANGE")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Write what GPU, CPU, link and host did as a timeline, for ui.perfetto.dev or chrome://tracing.

    Several runs become several processes, one below the other, each from its own beginning.

    Examples:

      moetwin timeline runs/hybrimoe --out hybrimoe.perfetto.json

      moetwin timeline runs/hybrimoe runs/ktransformers --steps 10:20 --force
    """
    check_file(out, force=force)
    wanted = None if steps is None else steps_of(steps)
    for folder in runs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise InputError(f"out must lie outside the runs that are read, got {out}")
    loaded = [_read(folder, wanted) for folder in runs]
    write_perfetto(out, loaded, force=force)
    slices = sum(event["ph"] == "X" for event in to_perfetto(loaded)["traceEvents"])
    typer.echo(f"timeline: {out} ({slices:,} slices; open it in ui.perfetto.dev)")


def steps_of(text: str) -> range:
    """Reads a range such as ``10:20``, either side open, or one number; raises :class:`InputError`."""
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise InputError(f"steps must be a number or a range such as 10:20, got {text!r}")
    if match["one"]:
        return range(int(match["one"]), int(match["one"]) + 1)
    found = range(int(match["first"] or 0), int(match["end"]) if match["end"] else 10**18)
    if not found:
        raise InputError(f"steps must be a range with a step in it, got {text!r}")
    return found


def _read(folder: Path, steps: range | None) -> RunResult:
    """A run with events, cut to ``steps``; raises :class:`InputError` where nothing is left to show."""
    run = RunResult.load(folder)
    if run.events.empty:
        raise InputError(f"{folder} must hold events (run it without --no-events), got a result without any")
    if steps is None:
        return run
    found = cut(run, steps)
    if found.tokens.empty:
        first, last = run.tokens["step"].min(), run.tokens["step"].max()
        raise InputError(f"steps must be among {first} to {last} of {folder}, got {steps.start}:{steps.stop}")
    return found

"""``moetwin trace slice``, ``concat`` and ``export``: to cut, join and hand on traces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from traces import store
from traces.edit import concat, slice_trace
from traces.errors import unknown_name
from traces.export import export, format_of
from traces.schema import Phase, Trace
from traces.shipped import find_trace

TraceFile = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace file (.safetensors), or the name of one that ships.")
]
Out = Annotated[Path, typer.Option(help="The file to write (.safetensors).")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def slice_command(
    trace: TraceFile,
    out: Out,
    sequences: Annotated[str, typer.Option(help="Sequences: numbers and ranges, as 0:4,7 (0 to 3, and 7).")] = "",
    domains: Annotated[str, typer.Option(help="Only sequences of these domains, separated by commas.")] = "",
    phase: Annotated[str, typer.Option(help="prefill or decode.")] = "",
    layers: Annotated[str, typer.Option(help="MoE layers from 0, as 0:4,7.")] = "",
    steps: Annotated[str, typer.Option(help="Forward passes, as 100:200.")] = "",
    tokens: Annotated[
        int | None, typer.Option(help="The first tokens of each sequence, of what the other choices leave.")
    ] = None,
    force: Force = False,
) -> None:
    """Cut a part out of a trace; choices that are given together all hold.

    Sequences and layers are numbered from 0 again; steps and positions keep their numbers.

    Examples: moetwin trace slice mixed --phase decode --tokens 32 --out short.safetensors

    moetwin trace slice mixed --sequences 0:4,7 --layers 0:2 --out corner.safetensors

    moetwin trace slice mixed --domains python_code,speeches --out two.safetensors
    """
    store.check_trace_target(out, force=force)
    part = slice_trace(
        store.load(find_trace(trace)),
        sequences=sequences,
        domains=[name.strip() for name in domains.split(",")] if domains else (),
        phase=_phase(phase),
        layers=layers,
        steps=steps,
        tokens=tokens,
    )
    _save(part, out, force=force)


def concat_command(
    traces: Annotated[list[str], typer.Argument(metavar="TRACE...", help="Trace files, or names of ones that ship.")],
    out: Out,
    force: Force = False,
) -> None:
    """Put traces of equal dimensions into one, their sequences one after the other.

    What only some of them have (gates, scores, lookahead) is left out, and said on stderr.

    Examples: moetwin trace concat monday.safetensors tuesday.safetensors --out week.safetensors
    """
    store.check_trace_target(out, force=force)
    joined = concat([store.load(find_trace(name)) for name in traces], traces)
    for note in joined.notes:
        typer.echo(f"note: {note}", err=True)
    _save(joined.trace, out, force=force)


def export_command(
    trace: TraceFile,
    out: Annotated[Path, typer.Option(help="The file to write: .csv or .jsonl, or either with .gz behind it.")],
    force: Force = False,
) -> None:
    """Write a trace as text for other tools: one line a token and layer, as CSV or as JSON Lines.

    Examples: moetwin trace export mixed --out mixed.csv

    moetwin trace export mixed --out mixed.jsonl.gz
    """
    format_of(out)
    store.check_target(out, force=force)
    loaded = store.load(find_trace(trace))
    with _bar("writing") as progress:
        lines = export(loaded, out, force=force, progress=progress)
    for name in ("scores", "lookahead"):
        if getattr(loaded, name) is not None:
            typer.echo(f"note: {name} has no place in this format, and is left out", err=True)
    typer.echo(f"{out}: {lines} lines of {len(loaded)} tokens in {loaded.header.layers} layers")


def _phase(name: str) -> Phase | None:
    if not name:
        return None
    phases = {phase.name.lower(): phase for phase in Phase}
    if name not in phases:
        raise unknown_name("phase", name, phases)
    return phases[name]


def _save(trace: Trace, out: Path, *, force: bool) -> None:
    store.save(trace, out, force=force)
    typer.echo(f"{out}: {len(trace)} tokens in {trace.header.layers} layers, digest {trace.digest}")


@contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on stderr, where that is a terminal; it is told what is done and what there is."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

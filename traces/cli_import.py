"""``moetwin trace import``: other people's routing traces."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from traces import store
from traces.errors import InputError, unknown_name
from traces.limits import MOST_EXPERT_BYTES
from traces.paths import whole_file
from traces.schema import NOT_ROUTED, Array

if TYPE_CHECKING:
    from traces.importers import Imported

FORMATS = "gpt-oss-json, esft, router-trace-v2, route-csv, layer-csv, logits-safetensors, csv, jsonl"
"""The names of the importers, which are imported only when the command runs."""

Files = Annotated[
    list[str], typer.Argument(metavar="FILES...", help="Files, folders or glob patterns; read in sorted path order.")
]
TopK = Annotated[
    int | None, typer.Option(min=1, help="Experts of a token: needed for logits, 6 for esft if not given.")
]
ExpertBytes = Annotated[
    str | None,
    typer.Option(
        help="Bytes of an expert: one number, or one a layer: 900,800. Else those of the catalogue's model, or 1."
    ),
]
AsBatch = Annotated[
    bool, typer.Option("--prefill-as-batch", help="A whole prompt is one forward pass, not one a token.")
]
DropIdentical = Annotated[
    bool, typer.Option("--drop-identical-rows", help="Leave out the identical tokens at the start (profiling dummies).")
]
ResidencyOut = Annotated[
    Path | None, typer.Option(help="route-csv: write the other engine's hits and misses to this .parquet, row by row.")
]


def import_command(
    context: typer.Context,
    files: Files,
    name: Annotated[str, typer.Option("--format", help=f"One of {FORMATS}.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    experts: Annotated[int | None, typer.Option(min=1, help="Experts in a layer, where the files lack it.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="MoE layers that there have to be.")] = None,
    top_k: TopK = None,
    expert_bytes: ExpertBytes = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, for the header.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Type of the weights that the bytes count, as bfloat16.")] = None,
    licence: Annotated[str | None, typer.Option(help="Licence of the trace, for the header.")] = None,
    prefill_as_batch: AsBatch = False,
    drop_identical_rows: DropIdentical = False,
    residency_out: ResidencyOut = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object about what was written.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing files.")] = False,
) -> None:
    """Read another tool's recording of a router's choices into a trace.

    A damaged file is refused with its name and row. What the files do not say, and was assumed, is told on stderr: the
    experts and their bytes are the catalogue's where the model is in it (gpt-oss-json: by its layers and top-k).

    Examples: moetwin trace import --format gpt-oss-json recordings --experts 32 --out t.safetensors

    moetwin trace import --format esft tasks --expert-bytes 17301504 --model deepseek-v2-lite --out esft.safetensors

    moetwin trace import --format route-csv run.csv.gz --residency-out hits.parquet --out run.safetensors

    moetwin trace import --format csv routing.csv --experts 64 --out routing.safetensors
    """
    from traces.importers import IMPORTERS, Options, collect, import_files

    _check_targets(name, out, residency_out, force=force)
    if name not in IMPORTERS:
        raise unknown_name("format", name, IMPORTERS)
    sources = collect(files, IMPORTERS[name])
    options = Options(
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=None if expert_bytes is None else _sizes(expert_bytes),
        model=model,
        dtype=dtype,
        licence=licence,
        prefill_as_batch=prefill_as_batch,
        drop_identical_rows=drop_identical_rows,
    )
    with _progress(sources) as advance:
        imported = import_files(name, sources, options, advance=advance, catalogue=context.obj() if context.obj else {})
    store.save(imported.trace, out, force=force)
    if residency_out is not None:
        _save_residency(imported.residency, residency_out)
    _report(imported, len(sources), out, as_json=as_json)


def _check_targets(name: str, out: Path, residency_out: Path | None, *, force: bool) -> None:
    store.check_trace_target(out, force=force)
    if residency_out is None:
        return
    if name != "route-csv":
        raise InputError(f"residency_out must be left out for {name}, which has no record of hits, got {residency_out}")
    if residency_out.suffix != ".parquet" or residency_out == out:
        raise InputError(f"residency_out must be a .parquet file, got {residency_out}")
    store.check_target(residency_out, force=force)


def _sizes(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(_is_size(part.strip()) for part in parts):
        rule = f"a whole number from 1 to {MOST_EXPERT_BYTES}, or one for each layer with commas"
        raise InputError(f"expert_bytes must be {rule}, got {text!r}")
    return tuple(int(part) for part in parts)


def _is_size(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,18}", text)) and 1 <= int(text) <= MOST_EXPERT_BYTES


@contextmanager
def _progress(files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr over the bytes of the files."""
    columns = (TextColumn("importing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("importing", total=sum(file.stat().st_size for file in files))
        yield lambda count: bar.advance(task, count)


def _save_residency(columns: dict[str, Array], path: Path) -> None:
    """Writes the columns as Parquet."""
    import pandas as pd

    with whole_file(path, "residency-out") as draft:
        pd.DataFrame(columns).to_parquet(draft, index=False)


def _report(imported: Imported, files: int, out: Path, *, as_json: bool) -> None:
    trace, header = imported.trace, imported.trace.header
    for note in imported.notes:
        typer.echo(note, err=True)
    record: dict[str, Any] = {
        "file": str(out),
        "model": header.model,
        "files": files,
        "tokens": len(trace),
        "sequences": len(set(trace.sequence.tolist())),
        "assignments": int((trace.expert_ids != NOT_ROUTED).sum()),
        "layers": header.layers,
        "experts": header.experts,
        "top_k": header.top_k,
        "digest": trace.digest,
        "notes": imported.notes,
    }
    if as_json:
        typer.echo(json.dumps(record))
        return
    typer.echo(
        f"{out}: {record['tokens']} tokens in {record['sequences']} sequences, {record['assignments']} assignments, "
        f"{header.layers} x {header.experts}, top-{header.top_k}, digest {trace.digest}"
    )

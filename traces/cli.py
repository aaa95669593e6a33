"""The sub-commands of ``moetwin trace`` that need no model: info, check, synth."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from traces import cli_edit, cli_import, store, synthetic
from traces.errors import InputError, unknown_name
from traces.limits import MOST_EXPERT_BYTES
from traces.schema import TraceError, TraceHeader
from traces.shipped import find_trace
from traces.stats import summary

app = typer.Typer(help="Look at, check and generate routing traces.", no_args_is_help=True)

MOST_SEED = 2**63 - 1

TraceFile = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace file (.safetensors), or the name of one that ships.")
]


@app.command()
def info(
    trace: TraceFile,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a trace holds: model, tokens, arrays, and the locality and balance of its routing.

    Examples: moetwin trace info mixed

    moetwin trace info trace.safetensors --json
    """
    file = find_trace(trace)
    loaded = store.load(file)
    record = {"file": str(file), "file_bytes": file.stat().st_size, **summary(loaded)}
    for note in store.notes_on(loaded, file):
        typer.echo(f"note: {note}", err=True)
    if as_json:
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
        return
    console = Console()
    console.print(_overview(record))
    console.print(_by_layer(record))


@app.command()
def check(
    context: typer.Context,
    trace: TraceFile,
    model: Annotated[
        str | None,
        typer.Option(help="Also require this model: its name in the header, or layers x experts x top-k as 8x32x4."),
    ] = None,
) -> None:
    """Check every value and the digest of a trace; the exit code is 2 when something is wrong.

    Examples: moetwin trace check trace.safetensors

    moetwin trace check trace.safetensors --model 8x32x4
    """
    file = find_trace(trace)
    loaded = store.load(file, verify=True)
    if model is not None:
        try:
            catalogue = context.obj() if context.obj else ()  # which this room does not know; the root brings it
            require_model(loaded.header, model, catalogue)
        except TraceError as error:
            raise TraceError(f"{file}: {error}") from error
    verified = "digest matches" if store.stored_digest(file) else "no digest stored"
    typer.echo(f"{file}: ok, {len(loaded)} tokens of {loaded.header.model}, {verified} ({loaded.digest})")


@app.command()
def synth(
    generator: Annotated[str, typer.Argument(help=f"One of {', '.join(synthetic.GENERATORS)}.")],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all random draws.")] = 0,
    sequences: Annotated[int, typer.Option(help="Sequences.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Prefill tokens of a sequence.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Decode tokens of a sequence.")] = 64,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 8,
    experts: Annotated[int, typer.Option(help="Experts in a layer.")] = 32,
    top_k: Annotated[int, typer.Option(help="Experts of a token in a layer.")] = 4,
    expert_bytes: Annotated[str, typer.Option(help="Bytes of an expert: one number, or one a layer: 900,800.")] = (
        "1048576"
    ),
    skew: Annotated[float, typer.Option(help="Exponent of the Zipf popularity; 0 is uniform.")] = 1.0,
    scores: Annotated[bool, typer.Option("--scores", help="Add the router's full scores.")] = False,
    lookahead: Annotated[int, typer.Option(help="Layers that are predicted ahead; 0 for none.")] = 0,
    lookahead_recall: Annotated[float, typer.Option(help="Share of true experts among the predicted.")] = 0.9,
    period: Annotated[int | None, typer.Option(help="phase_change: tokens until the popularity changes.")] = None,
    locality: Annotated[float | None, typer.Option(help="markov: probability that an expert is kept.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Generate a synthetic trace, which is marked as such in its header.

    Examples: moetwin trace synth zipf --out zipf.safetensors

    moetwin trace synth markov --locality 0.6 --layers 12 --experts 64 --top-k 6 --out local.safetensors

    moetwin trace synth phase_change --period 128 --lookahead 3 --scores --seed 7 --out phases.safetensors
    """
    store.check_trace_target(out, force=force)
    sizes = synthetic.Sizes(
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        layers=layers,
        experts=experts,
        top_k=top_k,
        expert_bytes=_expert_bytes(expert_bytes),
        skew=skew,
        scores=scores,
        lookahead=lookahead,
        lookahead_recall=lookahead_recall,
    )
    own = {name: value for name, value in (("period", period), ("locality", locality)) if value is not None}
    trace = synthetic.generate(generator, seed, sizes, **own)
    store.save(trace, out, force=force)
    typer.echo(f"{out}: {len(trace)} tokens, digest {trace.digest}")


app.command("slice")(cli_edit.slice_command)
app.command("concat")(cli_edit.concat_command)
app.command("export")(cli_edit.export_command)
app.command("import")(cli_import.import_command)


def require_model(header: TraceHeader, model: str, names: Iterable[str] = ()) -> None:
    """Raises :class:`TraceError` unless the header is of ``model``: a name, or ``LAYERSxEXPERTSxTOP_K``.

    ``names`` are those of a catalogue: a name that is neither there nor in the header is told with the near ones.
    """
    dims = f"{header.layers}x{header.experts}x{header.top_k}"
    by_size = re.fullmatch(r"\d+x\d+x\d+", model)
    if model == (dims if by_size else header.model):
        return
    known = {*names}
    if known and not by_size and model not in known:
        raise unknown_name("model", model, known | {header.model})
    raise TraceError(f"model must be {model}, got {header.model} ({dims})")


def _expert_bytes(text: str) -> int | tuple[int, ...]:
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,18}", part.strip()) for part in parts):
        rule = f"a whole number up to {MOST_EXPERT_BYTES}, or one for each layer with commas"
        raise InputError(f"expert-bytes must be {rule}, got {text!r}")
    values = tuple(int(part) for part in parts)
    return values[0] if len(values) == 1 else values


def _overview(record: dict[str, Any]) -> Table:
    header, tokens = record["header"], record["tokens"]
    sizes = sorted(set(header["expert_bytes"]))
    rows = {
        "file": f"{record['file']} ({record['file_bytes']:,} bytes)",
        "model": " ".join(part for part in (header["model"], header["revision"]) if part),
        "synthetic": "yes" if header["synthetic"] else "no",
        "made by": header["made_by"],
        "licence": header["licence"],
        "software": ", ".join(f"{name} {version}" for name, version in header["software"].items()),
        "layers x experts, top-k": f"{header['layers']} x {header['experts']}, {header['top_k']}",
        "expert bytes": f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}",
        "tokens": f"{tokens['total']:,} ({tokens['prefill']:,} prefill, {tokens['decode']:,} decode)",
        "forward passes": f"{record['steps']:,}",
        "sequences": f"{record['sequences']:,}",
        "domains": ", ".join(dict.fromkeys(header["domains"])),
        "arrays": ", ".join(f"{name} {shape}" for name, shape in record["arrays"].items()),
        "look-ahead by": "the residual router" if header["lookahead_router"] == "residual" else "",
        "digest": record["digest"],
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            table.add_row(name, value.replace("[", r"\["))
    return table


def _by_layer(record: dict[str, Any]) -> Table:
    layers = record["layers"]
    table = Table(box=None, pad_edge=False, header_style="bold")
    overlap = f"overlap (chance {record['chance_overlap']:.3f})"
    for title in ("layer", overlap, "max/mean load", "experts a prefill pass", "experts a decode pass"):
        table.add_column(title, justify="right")
    for layer, values in enumerate(zip(*layers.values(), strict=True)):
        table.add_row(str(layer), *(_number(value) for value in values))
    means = ([value for value in values if value is not None] for values in layers.values())
    table.add_section()
    table.add_row("mean", *(_number(math.fsum(values) / len(values) if values else None) for values in means))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""``moetwin trace like``: synthetic routing in the manner of a recorded trace, at the dimensions of any model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sim.printing import console_for
from sim.spec import ModelSpec, catalogue
from traces import store
from traces.errors import InputError
from traces.fit import fit, likeness
from traces.fitted import Law, generate
from traces.portrait import LABELS, Portrait, portrait
from traces.schema import Trace, WeightDtype
from traces.shipped import find_trace
from traces.synthetic import Shape, within

MOST_SEED = 2**63 - 1


def like(
    trace: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A recorded trace, or the name of one that ships.", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="The file to write (.safetensors).")],
    model: Annotated[str | None, typer.Option(help="Dimensions of this model of the catalogue, or TOML file.")] = None,
    layers: Annotated[int | None, typer.Option(help="MoE layers.", show_default="the source's")] = None,
    experts: Annotated[int | None, typer.Option(help="Experts in a layer.", show_default="the source's")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts of a token in a layer.", show_default="the source's")
    ] = None,
    expert_bytes: Annotated[int | None, typer.Option(help="Bytes of an expert.", show_default="the source's")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(help="Prefill tokens of a sequence.")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Decode tokens of a sequence.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of all random draws.")] = 0,
    scores: Annotated[
        bool | None,
        typer.Option("--scores/--no-scores", help="The router's full scores.", show_default="as the source"),
    ] = None,
    lookahead_recall: Annotated[
        str | None,
        typer.Option(
            help="Recall 1, 2, ... layers ahead, as 0.9,0.8; none for no look-ahead.", show_default="the source's"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a table.")] = False,
) -> None:
    """Generate routing for any model that is like that of a recorded trace; it is marked as synthetic.

    Popularity, what neighbours share, what layers tell of one another, and what a batch needs together are measured on
    SOURCE and carried over. The table shows each in the source, in what is generated at the source's dimensions (how
    good the fit is), and in what was written.

    Examples:

      moetwin trace like mixed --model qwen2-57b-a14b --out qwen2.safetensors

      moetwin trace like mixed --layers 24 --experts 96 --top-k 6 --lookahead-recall 0.9,0.8 --out other.safetensors
    """
    store.check_trace_target(out, force=force)
    spec = _spec(model, layers=layers, experts=experts, top_k=top_k, expert_bytes=expert_bytes)
    recalls = _recalls(lookahead_recall)
    source = store.load(find_trace(trace))
    dimensions = _dimensions(source, spec, layers=layers, experts=experts, top_k=top_k, expert_bytes=expert_bytes)
    shape = Shape(sequences=sequences, prompt_tokens=prompt_tokens, new_tokens=new_tokens, **dimensions)
    with Console(stderr=True).status("measuring") as status:
        law = fit(source, np.random.default_rng(0), say=lambda what: status.update(f"fitting {what}"))
        status.update("generating")
        made = generate(_changed(law, scores, recalls), seed, shape, dtype=_dtype(source, spec))
        if spec is not None:
            made = replace(made, header=made.header.model_copy(update={"model": spec.name}))
        status.update("comparing")
        portraits = (*likeness(law, np.random.default_rng(0), source), portrait(made))
    store.save(made, out, force=force)
    _tell(out, made, law, portraits, as_json=as_json)


def _changed(law: Law, scores: bool | None, recalls: tuple[float, ...] | None) -> Law:
    """``law`` with or without scores, and with look-ahead of these recalls; None leaves it as it is."""
    return replace(
        law,
        scores=law.scores if scores is None else scores,
        lookahead_recall=law.lookahead_recall if recalls is None else recalls,
    )


def _spec(model: str | None, **given: int | None) -> ModelSpec | None:
    if model is None:
        return None
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name.replace('_', '-')} must not be given together with model, got {value} and {model}")
    return catalogue.find_model(model)


def _dimensions(source: Trace, spec: ModelSpec | None, **given: int | None) -> dict[str, Any]:
    """Layers, experts, top_k and expert_bytes: of the model, or as given, or else the source's."""
    if spec is not None:
        return {
            "layers": spec.moe_layers,
            "experts": spec.experts,
            "top_k": spec.top_k,
            "expert_bytes": spec.expert_bytes,
        }
    header = source.header
    same = given["layers"] in (None, header.layers)
    own = {
        "layers": header.layers,
        "experts": header.experts,
        "top_k": header.top_k,
        "expert_bytes": header.expert_bytes if same else max(header.expert_bytes),
    }
    return own | {name: value for name, value in given.items() if value is not None}


def _dtype(source: Trace, spec: ModelSpec | None) -> WeightDtype:
    """The dtype for the header; a header knows no smaller one than of 16 bits."""
    if spec is None:
        return source.header.dtype
    names: dict[str, WeightDtype] = {name: name for name in get_args(WeightDtype)}
    return names.get(spec.dtype, "bf16")


def _recalls(text: str | None) -> tuple[float, ...] | None:
    """Reads ``0.9,0.8`` or ``none``; raises :class:`InputError` for anything else."""
    if text is None:
        return None
    if text.strip() == "none":
        return ()
    try:
        recalls = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"lookahead-recall must be shares with commas as 0.9,0.8, or none, got {text!r}") from None
    for recall in recalls:
        within("lookahead_recall", recall, 0.0, 1.0)
    return recalls


def _tell(out: Path, made: Trace, law: Law, portraits: tuple[Portrait, ...], *, as_json: bool) -> None:
    names = ("source", "like_source", "written")
    if as_json:
        record = {"file": str(out), "digest": made.digest, "synthetic": True, "law": asdict(law)}
        record |= {"statistics": dict(zip(names, portraits, strict=True))}
        typer.echo(json.dumps(record, indent=2, allow_nan=False))
        return
    table = _table(made, portraits)
    console_for(table).print(table)
    typer.echo(f"{out}: {len(made)} tokens, synthetic, digest {made.digest}")


def _table(made: Trace, portraits: tuple[Portrait, ...]) -> Table:
    header = made.header
    dims = f"{header.layers}x{header.experts}x{header.top_k}"
    table = Table("statistic", box=None, pad_edge=False, header_style="bold")
    for title in ("source", "generated, same size", f"written, {dims}"):
        table.add_column(title, justify="right")
    for name, words in LABELS.items():
        values = [one[name] for one in portraits]
        if any(value is not None for value in values):
            table.add_row(words, *("-" if value is None else f"{value:.3f}" for value in values))
    return table

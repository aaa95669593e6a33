"""MRS against LRU, HybriMoE's score-aware cache against the usual one: published hit rates beside replayed ones.

    python -m benchmarks.hit_rates [TRACE ...]

Shares of all assignments that are there, of the decode tokens where a trace has any, at 25, 50 and 75 % of the experts
of each layer, under both meanings of a hit (`docs/replay.md`): all experts of a token are looked up at once, or one by
one, so that what the first loads may drive out the next. Routing: `mixed`, the recording that ships; synthetic routing
in its manner at the dimensions of the paper's models; uniform routing, by which a hit rate at 25 % has to be 25 %. A
sweep then changes what lasts from token to token. With TRACE, only those are replayed; MRS falls back on the gates of
the chosen experts where a trace has no full scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.halves import shape_of
from benchmarks.pages import empty_table
from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from sim.replay.settings import Contract
from sim.spec import catalogue
from traces import store, synthetic
from traces.fit import fit
from traces.fitted import Law, generate
from traces.locality import overlap_profile, popularity_overlap
from traces.schema import Phase, Trace
from traces.shipped import find_trace

MODELS = ("mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite")
CACHES = ("25%", "50%", "75%")
CONTRACTS: tuple[Contract, ...] = ("atomic", "serial")
SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 8, 32, 48
SWEPT = MODELS[2]
LONGER_ALPHA = 0.2
"""A weight of the newest scores with which MRS remembers some five tokens in place of two."""
PUBLISHED = {
    ("mixtral-8x7b", "25%"): (36.2, 30.2),
    ("deepseek-v2-lite", "25%"): (52.7, 47.7),
    ("qwen2-57b-a14b", "25%"): (52.8, 45.0),
    ("mixtral-8x7b", "75%"): (83.3, 80.6),
}
"""Percent of hits under MRS and LRU."""
NO_MEMORY: dict[str, Any] = {"domain": 0.0, "place": 0.0, "sequence": 0.0, "windows": ()}
SWEEP: dict[str, tuple[dict[str, Any], float]] = {
    "as fitted to `mixed`": ({}, 1.0),
    "nothing lasts": (NO_MEMORY, 1.0),
    "2 tokens share half of the vector": (NO_MEMORY | {"windows": ((2, 0.5),)}, 1.0),
    "32 tokens share half of it": (NO_MEMORY | {"windows": ((32, 0.5),)}, 1.0),
    "a sequence shares 0.3 of it": (NO_MEMORY | {"sequence": 0.3}, 1.0),
    "nothing lasts, popularity 20 times as uneven": (NO_MEMORY, 20.0),
    "as fitted, popularity 20 times as uneven": ({}, 20.0),
}
"""Fields of the law that are changed, and by how much its biases, which make experts popular, are multiplied."""

Row = dict[str, Any]


def main(
    traces: Annotated[list[Path] | None, typer.Argument(help="Traces, in place of the routing here.")] = None,
) -> None:
    """Replays, and prints the tables."""
    if traces:
        print(shown_rates(rates({path.stem: store.load(path) for path in traces})))
        return
    law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
    print(shown(measured(law)))


def measured(law: Law) -> dict[str, list[Row]]:
    """Hit rates on all routing, and the sweep, ready for JSON."""
    return {"rates": rates(routings(law)), "sweep": swept(law)}


def routings(law: Law) -> dict[str, Trace]:
    """The recording, and for each model the routing like it and a uniform one."""
    shapes = {model: shape_of(catalogue.model(model), SEQUENCES, PROMPT_TOKENS, NEW_TOKENS) for model in MODELS}
    alike = {model: generate(law, 0, shape, dtype="bfloat16") for model, shape in shapes.items()}
    return {**alike, "mixed": store.load(find_trace("mixed")), f"uniform, {SWEPT}": uniform(SWEPT)}


def uniform(model: str) -> Trace:
    """Independent tokens, whose experts are all as likely, at the dimensions of a model."""
    shape = shape_of(catalogue.model(model), SEQUENCES, PROMPT_TOKENS, NEW_TOKENS)
    sizes = synthetic.Sizes(**{name: getattr(shape, name) for name in shape.__slots__}, skew=0.0, scores=True)
    return synthetic.generate("zipf", 0, sizes)


def rates(traces: Mapping[str, Trace]) -> list[Row]:
    """Percent of hits under MRS and LRU, for each trace and cache, under both contracts."""
    return [
        {"routing": name, "cache": cache, **{contract: pair(trace, cache, contract) for contract in CONTRACTS}}
        for name, trace in traces.items()
        for cache in CACHES
    ]


def pair(trace: Trace, cache: str, contract: Contract, alpha: float = 0.5) -> list[float]:
    """Percent of hits under MRS and under LRU."""
    options: dict[str, dict[str, Any]] = {"mrs": {"alpha": alpha}, "lru": {}}
    phase = "decode" if (trace.phase == Phase.DECODE).any() else "all"
    capacity = Capacity.slots(cache, trace.header, "layer")
    settings = (Settings(policy, capacity, contract=contract, options=own) for policy, own in options.items())
    return [100 * replay(Feed.of(trace), one).row(phase)["hit_ratio_assignments"] for one in settings]


def swept(law: Law) -> list[Row]:
    """At 25 %: how many points MRS is above LRU, by what lasts from token to token."""
    shape, rows = shape_of(catalogue.model(SWEPT), SEQUENCES, PROMPT_TOKENS, NEW_TOKENS), []
    for name, (change, uneven) in SWEEP.items():
        changed = replace(law, bias=tuple(uneven * bias for bias in law.bias), **change)
        trace = generate(changed, 0, shape, dtype="bfloat16")
        ways: dict[str, tuple[Contract, float]] = {
            "atomic": ("atomic", 0.5),
            "longer": ("atomic", LONGER_ALPHA),
            "serial": ("serial", 0.5),
        }
        row: Row = {"routing": name, "neighbours": float(np.mean(overlap_profile(trace, (1,))))}
        row["any two"] = float(np.mean(popularity_overlap(trace)))
        rows.append(row | {way: pair(trace, CACHES[0], *how) for way, how in ways.items()})
    return rows


def shown(figures: Mapping[str, list[Row]]) -> str:
    """The tables of :func:`measured`."""
    return f"{shown_rates(figures['rates'])}\n{shown_sweep(figures['sweep'])}"


def shown_rates(rows: Iterable[Row]) -> str:
    """MRS, LRU and points between them, under both contracts, and as published."""
    heads = ("cache", "all at once", "one by one", "published")
    table = empty_table("Percent of hits: MRS / LRU, points between them", "routing", *heads)
    for row in rows:
        published = PUBLISHED.get((row["routing"], row["cache"]))
        table.add_row(row["routing"], row["cache"], *map(_cell, (row["atomic"], row["serial"], published)))
    return _text(table)


def shown_sweep(rows: Iterable[Row]) -> str:
    """Points of MRS over LRU by overlap."""
    heads = ("neighbours\nshare", "any two\nshare", "at once", f"at once,\nalpha {LONGER_ALPHA}")
    title = f"Points of MRS over LRU at 25 %, {SWEPT}, by what lasts"
    table = empty_table(title, "routing", *heads, "one by one")
    for row in rows:
        points = [f"{row[way][0] - row[way][1]:+.1f}" for way in ("atomic", "longer", "serial")]
        table.add_row(row["routing"], f"{row['neighbours']:.2f}", f"{row['any two']:.2f}", *points)
    return _text(table)


def _cell(found: Iterable[float] | None) -> str:
    if found is None:
        return "-"
    mrs, lru = found
    return f"{mrs:.1f} / {lru:.1f} {mrs - lru:+.1f}"


def _text(table: Table) -> str:
    console = Console(width=100, file=StringIO(), record=True)
    console.print(table, highlight=False)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


if __name__ == "__main__":
    typer.run(main)

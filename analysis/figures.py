"""The figures of a report: which ones a comparison can show, of which step and layer, and how each is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.figure import Figure

from analysis import plots, text
from analysis.compare import Comparison
from analysis.frames import layer_frame
from analysis.overlay import timeline_overlay
from analysis.residency import residency, residency_map
from analysis.svg import inline_svg
from sim.results import RunResult
from traces.schema import Phase, Trace

SHOWN_STEPS = 60
"""Steps at most that the map of the cache shows."""


@dataclass(frozen=True)
class FigureEntry:
    """One figure of the page: an SVG element, a title and one sentence on how to read it."""

    name: str
    svg: str
    title: str
    caption: str


def report_figures(
    comparison: Comparison, measured: RunResult, simulated: RunResult, trace: Trace | None
) -> list[FigureEntry]:
    """Every figure for which the runs hold the data, in the order of the page."""
    drawn = _drawn(comparison, measured, simulated, trace)
    return [
        FigureEntry(name, inline_svg(figure, name, f"{title}. {caption}"), title, caption)
        for name, figure, title, caption in drawn
    ]


def _drawn(
    comparison: Comparison, measured: RunResult, simulated: RunResult, trace: Trace | None
) -> Iterator[tuple[str, Figure, str, str]]:
    yield (
        "latency",
        plots.token_latency(comparison.tokens),
        "Time of every token",
        "Each point is one decode token; where the lines part, the simulation is wrong, and dotted lines start a new "
        "sequence.",
    )
    yield (
        "components",
        plots.components(comparison.critical()),
        "Where the time goes",
        "The mean decode token cut into the parts that follow one another; equal totals with unequal parts would mean "
        "that errors cancel.",
    )
    yield (
        "errors",
        plots.error_distribution(comparison.tokens["error"].to_list(), comparison.noise),
        "How wrong a token is",
        "The share of tokens (up) whose error is at most so much (right): the further left the curve, the better"
        + ("; the shaded part is the noise of the measurement." if comparison.noise == comparison.noise else "."),
    )
    yield from _timeline(comparison, measured, simulated)
    yield from _cache(comparison, measured)
    if trace is not None:
        yield (
            "popularity",
            plots.expert_popularity(trace.expert_ids, trace.header.experts),
            "What the router likes",
            "Load of every expert in the trace, prefill included; 1 is an even share, and bright experts are worth "
            "keeping.",
        )


def _timeline(
    comparison: Comparison, measured: RunResult, simulated: RunResult
) -> Iterator[tuple[str, Figure, str, str]]:
    step = typical_step(comparison, measured, simulated)
    if step is None:
        return
    error = float(comparison.tokens.loc[comparison.tokens["step"] == step, "error"].iloc[0])
    yield (
        "timeline",
        timeline_overlay(measured, simulated, step),
        "One step on both clocks",
        f"Step {step}, whose error of {text.percent(error, signed=True)} is nearest to the median: measured work in "
        "the upper half of each row, simulated in the lower; thin lines start a layer.",
    )


def typical_step(comparison: Comparison, measured: RunResult, simulated: RunResult) -> int | None:
    """The decode step with events on both clocks whose absolute error is nearest to the median; the first of equals."""
    recorded = set(measured.events["step"]) & set(simulated.events["step"])
    tokens = comparison.tokens[comparison.tokens["step"].isin(recorded)]
    if tokens.empty:
        return None
    distance = (tokens["error"].abs() - comparison.error.median).abs()
    return int(tokens.loc[distance.idxmin(), "step"])


def _cache(comparison: Comparison, measured: RunResult) -> Iterator[tuple[str, Figure, str, str]]:
    layers = layer_frame(measured)
    equal = all(check.exact for check in comparison.decisions.checks)
    yield (
        "hits",
        plots.hits_by_layer(layers, "measured = simulated" if equal else "measured"),
        "Hits by layer",
        "Of the distinct experts that a layer asked for while decoding, the share that was resident; the line is the "
        "ratio over all layers.",
    )
    if measured.operations.empty:
        return
    layer, steps, experts = typical_layer(layers), shown_steps(measured), expert_count(measured)
    cells = residency_map(measured.operations, layer, experts, steps, capacity_slots=measured.info.capacity_slots)
    yield (
        "residency",
        residency(cells, steps),
        f"What the cache did in layer {layer}",
        "Each row is an expert, each column a decode step; in solid blue an expert was kept and used again, where it "
        "stays faint until it goes it was kept in vain.",
    )


def typical_layer(layers: pd.DataFrame) -> int:
    """The layer whose hit ratio is nearest to the mean of the layers; the first of equals."""
    ratios = layers["hit_ratio"].fillna(0.0)
    return int(layers.loc[(ratios - ratios.mean()).abs().idxmin(), "layer"])


def shown_steps(run: RunResult) -> range:
    """The longest run of consecutive decode steps, its first :data:`SHOWN_STEPS`; the earliest of equals."""
    steps = run.tokens.loc[run.tokens["phase"] == Phase.DECODE, "step"].drop_duplicates().sort_values()
    groups = steps.groupby((steps.diff() != 1).cumsum()).agg(["min", "count"])
    first, count = groups.loc[groups["count"].idxmax()]
    return range(int(first), int(first) + min(int(count), SHOWN_STEPS))


def expert_count(run: RunResult) -> int:
    """Experts a layer as far as the operation log shows: the highest one it names, plus 1."""
    return int(run.operations["expert"].max()) + 1

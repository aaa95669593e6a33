"""One function a figure: tables in, a matplotlib Figure out. Nothing is shown, and no global state is used."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import ecdf

from analysis import metrics, text
from analysis.compare import ComponentError
from analysis.style import (
    COMPONENT_COLOURS,
    GRID,
    HALF,
    INK,
    MEASURED,
    MUTED,
    PAPER,
    SIMULATED,
    TEXT_PT,
    WIDE,
    axes,
    legend,
)

SMALL = TEXT_PT - 1
CLOCKS = {"measured": MEASURED, "simulated": SIMULATED}


def token_latency(tokens: pd.DataFrame) -> Figure:
    """Latency of every decode token in ms on both clocks, from ``Comparison.tokens``; a thin line starts a sequence."""
    figure, ax = axes(WIDE, 2.9, x="decode token (index)", y="latency (ms)")
    place = np.arange(len(tokens))
    marker = "o" if len(tokens) <= 40 else ""
    for (clock, colour), width in zip(CLOCKS.items(), (2.4, 1.1), strict=True):
        values = tokens[f"{clock}_s"].to_numpy(float) * 1e3
        ax.plot(place, values, color=colour, linewidth=width, marker=marker, markersize=2 + width, label=clock)
    new = ~tokens["sequence"].duplicated() & (tokens["step"] != tokens["step"].min())
    if new.sum() <= 40:
        for change in place[new]:
            ax.axvline(change - 0.5, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    high = float(tokens[["measured_s", "simulated_s"]].to_numpy(float).max()) * 1e3
    ax.set_ylim(0, high * 1.06)
    ax.set_xlim(-0.5, max(len(tokens) - 0.5, 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(ax, columns=2)
    return figure


def components(parts: Sequence[ComponentError]) -> Figure:
    """Mean time of a decode token in ms by critical-path component: one stacked bar a clock.

    ``parts`` are those of ``Comparison.critical()``. A component below zero (rounding of the clock) draws no bar.
    """
    figure, ax = axes(WIDE, 1.9, x="mean time of a decode token (ms)")
    totals = [sum(getattr(part, f"{clock}_ms") for part in parts) for clock in CLOCKS]
    left = np.zeros(len(CLOCKS))
    for part in parts:
        widths = np.maximum([part.measured_ms, part.simulated_ms], 0.0)
        colour = COMPONENT_COLOURS[part.name]
        bars = ax.barh(
            list(CLOCKS), widths, left=left, height=0.62, color=colour, label=part.label, edgecolor=PAPER, linewidth=0.8
        )
        shown = [text.number(width) if width > 0.055 * max(totals) else "" for width in widths]
        ax.bar_label(bars, shown, label_type="center", fontsize=SMALL, color="black")
        left = left + widths
    for row, total in enumerate(totals):
        ax.text(left[row] + 0.008 * max(totals), row, text.number(total, "ms"), va="center", fontsize=SMALL, color=INK)
    ax.set_xlim(0, left.max() * 1.1)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.tick_params(axis="y", length=0, labelsize=TEXT_PT)
    legend(ax, columns=len(parts))
    return figure


def error_distribution(errors: Sequence[float], noise: float = float("nan")) -> Figure:
    """Empirical distribution of the absolute per-token error (signed shares in), with p50, p90 and the noise floor."""
    percent = np.abs(np.asarray(errors, dtype=np.float64)) * 100
    figure, ax = axes(HALF, 2.9, x="absolute error of a token (%)", y="share of tokens (%)")
    steps = ecdf(percent).cdf
    x = np.concatenate(([0.0], steps.quantiles))
    ax.step(x, np.concatenate(([0.0], steps.probabilities * 100)), where="post", color=MEASURED, linewidth=1.6)
    for rank in (50, 90):
        value = metrics.percentile(percent, rank)
        ax.plot([0, value, value], [rank, rank, 0], color=MUTED, linewidth=0.8, linestyle=(0, (3, 2)))
        ax.plot([value], [rank], "o", color=MEASURED, markersize=4)
        ax.annotate(
            f"p{rank}: {text.number(value)}%",
            (value, rank),
            xytext=(6, -10),
            textcoords="offset points",
            fontsize=SMALL,
            color=INK,
        )
    right = max(float(percent.max()) * 1.08, 0.1)
    if np.isfinite(noise):
        right = max(right, noise * 100 * 1.15)
        ax.axvspan(0, noise * 100, color=GRID, linewidth=0, zorder=0)
        ax.set_title(f"shaded: repeat noise {text.number(noise * 100)}%", loc="left", fontsize=SMALL, color=MUTED)
    ax.set_xlim(0, right)
    ax.set_ylim(0, 101)
    return figure


def hits_by_layer(layers: pd.DataFrame, label: str = "measured = simulated") -> Figure:
    """Hit ratio (by union) of every layer as bars, from a layer frame, with the ratio over all layers as a line."""
    figure, ax = axes(HALF, 2.9, x="MoE layer", y="hit ratio (%)")
    ratios = layers["hit_ratio"].to_numpy(float) * 100
    place = layers["layer"].to_numpy(int)
    bars = ax.bar(place, ratios, width=0.72, color=MEASURED)
    if len(layers) <= 16:
        for bar, value in zip(bars, ratios, strict=True):
            ax.annotate(
                f"{value:.0f}",
                (bar.get_x() + bar.get_width() / 2, 0),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=SMALL,
                color=PAPER,
            )
    mean = metrics.hit_ratio_union(layers) * 100
    ax.axhline(mean, color=INK, linewidth=1.1, linestyle=(0, (4, 2)))
    ax.set_title(f"{label}; all layers {mean:.1f}%", loc="left", fontsize=SMALL, color=MUTED)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlim(place.min() - 0.6, place.max() + 0.6)
    ax.set_ylim(0, min(max(float(np.nanmax(ratios)), mean) * 1.15 + 1, 105))
    ax.grid(False, axis="x")
    return figure


def expert_popularity(expert_ids: np.ndarray, experts: int) -> Figure:
    """Load of every expert of every layer, in multiples of an even share, from a trace's ``expert_ids`` [T, L, K]."""
    load = popularity(expert_ids, experts)
    figure, ax = axes(HALF, 2.9, x="expert", y="MoE layer")
    image = ax.imshow(load, cmap="cividis", aspect="auto", interpolation="none", vmin=0)
    bar = figure.colorbar(image, ax=ax, pad=0.02, fraction=0.06)
    bar.set_label("load (1 = an even share)", fontsize=SMALL, color=INK)
    bar.ax.tick_params(colors=INK, labelsize=SMALL, color=MUTED)
    bar.outline.set_visible(False)
    _bare(ax)
    return figure


def popularity(expert_ids: np.ndarray, experts: int) -> np.ndarray:
    """Load [L, E] of each expert over its layer's mean load; places that were not routed are left out."""
    layers = [np.bincount(ids[ids < experts].ravel(), minlength=experts) for ids in np.moveaxis(expert_ids, 1, 0)]
    counts = np.stack(layers).astype(np.float64)
    return counts / np.maximum(counts.mean(axis=1, keepdims=True), 1e-300)


def _bare(ax: Axes) -> None:
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))

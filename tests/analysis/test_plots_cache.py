"""Figures of cache policies and of locality."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from analysis import plots_cache
from analysis.metrics import gap_closed
from analysis.style import COMPONENT_COLOURS
from analysis.svg import inline_svg
from sim.replay import Capacity, Feed, Settings
from sim.replay.curves import COLUMNS, ONE_PASS, Curve, curve, points, sampled
from traces.locality import locality
from traces.schema import Trace
from traces.synthetic import Sizes, markov

SIZES = Sizes(sequences=3, prompt_tokens=6, new_tokens=30, layers=2, experts=8, top_k=2)


@pytest.fixture(scope="module")
def routing() -> Trace:
    return markov(np.random.default_rng(0), SIZES)


@pytest.fixture(scope="module")
def curves(routing: Trace) -> dict[str, Curve]:
    return {policy: curve(Feed.of(routing), policy) for policy in ONE_PASS}


def frame_of(curves: dict[str, Curve], phase: str = "all") -> pd.DataFrame:
    return pd.concat([found.frame(phase) for found in curves.values()])


def words(ax: Axes) -> list[str]:
    return [found.get_text() for found in ax.texts]


def bars(ax: Axes) -> list[ErrorbarContainer]:
    return [found for found in ax.containers if isinstance(found, ErrorbarContainer)]


def table(**ratios: float) -> pd.DataFrame:
    """A row a policy, at a quarter of the experts."""
    rows: list[tuple[Any, ...]] = [
        (policy, "layer", "serial", "decode", 4, 0.25, 400, value, value, True) for policy, value in ratios.items()
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def test_hit_curves_draw_every_capacity_and_name_the_lines(curves: dict[str, Curve]) -> None:
    ax = plots_cache.hit_curves(frame_of(curves, "decode")).axes[0]
    assert ax.get_xlabel() == "cache (% of all experts): a pool for each layer, atomic contract, decode only"
    assert ax.get_ylabel() == "hit ratio by assignment (%)"
    assert words(ax) == ["belady (hit-rate bound)", "lru"]
    bound, lru = ax.lines
    assert np.asarray(lru.get_xdata()) == pytest.approx(np.arange(1, 9) / 8 * 100)
    assert np.asarray(lru.get_ydata()) == pytest.approx(curves["lru"].hit_ratios("decode") * 100)
    assert np.asarray(bound.get_ydata()) == pytest.approx(curves["belady"].hit_ratios("decode") * 100)
    assert ax.get_legend() is None


def test_capacities_in_bytes_are_shares_of_the_bytes(routing: Trace) -> None:
    ax = plots_cache.hit_curves(curve(Feed.of(routing), unit="bytes").frame()).axes[0]
    assert ax.get_xlabel().startswith("cache (% of the bytes of all experts): a pool for each layer")


def test_the_name_of_the_upper_line_is_above_it_and_the_other_below(curves: dict[str, Curve]) -> None:
    above, below = plots_cache.hit_curves(frame_of(curves)).axes[0].texts
    assert (above.get_verticalalignment(), below.get_verticalalignment()) == ("bottom", "top")


def test_a_heuristic_is_called_one(curves: dict[str, Curve]) -> None:
    ax = plots_cache.hit_curves(frame_of(curves).assign(exact=False, scope="global")).axes[0]
    assert words(ax)[0] == "belady (heuristic: unequal experts)"
    assert "one pool for all layers, atomic contract, all passes" in ax.get_xlabel()


def test_points_have_intervals_and_stand_where_they_belong(curves: dict[str, Curve], routing: Trace) -> None:
    capacities = [Capacity.slots(text, routing.header, "layer") for text in ("25%", "50%")]
    found = points(sampled(Feed.of(routing), Settings("lfu", capacities[0]), capacities))
    found = found.assign(low=found["hit_ratio_assignments"] - 0.02, high=found["hit_ratio_assignments"] + 0.01)
    both = pd.concat([found, found.assign(policy="fifo")])
    ax = plots_cache.hit_curves(frame_of(curves), both).axes[0]
    assert [bar.get_label() for bar in bars(ax)] == ["lfu", "fifo"]
    places = [np.asarray(bar.lines[0].get_xdata()) for bar in bars(ax)]
    assert [place.tolist() for place in places] == [[25, 50]] * 2
    assert {bar.lines[0].get_markerfacecolor() for bar in bars(ax)} == {"none"}, "one shows through the other"
    (low, high) = bars(ax)[0].lines[2][0].get_segments()[0][:, 1]
    middle = float(found["hit_ratio_assignments"].iloc[0]) * 100
    assert [low, high] == pytest.approx([middle - 2, middle + 1])
    legend = ax.get_legend()
    assert legend is not None
    assert [entry.get_text() for entry in legend.get_texts()] == ["lfu", "fifo"]


def test_points_of_many_policies_can_be_told_apart(curves: dict[str, Curve]) -> None:
    many = pd.concat([table(**{f"p{number}": 0.3}) for number in range(12)])
    looks = [
        (bar.lines[0].get_color(), bar.lines[0].get_marker())
        for bar in bars(plots_cache.hit_curves(frame_of(curves), many).axes[0])
    ]
    assert len(set(looks)) == 12


def test_marks_are_named_in_slots_a_layer(curves: dict[str, Curve]) -> None:
    marks = plots_cache.marks_of(curves["lru"], gain=0.0)
    assert marks == {"2 x top-k: 4 slots a layer": 0.5, "knee of lru: 8 slots a layer": 1.0}
    ax = plots_cache.hit_curves(frame_of(curves), None, marks).axes[0]
    assert words(ax)[:2] == ["2 x top-k: 4 slots a layer", "knee of lru: 8 slots a layer"]
    assert [float(np.asarray(line.get_xdata())[0]) for line in ax.lines[:2]] == [50.0, 100.0]
    assert [found.get_horizontalalignment() for found in ax.texts[:2]] == ["left", "right"], "no word leaves the axes"


def test_the_gap_is_closed_from_lru_to_belady() -> None:
    closed = gap_closed(["lru", "belady", "lfru", "fifo"], [0.4, 0.6, 0.45, 0.3])
    assert closed == pytest.approx([0.0, 1.0, 0.25, -0.5])
    assert np.isnan(gap_closed(["lru", "lfru"], [0.4, 0.45])).all()
    assert np.isnan(gap_closed(["lru", "belady"], [0.4, 0.4])).all()


def test_policies_at_one_capacity_are_in_the_order_of_their_hits() -> None:
    found = table(lru=0.4, belady=0.6, lfru=0.45, arc=0.4)
    found = found.assign(low=found["hit_ratio_assignments"] - 0.02, high=[0.41, np.nan, 0.46, 0.42])
    ax = plots_cache.policies_at(found).axes[0]
    assert ax.get_xlabel() == "hit ratio by assignment (%), cache of 25.0% of all experts"
    told = "a pool for each layer, serial contract, decode only; ranked by assignment, the gap is by union"
    assert ax.get_title(loc="left") == told
    names = [tick.get_text() for tick in ax.get_yticklabels()]
    assert names == ["lru", "arc", "lfru", "belady (hit-rate bound)"]
    assert np.asarray(ax.collections[-1].get_offsets())[:, 0] == pytest.approx([40, 40, 45, 60])
    assert words(ax) == ["gap closed\nby union", "0%", "+25.0%"]


def test_policies_without_a_bound_close_no_gap() -> None:
    ax = plots_cache.policies_at(table(lru=0.4, arc=0.5, lfu=0.5)).axes[0]
    assert words(ax) == []
    assert ax.get_title(loc="left") == "a pool for each layer, serial contract, decode only"


def test_belady_is_not_called_a_bound_where_it_is_none() -> None:
    ax = plots_cache.policies_at(table(lru=0.4, belady=0.5), bound=False).axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["lru", "belady"]


@pytest.fixture(scope="module")
def record(routing: Trace) -> dict[str, Any]:
    return locality(routing, rng=np.random.default_rng(0), resamples=20)


def lines(figure: Figure, panel: int) -> list[Any]:
    return list(figure.axes[panel].lines)


def test_locality_shows_four_sides(record: dict[str, Any]) -> None:
    figure = plots_cache.locality(record)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes] == [
        ("distance of two tokens (tokens)", "experts in common (%)"),
        ("window of one sequence (tokens)", "distinct experts a layer"),
        ("sequences in a batch", "distinct experts a layer"),
        ("window (tokens)", "best fixed set, SRP (%)"),
    ]
    overlap, anywhere, chance = lines(figure, 0)
    assert len(overlap.get_xdata()) == 35, "the longest distance in a sequence of 36 tokens"
    assert overlap.get_ydata()[0] == pytest.approx(record["overlap"]["lags"][0]["mean"] * 100)
    assert anywhere.get_ydata()[0] == pytest.approx(record["overlap"]["popularity"]["mean"] * 100)
    assert chance.get_ydata()[0] == pytest.approx(25.0)
    for panel, name in ((1, "working_set"), (2, "batch_union")):
        measured, uniform = lines(figure, panel)
        assert measured.get_ydata()[0] == pytest.approx(record[name][0]["mean"])
        assert uniform.get_ydata()[0] == pytest.approx(record[name][0]["uniform"])
    scores = lines(figure, 3)[-1]
    assert scores.get_xdata().tolist() == [4, 16]
    assert scores.get_ydata() == pytest.approx([entry["srp"] * 100 for entry in record["srp"][:2]])
    assert words(figure.axes[3])[0] == f"{record['srp'][0]['cache_size']:.1f} x top-k"


def test_locality_of_a_trace_that_is_too_short(routing: Trace) -> None:
    """One token has no neighbour, no window and no batch; the figure still stands."""
    lone = markov(np.random.default_rng(0), Sizes(sequences=1, prompt_tokens=0, new_tokens=1, layers=2, experts=8))
    figure = plots_cache.locality(locality(lone, rng=np.random.default_rng(0), resamples=2))
    assert len(lines(figure, 0)) == 1, "chance alone"
    figure.canvas.draw()


def test_every_figure_names_the_model_and_the_trace(curves: dict[str, Curve], record: dict[str, Any]) -> None:
    figures = [
        plots_cache.hit_curves(frame_of(curves), title="m, trace t"),
        plots_cache.policies_at(table(lru=0.4), "m, trace t"),
        plots_cache.locality(record, "m, trace t"),
    ]
    assert [figure.get_suptitle() for figure in figures] == ["m, trace t"] * 3


def test_figures_use_the_colours_of_the_house(curves: dict[str, Curve], record: dict[str, Any]) -> None:
    """So that a page can replace each of them; those of the theme have become variables."""
    many = pd.concat([table(**{f"p{number}": 0.3}) for number in range(5)])
    found = table(lru=0.4, belady=0.6, lfru=0.45)
    figures = [
        plots_cache.hit_curves(frame_of(curves), many, plots_cache.marks_of(curves["lru"])),
        plots_cache.policies_at(found),
        plots_cache.locality(record),
    ]
    for number, figure in enumerate(figures):
        svg = inline_svg(figure, f"f{number}", "label")
        assert "var(--measured)" in svg
        assert set(re.findall("#[0-9a-f]{6}", svg)) <= {*COMPONENT_COLOURS.values()}

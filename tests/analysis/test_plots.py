from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import plots, style
from analysis.compare import compare
from analysis.frames import layer_frame
from analysis.overlay import step_events, timeline_overlay
from analysis.residency import ABSENT, COPIED, CPU, HIT, RESIDENT, residency, residency_map
from analysis.svg import THEME, inline_svg
from sim.results import COLUMNS, RunResult
from traces.errors import InputError
from traces.schema import Trace


def axis_labels(figure: Figure) -> tuple[str, str]:
    return figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()


def log(*rows: tuple[int, int, str, int, int]) -> pd.DataFrame:
    """An operation log from (step, layer, op, expert, slot)."""
    full = [(n, step, layer, op, expert, slot, 1, 0) for n, (step, layer, op, expert, slot) in enumerate(rows)]
    return pd.DataFrame(full, columns=list(COLUMNS["operations"]))


def test_token_latency_draws_both_clocks(measured: RunResult, simulated: RunResult) -> None:
    figure = plots.token_latency(compare(measured, simulated).tokens)
    assert axis_labels(figure) == ("decode token (index)", "latency (ms)")
    ours, theirs = figure.axes[0].lines
    assert np.asarray(ours.get_ydata()) == pytest.approx([10.0, 12.0, 8.0])
    assert np.asarray(theirs.get_ydata()) == pytest.approx([11.0, 12.0, 6.0])
    assert figure.axes[0].get_ylim()[0] == 0.0


def test_token_latency_marks_new_sequences(measured: RunResult, simulated: RunResult) -> None:
    tokens = compare(measured, simulated).tokens.assign(sequence=[0, 0, 1])
    marks = plots.token_latency(tokens).axes[0].lines[2:]
    assert [float(np.asarray(mark.get_xdata())[0]) for mark in marks] == [1.5]


def test_lanes_that_alternate_are_not_new_sequences(measured: RunResult, simulated: RunResult) -> None:
    tokens = compare(measured, simulated).tokens
    lanes = pd.concat([tokens, tokens.assign(sequence=1)]).sort_values("step", kind="stable", ignore_index=True)
    assert len(plots.token_latency(lanes).axes[0].lines) == 2


def test_components_stack_to_the_token(measured: RunResult, simulated: RunResult) -> None:
    figure = plots.components(compare(measured, simulated).critical())
    bars = figure.axes[0].patches
    assert axis_labels(figure)[0] == "mean time of a decode token (ms)"
    assert len(bars) == 12
    assert max(bar.get_x() + bar.get_width() for bar in bars[::2]) == pytest.approx(10.0)
    assert max(bar.get_x() + bar.get_width() for bar in bars[1::2]) == pytest.approx(29 / 3)
    assert {"10.0 ms", "9.67 ms"} <= {text.get_text() for text in figure.axes[0].texts}


def test_a_component_below_zero_draws_nothing(measured: RunResult, simulated: RunResult) -> None:
    measured.layers["stall_s"] -= 0.004
    bars = plots.components(compare(measured, simulated).critical()).axes[0].patches
    assert min(bar.get_width() for bar in bars) == 0.0


def test_error_distribution_marks_quantiles_and_noise() -> None:
    figure = plots.error_distribution([0.1, 0.0, -0.25], 0.05)
    ax = figure.axes[0]
    assert axis_labels(figure) == ("absolute error of a token (%)", "share of tokens (%)")
    assert np.asarray(ax.lines[0].get_xdata()) == pytest.approx([0.0, 0.0, 10.0, 25.0])
    assert np.asarray(ax.lines[0].get_ydata()) == pytest.approx([0.0, 100 / 3, 200 / 3, 100.0])
    assert [text.get_text() for text in ax.texts] == ["p50: 10.0%", "p90: 22.0%"]
    assert ax.get_title(loc="left") == "shaded: repeat noise 5.00%"
    assert plots.error_distribution([0.1]).axes[0].get_title(loc="left") == ""


def test_hits_by_layer(measured: RunResult) -> None:
    figure = plots.hits_by_layer(layer_frame(measured))
    assert axis_labels(figure) == ("MoE layer", "hit ratio (%)")
    assert [bar.get_height() for bar in figure.axes[0].patches] == pytest.approx([400 / 6, 400 / 6])
    assert np.asarray(figure.axes[0].lines[0].get_ydata())[0] == pytest.approx(200 / 3)


def test_popularity_is_a_multiple_of_the_even_share(trace: Trace) -> None:
    load = plots.popularity(trace.expert_ids, 4)
    assert load == pytest.approx(np.array([[2.0, 1.0, 1.0, 0.0]] * 2))
    figure = plots.expert_popularity(trace.expert_ids, 4)
    assert axis_labels(figure) == ("expert", "MoE layer")
    assert np.asarray(figure.axes[0].images[0].get_array()) == pytest.approx(load)
    assert "even share" in figure.axes[1].get_ylabel()


def test_popularity_leaves_out_what_was_not_routed() -> None:
    ids = np.array([[[0, 65535]], [[0, 1]]], dtype=np.uint16)
    assert plots.popularity(ids, 4) == pytest.approx(np.array([[8 / 3, 4 / 3, 0.0, 0.0]]))


def test_timeline_has_a_box_an_event(measured: RunResult, simulated: RunResult) -> None:
    figure = timeline_overlay(measured, simulated, 1)
    ax = figure.axes[0]
    boxes = sum(len(found.get_paths()) for found in ax.collections if type(found).__name__ == "PatchCollection")
    assert boxes == sum((run.events["step"] == 1).sum() for run in (measured, simulated))
    assert ax.get_xlabel() == "time since the start of step 1 (ms)"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["host", "gpu", "link"]
    assert ax.get_xlim()[1] == pytest.approx(10.0 * 1.005)


def test_step_events_start_at_zero(measured: RunResult) -> None:
    events = step_events(measured, 2)
    assert events["start_ms"].min() == pytest.approx(0.0)
    assert events["length_ms"].iloc[0] == pytest.approx(1.0)


def test_timeline_needs_the_step_and_its_events(measured: RunResult, simulated: RunResult) -> None:
    with pytest.raises(InputError, match="step must be a step of the measured run, got 9"):
        timeline_overlay(measured, simulated, 9)
    simulated.events = simulated.events.iloc[:0]
    with pytest.raises(InputError, match="events of step 1 must be recorded, got none in the simulated run"):
        timeline_overlay(measured, simulated, 1)


def test_residency_follows_slots() -> None:
    operations = log(
        (0, 0, "copy", 1, 0),
        (0, 0, "gpu", 1, 0),
        (1, 1, "copy", 3, 5),
        (2, 0, "gpu", 1, 0),
        (2, 0, "cpu", 2, -1),
        (3, 0, "evict", 1, 0),
        (3, 0, "copy", 0, 0),
        (3, 0, "gpu", 0, 0),
    )
    cells = residency_map(operations, 0, 4, range(5), capacity_slots=8)
    assert cells.tolist() == [
        [ABSENT, ABSENT, ABSENT, COPIED, RESIDENT],
        [COPIED, RESIDENT, HIT, ABSENT, ABSENT],
        [ABSENT, ABSENT, CPU, ABSENT, ABSENT],
        [ABSENT] * 5,
    ]
    assert residency_map(operations, 0, 4, range(2, 4), capacity_slots=8).tolist() == cells[:, 2:4].tolist()
    other = residency_map(operations, 1, 4, range(5), capacity_slots=8)
    assert other[3].tolist() == [ABSENT, COPIED, RESIDENT, RESIDENT, RESIDENT]


def test_what_passes_through_staging_is_not_resident() -> None:
    operations = log((0, 0, "copy", 1, 8), (0, 0, "gpu", 1, 8), (1, 0, "copy", 2, 7), (1, 0, "gpu", 2, 7))
    cells = residency_map(operations, 0, 3, range(3), capacity_slots=8)
    assert cells[1].tolist() == [COPIED, ABSENT, ABSENT]
    assert cells[2].tolist() == [ABSENT, COPIED, RESIDENT]


def test_residency_names_what_it_shows() -> None:
    figure = residency(np.array([[COPIED, HIT], [ABSENT, RESIDENT]], dtype=np.uint8), range(7, 9))
    ax = figure.axes[0]
    assert axis_labels(figure) == ("step (index)", "expert")
    assert tuple(ax.images[0].get_extent()) == (6.5, 8.5, 1.5, -0.5)
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == list(style.CELL_COLOURS)[:3]


def test_inline_svg_is_part_of_a_page(measured: RunResult, simulated: RunResult) -> None:
    tokens = compare(measured, simulated).tokens
    svg = inline_svg(plots.token_latency(tokens), "one", 'a "label" & more')
    assert svg.startswith("<svg")
    assert svg.endswith("</svg>")
    assert "http" not in svg
    assert "latency (ms)" in svg
    assert 'aria-label="a &quot;label&quot; &amp; more"' in svg
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert set(re.findall(r"url\(#([^)]*)\)", svg)) <= set(re.findall(r'\bid="([^"]*)"', svg))
    assert not any(colour in svg for colour in THEME)


def test_inline_svg_is_reproducible(measured: RunResult, simulated: RunResult) -> None:
    tokens = compare(measured, simulated).tokens
    first, second = (inline_svg(plots.token_latency(tokens), "one", "label") for _ in range(2))
    assert first == second

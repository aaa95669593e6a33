"""The labels of the figure of systems: each beside its own point, and none upon another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from analysis.plots_systems import BAR_COLOURS, GAPS_PT, MARKER_PT, plot

DPI = 160
MIB = 2.0**20
CROWD = [(0, 716), (0, 602), (1.84, 602), (3.11, 602), (3.39, 539), (2.7, 532), (8.53, 518), (2.65, 505), (4.38, 496)]
CROWD += [(2.91, 496), (4.5, 480), (11.2, 475), (3.57, 473), (2.74, 456), (0, 430), (0, 420), (0, 420), (0, 420)]


def record(name: str, mib: float, speed: float) -> dict[str, Any]:
    return {
        "system": name,
        "role": "system",
        "token_s": 1.0 / speed,
        "token_low_s": None,
        "token_high_s": None,
        "bound_token_s": None,
        "bytes_per_token": mib * MIB,
        "demand_bytes_per_token": 0.0,
        "components_s": dict.fromkeys(BAR_COLOURS, 1.0 / speed / len(BAR_COLOURS)),
    }


def drawn(points: Sequence[tuple[float, float]]) -> Figure:
    figure = plot([record(f"s{place}", *point) for place, point in enumerate(points)])
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    return figure


def labels(figure: Figure) -> dict[str, tuple[Annotation, Bbox]]:
    """By what they say: the labels of the right panel, and their boxes in points."""
    found = [text for text in figure.axes[1].texts if isinstance(text, Annotation)]
    return {text.get_text(): (text, _points_of(text)) for text in found}


def _points_of(text: Annotation) -> Bbox:
    box = super(Annotation, text).get_window_extent()  # without the line that joins it to its point
    return Bbox(box.get_points() * 72.0 / DPI)


def numbers(words: str) -> list[int]:
    found: list[int] = []
    for part in words.split(", "):
        ends = [int(number) for number in re.findall(r"\d+", part)]
        found += range(ends[0], ends[-1] + 1)
    return found


def _far(box: Bbox, place: Any) -> float:
    """From the box to a place, in points."""
    return float(np.hypot(*np.maximum(0, np.maximum(box.min - place, place - box.max))))


def random_points(seed: int) -> list[tuple[float, float]]:
    rng = np.random.default_rng(seed)
    return [(float(rng.uniform(0, 9)), float(rng.uniform(300, 700))) for _ in range(25)]


@pytest.mark.parametrize("points", [CROWD, random_points(1), random_points(2)], ids=["crowd", "one", "two"])
def test_every_point_has_its_number_beside_it_and_nothing_overlaps(points: Sequence[tuple[float, float]]) -> None:
    figure = drawn(points)
    told = labels(figure)
    assert sorted(number for words in told for number in numbers(words)) == [*range(1, len(points) + 1)]
    ax = figure.axes[1]
    at = [ax.transData.transform(point) * 72.0 / DPI for point in sorted(points, key=lambda point: -point[1])]
    room = ax.get_window_extent()
    for words, (text, box) in told.items():
        own = at[numbers(words)[0] - 1]
        for number, place in enumerate(at, start=1):
            distance = _far(box, place)
            if number in numbers(words):
                assert np.hypot(*(place - own)) < 1.0
            elif text.arrow_patch is None:
                assert distance > _far(box, own), f"{words} stands nearer to {number}"
            assert distance >= MARKER_PT / 2, f"{words} lies on the point {number}"
        assert text.arrow_patch is not None or _far(box, own) < MARKER_PT / 2 + 2 * GAPS_PT[0]
        assert room.x0 <= box.x0 * DPI / 72.0 + 0.5
        assert box.x1 * DPI / 72.0 <= room.x1 + 0.5
    for (one, (_, box)), (other, (_, second)) in combinations(told.items(), 2):
        assert not box.overlaps(second), f"{one} lies on {other}"


def test_only_points_that_coincide_share_a_label() -> None:
    """Two that are one pixel apart do; at a distance that the eye can see, neither speed nor bytes need differ much."""
    assert set(labels(drawn(CROWD))) >= {"2", "3", "4", "5", "6", "15", "16-18"}
    assert set(labels(drawn([(1.0, 100.0), (1.0, 99.9), (0.9, 99.8), (10.0, 99.0)]))) == {"1-2", "3", "4"}


def test_a_label_that_finds_no_room_beside_its_point_is_joined_to_it() -> None:
    ring = [(5.0 + 0.12 * x, 500.0 + 6 * y) for x in range(-2, 3) for y in range(-2, 3)]
    figure = drawn([(10.0, 550.0), *ring])
    joined = [text.arrow_patch is not None for text, _ in labels(figure).values()]
    assert any(joined)
    assert labels(figure)["1"][0].arrow_patch is None

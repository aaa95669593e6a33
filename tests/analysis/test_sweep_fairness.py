"""What of a sweep competes, and within what memory: in words, and in pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from analysis.plots_sweep import front, heatmap, lines
from analysis.style import MUTED
from analysis.sweep_table import SweepTable
from tests.analysis.sweeps import LINK, by_link, stored, told, view, words_of
from traces.errors import InputError

SEER = {"oracle": ("clairvoyant", 30.0), "ceiling": ("no limit", 40.0), "later": ("other outputs", 20.0)}


def with_bounds(folder: Path) -> Path:
    """Two systems that cross between 4 and 8 GB/s, and three that compete with nobody, and are quicker than both."""
    rows = [
        {"tokens_per_s": rate, "gpu_bytes": 1e9, "role": role, "misses": 1.0}
        for role, rates in (
            ("system", (10.0, 10.0)),
            ("system", (5.0, 15.0)),
            *((role, (rate, rate)) for role, rate in SEER.values()),
        )
        for rate in rates
    ]
    return stored(folder, {"system": ["a", "b", *SEER], LINK: [4, 8]}, rows)


OUTSIDE = "outside the comparison: " + ", ".join(
    ("oracle (a bound: clairvoyant)", "ceiling (a bound: no limit)", "later (computes something else)")
)


def test_bounds_win_no_lead_no_crossing_no_place_and_no_front(tmp_path: Path, capsys: Any) -> None:
    folder, equal = with_bounds(tmp_path), "GPU memory of what is compared: 1.00 GB"
    lead = "highest decode rate: a below 6 GB/s, b above 6 GB/s"
    assert told(capsys, folder) == [lead, equal, OUTSIDE]
    assert told(capsys, folder, kind="crossovers") == [
        lead,
        "a wins below 6 GB/s, b above (interpolated between 4 GB/s and 8 GB/s)",
        equal,
        OUTSIDE,
    ]
    best = f"highest decode rate: 15.0 tokens/s at system b, {LINK} 8"
    assert told(capsys, folder, kind="heatmap", y="system")[0] == best
    assert told(capsys, folder, kind="pareto")[:2] == [
        "1 of 4 points are beaten by no other, from the least GPU memory on:",
        "  b, 8 GB/s: 1.00 GB, 15.0 tokens/s",
    ]
    assert told(capsys, folder, where=("system=oracle",)) == [
        "highest decode rate: no point competes",
        "outside the comparison: oracle (a bound: clairvoyant)",
    ]
    assert told(capsys, folder, kind="pareto", where=("system=oracle",))[0] == "no point competes"
    assert not told(capsys, folder, kind="pareto", where=("system=oracle",), as_json=True)
    (tmp_path / "seers").mkdir()
    rows = [{"tokens_per_s": 1.0, "role": "clairvoyant"}] * 4
    seers = stored(tmp_path / "seers", {"system": ["a", "b"], LINK: [4, 8]}, rows)
    assert "fewer than two lines compete" in told(capsys, seers, kind="crossovers")
    for kind in ("heatmap", "pareto", "crossovers"):
        found = told(capsys, folder, kind=kind, as_json=True, **({"y": "system"} if kind == "heatmap" else {}))
        assert not any(name in line for line in found for name in SEER)


def test_bounds_are_drawn_apart(tmp_path: Path) -> None:
    folder = with_bounds(tmp_path)
    (ax,) = lines(view(folder)).axes
    labels = ["oracle (a bound: clairvoyant)", "ceiling (a bound: no limit)", "later (computes something else)"]
    assert [line.get_label() for line in ax.lines] == ["a", "b", *labels]
    assert {line.get_color() for line in ax.lines[2:]} == {MUTED}
    assert {line.is_dashed() for line in ax.lines[2:]} == {True}
    assert ax.get_ylim()[1] > 40
    picture = view(folder, kind="pareto")
    assert front(view(folder, kind="pareto", where=("system=oracle",)), []).axes
    drawn = front(picture, [3]).axes[0].lines[1:]
    assert [line.get_label() for line in drawn] == ["a", "b", *labels]
    assert {line.get_color() for line in drawn[2:]} == {MUTED}
    cells = heatmap(view(folder, kind="heatmap", y="system"))
    (image,) = cells.axes[0].images
    shades = image.get_array()
    assert shades is not None
    assert [bool(shades.mask[row].all()) for row in range(5)] == [False, False, True, True, True]
    assert words_of(cells)[4:6] == ["(30.0)", "(30.0)"]
    heatmap(view(folder, kind="heatmap", y="system", where=("system=oracle",)))


def test_a_setting_that_changes_the_outputs_takes_its_points_out(tmp_path: Path, capsys: Any) -> None:
    rows = [{"tokens_per_s": 1.0 + defer, "role": "other outputs" if defer else "system"} for defer in (0, 1, 2)]
    folder = stored(tmp_path, {"system.options.place.defer": [0, 1, 2]}, rows)
    assert told(capsys, folder) == [
        "highest decode rate: 1.00 tokens/s at system.options.place.defer 0",
        "outside the comparison: place.defer 1, place.defer 2 (computes something else)",
    ]
    (ax,) = lines(view(folder)).axes
    assert [[*line.get_ydata()] for line in ax.lines][1][1:] == [2.0, 3.0]


def test_memory_that_is_equal_where_systems_are_compared(tmp_path: Path, capsys: Any) -> None:
    rows = [{"tokens_per_s": 1.0 + place, "gpu_bytes": 1e8 * (1 + place % 2)} for place in range(4)]
    folder = stored(tmp_path, {"system": ["a", "b"], "cache": ["25%", "50%"]}, rows)
    assert "GPU memory of what is compared: equal at each cache, 100 MB to 200 MB" in told(capsys, folder)


def test_a_table_without_roles_is_made_anew(tmp_path: Path) -> None:
    table = pd.read_parquet(by_link(tmp_path) / "sweep.parquet")
    table.drop(columns="role").to_parquet(tmp_path / "sweep.parquet")
    with pytest.raises(InputError, match=r"\(sweep --resume writes it\), got none of role"):
        SweepTable.load(tmp_path)

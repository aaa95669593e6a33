"""Plots of sweeps: what is chosen from the axes, what is drawn, and what is said of it."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path
from typing import Any

import pytest

from analysis.crossovers import crossings, leads, pareto
from analysis.plots_sweep import crossovers, front, heatmap, lines
from analysis.sweep_commands import plot
from analysis.sweep_table import Axis, SweepTable, View, figure_label, hue_label, lower_is_better
from tests.analysis.sweeps import LINK, LINKS, RATES, by_link, by_numbers, stored, told, view, words_of
from traces.errors import InputError


@pytest.mark.parametrize(
    ("name", "values", "numbers", "label"),
    [
        ("hardware.link_gb_per_s", [4, 8.5], (4.0, 8.5), "link (GB/s)"),
        ("hardware.gpu_launch_us", [5], (5.0,), "gpu launch (µs)"),
        ("hardware.link_bytes_per_s", [4e9], (4e9,), "link (bytes/s)"),
        ("cache", ["25%", "12.5%"], (25.0, 12.5), "cache (% of the experts)"),
        ("cache", [8, 4], (8.0, 4.0), "cache (slots a layer)"),
        ("cache", ["8", "25%"], None, "cache"),
        ("gpu_memory", ["8GiB", "512MiB"], (8.0, 0.5), "gpu memory (GiB)"),
        ("gpu_memory", ["24MB", "32 MB"], (24.0, 32.0), "gpu memory (MB)"),
        ("host_memory", ["1048576", "2097152"], (1048576.0, 2097152.0), "host memory (bytes)"),
        ("batch", [1, 8], (1.0, 8.0), "batch (sequences)"),
        ("system.options.prefetch.depth", [1, 2], (1.0, 2.0), "prefetch.depth"),
        ("system.write_back", [True, False], None, "system.write back"),
        ("system", ["a", "b"], None, "system"),
    ],
)
def test_axes_know_their_numbers_and_units(name: str, values: list[Any], numbers: Any, label: str) -> None:
    axis = Axis.of(name, values)
    assert (axis.numbers, axis.label) == (numbers, label)


def test_an_axis_that_spreads_is_logarithmic() -> None:
    assert Axis.of(LINK, [4, 32]).log
    assert not Axis.of(LINK, [4, 31]).log
    assert not Axis.of("seed", [0, 32]).log
    assert not Axis.of("system", ["a"]).log


@pytest.mark.parametrize(
    ("name", "label", "scale", "lower"),
    [
        ("tokens_per_s", "decode rate (tokens/s)", 1.0, False),
        ("time_per_output_token_p50_s", "time per output token p50 (ms)", 1e3, True),
        ("stall_share", "stall share (%)", 100.0, True),
        ("hit_ratio_union", "hit ratio union (%)", 100.0, False),
        ("demand_bytes_per_token", "demand fetches (MB a token)", 1e-6, True),
        ("copied_bytes_per_processed_token", "copies with prefetches (MB a token)", 1e-6, True),
        ("gpu_bytes", "GPU memory (GB)", 1e-9, True),
        ("misses", "misses", 1.0, True),
        ("requests_per_s", "requests (a second)", 1.0, False),
        ("regret", "regret (%)", 100.0, True),
        ("regret_token_s", "regret token (ms)", 1e3, True),
    ],
)
def test_figures_have_labels_and_a_better_side(name: str, label: str, scale: float, lower: bool) -> None:
    assert figure_label(name) == (label, scale)
    assert lower_is_better(name) is lower


def test_what_is_shown_follows_from_the_axes(tmp_path: Path) -> None:
    words = view(by_link(tmp_path / "a"))
    assert (words.kind, words.x.name, words.hue and words.hue.name) == ("lines", LINK, "system")
    numbers = view(by_numbers(tmp_path / "b"))
    assert (numbers.kind, numbers.x.name, numbers.y and numbers.y.name) == ("heatmap", LINK, "cache")
    assert numbers.y is not None
    assert numbers.y.values == ("25%", "50%")
    assert numbers.table.left_out == 1
    one = view(by_link(tmp_path / "a"), where=("system=cpu",))
    assert (one.kind, one.x.name, one.hue) == ("lines", LINK, None)
    bars = view(by_link(tmp_path / "a"), where=(f"{LINK}=8",))
    assert (bars.kind, bars.x.name, bars.hue) == ("lines", "system", None)
    turned = view(by_link(tmp_path / "a"), kind="heatmap", y=LINK)
    assert (turned.x.name, turned.y and turned.y.name) == ("system", LINK)
    assert view(by_numbers(tmp_path / "b"), hue="cache").kind == "lines"


def test_seeds_are_averaged(tmp_path: Path) -> None:
    rows = [{"tokens_per_s": float(rate)} for rate in (1, 3, 10, 14)]
    table = view(stored(tmp_path / "s", {"cache": [4, 8], "seed": [0, 1]}, rows))
    assert (table.kind, table.x.name, table.hue) == ("lines", "cache", None)
    assert [*table.curves().values()] == [[2.0, 12.0]]
    assert [*table.curves("max").values()] == [[3.0, 14.0]]
    assert len(lines(table).axes[0].collections) == 1
    by_seed = view(tmp_path / "s", x="seed")
    assert by_seed.y is not None
    assert (by_seed.kind, by_seed.y.name) == ("heatmap", "cache")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"kind": "line"}, "kind must be a known name, got 'line' (did you mean lines"),
        ({"value": "token_per_s"}, "did you mean tokens_per_s"),
        ({"value": "system"}, "value must be a known name"),
        ({"x": "link"}, "x must be a known name, got 'link'"),
        ({"x": "system", "hue": "system"}, "x must be another axis than system"),
        ({"where": ("system",)}, "where must be AXIS=VALUE, got 'system'"),
        ({"where": ("sistem=cpu",)}, "did you mean system"),
        ({"where": ("system=cpus",)}, "did you mean cpu"),
        ({"where": ("system=cpu", f"{LINK}=8")}, "sweep must have an axis of more than one value to be plotted"),
        ({"where": ("system=cpu",), "kind": "heatmap"}, "y must be an axis, for a heatmap, got a sweep of one axis"),
        ({"where": ("system=cpu",), "kind": "crossovers"}, "hue must be an axis for crossovers"),
        ({"kind": "crossovers", "x": "system"}, "x must be an axis of numbers for crossovers, got system"),
        ({"kind": "lines", "y": "system"}, "y must be left out for lines, got system"),
        ({"kind": "pareto", "x": "gpu_byte"}, "did you mean gpu_bytes"),
        ({"kind": "pareto", "y": "system"}, "y must be left out for pareto"),
    ],
)
def test_what_cannot_be_shown(tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        view(by_link(tmp_path), **asked)
    assert words in str(caught.value)


def test_an_axis_too_many_has_to_be_fixed(tmp_path: Path) -> None:
    folder = stored(tmp_path, {"batch": [1, 2], "cache": [4, 8], "context": [9, 10]}, [{"tokens_per_s": 1.0}] * 8)
    with pytest.raises(InputError, match=r"where must fix context \(9, 10\), got an axis too many"):
        view(folder, kind="lines")
    assert view(folder, where=("context=9",)).kind == "heatmap"


def test_folders_that_hold_no_table(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a folder of a sweep, with sweep\.toml"):
        SweepTable.load(tmp_path)
    by_link(tmp_path)
    (tmp_path / "sweep.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"sweep must have a readable sweep\.parquet"):
        SweepTable.load(tmp_path)
    stored(tmp_path, {"seed": [1]}, [{"status": "refused"}])
    with pytest.raises(InputError, match="sweep must have a point that ran, got 1 that did not"):
        SweepTable.load(tmp_path)
    text = (tmp_path / "sweep.toml").read_text()
    (tmp_path / "sweep.toml").write_text(text.replace("seed", "batch"))
    with pytest.raises(InputError, match=r"sweep\.parquet must be of the last grid .* got none of batch"):
        SweepTable.load(tmp_path)


def test_lines_say_who_leads(tmp_path: Path) -> None:
    picture = view(by_link(tmp_path))
    stretches = leads(picture.x.numbers or (), picture.curves(), log=True, lower=False)
    figure = lines(picture, stretches)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_xscale()) == ("link (GB/s)", "decode rate (tokens/s)", "log")
    drawn = {line.get_label(): [*line.get_ydata()] for line in ax.lines[: len(RATES)]}
    assert drawn == RATES
    assert words_of(figure) == ["cpu = same  \N{LEFTWARDS ARROW}  11.3 GB/s  \N{RIGHTWARDS ARROW}  link"]
    assert ax.lines[-1].get_xdata()[0] == pytest.approx(8 * 2**0.5)


def test_every_crossing_is_ringed_once(tmp_path: Path) -> None:
    """Both systems that are equal cross the third in one place."""
    picture = view(by_link(tmp_path), kind="crossovers")
    found = crossings(picture.x.numbers or (), picture.curves(), log=True, lower=False)
    assert len(found) == 2
    figure = crossovers(picture, found)
    assert words_of(figure) == ["11.3 GB/s"]
    ring = figure.axes[0].lines[-1]
    assert [ring.get_xdata()[0], ring.get_ydata()[0]] == pytest.approx([8 * 2**0.5, 10.0])


def test_words_on_x_are_points_without_a_line(tmp_path: Path) -> None:
    figure = lines(view(by_link(tmp_path), x="system", where=(f"{LINK}=4",)))
    (line,) = figure.axes[0].lines
    assert line.get_linestyle() == "None"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == [*RATES]


def test_a_heat_map_has_its_numbers_at_their_place(tmp_path: Path) -> None:
    figure = heatmap(view(by_numbers(tmp_path)))
    ax, bar = figure.axes
    (image,) = ax.images
    cells = image.get_array()
    assert cells is not None
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["25", "50"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["4", "8", "16", "32"]
    assert cells[1].tolist() == [50.0 * link for link in LINKS]
    assert words_of(figure)[:2] == ["100", "–"]  # noqa: RUF001
    assert bar.get_ylabel() == "decode rate (tokens/s)"


def test_a_large_heat_map_has_no_words(tmp_path: Path) -> None:
    seeds, links = [*range(20)], [*range(1, 11)]
    folder = stored(tmp_path, {"context": seeds, LINK: links}, [{"tokens_per_s": 1.0}] * 200)
    figure = heatmap(view(folder))
    assert words_of(figure) == []
    assert len(figure.axes[0].get_xticklabels()) == 10


def test_a_front_joins_and_names_its_points(tmp_path: Path) -> None:
    picture = view(by_link(tmp_path), kind="pareto")
    assert picture.hue is not None
    frame = picture.table.frame
    best = pareto(frame.gpu_bytes.tolist(), frame.tokens_per_s.tolist(), lower=False)
    figure = front(picture, best)
    (ax,) = figure.axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("GPU memory (GB)", "decode rate (tokens/s)")
    joined = ax.lines[0]
    assert [*joined.get_xdata()] == pytest.approx([1.0, 1.2])
    assert [*joined.get_ydata()] == [10.0, 16.0]
    assert words_of(figure) == ["cpu, 4 GB/s", "link, 32 GB/s"]
    assert [line.get_label() for line in ax.lines[1:]] == [*RATES]


def test_numbers_in_a_legend_have_their_unit() -> None:
    assert hue_label(Axis.of(LINK, [4, 8]), 8) == "8 GB/s"
    assert hue_label(Axis.of("cache", ["12.5%"]), "12.5%") == "12.5% of the experts"
    assert hue_label(Axis.of("seed", [3]), 3) == "seed 3"
    assert hue_label(Axis.of("system", ["a"]), "a") == "a"


def test_words_of_lines_and_crossovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_link(tmp_path)
    first = "highest decode rate: cpu and same alike below 11.3 GB/s, link above 11.3 GB/s"
    alike = "not distinguishable: same from cpu at 4 GB/s, 8 GB/s"
    memory = "GPU memory of what is compared is not equal: 1.00 GB (cpu), 1.10 GB (same), 1.20 GB (link)"
    assert told(capsys, folder) == [first, alike, memory]
    assert told(capsys, folder, kind="crossovers") == [
        first,
        "cpu wins below 11.3 GB/s, link above (interpolated between 8 GB/s and 16 GB/s)",
        "same wins below 11.3 GB/s, link above (interpolated between 8 GB/s and 16 GB/s)",
        alike,
        memory,
    ]
    not_sure = "how sure this is, is known of the decode rate alone"
    assert told(capsys, folder, kind="crossovers", value="misses") == [
        "lowest misses: cpu from 4 GB/s to 32 GB/s",
        "no two of cpu, same, link cross",
        not_sure,
        memory,
    ]
    rows = [{"stall_share": share, "tokens_per_s": 1.0} for share in (0.2, 0.4, 0.1, 0.7)]
    seeds = stored(tmp_path / "seeds", {"cache": [4, 8], "seed": [0, 1]}, rows)
    bands = "lines are means over seeds, bands go from the least to the most"
    assert told(capsys, seeds, value="stall_share") == ["lowest stall share: 30.0% at cache 4", not_sure, bands]
    assert bands in lines(view(seeds, value="stall_share"), (), [bands]).get_suptitle()
    assert told(capsys, folder, where=("system=link",)) == [
        f"highest decode rate: 16.0 tokens/s at {LINK} 32",
        "GPU memory of what is compared: 1.20 GB",
    ]


def noisy(folder: Path, groups: int = 20) -> Path:
    """Two systems at two links: at 4 GB/s ``b`` is a little quicker in half of the groups, and ``a`` in the others; at
    8 GB/s ``a`` is quicker in each. The sequences differ far more from each other than the systems do."""
    base = [1.0 + place for place in range(groups)]
    seconds = {
        ("a", 4): base,
        ("a", 8): base,
        ("b", 4): [one + (-0.1, 0.11)[place % 2] for place, one in enumerate(base)],
        ("b", 8): [one + 0.1 for one in base],
    }
    rows = [
        {
            "tokens_per_s": 10 * groups / sum(each),
            "decode_s_by_group": each,
            "decode_tokens_by_group": [10] * groups,
            "synthetic": system == "b",
            "notes": "what-if: too much; it draws" if system == "b" else "",
        }
        for (system, _), each in seconds.items()
    ]
    return stored(folder, {"system": ["a", "b"], LINK: [4, 8]}, rows)


def test_who_cannot_be_told_from_the_best_is_said_in_words_and_in_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = told(capsys, noisy(tmp_path / "many"))
    assert words[1] == "not distinguishable: b from a at 4 GB/s"
    picture = view(tmp_path / "many")
    assert "not distinguishable: b from a" in lines(picture, (), words[1:2]).get_suptitle()
    assert told(capsys, noisy(tmp_path / "few", groups=4))[1:2] == [
        "no intervals: 4 sequences are too few to resample (at least 5)"
    ]
    cells = told(capsys, tmp_path / "many", kind="heatmap", y="system")
    assert cells[1] == f"not distinguishable from it: system a, {LINK} 8, system b, {LINK} 4"


def test_synthetic_routing_and_notes_are_told_in_words_and_in_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = noisy(tmp_path)
    assert told(capsys, folder)[-3:] == [
        "simulated, on synthetic routing in 2 of 4 points",
        "2 of 4 points: what-if: too much",
        "2 of 4 points: it draws",
    ]
    assert lines(view(folder)).get_suptitle().startswith("simulated, on synthetic routing in 2 of 4 points: trace")
    assert lines(view(by_link(tmp_path / "own"))).get_suptitle().startswith("simulated: trace")
    front_points = told(capsys, folder, kind="pareto", x="tokens_per_s", as_json=True)
    assert all(json.loads(line)["synthetic"] for line in front_points)


def test_notes_that_differ_in_numbers_are_one_and_others_keep_theirs(tmp_path: Path, capsys: Any) -> None:
    rows = [{"tokens_per_s": 1.0, "notes": f"in {place} layers; of 7 lanes"} for place in range(len(LINKS))]
    *_, merged, kept = told(capsys, stored(tmp_path, {LINK: LINKS}, rows))
    assert merged.endswith(" points: in \N{HORIZONTAL ELLIPSIS} layers")
    assert kept.endswith(" points: of 7 lanes")


@pytest.mark.parametrize("rates", [(9, 1, 1, 1), (9, 9, 1, 1), (9, 9, 9, 1)])
def test_who_leads_is_written_within_the_axes(tmp_path: Path, rates: tuple[int, ...]) -> None:
    rows = [{"tokens_per_s": float(rate)} for rate in (*rates, 2, 2, 2, 2)]
    names = ["a-system-of-a-long-name", "another-of-a-long-name"]
    picture = view(stored(tmp_path, {"system": names, LINK: LINKS}, rows))
    figure = lines(picture, leads(picture.x.numbers or (), picture.curves(), log=True, lower=False))
    (ax,) = figure.axes
    figure.draw_without_rendering()
    (words,) = [text for text in ax.texts if "GB/s" in text.get_text()]
    box, room = words.get_window_extent(), ax.get_window_extent()
    assert room.x0 <= box.x0
    assert box.x1 <= room.x1


def test_the_highest_marker_is_whole(tmp_path: Path) -> None:
    rows = [{"tokens_per_s": rate} for rate in (99.0, 99.5, 99.9, 100.0)]
    figure = lines(view(stored(tmp_path, {LINK: LINKS}, rows)))
    (ax,) = figure.axes
    figure.draw_without_rendering()
    top, marker = (ax.transData.transform((0, value))[1] for value in (ax.get_ylim()[1], 100.0))
    assert top - marker > 3.5 * figure.dpi / 72, "a marker of 6 points, with its edge"


def test_whoever_takes_another_size_of_memory_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {name: 2e9 for name in "abcdef"} | {"small": 5e8}
    rows = [{"tokens_per_s": 1.0, "gpu_bytes": size} for size in sizes.values() for _ in LINKS]
    memory = told(capsys, stored(tmp_path, {"system": [*sizes], LINK: LINKS}, rows))[-1]
    assert memory.endswith(" is not equal: 2.00 GB (a, b, c, d, e and 1 more), 500 MB (small)")


def test_words_of_heat_maps_and_fronts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best = "highest decode rate: 1,600 tokens/s at cache 50%, hardware.link_gb_per_s 32"
    memory = "GPU memory of what is compared is not equal: 250 MB to 500 MB"
    assert told(capsys, by_numbers(tmp_path)) == [best, memory, "left out: 1 points that did not run"]
    assert told(capsys, by_link(tmp_path), kind="pareto") == [
        "2 of 12 points are beaten by no other, from the least GPU memory on:",
        "  cpu, 4 GB/s: 1.00 GB, 10.0 tokens/s",
        "  link, 32 GB/s: 1.20 GB, 16.0 tokens/s",
    ]


def without_links(folder: Path, known: int) -> Path:
    """Two systems over four links; the share of the link is known of so many points, from the first on."""
    rows = [
        {"tokens_per_s": 10.0, "gpu_bytes": 1e9, "link_busy_share": 0.1 * (place + 1) if place < known else None}
        for place in range(8)
    ]
    return stored(folder, {"system": ["lru", "ahead"], LINK: LINKS}, rows)


@pytest.mark.parametrize("asked", [{}, {"kind": "crossovers"}, {"kind": "pareto"}, {"kind": "heatmap", "y": "system"}])
def test_a_share_that_is_not_known_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any]
) -> None:
    folder, out = without_links(tmp_path / "s", known=4), tmp_path / "plot.png"
    plot(folder, View(value="link_busy_share", **asked), out=out, as_json=False, force=False)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "note: link_busy_share is not known of 4 of 8 points: where a system prefetches, a sweep does not note how "
        "long those copies took"
    )
    plot(folder, View(value="link_busy_share", **asked), out=None, as_json=True, force=False)
    told_json = capsys.readouterr()
    assert told_json.err.splitlines() == [line]
    assert "NaN" not in told_json.out
    plot(folder, View(kind="pareto", x="link_busy_share"), out=None, as_json=False, force=False)
    assert capsys.readouterr().err.splitlines() == [line]
    plot(folder, View(), out=None, as_json=False, force=False)
    assert capsys.readouterr().err == ""


def test_a_share_that_no_point_knows_cannot_be_shown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one point, got link_busy_share: where a system prefetches"):
        view(without_links(tmp_path, known=0), value="link_busy_share")


def test_records_of_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = by_link(tmp_path)
    crossed = [json.loads(line) for line in told(capsys, folder, as_json=True)]
    assert [(one["below"], one["above"], one["low"], one["high"]) for one in crossed] == [
        ("cpu", "link", 8.0, 16.0),
        ("same", "link", 8.0, 16.0),
    ]
    assert crossed[0]["x"] == pytest.approx(8 * 2**0.5)
    assert crossed[0]["axis"] == LINK
    best = [json.loads(line) for line in told(capsys, folder, kind="pareto", as_json=True)]
    assert best[1] == {"system": "link", LINK: 32, "gpu_bytes": 1.2e9, "tokens_per_s": 16.0, "synthetic": False}
    (cell,) = [json.loads(line) for line in told(capsys, by_numbers(tmp_path / "n"), as_json=True)]
    assert cell == {"cache": "50%", LINK: 32, "tokens_per_s": 1600.0, "synthetic": False}


@pytest.mark.parametrize("kind", ["lines", "heatmap", "crossovers", "pareto"])
@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_every_kind_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, ending: str) -> None:
    out = tmp_path / f"plot{ending}"
    assert told(capsys, by_link(tmp_path / "s"), out, kind=kind)[-1] == f"out: {out}"
    assert out.stat().st_size > 5000
    with pytest.raises(InputError, match="out must be a new file"):
        told(capsys, tmp_path / "s", out, kind=kind)


def test_a_curve_has_nan_where_nothing_ran(tmp_path: Path) -> None:
    picture = view(by_numbers(tmp_path), hue="cache")
    assert isnan(picture.curves()["25% of the experts"][1])
    assert lines(picture).axes[0].lines

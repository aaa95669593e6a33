"""Judging over many points: figures from hand-written tables, and the tables that comparisons give."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pandas as pd
import pytest

from analysis.compare import json_ready
from analysis.validation import POINT, Tables, figures, orders, overall, rows_of
from analysis.validation_report import Outcome, cards, point_table, render_html, render_markdown, verdict

RESULTS = Path(__file__).resolve().parents[2] / "analysis" / "results"
MS = 1e-3

POINTS = {  # measured, simulated ms of one token; the median repeat is 2 % slower
    ("a", "25%"): (40.0, 44.0),
    ("a", "75%"): (20.0, 19.0),
    ("b", "25%"): (30.0, 30.0),
    ("b", "75%"): (30.0, 33.0),
    ("c", "25%"): (30.3, 28.0),
}


def tables(constant_ms: float = 50.0, model: str = "m", peak: int = 0) -> Tables:
    places = [dict(zip(POINT, (model, *place, ""), strict=True)) for place in POINTS]
    points = pd.DataFrame(
        [
            {
                **place,
                "slots": 8,
                "repeats": 7,
                "decisions_promised": True,
                "decisions_exact": True,
                "memory_planned_bytes": 100,
                "memory_peak_bytes": peak,
            }
            for place in places
        ]
    )
    tokens = pd.DataFrame(
        [
            {
                **place,
                "step": step,
                "sequence": 0,
                "measured_s": measured * MS,
                "median_s": measured * MS * 1.02,
                "simulated_s": simulated * MS,
                "error": (simulated - measured) / measured,
                "constant_s": constant_ms * MS,
            }
            for place, (measured, simulated) in zip(places, POINTS.values(), strict=True)
            for step in (0, 1)
        ]
    )
    components = pd.DataFrame(
        [
            {**place, "name": name, "label": name, "measured_ms": 2.0, "simulated_ms": 1.0 if name == "x" else 3.0,
             "difference_ms": -1.0, "of_token": -0.05 if name == "x" else 0.05, "critical": name == "x"}
            for place in places for name in ("x", "y")
        ]
    )  # fmt: skip
    return Tables(points, tokens, components)


def test_the_errors_are_those_of_all_tokens() -> None:
    found = overall(tables())
    errors = [4 / 40, 1 / 20, 0.0, 3 / 30, 2.3 / 30.3]
    assert found["tokens"] == 10
    assert found["median"] == pytest.approx(sorted(errors)[2])
    assert found["mape"] == pytest.approx(sum(errors) / 5)
    assert found["bias"] == pytest.approx((4 / 40 - 1 / 20 + 0.1 - 2.3 / 30.3) / 5)
    assert found["worst"] == pytest.approx(0.1)
    assert found["noise"] == pytest.approx(0.02)
    assert found["repeats"] == [7, 7]
    assert (found["points"], found["systems"]) == (5, 3)


def test_skill_is_our_median_error_over_that_of_each_systems_constant() -> None:
    constant_errors = sorted([10 / 40, 30 / 20, 20 / 30, 20 / 30, 19.7 / 30.3])
    assert overall(tables())["skill"] == pytest.approx((2.3 / 30.3) / constant_errors[2])
    assert math.isnan(overall(tables(math.nan))["skill"])


def test_figures_by_system_tell_what_those_of_all_hide() -> None:
    """b is measured at 30 ms twice, simulated at 30 and 33; its constant of 31 ms is off by a thirtieth."""
    given = tables()
    given.tokens.loc[given.tokens.system == "b", "constant_s"] = 31 * MS
    found = {one["system"]: one for one in figures(given)["systems"]}
    assert list(found) == ["a", "b", "c"]
    assert (found["b"]["model"], found["b"]["tokens"]) == ("m", 4)
    assert found["b"]["median_error"] == found["b"]["bias"] == pytest.approx(0.05)
    assert found["b"]["constant_error"] == pytest.approx(1 / 30)
    assert found["b"]["skill"] == pytest.approx(1.5)
    assert found["a"]["bias"] == pytest.approx((0.1 - 0.05) / 2)
    shown = Outcome(given, figures(given), {}, "cpu")
    row = ("m", "b", "4", "5.0%", "+5.0%", "3.3%", "1.50")
    assert f"| {' | '.join(row)} |" in render_markdown(shown)
    page = render_html(shown)
    assert "By system, over its cache sizes" in page
    assert all(f'<td class="n">{cell}</td>' in page for cell in row[2:])
    (note,) = [card.note for card in cards(shown) if card.title == "Skill"]
    assert found["a"]["skill"] == pytest.approx(0.075 / 0.875)
    assert note.endswith("; by system 0.086 to 1.50")


def test_a_system_without_a_constant_has_errors_and_no_skill() -> None:
    given = tables()
    given.tokens.loc[given.tokens.system == "b", "constant_s"] = math.nan
    (one,) = [one for one in figures(given)["systems"] if one["system"] == "b"]
    assert one["median_error"] == pytest.approx(0.05)
    assert math.isnan(one["constant_error"])
    assert math.isnan(one["skill"])


def test_tau_is_over_all_points_that_the_noise_tells_apart() -> None:
    """b at both sizes and c lie within 2 %; of the other seven pairs six are ordered as measured."""
    found = overall(tables())
    assert found["pairs_left_out"] == pytest.approx(3 / 10)
    assert found["kendall_tau"] == pytest.approx(1.0)
    wrong = tables()
    wrong.tokens.loc[wrong.tokens.system == "c", "simulated_s"] = 50 * MS
    assert overall(wrong)["kendall_tau"] == pytest.approx((6 - 1) / 7)


def test_several_models_are_ranked_each_by_itself() -> None:
    one, other = tables(), tables(model="n")
    other.tokens[["measured_s", "median_s", "simulated_s"]] *= 1.005
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    both = Tables(*(pd.concat(pair, ignore_index=True) for pair in pairs))
    found = figures(both)
    assert found["overall"]["kendall_tau"] == pytest.approx(1.0)
    assert found["overall"]["points"] == 10
    assert set(found["models"]) == {"m", "n"}
    assert figures(one)["models"] == {}


def test_several_workloads_are_ranked_each_by_itself() -> None:
    """On the second one everything takes four times as long: not between the two, but within each, order is asked."""
    one, other = tables(), tables()
    other.tokens[["measured_s", "median_s"]] *= 4
    for table in vars(other).values():
        table["workload"] = "batch 4"
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    found = figures(Tables(*(pd.concat(pair, ignore_index=True) for pair in pairs)))
    assert found["overall"]["points"] == 10
    assert found["overall"]["kendall_tau"] == pytest.approx(1.0)
    assert found["overall"]["pairs_left_out"] == pytest.approx(3 / 10)
    assert [(change["low"], change["high"]) for change in found["crossovers"]] == [
        ("25%", "75%"),
        ("25%, batch 4", "75%, batch 4"),
    ]


def test_a_change_of_places_is_found_and_compared() -> None:
    (one,) = orders(rows_of(tables()))
    assert (one.below, one.above, one.low, one.high) == ("b", "a", "25%", "75%")
    assert one.simulated == "the same"
    wrong = tables()
    wrong.tokens.loc[(wrong.tokens.system == "a") & (wrong.tokens.cache == "75%"), "simulated_s"] = 34 * MS
    assert [order.simulated for order in orders(rows_of(wrong))] == ["b at both"]


def test_places_that_are_closer_than_the_noise_do_not_change() -> None:
    close = tables()
    near = close.tokens.system == "a"
    close.tokens.loc[near & (close.tokens.cache == "75%"), ["measured_s", "median_s"]] = (29.5 * MS, 30.1 * MS)
    assert orders(rows_of(close)) == []


def test_components_are_means_over_the_points() -> None:
    x, y = figures(tables())["components"]
    assert (x["name"], x["measured_ms"], x["simulated_ms"], x["critical"]) == ("x", 2.0, 1.0, True)
    assert x["of_token"] == pytest.approx(-0.05)
    assert y["absolute_of_token"] == pytest.approx(0.05)


def test_memory_is_compared_where_a_run_knows_its_peak() -> None:
    assert math.isnan(overall(tables())["memory_off"])
    assert overall(tables(peak=98))["memory_off"] == pytest.approx(0.02)
    shown = Outcome(tables(peak=98), figures(tables(peak=98)), {}, "cuda")
    assert "| device memory, peak against planned | 2.0% |" in render_markdown(shown)
    assert "device memory" not in render_markdown(outcome())


def test_figures_from_stored_tables_are_the_same(tmp_path: Path) -> None:
    tables().save(tmp_path)
    assert json_ready(figures(Tables.load(tmp_path))) == json_ready(figures(tables()))


COMMITTED = sorted(path.parent for path in RESULTS.glob("*/tokens.parquet"))
assert COMMITTED, "at least one validation is kept"


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda path: path.name)
def test_the_committed_figures_follow_from_the_committed_tables(folder: Path) -> None:
    kept = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    found = json.loads(json.dumps(json_ready(figures(Tables.load(folder)))))
    for name, value in found["overall"].items():
        assert kept["overall"][name] == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value), name
    assert [(one["system"], one["cache"]) for one in kept["points"]] == [
        (one["system"], one["cache"]) for one in found["points"]
    ]
    for mine, theirs in zip(found["points"], kept["points"], strict=True):
        assert theirs["measured_ms"] == pytest.approx(mine["measured_ms"])
        assert theirs["simulated_ms"] == pytest.approx(mine["simulated_ms"])
    assert kept["crossovers"] == found["crossovers"]


# What is shown.


def outcome(missing: tuple[str, ...] = (), device: str = "cpu") -> Outcome:
    return Outcome(tables(), figures(tables()), {"machine": "by hand"}, device, missing)


def test_cards_say_whether_a_bar_holds() -> None:
    shown = {card.title: (card.value, card.outcome) for card in cards(outcome())}
    assert shown["Median error"] == ("7.6%", "holds at most 10.0%")
    assert shown["90th percentile"] == ("10.0%", "holds at most 20.0%")
    assert shown["Kendall's tau"] == ("1.00", "holds at least 0.900")
    assert {card.title: card.outcome for card in cards(outcome(device="cuda"))}["Median error"] == "misses at most 5.0%"


def test_the_page_stands_alone_and_tells_everything() -> None:
    page = render_html(outcome(("Not complete: 3 of 9 pieces are missing.",)))
    assert "http" not in page
    assert page.count("<svg") == 3
    for words in ("Simulated against measured", "Kendall", "Not complete: 3 of 9", "by hand", "the same", "skill"):
        assert words in page
    assert render_html(outcome()) == render_html(outcome())


def test_markdown_has_a_row_a_point_and_every_table_is_even() -> None:
    lines = render_markdown(outcome()).splitlines()
    assert sum(line.startswith("| m |") for line in lines) == len(POINTS) + len({system for system, _ in POINTS})
    for before, line in pairwise(lines):
        if before.startswith("|") and line.startswith("|"):
            assert before.count("|") == line.count("|")


def test_the_verdict_tells_of_a_busy_machine_and_of_decisions() -> None:
    assert "busy" not in verdict(outcome())
    noisy = tables()
    noisy.tokens.median_s *= 1.3
    wrong = noisy.points.assign(decisions_exact=False)
    noisy = Tables(wrong, noisy.tokens, noisy.components)
    told = verdict(Outcome(noisy, figures(noisy), {}, "cpu"))
    assert "too busy to judge" in told
    assert "decided differently where equality is promised" in told


def test_the_terminal_has_a_row_a_point() -> None:
    assert point_table(outcome()).row_count == len(POINTS)

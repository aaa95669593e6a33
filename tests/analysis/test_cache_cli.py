"""``moetwin cache``: rows that are right, tables that say what they count, files, and progress."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numba
import pandas as pd
import pytest
from rich.console import Console

from analysis import cache_progress
from analysis.cache_study import Cell
from analysis.cache_tables import replay_table, verdicts
from sim.policies import EVICTION
from tests.analysis.caching import SIZES, golden, refused, rows, run, shown
from traces import store
from traces.synthetic import generate

pytestmark = pytest.mark.usefixtures("cache_folder")

FIELDS = {
    *("policy", "scope", "contract", "phase", "capacity_slots", "capacity_bytes", "assignments", "union_accesses"),
    *("hits_assignments", "hits_union", "misses_union", "compulsory_misses", "capacity_misses", "collision_misses"),
    *("evictions", "bytes_loaded", "static_load_bytes", "order", "sequences", "warmup_steps", "seed", "trace_digest"),
    *("hit_ratio_assignments", "hit_ratio_union", "regime_mean", "regime_above_one", "seconds", "accesses_per_s"),
}
"""The fields that every row has."""


# The replay.


def test_the_golden_trace_comes_out_as_published() -> None:
    (row,) = rows("golden.safetensors", "--policies", "lru", "--capacity", "50%")
    assert row.keys() >= FIELDS
    counts = {name: row[name] for name in ("union_accesses", "assignments", "hits_union", "misses_union")}
    assert counts == {"union_accesses": 30, "assignments": 30, "hits_union": 12, "misses_union": 18}
    assert (row["compulsory_misses"], row["capacity_misses"], row["collision_misses"]) == (12, 6, 0)
    assert row["capacity_slots"] == 6
    assert row["capacity_bytes"] == 600
    assert row["hit_ratio_assignments"] == 12 / 30
    assert row["bytes_loaded"] == 1800
    assert row["tokens"] == 5
    assert row["bytes_a_token"] == 360
    assert row["hit_ratio_assignments_low"] is None
    assert row["trace_digest"] == golden().digest


def test_a_trace_after_cache_is_a_replay_and_options_may_come_first() -> None:
    def counted(*words: str) -> list[dict[str, Any]]:
        clock = ("seconds", "accesses_per_s")
        return [{name: value for name, value in row.items() if name not in clock} for row in rows(*words)]

    after = counted("t.safetensors", "--policies", "lru")
    assert counted("replay", "t.safetensors", "--policies", "lru") == after
    assert counted("--policies", "lru", "t.safetensors") == after
    assert after[0]["capacity"] == "25%"


def test_rows_come_by_capacity_then_phase_then_policy() -> None:
    found = rows("t.safetensors", "--policies", "lru,lfu", "--capacity", "25%,4", "--phases", "prefill,decode")
    keys = [(row["capacity"], row["phase"], row["policy"]) for row in found]
    assert keys == [(c, p, n) for c in ("25%", "4") for p in ("prefill", "decode") for n in ("lru", "lfu")]
    assert {row["tokens"] for row in found if row["phase"] == "prefill"} == {8 * 3}
    assert {row["tokens"] for row in found if row["phase"] == "decode"} == {8 * 10}


def test_warm_up_is_left_out_of_tokens_and_counts_and_is_named() -> None:
    """One sequence has a prompt of three tokens in one pass, and ten passes more; the twelfth pass is a prompt."""
    whole, rest = (rows("t.safetensors", "--policies", "lru", "--warmup", str(n))[0] for n in (0, 12))
    assert (whole["tokens"], rest["tokens"], rest["warmup_steps"]) == (104, 104 - 16, 12)
    assert rest["assignments"] == whole["assignments"] - 16 * 2 * 2
    assert "12 passes of warm-up not counted" in shown("t.safetensors", "--policies", "lru", "--warmup", "12")


def test_settings_reach_the_replay() -> None:
    words = ("--scope", "global", "--contract", "serial", "--order", "shuffled", "--sequences", "fresh", "--seed", "3")
    (row,) = rows("t.safetensors", "--policies", "lru", *words, "--batch", "2", "--bytes", "6MiB")
    wanted = {"scope": "global", "contract": "serial", "order": "shuffled", "sequences": "fresh", "seed": 3, "batch": 2}
    assert {name: row[name] for name in wanted} == wanted
    assert (row["capacity_slots"], row["capacity_bytes"], row["capacity"]) == (None, 6 << 20, "6MiB")


def test_the_gap_goes_from_lru_to_belady() -> None:
    lru, lfu, belady = rows("t.safetensors", "--policies", "lru,lfu,belady", "--capacity", "50%")
    assert (lru["gap_closed"], belady["gap_closed"]) == (0, 1)
    share = (lfu["hits_union"] - lru["hits_union"]) / (belady["hits_union"] - lru["hits_union"])
    assert lfu["gap_closed"] == pytest.approx(share)
    assert all(row["gap_closed"] is None for row in rows("t.safetensors", "--policies", "lru,lfu"))
    assert all(
        row["gap_closed"] is None for row in rows("t.safetensors", "--policies", "lru,belady", "--capacity", "8")
    )


def test_intervals_hold_the_ratio_and_follow_the_seed() -> None:
    (row,) = rows("t.safetensors", "--policies", "lru")
    assert row["hit_ratio_assignments_low"] < row["hit_ratio_assignments"] < row["hit_ratio_assignments_high"]
    (again,) = rows("t.safetensors", "--policies", "lru")
    (other,) = rows("t.safetensors", "--policies", "lru", "--seed", "1")
    assert again["hit_ratio_assignments_low"] == row["hit_ratio_assignments_low"]
    assert other["hit_ratio_assignments_low"] != row["hit_ratio_assignments_low"]


def test_policies_that_hit_alike_are_not_distinguishable() -> None:
    words = ("t.safetensors", "--policies", "lru,belady", "--policy-file", "own.py:Same")
    lru, belady, same = rows(*words)
    assert same["hits_union"] == lru["hits_union"]
    assert same["not_distinguishable_from_best"] is True
    assert belady["not_distinguishable_from_best"] is None
    told = "25%: best by assignment without knowing the future: lru; "
    assert f"{told}not distinguishable from it: Same" in shown(*words)
    assert "best by" not in shown("t.safetensors", "--policies", "lru,belady"), "lru has no rival"


@pytest.mark.parametrize(
    ("alike", "rivals", "told"),
    [
        (("lfu", "arc"), 2, "; not distinguishable from it: lfu, arc"),
        ((), 2, "; all others are distinguishable from it"),
        ((), 0, None),
    ],
)
def test_a_verdict_names_the_measure_and_the_rivals(alike: tuple[str, ...], rivals: int, told: str | None) -> None:
    found = verdicts([Cell(rows("t.safetensors", "--policies", "lru"), "lru", alike, None, rivals)], bound=True)
    best = [] if told is None else [f"25%: best by assignment without knowing the future: lru{told}"]
    assert found[:-1] == best
    assert found[-1].startswith("25%: regime (union over capacity) ")


def test_a_bound_that_is_passed_by_assignment_says_what_it_bounds() -> None:
    row = rows("t.safetensors", "--policies", "belady")[0]
    passed = {"policy": "lru", "hit_ratio_assignments": row["hit_ratio_assignments"] + 0.01}
    told = "belady bounds the hits by union over all passes: by assignment, or in one phase, others may hit more"
    for over in (row, row | passed):
        lines = verdicts([Cell([row, over], None, (), None)], bound=True)
        assert (told in lines) is (over is not row)


def test_two_rankings_in_one_table_are_told_apart() -> None:
    told = (
        "ranked by assignment (what tokens see); the gap is by union (what is loaded), and may rank policies otherwise"
    )
    assert told in shown("t.safetensors", "--policies", "lru,lfu,belady")
    for one_ranking in ("lru,belady", "lru,lfu,fifo"):
        assert "ranked by" not in shown("t.safetensors", "--policies", one_ranking)


def test_bytes_are_a_dash_where_the_trace_does_not_know_them() -> None:
    store.save(generate("zipf", 1, replace(SIZES, expert_bytes=1)), "unsized.safetensors")
    words = ("unsized.safetensors", "--policies", "lru,lfu")
    (row, *_) = rows(*words)
    by_bytes = {name for name in row if "bytes" in name}
    assert by_bytes >= {"capacity_bytes", "bytes_loaded", "bytes_a_token", "bytes_a_step_p50", "static_load_bytes"}
    assert {row[name] for name in by_bytes} == {None}
    assert row["misses_union"] > 0
    text = shown(*words)
    assert "\u2013 for bytes, whose sizes the trace does not know (`moetwin trace import --expert-bytes N`" in text
    assert " B\n" not in text
    curve = rows("curve", *words)
    assert {entry["capacity_bytes"] for entry in curve} == {None}
    (known, *_) = rows("t.safetensors", "--policies", "lru,lfu")
    assert None not in {known[name] for name in by_bytes}
    assert "for bytes, whose" not in shown("t.safetensors", "--policies", "lru,lfu")


def test_the_table_names_units_bound_and_regime() -> None:
    text = shown("t.safetensors", "--policies", "lru,belady", "--capacity", "25%,50%")
    for words in (
        "zipf, trace t.safetensors: 2 layers x 8 experts, top-2; 104 tokens in 88 passes, 8 sequences, one at a time",
        "a pool each layer, atomic contract, cache carried across sequences, 0 passes of warm-up not counted",
        "hit ratio by",
        "assignment",
        "95% interval",
        "belady, hit-rate bound",
        "25%: regime (union over capacity) ",
        "intervals over 8 sequences only: they come out too narrow",
        "MiB",
    ):
        assert words in text
    assert text.count("50%") == 2 + 1


def test_one_sequence_has_no_interval_and_that_is_said() -> None:
    text = shown("golden.safetensors", "--policies", "lru,lfu")
    assert "no intervals: 1 sequences are too few to resample" in text
    assert "not distinguishable" not in text


def test_belady_is_no_bound_where_bytes_differ() -> None:
    store.save(generate("zipf", 1, replace(SIZES, expert_bytes=(1000, 700))), "uneven.safetensors")
    words = ("uneven.safetensors", "--policies", "lru,belady")
    by_bytes = shown(*words, "--bytes", "5KB", "--scope", "global")
    assert "belady bounds nothing here, for experts differ in bytes" in by_bytes
    assert "hit-rate bound" not in by_bytes
    assert "belady, hit-rate bound" in shown(*words)


def test_a_narrow_terminal_gets_the_columns_that_matter() -> None:
    found = rows("t.safetensors", "--policies", "lru")
    cell = Cell(found, "lru", (), None)
    narrow, wide = (
        [
            str(c.header).strip().replace("\n", " ")
            for c in replay_table([cell], bound=True, phases=False, wide=w).columns
        ]
        for w in (False, True)
    )
    assert narrow == wide[: len(narrow)]
    assert "union misses" in narrow
    assert "regime" in set(wide) - set(narrow)


@pytest.mark.usefixtures("other_traces")
def test_all_is_what_the_trace_can_feed_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: EVICTION[name] for name in ("lru", "static", "belady", "mrs", "lfu")}
    monkeypatch.setattr("analysis.cache_options.EVICTION", few)
    result = run("bare.safetensors", "--policies", "all", "--json")
    assert result.exit_code == 0, result.output
    names = [json.loads(line)["policy"] for line in result.stdout.splitlines()]
    assert names == ["lru", "belady", "lfu"]
    assert "note: without mrs: trace must have the router's scores" in result.stderr
    assert "note: without static: static must be given a calibration trace" in result.stderr


@pytest.mark.usefixtures("other_traces")
def test_gates_stand_in_for_scores_with_a_warning_unless_strict() -> None:
    warned = run("t.safetensors", "--policies", "mrs", "--json")
    assert "note: mrs: gates of the chosen experts instead of the router's scores" in warned.stderr
    assert run("scored.safetensors", "--policies", "mrs", "--strict", "--json").stderr == ""
    assert refused("t.safetensors", "--policies", "mrs", "--strict") == (
        "trace must have the router's scores for mrs (strict), got none"
    )


@pytest.mark.usefixtures("other_traces")
def test_a_static_set_is_fitted_to_another_trace_and_its_load_is_told() -> None:
    words = ("t.safetensors", "--policies", "static", "--calibration", "other.safetensors")
    (row,) = rows(*words)
    assert row["static_load_bytes"] == 4 << 20
    assert "static at 25%: 4.00 MiB loaded before the first pass, beside its misses" in shown(*words)


def test_constants_of_policies_are_set_by_name_and_stand_in_the_row() -> None:
    words = ("t.safetensors", "--policies", "lru", "--policy-file", "own.py:Late")
    assert [row["options"] for row in rows(*words)] == [{}, {"patience": 3, "shy": False, "mode": "a", "rate": 0.5}]
    given = [word for text in ("patience=7", "Late.shy=yes", "mode=b", "rate=2") for word in ("--option", text)]
    assert rows(*words, *given)[1]["options"] == {"patience": 7, "shy": True, "mode": "b", "rate": 2.0}


def test_a_ghost_larger_than_the_model_is_as_large_as_the_model() -> None:
    words = ("t.safetensors", "--policies", "s3fifo", "--option")
    (huge,), (large,) = (rows(*words, f"ghost={size}") for size in ("1e308", "4"))
    assert huge["hits_union"] == large["hits_union"]


# What is written.


def test_a_table_file_holds_the_rows_that_are_printed() -> None:
    words = ("t.safetensors", "--policies", "lru,lfu", "--capacity", "25%,50%")
    assert "out: rows.csv" in shown(*words, "--out", "rows.csv")
    found = rows(*words, "--out", "rows.parquet")
    for frame in (pd.read_csv("rows.csv"), pd.read_parquet("rows.parquet")):
        assert list(frame.columns) == list(found[0])
        assert frame["hits_union"].tolist() == [row["hits_union"] for row in found]
        assert frame["options"].tolist() == ["{}"] * 4


@pytest.mark.parametrize("command", [(), ("curve",), ("locality",)])
def test_plots_are_written(command: tuple[str, ...]) -> None:
    policies = () if command == ("locality",) else ("--policies", "lru,lfu,belady")
    shown(*command, "t.safetensors", *policies, "--out", "plot.png")
    shown(*command, "t.safetensors", *policies, "--out", "plot.svg")
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("plot.svg").read_text()


# Help, lists, progress.


def test_help_explains_the_sub_commands_and_the_replay() -> None:
    text = shown("--help")
    for words in ("curve", "locality", "policies", "moetwin cache mixed --policies", "--contract", "--policy-file"):
        assert words in text


def test_every_policy_is_listed_with_what_it_needs_and_its_source() -> None:
    found = {row["policy"]: row for row in rows("policies")}
    assert found["belady"]["needs"] == ["future"]
    assert found["belady"]["source"].startswith("Belady")
    assert found["mrs"]["needs"] == ["scores"]
    assert "HybriMoE, arXiv 2504.05897" in found["mrs"]["source"]
    assert found["mrs"]["options"]["alpha"] == 0.5
    text = shown("policies")
    assert all(name in text for name in found)
    assert all(row["summary"] and "`" not in row["summary"] for row in found.values())


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal on stderr would show."""
    screen = io.StringIO()
    fake = partial(Console, file=screen, force_terminal=True, width=120)
    monkeypatch.setattr(cache_progress, "Console", lambda stderr: fake())
    return screen


def test_a_first_run_shows_that_it_compiles(terminal: io.StringIO) -> None:
    with cache_progress.progress_bar(10) as progress:
        progress("lru", 0)
        assert numba.njit(lambda x: x + 1)(1) == 2
    assert "compiling lru, kept for the next run" in terminal.getvalue()


def test_progress_names_the_policy_at_work(terminal: io.StringIO) -> None:
    with cache_progress.progress_bar(10) as progress:
        progress("lru", 4)
        progress("lfu", 6)
    assert "lfu" in terminal.getvalue()
    assert "100%" in terminal.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    assert run("t.safetensors", "--policies", "lru", "--json").stderr == ""

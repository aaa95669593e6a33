"""``moetwin cache``: rows that are right, tables that say what they count, and one line for every mistake."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import moetwin
from analysis import cache_progress
from analysis.cache_study import Cell
from analysis.cache_tables import replay_table
from analysis.shuffled import order_gain
from sim.policies import EVICTION
from traces import store
from traces.locality import locality
from traces.schema import Phase, Trace, TraceHeader
from traces.synthetic import Sizes, generate

FIELDS = {
    *("policy", "scope", "contract", "phase", "capacity_slots", "capacity_bytes", "assignments", "union_accesses"),
    *("hits_assignments", "hits_union", "misses_union", "compulsory_misses", "capacity_misses", "collision_misses"),
    *("evictions", "bytes_loaded", "static_load_bytes", "order", "sequences", "warmup_steps", "seed", "trace_digest"),
    *("hit_ratio_assignments", "hit_ratio_union", "regime_mean", "regime_above_one", "seconds", "accesses_per_s"),
}
"""The fields that every row has."""

GOLDEN = [(0, 1), (0, 2), (0, 1), (0, 3), (0, 1)]
"""What each of three layers of four experts is asked for, in five steps."""

OWN = """
from sim.policies import EvictionPolicy
from sim.policies.evict.lru import Lru

class Same(Lru):
    pass

class Late(EvictionPolicy):
    defaults = {"patience": 3, "shy": False, "mode": "a", "rate": 0.5}
    def __init__(self, context):
        super().__init__(context)
        if self.options["patience"] < 1:
            raise ValueError(f"patience must be at least 1, got {self.options['patience']}")
    def key(self, block):
        return block

class Broken(EvictionPolicy):
    def key(self, block):
        return 1 / 0

class Leaves(EvictionPolicy):
    def key(self, block):
        raise SystemExit(0)

class Nameless(Lru):
    name = 5
"""


def run(*words: str) -> Result:
    return CliRunner().invoke(moetwin.app, ["cache", *words], env={"COLUMNS": "220"})


def shown(*words: str) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def rows(*words: str) -> list[dict[str, Any]]:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=never) for line in shown(*words, "--json").splitlines()]


def refused(*words: str) -> str:
    """The error of a command that must end with exit code 2, which is one line on stderr."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("note: ")]
    return line.removeprefix("error: ")


def golden() -> Trace:
    ids = np.array([[unions] * 3 for unions in GOLDEN], np.uint16)
    index = np.arange(len(ids))
    header = TraceHeader(model="golden", layers=3, experts=4, top_k=2, expert_bytes=(100, 100, 100))
    zeros = np.zeros_like(index)
    return Trace.of(
        header, expert_ids=ids, token_ids=zeros, sequence=zeros, position=index, step=index, phase=zeros + 1
    )


SIZES = Sizes(sequences=8, prompt_tokens=3, new_tokens=10, layers=2, experts=8, top_k=2, expert_bytes=1 << 20)


@pytest.fixture(autouse=True)
def _in_a_folder_with_traces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store.save(golden(), "golden.safetensors")
    store.save(generate("zipf", 1, SIZES), "t.safetensors")
    Path("own.py").write_text(OWN)


@pytest.fixture
def _other_traces() -> None:
    """Traces that lack what some policies need, or have too much."""
    store.save(generate("zipf", 2, SIZES), "other.safetensors")
    store.save(generate("zipf", 1, replace(SIZES, scores=True)), "scored.safetensors")
    bare = generate("zipf", 1, SIZES)
    store.save(Trace.of(bare.header, **{n: a for n, a in bare.arrays() if n != "gates"}), "bare.safetensors")
    small = Sizes(sequences=2, prompt_tokens=0, new_tokens=4, layers=3, experts=8, top_k=2)
    store.save(generate("zipf", 1, small), "small.safetensors")


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
    assert "best without knowing the future: lru; not distinguishable from it: Same" in shown(*words)


def test_the_table_names_units_bound_and_regime() -> None:
    text = shown("t.safetensors", "--policies", "lru,belady", "--capacity", "25%,50%")
    for words in (
        "104 tokens in 88 passes of 8 groups (batch 1), 2 layers x 8 experts, top-2",
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


@pytest.mark.usefixtures("_other_traces")
def test_all_is_what_the_trace_can_feed_and_the_rest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: EVICTION[name] for name in ("lru", "static", "belady", "mrs", "lfu")}
    monkeypatch.setattr("analysis.cache_options.EVICTION", few)
    result = run("bare.safetensors", "--policies", "all", "--json")
    assert result.exit_code == 0, result.output
    names = [json.loads(line)["policy"] for line in result.stdout.splitlines()]
    assert names == ["lru", "belady", "lfu"]
    assert "note: without mrs: trace must have the router's scores" in result.stderr
    assert "note: without static: static must be given a calibration trace" in result.stderr


@pytest.mark.usefixtures("_other_traces")
def test_gates_stand_in_for_scores_with_a_warning_unless_strict() -> None:
    warned = run("t.safetensors", "--policies", "mrs", "--json")
    assert "note: mrs: gates of the chosen experts instead of the router's scores" in warned.stderr
    assert run("scored.safetensors", "--policies", "mrs", "--strict", "--json").stderr == ""
    assert refused("t.safetensors", "--policies", "mrs", "--strict") == (
        "trace must have the router's scores for mrs (strict), got none"
    )


@pytest.mark.usefixtures("_other_traces")
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("t.safetensors --capacity 0", "be between 1 and 8 slots, got 0"),
        ("t.safetensors --capacity 0%", "be between 1 and 8 slots, got 0%"),
        ("t.safetensors --capacity 5%", "be between 1 and 8 slots, got 5% which is 0"),
        ("t.safetensors --capacity 101%", "be between 1 and 8 slots, got 101% which is 8"),
        ("t.safetensors --capacity 9", "be between 1 and 8 slots, got 9"),
        ("t.safetensors --capacity half", "be a number of slots or a percentage, got 'half'"),
        ("t.safetensors --capacity 25%,,50%", "capacity must be names or numbers with commas between them"),
        ("t.safetensors --bytes 1MiB", "bytes must leave each layer's share room for one expert of 1048576 bytes"),
        ("t.safetensors --bytes 1000KB --scope global", "bytes must leave the cache room for one expert"),
        ("t.safetensors --bytes 1GiB", "bytes must be at most the 16777216 of all experts, got 1073741824"),
        ("t.safetensors --bytes lots", "bytes must be a size such as 8GiB or 500MB, got 'lots'"),
        ("t.safetensors --bytes 8MiB --capacity 25%", "bytes must not be given together with capacity, got 8MiB"),
        ("t.safetensors --phases decoding", "phase must be a known name, got 'decoding' (did you mean decode?)"),
        ("golden.safetensors --phases all,prefill", "phase must be one that the trace has (decode), got prefill"),
        ("t.safetensors --policies lru,lfuu", "policy must be a known name, got 'lfuu' (did you mean lfu"),
        ("t.safetensors --scope layers", "scope must be a known name, got 'layers' (did you mean layer?)"),
        ("t.safetensors --contract atom", "contract must be a known name, got 'atom' (did you mean atomic?)"),
        ("t.safetensors --order ascending", "order must be left out under the atomic contract, got ascending"),
        ("t.safetensors --contract serial --order up", "order must be a known name, got 'up'"),
        ("t.safetensors --sequences fres", "sequences must be a known name, got 'fres' (did you mean fresh?)"),
        ("t.safetensors --batch 0", "batch must be greater than or equal to 1, got '0'"),
        ("t.safetensors --warmup 88", "warmup must be between 0 and 87 of 88 passes, got 88"),
        ("t.safetensors --option x=1 --policies lru", "option must be a constant of a policy that has one, got 'x=1'"),
        ("t.safetensors --option x", "option must be name=value, got 'x'"),
        ("t.safetensors --option lfx.x=1 --policies lfu", "option's policy must be a known name, got 'lfx'"),
        ("nowhere.safetensors", "trace must be an existing file, got nowhere.safetensors"),
        ("mixxed", "trace or command must be a known name, got 'mixxed' (did you mean mixed?)"),
        ("localty mixed", "trace or command must be a known name, got 'localty' (did you mean locality?)"),
        ("t.safetensors --polices lru", "option must be a known name, got '--polices' (did you mean --policies"),
        ("t.safetensors --out t.txt", "out must end in one of .csv, .parquet, .png, .svg, got t.txt"),
        ("t.safetensors --out own.py/x.csv", "out must be a file that can be written, got own.py/x.csv"),
        ("t.safetensors --out x.png --capacity 25%,50%", "out must be a table for more than one capacity or phase"),
        ("bare.safetensors --policies mrs", "trace must have the router's scores, or at least gates, for mrs"),
        ("t.safetensors --policies static", "static must be given a calibration trace"),
        ("t.safetensors --calibration t.safetensors", "calibration trace must be another than the one replayed"),
        ("t.safetensors --calibration small.safetensors", "calibration trace must have 2 layers, 8 experts, top 2"),
        ("t.safetensors --policy-file own.py:Lat", "class in own.py must be a known name, got 'Lat'"),
        ("t.safetensors --policy-file own.py:Broken", "policy_file must decide without errors, got own.py, line "),
        ("t.safetensors --policy-file none.py:X", "policy_file must be an existing file, got none.py"),
        ("t.safetensors --policy-file own.py:Late --option patience=two", "patience must be a whole number, got 'two'"),
        ("t.safetensors --policy-file own.py:Late --option rate=fast", "rate must be a number, got 'fast'"),
        ("t.safetensors --policy-file own.py:Late --option shy=so", "shy must be true or false, got 'so'"),
        (
            "t.safetensors --policy-file own.py:Late --option patience=0",
            "patience must be at least 1, got 0 (own.py:Late)",
        ),
        ("t.safetensors --policy-file own.py:Late --option patiense=1", "option must be a known name, got 'patiense'"),
        ("t.safetensors --policies window-score --option swaps=0", "window-score: swaps must be at least 1, got 0"),
        ("t.safetensors --policies window-score --option swaps=nan", "swaps must be a whole number, got 'nan'"),
        ("t.safetensors --policies lfu-decay --option window=0", "lfu-decay: window must be at least 1, got 0"),
        (f"t.safetensors --policies lfu-decay --option window={1 << 63}", "window must be below 2**63, got 9223372"),
        ("t.safetensors --policies s3fifo --option ghost=inf", "ghost must be a finite number, got 'inf'"),
        ("t.safetensors --policies s3fifo --option s3fifo.small=2", "s3fifo: small must be from 0 to 1, got 2.0"),
        ("t.safetensors --policies hobbit --option recency=nan", "recency must be a finite number, got 'nan'"),
        ("t.safetensors --policy-file own.py:Late --option rate=-inf", "rate must be a finite number, got '-inf'"),
        ("t.safetensors --policy-file own.py:Leaves", "policy_file must decide without errors, got own.py, line "),
        (
            "t.safetensors --policy-file own.py:Nameless",
            "policy_file must have a name that is text, in one line, got 5",
        ),
        ("curve t.safetensors --unit slot", "unit must be a known name, got 'slot' (did you mean slots?)"),
        ("curve t.safetensors --phase all,decode", "phase must be one of all, prefill and decode, got all,decode"),
        ("curve t.safetensors --policies lfu --out c.png", "policies must have lru or belady among them for a plot"),
        ("locality t.safetensors --contract atom", "contract must be a known name, got 'atom'"),
        ("locality t.safetensors --out l.csv", "out must end in one of .png, .svg, got l.csv"),
    ],
)
@pytest.mark.usefixtures("_other_traces")
def test_a_mistake_is_one_line_and_leaves_nothing(words: str, message: str, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())
    known = () if "--policies" in words or not words.startswith("t.safe") else ("--policies", "lru")
    assert message in refused(*words.split(" "), *known)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_ghost_larger_than_the_model_is_as_large_as_the_model() -> None:
    words = ("t.safetensors", "--policies", "s3fifo", "--option")
    (huge,), (large,) = (rows(*words, f"ghost={size}") for size in ("1e308", "4"))
    assert huge["hits_union"] == large["hits_union"]


@pytest.mark.parametrize("command", [(), ("curve",)])
def test_no_policy_at_all_is_refused_and_none_but_ones_own_is_not(command: tuple[str, ...]) -> None:
    words = (*command, "t.safetensors", "--policies", "")
    assert refused(*words) == "policies must name at least one policy, got ''"
    assert {row["policy"] for row in rows(*words, "--policy-file", "own.py:Late")} == {"Late"}


def test_a_policy_file_with_a_registered_name_is_refused() -> None:
    Path("thief.py").write_text(OWN.replace("class Same(Lru):\n    pass", 'class Same(Lru):\n    name = "lru"'))
    told = refused("t.safetensors", "--policies", "lfu", "--policy-file", "thief.py:Same")
    assert told == "policy_file must have a class with a name of its own, got 'lru' in thief.py:Same"


# What is written.


def test_a_table_file_holds_the_rows_that_are_printed() -> None:
    words = ("t.safetensors", "--policies", "lru,lfu", "--capacity", "25%,50%")
    assert "out: rows.csv" in shown(*words, "--out", "rows.csv")
    found = rows(*words, "--out", "rows.parquet")
    for frame in (pd.read_csv("rows.csv"), pd.read_parquet("rows.parquet")):
        assert list(frame.columns) == list(found[0])
        assert frame["hits_union"].tolist() == [row["hits_union"] for row in found]
        assert frame["options"].tolist() == ["{}"] * 4


def test_a_file_that_exists_is_kept_unless_forced() -> None:
    Path("rows.csv").write_text("mine")
    words = ("t.safetensors", "--policies", "lru", "--out", "rows.csv")
    assert refused(*words).startswith("out must be a new file (or give --force), got rows.csv")
    assert Path("rows.csv").read_text() == "mine"
    shown(*words, "--force")
    assert Path("rows.csv").read_text().startswith("policy,")


@pytest.mark.parametrize("command", [(), ("curve",), ("locality",)])
def test_plots_are_written(command: tuple[str, ...]) -> None:
    policies = () if command == ("locality",) else ("--policies", "lru,lfu,belady")
    shown(*command, "t.safetensors", *policies, "--out", "plot.png")
    shown(*command, "t.safetensors", *policies, "--out", "plot.svg")
    assert Path("plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in Path("plot.svg").read_text()


# Curves.


@pytest.mark.parametrize("settings", [(), ("--contract", "serial", "--phase", "decode", "--sequences", "fresh")])
def test_a_curve_is_the_replay_at_every_capacity(settings: tuple[str, ...]) -> None:
    every = ",".join(str(slots) for slots in range(1, 9))
    curve = rows("curve", "t.safetensors", "--policies", "belady,lru,lfu", "--capacity", "2,6", *settings)
    replayed = rows(
        "t.safetensors",
        *("--policies", "lru,belady,lfu", "--capacity", every),
        *(word.replace("--phase", "--phases") for word in settings),
    )
    ratios = {(row["policy"], row["capacity_slots"]): row["hit_ratio_assignments"] for row in replayed}
    found = {(row["policy"], row["capacity_slots"]): row["hit_ratio_assignments"] for row in curve}
    assert found == {key: pytest.approx(value) for key, value in ratios.items() if key[0] != "lfu" or key[1] in (4, 12)}
    assert {row["contract"] for row in curve} == {"serial" if settings else "atomic"}
    assert all(row["trace_digest"] == replayed[0]["trace_digest"] for row in curve)


def test_the_table_of_a_curve_shows_the_capacities_named_and_the_knee() -> None:
    (row,) = rows("t.safetensors", "--policies", "lru", "--capacity", "50%")
    text = shown("curve", "t.safetensors", "--capacity", "50%,100%", "--policies", "lru,lfu")
    (line,) = [line for line in text.splitlines() if line.startswith("lru")]
    assert line.split()[1] == f"{row['hit_ratio_assignments']:.4f}"
    assert "knee of lru: " in text


def test_a_curve_in_bytes_meets_the_capacities_named() -> None:
    (row,) = rows("t.safetensors", "--policies", "lru", "--scope", "global", "--bytes", "7MiB")
    words = ("curve", "t.safetensors", "--unit", "bytes", "--scope", "global", "--policies", "lru,lfu")
    found = [one for one in rows(*words, "--capacity", "7MiB,50%") if one["capacity_bytes"] == 7 << 20]
    assert [one["policy"] for one in found] == ["lru", "lfu"]
    assert found[0]["hit_ratio_assignments"] == row["hit_ratio_assignments"]
    assert "50%" in shown(*words, "--capacity", "50%")


# Locality.


def one_expert_a_token(ids: list[int]) -> Trace:
    index = np.arange(len(ids))
    header = TraceHeader(model="m", layers=1, experts=4, top_k=1, expert_bytes=(1,))
    zeros = np.zeros_like(index)
    chosen = np.array(ids, np.uint16).reshape(-1, 1, 1)
    phase = np.where(index < len(ids) // 2, Phase.PREFILL, Phase.DECODE)
    return Trace.of(header, expert_ids=chosen, token_ids=zeros, sequence=zeros, position=index, step=index, phase=phase)


def test_order_is_worth_what_lru_loses_when_it_is_shuffled() -> None:
    """Runs of eight equal experts: with one slot, all but the first of a run hit."""
    ids = [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    found = order_gain(one_expert_a_token(ids), rng=np.random.default_rng(5))
    shuffled = np.array(ids)[np.random.default_rng(5).permutation(32)]
    alike = int((shuffled[1:] == shuffled[:-1]).sum())
    assert found[1]["capacity_slots"] == 1
    assert found[1]["capacity_share"] == 0.25
    assert found[1]["hit_ratio"] == 28 / 32
    assert found[1]["hit_ratio_shuffled"] == alike / 32
    assert found[1]["order_gain"] == (28 - alike) / 32
    assert [entry["capacity_slots"] for entry in found] == [1, 1, 2, 3]


def test_a_token_of_a_prompt_is_a_pass_of_its_own() -> None:
    """Eight sequences over prompts of three tokens: recorded and shuffled replays see every token alone."""
    trace = generate("zipf", 1, SIZES)
    full = order_gain(trace, rng=np.random.default_rng(0), contract="serial")
    atomic = order_gain(trace, rng=np.random.default_rng(0))
    assert [entry["hit_ratio"] for entry in full] == sorted(entry["hit_ratio"] for entry in full)
    assert full != atomic


def test_locality_tells_a_verdict_and_the_worth_of_order() -> None:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(shown("locality", "t.safetensors", "--json"), parse_constant=never)
    assert record["verdict"]["at_work"] in ("popularity", "order", "neither")
    assert record["lru"] == order_gain_again()
    text = shown("locality", "t.safetensors")
    assert record["verdict"]["sentence"] in text
    for words in ("chance", "lag 64", "SRP", "SCH with", "in a window", "LRU, one token a pass, atomic contract"):
        assert words in text


def order_gain_again() -> list[dict[str, Any]]:
    """The same draws as the command's: locality takes its own first."""
    trace, rng = generate("zipf", 1, SIZES), np.random.default_rng(0)
    locality(trace, rng=rng)
    return order_gain(trace, rng=rng)


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
    assert all(row["summary"] for row in found.values())


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

"""Sweeps: what their table holds, and that nothing is lost, run twice, or stale, whatever happens to them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sim.bounds import lower_bound
from sim.results import ResultError
from sim.sweep import point, store
from sim.sweep.point import Outcome, Task, prepared_of, run_point
from sim.sweep.run import Sweep
from sim.sweep.store import opened
from tests.sim.sweeping import COUNTING, LINKS, SIZES, Seen, grid, untimed, write_trace
from traces.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    write_trace(tmp_path)
    (tmp_path / "own.py").write_text(COUNTING)


def runs(folder: Path) -> int:
    """How many runs the counting policy has seen; each has two sequences."""
    path = folder / "runs.txt"
    return len(path.read_text().splitlines()) // 2 if path.exists() else 0


def sweep(folder: Path, axes: dict[str, Any], **more: Any) -> tuple[pd.DataFrame, Seen]:
    base = {name: more.pop(name) for name in list(more) if name not in ("resume", "name", "jobs", "out")}
    seen = Seen()
    return seen.sweep(grid(folder, axes, **base), folder / more.pop("out", "out"), **more), seen


def test_rows_are_runs_in_the_order_of_the_grid(tmp_path: Path) -> None:
    axes = {"system": ["on-demand", "fiddler-code"], **LINKS}
    wanted = grid(tmp_path, axes, calibration="other.safetensors", cache="25%")
    write_trace(tmp_path, "other.safetensors", seed=5)
    seen = Seen()
    table = seen.sweep(wanted, tmp_path / "out")
    assert [(row.system, row["hardware.link_gb_per_s"]) for _, row in table.iterrows()] == [
        (system, link) for system in axes["system"] for link in (4, 16)
    ]
    assert set(table.status) == {"ok"}
    assert set(table.reason) == {""}
    first = prepared_of(_scenario(wanted, 0))
    run = first.run()
    assert {name: table[name][0] for name in run.headline()} == run.headline()
    assert table.capacity_bytes[0] == first.budget.slots * first.model.expert_bytes
    assert table.gpu_bytes[0] == first.memory.total_bytes
    assert table.synthetic.all()
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "out" / "sweep.parquet"), table)


def _scenario(wanted: Any, place: int) -> Any:
    return Sweep.of(wanted).scenarios[place]


def test_rows_have_a_role_and_a_regret(tmp_path: Path) -> None:
    systems = ["on-demand", "mixtral-offloading", "oracle", "all-resident"]
    wanted = grid(tmp_path, {"system": systems, "seed": [0, 1], **LINKS}, lookahead_recall=0.8)
    table = Seen().sweep(wanted, tmp_path / "out")
    assert dict(zip(table.system, table.role, strict=True)) == dict(
        zip(systems, ["system", "system", "clairvoyant", "no limit"], strict=True)
    )
    assert (table.regret >= 0).all()
    pd.testing.assert_series_equal(table.regret_token_s / table.bound_token_s, table.regret, check_names=False)
    for place in range(len(table)):
        bound_s = lower_bound(prepared_of(_scenario(wanted, place))).decode.seconds
        assert table.bound_token_s[place] == bound_s / table.decode_tokens[place]


def test_points_share_what_their_bounds_are_told_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policies, links, seeds and look-ahead change nothing of it; slots, batches and the trace do."""
    made: list[int] = []
    demand_of = point.demand_of
    monkeypatch.setattr(point, "_DEMANDS", {})
    monkeypatch.setattr(point, "demand_of", lambda plan, slots: made.append(slots) or demand_of(plan, slots))
    systems = ["on-demand", "mixtral-offloading", "oracle", "all-resident"]
    sweep(tmp_path, {"system": systems, "seed": [0, 1], **LINKS}, lookahead_recall=0.8)
    assert len(set(made)) == len(made) == 2, "one under the limit and one without"
    sweep(tmp_path, {"batch": [1, 2], "cache": [2, 4]}, out="more", lookahead_recall=0.8)
    assert len(made) == 2 + 4
    axes = {"batching": ["lock-step", "continuous"], "prefill_chunk": [0, 1]}
    sweep(tmp_path, axes, out="orders", lookahead_recall=0.8, batch=2)
    assert len(made) == 2 + 4 + 4
    monkeypatch.setattr(point, "MOST_DEMANDS", 1)
    monkeypatch.setattr(point, "_DEMANDS", {})
    made.clear()
    sweep(tmp_path, {"system": systems[:2], "cache": [2, 4]}, out="few", lookahead_recall=0.8)
    assert len(made) == 4, "one is kept, and the other worked out anew"


def test_requests_that_arrive_over_time_have_no_regret(tmp_path: Path) -> None:
    table, _ = sweep(tmp_path, {"seed": [1]}, arrivals="poisson", rate_per_s=9.0)
    assert table.status[0] == "ok"
    assert table[["bound_token_s", "regret"]].isna().all(axis=None)


def test_recorded_arrivals_that_do_not_fit_refuse_their_points_alone(tmp_path: Path) -> None:
    for name, times in {"two": "0\n1.5\n", "alike": "2\n2\n", "one": "0\n"}.items():
        (tmp_path / f"{name}.csv").write_text(f"arrival_s\n{times}")
    axes = {"arrivals": ["two.csv", "alike.csv", "one.csv"], "rate_per_s": [2.0, 4.0]}
    table, _ = sweep(tmp_path, axes, batching="continuous", batch=2)
    assert table.status.tolist() == ["ok"] * 2 + ["refused"] * 4
    assert table.tokens_per_s[:2].notna().all()
    assert table.reason[2].startswith("rate_per_s must be left out where all requests arrive at once")
    assert "must have a time for each of 2 requests, got 1" in table.reason[4]


def test_busy_shares_are_of_the_events(tmp_path: Path) -> None:
    wanted = grid(tmp_path, {"seed": [1]}, system="hybrimoe-code")
    table = Seen().sweep(wanted, tmp_path / "out")
    run = prepared_of(_scenario(wanted, 0)).run()
    took = (run.events.end_s - run.events.start_s).groupby(run.events.resource).sum() / run.events.end_s.max()
    for name in ("gpu", "cpu", "link"):
        share = table[f"{name}_busy_share"][0]
        assert 0 < share <= 1
        assert share == pytest.approx(took[name], rel=0.02), name


def test_a_dense_part_keeps_the_device_busy_that_its_layer_ran_on(tmp_path: Path) -> None:
    wanted = grid(tmp_path, {"seed": [1]}, system="layer-split")
    table = Seen().sweep(wanted, tmp_path / "out")
    run = prepared_of(_scenario(wanted, 0)).run()
    assert run.info.layers_on_cpu == [2, 3, 4, 5, 6, 7]
    took = (run.events.end_s - run.events.start_s).groupby(run.events.resource).sum() / run.events.end_s.max()
    for name in ("gpu", "cpu", "link"):
        assert table[f"{name}_busy_share"][0] == pytest.approx(took[name], rel=1e-9), name


def test_the_link_is_of_unknown_share_where_copies_run_ahead(tmp_path: Path) -> None:
    """Their times are in no table of layers: what those alone tell is far less than what the events do."""
    axes = {"system.prefetch": ["none", "oracle"], "system.synchronous": [False, True]}
    table, _ = sweep(tmp_path, axes, hardware__link_gb_per_s=1)
    assert set(table.status) == {"ok"}
    assert table.link_busy_share.isna().tolist() == [False, False, True, False]
    assert table[["gpu_busy_share", "cpu_busy_share"]].notna().all(axis=None)
    stored = pd.read_parquet(tmp_path / "out" / "sweep.parquet")
    assert stored.link_busy_share.isna().tolist() == [False, False, True, False]


@pytest.mark.parametrize("prefetch", ["none", "oracle"])
def test_copied_bytes_are_of_prefetches_too(tmp_path: Path, prefetch: str) -> None:
    wanted = grid(tmp_path, {"seed": [1]}, system__prefetch=prefetch)
    table = Seen().sweep(wanted, tmp_path / "out")
    run = prepared_of(_scenario(wanted, 0)).run()
    copies = run.operations.bytes[run.operations.op == "copy"].sum()
    processed = SIZES.sequences * (SIZES.prompt_tokens + SIZES.new_tokens)
    assert table.copied_bytes_per_processed_token[0] == pytest.approx(copies / processed)
    assert (copies > run.layers.bytes.sum()) == (prefetch == "oracle")


def test_processes_give_what_one_process_gives(tmp_path: Path) -> None:
    axes = {"system": ["on-demand", "hybrimoe-code"], **LINKS}
    one, _ = sweep(tmp_path, axes, out="one")
    two, _ = sweep(tmp_path, axes, out="two", jobs=2)
    pd.testing.assert_frame_equal(untimed(one), untimed(two), check_exact=True)
    stored = [untimed(pd.read_parquet(tmp_path / name / "sweep.parquet")) for name in ("one", "two")]
    pd.testing.assert_frame_equal(*stored, check_exact=True)


def test_systems_of_one_pool_get_the_bytes_of_those_of_many(tmp_path: Path) -> None:
    """10% of 32 experts is 3 slots in each of 8 layers, and would be 25 of a pool of 256; 5 slots are 40."""
    table, _ = sweep(tmp_path, {"cache": ["10%", 5], "system.scope": ["layer", "global"]})
    expert = 3 * 192 * 64 * 4
    assert (table.capacity_bytes / expert).tolist() == [24, 24, 40, 40]
    assert table.cache.tolist() == ["10%", "10%", "5", "5"]


@pytest.mark.parametrize("limit", ["15MB", "16.3MB"])
def test_under_a_limit_of_memory_a_row_is_the_run_alone(tmp_path: Path, limit: str) -> None:
    wanted = grid(tmp_path, {"system.scope": ["layer", "global"]}, gpu_memory=limit)
    table = Seen().sweep(wanted, tmp_path / "out")
    alone = [_scenario(wanted, place).prepare().run() for place in range(2)]
    assert table.capacity_bytes.tolist() == [run.info.capacity_bytes for run in alone]
    assert table.tokens_per_s.tolist() == [run.headline()["tokens_per_s"] for run in alone]


def test_what_cannot_run_is_a_row_with_the_reason(tmp_path: Path) -> None:
    table, seen = sweep(tmp_path, {"cache": ["1%", "25%"], "system": ["on-demand", "mixtral-offloading"]})
    assert table.status.tolist() == ["refused", "refused", "ok", "refused"]
    assert table.reason[0] == "cache must be between 1 and 32 slots, got 1% which is 0"
    assert table.reason[3].startswith("trace must have look-ahead of depth 1 for prefetch next-router")
    assert table.tokens_per_s.isna().tolist() == [True, True, False, True]
    again, resumed = sweep(
        tmp_path, {"cache": ["1%", "25%"], "system": ["on-demand", "mixtral-offloading"]}, resume=True
    )
    assert (resumed.known, resumed.todo, len(seen.outcomes)) == (4, 0, 4)
    pd.testing.assert_frame_equal(again, table, check_exact=True)


def test_when_nothing_can_run_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cache must be between 1 and 32 slots, got 1%"):
        sweep(tmp_path, {"seed": [1, 2]}, cache="1%")
    assert not (tmp_path / "out").exists()


def test_a_mistake_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean lru"):
        sweep(tmp_path, {"system.evict": ["lru", "lruu"]})
    assert not (tmp_path / "out").exists()


def test_a_changed_grid_runs_only_what_is_new(tmp_path: Path) -> None:
    own = {"system__evict": "own.py:Counting"}
    sweep(tmp_path, {"cache": ["25%", "50%"]}, **own)
    assert runs(tmp_path) == 2
    table, seen = sweep(tmp_path, {"cache": ["50%", "75%", "25%"], "seed": [0, 1]}, **own, resume=True)
    assert (seen.known, seen.todo, runs(tmp_path)) == (2, 4, 6)
    assert table.cache.tolist() == ["50%", "50%", "75%", "75%", "25%", "25%"]
    narrow, seen = sweep(tmp_path, {"cache": ["75%"]}, **own, resume=True)
    assert (seen.todo, runs(tmp_path), narrow.cache.tolist()) == (0, 6, ["75%"])


def test_points_of_one_content_are_one_run(tmp_path: Path) -> None:
    (tmp_path / "copy.toml").write_text('evict = "own.py:Counting"')
    table, seen = sweep(tmp_path, {"system": ["copy.toml"], "system.evict": ["own.py:Counting", "lru"]})
    assert (runs(tmp_path), seen.todo) == (1, 2)
    table, seen = sweep(
        tmp_path, {"hardware.link_gb_per_s": [8, 8.5], "hardware": ["rtx4090-epyc9374f"]}, out="b", seed=0
    )
    assert table.key.nunique() == 2
    (tmp_path / "same.toml").write_text('like = "on-demand"\nname = "same"')
    table, seen = sweep(tmp_path, {"system": ["on-demand", "same.toml"]}, out="c")
    assert (seen.todo, len(table), table.key.nunique()) == (1, 2, 1)
    assert table.system.tolist() == ["on-demand", "same.toml"]


def test_a_policy_that_changes_is_run_again(tmp_path: Path) -> None:
    own = {"system__evict": "own.py:Counting"}
    first, _ = sweep(tmp_path, {"cache": ["25%"]}, **own)
    (tmp_path / "own.py").write_text(COUNTING.replace("return block", "return -block"))
    second, _ = sweep(tmp_path, {"cache": ["25%"]}, **own, resume=True)
    assert runs(tmp_path) == 2
    assert first.key[0] != second.key[0]
    assert first.misses[0] != second.misses[0]


def test_what_changes_while_the_sweep_runs_is_not_taken(tmp_path: Path) -> None:
    wanted = grid(tmp_path, {"seed": [1]}, system__evict="own.py:Counting")
    outcome = run_point(Task("0" * 40, _scenario(wanted, 0)))
    assert outcome.status == "failed"
    assert "have changed since the sweep began" in outcome.reason


@pytest.mark.parametrize("before", ["key_of", "prepared_of", "figures_of"])
@pytest.mark.parametrize(("field", "missing"), [("trace", "t.safetensors"), ("calibration", "other.safetensors")])
def test_a_file_that_is_missing_where_a_point_runs_refuses_nothing_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, missing: str, before: str
) -> None:
    write_trace(tmp_path, "other.safetensors", seed=5)
    wanted = grid(tmp_path, {"seed": [1]}, calibration="other.safetensors")
    task, called = Task(Sweep.of(wanted).keys[0], _scenario(wanted, 0)), getattr(point, before)

    def without(*args: Any) -> Any:
        (tmp_path / missing).replace(tmp_path / "hidden")
        monkeypatch.undo()
        return called(*args)

    monkeypatch.setattr(point, before, without)
    outcome = run_point(task)
    if (field, before) == ("calibration", "figures_of"):  # it has served by then
        assert outcome.status == "ok"
    else:
        assert outcome.status == "failed"
        assert outcome.reason.startswith(f"{field} must be an existing file, got ")
    (tmp_path / "hidden").replace(tmp_path / missing)
    assert run_point(task).status == "ok"


@pytest.mark.parametrize("name", ["figures_of", "regret_of", "_bounds", "decode_by_group"])
def test_a_point_never_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken(*args: Any) -> Any:
        raise KeyError("no way")

    wanted = grid(tmp_path, {"seed": [1]})
    monkeypatch.setattr(point, name, broken)
    outcome = run_point(Task(Sweep.of(wanted).keys[0], _scenario(wanted, 0)))
    assert outcome.status == "failed"
    assert outcome.reason.startswith("KeyError: 'no way' (test_sweep_run.py, line ")
    assert outcome.seconds > 0


def test_points_of_several_threads_share_demands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point, "_DEMANDS", {})
    monkeypatch.setattr(point, "MOST_DEMANDS", 1)
    sweep_of = Sweep.of(grid(tmp_path, {"cache": [2, 4, 8], "batch": [1, 2]}))
    tasks = [Task(key, one) for key, one in zip(sweep_of.keys, sweep_of.scenarios, strict=True)]
    expected = [replace(run_point(task), seconds=0.0) for task in tasks]
    with ThreadPoolExecutor(4) as pool:
        assert [replace(one, seconds=0.0) for one in pool.map(run_point, tasks * 2)] == expected * 2


def test_a_failure_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(scenario: Any) -> Any:
        if scenario.seed == 2:
            raise ZeroDivisionError("no way")
        return prepared_of(scenario)

    monkeypatch.setattr(point, "prepared_of", broken)
    axes = {"seed": [1, 2, 3]}
    table, _ = sweep(tmp_path, axes)
    assert table.status.tolist() == ["ok", "failed", "ok"]
    assert table.reason[1].startswith("ZeroDivisionError: no way (test_sweep_run.py, line ")
    monkeypatch.undo()
    again, seen = sweep(tmp_path, axes, resume=True)
    assert (seen.known, seen.todo) == (2, 1)
    assert set(again.status) == {"ok"}


def test_an_interrupt_leaves_a_table_of_what_is_done(tmp_path: Path) -> None:
    class Impatient(Seen):
        def sweep(self, *args: Any, **more: Any) -> pd.DataFrame:
            self.outcomes = _Bounded()
            return super().sweep(*args, **more)

    class _Bounded(list[Outcome]):
        def append(self, one: Outcome) -> None:
            super().append(one)
            if len(self) == 2:
                raise KeyboardInterrupt

    wanted = grid(tmp_path, {"seed": [5, 1, 4]})
    with pytest.raises(KeyboardInterrupt):
        Impatient().sweep(wanted, tmp_path / "out")
    assert pd.read_parquet(tmp_path / "out" / "sweep.parquet").seed.tolist() == [5, 1]
    seen = Seen()
    assert seen.sweep(wanted, tmp_path / "out", resume=True).seed.tolist() == [5, 1, 4]
    assert (seen.known, seen.todo) == (2, 1)


@pytest.mark.slow
def test_a_sweep_that_is_killed_loses_nothing_and_runs_nothing_twice(tmp_path: Path) -> None:
    """Twice killed while it works in two processes; what was kept is left alone, and the end is as without a kill."""
    own = {"system__evict": "own.py:Counting", "system__options__evict__pause_s": 0.05}
    axes = {"seed": list(range(16))}
    text = f"""
from pathlib import Path
from tests.sim.sweeping import Seen, grid
folder = Path({str(tmp_path)!r})
Seen().sweep(grid(folder, {axes!r}, **{own!r}), folder / "out", resume=True, jobs=2)
"""
    points = tmp_path / "out" / "points"
    kept: dict[str, int] = {}
    for least in (3, 7):
        process = subprocess.Popen([sys.executable, "-c", text], cwd=ROOT, start_new_session=True)
        while len([*points.glob("*.json")]) < least:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        now = {path.name: path.stat().st_mtime_ns for path in points.glob("*.json")}
        assert now.items() >= kept.items()
        assert len(now) < 16
        kept = now
    done = runs(tmp_path)
    assert done <= len(kept) + 2 * 4, (
        "only what was under way, or just done, at a kill can have been begun and not kept"
    )
    seen = Seen()
    table = seen.sweep(grid(tmp_path, axes, **own), tmp_path / "out", resume=True)
    assert (seen.known, seen.todo, runs(tmp_path)) == (len(kept), 16 - len(kept), done + 16 - len(kept))
    assert {name: (points / name).stat().st_mtime_ns for name in kept} == kept
    assert not [*tmp_path.rglob("*.partial")]
    whole = Seen().sweep(grid(tmp_path, axes, **own), tmp_path / "whole")
    pd.testing.assert_frame_equal(untimed(table), untimed(whole), check_exact=True)


def test_a_point_file_that_is_torn_is_run_again(tmp_path: Path) -> None:
    table, _ = sweep(tmp_path, {"seed": [1, 2]})
    for content in ("{", json.dumps({"key": table.key[1], "status": "ok"}), "3"):
        (tmp_path / "out" / "points" / f"{table.key[0]}.json").write_text(content)
        again, seen = sweep(tmp_path, {"seed": [1, 2]}, resume=True)
        assert seen.todo == 1, content
        pd.testing.assert_frame_equal(untimed(again), untimed(table), check_exact=True)


def test_whose_folder_it_is(tmp_path: Path) -> None:
    sweep(tmp_path, {"seed": [1]})
    with pytest.raises(ResultError, match=r"out must be a new folder \(or give --resume"):
        sweep(tmp_path, {"seed": [1]})
    with pytest.raises(ResultError, match=r"out must hold a sweep of the same base .* with another cache, batch"):
        sweep(tmp_path, {"seed": [1]}, cache="50%", batch=2, resume=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"out must be a folder of a sweep, with sweep\.toml, got .*other: none"):
        sweep(tmp_path, {"seed": [1]}, out="other", resume=True)
    with pytest.raises(ResultError, match=r"out must be a folder that can be written, got .*mine\.txt: it is a file"):
        sweep(tmp_path, {"seed": [1]}, out="other/mine.txt", resume=True)
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    wanted = grid(tmp_path, {"seed": [1]})
    with (
        opened(tmp_path / "out", wanted, resume=False),
        pytest.raises(ResultError, match="out must not be in use by another sweep"),
    ):
        Seen().sweep(wanted, tmp_path / "out", resume=True)
    assert len(Seen().sweep(wanted, tmp_path / "out", resume=True)) == 1


def test_an_outcome_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    wanted = grid(tmp_path, {"seed": [1]})
    with opened(tmp_path / "out", wanted, resume=False) as kept:
        monkeypatch.setattr(store.os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            kept.add(Outcome("k", "ok"))
    assert not [*(tmp_path / "out" / "points").glob("*.json")]


def test_axes_are_columns_of_one_type(tmp_path: Path) -> None:
    axes = {"cache": [8, "25%"], "hardware.link_gb_per_s": [4, 5.5], "system.write_back": [False], "seed": [3]}
    table, _ = sweep(tmp_path, axes)
    assert [table[name].dtype for name in axes][1:] == [np.float64, np.bool_, np.int64]
    assert table.cache.tolist() == ["8", "8", "25%", "25%"]


def test_a_worker_imports_no_torch(tmp_path: Path) -> None:
    text = f"""
import sys
from pathlib import Path
from tests.sim.sweeping import grid
from sim.sweep.run import Sweep
from sim.sweep.point import run_point
folder = Path({str(tmp_path)!r})
(task,) = Sweep.of(grid(folder, {{"seed": [1]}})).tasks({{}})
assert run_point(task).status == "ok"
assert sys.modules.keys().isdisjoint({{"torch", "transformers", "matplotlib", "typer"}})
"""
    done = subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

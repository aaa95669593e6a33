"""``moetwin timeline``: files that a trace viewer takes, and what the command refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from analysis.cli_timeline import steps_of, timeline
from sim.results import RunResult
from tests.sim.hand import HandCosts, run, trace_of
from traces.errors import InputError

app = typer.Typer()
app.command()(timeline)


def shown(*words: object) -> str:
    """Runs the command; returns what it printed, raises what it raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def simulated(**system: Any) -> RunResult:
    trace = trace_of([[[0, 1], [1, 2]], [[2], [3, 0]], [[1, 0], [2, 3]]])
    return run(trace, 2, HandCosts(copy=2.5, cpu=0.7), **system)


def checked(path: Path) -> list[dict[str, Any]]:
    """The slices of a file, after every rule that the viewers have for the Trace Event Format."""

    def never(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    told = json.loads(path.read_text(encoding="utf-8"), parse_constant=never)
    assert told.keys() == {"traceEvents", "displayTimeUnit"}
    processes, threads, slices = set(), set(), []
    for event in told["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is int
        if event["ph"] == "M":
            named = event["name"]
            assert named in {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}
            key = "name" if named.endswith("name") else "sort_index"
            assert isinstance(event["args"][key], str if key == "name" else int)
            if named == "process_name":
                processes.add(event["pid"])
            if named == "thread_name":
                threads.add((event["pid"], event["tid"]))
            continue
        assert event["ph"] == "X"
        assert type(event["tid"]) is int
        assert all(isinstance(event[field], int | float) and event[field] >= 0 for field in ("ts", "dur"))
        slices.append(event)
    assert {event["pid"] for event in slices} == processes
    assert {(event["pid"], event["tid"]) for event in slices} == threads
    assert_no_overlap(slices)
    return slices


def assert_no_overlap(slices: list[dict[str, Any]]) -> None:
    """Slices of one thread follow each other, but for the rounding to nanoseconds."""
    ends: dict[tuple[int, int], float] = {}
    for event in sorted(slices, key=lambda event: event["ts"]):
        thread = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(thread, 0.0) - 0.0021
        ends[thread] = event["ts"] + event["dur"]


@pytest.mark.parametrize("system", [{}, {"place": "hybrimoe"}, {"synchronous": True}, {"write_back": True}])
def test_what_is_written_is_what_the_viewers_take(tmp_path: Path, system: dict[str, Any]) -> None:
    result = simulated(**system)
    result.save(tmp_path / "one")
    out = tmp_path / "x.perfetto.json"
    assert str(out) in shown(tmp_path / "one", "--out", out)
    slices = checked(out)
    assert len(slices) == len(result.events) + len(result.layers) + 3
    kinds = {(row.kind, row.step, row.layer, row.expert) for row in result.events.itertuples()}
    told = {
        (event["cat"], event["args"]["step"], event["args"]["layer"], event["args"]["expert"])
        for event in slices
        if event["cat"] not in ("steps", "layers")
    }
    assert told == kinds


def test_several_runs_are_several_processes(tmp_path: Path) -> None:
    simulated().save(tmp_path / "one")
    simulated(evict="lfu", place="cpu-on-miss").save(tmp_path / "two")
    out = tmp_path / "both.json"
    shown(tmp_path / "one", tmp_path / "two", "--out", out)
    assert {event["pid"] for event in checked(out)} == {1, 2}
    names = [
        event["args"]["name"]
        for event in json.loads(out.read_text(encoding="utf-8"))["traceEvents"]
        if event["name"] == "process_name"
    ]
    assert names == [
        "simulated: lru + fetch, by hand on by hand",
        "simulated: lfu + cpu-on-miss, by hand on by hand",
    ]


def test_steps_cut_the_timeline(tmp_path: Path) -> None:
    simulated().save(tmp_path / "one")
    out = tmp_path / "part.json"
    shown(tmp_path / "one", "--out", out, "--steps", "1:2")
    assert {event["args"]["step"] for event in checked(out)} == {1}


@pytest.mark.parametrize(
    ("text", "found"), [("10:20", range(10, 20)), ("7", range(7, 8)), (":3", range(3)), ("4:", range(4, 10**18))]
)
def test_steps_are_numbers_and_ranges(text: str, found: range) -> None:
    assert steps_of(text) == found


@pytest.mark.parametrize("text", ["", "a", "3:3", "5:2", "1:2:3", "-1", "1,2"])
def test_other_steps_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="steps must be a"):
        steps_of(text)


def test_mistakes_write_nothing(tmp_path: Path) -> None:
    one, out = tmp_path / "one", tmp_path / "x.json"
    result = simulated()
    result.save(one)
    result.events = result.events.iloc[:0]
    result.save(tmp_path / "bare")
    for words, told in (
        ([tmp_path / "bare"], r"bare must hold events \(run it without --no-events\), got a result without any"),
        ([one, "--steps", "3:9"], r"steps must be among 0 to 2 of .*one, got 3:9"),
        ([one, tmp_path / "none"], "must be a result folder of moetwin"),
    ):
        with pytest.raises(InputError, match=told):
            shown(*words, "--out", out)
        assert not out.exists()
    with pytest.raises(InputError, match="out must lie outside the runs"):
        shown(one, "--out", one / "x.json")


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    simulated().save(tmp_path / "one")
    out = tmp_path / "x.json"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"out must be a new file \(or give --force\)"):
        shown(tmp_path / "one", "--out", out)
    assert out.read_text(encoding="utf-8") == "mine"
    shown(tmp_path / "one", "--out", out, "--force")
    checked(out)

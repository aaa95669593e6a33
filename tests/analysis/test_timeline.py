from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from analysis.timeline import cut, system_name, to_perfetto, write_perfetto
from sim.results import COLUMNS, RunResult
from traces.errors import InputError


def names(trace: dict, kind: str) -> list[tuple[int, str]]:
    return [(event["pid"], event["args"]["name"]) for event in trace["traceEvents"] if event["name"] == kind]


def test_a_process_a_run_and_a_thread_a_resource(measured: RunResult, simulated: RunResult) -> None:
    trace = to_perfetto([measured, simulated])
    assert names(trace, "process_name") == [
        (1, "measured: lru + fetch, tiny-moe on bench"),
        (2, "simulated: lru + fetch, tiny-moe on bench"),
    ]
    threads = ["steps", "layers", "host", "gpu", "link"]
    assert names(trace, "thread_name") == [(pid, name) for pid in (1, 2) for name in threads]


def test_every_slice_has_the_required_fields(measured: RunResult) -> None:
    slices = [event for event in to_perfetto([measured])["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == len(measured.events) + len(measured.layers) + 4
    assert all({"name", "cat", "ph", "ts", "dur", "pid", "tid", "args"} <= event.keys() for event in slices)
    assert all(event["dur"] >= 0 for event in slices)


def test_times_are_microseconds(measured: RunResult) -> None:
    events = to_perfetto([measured])["traceEvents"]
    step = next(event for event in events if event["name"] == "decode 2")
    assert (step["ts"], step["dur"]) == pytest.approx((30_000.0, 12_000.0))
    copy = next(event for event in events if event["name"] == "copy 1" and event["args"]["step"] == 2)
    assert copy["dur"] == pytest.approx(1_750.0)
    assert copy["args"] == {"step": 2, "layer": 0, "expert": 1}


def test_overlapping_work_gets_further_threads(measured: RunResult) -> None:
    rows = [
        ("cpu", "expert", 1, 0, 1, 0.0, 2.0),
        ("cpu", "expert", 1, 0, 2, 1.0, 3.0),
        ("cpu", "expert", 1, 0, 3, 2.0, 4.0),
    ]
    measured.events = pd.DataFrame(rows, columns=list(COLUMNS["events"]))
    trace = to_perfetto([measured])
    assert [name for _, name in names(trace, "thread_name")] == ["steps", "layers", "cpu", "cpu 2"]
    threads = {event["name"]: event["tid"] for event in trace["traceEvents"] if event.get("cat") == "expert"}
    assert threads["expert 1"] == threads["expert 3"] != threads["expert 2"]


def test_the_file_is_json_and_not_replaced_unasked(tmp_path: Path, measured: RunResult) -> None:
    path = write_perfetto(tmp_path / "run.json", [measured])
    assert json.loads(path.read_text(encoding="utf-8")) == to_perfetto([measured])
    with pytest.raises(InputError, match="must be a new file"):
        write_perfetto(path, [measured])
    assert write_perfetto(path, [measured], force=True) == path


def test_a_system_is_named_in_few_words() -> None:
    assert system_name({"name": "hybrimoe", "evict": "mrs"}) == "hybrimoe"
    assert system_name({"evict": "mine.py:Mine", "place": "fetch", "prefetch": "none"}) == "Mine + fetch"
    assert system_name({}) == "default system"


def test_a_cut_keeps_the_rows_of_its_steps(measured: RunResult) -> None:
    part = cut(measured, range(1, 3))
    for name in ("tokens", "layers", "events", "operations"):
        assert set(getattr(part, name)["step"]) == {1, 2}
    assert len(part.requests) == len(measured.requests)
    slices = [event for event in to_perfetto([part])["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in slices if event["cat"] == "steps"} == {"decode 1", "decode 2"}
    assert min(event["ts"] for event in slices) == pytest.approx(20_000.0)

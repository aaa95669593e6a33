"""Stored results: what is written is what is read, complete or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.results import COLUMNS, ResultError, RunInfo, RunResult, check_folder, write_folder
from tests.sim.hand import run, trace_of


@pytest.fixture(name="result")
def _result() -> RunResult:
    return run(trace_of([[[0, 1]], [[1, 2]]]), 2)


def empty() -> RunResult:
    info = {"source": "simulated", "model": "m", "hardware": "h", "system": {}, "workload": {}, "trace_digest": ""}
    return RunResult.of(RunInfo.model_validate({**info, "capacity_slots": 1, "capacity_bytes": 1, "staging_slots": 2}))


def same(left: RunResult, right: RunResult) -> None:
    assert left.info == right.info
    for name in COLUMNS:
        pd.testing.assert_frame_equal(getattr(left, name), getattr(right, name))


def test_what_is_saved_is_loaded(result: RunResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "deep" / "run")
    assert sorted(path.name for path in folder.iterdir()) == sorted([*(f"{n}.parquet" for n in COLUMNS), "run.json"])
    same(RunResult.load(folder), result)


def test_tables_without_rows_keep_their_columns_and_types(result: RunResult, tmp_path: Path) -> None:
    bare = empty()
    for name, columns in COLUMNS.items():
        assert tuple(getattr(bare, name).columns) == columns
        pd.testing.assert_series_equal(getattr(bare, name).dtypes, getattr(result, name).dtypes)
    same(RunResult.load(bare.save(tmp_path / "bare")), bare)


@pytest.mark.parametrize("table", COLUMNS)
def test_seconds_are_floats_and_counts_are_integers(result: RunResult, table: str) -> None:
    frame = getattr(result, table)
    text = {"resource", "kind", "op"}
    for name in frame.columns:
        expected = "float64" if name.endswith("_s") else "str" if name in text else "int64"
        assert str(frame[name].dtype) in ((expected, "object") if expected == "str" else (expected,)), name


def test_an_existing_result_is_not_overwritten_unless_forced(result: RunResult, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    empty().save(folder)
    with pytest.raises(ResultError, match=r"out must be an empty or new folder .* with files in it"):
        result.save(folder)
    same(RunResult.load(folder), empty())
    result.save(folder, force=True)
    same(RunResult.load(folder), result)


def test_an_empty_folder_may_be_filled(result: RunResult, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    same(RunResult.load(result.save(tmp_path / "run")), result)


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_kept(result: RunResult, tmp_path: Path, force: bool) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ResultError, match="out must be a folder, got the file"):
        result.save(tmp_path / "run", force=force)
    assert (tmp_path / "run").read_text() == "mine"
    with pytest.raises(ResultError):
        check_folder(tmp_path / "run", force=force)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write(target: Path) -> None:
        (target / "run.json").write_text("{")
        raise error

    with pytest.raises(error):
        write_folder(tmp_path / "run", write)
    assert [*tmp_path.iterdir()] == []


def test_an_interrupted_write_leaves_the_old_result(result: RunResult, tmp_path: Path) -> None:
    folder = result.save(tmp_path / "run")

    def write(target: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, write, force=True)
    same(RunResult.load(folder), result)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def damage(folder: Path, kind: str) -> None:
    header = json.loads((folder / "run.json").read_text())
    if kind == "no header":
        (folder / "run.json").unlink()
    elif kind == "no json":
        (folder / "run.json").write_text("{")
    elif kind == "other header":
        (folder / "run.json").write_text(json.dumps({**header, "source": "guessed"}))
    elif kind == "no table":
        (folder / "layers.parquet").unlink()
    elif kind == "truncated table":
        (folder / "layers.parquet").write_bytes((folder / "layers.parquet").read_bytes()[:50])
    elif kind == "other columns":
        pd.DataFrame({"step": [1]}).to_parquet(folder / "layers.parquet")
    elif kind == "other version":
        (folder / "run.json").write_text(json.dumps({**header, "result_version": 99}))


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("no header", "run.json"),
        ("no json", "run.json"),
        ("other header", "source"),
        ("no table", "layers.parquet"),
        ("truncated table", "layers.parquet"),
        ("other columns", "layers.parquet"),
        ("other version", "result_version must be 1"),
    ],
)
def test_a_folder_that_is_no_result_is_refused_by_name(
    result: RunResult, tmp_path: Path, kind: str, named: str
) -> None:
    folder = result.save(tmp_path / "run")
    damage(folder, kind)
    with pytest.raises(ResultError) as caught:
        RunResult.load(folder)
    message: Any = str(caught.value)
    assert named in message
    assert "must" in message
    assert "got" in message


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nowhere"):
        RunResult.load(tmp_path / "nowhere")

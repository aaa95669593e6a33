"""Stored results: what is written is what is read, complete or not at all."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sim.results import COLUMNS, ResultError, RunInfo, RunResult, check_folder, write_folder
from tests.sim.hand import run, trace_of
from traces.schema import NOT_ROUTED


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


@pytest.mark.parametrize(("error", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (OSError, ResultError)])
@pytest.mark.parametrize("folder", ["run", "."])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, folder: str, error: type[BaseException], seen: type[BaseException]
) -> None:
    def write(target: Path) -> None:
        (target / "run.json").write_text("{")
        raise error

    with pytest.raises(seen):
        write_folder(tmp_path / folder, write)
    assert [*tmp_path.iterdir()] == []


def test_an_error_while_writing_is_told_with_the_folder(tmp_path: Path) -> None:
    def write(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResultError, match=r"out must be a folder that can be written, got .*run: No space left"):
        write_folder(tmp_path / "run", write)


def test_a_draft_carries_the_process_and_a_stale_one_is_no_obstacle(tmp_path: Path) -> None:
    seen: list[str] = []

    def write(target: Path) -> None:
        seen.append(target.name)
        assert [*target.iterdir()] == []
        (target / "a").write_text("new")

    for stale in (tmp_path / f".run.{os.getpid()}.partial", tmp_path / "run" / f".run.{os.getpid()}.partial"):
        stale.mkdir(parents=True)
        (stale / "rest").write_text("of another run")
        write_folder(tmp_path / "run", write, force=True)
    assert seen == [f".run.{os.getpid()}.partial"] * 2
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]


def writer_of(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "c").mkdir()
        for name in ("a", "b", "c/d"):
            (folder / name).write_text(text)

    return write


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_the_working_folder_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("first", "second"):
        write_folder(Path(), writer_of(text), force=True)
        assert contents(Path.cwd()) == {"a": text, "b": text, "c/d": text}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_entries_are_moved_waits_until_all_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def end(*_: object) -> None:
        raise KeyboardInterrupt

    replace_as_ever = Path.replace

    def replace_and_signal(self: Path, target: Path) -> Path:
        os.kill(os.getpid(), number)
        return replace_as_ever(self, target)

    write_folder(tmp_path, writer_of("old"))
    (tmp_path / "mine").write_text("mine")
    monkeypatch.setattr(Path, "replace", replace_and_signal)
    before = signal.signal(number, end)
    try:
        with pytest.raises(KeyboardInterrupt):
            write_folder(tmp_path, writer_of("new"), force=True)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, before)
    assert contents(tmp_path) == {"a": "new", "b": "new", "c/d": "new", "mine": "mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "mine"]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_while_writing_keeps_what_was_there(tmp_path: Path) -> None:
    def write(target: Path) -> None:
        writer_of("new")(target)
        os.kill(os.getpid(), signal.SIGINT)

    write_folder(tmp_path, writer_of("old"))
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, write, force=True)
    assert contents(tmp_path) == {"a": "old", "b": "old", "c/d": "old", "mine": "mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "mine"]


def test_a_move_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_as_ever = Path.replace

    def fail_at_last(self: Path, target: Path) -> Path:
        if self.name == "c" and self.parent.name.endswith(".partial") and target.parent == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return replace_as_ever(self, target)

    write_folder(tmp_path, writer_of("old"))
    monkeypatch.setattr(Path, "replace", fail_at_last)
    with pytest.raises(ResultError, match="Permission denied"):
        write_folder(tmp_path, writer_of("new"), force=True)
    assert contents(tmp_path) == {"a": "old", "b": "old", "c/d": "old"}


def test_another_thread_may_write(tmp_path: Path) -> None:
    thread = threading.Thread(target=write_folder, args=(tmp_path / "run", writer_of("x")))
    thread.start()
    thread.join()
    assert contents(tmp_path / "run") == {"a": "x", "b": "x", "c/d": "x"}


def test_where_nothing_can_be_written_is_found_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ResultError, match=r"out must be a folder that can be written, .*/x: .*file is not a folder"):
        check_folder(tmp_path / "file" / "deep" / "x", force=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ResultError, match="out must be a folder that can be written"):
        check_folder(tmp_path / "loop" / "x", force=True)
    with pytest.raises(ResultError, match="out must be a folder that can be written"):
        check_folder(tmp_path / ("x" * 400), force=True)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ResultError, match=f"{tmp_path} may not be written to"):
        check_folder(tmp_path / "deep" / "x", force=True)


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
        ("other version", "result_version must be 2"),
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


def test_tokens_that_are_routed_nowhere_have_no_hit_ratio() -> None:
    figures = run(trace_of([[[NOT_ROUTED], [NOT_ROUTED]]]), 1).headline()
    assert (figures["decode_tokens"], figures["hit_ratio_union"], figures["hit_ratio_assignments"]) == (1, None, None)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nowhere"):
        RunResult.load(tmp_path / "nowhere")

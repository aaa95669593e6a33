from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from analysis import cli
from sim.results import RunResult
from traces.errors import InputError
from traces.schema import Trace
from traces.store import save

app = typer.Typer()
app.command()(cli.compare)


def run(*arguments: object) -> str:
    """Runs the command; returns what it printed, raises what it raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "120"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_prints_a_table_and_writes_the_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    printed = run(*folders, "--out", out)
    assert "whole token" in printed
    assert "median error of a token is 10.0%" in " ".join(printed.split())
    assert f"report: {out}" in printed
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_json_is_one_object(folders: tuple[Path, Path], tmp_path: Path) -> None:
    told = json.loads(run(*folders, "--out", tmp_path / "r.html", "--json", "--calibration-mean-s", 0.01))
    assert told["error"]["median"] == pytest.approx(0.1)
    assert told["skill"] == pytest.approx(0.6)
    assert told["report"] == str(tmp_path / "r.html")


def test_repeats_give_the_noise(folders: tuple[Path, Path], tmp_path: Path, slower: RunResult) -> None:
    repeat = slower.save(tmp_path / "slower")
    told = json.loads(run(*folders, "--out", tmp_path / "r.html", "--json", "--repeat", repeat))
    assert (told["repeats"], told["noise"]) == (2, pytest.approx(0.05))


def test_writes_what_else_is_asked_for(tmp_path: Path, trace: Trace, make_run: Callable[..., RunResult]) -> None:
    save(trace, tmp_path / "t.safetensors")
    folders = [make_run(name, trace_digest=trace.digest).save(tmp_path / name) for name in ("measured", "simulated")]
    extra = ["--perfetto", tmp_path / "t.json", "--markdown", tmp_path / "r.md", "--trace", tmp_path / "t.safetensors"]
    run(*folders, "--out", tmp_path / "r.html", *extra)
    assert "traceEvents" in json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))
    assert "| whole token |" in (tmp_path / "r.md").read_text(encoding="utf-8")
    assert "What the router likes" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_another_trace_is_refused(folders: tuple[Path, Path], tmp_path: Path, trace: Trace) -> None:
    save(trace, tmp_path / "t.safetensors")
    with pytest.raises(InputError, match=r"trace must be the one that the runs replayed \(d1\)"):
        run(*folders, "--out", tmp_path / "r.html", "--trace", tmp_path / "t.safetensors")
    assert not (tmp_path / "r.html").exists()


def test_existing_files_are_kept(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match=r"out must be a new file \(or give --force\)"):
        run(*folders, "--out", out)
    assert out.read_text(encoding="utf-8") == "mine"
    run(*folders, "--out", out, "--force")
    assert out.read_text(encoding="utf-8") != "mine"


def test_one_wrong_target_writes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(InputError, match="perfetto must be a file name, got the folder"):
        run(*folders, "--out", out, "--perfetto", tmp_path)
    with pytest.raises(InputError, match="markdown must be another file than out"):
        run(*folders, "--out", out, "--markdown", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("option", "name", "ending"),
    [("out", "q.txt", ".html or .htm"), ("perfetto", "q.html", ".json"), ("markdown", "q", ".md")],
)
def test_a_file_has_the_ending_of_what_is_in_it(
    folders: tuple[Path, Path], tmp_path: Path, option: str, name: str, ending: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    targets = {"--out": tmp_path / "r.html"} | {f"--{option}": tmp_path / name}
    with pytest.raises(InputError, match=rf"^{option} must end in {ending}, got .*{name}$"):
        run(*folders, *(word for pair in targets.items() for word in pair))
    assert sorted(tmp_path.rglob("*")) == before


def test_runs_that_do_not_belong_together_write_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="source of the measured run must be 'measured'"):
        run(folders[1], folders[0], "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_help_has_an_example() -> None:
    assert "moetwin compare runs/measured runs/simulated" in run("--help")


@pytest.mark.parametrize("field", ["out", "perfetto", "markdown"])
def test_nothing_is_written_into_a_run_that_is_read(tmp_path: Path, field: str) -> None:
    run = tmp_path / "runs" / "measured"
    run.mkdir(parents=True)
    with pytest.raises(InputError, match=f"{field} must lie outside the runs that are compared"):
        cli._spare_inputs({field: run / "run.json"}, [run, tmp_path / "other"])
    cli._spare_inputs({field: tmp_path / "runs" / "report.html"}, [run])

"""Which measured runs are repeats of each other, where their traces are found, and what is left out of a report."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from analysis.measured import Group, Twin, check_repeats, groups_of, workloads_of
from sim.presets import preset
from sim.replay.calibration import TraceCalibration
from sim.results import RunResult
from sim.systems import SystemSpec
from sim.target import retarget
from tests.analysis.test_measured import LEARNED, OTHER, PROFILE, RECORDED, SPEC, app, measured
from traces.errors import InputError
from traces.store import save

FITTED = preset("ktransformers").system
PLAIN = SystemSpec(name="plain")


def told(run: RunResult, **changes: Any) -> RunResult:
    """The run as if it told something else of itself."""
    run.info = run.info.model_copy(update=changes)
    return run


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"costs": "profile elsewhere 0123456789ab"}, r"profile \(the costs that policies weigh\)"),
        ({"calibration_digest": "c" * 64}, "calibration trace"),
        ({"recorded": "experts and weights"}, "recording of the routing"),
    ],
)
def test_runs_that_were_told_something_else_are_no_repeats(tmp_path: Path, changes: dict[str, str], words: str) -> None:
    measured(PLAIN, 2).save(tmp_path / "r1")
    told(measured(PLAIN, 2), **changes).save(tmp_path / "r2")
    groups = groups_of(tmp_path)
    assert [len(group.folders) for group in groups] == [1, 1]
    with pytest.raises(InputError, match=f"with another {words}.* than .*r1: judge each in a folder of its own"):
        workloads_of(groups)


def test_a_simulated_run_tells_what_its_policies_learned_from() -> None:
    assert measured(FITTED, 2).info.calibration_digest == retarget(LEARNED, SPEC).digest


def decided_otherwise(system: SystemSpec) -> tuple[Group, list[RunResult]]:
    """Three runs, the last of which ran an expert of step 2 in layer 1 on other tokens."""
    runs = [measured(system, 2) for _ in range(3)]
    rows = runs[2].operations
    place = rows[(rows.step == 2) & (rows.layer == 1) & (rows.op == "gpu")].index[0]
    rows.loc[place, "tokens"] += 1
    return Group(tuple(Path(f"r{number}") for number in (1, 2, 3)), runs[0].info), runs


def test_repeats_that_decided_otherwise_are_refused() -> None:
    group, runs = decided_otherwise(PLAIN)
    check_repeats(replace(group, folders=group.folders[:2]), runs[:2])
    with pytest.raises(InputError, match=r"plain, which .* got r3 with other operations than r1 from step 2, layer 1"):
        check_repeats(group, runs)


def test_repeats_in_another_order_or_without_operations_are_accepted() -> None:
    group, runs = decided_otherwise(PLAIN)
    runs[2].operations = runs[1].operations.iloc[::-1]
    check_repeats(group, runs)
    runs[2].operations = runs[2].operations.head(0)
    check_repeats(group, runs)


def test_arrivals_may_decide_where_there_is_prefetch() -> None:
    check_repeats(*decided_otherwise(SystemSpec(name="ahead", prefetch="next-router")))


def compared(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in ("--json", *words)])


def summary(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder of two, whose runs replayed different traces that stand beside each, on one profile."""
    root = tmp_path / "in"
    for place, trace in (("x", RECORDED), ("y", OTHER)):
        for repeat in ("r1", "r2"):
            measured(FITTED, 2, trace=trace, cache="25%").save(root / place / "runs" / "k" / "25pct" / repeat)
        measured(FITTED, 3).save(root / place / "constants" / "ktransformers" / "r1")
        save(trace, root / place / "trace.safetensors")
        save(LEARNED, root / place / "calibration.safetensors")
        PROFILE.save(root / place / "profile.toml")
    return root


@pytest.mark.parametrize("inside", [".", "x", "x/runs", "x/runs/k/25pct/r1"])
def test_the_trace_is_sought_from_the_run_upwards_whatever_folder_is_given(two: Path, inside: str) -> None:
    result = compared("--measured", two / inside, "--profile", two / "x/profile.toml", "--out", two.with_name("page"))
    found = summary(result)
    assert found["overall"]["points"] == (2 if inside == "." else 1)
    assert found["overall"]["decisions_exact"]
    assert found["overall"]["skill"] is not None
    assert found["complete"]
    assert result.stderr == ""


def test_what_cannot_be_judged_is_left_out_and_told(two: Path) -> None:
    size_bytes = 2 * measured(PLAIN, 2).info.expert_bytes
    told(measured(PLAIN, 2), trace_digest="f" * 64).save(two / "prompted")
    told(measured(SystemSpec(name="narrow"), 2), expert_bytes=size_bytes).save(two / "narrow")
    result = compared("--measured", two, "--profile", two / "x/profile.toml", "--out", two.with_name("page"))
    found = summary(result)
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"left out: {two / 'narrow'}: profile must be measured with experts of ")
    assert lines[1].startswith(f"left out: {two / 'prompted'}: trace must be the one that was replayed (ffffffffffff)")
    assert found["overall"]["points"] == 2
    assert found["missing"] == ["2 of 4 points could not be judged and were left out."]
    assert found["facts"][f"left out: {two / 'prompted'}"].startswith("trace must be")
    assert "2 of 4 points could not be judged" in (two.with_name("page") / "report.md").read_text(encoding="utf-8")


def test_repeats_that_differ_do_not_block_the_others(two: Path) -> None:
    _, runs = decided_otherwise(PLAIN)
    for number, run in enumerate(runs):
        run.save(two / "x" / "own" / f"r{number}")
    result = compared("--measured", two / "x", "--profile", two / "x/profile.toml", "--out", two.with_name("page"))
    assert summary(result)["overall"]["points"] == 1
    assert f"left out: {two / 'x/own/r0'} and 2 more: repeats must have decided the same" in result.stderr


def test_nothing_left_is_an_error_that_names_a_run(two: Path) -> None:
    for place in ("x", "y"):
        (two / place / "trace.safetensors").unlink()
    result = compared("--measured", two, "--profile", two / "x/profile.toml", "--out", two.with_name("page"))
    assert isinstance(result.exception, InputError)
    assert f"got none of 2; {two / 'x/runs/k/25pct/r1'} and 1 more: trace must be" in str(result.exception)
    assert not two.with_name("page").exists()


def test_what_was_learned_from_is_found_by_content(two: Path) -> None:
    """A nearer file of that name with another content is passed over; a run that does not tell takes the nearest."""
    near = two / "x" / "runs" / "calibration.safetensors"
    save(OTHER, near)
    folder = two / "x" / "runs" / "k" / "25pct" / "r1"
    info, twin = RunResult.load_info(folder), Twin.of(two / "x" / "profile.toml")
    assert twin.simulate(info, folder).info.calibration_digest == retarget(LEARNED, SPEC).digest
    silent = info.model_copy(update={"calibration_digest": ""})
    assert twin.simulate(silent, folder).info.calibration_digest == retarget(OTHER, SPEC).digest
    with pytest.raises(InputError, match="calibration must be the trace that ktransformers learned from"):
        Twin.of(two / "x" / "profile.toml", calibration=near).simulate(info, folder)


def test_without_what_was_learned_from_only_fitted_systems_are_left_out(two: Path) -> None:
    shutil.rmtree(two / "y")
    measured(PLAIN, 2, cache="25%").save(two / "x" / "runs" / "plain" / "25pct" / "r1")
    (two / "x" / "calibration.safetensors").unlink()
    result = compared("--measured", two / "x", "--profile", two / "x/profile.toml", "--out", two.with_name("page"))
    assert summary(result)["overall"]["points"] == 1
    (line,) = result.stderr.splitlines()
    assert "calibration must be the trace that ktransformers learned from" in line
    folder = two / "x" / "runs" / "k" / "25pct" / "r1"
    silent = RunResult.load_info(folder).model_copy(update={"calibration_digest": ""})
    with pytest.raises(InputError, match=r"calibration must be given for ktransformers, .* the run does not tell"):
        Twin.of(two / "x" / "profile.toml").ready(silent, folder)


def test_the_digest_of_a_calibration_is_that_of_its_trace() -> None:
    assert TraceCalibration.of(LEARNED, None).digest == LEARNED.digest

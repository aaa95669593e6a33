"""Folders of measured runs, simulated again on a profile and judged. A "measured" run here is a simulated one."""

from __future__ import annotations

import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from analysis import cli
from analysis.judging import judge
from analysis.measured import Twin, comparisons, constant_s, groups_of, workloads_of
from analysis.validation import Tables, figures
from sim.presets import preset
from sim.profile import ProfileCosts
from sim.replay.calibration import TraceCalibration
from sim.results import RunResult
from sim.run import simulate
from sim.spec import HostSpec
from sim.spec.profile import DensePoint, Profile
from sim.systems import Budget, SystemSpec
from sim.target import retarget
from tests.sim.profiles import SPEC, point
from traces.errors import InputError
from traces.schema import Trace
from traces.store import save
from traces.synthetic import Sizes, zipf
from traces.workload import lock_step

app = typer.Typer()
app.command()(cli.compare)

PROFILE = Profile(
    name="here",
    device="cpu",
    date="2026-01-01",
    machine={"processor": "by hand"},
    model=SPEC,
    host=HostSpec(source="test", joins_layers=True),
    copies=(point(SPEC.expert_bytes, 2e-3),),
    gpu_expert=(point(1, 1e-3), point(8, 2e-3)),
    cpu_expert_first=(point(1, 3e-3),),
    cpu_expert_later=(point(1, 2e-3),),
    dense=(DensePoint(tokens=1, base_s=1e-3, per_context_s=0, least_context=1, most_context=99, p90_s=1, repeats=3),),
    head=(point(1, 1e-3),),
    lookahead_s=0.0,
    token_s=1e-2,
)


def routing(seed: int) -> Trace:
    sizes = Sizes(
        sequences=2, prompt_tokens=3, new_tokens=4, layers=2, experts=8, top_k=2, expert_bytes=7, lookahead=1
    )  # fmt: skip
    return zipf(np.random.default_rng(seed), sizes)


RECORDED, LEARNED, OTHER = routing(1), routing(2), routing(3)


def measured(
    system: SystemSpec,
    slots: int,
    *,
    slower: float = 1.0,
    trace: Trace = RECORDED,
    batch: int = 1,
    hardware: str = "machine",
    **about: object,
) -> RunResult:
    """A run that a machine might have measured: all its times are ``slower`` times those of the profile."""
    judged = retarget(trace, SPEC)
    learned = TraceCalibration.of(retarget(LEARNED, SPEC), judged, batch)
    budget = Budget(slots=slots)
    run = simulate(
        lock_step(judged, batch), system, budget, ProfileCosts(PROFILE), hardware="machine", calibration=learned
    )
    for table in (run.requests, run.tokens, run.layers, run.events):
        times = [name for name in table if name.endswith("_s")]
        table[times] *= slower
    workload = {**run.info.workload, **about}
    run.info = run.info.model_copy(update={"source": "measured", "hardware": hardware, "workload": workload})
    return run


@dataclass
class Folder:
    runs: Path
    profile: Path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Two systems, one of them fitted to a trace, at two cache sizes, each measured twice."""
    root = tmp_path / "model"
    for name in ("ktransformers", "mixtral-offloading"):
        system = preset(name).system
        for cache, slots in (("25%", 2), ("50%", 4)):
            for repeat, slower in enumerate((1.05, 1.0), start=1):
                run = measured(system, slots, slower=slower, cache=cache)
                run.save(root / "runs" / name / cache.replace("%", "pct") / f"r{repeat}")
        measured(system, 3).save(root / "constants" / name / "r1")
    save(RECORDED, root / "trace.safetensors")
    save(LEARNED, root / "calibration.safetensors")
    PROFILE.save(root / "profile.toml")
    return Folder(root, root / "profile.toml")


def run(*words: object) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "140"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def test_repeats_of_the_same_work_stand_together_and_constants_are_left_out(folder: Folder) -> None:
    groups = groups_of(folder.runs)
    assert [(group.system, group.cache) for group in groups] == [
        (system, cache) for system in ("ktransformers", "mixtral-offloading") for cache in ("25%", "50%")
    ]
    assert all([path.name for path in group.folders] == ["r1", "r2"] for group in groups)
    assert all((constant_s(group.folders[0], "ktransformers") or 0.0) > 0 for group in groups)
    assert constant_s(groups[0].folders[0], "hybrimoe") is None


def test_the_tenth_repeat_comes_after_the_second(tmp_path: Path) -> None:
    for number in (10, 2, 1):
        measured(SystemSpec(), 2).save(tmp_path / f"r{number}")
    (group,) = groups_of(tmp_path)
    assert [path.name for path in group.folders] == ["r1", "r2", "r10"]
    assert group.cache == "4 slots"


def test_a_run_is_simulated_from_what_it_tells_and_what_stands_beside_it(folder: Folder) -> None:
    twin = Twin.of(folder.profile)
    for group in groups_of(folder.runs):
        again = twin.simulate(group.info, group.folders[0])
        best = RunResult.load(group.folders[1])
        assert again.info.source == "simulated"
        assert again.tokens.end_s.to_numpy() == pytest.approx(best.tokens.end_s.to_numpy())
        assert (again.layers.misses == best.layers.misses).all()


def test_a_profile_of_another_number_of_threads_is_told(tmp_path: Path) -> None:
    save(RECORDED, tmp_path / "trace.safetensors")
    PROFILE.model_copy(update={"cpu_threads": 4}).save(tmp_path / "p.toml")
    twin = Twin.of(tmp_path / "p.toml")
    info = measured(SystemSpec(), 2).info
    told = "the profile was measured with 4 threads for a CPU expert, the run had 8"
    for threads, is_told in ((None, False), (4, False), (8, True)):
        notes = twin.simulate(info.model_copy(update={"cpu_threads": threads}), tmp_path / "r1").info.notes
        assert (told in notes) == is_told


def test_runs_on_other_numbers_of_threads_are_no_repeats(tmp_path: Path) -> None:
    for threads in (4, 8):
        run = measured(SystemSpec(), 2)
        run.info = run.info.model_copy(update={"cpu_threads": threads})
        run.save(tmp_path / f"r{threads}")
    groups = groups_of(tmp_path)
    assert [len(group.folders) for group in groups] == [1, 1]
    with pytest.raises(InputError, match="with another cpu_threads than"):
        workloads_of(groups)


def test_slots_that_are_split_by_misses_are_split_again(tmp_path: Path) -> None:
    from sim.slots import split_by_misses

    learned = TraceCalibration.of(retarget(LEARNED, SPEC), retarget(RECORDED, SPEC))
    system = SystemSpec(slots_by_layer="miss-costs")
    judged = retarget(RECORDED, SPEC)
    budget = Budget(slots=3, by_layer=split_by_misses(learned, 6))
    known = simulate(lock_step(judged, 1), system, budget, ProfileCosts(PROFILE), hardware="x", calibration=learned)
    save(RECORDED, tmp_path / "t.safetensors")
    save(LEARNED, tmp_path / "c.safetensors")
    PROFILE.save(tmp_path / "p.toml")
    twin = Twin.of(tmp_path / "p.toml", tmp_path / "t.safetensors", tmp_path / "c.safetensors")
    again = twin.simulate(known.info, tmp_path / "r1")
    assert (again.layers.misses == known.layers.misses).all()


def test_compare_judges_a_folder_of_measured_runs(folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "report"
    printed = run("--measured", folder.runs, "--profile", folder.profile, "--out", out)
    assert "4 points (2 systems)" in " ".join(printed.split())
    assert sorted(path.name for path in out.iterdir()) == [
        "components.csv", "points.csv", "report.html", "report.md", "summary.json", "tokens.parquet",
    ]  # fmt: skip
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary["overall"]["median"] == pytest.approx(0.0, abs=1e-9)
    assert summary["overall"]["noise"] == pytest.approx(0.025)
    assert summary["overall"]["decisions_exact"]
    assert summary["overall"]["repeats"] == [2, 2]


@pytest.fixture
def two_traces(tmp_path: Path) -> Folder:
    """One system at one cache size, measured on two traces, each twice, the second trace in batches as well."""
    root = tmp_path / "model"
    for place, (trace, batch) in enumerate(((RECORDED, 1), (OTHER, 1), (OTHER, 2))):
        for name in ("ktransformers", "mixtral-offloading"):
            run = measured(preset(name).system, 2, trace=trace, batch=batch, slower=1.0 + place, cache="25%")
            for repeat in ("r1", "r2"):
                run.save(root / "runs" / f"{place}" / name / repeat)
    save(RECORDED, root / "trace.safetensors")
    save(OTHER, root / "runs" / "trace.safetensors")
    save(LEARNED, root / "calibration.safetensors")
    PROFILE.save(root / "profile.toml")
    return Folder(root / "runs", root / "profile.toml")


def test_trace_and_batch_are_part_of_a_points_name_where_there_are_several(two_traces: Folder, tmp_path: Path) -> None:
    groups = groups_of(two_traces.runs)
    left_out: dict[str, str] = {}
    tables = Tables.of(comparisons(groups, Twin.of(two_traces.profile), left_out))
    assert left_out == {}
    first, second = (retarget(trace, SPEC).digest[:8] for trace in (RECORDED, OTHER))
    names = [f"trace {first}, batch 1", f"trace {second}, batch 1", f"trace {second}, batch 2"]
    assert tables.points.workload.tolist() == [name for name in names for _ in range(2)]
    assert tables.points.decisions_exact.all(), "the fitted system learns over as many lanes as it ran"
    found = figures(tables)
    assert found["overall"]["points"] == 6
    bias = {(one["system"], one["workload"]): one["bias"] for one in found["points"]}
    for place, name in enumerate(names):
        assert bias["ktransformers", name] == pytest.approx(1 / (1 + place) - 1)
    tables.save(tmp_path)
    assert Tables.load(tmp_path).points.workload.tolist() == tables.points.workload.tolist()
    page = tmp_path / "page"
    told = run("--measured", two_traces.runs, "--profile", two_traces.profile, "--out", page)
    assert "6 points (2 systems)" in " ".join(told.split())
    for name in names:
        assert f"25%, {name}" in (page / "report.md").read_text(encoding="utf-8")


def test_one_workload_has_no_name(folder: Folder) -> None:
    assert workloads_of(groups_of(folder.runs)) == [""] * 4


def test_runs_that_differ_in_what_no_table_names_are_told(tmp_path: Path) -> None:
    measured(SystemSpec(name="mine"), 2).save(tmp_path / "one")
    measured(SystemSpec(name="mine", evict="lfu"), 2, hardware="another").save(tmp_path / "other")
    with pytest.raises(InputError, match=r"got .*other with another hardware and system than .*one"):
        workloads_of(groups_of(tmp_path))


def test_half_written_runs_are_left_out(tmp_path: Path) -> None:
    measured(SystemSpec(), 2).save(tmp_path / "r1")
    measured(SystemSpec(), 2).save(tmp_path / ".r2.partial")
    (group,) = groups_of(tmp_path)
    assert [path.name for path in group.folders] == ["r1"]


def test_compare_takes_a_single_run(folder: Folder, tmp_path: Path) -> None:
    one = folder.runs / "runs" / "ktransformers" / "25pct" / "r1"
    told = json.loads(run("--measured", one, "--profile", folder.profile, "--out", tmp_path / "r", "--json"))
    assert told["overall"]["points"] == 1
    assert told["overall"]["median"] == pytest.approx(0.05 / 1.05)
    assert told["overall"]["noise"] is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--measured", "RUNS"), "profile must be given with --measured, got nothing"),
        (("--profile", "p.toml"), "profile must be left out without --measured, got p.toml"),
        ((), "measured must be given, got nothing"),
        (
            ("x", "--measured", "RUNS", "--profile", "P"),
            "a measured run by its place must be left out",
        ),
        (("--measured", "NOWHERE", "--profile", "P"), "measured must be a folder of runs, got NOWHERE"),
        (
            ("--measured", "RUNS", "--profile", "P", "--calibration-mean-s", "0.5"),
            "calibration-mean-s must be left out with --measured, got 0.5",
        ),
    ],
)
def test_words_that_do_not_go_together_are_refused(folder: Folder, words: tuple[str, ...], told: str) -> None:
    given = [{"RUNS": folder.runs, "P": folder.profile}.get(word, word) for word in words]
    with pytest.raises(InputError, match=told):
        run(*given)


def test_another_trace_and_a_missing_calibration_are_told(folder: Folder, tmp_path: Path) -> None:
    words = ("--measured", folder.runs, "--profile", folder.profile, "--out", tmp_path / "out")
    with pytest.raises(InputError, match="trace must be the one that was replayed") as error:
        run(*words, "--trace", folder.runs / "calibration.safetensors")
    first = folder.runs / "runs" / "ktransformers" / "25pct" / "r1"
    assert f"got none of 4; {first} and 1 more: trace must be" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_read_is_left_out(tmp_path: Path, folder: Folder) -> None:
    good = folder.runs / "runs" / "ktransformers" / "25pct" / "r1"
    some = tmp_path / "some"
    shutil.copytree(good, some / "good")
    for name, content in (("broken", "5"), ("foreign", (good / "run.json").read_text().replace('"batch"', '"lanes"'))):
        (some / name).mkdir()
        (some / name / "run.json").write_text(content)
    left_out: dict[str, str] = {}
    (group,) = groups_of(some, left_out)
    assert group.folders == (some / "good",)
    assert [Path(where).name for where in left_out] == ["broken", "foreign"]
    assert left_out[str(some / "foreign")].endswith("must be a run that tells its batch, got None")


def test_a_folder_without_measured_runs_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="measured must hold measured runs, got none in"):
        groups_of(tmp_path)


@dataclass
class Handed:
    """What the measuring half of a validation hands over."""

    folder: Path
    missing: dict[str, list[str]]
    done: int = 5
    total: int = 9
    archive: Path | None = None
    as_json: bool = False


@pytest.fixture
def validation(folder: Folder) -> Path:
    root = folder.runs.parent
    (root / "settings.json").write_text('{"device": "cpu", "caches": ["25%", "50%"]}')
    (root / "environment.json").write_text('{"date": "2026-01-01", "processor": "by hand"}')
    return root


def test_a_validation_is_judged_into_its_own_folder(validation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    judge(Handed(validation, {"model": ["runs/x"]}, archive=validation.parent / "a.tar.gz"))
    told = " ".join(capsys.readouterr().out.split())
    assert "Not complete: 4 of 9 pieces are missing (1 of model); call again to go on." in told
    summary = json.loads((validation / "summary.json").read_text(encoding="utf-8"))
    assert not summary["complete"]
    assert summary["overall"]["skill"] is not None
    assert "2 of" not in (validation / "report.md").read_text(encoding="utf-8").splitlines()[0]
    assert (validation / "model" / "profile.toml").exists()
    with tarfile.open(validation.parent / "a.tar.gz") as packed:
        names = packed.getnames()
    assert f"{validation.name}/summary.json" in names
    assert f"{validation.name}/model/runs/ktransformers/25pct/r1/run.json" in names
    judge(Handed(validation, {}, done=9, as_json=True))
    assert json.loads(capsys.readouterr().out)["complete"]


def test_nothing_measured_is_told_and_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "v"
    folder.mkdir()
    (folder / "settings.json").write_text("{}")
    judge(Handed(folder, {"model": ["profile"]}, done=0))
    assert "nothing to judge yet: 0 of 9 pieces" in capsys.readouterr().out
    judge(Handed(folder, {"model": ["profile"]}, done=0, archive=tmp_path / "v.tar.gz", as_json=True))
    told = json.loads(capsys.readouterr().out)
    assert (told["complete"], told["overall"], told["report"]) == (False, None, None)
    assert told["missing"] == ["nothing to judge yet: 0 of 9 pieces are measured; call again to go on"]
    with tarfile.open(tmp_path / "v.tar.gz") as packed:
        assert packed.getnames() == ["v/settings.json"]
    assert [path.name for path in folder.iterdir()] == ["settings.json"]


def test_archives_and_half_written_folders_are_not_packed(validation: Path) -> None:
    half = validation / "model" / "runs" / "ktransformers" / "25pct" / ".r3.partial"
    half.mkdir()
    (half / "run.json").write_text("{")
    for name in ("one", "other"):
        judge(Handed(validation, {}, done=9, archive=validation / f"{name}.tar.gz"))
    with tarfile.open(validation / "other.tar.gz") as packed:
        names = packed.getnames()
    assert f"{validation.name}/summary.json" in names
    assert [name for name in names if "partial" in name or name.endswith(".tar.gz")] == []


def test_equal_folders_give_equal_archives(validation: Path) -> None:
    archives = [validation.parent / f"{name}.tar.gz" for name in ("one", "other")]
    for archive in archives:
        judge(Handed(validation, {}, done=9, archive=archive))
    assert archives[0].read_bytes() == archives[1].read_bytes()

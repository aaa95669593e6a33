"""The suite that produces all figures of a GPU: its steps, its limits of time, its archive and its summary."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_suite, gpu_summary
from benchmarks.gpu_suite import Step, Suite

LIMITS: dict[str, Any] = {
    "link_share": {"prompt": 0.93, "decode": 0.7, "copies_under_way": 0.99},
    "python_us": {"mixtral-offloading 25%": {"median": 160.0, "p90": 200.0}, "hybrimoe 25%": {"median": 400.0}},
    "memory": [
        {"system": "on-demand", "cache": "25%", "allocated_over_planned": 0.97},
        {
            "system": "hybrimoe",
            "cache": "25%",
            "allocated_over_planned": 1.01,
            "device_allocated_bytes": 4 * 10**9,
            "device_reserved_bytes": 5 * 10**9,
            "device_context_bytes": 6 * 10**8,
        },
    ],
    "host": {"weights_bytes": 2 * 10**9, "resident_over_weights": 1.05},
}
PEERS: dict[str, Any] = {
    "model": "olmoe-1b-7b",
    "dtype": "bf16",
    "limit_bytes": 4_500_000_000,
    "programs": [
        {
            "name": "hybrimoe", "tokens_per_s": [30.0, 20.0, 25.0], "expected_tokens_per_s": 26.0,
            "peak_bytes": 4_400_000_000, "same_tokens": 1.0, "note": "", "not_run": "",
        },
        {
            "name": "accelerate", "tokens_per_s": [], "expected_tokens_per_s": None,
            "peak_bytes": None, "same_tokens": None, "note": "", "not_run": "no room",
        },
    ],
}  # fmt: skip


def program(name: str, text: str, *, limit_s: float = 60.0, reserve_s: float = 0.0, unit: str | None = None) -> Step:
    return Step(name, ("-c", text), reserve_s, limit_s, unit=unit)


def suite_in(folder: Path, **fields: Any) -> Suite:
    (folder / "work").mkdir(exist_ok=True)
    return Suite(folder / "work", folder / "out", {}, **fields)


def run(folder: Path, *steps: Step, limit_s: float = 1000.0, **fields: Any) -> Suite:
    suite = suite_in(folder, **fields)
    suite.run(steps, limit_s)
    return suite


def names_in(archive: Path) -> list[str]:
    with tarfile.open(archive) as opened:
        return opened.getnames()


def statuses(suite: Suite) -> list[str]:
    return [one["status"] for one in suite.done.values()]


def test_nothing_but_the_standard_library_is_imported_before_the_check() -> None:
    code = "import benchmarks.gpu_suite"
    assert subprocess.run([sys.executable, "-S", "-c", code], cwd=gpu_suite.ROOT, check=False).returncode == 0


def test_a_step_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    suite = run(tmp_path, program("bad", "raise SystemExit(3)"), program("good", "print('fine')"))
    assert statuses(suite) == ["exit code 3", "done"]
    assert (tmp_path / "work/good/stdout.txt").read_text() == "fine\n"


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    suite = run(tmp_path, program("slow", "import time; time.sleep(600)", limit_s=0.5), program("good", ""))
    assert statuses(suite) == ["ended at its limit of time", "done"]


def test_what_took_too_long_before_comes_last(tmp_path: Path) -> None:
    done = {"slow": {"status": gpu_suite.TOO_LONG}, "cut": {"status": "no time left"}}
    marker = tmp_path / "cut-has-run"
    check = f"from pathlib import Path; raise SystemExit(0 if Path({str(marker)!r}).exists() else 4)"
    steps = [program("slow", check), program("cut", f"from pathlib import Path; Path({str(marker)!r}).touch()")]
    assert {*statuses(run(tmp_path, *steps, done=done))} == {"done"}


def test_later_steps_keep_their_reserve_and_earlier_ones_are_told_the_rest(tmp_path: Path) -> None:
    told = program("told", "import sys; print(sys.argv[1:])", limit_s=1e9, unit="s")
    run(tmp_path, told, program("late", "", reserve_s=300), limit_s=1000.0, now_s=lambda: 0.0)
    given_s = int(1000 - gpu_suite.MARGIN_S - 300 - gpu_suite.TO_END_S)
    assert (tmp_path / "work/told/stdout.txt").read_text() == f"['--time-limit', '{given_s}s']\n"


def test_a_step_without_time_is_left_for_the_next_call(tmp_path: Path) -> None:
    step = program("late", "print('ran')", reserve_s=100)
    suite = run(tmp_path, step, limit_s=gpu_suite.MARGIN_S + 20)
    assert statuses(suite) == ["no time left"]
    suite.run([step], 1000)
    assert statuses(suite) == ["done"]


def test_what_is_done_is_not_done_again_after_a_break(tmp_path: Path) -> None:
    steps = [program("first", "print('ran')"), program("second", "raise SystemExit(1)")]
    run(tmp_path, *steps)
    new = tmp_path / "new"
    (new / "work").mkdir(parents=True)
    done = gpu_suite.unpack(sorted((tmp_path / "out").glob("results-*.tar.gz")), new / "work")
    assert {name: one["status"] for name, one in done.items()} == {"first": "done", "second": "exit code 1"}
    ran = [program("first", "raise SystemExit('again')"), program("second", "print('again')")]
    suite = run(new, *ran, done=done)
    assert statuses(suite) == ["done", "done"]
    assert (new / "work/first/stdout.txt").read_text() == "ran\n"


@pytest.mark.parametrize(
    ("printed", "status"),
    [
        ('{"complete": false, "overall": {}}', "to be gone on with"),
        ("nothing to judge yet", "to be gone on with"),
        ('{"complete": true, "overall": {}}', "done"),
    ],
)
def test_a_validation_that_misses_runs_is_gone_on_with(tmp_path: Path, printed: str, status: str) -> None:
    assert statuses(run(tmp_path, program("validate-m", f"print({printed!r})"))) == [status]


@pytest.mark.parametrize(
    ("printed", "status", "told"),
    [
        ("== 3 passed, 16 skipped, 2 deselected in 1.20s ==", "done", "3 passed, 16 skipped"),
        ("20 passed in 1.20s", "done", "20 passed, 0 skipped"),
        ("1 failed, 2 passed, 1 error in 3s", "done", "2 passed, 0 skipped, 1 failed, 1 error"),
        ("16 skipped, 25 deselected in 1.20s", "nothing tested", "nothing tested (0 passed, 16 skipped)"),
        ("..s..", "done", "..s.."),
    ],
)
def test_the_summary_says_how_many_tests_ran(tmp_path: Path, printed: str, status: str, told: str) -> None:
    suite = run(tmp_path, program("tests", f"print('first line'); print({printed!r})"), program("late", ""))
    assert statuses(suite) == [status, "done"]
    assert f"Tests: {told}" in (tmp_path / "out/summary.md").read_text().splitlines()


@pytest.mark.parametrize(("device", "marked"), [("cuda", "gpu"), ("cpu", "not gpu")])
def test_without_a_gpu_the_tests_are_those_that_need_none(tmp_path: Path, device: str, marked: str) -> None:
    words = gpu_suite.steps_of("1", device, tmp_path, quick=True)[0].words
    assert words[words.index("pytest") + 3] == marked


def test_a_profile_is_handed_over_once_there_is_one(tmp_path: Path) -> None:
    profile = tmp_path / "profile.toml"
    step = Step("limits", ("-m", "x"), 1, 1, profile=profile)
    assert step.command(9.0) == ["-m", "x"]
    profile.write_text("")
    assert step.command(9.0) == ["-m", "x", "--profile", str(profile)]


def test_a_part_is_one_model_and_the_first_has_the_tests(tmp_path: Path) -> None:
    names = {part: [step.name for step in gpu_suite.steps_of(part, "cuda", tmp_path, quick=False)] for part in "123"}
    assert names["1"] == ["tests", "validate-olmoe-1b-7b", "limits-olmoe-1b-7b", "peers-olmoe-1b-7b"]
    assert names["2"] == [f"{kind}-deepseek-v2-lite" for kind in ("validate", "limits", "peers")]
    assert names["3"] == ["validate-qwen3-30b-a3b", "limits-qwen3-30b-a3b"]
    validate = gpu_suite.steps_of("3", "cuda", tmp_path, quick=False)[0].words
    assert len(gpu_suite.SYSTEMS.split(",")) >= 6
    assert {"bf16", "cuda", "qwen3-30b-a3b", gpu_suite.SYSTEMS} <= {*validate}


def test_an_archive_leaves_out_events_first_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_suite, "PART_BYTES", 100)
    monkeypatch.setattr(gpu_suite, "MOST_PARTS", 2)
    work, out = tmp_path / "work", tmp_path / "out"
    sizes = {"a/events.parquet": 60, "a/layers.parquet": 60, "a/operations.parquet": 60, "f.json": 10, "g.json": 101}
    for name, size in sizes.items():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(bytes(size))
    out.mkdir()
    assert gpu_suite.pack(work, out) == ["a/events.parquet", "g.json"]
    archives = sorted(out.glob("*"))
    assert [path.name for path in archives] == ["results-1.tar.gz", "results-2.tar.gz"]
    assert [names_in(path) for path in archives] == [["a/layers.parquet", "f.json"], ["a/operations.parquet"]]


def test_runs_that_lost_a_table_are_made_again_unless_all_is_done(tmp_path: Path) -> None:
    work, out = tmp_path / "work", tmp_path / "out"
    for step in ("validate-a", "validate-b"):
        for run_name, tables in (("r1", gpu_suite.LARGE), ("r2", gpu_suite.LARGE[:1])):
            folder = work / step / "run" / run_name
            folder.mkdir(parents=True)
            for name in ("run.json", *tables):
                (folder / name).write_text("{}")
    ended = {"validate-a": {"status": "done"}, "validate-b": {"status": "to be gone on with"}}
    (work / "state.json").write_text(json.dumps(ended))
    out.mkdir()
    gpu_suite.pack(work, out)
    new = tmp_path / "new"
    new.mkdir()
    assert gpu_suite.unpack([out / "results-1.tar.gz"], new) == ended
    kept = sorted(str(path.parent.relative_to(new)) for path in new.rglob("run.json"))
    assert kept == ["validate-a/run/r1", "validate-a/run/r2", "validate-b/run/r1"]


def test_what_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(gpu_suite, "NEEDED", {"json": "json", "no_such_package": "no-such-package"})
    monkeypatch.setattr(gpu_suite, "LEAST_DISK_BYTES", 10**30)
    faults = gpu_suite.check(["moetwin-small"], "cpu", tmp_path, {})
    assert faults[0] == "packages are missing: no-such-package (carry their wheels, and give --wheels)"
    assert faults[1].startswith("disk must have")
    assert "MISSING packages are missing: no-such-package" in capsys.readouterr().err


def test_figures_stand_beside_what_is_asked_for(tmp_path: Path) -> None:
    overall = {"median": 0.04, "p90": 0.16, "skill": 0.3, "kendall_tau": 0.97, "noise": 0.01}
    figures = {"validate-m": {"overall": overall}, "limits-m": LIMITS, "peers-m": PEERS}
    for name, content in figures.items():
        (tmp_path / name).mkdir()
        file = "stdout.txt" if name == "validate-m" else "figures.json"
        (tmp_path / name / file).write_text(json.dumps(content))
    done = {name: {"status": "done", "seconds": 3.0} for name in figures}
    lines = gpu_summary.told(gpu_summary.collect(tmp_path, done, [])).splitlines()
    for line in (
        "| m | median error of a token | 0.040 | at most 5 % | yes |",
        "| m | 90th percentile of the error | 0.160 | at most 15 % | NO |",
        "| m | Kendall's tau | 0.970 | at least 0.95 | yes |",
        "| m | link, a prompt bound by misses | 93.0% | at least 90% | yes |",
        "| m | Python in a layer, mixtral-offloading 25% | 160 us | at most 150 us | NO |",
        "| m | Python in a layer, hybrimoe 25% | 400 us |  |  |",
        "| m | allocated over planned, on-demand 25% | 97.0% | within 2 % | NO |",
        "| m | allocated over planned, hybrimoe 25% | 101.0% | within 2 % | yes |",
        "| m | GPU memory in GB, hybrimoe 25% | allocated 4.000, reserved 5.000, context 0.600 |  |  |",
        "| m | host memory over weights | 105.0% | at most 110% | yes |",
        "| hybrimoe | 25.00 | 20.00 | 30.00 | 26.00 | 4.40 | 100% |  |",
        "| accelerate | - | - | - | - | - | - | no room |",
        "Tests: not run",
    ):
        assert line in lines

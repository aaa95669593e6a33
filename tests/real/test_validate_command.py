"""``moetwin validate`` as a person calls it: mistakes in one line, and one small validation from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.validation import Tables, figures
from tests.commanding import refused, run


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--time-limit", "soon"), "time-limit must be a time such as 90s, 30m or 2h, got 'soon'"),
        (("--time-limit", "0m"), "time-limit must be a time such as 90s, 30m or 2h, got '0m'"),
        (("--archive", "all.zip"), "archive must end in .tar.gz, got all.zip"),
        (("--archive", "OUT/all.tar.gz"), "archive must be a file outside the folder of out"),
        (("--systems", "hybrimoe,hybrimoe"), "systems must be different names with commas, got 'hybrimoe,hybrimoe'"),
        (("--systems", "hybrimo"), "did you mean hybrimoe"),
        (("--systems", "layer-split"), "systems must be ones that real models can run, got layer-split"),
        (("--caches", ","), "caches must be different names with commas, got ','"),
        (("--caches", "200%"), "caches must be at most 100%, got 200%"),
        (("--calibration", "mixed"), "calibration must be another recording than trace, got mixed for both"),
        (("--model", "no-such-model"), "no-such-model"),
        (
            ("--model", "moetwin-small", "--model", "moetwin-small"),
            "models must have different names, got moetwin-small",
        ),
        (("--dtype", "fp8"), "fp8"),
        (("--repeats", "1"), "repeats must be"),
    ],
)
def test_mistakes_are_told_in_one_line_and_write_nothing(tmp_path: Path, words: tuple[str, ...], told: str) -> None:
    out = tmp_path / "out"
    given = [word.replace("OUT", str(out)) for word in words]
    line = refused("validate", "--device", "cpu", "--out", str(out), *given)
    assert line.startswith("error: ")
    assert told in line
    assert not out.exists()


@pytest.mark.slow
def test_a_small_validation_from_end_to_end(tmp_path: Path) -> None:
    out, archive = tmp_path / "out", tmp_path / "all.tar.gz"
    words = [
        "validate", "--device", "cpu", "--model", "moetwin-small", "--systems", "ktransformers,mixtral-offloading",
        "--caches", "25%,50%", "--repeats", "2", "--tokens", "2", "--sequences", "1", "--out", str(out),
    ]  # fmt: skip
    first = run(*words, "--time-limit", "0.001s")
    assert first.exit_code == 0, first.output
    assert "nothing to judge yet: 0 of" in first.stdout
    told = json.loads(run(*words, "--time-limit", "0.001s", "--archive", str(archive), "--json").stdout)
    assert (told["complete"], told["overall"]) == (False, None)
    archive.unlink()
    whole = run(*words, "--archive", str(archive), "--json")
    assert whole.exit_code == 0, whole.output
    told = json.loads(whole.stdout)
    assert told["complete"]
    assert told["overall"]["decisions_exact"]
    assert (told["overall"]["points"], told["overall"]["tokens"]) == (4, 8)
    assert archive.exists()
    assert figures(Tables.load(out))["overall"]["median"] == pytest.approx(told["overall"]["median"])
    again = run(*words, "--json")
    assert json.loads(again.stdout)["overall"] == told["overall"]


def test_the_help_says_that_systems_may_be_ones_own() -> None:
    text = " ".join(run("validate", "--help").stdout.replace("│", " ").split())
    assert "Published systems, or TOML files of your own, separated by commas" in text

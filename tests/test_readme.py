"""Every command that the README shows in a console block is run, in order, in one empty folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from analysis.validation import Tables, figures
from benchmarks import replay_memory, replay_speed, simpy_floor
from sim.spec import catalogue

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)]
(RANDOM_MODEL,) = re.findall(r"^    (moetwin decode .* --random-weights .*)$", README, re.MULTILINE)
VALIDATIONS = [line.split() for line in re.findall(r"^    moetwin (validate .*)$", README, re.MULTILINE)]
JUDGED = [Path(words[words.index("--out") + 1]) for words in VALIDATIONS if "cuda" not in words]
"""Folders of the validations on this page: of wide experts, and of the small model."""


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.removeprefix("$ ").removeprefix("moetwin "))
    return subprocess.run(
        [sys.executable, "-m", "moetwin", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )


def works(command: str, folder: Path) -> None:
    outcome = run(command, folder)
    assert outcome.returncode == 0, f"{command}\n{outcome.stdout}\n{outcome.stderr}"
    assert outcome.stdout.strip(), command


def works_in_source(words: list[str]) -> str:
    outcome = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=3600
    )
    assert outcome.returncode == 0, f"{words}\n{outcome.stdout}\n{outcome.stderr}"
    return outcome.stdout


@pytest.mark.slow
def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    for line in (line for block in BLOCKS for line in block):
        assert line.startswith("$ moetwin "), f"a console block holds one command a line, got {line!r}"
        works(line, tmp_path)


@pytest.mark.slow
def test_a_few_layers_of_the_model_of_random_weights_decode_as_the_readme_shows(tmp_path: Path) -> None:
    (synth,) = (line for block in BLOCKS for line in block if "--out olmoe.safetensors" in line)
    few = {"layers": 2, "moe_layers": 2, "hidden": 256, "expert_width": 128, "heads": 4, "kv_heads": 4, "head_dim": 64}
    fields = {**catalogue.model("olmoe-1b-7b").model_dump(), **few, "name": "olmoe-few-layers"}
    (tmp_path / "few.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
    works(f"{synth} --layers 2 --sequences 1 --prompt-tokens 8 --new-tokens 4", tmp_path)
    works(f"{RANDOM_MODEL} --model few.toml --json", tmp_path)
    outcome = run(f"{RANDOM_MODEL} --model few.toml --gpu-memory 1MiB", tmp_path)
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: gpu-memory must be at least")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
def test_the_model_of_random_weights_decodes_on_a_gpu_as_the_readme_shows(tmp_path: Path) -> None:
    (synth,) = (line for block in BLOCKS for line in block if "--out olmoe.safetensors" in line)
    works(synth, tmp_path)
    works(RANDOM_MODEL, tmp_path)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch finds none")
def test_a_validation_begins_on_a_gpu_as_the_readme_shows(tmp_path: Path) -> None:
    (words,) = (words for words in VALIDATIONS if "cuda" in words)
    few = ["--model", "moetwin-small", "--caches", "50%", "--repeats", "2", "--tokens", "2", "--sequences", "1"]
    works(shlex.join([*words, *few]), tmp_path)


@pytest.mark.slow
def test_the_readme_selects_the_tests_that_need_a_gpu() -> None:
    (line,) = re.findall(r"^    python (-m pytest .*)$", README, re.MULTILINE)
    chosen = works_in_source([*line.split(), "--collect-only", "-q"])
    assert "test_a_validation_begins_on_a_gpu_as_the_readme_shows" in chosen
    assert "test_the_readme_selects" not in chosen


def test_the_committed_results_are_those_of_the_commands_that_the_readme_shows() -> None:
    wide, small = (json.loads((ROOT / folder / "settings.json").read_text(encoding="utf-8")) for folder in JUDGED)
    assert (wide["models"], small["models"]) == (["wide"], ["moetwin-small"])
    assert wide["device"] == small["device"] == "cpu"
    for found in (wide, small):
        assert found["repeats"] >= 7
        assert len(found["systems"]) >= 6
        assert found["trace"] != found["calibration"]


def test_the_readme_shows_commands_and_every_file_it_links_to_exists() -> None:
    assert sum(map(len, BLOCKS)) >= 10
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def judged(folder: Path) -> dict[str, Any]:
    """The figures that follow from a committed validation's tables."""
    return figures(Tables.load(ROOT / folder))


def test_the_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    wide, small = (judged(folder)["overall"] for folder in JUDGED)
    for label, key, shown in (
        ("median absolute error", "median", "{:.1%}"),
        ("90th percentile", "p90", "{:.1%}"),
        ("signed bias", "bias", "{:.1%}"),
        ("noise", "noise", "{:.1%}"),
        ("skill", "skill", "{:.2f}"),
        ("Kendall", "kendall_tau", "{:.2f}"),
        ("pairs that tau leaves out", "pairs_left_out", "{:.0%}"),
    ):
        (row,) = re.findall(rf"^\| {label}.*\| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
        assert [cell.replace(" %", "%") for cell in row] == [shown.format(one[key]) for one in (wide, small)], label


def test_the_speed_of_the_engine_in_the_readme_is_that_of_the_committed_results() -> None:
    file = ROOT / "analysis" / "results" / "xeon-2core-cpu" / "simpy_floor.json"
    lines = re.findall(r"^    (.* decode tokens/s, .*)$", README, re.MULTILINE)
    assert lines == simpy_floor.shown(json.loads(file.read_text(encoding="utf-8")))


RESULTS = ROOT / "analysis" / "results" / "xeon-2core-cpu"


def figures_of(benchmark: str) -> list[dict[str, Any]]:
    """The rows of a committed result, or none."""
    file = RESULTS / f"{benchmark}.json"
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["policies"] if file.exists() else []
    return rows


def test_the_speed_and_memory_of_replay_in_the_readme_are_those_of_the_committed_results() -> None:
    speeds = re.findall(r"^    (\S+ +[\d.]+ +[\d.]+ M/s against .*)$", README, re.MULTILINE)
    assert speeds == [replay_speed.line_of(row) for row in figures_of("replay_speed")]
    sizes = re.findall(r"^    (.* MiB above the mapped file)$", README, re.MULTILINE)
    assert sizes == [replay_memory.line_of(row) for row in figures_of("replay_memory")]


def test_the_committed_figures_of_replay_hold_the_bars() -> None:
    for row in figures_of("replay_speed"):
        assert row["ratio"] >= {"arc": 3, "fifo": 1}.get(row["policy"], 4), row
        assert (row["misses"] == row["their_misses"]) is (row["policy"] != "belady"), "belady need not keep what misses"
    for row in figures_of("replay_memory"):
        assert row["assignments"] >= 100_000_000
        assert row["above_mapped_bytes"] <= 1 << 30, row


def test_the_worst_points_of_the_readme_are_those_of_the_committed_results() -> None:
    shown = re.findall(
        r"worst (?:predicted there )?is ([^;.]*?) at (\d+%), off by ([\d.]+) %", " ".join(README.split())
    )
    for found, folder in zip(shown, JUDGED, strict=True):
        worst = max(judged(folder)["points"], key=lambda one: one["median_error"])
        assert found == (worst["system"], worst["cache"], f"{worst['median_error'] * 100:.1f}")


def stall_ms(folder: Path, system: str, cache: str) -> tuple[float, float]:
    """The stall of a token, measured and simulated, in a committed validation."""
    rows = Tables.load(ROOT / folder).components
    (found,) = rows[(rows.name == "stall_s") & (rows.system == system) & (rows.cache == cache)].to_dict("records")
    return found["measured_ms"], found["simulated_ms"]


def test_the_stalls_that_the_limitations_tell_of_are_those_of_the_committed_results() -> None:
    words = " ".join((ROOT / "docs" / "limitations.md").read_text(encoding="utf-8").split())
    told = re.findall(r"(wide|small): (\S+) at (\d+%) waits ([\d.]+) ms, predicted ([\d.]+) ms", words)
    assert {place for place, *_ in told} == {"wide", "small"}
    for place, system, cache, measured, simulated in told:
        found = stall_ms(JUDGED[place == "small"], system, cache)
        assert (measured, simulated) == tuple(f"{value:.2f}" for value in found), (place, system)


def test_the_committed_validation_of_wide_experts_holds_the_bars() -> None:
    wide = judged(JUDGED[0])["overall"]
    assert wide["decisions_exact"]
    assert wide["systems"] >= 6
    assert wide["repeats"][0] >= 7
    assert wide["median"] <= 0.10
    assert wide["p90"] <= 0.20
    assert wide["skill"] <= 0.7
    assert wide["kendall_tau"] >= 0.9

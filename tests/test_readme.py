"""Every command that the README shows in a console block is run, in order, in one empty folder."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block.strip().splitlines() for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    words = shlex.split(command.removeprefix("$ moetwin"))
    return subprocess.run(
        [sys.executable, "-m", "moetwin", *words], cwd=folder, capture_output=True, text=True, check=False, timeout=600
    )


@pytest.mark.slow
def test_every_command_of_the_readme_works(tmp_path: Path) -> None:
    for line in (line for block in BLOCKS for line in block):
        assert line.startswith("$ moetwin "), f"a console block holds one command a line, got {line!r}"
        outcome = run(line, tmp_path)
        assert outcome.returncode == 0, f"{line}\n{outcome.stdout}\n{outcome.stderr}"
        assert outcome.stdout.strip(), line


def test_the_readme_shows_commands_and_every_file_it_links_to_exists() -> None:
    assert sum(map(len, BLOCKS)) >= 10
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


def test_every_make_target_of_the_readme_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_figures_of_the_readme_are_those_of_the_committed_results() -> None:
    wide, small = (
        json.loads((ROOT / "analysis" / "results" / name / "fidelity.json").read_text(encoding="utf-8"))
        for name in ("xeon-2core-cpu", "xeon-2core-cpu-small")
    )
    for label, key, shown in (
        ("median absolute error", "median_error", "{:.1%}"),
        ("90th percentile", "p90_error", "{:.1%}"),
        ("signed bias", "bias", "{:.1%}"),
        ("noise", "noise", "{:.1%}"),
        ("skill", "skill", "{:.2f}"),
        ("Kendall", "kendall_tau", "{:.2f}"),
    ):
        (row,) = re.findall(rf"^\| {label}.*\| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
        assert [cell.replace(" %", "%") for cell in row] == [shown.format(one[key]) for one in (wide, small)], label


def test_the_committed_results_hold_the_bars() -> None:
    wide = json.loads((ROOT / "analysis" / "results" / "xeon-2core-cpu" / "fidelity.json").read_text(encoding="utf-8"))
    assert wide["decisions_exact"]
    assert wide["median_error"] <= 0.15
    assert wide["skill"] <= 0.8
    assert wide["repeats"] >= 7

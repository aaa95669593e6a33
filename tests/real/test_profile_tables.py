"""What `moetwin calibrate` prints of copies and of the CPU's threads."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from real import calibrate
from real.profile_tables import shown_bytes, tables
from sim.spec.profile import TO_DEVICE, TO_HOST, CpuThreads, Profile, Transfers
from tests.commanding import run
from tests.sim.profiles import SPEC, point
from tests.sim.test_profile_runs import PROFILE

SIZES = (2**16, SPEC.expert_bytes, 4 * 2**20)


def copies(direction: Any, memory: Any, seconds_a_byte: float, *, beside_gpu: bool) -> Transfers:
    points = tuple(point(size, size * seconds_a_byte) for size in sorted(SIZES))
    return Transfers(direction=direction, memory=memory, beside_gpu=beside_gpu, points=points)


FULL = PROFILE.model_copy(
    update={
        "transfers": (
            copies(TO_DEVICE, "pinned", 1 / 50e9, beside_gpu=False),
            copies(TO_DEVICE, "pinned", 1 / 48e9, beside_gpu=True),
            copies(TO_HOST, "pageable", 1 / 6e9, beside_gpu=False),
        ),
        "cpu_by_threads": (
            CpuThreads(threads=1, points=(point(1, 8e-3), point(16, 16e-3))),
            CpuThreads(threads=2, points=(point(1, 4e-3), point(16, 9e-3))),
        ),
        "cpu_threads": 2,
    }
)


def shown(profile: Profile) -> list[list[str]]:
    """The cells of all rows that are printed, 80 columns wide."""
    console = Console(width=80, record=True, file=StringIO())
    for table in tables(profile):
        console.print(table)
    lines = [line for line in console.export_text().splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line.replace("┃", "│").strip("│").split("│")] for line in lines]


def test_copies_are_rows_by_size_and_threads_rows_of_their_own() -> None:
    assert shown(FULL) == [
        ["", "to the device", "to the host"],
        ["bytes", "pinned", "pageable"],
        ["6 KiB, an expert", "50 / 48", "6"],
        ["64 KiB", "50 / 48", "6"],
        ["4 MiB", "50 / 48", "6"],
        ["threads", "1 token", "16 tokens"],
        ["1", "8", "16"],
        ["2, as calibrated", "4", "9"],
    ]


def test_a_profile_without_them_shows_nothing() -> None:
    assert not [*tables(PROFILE)]


@pytest.mark.parametrize(("size", "text"), [(2**16, "64 KiB"), (12 * 2**20, "12 MiB"), (12_600_001, "12.6 MB")])
def test_bytes_are_whole_where_they_can_be(size: int, text: str) -> None:
    assert shown_bytes(size) == text


def test_calibrate_prints_them_and_writes_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "calibrate", lambda machine, **given: FULL)
    out = tmp_path / "here.toml"
    result = run("calibrate", "--device", "cpu", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "6 KiB, an expert" in result.stdout
    assert result.stdout.splitlines()[-1] == f"profile: {out} ({FULL.digest[:12]})"
    assert Profile.load(out) == FULL

"""The folders of compiled code: what is kept, what goes, and that nobody's folder goes while it is used."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sim.compiled.folder import KEPT, LOCK, YOUNG_S, hold, remove_old

OLD_S = 2 * YOUNG_S


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Six folders with something in them, the last one used longest ago, all of them long ago."""
    made = [tmp_path / f"compiled-{number}" for number in range(6)]
    for age, folder in enumerate(made):
        folder.mkdir()
        (folder / "code.nbc").touch()
        (folder / LOCK).touch()
        aged(folder, OLD_S + age)
    return made


def aged(folder: Path, age_s: float) -> None:
    used_s = time.time() - age_s
    os.utime(folder / LOCK, (used_s, used_s))


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_the_last_used_are_kept_and_the_others_go(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "something else").mkdir()
    aged(folders[5], 0.0)
    remove_old(folders[5])
    assert left(folders[0]) == ["compiled-0", "compiled-1", "compiled-5", "something else"]
    assert KEPT == 3


def test_ones_own_folder_stays_whatever_its_age(folders: list[Path]) -> None:
    remove_old(folders[5])
    assert left(folders[0]) == ["compiled-0", "compiled-1", "compiled-2", "compiled-5"]


def test_what_was_used_within_a_day_is_kept(folders: list[Path]) -> None:
    for folder in folders[:5]:
        aged(folder, YOUNG_S / 2)
    remove_old(folders[0])
    assert left(folders[0]) == [f"compiled-{number}" for number in range(5)]


def test_a_folder_without_a_lock_goes_by_its_own_time(folders: list[Path]) -> None:
    for folder, used_s in ((folders[4], 0.0), (folders[3], time.time() - YOUNG_S / 2)):
        (folder / LOCK).unlink()
        os.utime(folder, (used_s, used_s))
    remove_old(folders[0])
    assert left(folders[0]) == ["compiled-0", "compiled-1", "compiled-3"]


def test_a_folder_that_another_process_holds_is_kept(folders: list[Path]) -> None:
    program = "import sys; from pathlib import Path; from sim.compiled.folder import hold; hold(Path(sys.argv[1]))\n"
    program += "print('held', flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", program, str(folders[5])]
    root = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        aged(folders[5], OLD_S + 9)
        remove_old(folders[0])
        assert left(folders[0]) == ["compiled-0", "compiled-1", "compiled-2", "compiled-5"]
        process.communicate("")
    remove_old(folders[0])
    assert left(folders[0]) == ["compiled-0", "compiled-1", "compiled-2"]


def test_holding_makes_the_folder_and_marks_its_use(folders: list[Path], tmp_path: Path) -> None:
    hold(tmp_path / "new" / "compiled-9")
    assert (tmp_path / "new" / "compiled-9" / LOCK).exists()
    before_s = time.time() - 10
    hold(folders[5])
    assert (folders[5] / LOCK).stat().st_mtime > before_s


def test_a_folder_that_was_removed_while_the_lock_was_sought_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    folder, lock, tries = tmp_path / "compiled-1", fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        lock(descriptor, how)
        if not tries:
            (folder / LOCK).unlink()
            folder.rmdir()
        tries.append(how)

    monkeypatch.setattr(fcntl, "flock", late)
    hold(folder)
    assert (folder / LOCK).exists()
    assert len(tries) == 2


def test_what_cannot_be_removed_stops_nobody(tmp_path: Path) -> None:
    remove_old(tmp_path / "nowhere" / "compiled-1")
    (tmp_path / "afile").touch()
    with pytest.raises(OSError, match="afile"):
        hold(tmp_path / "afile" / "compiled-1")

"""Files that are whole: complete under their name, or not there, and what was there before stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from traces.errors import InputError
from traces.paths import whole_file


def test_a_file_appears_under_its_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "some.csv"
    with whole_file(path) as draft:
        draft.write_text("whole")
        assert draft.suffix != ".csv"  # nobody who looks for such files takes it for one
        assert draft.parent == path.parent  # to be renamed within a file system
        assert not path.exists()
    assert path.read_text() == "whole"
    assert [*path.parent.iterdir()] == [path]


def half_written(path: Path, fault: type[BaseException]) -> None:
    with whole_file(path) as draft:
        draft.write_text("half")
        raise fault


@pytest.mark.parametrize("fault", [KeyboardInterrupt, ZeroDivisionError])
def test_what_was_there_stays_when_the_block_does_not_end_well(tmp_path: Path, fault: type[BaseException]) -> None:
    path = tmp_path / "some.csv"
    path.write_text("before")
    with pytest.raises(fault):
        half_written(path, fault)
    assert path.read_text() == "before"
    assert [*tmp_path.iterdir()] == [path]


def test_a_place_that_cannot_be_written_is_told_with_its_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match=r"archive must be a file that can be written, got .*/file/x: "),
        whole_file(tmp_path / "file" / "x", "archive"),
    ):
        pytest.fail("the block must not begin")

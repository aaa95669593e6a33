"""The page on the engine: every mechanism that it lists has a way to switch it off, and tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sim.spec import ModelSpec
from sim.spec.overrides import hardware_settings

ROOT = Path(__file__).parents[2]
ROWS = re.findall(
    r"^\| (?!mechanism|---)(.*) \| (.*) \| (.*) \| (.*) \|$",
    (ROOT / "docs" / "engine.md").read_text(encoding="utf-8"),
    flags=re.MULTILINE,
)


@pytest.mark.parametrize(("off", "tests"), [row[2:] for row in ROWS], ids=[row[0][:40] for row in ROWS])
def test_a_mechanism_can_be_switched_off_and_is_tested(off: str, tests: str) -> None:
    assert re.search(r"`.+`|leave|take", off)
    for name in re.findall(r"`H ([\w.]+)=", off):
        assert name.replace(".", "_", 1) in hardware_settings()
    assert set(re.findall(r"`M (\w+)=", off)) <= set(ModelSpec.model_fields)
    assert "test" in tests or tests == "the same"


def test_the_tests_that_the_page_names_are_there() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for *_, tests in ROWS for name in re.findall(r"`(test_\w+)`", tests)}
    assert len(ROWS) > 20
    assert {name for name in named if f"def {name}(" not in code} == set()


def test_batches_and_chunks_of_prompts_are_on_the_page() -> None:
    fields = " ".join(row[1] for row in ROWS)
    assert {"`--batch`", "`--prefill-chunk`", "`context_costs`"} <= set(re.findall(r"`[\w-]+`", fields))

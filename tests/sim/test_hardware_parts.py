"""A part of a machine on the command line."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from sim.cli import hardware_app
from sim.spec import catalogue
from traces.errors import InputError


def test_a_part_is_shown_with_its_source() -> None:
    (gpu,) = json.loads(CliRunner().invoke(hardware_app, ["show", "a6000", "--json"]).output).items()
    assert gpu == ("gpu", catalogue.hardware("a6000-xeon5220r").gpu.model_dump())
    shown = CliRunner().invoke(hardware_app, ["show", "pcie4-x16"], env={"COLUMNS": "200"}).output
    assert "link.gb_per_s=25.2" in shown
    assert "second-hand figures" in shown
    refused = CliRunner().invoke(hardware_app, ["show", "a6000", "--set", "gpu.memory_gb=3"])
    assert str(refused.exception) == (
        "set must be left out for a part, which is changed in a machine, got gpu.memory_gb=3"
    )


def test_parts_are_offered_where_a_part_would_do() -> None:
    with pytest.raises(InputError, match=r"hardware must be a known name, got 'a600' \(.*\ba6000\b[^-]"):
        CliRunner().invoke(hardware_app, ["show", "a600"], catch_exceptions=False)
    with pytest.raises(InputError, match=r"got 'a600' \((?!.*\ba6000\b[^-])"):
        catalogue.find_hardware("a600")
    with pytest.raises(InputError, match="several GPUs and unified memory"):
        CliRunner().invoke(hardware_app, ["show", "4xa6000"], catch_exceptions=False)

"""What policies that weigh costs are told of the machine that a real run is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from real.jobs import Limits, predicted_costs
from sim.spec import catalogue
from sim.systems import SystemSpec
from traces.errors import InputError


def test_without_a_profile_it_is_the_reference_machine_and_the_result_says_so() -> None:
    costs = predicted_costs(catalogue.model("olmoe-1b-7b"))
    assert catalogue.REFERENCE_MACHINE in costs.name
    limits = Limits(1, "25%", None, None)
    (doubt,) = limits.doubts(SystemSpec(place="hybrimoe"))
    assert doubt.startswith(f"policies weighed the costs of {catalogue.REFERENCE_MACHINE}, not of this machine")
    assert limits.doubts(SystemSpec()) == []
    assert Limits(1, "25%", None, None, profile=Path("p.toml")).doubts(SystemSpec(place="hybrimoe")) == []


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile must be readable, got"):
        predicted_costs(catalogue.model("olmoe-1b-7b"), tmp_path / "none.toml")

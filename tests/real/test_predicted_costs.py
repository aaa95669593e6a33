"""What policies that weigh costs are told of the machine that a real run is on."""

from __future__ import annotations

from pathlib import Path

import pytest

from real.calibrate import describe_machine
from real.jobs import Limits, predicted_costs
from sim.spec import catalogue
from sim.systems import SystemSpec
from tests.sim.test_profile_runs import PROFILE
from traces.errors import InputError


def test_without_a_profile_it_is_the_reference_machine_and_the_result_says_so() -> None:
    costs = predicted_costs(catalogue.model("olmoe-1b-7b"))
    assert catalogue.REFERENCE_MACHINE in costs.name
    limits = Limits(1, "25%", None, None)
    (doubt,) = limits.doubts(SystemSpec(place="hybrimoe"), costs)
    assert doubt.startswith(f"policies weighed the costs of {catalogue.REFERENCE_MACHINE}, not of this machine")
    assert limits.doubts(SystemSpec(), costs) == []


def saved(folder: Path, **fields: object) -> Path:
    profile = PROFILE.model_copy(update=fields)
    path = folder / "p.toml"
    profile.save(path, force=True)
    return path


def test_a_profile_of_this_machine_raises_no_doubt_and_names_itself(tmp_path: Path) -> None:
    limits = Limits(1, "25%", None, None, profile=saved(tmp_path, machine=describe_machine()))
    costs = limits.costs(PROFILE.model)
    assert costs.name.startswith("profile here ")
    assert limits.doubts(SystemSpec(place="hybrimoe"), costs) == []


def test_a_profile_of_another_processor_is_told(tmp_path: Path) -> None:
    machine = {**describe_machine(), "processor": "an abacus", "gpu": "a stone"}
    limits = Limits(1, "25%", None, None, profile=saved(tmp_path, machine=machine))
    (told,) = limits.doubts(SystemSpec(), limits.costs(PROFILE.model))  # the GPU is not used
    assert told == f"the profile was measured with the processor an abacus, not this machine's {here()}"


def here() -> str:
    return describe_machine()["processor"]


@pytest.mark.parametrize(("of", "on"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_profile_of_another_device_is_refused(tmp_path: Path, of: str, on: str) -> None:
    limits = Limits(1, "25%", None, None, profile=saved(tmp_path, device=of), device=on)
    with pytest.raises(InputError, match=f"profile must be measured on the device of the run, {on}, got one of {of}"):
        limits.costs(PROFILE.model)


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="profile must be readable, got"):
        predicted_costs(catalogue.model("olmoe-1b-7b"), tmp_path / "none.toml")

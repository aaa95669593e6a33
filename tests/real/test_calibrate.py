"""Calibration of a device with a tiny model: a profile that is complete, stored whole, and usable for predictions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from real.bench import EXPERT_TOKENS
from real.calibrate import calibrate, describe_machine
from real.decode import Machine, replay
from real.fit import RESOURCES
from sim.profile import ProfileCosts
from sim.run import simulate
from sim.spec.profile import Point, Profile
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import DEVICES, machine_on, untouched
from traces.errors import InputError
from traces.synthetic import Sizes, zipf
from traces.workload import one_at_a_time

REPEATS = 2


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


@pytest.fixture(scope="module")
def profile(machine: Machine) -> Profile:
    return calibrate(machine, name="here", repeats=REPEATS)


def series(profile: Profile) -> dict[str, tuple[Point, ...]]:
    names = ("copies", "gpu_expert", "cpu_expert_first", "cpu_expert_later", "head")
    return {name: getattr(profile, name) for name in names}


def test_every_time_is_positive_and_none_falls_with_the_size(profile: Profile) -> None:
    for name, points in series(profile).items():
        sizes, seconds = [point.size for point in points], [point.value_s for point in points]
        assert sizes == sorted(set(sizes)), name
        assert seconds == sorted(seconds), name
        assert all(point.value_s > 0 for point in points), name
        assert all(0 < point.median_s <= point.p90_s for point in points), name
        assert all(point.repeats >= REPEATS for point in points), name
    assert all(point.base_s + point.per_context_s * point.most_context > 0 for point in profile.dense)
    assert profile.token_s > 0
    assert profile.lookahead_s > 0


def test_it_covers_experts_by_tokens_copies_of_one_expert_and_every_pair_of_resources(profile: Profile) -> None:
    assert [point.size for point in profile.gpu_expert] == list(EXPERT_TOKENS)
    assert [point.size for point in profile.cpu_expert_first] == list(EXPERT_TOKENS)
    assert [point.size for point in profile.copies] == [profile.model.expert_bytes]
    assert {(one.resource, len(one.others)) for one in profile.slowdowns} == {
        (resource, others) for resource in RESOURCES for others in (1, 2)
    }
    assert len(profile.slowdowns) == 9
    assert [point.tokens for point in profile.dense] == [1, 4, 32, 48, 96]
    assert [point.size for point in profile.head] == [1, 4]


def test_it_says_what_was_measured(profile: Profile, machine: Machine) -> None:
    assert profile.name == "here"
    assert profile.device == machine.device.name
    assert profile.model == machine.loaded.spec
    assert profile.host.joins_layers == machine.device.joins_layers
    assert profile.machine == describe_machine()
    assert profile.machine["cores"] == str(os.cpu_count()), "not the one core that this thread is pinned to"


def test_it_is_stored_and_read_back_without_loss(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "new" / "here.toml"
    profile.save(path)
    again = Profile.load(path)
    assert again == profile
    assert again.digest == profile.digest
    assert [file.name for file in path.parent.iterdir()] == ["here.toml"]


def test_it_predicts_a_run_that_it_has_not_seen(profile: Profile, machine: Machine) -> None:
    spec = machine.loaded.spec
    sizes = Sizes(
        sequences=1, prompt_tokens=6, new_tokens=12, layers=spec.moe_layers, experts=spec.experts, top_k=spec.top_k,
        expert_bytes=spec.expert_bytes, lookahead=1,
    )  # fmt: skip
    workload = one_at_a_time(zipf(np.random.default_rng(99), sizes))
    costs = ProfileCosts(profile, spec)
    for system in (SystemSpec(), SystemSpec(place="cpu-on-miss"), SystemSpec(prefetch="next-router")):
        measured = replay(machine, workload, system, Budget(slots=3), costs)
        simulated = simulate(workload, system, Budget(slots=3), costs, hardware="here")
        assert simulated.info.costs == f"profile here {profile.digest[:12]}"
        assert simulated.tokens.end_s.is_monotonic_increasing
        if system.prefetch == "none":
            pd.testing.assert_frame_equal(simulated.operations, measured.operations)


def test_a_model_of_other_dimensions_is_refused(profile: Profile) -> None:
    with pytest.raises(InputError, match="profile must be measured with"):
        ProfileCosts(profile, tiny.SPECS["mixtral"].model_copy(update={"hidden": 64}))
    ProfileCosts(profile, profile.model.model_copy(update={"layers": 41, "moe_layers": 40}))


def test_the_machine_is_as_before(profile: Profile, machine: Machine) -> None:
    assert untouched(machine)


def test_an_interrupted_calibration_leaves_the_device_idle(machine: Machine) -> None:
    def interrupt(text: str) -> None:
        told.append(text)
        if text.startswith("whole layers"):
            raise KeyboardInterrupt

    told: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        calibrate(machine, name="here", repeats=REPEATS, progress=interrupt)
    assert [text.split()[0] for text in told] == ["single", "whole"]
    assert untouched(machine)
    work = machine.device.gpu(lambda: None, ())
    machine.device.wait([work])

"""Calibration of a device with a tiny model: a profile that is complete, stored whole, and usable for predictions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from real import bandwidth, bench
from real.bench import EXPERT_TOKENS
from real.calibrate import calibrate, describe_machine
from real.checks import most_cpu_threads
from real.decode import Machine, replay
from real.fit import RESOURCES
from sim.profile import ProfileCosts
from sim.run import simulate
from sim.spec.profile import TO_DEVICE, TO_HOST, Point, Profile
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


@pytest.fixture(scope="module", autouse=True)
def _small_copies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bandwidth, "MOST_BYTES", 2**18)
        yield


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
    for one in profile.transfers:
        assert profile.model.expert_bytes in [point.size for point in one.points]
    assert profile.transfer_points(TO_DEVICE)
    assert profile.transfer_points(TO_HOST)
    assert {1, most_cpu_threads(profile.device)} <= {one.threads for one in profile.cpu_by_threads}


def test_it_says_what_was_measured(profile: Profile, machine: Machine) -> None:
    assert profile.name == "here"
    assert profile.device == machine.device.name
    assert profile.model == machine.loaded.spec
    assert profile.host.joins_layers == machine.device.joins_layers
    assert profile.cpu_threads == machine.device.cpu_threads
    assert profile.experts_pinned == (machine.device.name == "cuda")
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
    assert [text.split()[0] for text in told] == ["single", "copies", "whole"]
    assert untouched(machine)
    work = machine.device.gpu(lambda: None, ())
    machine.device.wait([work])


def test_pieces_for_full_work_are_made_before_any_is_submitted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece that is made between two others would wait for the GPU, which then never has two."""
    order: list[str] = []

    def noted(what: str, call: Any) -> Any:
        def note(*given: Any, **named: Any) -> Any:
            order.append(what)
            return call(*given, **named)

        return note

    one = bench.Bench(machine, 1)
    one._pieces = dict.fromkeys(RESOURCES, 3)
    monkeypatch.setattr(bench, "kernel_for", noted("made", bench.kernel_for))
    for name in ("gpu", "cpu", "copy"):
        monkeypatch.setattr(machine.device, name, noted("submitted", getattr(machine.device, name)))
    assert {*one._busy(RESOURCES)} == {*RESOURCES}
    assert order == ["made"] * 6 + ["submitted"] * 9

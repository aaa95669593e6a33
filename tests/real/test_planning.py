"""What policies cost the host to decide, and what lanes cost each other: laws that hold on any machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from real.bench import MOST_SLOWDOWN, Bench
from real.decode import Machine
from real.device import Work, open_device
from real.models.load import load_spec
from real.planning import Decided, _beyond, planning
from sim.presets import preset
from sim.profile import decided_by
from sim.spec.profile import TOGETHER
from sim.systems import KINDS, SystemSpec
from tests.real import tiny

SPEC = tiny.SPECS["olmoe"].model_copy(update={"layers": 5, "moe_layers": 5})


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with open_device("cpu") as device:
        yield Machine.prepare(load_spec(SPEC, model_type="olmoe", seed=3), device)


def test_every_policy_that_synthetic_routing_can_run_is_timed(machine: Machine) -> None:
    found = planning(machine, slots=3)
    timed = {(one.kind, one.policy): one.layer_s for one in found}
    assert {("evict", "lru"), ("evict", "mrs"), ("place", "hybrimoe"), ("prefetch", "next-router")} <= timed.keys()
    assert all(policy in KINDS[kind] for kind, policy in timed if kind != TOGETHER)
    assert ("evict", "static") not in timed, "it is fitted to a trace, which synthetic routing has none of"
    assert all(0 <= seconds < 1 for seconds in timed.values())
    assert all(0 <= one.expert_s < 1 for one in found)


def test_published_systems_are_timed_as_a_whole_each_combination_once(machine: Machine) -> None:
    found = [one.policy for one in planning(machine, slots=3) if one.kind == TOGETHER]
    assert len(found) == len({*found})
    assert decided_by(SystemSpec()) not in found
    for name in ("hybrimoe", "moe-infinity", "adapmoe", "mixtral-offloading"):
        assert decided_by(preset(name).system) in found


def test_deciding_is_held_against_the_plainest_and_grows_with_the_experts() -> None:
    """Operations take 1, the plainest 2. The other takes 3 more, and in prompts 0.5 for each expert above the two of a
    token but in the last layer; one prompt of three was held up."""

    def decided(more_s: float, an_expert_s: float) -> list[Decided]:
        decode = [Decided(2 + count + more_s, count, 2, 0, True) for count in (2, 4, 6)]
        more = (4 * an_expert_s, 0.0)  # by layer
        prompts = [
            Decided(2 + 8 + more_s + more[layer] + held_s, 8, 6, layer, False)
            for held_s in (0.0, 0.0, 50.0 if more_s else 0.0)
            for layer in range(2)
        ]
        return [*decode, *prompts]

    plain = decided(0.0, 0.0)
    assert _beyond(plain, decided(3.0, 0.5), top_k=2) == pytest.approx((3.0, 0.25))
    assert _beyond(plain, plain, top_k=2) == (0.0, 0.0)
    assert _beyond(plain, decided(-1.0, -9.0), top_k=2) == (0.0, 0.0)
    assert _beyond(plain[:3], decided(3.0, 0.5)[:3], top_k=2) == pytest.approx((3.0, 0.0))


def test_a_lane_is_never_quicker_beside_others_and_every_set_is_told(machine: Machine) -> None:
    found = Bench(machine, 2).slowdowns()
    assert {(one.resource, frozenset(one.others)) for one in found} == {
        (one, frozenset(others))
        for one, *others in (
            ("gpu", "link"), ("gpu", "cpu"), ("link", "gpu"), ("link", "cpu"), ("cpu", "gpu"), ("cpu", "link"),
            ("gpu", "link", "cpu"), ("link", "gpu", "cpu"), ("cpu", "gpu", "link"),
        )
    }  # fmt: skip
    assert all(1.0 <= one.factor <= MOST_SLOWDOWN for one in found)


def test_lanes_that_take_turns_are_both_slowed_down(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a second each, by a clock of the test's own, two by two and one after the other: each loses half."""
    bench, lock, pair, now = Bench(machine, 1), threading.Lock(), threading.Barrier(2), [0.0]
    monkeypatch.setattr(type(machine.device), "now_s", lambda device: now[0])

    def piece(wait: bool) -> None:
        if wait:
            pair.wait()
        with lock:
            now[0] += 1.0

    def made(name: str, wait: bool) -> Callable[[], Work]:
        run = partial(piece, wait)
        return partial(machine.device.gpu, run, ()) if name == "gpu" else partial(machine.device.cpu, run)

    bench.__dict__["_pieces"] = {"gpu": 40, "cpu": 40}
    monkeypatch.setattr(bench, "_piece", partial(made, wait=False))
    assert bench._busy(["gpu"]) == {"gpu": pytest.approx(1.0)}
    monkeypatch.setattr(bench, "_piece", partial(made, wait=True))
    together = bench._busy(["gpu", "cpu"])
    assert together == {"gpu": pytest.approx(2.0, rel=0.1), "cpu": pytest.approx(2.0, rel=0.1)}

"""What policies cost the host to decide, and what lanes cost each other: laws that hold on any machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest

from real.bench import MOST_SLOWDOWN, Bench
from real.calibrate import _workload
from real.decode import Machine
from real.device import Work, open_device
from real.models.load import load_spec
from real.planning import planning
from sim.systems import KINDS
from tests.real import tiny

SPEC = tiny.SPECS["olmoe"].model_copy(update={"layers": 5, "moe_layers": 5})


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with open_device("cpu") as device:
        yield Machine.prepare(load_spec(SPEC, model_type="olmoe", seed=3), device)


def test_every_policy_that_synthetic_routing_can_run_is_timed(machine: Machine) -> None:
    found = planning(machine, _workload(machine, 4, 1, seed=0), slots=3)
    timed = {(one.kind, one.policy): one.layer_s for one in found}
    assert {("evict", "lru"), ("evict", "mrs"), ("place", "hybrimoe"), ("prefetch", "next-router")} <= timed.keys()
    assert all(policy in KINDS[kind] for kind, policy in timed)
    assert ("evict", "static") not in timed, "it is fitted to a trace, which synthetic routing has none of"
    assert all(0 <= seconds < 1 for seconds in timed.values())


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

    def submitted(name: str, wait: bool) -> Work:
        run = partial(piece, wait)
        return machine.device.gpu(run, ()) if name == "gpu" else machine.device.cpu(run)

    bench.__dict__["_pieces"] = {"gpu": 40, "cpu": 40}
    monkeypatch.setattr(bench, "_submitted", partial(submitted, wait=False))
    assert bench._busy(["gpu"]) == {"gpu": pytest.approx(1.0)}
    monkeypatch.setattr(bench, "_submitted", partial(submitted, wait=True))
    together = bench._busy(["gpu", "cpu"])
    assert together == {"gpu": pytest.approx(2.0, rel=0.1), "cpu": pytest.approx(2.0, rel=0.1)}

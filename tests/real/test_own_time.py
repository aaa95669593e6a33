"""The stopwatch of our own time: waits for the device, and what is left out, do not count."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from real import executor, kernels, own_time
from real.decode import Machine, replay
from real.kernels import kernel_for
from real.own_time import OwnTime, RouterApart
from sim.controller import OffloadController
from sim.plan import Operation
from sim.systems import Budget, SystemSpec
from tests.real.running import COSTS, machine_on
from tests.real.test_prefetch import workload
from traces.workload import Routing


class Clock:
    """A host's clock, and a device that is waited for on it."""

    def __init__(self) -> None:
        self.now_s = self.waited_s = 0.0

    def work(self, seconds: float) -> None:
        self.now_s += seconds

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.waited_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(own_time, "perf_counter", lambda: clock.now_s)
    return clock


def test_stretches_add_up_without_the_waits_in_them(clock: Clock) -> None:
    own: Any = OwnTime(clock)  # type: ignore[arg-type]
    for seconds in (1.0, 2.0):
        own.begin()
        clock.work(seconds)
        clock.wait(100.0)
        clock.work(seconds)
        own.end()
        clock.work(1000.0)
        clock.wait(1000.0)
    assert own.take() == 6.0
    assert own.take() == 0.0


def test_a_router_is_left_out_and_is_what_it_was(clock: Clock) -> None:
    def forward(hidden: int) -> int:
        clock.work(50.0)
        return hidden + 1

    own = OwnTime(clock)  # type: ignore[arg-type]
    router = RouterApart(SimpleNamespace(forward=forward, stack="encoder"), own)  # type: ignore[arg-type]
    own.begin()
    clock.work(1.0)
    assert router.forward(7) == 8  # type: ignore[arg-type]
    own.end()
    assert own.take() == 1.0
    assert router.stack == "encoder"
    assert RouterApart(SimpleNamespace(), own).stack is None  # type: ignore[arg-type]


def replayed(machine: Machine, **system: Any) -> pd.DataFrame:
    """Layers of a replay with a look-ahead and few slots."""
    return replay(machine, workload(1), SystemSpec(prefetch="next-router", **system), Budget(slots=3), COSTS).layers


def test_the_hook_at_the_router_counts_and_the_models_own_routers_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pause_s = 2e-3

    def late(call: Any) -> Any:
        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(pause_s)
            return call(*given, **named)

        return slow

    with machine_on("cpu") as machine:
        with monkeypatch.context() as patch:
            patch.setattr(executor, "lookahead", late(executor.lookahead))
            assert (replayed(machine).python_s >= pause_s).all()
        for layer in machine.loaded.layers[1:]:
            monkeypatch.setattr(layer.router, "forward", late(layer.router.forward))
        layers = replayed(machine)
    # a later router sleeps in the layer before it, and in its own
    assert (layers.python_s <= layers.end_s - layers.start_s - pause_s + 1e-9).all()


def test_decisions_while_the_device_is_waited_for_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ask, pause_s, asked = OffloadController.next_transfer, 1e-3, []

    def slow(controller: OffloadController) -> Any:
        time.sleep(pause_s)
        asked.append(1)
        return ask(controller)

    monkeypatch.setattr(OffloadController, "next_transfer", slow)
    with machine_on("cpu") as machine:
        layers = replayed(machine)
    assert layers.python_s.sum() >= len(asked) * pause_s > 0


class OnGpu:
    """A tensor that says that it is on a GPU."""

    is_cuda = True

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self.shape = tensor, tensor.shape

    def __len__(self) -> int:
        return len(self._tensor)

    def to(self, where: str, *, non_blocking: bool) -> torch.Tensor:
        return self._tensor


def test_reading_the_choice_leaves_the_wait_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def tick(seconds: float) -> float:
        clock[0] += seconds
        return clock[0]

    monkeypatch.setattr(kernels, "perf_counter", lambda: tick(1.0))
    ids, weights = OnGpu(torch.tensor([[4, 1]])), OnGpu(torch.tensor([[0.5, 0.25]]))
    kernel = kernel_for(nothing, torch.ones(1, 2), ids, weights, wait=lambda: tick(1000.0))  # type: ignore[arg-type]
    assert kernel.routing == Routing((1, 4), (1, 1), 2)
    assert 0 < kernel.read_s < 10


def nothing(operation: Operation, rows: torch.Tensor) -> torch.Tensor:
    return rows

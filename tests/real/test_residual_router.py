"""The residual router on the real clock: whose means correct it, and what a trace of it says; deferral is refused."""

from __future__ import annotations

import numpy as np
import pytest

from real.decode import Machine, decode, replay
from real.record import Collector
from real.routing import RouterTap
from sim.replay.calibration import TraceCalibration
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, PROMPTS, machine_on
from traces.errors import InputError
from traces.router_means import packed
from traces.schema import Trace
from traces.workload import lock_step

SYSTEM = SystemSpec(prefetch="residual-router")
MEANS = packed(np.random.default_rng(5).normal(size=(2, 32)) * 3)


@pytest.fixture(scope="module")
def calibration() -> TraceCalibration:
    loaded = tiny.model()
    collector = Collector(loaded, lookahead_depth=1, router_means=MEANS)
    with RouterTap(loaded.layers, collector):
        tiny.greedy(loaded, [[7, 8, 9]], 2, hooks=collector)
    return TraceCalibration.of(collector.finish(), None)


def expected(means: str) -> Trace:
    """What a plain model records of the prompts, with look-ahead by ``means``."""
    loaded = tiny.model()
    collector = Collector(loaded, router_means=means)
    with RouterTap(loaded.layers, collector):
        for prompt in PROMPTS:
            tiny.greedy(loaded, [prompt], 3, hooks=collector)
    return collector.finish()


@pytest.mark.parametrize("device", DEVICES)
def test_decoding_looks_ahead_by_the_means_of_the_calibration_trace(device: str, calibration: TraceCalibration) -> None:
    with machine_on(device) as machine:
        run, trace, _ = decode(
            machine, PROMPTS, SYSTEM, Budget(slots=3), COSTS, calibration=calibration, max_new_tokens=3
        )
        again = replay(machine, lock_step(trace, 1), SYSTEM, Budget(slots=3), COSTS)
    wanted = expected(MEANS)
    assert (trace.header.lookahead_router, trace.header.router_means) == ("residual", MEANS)
    assert np.array_equal(trace.lookahead, wanted.lookahead)
    assert not np.array_equal(trace.lookahead, expected("").lookahead)
    assert run.info.prefetched_bytes > 0
    assert again.info.prefetched_bytes > 0


def test_what_it_cannot_have_is_refused(calibration: TraceCalibration) -> None:
    with machine_on(DEVICES[0]) as machine:
        _check_refusals(machine, calibration)


def _check_refusals(machine: Machine, calibration: TraceCalibration) -> None:
    with pytest.raises(InputError, match="recorded with --lookahead-router residual for residual-router, got none"):
        decode(machine, PROMPTS, SYSTEM, Budget(slots=3), COSTS, max_new_tokens=1)
    plain = lock_step(expected(""), 1)
    with pytest.raises(InputError, match="trace must have look-ahead by the residual router"):
        replay(machine, plain, SYSTEM, Budget(slots=3), COSTS)
    deferring = SystemSpec(evict="static-uniform", place="static", options={"place": {"defer": 1}})
    with pytest.raises(InputError, match=r"^place\.defer must be 0 in a measured run, which changes no output, got 1$"):
        replay(machine, plain, deferring, Budget(slots=3), COSTS)

"""Constants of the registered policies: what they may be, and that nothing else is replayed with."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from analysis.cache_options import choose
from sim.policies import EVICTION, PolicyContext
from sim.replay import Capacity, Feed, Replay, Settings, replay
from sim.replay.calibration import TraceCalibration
from traces.errors import InputError
from traces.synthetic import Sizes, generate

SIZES = Sizes(sequences=2, prompt_tokens=3, new_tokens=12, layers=2, experts=8, top_k=2, expert_bytes=10, scores=True)

ZERO_IS_SENSIBLE = {
    *(("s3fifo", name) for name in ("small", "ghost")),  # no room for that queue
    *(("blend", name) for name in ("freshness", "regularity", "height")),  # that term does not count
    *(("hobbit", name) for name in ("recency", "frequency", "high_precision", "layer")),
    ("mrs", "p"),  # stands for twice top_k
}

CONSTANTS = [(policy, name) for policy, kind in EVICTION.items() for name in kind.defaults]
EVERY_CONSTANT = pytest.mark.parametrize(("policy", "name"), CONSTANTS)


@cache
def feed() -> Feed:
    return Feed.of(generate("zipf", 0, SIZES))


def run(policy: str, *given: str) -> Replay:
    """What the command line does with ``--policies`` and ``--option``."""
    calibration = TraceCalibration.of(generate("zipf", 1, SIZES), feed().trace, 1)
    (choice,), _ = choose(feed(), policy, (), given, calibration=calibration, strict=True)
    settings = Settings(policy, Capacity.slots("3", feed().trace.header, "layer"), options=choice.options)
    return replay(feed(), settings, calibration=calibration, by_object=True, log=True)


@EVERY_CONSTANT
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "-inf"])
def test_a_constant_without_sense_is_refused_in_one_line(policy: str, name: str, value: str) -> None:
    if value == "0" and (policy, name) in ZERO_IS_SENSIBLE:
        found = run(policy, f"{name}=0")
        hits = found.row("all")["hit_ratio_assignments"]
        assert 0 < hits < 1
        assert len(found.log)
        return
    with pytest.raises(InputError, match=rf"^({policy}: )?{name} must .*, got \'?{value}(\.0)?\'?$"):
        run(policy, f"{name}={value}")


@pytest.mark.parametrize(
    ("policy", "name", "value"),
    [
        ("s3fifo", "small", "1.01"),
        ("s3fifo", "small", "2"),
        ("s3fifo", "promotion", "4"),
        ("s3fifo", "promotion", "99"),
        ("ewma-reuse", "beta", "1.01"),
        ("blend", "beta", "1.01"),
        ("mrs", "alpha", "1.01"),
    ],
)
def test_what_is_above_the_range_is_refused(policy: str, name: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"^{policy}: {name} must .*, got {value}(\.0)?$"):
        run(policy, f"{name}={value}")


@pytest.mark.parametrize(
    ("policy", "given"),
    [
        ("lfu-decay", "window=1"),
        ("s3fifo", "small=1"),
        ("s3fifo", "ghost=4"),
        ("s3fifo", "promotion=1"),
        ("s3fifo", "promotion=3"),
        ("ewma-reuse", "beta=1"),
        ("mrs", "alpha=1"),
    ],
)
def test_the_ends_of_a_range_are_taken(policy: str, given: str) -> None:
    assert 0 < run(policy, given).row("all")["hit_ratio_assignments"] < 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("policy", "name"), [one for one in CONSTANTS if isinstance(EVICTION[one[0]].defaults[one[1]], float)]
)
def test_a_policy_itself_refuses_what_is_not_finite(policy: str, name: str, value: Any) -> None:
    context = PolicyContext(2, 8, 2, capacity=3, weights=(1, 1), options={name: value})
    with pytest.raises(ValueError, match=rf"^{name} must .*, got {value}$"):
        EVICTION[policy](context)

"""Constants of the registered policies: what they may be, and that nothing else is replayed with."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from analysis.cache_options import choose
from sim.policies import EVICTION, PLACEMENT, PREFETCH, PolicyContext
from sim.policies.base import Policy
from sim.replay import Capacity, Feed, Settings
from sim.replay.calibration import TraceCalibration
from sim.replay.result import Replay
from sim.replay.run import replay
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
        ("window-score", "window", "1000000000"),  # memory grows with these
        ("window-score", "swaps", str(2**62)),
        ("belady-imitator", "hidden", "99999999999"),
        ("belady-imitator", "samples", "8193"),
        ("belady-imitator", "passes", "65537"),
        ("belady-imitator", "horizon", str(2**62)),
        ("belady-imitator", "updates", "1000001"),
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


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("mrs", {"alpa": 0.5}, r"mrs: option must be a known name, got 'alpa' \(did you mean alpha\?\)$"),
        ("lru", {"alpha": 0.5}, r"lru: option must be a known name, got 'alpha' \(one of none\)$"),
        ("mrs", {"alpha": "a half"}, "mrs: alpha must be a number, got 'a half'$"),
        ("mrs", {"p": 2.0}, "mrs: p must be a whole number, got 2.0$"),
        ("mrs", {"p": True}, "mrs: p must be a whole number, got True$"),
        ("mrs", {"batch": 1}, "mrs: batch must be text, got 1$"),
        ("mrs", {"batch": "median"}, "mrs: batch must be one of mean, first, max, got 'median'$"),
    ],
)
@pytest.mark.parametrize("by_object", [False, True])
def test_options_of_a_replay_are_checked(policy: str, options: dict[str, Any], message: str, by_object: bool) -> None:
    capacity = Capacity.slots("3", feed().trace.header, "layer")
    with pytest.raises(InputError, match=f"^{message}"):
        replay(feed(), Settings(policy, capacity, options=options), by_object=by_object)


def test_a_whole_number_stands_for_a_number() -> None:
    capacity = Capacity.slots("3", feed().trace.header, "layer")
    one, same = (replay(feed(), Settings("mrs", capacity, options={"alpha": value})) for value in (1, 1.0))
    assert (one.table == same.table).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    ("policy", "name"), [one for one in CONSTANTS if isinstance(EVICTION[one[0]].defaults[one[1]], float)]
)
def test_a_policy_itself_refuses_what_is_not_finite(policy: str, name: str, value: Any) -> None:
    context = PolicyContext(2, 8, 2, capacity=3, weights=(1, 1), options={name: value})
    with pytest.raises(ValueError, match=rf"^{name} must .*, got {value}$"):
        EVICTION[policy](context)


@pytest.mark.parametrize("kind", [*EVICTION.values(), *PREFETCH.values(), *PLACEMENT.values()])
def test_a_policy_itself_refuses_constants_that_it_does_not_have_and_other_kinds(kind: type[Policy]) -> None:
    def made(options: dict[str, Any]) -> Policy:
        return kind(PolicyContext(2, 8, 2, capacity=3, weights=(1, 1), options=options))

    with pytest.raises(ValueError, match=r"^option must be a known name, got 'nothing_like_it' \(one of "):
        made({"nothing_like_it": 1})
    for name, default in kind.defaults.items():
        with pytest.raises(ValueError, match=rf"^{name} must be .*, got \[1\]$"):
            made({name: [1]})
        with pytest.raises(ValueError, match=rf"^option must be a known name, got '{name}x' \(did you mean {name}"):
            made({f"{name}x": default})


def test_a_library_of_prefetching_has_a_limit() -> None:
    with pytest.raises(ValueError, match=r"^library must be from 1 to 16384, got 1000000000$"):
        PREFETCH["eam"](PolicyContext(2, 8, 2, options={"library": 10**9}))

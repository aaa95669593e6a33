"""MoE-Infinity's formulas as its released code has them, beside those of its paper."""

from __future__ import annotations

import pytest

from sim.options import system_of
from sim.policies import EVICTION, PREFETCH, EvictionPolicy, PolicyContext, PrefetchPolicy
from sim.policies.base import PrefetchView

TINY = 1e-6


def evicting(layers: int, **options: bool) -> EvictionPolicy:
    """Of two experts a layer, with each block used once and layer 1 running last."""
    policy = EVICTION["eam"](PolicyContext(layers, 2, 1, options=options))
    for layer in (*range(2, layers), 0, 1):
        policy.observe(layer, [2 * layer, 2 * layer + 1], [1, 1])
    return policy


def test_what_has_run_is_nearest_in_the_released_code_and_then_what_is_far() -> None:
    """Of four layers, 1 runs: 1 and 1 for 0 and 1, then 2/5 and 3/5; two experts each make 6."""
    used = (1 / 8 + TINY) * (1 / 8 + TINY)  # 1 of 8 visits; half a row, of four rows
    keys = [near / 6 + TINY for near in (1, 1, 2 / 5, 3 / 5) for _ in range(2)]
    assert [*evicting(4, as_released=True).keys(range(8))] == pytest.approx([used * key for key in keys], rel=1e-12)


def test_what_runs_next_is_nearest_otherwise() -> None:
    """The same: 1/4 for layer 0, which comes round last, then 1, 3/4, 1/2; two experts each make 5."""
    used = (1 / 8 + TINY) * (1 / 8 + TINY)
    keys = [near / 5 + TINY for near in (1 / 4, 1, 3 / 4, 1 / 2) for _ in range(2)]
    for policy in (evicting(4), evicting(4, as_released=False)):
        assert [*policy.keys(range(8))] == pytest.approx([used * key for key in keys], rel=1e-12)


def test_the_last_layer_has_all_others_behind_it() -> None:
    policy = EVICTION["eam"](PolicyContext(3, 1, 1, options={"as_released": True}))
    for event in range(3):
        policy.observe(event, [event], [1])
    assert [*policy.keys(range(3))] == pytest.approx([(1 / 3 + TINY) ** 3] * 3, rel=1e-12)


def prefetching(**options: bool) -> PrefetchPolicy:
    """Three layers of two experts; the first request of the past used expert 0 all over, the second expert 1."""
    policy = PREFETCH["eam"](PolicyContext(3, 2, 1, options={"most": 1, **options}))
    for expert in (0, 1):
        policy.begin_sequence()
        for layer in range(3):
            policy.observe(layer, [2 * layer + expert], [1])
    policy.begin_sequence()
    return policy


def wanted(policy: PrefetchPolicy, event: int, expert: int) -> int:
    """The expert that it wants first in the next layer, once ``event`` has used ``expert``."""
    layer = event % 3
    policy.observe(event, [2 * layer + expert], [1])
    (first,) = policy.candidates(PrefetchView(event, layer, (), lambda block: False, lambda hits, misses: 0.0, 1.0))
    assert first // 2 == layer + 1
    return first % 2


def test_in_a_first_pass_the_released_code_cannot_tell_one_request_from_another() -> None:
    """No row after the present one is there yet: all tie, and the first of the library is taken."""
    assert [wanted(prefetching(as_released=True), 0, expert) for expert in (0, 1)] == [0, 0]
    assert [wanted(prefetching(), 0, expert) for expert in (0, 1)] == [0, 1]


def test_later_the_released_code_goes_by_the_rows_still_to_come() -> None:
    """The first pass took expert 0, 0 and 1. In the second one, after layer 0, the rows to come name either once, which
    is a tie; after layer 1 they are the last layer's alone, which says 1, where all three together say 0."""
    for released, predicted in ((True, 1), (False, 0)):
        policy = prefetching(as_released=released)
        for event, expert in enumerate((0, 0, 1)):
            policy.observe(event, [2 * event + expert], [1])
        assert wanted(policy, 3, 0) == 0
        assert wanted(policy, 4, 0) == predicted


def test_the_shipped_system_can_be_told_to_use_them() -> None:
    shipped = system_of("moe-infinity-code").system
    assert (shipped.evict, shipped.prefetch) == ("lfu", "none"), "as its configuration has it"
    constants = ["evict.as_released=true", "prefetch.as_released=true"]
    asked = system_of("moe-infinity-code", evict="eam", prefetch="eam", option=constants).system
    assert asked.options == {"evict": {"as_released": True}, "prefetch": {"as_released": True}}

"""Placements: schedules worked out by hand, and the papers' own cases."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from sim.policies import LayerView
from sim.policies.base import Assignment
from sim.policies.place.hybrimoe import assignment_of
from sim.policies.place.split import makespan_s, split
from tests.sim.layers import hybrimoe, optimal, policy, view


def on_cpu(name: str, layer: LayerView, **options: Any) -> list[int]:
    return [*policy(name, **options).place(layer).cpu]


# HybriMoE's paper.

A, B, C, D, E = range(5)
FIGURE_5 = view({E: 1, D: 4}, {A: 1, B: 1, C: 3}, copy=3, gpu_free_s=2)


def test_figure_5_of_the_paper() -> None:
    """Shared experts keep the GPU until 2. D, the copy of C, and E all end at 3, in this order."""
    moves = hybrimoe().moves(FIGURE_5)
    assert moves == [
        ("cpu", A, 1),
        ("cpu", B, 2),
        ("gpu", D, 3),
        ("link", C, 3),
        ("cpu", E, 3),
        ("gpu", C, 4),
    ]
    assert hybrimoe().place(FIGURE_5) == Assignment([A, B, E], [D, C], [C])
    assert makespan_s(FIGURE_5, assignment_of(moves)) == 4
    assert makespan_s(FIGURE_5, optimal().place(FIGURE_5)) == 4


def test_equal_ends_go_to_gpu_then_cpu_then_link() -> None:
    assert [move.timeline for move in hybrimoe().moves(view({0: 1}, {1: 1, 2: 2, 3: 2}))] == [
        "gpu",  # 0, at 1, as would the CPU end 1 and the link 2
        "cpu",
        "link",
        "gpu",
        "cpu",
    ]


def test_equal_loads_go_by_the_lowest_id() -> None:
    moves = hybrimoe().moves(view({7: 2, 3: 2}, {8: 2, 5: 2, 6: 2, 9: 2}, gpu=1, cpu=1, copy=1.5))
    assert [move.expert for move in moves if move.timeline == "link"] == [5, 8]
    assert [move.expert for move in moves if move.timeline == "gpu"] == [3, 5, 7, 8]
    assert [move.expert for move in moves if move.timeline == "cpu"] == [6, 9]


def test_a_transfer_that_would_end_the_layer_later_is_not_begun() -> None:
    """The copy would end at 3, before the CPU at 4; but the GPU would then need until 5."""
    assert hybrimoe().moves(view({}, {0: 2}, gpu=2, cpu=2, copy=3)) == [("cpu", 0, 4)]
    assert hybrimoe().moves(view({}, {0: 2}, gpu=0.5, cpu=2, copy=3)) == [("link", 0, 3), ("gpu", 0, 3.5)]


def test_the_guard_of_a_transfer_counts_what_the_first_cpu_expert_costs_more() -> None:
    assert hybrimoe().moves(view({}, {0: 2}, gpu=2, cpu=2, first=1.5, copy=3))[0] == ("link", 0, 3)


def test_the_cpu_takes_a_resident_expert_only_when_that_is_no_later() -> None:
    assert hybrimoe().moves(view({0: 1, 1: 1}, gpu=2, cpu=3)) == [("gpu", 0, 2), ("cpu", 1, 3)]
    assert hybrimoe().moves(view({0: 1, 1: 1}, gpu=2, cpu=3, first=1)) == [("gpu", 0, 2), ("gpu", 1, 4)]


def test_what_is_in_transfer_is_not_for_the_cpu_until_it_has_come_unless_asked_for() -> None:
    """0 and 1 arrive at 4 and 8."""
    layer = view({}, {}, {0: 1, 1: 1}, copy=4, gpu=6, cpu=3, cpu_free_s=4)
    assert hybrimoe().moves(layer) == [("cpu", 0, 7), ("gpu", 1, 14)]
    early = layer._replace(cpu_free_s=3.5)
    assert hybrimoe().moves(early) == [("gpu", 0, 10), ("gpu", 1, 16)]
    assert hybrimoe(cpu_takes_transfers=True).moves(early) == [("cpu", 0, 6.5), ("cpu", 1, 9.5)]


def test_what_is_in_transfer_keeps_nobody_from_using_the_cpu_alone() -> None:
    layer = view({}, {}, {0: 1, 1: 1}, copy=4, cpu=3)
    assert hybrimoe().place(layer) == Assignment([0, 1], [], [], fallback=True)
    assert hybrimoe().place(layer._replace(arrivals_s=(1, 2))) == Assignment([], [0, 1], [])


def test_a_copy_that_the_cpu_makes_useless_is_not_made() -> None:
    demanded = view({}, {0: 3, 1: 3, 2: 3}, gpu=2, cpu=2, copy=1)
    assert hybrimoe().moves(demanded)[-1] == ("gpu", 2, 7)
    taken = hybrimoe(cpu_takes_transfers=True)
    assert taken.moves(demanded)[-1] == ("cpu", 2, 6)
    assert assignment_of(taken.moves(demanded)) == Assignment([2], [0, 1], [0, 1])  # the third copy is not made


def test_the_gpu_waits_for_the_head_of_its_queue_unless_asked_otherwise() -> None:
    layer = view({1: 2}, {0: 2}, gpu=2, cpu=3, copy=1)
    assert hybrimoe().moves(layer) == [("link", 0, 1), ("gpu", 0, 3), ("gpu", 1, 5)]
    assert hybrimoe(gpu_order="ready-first").moves(layer) == [("link", 0, 1), ("gpu", 1, 2), ("gpu", 0, 4)]


def test_one_device_alone_is_used_where_it_is_quicker_and_is_told() -> None:
    """Waiting for 0 costs a second that the GPU alone, with 1 before 0, does not lose."""
    layer = view({1: 2}, {0: 2}, gpu=2, cpu=3, copy=1)
    assert hybrimoe().place(layer) == Assignment([], [1, 0], [0], fallback=True)
    assert hybrimoe().place(FIGURE_5).fallback is False


def test_an_option_that_is_not_one_is_refused() -> None:
    with pytest.raises(ValueError, match="gpu_order must be head or ready-first, got 'fifo'"):
        hybrimoe(gpu_order="fifo")
    with pytest.raises(ValueError, match="bandwidths must be one of together, apart, unknown, got 'both'"):
        policy("freetoken-split", bandwidths="both")


# HybriMoE's released code.

THEIRS = {"cpu": 1.0, "first": 0.79, "gpu": 0.5, "copy": 0.4179}


@pytest.mark.parametrize(
    ("hits", "cpu", "moved"), [(0, 2, 4), (1, 1, 4), (2, 1, 3), (3, 1, 2), (4, 1, 1), (5, 1, 0), (6, 1, 0)]
)
def test_the_released_rule_on_six_experts_of_one_token(hits: int, cpu: int, moved: int) -> None:
    layer = view(dict.fromkeys(range(hits), 1), dict.fromkeys(range(hits, 6), 1), **THEIRS)
    placed = policy("hybrimoe-code").place(layer)
    assert (len(placed.cpu), len(placed.gpu), len(placed.copies)) == (cpu, 6 - cpu, moved)
    assert set(placed.cpu) == {*range(6 - cpu, 6)}
    assert placed.copies == [expert for expert in placed.gpu if expert >= hits]


def test_the_released_rule_books_a_copy_only_when_the_gpu_takes_it() -> None:
    """The GPU would end 0 at 1.25, the CPU 3 at 1. Had that trial booked the copy, 0 would next end at 2.25, after the
    CPU's second expert at 2, and so on: the GPU would get nothing."""
    layer = view({}, {0: 1, 1: 1, 2: 1, 3: 1}, gpu=0.25, cpu=1, copy=1)
    assert policy("hybrimoe-code").place(layer) == Assignment([3, 2], [0, 1], [0, 1])


def test_the_released_rule_gives_a_tie_to_the_gpu_and_waits_for_what_is_late() -> None:
    assert policy("hybrimoe-code").place(view({0: 1}, {})) == Assignment([], [0], [])
    # the prefetched 0 arrives at 3 and ends at 4: the CPU is sooner with 2 and 1, and not with 0
    assert policy("hybrimoe-code").place(view({1: 1}, {2: 1}, {0: 2}, cpu=1.75, copy=3)) == Assignment([2, 1], [0], [])


# The other rules.


def test_fetch_runs_everything_on_the_gpu() -> None:
    layer = view({0: 1, 4: 2}, {2: 1, 5: 6, 1: 1}, {3: 1})
    assert policy("fetch").place(layer) == Assignment([], [4, 0, 3, 5, 1, 2], [5, 1, 2])


def test_cpu_on_miss_fetches_the_most_loaded_into_free_slots() -> None:
    misses = {5: 7, 0: 3, 3: 3, 1: 1}
    for free, cpu in ((0, [5, 0, 3, 1]), (2, [3, 1]), (9, [])):
        layer = view({9: 1}, misses, free_slots=free)
        copies = [expert for expert in (5, 0, 3, 1) if expert not in cpu]
        assert policy("cpu-on-miss").place(layer) == Assignment(cpu, [9, *copies], copies)


def test_static_moves_nothing() -> None:
    layer = view({9: 1}, {5: 7, 0: 3}, {2: 1}, free_slots=4, cpu=100)
    assert policy("static").place(layer) == Assignment([5, 0], [9, 2], [])


def test_fiddler_weighs_each_missing_expert_alone_and_gives_a_tie_to_the_gpu() -> None:
    layer = view({7: 9}, {0: 5, 1: 4, 2: 3, 3: 1}, gpu=1, cpu=1, first=50, copy=3)
    assert on_cpu("fiddler", layer) == [2, 3]
    assert policy("fiddler").place(layer).copies == [0, 1]


def test_the_released_fiddler_goes_by_its_own_two_constants() -> None:
    misses = {0: 11, 1: 10, 2: 9, 3: 1}
    assert on_cpu("fiddler-code", view({5: 1}, misses, cpu=1e6, copy=1e-6)) == [2, 3]
    assert on_cpu("fiddler-code", view({}, misses), cpu_token_s=0.001) == [0, 1, 2, 3]
    # calibrated: one token costs the CPU 0.5, a fetch with its compute 5
    machine = view({}, misses, cpu=0.5, gpu=1, copy=4)
    assert on_cpu("fiddler-code", machine, calibrated=True) == [2, 3]


def test_dali_gives_each_expert_to_the_side_that_then_ends_sooner() -> None:
    """GPU 1, a copy 3, CPU 2 a token. 0: GPU 1 against CPU 6. 1, missing: 1 + 3 against 4, a tie. 2: CPU 2 against 7.
    3: GPU 5 against CPU 4. 4: GPU 5 against CPU 6."""
    layer = view({0: 3, 3: 1, 4: 1}, {1: 2, 2: 1}, gpu=1, cpu=2, copy=3)
    assert policy("dali-greedy").place(layer) == Assignment([2, 3], [0, 4, 1], [1])


@pytest.mark.parametrize(
    ("count", "cpu", "copy", "how", "fetched"),
    [
        (6, 1.0, 2.0, "together", 2),  # f = 1/3, and 6 f is whole: 2 on the link against 4 on the CPU is even
        (4, 1.0, 2.0, "together", 1),  # 4/3: max(2/3, 1) for one, max(4/3, 2/3) for two
        (5, 1.0, 2.0, "together", 1),  # 5/3: max(2/3, 4/3) for one, max(4/3, 1) for two: a tie, the lower
        (3, 1.0, 1.0, "together", 1),  # 3/2: max(1/2, 1) for one, max(1, 1/2) for two: a tie, the lower
        (6, 1.0, 2.0, "apart", 3),  # f = 1/2
        (3, 2.0, 1.0, "apart", 3),  # f = 1: the link alone
        (6, 1.0, 2.0, "unknown", 1),
        (2, 0.1, 2.0, "apart", 0),  # f = 0.05: max(0, 0.1) for none, 0.95 for one
        (0, 1.0, 2.0, "apart", 0),
    ],
)
def test_freetoken_shares_by_bandwidth(count: int, cpu: float, copy: float, how: str, fetched: int) -> None:
    layer = view({20: 1}, {expert: 1 for expert in range(count)}, cpu=cpu, copy=copy)
    placed = policy("freetoken-split", bandwidths=how).place(layer)
    assert [*placed.copies] == [*range(fetched)]
    assert [*placed.cpu] == [*range(fetched, count)]


def test_the_makespan_follows_clocks_that_are_already_set() -> None:
    layer = view({0: 1}, {1: 2, 2: 1}, {3: 1}, gpu=1, cpu=2, first=0.5, copy=4)
    layer = layer._replace(gpu_free_s=3.0, link_free_s=5.0, cpu_free_s=1.0)
    assert makespan_s(layer, Assignment([2], [0, 3, 1], [1])) == 10  # copied from 5 to 9
    assert makespan_s(layer, Assignment([1, 2], [0], [])) == 7.5  # the CPU: 1 + 4.5 + 2
    assert makespan_s(layer, Assignment([], [3, 0], [])) == 6  # arrives at 4
    assert makespan_s(layer, Assignment([], [], [])) == 3


def test_optimal_prefers_the_fewest_copies_and_then_the_gpu() -> None:
    assert optimal().place(view({}, {0: 1}, gpu=1, cpu=2, copy=1)) == Assignment([0], [], [])
    assert optimal().place(view({0: 1}, {}, gpu=1, cpu=1)) == Assignment([], [0], [])


def test_optimal_lets_the_cpu_begin_with_what_is_slowed_least() -> None:
    """The first expert costs 5 more when it has one token, nothing when it has two."""
    layer = view({}, {0: 1, 1: 2}, copy=100)._replace(
        cpu_expert_s=lambda tokens, first: 1.0 + 5 * (first and tokens == 1)
    )
    assert optimal().place(layer) == Assignment([1, 0], [], [])


def test_optimal_beyond_eight_experts_sends_the_lowest_loads_to_the_cpu() -> None:
    hits, misses = {expert: expert + 1 for expert in range(10)}, {expert: expert + 1 for expert in range(10, 20)}
    layer = view(hits, misses, gpu=6, cpu=2, copy=20)
    placed = optimal().place(layer)
    resident, fetched = ([expert for expert in placed.cpu if (expert < 10) == one] for one in (True, False))
    assert sorted(resident) == [*range(len(resident))]
    assert sorted(fetched) == [*range(10, 10 + len(fetched))]
    every = [
        makespan_s(layer, split(layer, [*range(few), *range(10, 10 + more)]))
        for few, more in product(range(11), repeat=2)
    ]
    assert makespan_s(layer, placed) == min(every)

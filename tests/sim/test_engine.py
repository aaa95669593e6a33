"""The engine against times worked out by hand, and against the laws of its resources.

Unless a test says otherwise, a dense part and an expert take 1 s, a copy 1 s, and the host no time at all.
"""

from __future__ import annotations

from typing import Any

import pytest

from sim.plan import Operation
from tests.sim.hand import HandCosts, Script, copy, cpu, evict, gpu, host, play, prefetch, read, rows_of, run, trace_of

BOTH_WAYS = pytest.mark.parametrize("closed", [True, False], ids=["closed form", "events"])


@BOTH_WAYS
def test_copies_are_served_one_after_the_other(closed: bool) -> None:
    plan = [copy(1, 0), copy(2, 1), copy(3, 2), gpu(4, 0, 1), gpu(5, 1, 2), gpu(6, 2, 3)]
    times = play(Script([plan]), HandCosts(copy=4), closed=closed)
    assert [times["link", "copy", 0, expert] for expert in range(3)] == [(1, 5), (5, 9), (9, 13)]
    assert [times["gpu", "expert", 0, expert] for expert in range(3)] == [(5, 6), (9, 10), (13, 14)]
    assert times["gpu", "head", 1, -1] == (14, 15)


@BOTH_WAYS
def test_copy_and_compute_overlap_perfectly(closed: bool) -> None:
    plan = [*(copy(n, n) for n in range(4)), *(gpu(10 + n, n, n) for n in range(4))]
    times = play(Script([plan]), HandCosts(copy=2, gpu=2), closed=closed)
    assert [times["gpu", "expert", 0, expert] for expert in range(4)] == [(3, 5), (5, 7), (7, 9), (9, 11)]


@BOTH_WAYS
def test_hits_hide_a_copy(closed: bool) -> None:
    plan = [copy(1, 3), gpu(2, 0), gpu(3, 1), gpu(4, 3, 1)]
    times = play(Script([plan]), HandCosts(copy=2), closed=closed)
    assert times["gpu", "expert", 0, 3] == (3, 4)
    assert times["gpu", "head", 1, -1] == (4, 5)


@BOTH_WAYS
def test_the_gpu_keeps_the_order_of_submission(closed: bool) -> None:
    plan = [copy(1, 0), gpu(2, 0, 1), gpu(3, 1)]
    times = play(Script([plan]), HandCosts(copy=5), closed=closed)
    assert times["gpu", "expert", 0, 0] == (6, 7)
    assert times["gpu", "expert", 0, 1] == (7, 8)


@BOTH_WAYS
def test_a_copy_waits_for_the_last_read_of_its_slot_and_holds_back_the_ones_behind_it(closed: bool) -> None:
    plan = [gpu(1, 0), copy(2, 1, 1), copy(3, 2), gpu(4, 1, 2), gpu(5, 2, 3)]
    times = play(Script([plan]), HandCosts(gpu=3, copy=2), closed=closed)
    assert times["gpu", "expert", 0, 0] == (1, 4)
    assert times["link", "copy", 0, 1] == (4, 6)
    assert times["link", "copy", 0, 2] == (6, 8)
    assert times["gpu", "expert", 0, 2] == (9, 12)


@BOTH_WAYS
def test_cpu_experts_run_beside_the_gpu_and_the_next_dense_part_waits_for_them(closed: bool) -> None:
    plan = [cpu(1, 0), cpu(2, 1), gpu(3, 2)]
    times = play(Script([plan, []]), HandCosts(cpu=4, cpu_first=0.5, gpu=2), closed=closed)
    assert times["cpu", "expert", 0, 0] == (1, 5.5)
    assert times["cpu", "expert", 0, 1] == (5.5, 9.5)
    assert times["gpu", "expert", 0, 2] == (1, 3)
    assert times["gpu", "dense", 1, -1] == (9.5, 10.5)


@BOTH_WAYS
def test_an_eviction_takes_no_time(closed: bool) -> None:
    times = play(Script([[evict(1, 2), copy(2, 0), gpu(3, 0, 2)]]), HandCosts(), closed=closed)
    assert times["gpu", "expert", 0, 0] == (2, 3)


@BOTH_WAYS
def test_an_asynchronous_host_dispatches_while_the_gpu_works(closed: bool) -> None:
    costs = HandCosts(gpu=3, host=host(layer_s=2, readback_s=0.5))
    times = play(Script([[gpu(1, 0)], []]), costs, closed=closed)
    assert times["gpu", "dense", 0, -1] == (2, 3)
    assert times["gpu", "expert", 0, 0] == (3.5, 6.5)
    assert times["gpu", "dense", 1, -1] == (6.5, 7.5)  # dispatched from 3.5 to 5.5
    assert times["gpu", "head", 2, -1] == (10, 11)  # dispatched from 8 to 10


@BOTH_WAYS
def test_a_joining_host_dispatches_when_the_layer_has_ended(closed: bool) -> None:
    costs = HandCosts(gpu=3, host=host(layer_s=2, readback_s=0.5, join_s=0.25, joins_layers=True))
    times = play(Script([[gpu(1, 0)], []]), costs, closed=closed)
    assert times["gpu", "expert", 0, 0] == (3.5, 6.5)
    assert times["gpu", "dense", 1, -1] == (8.75, 9.75)
    assert times["gpu", "head", 2, -1] == (12.5, 13.5)


@BOTH_WAYS
def test_the_host_pays_for_deciding_and_for_every_operation(closed: bool) -> None:
    costs = HandCosts(host=host(readback_s=0.5, controller_s=2, operation_s=0.125))
    times = play(Script([[evict(1, 2), copy(2, 0), gpu(3, 0, 2)]]), costs, closed=closed)
    assert times["host", "plan", 0, -1] == (1, 3.875)
    assert times["link", "copy", 0, 0] == (3.875, 4.875)


@BOTH_WAYS
def test_synchronous_mode_does_one_thing_at_a_time(closed: bool) -> None:
    plan = [cpu(1, 3), cpu(2, 2), evict(3, 4), copy(4, 0), gpu(5, 1), gpu(6, 0, 4)]
    costs = HandCosts(copy=4, cpu=2, cpu_first=1)
    times = play(Script([plan], synchronous=True), costs, closed=closed)
    assert times["cpu", "expert", 0, 3] == (1, 4)
    assert times["cpu", "expert", 0, 2] == (4, 6)  # only the first of a layer pays for being first
    assert times["link", "copy", 0, 0] == (6, 10)
    assert times["gpu", "expert", 0, 1] == (10, 11)
    assert times["gpu", "expert", 0, 0] == (11, 12)
    assert times["gpu", "head", 1, -1] == (12, 13)


# Beside the link: write-backs, reads from a disk, layers on the CPU.


@BOTH_WAYS
def test_a_write_back_has_a_direction_of_its_own_and_only_the_copy_into_its_slot_waits(closed: bool) -> None:
    plan = [evict(1, 2, size=100), evict(2, 3, size=100), copy(3, 0), copy(4, 1, 1), gpu(5, 0, 3), gpu(6, 1, 4)]
    times = play(Script([plan, []], write_back=True), HandCosts(copy=2, back=4), closed=closed)
    assert times["link-back", "write-back", 0, 2] == (1, 5)
    assert times["link-back", "write-back", 0, 3] == (5, 9)
    assert times["link", "copy", 0, 0] == (1, 3)
    assert times["link", "copy", 0, 1] == (5, 7)
    assert times["gpu", "expert", 0, 1] == (7, 8)
    assert times["gpu", "dense", 1, -1] == (8, 9)  # nobody waits for the second write-back


@BOTH_WAYS
def test_a_copy_may_wait_for_a_write_back_of_an_earlier_layer(closed: bool) -> None:
    layers = [[evict(1, 2, size=100), gpu(2, 0)], [copy(3, 1, 1, layer=1), gpu(4, 1, 3, layer=1)]]
    times = play(Script(layers, write_back=True), HandCosts(back=9), closed=closed)
    assert times["link-back", "write-back", 0, 2] == (1, 10)
    assert times["gpu", "dense", 1, -1] == (2, 3)
    assert times["link", "copy", 1, 1] == (10, 11)


@BOTH_WAYS
def test_copies_and_cpu_experts_wait_for_the_disk(closed: bool) -> None:
    plan = [read(1, 0), cpu(2, 0, 1), cpu(3, 3), read(4, 1, 2), copy(5, 1, 4), copy(6, 2), gpu(7, 1, 5)]
    times = play(Script([plan]), HandCosts(read=4, cpu=2, cpu_first=0.5), closed=closed)
    assert times["disk", "read", 0, 0] == (1, 5)
    assert times["cpu", "expert", 0, 0] == (5, 7.5)
    assert times["cpu", "expert", 0, 3] == (7.5, 9.5)  # in order, though its weights were there
    assert times["disk", "read", 0, 1] == (7.5, 11.5)  # into the room that the CPU was reading
    assert times["link", "copy", 0, 1] == (11.5, 12.5)
    assert times["link", "copy", 0, 2] == (12.5, 13.5)
    assert times["gpu", "expert", 0, 1] == (12.5, 13.5)


@BOTH_WAYS
def test_a_layer_on_the_cpu_takes_its_dense_part_along_and_the_hidden_state_crosses(closed: bool) -> None:
    layers = [[gpu(1, 0)], [cpu(2, 0, layer=1), cpu(3, 1, layer=1)], [cpu(4, 0, layer=2)], [gpu(5, 0, layer=3)]]
    costs = HandCosts(
        cpu=2, cpu_first=0.5, cpu_dense=3, copy_sizes={7: 0.25}, back=0.125, host=host(layer_s=1, readback_s=0.5)
    )
    times = play(Script(layers, on_cpu=[1, 2], dense_follows=True), costs, closed=closed)
    assert times["gpu", "expert", 0, 0] == (2.5, 3.5)
    assert times["link-back", "hidden", 1, -1] == (3.5, 3.625)  # dispatched from 2.5 to 3.5
    assert times["cpu", "dense", 1, -1] == (3.625, 6.625)
    assert times["cpu", "expert", 1, 0] == (6.625, 8.625)  # nothing is handed over, nor read back
    assert times["cpu", "expert", 1, 1] == (8.625, 10.625)
    assert times["cpu", "dense", 2, -1] == (10.625, 13.625)
    assert times["link", "hidden", 3, -1] == (15.625, 15.875)
    assert times["gpu", "dense", 3, -1] == (15.875, 16.875)
    assert times["gpu", "expert", 3, 0] == (17.375, 18.375)


@BOTH_WAYS
def test_a_last_layer_on_the_cpu_sends_its_result_to_the_head(closed: bool) -> None:
    costs = HandCosts(cpu_dense=3, copy_sizes={7: 0.25})
    times = play(Script([[cpu(1, 0)]], on_cpu=[0], dense_follows=True), costs, closed=closed)
    assert times["cpu", "dense", 0, -1] == (0, 3)  # the first layer begins where it is
    assert times["link", "hidden", 1, -1] == (4, 4.25)
    assert times["gpu", "head", 1, -1] == (4.25, 5.25)


# Prefetch: layer 0 reads expert 0, layer 1 the others; (1, expert) is what is prefetched.


@BOTH_WAYS
def test_a_late_prefetch_is_waited_for_and_no_other_copy_is(closed: bool) -> None:
    script = Script([[gpu(1, 0)], [gpu(2, 1, 90, layer=1)]], {1: [prefetch(90, 1, 1), prefetch(91, 2, 1)]})
    times = play(script, HandCosts(copy=8), closed=closed)
    assert times["link", "prefetch", 1, 1] == (1, 9)
    assert times["gpu", "expert", 1, 1] == (9, 10)
    assert times["gpu", "head", 2, -1] == (10, 11)
    assert script.arrived == [90]


@BOTH_WAYS
def test_a_stale_prefetch_that_has_not_begun_is_taken_back_when_the_next_choice_is_known(closed: bool) -> None:
    wanted = [prefetch(90, 1, 1), prefetch(91, 2, 1)]
    layers = [[gpu(1, 0)], [copy(2, 2, layer=1), gpu(3, 2, 2, layer=1)]]
    script = Script(layers, {1: wanted})
    times = play(script, HandCosts(copy=8), closed=closed)
    assert script.withdrawn == [91]
    assert times["link", "prefetch", 1, 1] == (1, 9)  # it had begun
    assert ("link", "prefetch", 1, 2) not in times
    assert times["link", "copy", 1, 2] == (9, 17)


@BOTH_WAYS
def test_a_prefetch_that_is_not_stale_goes_on_while_the_host_plans_and_before_new_demands(closed: bool) -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 2, 91, layer=1), gpu(4, 3, 2, layer=1)]]
    script = Script(layers, {1: [prefetch(90, 1, 1), prefetch(91, 2, 1)]})
    script.kept = {91}
    times = play(script, HandCosts(copy=2.5, host=host(controller_s=2.0)), closed=closed)
    assert script.withdrawn == []
    assert times["link", "prefetch", 1, 1] == (3, 5.5)
    assert times["host", "plan", 1, -1] == (5, 7)
    assert times["link", "prefetch", 1, 2] == (5.5, 8)
    assert times["link", "copy", 1, 3] == (8, 10.5)
    assert times["gpu", "expert", 1, 2] == (8, 9)


def test_a_read_for_a_prefetch_that_was_taken_back_goes_first_once_it_is_waited_for() -> None:
    """The copy (71) waits for its read when layer 1 wants the same expert, and another that is on the disk too."""

    class ReadsAhead(Script):
        def next_transfer(self) -> tuple[Operation, ...]:
            return (*super().next_transfer(), *super().next_transfer())

    ahead = [read(69, 3, layer=1), read(70, 1, layer=1), prefetch(71, 1, 1, after=(70,))]
    ahead = [one._replace(prefetch=True) for one in ahead]
    demanded = [copy(2, 1, 70, layer=1), read(3, 2, layer=1), copy(4, 2, 3, layer=1)]
    script = ReadsAhead([[gpu(1, 0)], [*demanded, gpu(5, 1, 2, layer=1), gpu(6, 2, 4, layer=1)]], {1: ahead})
    times = play(script, HandCosts(read=4), closed=False)
    assert script.withdrawn == [71]
    assert times["disk", "read", 1, 3] == (1, 5)
    assert times["disk", "read", 1, 1] == (5, 9)
    assert times["disk", "read", 1, 2] == (9, 13)


def test_a_read_for_a_prefetch_that_is_kept_goes_first_too() -> None:
    trace = trace_of([[[0, 1], [2, 3]]], experts=6, lookahead=[[[1, 2], []]])
    costs = HandCosts(read=4, host=host(joins_layers=False))
    result = run(trace, 3, costs, host_slots=2, prefetch="next-router")
    events = result.events[result.events.layer == 1].set_index(["resource", "expert"])
    assert events.end_s["disk", 2] <= events.start_s["disk", 3]
    assert events.end_s["disk", 2] == events.start_s["link", 2]


@BOTH_WAYS
def test_two_demands_behind_a_long_copy_wait_in_order_and_do_not_interrupt_it(closed: bool) -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), copy(3, 4, layer=1), gpu(4, 3, 2, layer=1), gpu(5, 4, 3, layer=1)]]
    costs = HandCosts(copy=2, copy_sizes={1000: 50})
    times = play(Script(layers, {1: [prefetch(90, 1, 1, size=1000)]}), costs, closed=closed)
    assert times["link", "prefetch", 1, 1] == (1, 51)
    assert times["link", "copy", 1, 3] == (51, 53)
    assert times["link", "copy", 1, 4] == (53, 55)
    assert times["gpu", "expert", 1, 3] == (53, 54)
    assert times["gpu", "expert", 1, 4] == (55, 56)


@BOTH_WAYS
def test_prefetches_fill_the_link_while_the_host_waits(closed: bool) -> None:
    wanted = [prefetch(90 + n, n, 1) for n in range(5)]
    times = play(Script([[gpu(1, 0)], [gpu(2, 0, layer=1)]], {1: wanted}), HandCosts(gpu=3, copy=1), closed=closed)
    assert [times["link", "prefetch", 1, n] for n in range(5)] == [(1 + n, 2 + n) for n in range(5)]


@BOTH_WAYS
def test_a_prefetch_waits_for_the_write_back_from_its_slot(closed: bool) -> None:
    wanted = [evict(90, 3, layer=1, size=100), prefetch(91, 1, 1, after=(90,)), prefetch(92, 2, 1)]
    script = Script([[gpu(1, 0)], [gpu(2, 0, layer=1)]], {1: wanted}, write_back=True)
    times = play(script, HandCosts(back=4, copy=2, gpu=8), closed=closed)
    assert times["link-back", "write-back", 1, 3] == (1, 5)
    assert times["link", "prefetch", 1, 1] == (5, 7)
    assert times["link", "prefetch", 1, 2] == (7, 9)


# Chunks: a prefetch of 8 s makes way for a demand where a chunk ends.


def chunked(layers: Any, wanted: Any, **costs: float) -> dict[tuple[str, str, int, int], list[tuple[float, float]]]:
    """All rows of a run in chunks of 2 s."""
    hand = HandCosts(copy=8, copy_sizes={25: 2}, chunk_bytes=25, **costs)
    return rows_of(Script(layers, {1: wanted}), hand)


def test_a_prefetch_makes_way_for_a_demand_at_the_end_of_a_chunk() -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 3, 2, layer=1)]]
    times = chunked(layers, [prefetch(90, 1, 1), prefetch(91, 2, 1)], gpu=2.5)
    assert times["gpu", "dense", 1, -1] == [(3.5, 4.5)]
    assert times["link", "copy", 1, 3] == [(5, 13)]
    assert times["link", "prefetch", 1, 1] == [(1, 5), (13, 17)]


def test_a_demand_at_the_very_end_of_a_chunk_need_not_wait_for_another() -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 3, 2, layer=1)]]
    times = chunked(layers, [prefetch(90, 1, 1)], gpu=3)
    assert times["link", "prefetch", 1, 1] == [(1, 5), (13, 17)]
    assert times["link", "copy", 1, 3] == [(5, 13)]


def test_a_prefetch_that_is_waited_for_does_not_make_way() -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 1, 90, layer=1), gpu(4, 3, 2, layer=1)]]
    times = chunked(layers, [prefetch(90, 1, 1)])
    assert times["link", "prefetch", 1, 1] == [(1, 9)]
    assert times["link", "copy", 1, 3] == [(9, 17)]


def test_the_last_chunk_is_brought_to_its_end() -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 3, 2, layer=1)]]
    times = chunked(layers, [prefetch(90, 1, 1)], gpu=5.5)
    assert times["link", "prefetch", 1, 1] == [(1, 9)]
    assert times["link", "copy", 1, 3] == [(9, 17)]


def test_whole_copies_are_never_interrupted() -> None:
    layers = [[gpu(1, 0)], [copy(2, 3, layer=1), gpu(3, 3, 2, layer=1)]]
    times = play(Script(layers, {1: [prefetch(90, 1, 1)]}), HandCosts(copy=8), closed=False)
    assert times["link", "prefetch", 1, 1] == (1, 9)


# Contention: two busy resources slow each other down by the factors given.


def test_two_resources_slow_each_other_down_while_both_are_busy() -> None:
    slow = {("gpu", "link"): 2.0, ("link", "gpu"): 1.5}
    times = play(Script([[copy(1, 1), gpu(2, 0), gpu(3, 1, 1)]]), HandCosts(gpu=6, copy=3, slow=slow))
    assert times["link", "copy", 0, 1] == pytest.approx((1, 5.5))  # 3 s at 2/3
    assert times["gpu", "expert", 0, 0] == pytest.approx((1, 9.25))  # 4.5 s at 1/2, then 3.75 s alone
    assert times["gpu", "expert", 0, 1] == pytest.approx((9.25, 15.25))


def test_copies_and_cpu_experts_that_share_the_memory_both_slow_down() -> None:
    """Both ask for 1.5 times what the memory gives, until the CPU's expert has ended."""
    slow = {("link", "cpu"): 1.5, ("cpu", "link"): 1.5}
    times = play(Script([[cpu(1, 1), copy(2, 0), gpu(3, 0, 2)]]), HandCosts(cpu=4, copy=6, slow=slow))
    assert times["cpu", "expert", 0, 1] == pytest.approx((1, 7))
    assert times["link", "copy", 0, 0] == pytest.approx((1, 9))  # 4 s of work in 6 s, then 2 s alone
    assert times["gpu", "expert", 0, 0] == pytest.approx((9, 10))


def test_a_rate_changes_whenever_the_other_starts_or_stops() -> None:
    slow = {("gpu", "cpu"): 4.0}
    layers = [[cpu(1, 1), gpu(2, 0)], [gpu(3, 0, layer=1)]]
    times = play(Script(layers), HandCosts(gpu=3, cpu=4, slow=slow))
    assert times["cpu", "expert", 0, 1] == pytest.approx((1, 5))
    assert times["gpu", "expert", 0, 0] == pytest.approx((1, 7))  # 1 s of work in 4 s, then 2 s alone
    assert times["gpu", "dense", 1, -1] == pytest.approx((7, 8))


def test_a_job_can_be_slowed_in_its_middle_only() -> None:
    slow = {("link", "gpu"): 3.0}
    layers = [[gpu(1, 0)], [gpu(2, 1, layer=1)]]
    costs = HandCosts(dense=2, gpu=1, copy=6, slow=slow, host=host(layer_s=4))
    times = play(Script(layers, {1: [prefetch(90, 5, 1)]}), costs)
    # dispatch to 4, dense to 6; expert 6-7 beside the copy; dispatch to 10; dense 10-12 beside it
    assert times["gpu", "dense", 1, -1] == (10, 12)
    assert times["gpu", "expert", 1, 1] == (12, 13)
    work = {(6, 7): 1 / 3, (7, 10): 3, (10, 12): 2 / 3, (12, 13): 1 / 3}
    assert times["link", "prefetch", 1, 5] == pytest.approx((6, 13 + 6 - sum(work.values())))


# Laws on random runs.

"""Roofline costs in closed form: every term by hand, and every mechanism off when its number is zero."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.costs import RooflineCosts
from sim.profile import ProfileCosts
from sim.queues import is_contended
from sim.spec import BITS_PER_WEIGHT, HardwareSpec, ModelSpec, catalogue
from sim.spec.overrides import overridden, overridden_model
from tests.sim.test_profile import profile as profile_by_hand
from traces.errors import InputError

MODEL = ModelSpec(
    name="by hand",
    source="by hand",
    layers=3,
    moe_layers=2,
    experts=4,
    top_k=2,
    hidden=100,
    expert_width=10,
    shared_width=20,
    dense_width=40,
    heads=5,
    kv_heads=5,
    head_dim=20,
    vocab=1000,
)
EXPERT = 3 * 100 * 10
"""Elements of an expert; twice as many bytes in bf16."""
ATTENTION = 4 * 100 * 100


def machine(*, regime: str = "eager", disk: Any = None, **parts: dict[str, Any]) -> HardwareSpec:
    """A machine whose fixed costs are all 0 and whose efficiencies are 1, but for what ``parts`` say."""
    whole = {"memory_efficiency": 1.0, "compute_efficiency": 1.0, "source": "by hand", "name": "part"}
    rates = {**whole, "bytes_per_s": 1e6, "flops_per_s": 1e7, "expert_fixed_s": 0.0}
    still = ("layer_s", "readback_s", "controller_s", "operation_s")
    made: dict[str, dict[str, Any]] = {
        "gpu": {**rates, "memory_bytes": 10**6, "launch_s": 0.0, "graph_launch_s": 0.0},
        "cpu": {**rates, "bytes_per_s": 1e5, "flops_per_s": 1e6},
        "link": {"name": "part", "source": "by hand", "bytes_per_s": 5e4, "latency_s": 0.0},
        "host": {"source": "by hand", **dict.fromkeys(still, 0.0)},
    }
    filled = {kind: {**fields, **parts.get(kind, {})} for kind, fields in made.items()}
    return HardwareSpec.model_validate({"name": "by hand", "regime": regime, "disk": disk, **filled})


def costs(model: ModelSpec = MODEL, **parts: Any) -> RooflineCosts:
    return RooflineCosts(model, machine(**parts))


def test_a_gpu_expert_is_bound_by_memory_for_few_tokens_and_by_arithmetic_for_many() -> None:
    bare = costs()
    assert bare.gpu_expert_s(1) == bare.gpu_expert_s(9) == pytest.approx(2 * EXPERT / 1e6)
    assert bare.gpu_expert_s(11) == pytest.approx(11 * 2 * EXPERT / 1e7)
    assert bare.gpu_expert_s(22) == pytest.approx(2 * bare.gpu_expert_s(11))


def test_a_cpu_expert_is_bound_by_memory_for_few_tokens_and_by_arithmetic_for_many() -> None:
    bare = costs()
    assert bare.cpu_expert_s(9, False) == pytest.approx(2 * EXPERT / 1e5)
    assert bare.cpu_expert_s(11, False) == pytest.approx(11 * 2 * EXPERT / 1e6)


def test_efficiencies_scale_the_nominal_rates() -> None:
    slow = {"memory_efficiency": 0.5, "compute_efficiency": 0.25}
    slowed, bare = costs(gpu=slow, cpu=slow), costs()
    assert slowed.gpu_expert_s(1) == pytest.approx(2 * bare.gpu_expert_s(1))
    assert slowed.gpu_expert_s(100) == pytest.approx(4 * bare.gpu_expert_s(100))
    assert slowed.cpu_expert_s(1, False) == pytest.approx(2 * bare.cpu_expert_s(1, False))
    assert slowed.cpu_expert_s(100, False) == pytest.approx(4 * bare.cpu_expert_s(100, False))


@pytest.mark.parametrize(("regime", "kernel_s"), [("eager", 0.25), ("graph", 0.125)])
def test_the_regime_says_what_a_kernel_costs(regime: str, kernel_s: float) -> None:
    bare = costs()
    launched = costs(regime=regime, gpu={"launch_s": 0.25, "graph_launch_s": 0.125})
    assert launched.gpu_expert_s(1) - bare.gpu_expert_s(1) == pytest.approx(3 * kernel_s)
    assert launched.dense_s(1, 1) - bare.dense_s(1, 1) == pytest.approx(12 * kernel_s)
    assert launched.head_s(1, 1) - bare.head_s(1, 1) == pytest.approx((2 + 12) * kernel_s)
    assert launched.lookahead_s(3) - bare.lookahead_s(3) == pytest.approx(3 * 2 * kernel_s)


def test_how_many_kernels_there_are_is_a_users_to_say() -> None:
    launching = machine(gpu={"launch_s": 0.25})
    fused = RooflineCosts(MODEL, overridden(launching, {"gpu.dense_kernels": 5.0, "gpu.expert_kernels": 1.0}))
    assert fused.gpu_expert_s(1) - costs().gpu_expert_s(1) == pytest.approx(1 * 0.25)
    assert fused.dense_s(1, 1) - costs().dense_s(1, 1) == pytest.approx(5 * 0.25)
    assert fused.head_s(1, 1) - costs().head_s(1, 1) == pytest.approx((2 + 5) * 0.25)
    with pytest.raises(InputError, match=r"^gpu_expert_kernels must be a valid integer.*, got 1\.5$"):
        overridden(launching, {"gpu.expert_kernels": 1.5})


def test_a_captured_layer_is_one_submission_of_the_host() -> None:
    host = {"layer_s": 0.5, "operation_s": 0.125, "readback_s": 0.25}
    eager, graph = costs(host=host), costs(regime="graph", host=host)
    assert (eager.host.layer_s, graph.host.layer_s) == (0.5, 0.125)
    assert graph.host.readback_s == 0.25
    assert costs(regime="graph", host={"layer_s": 0.0, "operation_s": 0.125}).host.layer_s == 0.0


def test_the_name_tells_the_regimes_apart() -> None:
    assert costs().name == "roofline by hand on by hand"
    assert costs(regime="graph").name == "roofline by hand on by hand, graph-captured"


def test_an_expert_of_the_gpu_may_have_a_fixed_cost() -> None:
    assert costs(gpu={"expert_fixed_s": 0.5}).gpu_expert_s(1) - costs().gpu_expert_s(1) == pytest.approx(0.5)
    assert costs(gpu={"expert_fixed_s": 0.5}).dense_s(1, 1) == costs().dense_s(1, 1)


@pytest.mark.parametrize(
    ("fields", "first_s", "later_s"),
    [
        ({}, 0.0, 0.0),
        ({"expert_fixed_s": 0.5}, 0.5, 0.5),
        ({"handoff_s": 0.25}, 0.25, 0.0),
        ({"first_expert_s": 0.125}, 0.125, 0.0),
        ({"expert_fixed_s": 0.5, "handoff_s": 0.25, "first_expert_s": 0.125}, 0.875, 0.5),
    ],
)
def test_fixed_costs_of_the_cpu_are_terms_of_their_own(
    fields: dict[str, float], first_s: float, later_s: float
) -> None:
    bare, fixed = costs(cpu={"handoff_s": 0.0}), costs(cpu={"handoff_s": 0.0, **fields})
    assert fixed.cpu_expert_s(1, True) - bare.cpu_expert_s(1, True) == pytest.approx(first_s)
    assert fixed.cpu_expert_s(1, False) - bare.cpu_expert_s(1, False) == pytest.approx(later_s)


@pytest.mark.parametrize(("quant", "takes_int8"), [("bf16", False), ("int8", True), ("int4", True)])
def test_the_int8_rate_holds_for_experts_of_eight_bits_and_less(quant: str, takes_int8: bool) -> None:
    model = MODEL.with_experts_in(quant)
    rate = 4e6 if takes_int8 else 1e6
    quick = costs(model, cpu={"int8_ops_per_s": 4e6})
    assert quick.cpu_expert_s(1000, False) == pytest.approx(1000 * 2 * EXPERT / rate)
    assert costs(model).cpu_expert_s(1000, False) == pytest.approx(1000 * 2 * EXPERT / 1e6), "0: as in bf16"


def test_a_copy_takes_its_fixed_cost_and_its_bytes() -> None:
    assert costs().copy_s(5000) == pytest.approx(0.1)
    assert costs(link={"latency_s": 0.5}).copy_s(5000) == pytest.approx(0.6)


def test_pageable_memory_slows_the_bytes_and_not_the_fixed_cost() -> None:
    link = {"pinned": False, "pageable_efficiency": 0.25, "latency_s": 0.5}
    assert costs(link=link).copy_s(5000) == pytest.approx(0.5 + 4 * 0.1)
    assert costs(link={**link, "pinned": True}).copy_s(5000) == pytest.approx(0.6)


def test_the_way_back_is_as_fast_unless_it_has_a_rate_of_its_own() -> None:
    assert costs(link={"latency_s": 0.5}).write_back_s(5000) == pytest.approx(0.6)
    assert costs(link={"latency_s": 0.5, "back_bytes_per_s": 2.5e4}).write_back_s(5000) == pytest.approx(0.7)
    slow = {"pinned": False, "pageable_efficiency": 0.25, "back_bytes_per_s": 2.5e4}
    assert costs(link=slow).write_back_s(5000) == pytest.approx(0.8)
    assert costs(link={"back_bytes_per_s": 2.5e4}).copy_s(5000) == pytest.approx(0.1)


@pytest.mark.parametrize(("chunk_bytes", "chunks"), [(0, 1), (5000, 1), (4999, 2), (1000, 5), (1, 5000)])
def test_every_chunk_of_a_copy_pays_the_fixed_cost(chunk_bytes: int, chunks: int) -> None:
    chunked = costs(link={"latency_s": 0.5, "chunk_bytes": chunk_bytes})
    assert chunked.copy_s(5000) == pytest.approx(chunks * 0.5 + 0.1)
    assert chunked.write_back_s(5000) == pytest.approx(chunks * 0.5 + 0.1)


def test_a_disk_reaches_less_in_small_reads() -> None:
    disk = {"name": "d", "source": "by hand", "bytes_per_s": 1e6, "latency_s": 0.5}
    reading = costs(disk=disk)
    assert reading.read_s(10**6) == pytest.approx(1.5)
    assert reading.read_s(1000) / 1000 > 100 * reading.read_s(10**6) / 10**6
    with pytest.raises(InputError, match="hardware must have a disk to read experts from, got by hand"):
        costs().read_s(1)


def test_the_catalogue_disks_read_in_small_pieces_at_a_fraction_of_their_rate() -> None:
    read_s = RooflineCosts(MODEL, catalogue.hardware("rtx4090+xeon6330+pcie4-x16+nvme-pcie4")).read_s
    assert 2**17 / read_s(2**17) < 1.5e9 < 6e9 < 2**23 / read_s(2**23)


@pytest.mark.parametrize(
    ("resource", "others", "factor"),
    [
        ("cpu", {"link"}, 1.5),
        ("link", {"cpu"}, 1.5),
        ("link", {"cpu", "gpu"}, 1.5),
        ("gpu", {"cpu", "link"}, 1.0),
        ("cpu", {"gpu"}, 1.0),
        ("link", set(), 1.0),
    ],
)
def test_copies_and_cpu_experts_share_the_memory(resource: str, others: set[str], factor: float) -> None:
    sharing = costs(cpu={"shared_bytes_per_s": 1e5})
    assert sharing.slowdown(resource, frozenset(others)) == pytest.approx(factor)
    assert is_contended(sharing)


def test_what_is_written_to_memory_counts_too() -> None:
    disk = {"name": "d", "source": "by hand", "bytes_per_s": 1e5}
    sharing = costs(cpu={"shared_bytes_per_s": 1e5}, link={"back_bytes_per_s": 2.5e4}, disk=disk)
    assert sharing.slowdown("link", frozenset({"link-back", "cpu"})) == pytest.approx(1.75)
    assert sharing.slowdown("disk", frozenset({"cpu"})) == pytest.approx(2.0)
    assert sharing.slowdown("link", frozenset({"link-back"})) == 1.0


@pytest.mark.parametrize("shared_bytes_per_s", [0.0, 1.5e5, 1e9])
def test_memory_that_suffices_for_both_slows_nothing(shared_bytes_per_s: float) -> None:
    assert not is_contended(costs(cpu={"shared_bytes_per_s": shared_bytes_per_s}))


def test_new_mechanisms_of_the_link_are_set_on_the_command_line() -> None:
    changed = overridden(machine(), {"link.chunk_bytes": 4194304.0, "link.back_gb_per_s": 6.0})
    assert (changed.link.chunk_bytes, changed.link.back_bytes_per_s) == (4194304, 6e9)
    assert RooflineCosts(MODEL, changed).chunk_bytes == 4194304


@pytest.mark.parametrize("name", catalogue.hardware_names())
def test_no_machine_of_the_catalogue_is_short_of_memory_bandwidth(name: str) -> None:
    assert not is_contended(RooflineCosts(MODEL, catalogue.hardware(name)))


@pytest.mark.parametrize(
    ("cpu", "link", "factor"),
    [
        ("ryzen9950x3d", "pcie5-x16", (54 + 50.9) / 89.6),
        ("i9-13900h", "pcie5-x16", (48 + 50.9) / 83.2),
        ("ryzen9950x3d", "pcie4-x16", 1.0),
        ("epyc9374f", "pcie5-x16", 1.0),
        ("xeon8559c", "pcie5-x16", 1.0),
    ],
)
def test_a_desktop_with_a_fast_link_is_short_of_memory_bandwidth(cpu: str, link: str, factor: float) -> None:
    sharing = RooflineCosts(MODEL, catalogue.hardware(f"rtx4090+{cpu}+{link}"))
    assert sharing.slowdown("cpu", frozenset({"link"})) == pytest.approx(factor)
    assert sharing.slowdown("link", frozenset({"cpu"})) == pytest.approx(factor)
    assert is_contended(sharing) == (factor > 1)


def test_a_layer_outside_its_experts_reads_its_weights_and_its_cache() -> None:
    weights = ATTENTION + 100 * (4 + 3 * 20 + 2)
    cache_bytes = 7 * 2 * 5 * 20 * 2
    assert costs().dense_s(1, 7) == pytest.approx((2 * weights + cache_bytes) / 1e6)
    assert costs().dense_s(1, 8) - costs().dense_s(1, 7) == pytest.approx(2 * 5 * 20 * 2 / 1e6), "the cache grows"


def test_a_prompts_tokens_attend_to_those_before_them_and_to_themselves() -> None:
    weights = ATTENTION + 100 * (4 + 3 * 20 + 2)
    pairs = 1 + 2 + 3 + 4
    bound = costs(gpu={"bytes_per_s": 1e12})  # by arithmetic alone
    assert bound.dense_s(4, 4) == pytest.approx((2 * 4 * weights + 4 * pairs * 5 * 20) / 1e7)
    assert bound.dense_s(4, 10) == pytest.approx((2 * 4 * weights + 4 * (7 + 8 + 9 + 10) * 5 * 20) / 1e7), "a chunk"
    assert bound.dense_s(4, 4, 2) == pytest.approx((2 * 4 * weights + 4 * 2 * (3 + 4) * 5 * 20) / 1e7), "two lanes"
    assert bound.dense_s(4, 4, 4) == pytest.approx((2 * 4 * weights + 4 * 4 * 4 * 5 * 20) / 1e7), "one token each"


def test_queries_and_keys_with_a_rotary_part_of_their_own_are_wider_than_values() -> None:
    weights = ATTENTION + 100 * (4 + 3 * 20 + 2)
    latent = MODEL.model_copy(update={"query_head_dim": 30})
    bound = costs(latent, gpu={"bytes_per_s": 1e12})  # by arithmetic alone
    assert bound.dense_s(4, 4) == pytest.approx((2 * 4 * weights + 2 * 10 * 5 * (30 + 20)) / 1e7)
    assert costs(latent).dense_s(1, 7) == costs().dense_s(1, 7), "one token, bound by memory"


def test_a_context_may_cost_nothing() -> None:
    weights = ATTENTION + 100 * (4 + 3 * 20 + 2)
    free = overridden_model(MODEL, {"context_costs": False})
    assert costs(free).dense_s(1, 7) == costs(free).dense_s(1, 700) == pytest.approx(2 * weights / 1e6)
    assert costs(free, gpu={"bytes_per_s": 1e12}).dense_s(4, 4) == pytest.approx(2 * 4 * weights / 1e7)
    assert costs(free).head_s(1, 7) == costs(free).head_s(1, 700)
    assert costs(free).cpu_dense_s(1, 7) == costs(free).cpu_dense_s(1, 700)
    assert free.kv_bytes_per_token == MODEL.kv_bytes_per_token


def test_every_lane_has_a_cache_of_its_own_to_read() -> None:
    assert costs().dense_s(3, 7, 3) - costs().dense_s(3, 7, 1) == pytest.approx(2 * 7 * 2 * 5 * 20 * 2 / 1e6)


def test_a_dense_part_on_the_cpu_has_the_same_work_and_no_launches() -> None:
    weights = ATTENTION + 100 * (4 + 3 * 20 + 2)
    cache_bytes = 7 * 2 * 5 * 20 * 2
    slow = costs(gpu={"launch_s": 1.0}, cpu={"memory_efficiency": 0.5})
    assert slow.cpu_dense_s(1, 7) == pytest.approx((2 * weights + cache_bytes) / 5e4)
    assert costs(cpu={"bytes_per_s": 1e12}).cpu_dense_s(4, 4) == pytest.approx(
        (2 * 4 * weights + 4 * 10 * 5 * 20) / 1e6
    )
    assert costs().hidden_bytes(3) == 3 * 100 * 2


def test_shared_experts_are_a_part_of_the_dense_work() -> None:
    without = MODEL.model_copy(update={"shared_width": 0})
    assert costs().dense_s(1, 7) - costs(without).dense_s(1, 7) == pytest.approx(2 * 3 * 100 * 20 / 1e6)
    assert costs().gpu_expert_s(1) == costs(without).gpu_expert_s(1)


def test_the_head_holds_the_dense_layers_and_the_vocabulary() -> None:
    layer = ATTENTION + 100 * (3 * 40 + 2)
    cache_bytes = 7 * 2 * 5 * 20 * 2
    assert costs().head_s(1, 7) == pytest.approx((2 * 100 * 1000 + 2 * layer + cache_bytes) / 1e6)
    prompt_s = (2 * 500 * layer + 4 * (500 * 501 // 2) * 5 * 20) / 1e7
    assert costs().head_s(1, 500, 500) == pytest.approx(2 * 100 * 1000 / 1e6 + prompt_s), "one token to the head"


def test_two_matrices_halve_and_more_the_feed_forward_parts_alike() -> None:
    plain = MODEL.model_copy(update={"expert_matrices": 2})
    assert costs(plain).gpu_expert_s(1) == pytest.approx(2 / 3 * costs().gpu_expert_s(1))
    assert costs().dense_s(1, 1) - costs(plain).dense_s(1, 1) == pytest.approx(2 * 100 * 20 / 1e6)
    assert costs().head_s(1, 1) - costs(plain).head_s(1, 1) == pytest.approx(2 * 100 * 40 / 1e6)


def test_the_lookahead_reads_one_router_a_layer() -> None:
    assert costs().lookahead_s(0) == 0.0
    assert costs().lookahead_s(2) == pytest.approx(2 * 100 * 4 * 2 / 1e6)


@pytest.mark.parametrize(
    ("quant", "bits"), [("int4", 4.25), ("q4_k", 4.5), ("mxfp4", 4.25), ("int8", 8.25), ("fp8", 8)]
)
def test_quantised_experts_are_copied_with_their_scales(quant: str, bits: float) -> None:
    model = MODEL.with_experts_in(quant)
    assert BITS_PER_WEIGHT[quant] == bits
    assert costs().copy_s(model.expert_bytes) == pytest.approx(EXPERT * bits / 8 / 5e4, abs=1e-5)
    assert costs(model).gpu_expert_s(1) == pytest.approx(EXPERT * bits / 8 / 1e6, abs=1e-6)


@given(st.sampled_from(catalogue.hardware_names()), st.sampled_from(catalogue.model_names()), st.integers(1, 4096))
def test_more_tokens_never_take_less_time(hardware: str, model: str, tokens: int) -> None:
    roofline = RooflineCosts(catalogue.model(model), catalogue.hardware(hardware))
    for ask in (roofline.gpu_expert_s, lambda n: roofline.cpu_expert_s(n, False), lambda n: roofline.dense_s(n, 64)):
        assert 0 < ask(tokens) <= ask(tokens + 1) <= (tokens + 1) / tokens * ask(tokens)


def test_a_profile_refuses_what_it_has_not_measured() -> None:
    profile = ProfileCosts(profile_by_hand())
    with pytest.raises(InputError, match="dense_follows must be false with a profile"):
        profile.cpu_dense_s(1, 1)
    with pytest.raises(InputError, match="host_slots must be left out with a profile"):
        profile.read_s(1)
    assert profile.write_back_s(1000) == profile.copy_s(1000)


def test_a_roofline_has_nothing_to_note() -> None:
    assert costs().notes == []

"""The executor in the place of a model's experts: the same tokens and logits, whatever is fetched, kept or computed."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from real.cpu_device import CpuDevice
from real.decode import Machine
from real.device import Work, open_device
from real.executor import IMPLEMENTATION, Executor
from real.generate import generate
from real.kernels import ManyTokens, OneToken, kernel_for
from real.models.families import FAMILIES
from real.models.load import load_spec
from real.record import Collector
from real.routing import RouterTap
from real.store import DeviceSlots
from sim.logs import RunLog
from sim.plan import COPY, CPU, GPU, Operation
from tests.real import tiny
from tests.real.running import (
    DEVICES,
    PROMPTS,
    assert_near,
    controller_of,
    decoded,
    follow,
    forced,
    machine_on,
    on,
    plain,
    untouched,
)
from traces.schema import Trace
from traces.workload import Routing, lock_step

NEW_TOKENS = 4
LIVE = [
    {"evict": evict, "place": place, "prefetch": prefetch}
    for evict, place, prefetch in product(("lru", "lfu"), ("fetch", "cpu-on-miss"), ("none", "next-router"))
]
FORCED = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(FAMILIES))
def machine(request: pytest.FixtureRequest, device: str) -> Iterator[Machine]:
    with machine_on(device, request.param) as machine:
        yield machine


@pytest.fixture(scope="module")
def qwen(device: str) -> Iterator[Machine]:
    with machine_on(device) as machine:
        yield machine


def own_routing(model_type: str = "qwen3_moe", lanes: int = 3) -> Trace:
    """What the plain model's routers choose for the forced tokens."""
    loaded = tiny.model(model_type)
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        tiny.logits_of(loaded, PROMPTS[:lanes], FORCED[:lanes], hooks=collector)
    return collector.finish()


@pytest.mark.parametrize("slots", [1, 3, 8])
@pytest.mark.parametrize("lanes", [1, 3])
def test_tokens_and_logits_are_those_of_the_plain_model(machine: Machine, lanes: int, slots: int) -> None:
    wanted_tokens, wanted = plain(machine.device.name, machine.loaded.family.model_type, lanes, NEW_TOKENS)
    for system in LIVE:
        run = decoded(machine, PROMPTS[:lanes], NEW_TOKENS, slots, **system)
        assert run.tokens == wanted_tokens, system
        assert_near(run.logits, wanted)


@pytest.mark.parametrize("place", ["fetch", "cpu-on-miss"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_operation_at_a_time_gives_the_same(qwen: Machine, place: str, scope: str) -> None:
    wanted_tokens, wanted = plain(qwen.device.name, "qwen3_moe", 3, NEW_TOKENS)
    run = decoded(qwen, PROMPTS, NEW_TOKENS, 2, place=place, scope=scope, synchronous=True)
    assert run.tokens == wanted_tokens
    assert_near(run.logits, wanted)


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_no_policy_changes_a_bit(device: str, model_type: str, lanes: int) -> None:
    workload = lock_step(own_routing(model_type, lanes), lanes)
    places = ("fetch", "cpu-on-miss") if device == "cpu" else ("fetch",)  # a GPU rounds otherwise than a CPU
    with machine_on(device, model_type) as machine:
        runs = [
            forced(
                machine, workload, PROMPTS[:lanes], FORCED[:lanes], slots, evict=evict, place=place, prefetch=prefetch
            )
            for evict, place, prefetch, slots in product(
                ("lru", "lfu", "belady"), places, ("none", "next-router"), (1, 3, 8)
            )
        ]
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run.logits, runs[0].logits, strict=True))


def test_more_experts_than_slots_stream_through_staging(qwen: Machine) -> None:
    run = decoded(qwen, PROMPTS, NEW_TOKENS, 1)
    first = run.layers.iloc[0]
    assert first["union"] == first["misses"] > 3
    copies = run.operations[run.operations.op == COPY]
    assert (copies.slot >= qwen.loaded.spec.moe_layers).sum() > 2


@pytest.mark.parametrize("place", ["fetch", "cpu-on-miss"])
def test_a_wrong_weight_changes_the_output(device: str, place: str) -> None:
    prompts = PROMPTS[1:2]
    loaded, collector = tiny.model(), Collector(tiny.model())
    with RouterTap(loaded.layers, collector):
        tiny.greedy(loaded, prompts, 1, hooks=collector)
    used = set(collector.finish().expert_ids[:, 0].ravel().tolist())
    spare = min(set(range(8)) - used)
    with machine_on(device) as machine:
        wanted = decoded(machine, prompts, 1, 3, place=place).logits
        for expert in (spare, min(used)):
            with torch.inference_mode():
                machine.store.expert(0, expert).mul_(1.5)
            changed = decoded(machine, prompts, 1, 3, place=place).logits
            if expert == spare:
                assert torch.equal(changed[0], wanted[0])
        with pytest.raises(AssertionError):
            assert_near(changed, wanted)


def test_padding_and_ended_lanes_are_never_counted(qwen: Machine) -> None:
    run = forced(qwen, lock_step(own_routing(), 3), PROMPTS, FORCED, 8)
    real = [sum(map(len, PROMPTS)), 3, 3, 2, 1]  # the prompts, then the lanes that go on
    top_k, layers = qwen.loaded.spec.top_k, qwen.loaded.spec.moe_layers
    assert run.layers["assignments"].tolist() == [count * top_k for count in real for _ in range(layers)]
    live = decoded(qwen, PROMPTS, 2, 8).layers
    assert live["assignments"].tolist() == [count * top_k for count in (real[0], 3) for _ in range(layers)]


def test_a_model_in_bf16_runs_with_gates_in_fp32(device: str) -> None:
    loaded = load_spec(tiny.SPECS["mixtral"], model_type="mixtral", dtype="bf16", with_experts=True, seed=3)
    loaded.model.to(torch.device(device))
    with open_device(device) as opened:
        wanted = generate(loaded.model, *on(opened, PROMPTS), max_new_tokens=1, keep_logits=True).logits
        run = decoded(Machine.prepare(loaded, opened), PROMPTS, 1, 2, place="cpu-on-miss")
    assert run.logits[0].dtype == torch.bfloat16
    assert_near(run.logits, wanted, tolerance=5e-2)


def test_operations_of_a_run_make_sense(qwen: Machine) -> None:
    for system in LIVE:
        follow(decoded(qwen, PROMPTS, NEW_TOKENS, 3, **system).operations, 6)


def test_the_model_is_as_before_when_the_block_ends(qwen: Machine) -> None:
    with Executor(qwen.loaded, controller_of(qwen.loaded, 2), qwen.device, qwen.store):
        assert qwen.loaded.config._experts_implementation == IMPLEMENTATION
        assert not untouched(qwen)
    assert untouched(qwen)


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
def test_slots_are_freed_with_the_executor(qwen: Machine, prefetch: str) -> None:
    gc.disable()  # a second run must find the memory of the first one free
    try:
        run = decoded(qwen, PROMPTS, NEW_TOKENS, 3, prefetch=prefetch)
        slots = weakref.ref(run.executor.slots)
        del run
        assert slots() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("prefetch", ["none", "next-router"])
def test_a_copy_that_fails_is_reported_as_itself_and_leaves_all_usable(
    qwen: Machine, prefetch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = decoded(qwen, PROMPTS, NEW_TOKENS, 3).tokens
    load, calls = DeviceSlots.load, []

    def failing(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        calls.append(slot)
        if len(calls) == 12:
            raise MemoryError("no more")
        load(slots, slot, layer, expert)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceSlots, "load", failing)
        with pytest.raises(MemoryError, match="no more"):
            decoded(qwen, PROMPTS, NEW_TOKENS, 3, prefetch=prefetch)
    assert untouched(qwen)
    assert decoded(qwen, PROMPTS, NEW_TOKENS, 3, prefetch=prefetch).tokens == wanted


def test_an_interrupted_submission_leaves_no_work_behind(qwen: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    load, note, calls = DeviceSlots.load, RunLog.operation, []

    def interrupted(log: RunLog, step: int, operation: Operation) -> None:
        note(log, step, operation)
        if operation.op == COPY and operation.layer == 1:
            raise KeyboardInterrupt

    def counted(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        calls.append(slot)
        load(slots, slot, layer, expert)

    monkeypatch.setattr(DeviceSlots, "load", counted)
    monkeypatch.setattr(RunLog, "operation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decoded(qwen, PROMPTS, NEW_TOKENS, 3)
    before = len(calls)
    qwen.device.wait([qwen.device.copy(lambda: None, ())])
    assert len(calls) == before
    assert untouched(qwen)


def test_a_prefetch_that_a_layer_waits_for_is_promoted(monkeypatch: pytest.MonkeyPatch) -> None:
    load, promote, promoted = DeviceSlots.load, CpuDevice.promote, []

    def slow(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        time.sleep(2e-2)  # longer than a layer on a busy machine
        load(slots, slot, layer, expert)

    def noted(device: CpuDevice, works: list[Work]) -> None:
        promoted.extend(works)
        promote(device, works)

    monkeypatch.setattr(DeviceSlots, "load", slow)
    monkeypatch.setattr(CpuDevice, "promote", noted)
    with machine_on("cpu") as machine:
        layers = decoded(machine, PROMPTS[:1], NEW_TOKENS, 3, prefetch="next-router").layers
    assert layers.late_hits.sum() == len(promoted) > 0
    assert all(work.resource == "link" for work in promoted)


@pytest.mark.parametrize("synchronous", [True, False])
def test_our_own_time_in_a_layer_leaves_out_what_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, synchronous: bool
) -> None:
    load, pause_s = DeviceSlots.load, 2e-3

    def slow(slots: DeviceSlots, slot: int, layer: int, expert: int) -> None:
        time.sleep(pause_s)
        load(slots, slot, layer, expert)

    monkeypatch.setattr(DeviceSlots, "load", slow)
    with machine_on("cpu") as machine:
        layers = decoded(machine, PROMPTS[:1], NEW_TOKENS, 3, synchronous=synchronous).layers
    assert layers.misses.sum() > 0
    assert (layers.python_s > 0).all()
    # the marks of a layer's ends are the host's: what it does and what it waits for are apart in between
    assert (layers.python_s <= layers.end_s - layers.start_s - layers.misses * pause_s + 1e-9).all()


def linear(operation: Operation, rows: torch.Tensor) -> torch.Tensor:
    """Expert e multiplies by e + 1."""
    return rows * (operation.expert + 1)


def operation(expert: int, op: str = GPU) -> Operation:
    return Operation(expert, op, 0, expert, expert, 1, 0)


def run_kernel(kernel: OneToken | ManyTokens, order: list[int], cpu: frozenset[int] = frozenset()) -> torch.Tensor:
    for expert in order:
        if expert in cpu:
            kernel.on_cpu(operation(expert, CPU))()
        else:
            kernel.run(operation(expert))
    return kernel.result()


def test_the_sum_over_a_tokens_experts_by_hand() -> None:
    hidden = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    ids = torch.tensor([[4, 1], [1, 0], [2, 4]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 0.0], [0.125, 2.0]])
    kernel = kernel_for(linear, hidden, ids, weights, torch.tensor([True, True, False]))
    assert kernel.routing == Routing((1, 4), (2, 1), 3)
    assert run_kernel(kernel, [4, 1]).tolist() == [[3.0, 30.0], [4.0, 40.0], [0.0, 0.0]]
    one = kernel_for(linear, hidden[:1], ids[:1], weights[:1])
    assert isinstance(one, OneToken)
    assert one.routing == Routing((1, 4), (1, 1), 2)
    assert run_kernel(one, [1, 4]).tolist() == [[3.0, 30.0]]


@st.composite
def choices(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """A token's input [1, 4], distinct ids [1, k] and weights [1, k], some 0, and an order of the experts."""
    top_k = draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(0, 9), min_size=top_k, max_size=top_k, unique=True))
    weights = draw(st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.7, 1.3]), min_size=top_k, max_size=top_k))
    hidden = draw(st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4))
    routed = [expert for expert, weight in zip(ids, weights, strict=True) if weight]
    return torch.tensor([hidden]), torch.tensor([ids]), torch.tensor([weights]), draw(st.permutations(routed))


@settings(max_examples=60)
@given(choices(), st.frozensets(st.integers(0, 9)))
def test_one_token_is_the_same_alone_and_in_any_order(
    choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]], cpu: frozenset[int]
) -> None:
    hidden, ids, weights, order = choice
    alone, many = OneToken(linear, hidden, ids, weights), ManyTokens(linear, hidden, ids, weights, None)
    assert alone.routing == many.routing
    result = run_kernel(alone, order, cpu)
    assert torch.equal(run_kernel(OneToken(linear, hidden, ids, weights), sorted(order)), result)
    torch.testing.assert_close(run_kernel(many, order, cpu), result)


def test_a_kernel_with_an_expert_left_out_gives_no_sum() -> None:
    arguments = linear, torch.ones(1, 2), torch.tensor([[3, 5]]), torch.ones(1, 2)
    for kernel in (OneToken(*arguments), ManyTokens(*arguments, None)):
        kernel.run(operation(3))
        with pytest.raises(KeyError):
            kernel.result()


def test_a_layer_that_nobody_is_sent_to_adds_nothing() -> None:
    for rows in (1, 2):
        kernel = kernel_for(linear, torch.ones(rows, 4), torch.zeros(rows, 2, dtype=torch.int64), torch.zeros(rows, 2))
        assert kernel.routing == Routing((), (), 0)
        assert torch.equal(kernel.result(), torch.zeros(rows, 4))

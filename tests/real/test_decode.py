"""Measured runs: their tables, their traces, replay of what was recorded, interruption, and what is refused."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from real.decode import Machine, decode, replay
from real.device import open_device
from real.generate import Sampler
from real.models.load import load_spec
from real.record import Collector, check_positions
from real.routing import RouterTap
from sim.results import COLUMNS, RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, PROMPTS, follow, machine_on, own_model, untouched
from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.synthetic import Sizes, zipf
from traces.workload import Workload, lock_step, one_at_a_time

SYSTEMS: list[dict[str, Any]] = [
    {},
    {"evict": "lfu", "place": "cpu-on-miss"},
    {"prefetch": "next-router"},
    {"scope": "global", "synchronous": True},
]


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with machine_on(request.param) as machine:
        yield machine


def run(machine: Machine, *, batch: int = 1, count: int = 5, **system: Any) -> tuple[RunResult, Trace, list[list[int]]]:
    spec, budget = SystemSpec(**system), Budget(slots=3)
    header = {"domains": ("a", "b", "c"), "licence": "none"}
    return decode(machine, PROMPTS, spec, budget, COSTS, batch=batch, max_new_tokens=count, **header)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_tokens_and_routing_are_those_of_the_plain_model(machine: Machine, batch: int) -> None:
    loaded = tiny.model()
    wanted = [tokens for i in range(0, 3, batch) for tokens in tiny.greedy(loaded, PROMPTS[i : i + batch], 5)]
    _, trace, tokens = run(machine, batch=batch)
    assert tokens == wanted
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        for start in range(0, 3, batch):
            tiny.greedy(loaded, PROMPTS[start : start + batch], 5, hooks=collector)
    plain = collector.finish()
    assert np.array_equal(np.sort(trace.expert_ids), np.sort(plain.expert_ids))
    assert np.array_equal(trace.step, plain.step)
    assert trace.header.domains == ("a", "b", "c")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(map(str, system.values())) or "lru")
def test_measured_tables_are_consistent(machine: Machine, system: dict[str, Any], batch: int) -> None:
    result, trace, tokens = run(machine, batch=batch, **system)
    layers, steps = result.layers, result.tokens.groupby("step")[["start_s", "end_s", "head_s"]].first()
    parts = layers.dense_s + layers.gpu_experts_s + layers.host_s + layers.stall_s
    assert parts.to_numpy() == pytest.approx((layers.end_s - layers.start_s).to_numpy(), abs=1e-9)
    assert (layers[["dense_s", "gpu_experts_s", "cpu_experts_s", "transfer_s", "host_s", "stall_s"]] >= 0).all(
        axis=None
    )
    assert (layers.end_s > layers.start_s).all()
    assert layers.end_s.is_monotonic_increasing
    assert steps.end_s.is_monotonic_increasing
    assert (steps.start_s.iloc[1:].to_numpy() >= steps.end_s.iloc[:-1].to_numpy()).all()
    ends = layers.groupby("step").end_s.last()
    assert (ends + steps.head_s).to_numpy() == pytest.approx(steps.end_s.to_numpy(), abs=1e-9)
    assert layers.groupby("step").start_s.first().to_numpy() == pytest.approx(steps.start_s.to_numpy(), abs=1e-9)
    assert len(layers) == len(steps) * machine.loaded.spec.moe_layers
    assert result.tokens.tokens.sum() == len(trace)
    assert result.requests.prompt_tokens.tolist() == [len(prompt) for prompt in PROMPTS]
    assert result.requests.new_tokens.tolist() == [len(new) - 1 for new in tokens], "the last token is not run"
    assert (result.requests.first_token_s <= result.requests.end_s).all()


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(map(str, system.values())) or "lru")
def test_events_lie_within_the_run_and_do_not_overlap_on_a_resource(machine: Machine, system: dict[str, Any]) -> None:
    result, _, _ = run(machine, **system)
    events, operations = result.events, result.operations
    assert tuple(events.columns) == COLUMNS["events"]
    assert (events.end_s >= events.start_s).all()
    lanes = ["resource", "kind"] if machine.device.name == "cuda" else ["resource"]  # prefetches have their own stream
    for _, mine in events[events.kind.isin(["expert", "copy", "prefetch"])].sort_values("start_s").groupby(lanes):
        assert (mine.start_s.iloc[1:].to_numpy() >= mine.end_s.iloc[:-1].to_numpy() - 1e-6).all()
    if system.get("synchronous"):
        every = events[events.kind != "plan"].sort_values("start_s")
        assert (every.start_s.iloc[1:].to_numpy() >= every.end_s.iloc[:-1].to_numpy() - 1e-6).all()
    for op, resource in (("gpu", "gpu"), ("cpu", "cpu"), ("copy", "link")):
        kinds = ("copy", "prefetch") if op == "copy" else ("expert",)
        worked = events[(events.resource == resource) & events.kind.isin(kinds)]
        assert len(worked) == (operations.op == op).sum()
    experts = events[(events.resource == "gpu") & (events.kind == "expert")].groupby(["step", "layer"])
    spent = (experts.end_s.sum() - experts.start_s.sum()).to_numpy()
    layers = result.layers[result.layers.gpu_experts_s > 0]
    assert spent == pytest.approx(layers.gpu_experts_s.to_numpy(), abs=1e-9)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("system", [one for one in SYSTEMS if "prefetch" not in one], ids=["lru", "lfu", "global"])
def test_a_replay_of_the_recorded_trace_has_the_hits_of_the_live_run(
    machine: Machine, system: dict[str, Any], batch: int
) -> None:
    live, trace, _ = run(machine, batch=batch, **system)
    workload, spec, budget = lock_step(trace, batch), SystemSpec(**system), Budget(slots=3)
    again = replay(machine, workload, spec, budget, COSTS)
    simulated = simulate(workload, spec, budget, COSTS, hardware="by hand")
    pd.testing.assert_frame_equal(again.operations, live.operations)
    pd.testing.assert_frame_equal(simulated.operations, live.operations)
    for other in (again, simulated):
        assert other.layers.hits_union.tolist() == live.layers.hits_union.tolist()
        assert other.requests.sequence.tolist() == live.requests.sequence.tolist()
        assert other.info.trace_digest == live.info.trace_digest == trace.digest
    assert again.info.source == live.info.source == "measured"
    assert "torch" in live.info.software


@pytest.mark.parametrize("batch", [1, 2])
def test_a_chosen_expert_whose_gate_is_nothing_counts_on_both_clocks(machine: Machine, batch: int) -> None:
    _, trace, _ = run(machine)
    trace = Trace.of(trace.header, **{**dict(trace.arrays()), "gates": trace.gates * np.array([1, 0], np.float16)})
    workload, system, budget = lock_step(trace, batch), SystemSpec(), Budget(slots=3)
    measured = replay(machine, workload, system, budget, COSTS)
    simulated = simulate(workload, system, budget, COSTS, hardware="by hand")
    pd.testing.assert_frame_equal(measured.operations, simulated.operations)
    assert measured.layers.hits_union.tolist() == simulated.layers.hits_union.tolist()


@pytest.mark.parametrize("full_trace", [True, False])
def test_only_a_run_whose_policy_was_given_gates_is_told_so(machine: Machine, full_trace: bool) -> None:
    """While prompts are decoded, the policy has the router's own scores whether or not they are recorded."""
    system, budget = SystemSpec(evict="mrs"), Budget(slots=3)
    live, trace, _ = decode(machine, PROMPTS[:1], system, budget, COSTS, max_new_tokens=3, full_trace=full_trace)
    told = "mrs was given the gates of the chosen experts: the trace has no scores"
    assert told not in live.info.notes
    assert (told in replay(machine, lock_step(trace, 1), system, budget, COSTS).info.notes) == (not full_trace)


def test_experts_in_pageable_memory_are_told(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.store, "notes", ["1.0 of 2.0 GB of experts are in pageable memory"])
    assert run(machine)[0].info.notes[-1] == "1.0 of 2.0 GB of experts are in pageable memory"


def test_a_seeded_sampler_gives_the_same_text_again(machine: Machine) -> None:
    def sampled(seed: int) -> list[list[int]]:
        sampler = Sampler(temperature=1.0, seed=seed)
        return decode(machine, PROMPTS, SystemSpec(), Budget(slots=4), COSTS, max_new_tokens=8, sampler=sampler)[2]

    assert sampled(1) == sampled(1) != sampled(2)


def test_text_is_streamed_as_it_is_decoded(machine: Machine) -> None:
    pieces: list[str] = []
    spec, budget = SystemSpec(), Budget(slots=4)
    _, _, tokens = decode(machine, PROMPTS[:1], spec, budget, COSTS, max_new_tokens=6, on_text=pieces.append)
    assert machine.loaded.tokenizer is not None
    assert "".join(pieces) == machine.loaded.tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("batch", [1, 2])
def test_each_batch_is_announced_before_it_is_run(machine: Machine, batch: int) -> None:
    calls: list[int] = []
    given: list[Any] = [SystemSpec(), Budget(slots=4), COSTS]
    told: dict[str, Any] = {"on_prompt": calls.append, "progress": lambda: calls.append(-1)}
    decode(machine, PROMPTS, *given, batch=batch, max_new_tokens=2, **told)
    passes = [-1, -1]  # the prompt, and the first of two new tokens; the last one is not run
    assert calls == [call for first in range(0, len(PROMPTS), batch) for call in (first, *passes)]


def test_slots_that_do_not_fit_the_free_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with machine_on("cpu") as machine:
        size = machine.loaded.spec.expert_bytes
        first = machine.slots(2)
        monkeypatch.setattr("traces.memory.free_bytes", lambda: 3 * size)
        assert len(machine.slots(3)) == 3
        assert first.bytes == 0
        with pytest.raises(
            InputError,
            match=r"cache \(or gpu-memory\) must be lower: its slots must fit the host's free memory \(0\.0 GB\), "
            r"got 4 slots of 0\.0 GB together$",
        ):
            machine.slots(4)
        assert len(machine.slots(2)) == 2


def test_more_tokens_than_the_model_has_positions_are_refused(machine: Machine) -> None:
    most, given = machine.loaded.config.max_position_embeddings, (SystemSpec(), Budget(slots=4), COSTS)
    with pytest.raises(InputError, match=rf"at most the model's {most} positions, got 7 and {most - 6}$"):
        decode(machine, PROMPTS, *given, max_new_tokens=most - 6)
    check_positions(machine.loaded, PROMPTS, most - 7)


def test_progress_is_told_after_every_pass(machine: Machine) -> None:
    calls: list[int] = []
    spec, budget = SystemSpec(), Budget(slots=4)
    _, trace, _ = decode(machine, PROMPTS, spec, budget, COSTS, max_new_tokens=3, progress=lambda: calls.append(1))
    assert len(calls) == int(trace.step[-1]) + 1
    workload = one_at_a_time(trace)
    replay(machine, workload, spec, budget, COSTS, progress=lambda: calls.append(1))
    assert len(calls) == 2 * len(workload)


class Interrupt:
    """Ctrl-C after a number of forward passes."""

    def __init__(self, passes: int) -> None:
        self._left = passes

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("system", SYSTEMS, ids=lambda system: "-".join(map(str, system.values())) or "lru")
@pytest.mark.parametrize("passes", [1, 4])
def test_an_interrupted_run_leaves_all_usable(machine: Machine, system: dict[str, Any], passes: int) -> None:
    wanted = run(machine, **system)
    before = threading.active_count()
    spec, budget, workload = SystemSpec(**system), Budget(slots=3), one_at_a_time(wanted[1])
    with pytest.raises(KeyboardInterrupt):
        decode(machine, PROMPTS, spec, budget, COSTS, max_new_tokens=5, progress=Interrupt(passes))
    assert untouched(machine)
    with pytest.raises(KeyboardInterrupt):
        replay(machine, workload, spec, budget, COSTS, progress=Interrupt(passes))
    assert untouched(machine)
    assert threading.active_count() == before
    _, trace, tokens = run(machine, **system)
    assert tokens == wanted[2]
    assert trace.digest == wanted[1].digest


def test_an_interrupted_run_and_a_closed_device_leave_no_thread() -> None:
    before, cores = set(threading.enumerate()), os.sched_getaffinity(0)
    threads = torch.get_num_threads()
    spec, budget = SystemSpec(prefetch="next-router"), Budget(slots=3)
    with pytest.raises(KeyboardInterrupt), machine_on("cpu") as machine:
        decode(machine, PROMPTS, spec, budget, COSTS, max_new_tokens=5, progress=Interrupt(3))
    assert set(threading.enumerate()) == before
    assert os.sched_getaffinity(0) == cores
    assert torch.get_num_threads() == threads


def sizes(**fields: Any) -> Sizes:
    spec = tiny.SPECS["qwen3_moe"]
    given = {"sequences": 2, "prompt_tokens": 3, "new_tokens": 2, "expert_bytes": spec.expert_bytes}
    return Sizes(**{**given, "layers": 2, "experts": 8, "top_k": 2, **fields})


def synthetic(**fields: Any) -> Trace:
    return zipf(np.random.default_rng(0), sizes(**fields))


def test_a_model_of_random_weights_replays_a_synthetic_trace() -> None:
    loaded = load_spec(tiny.SPECS["qwen2_moe"], seed=1)  # its experts are on no device before they are served
    with open_device("cpu") as device:
        machine = Machine.prepare(loaded, device, seed=1)
        result = replay(machine, one_at_a_time(synthetic()), SystemSpec(evict="belady"), Budget(slots=2), COSTS)
    follow(result.operations, 4)
    assert result.info.synthetic
    assert result.layers.assignments.sum() == 2 * 5 * 2 * 2


def test_token_ids_beyond_the_vocabulary_are_wrapped_round(machine: Machine) -> None:
    trace = synthetic()
    big = Trace.of(trace.header, **{**dict(trace.arrays()), "token_ids": np.full(len(trace), 5 + 7 * tiny.VOCAB)})
    result = replay(machine, one_at_a_time(big), SystemSpec(), Budget(slots=2), COSTS)
    assert result.tokens.tokens.sum() == len(trace)


def test_a_policy_that_knows_the_future_cannot_decode(machine: Machine) -> None:
    with pytest.raises(InputError, match=r"policies must be causal to decode prompts, got belady \(replay a trace"):
        run(machine, evict="belady")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3}, "trace layers must be 2, as in model tiny-qwen3_moe, got 3"),
        ({"experts": 9}, "trace experts must be 8, as in model tiny-qwen3_moe, got 9"),
        ({"top_k": 3}, "trace top_k must be 2, as in model tiny-qwen3_moe, got 3"),
    ],
)
def test_a_trace_of_other_dimensions_is_refused(machine: Machine, fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replay(machine, one_at_a_time(synthetic(**fields)), SystemSpec(), Budget(slots=2), COSTS)
    assert untouched(machine)


def test_a_trace_without_what_is_needed_is_refused(machine: Machine) -> None:
    def refused(trace: Trace, **system: Any) -> str:
        with pytest.raises(InputError) as error:
            replay(machine, one_at_a_time(trace), SystemSpec(**system), Budget(slots=2), COSTS)
        return str(error.value)

    assert "trace must have look-ahead of depth 1" in refused(synthetic(), prefetch="next-router")
    assert "trace must have a prompt for each sequence" in refused(synthetic(prompt_tokens=0))
    trace = synthetic()
    mixed = {**dict(trace.arrays()), "phase": np.where(trace.sequence == 1, Phase.DECODE, trace.phase)}
    assert "sequence 1 must have a prompt to be replayed" in refused(Trace.of(trace.header, **mixed))


def test_no_prompts_an_empty_prompt_and_no_batch_are_refused() -> None:
    with open_device("cpu") as device:
        machine = Machine.prepare(own_model(), device)
        given: list[Any] = [SystemSpec(), Budget(slots=2), COSTS]
        with pytest.raises(InputError, match="recording must have at least one forward pass"):
            decode(machine, [], *given)
        with pytest.raises(InputError, match="prompt must have at least one token, got none in prompt 1"):
            decode(machine, [[1], []], *given, batch=2)
        with pytest.raises(InputError, match="batch must be at least 1, got 0"):
            decode(machine, PROMPTS, *given, batch=0)
        with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
            decode(machine, PROMPTS, *given, max_new_tokens=0)
        assert untouched(machine)


def test_a_replay_of_some_sequences_keeps_their_numbers(machine: Machine) -> None:
    spec = machine.loaded.spec
    sizes = Sizes(
        sequences=3, prompt_tokens=4, new_tokens=2, layers=spec.moe_layers, experts=spec.experts, top_k=spec.top_k,
        expert_bytes=spec.expert_bytes,
    )  # fmt: skip
    every = one_at_a_time(zipf(np.random.default_rng(3), sizes))
    kept = [step for step in every if step.sequences != (1,)]
    some = Workload(every.trace, 1, [replace(step, index=index) for index, step in enumerate(kept)])
    run = replay(machine, some, SystemSpec(), Budget(slots=2), COSTS)
    assert run.requests.sequence.tolist() == [0, 2]
    assert run.tokens.sequence.tolist() == [step.sequences[0] for step in kept]

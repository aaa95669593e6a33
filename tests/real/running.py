"""Tiny models on a device, runs of the executor, and a reader of operation logs, for the tests of real."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch

from real.decode import Machine
from real.device import Device, open_device
from real.executor import Executor
from real.generate import HookChain, Sampler, generate, left_pad
from real.models.load import LoadedModel
from real.routing import Replay
from sim.controller import ExpertShape, OffloadController, Predicted
from sim.plan import COPY, CPU, EVICT, GPU
from sim.results import RunInfo, RunResult
from sim.run import build_controller, predictions_of
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.sim.hand import HandCosts
from traces.workload import Workload

COSTS = HandCosts()
NO_CUDA = "needs a CUDA device, and torch finds none"
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)]),
]
"""Every device that there can be: the suite of the GPU is that of the CPU, run again."""


def own_model(model_type: str = "qwen3_moe") -> LoadedModel:
    """A tiny model that may be changed."""
    shared = tiny.model(model_type)
    return replace(copy.deepcopy(replace(shared, tokenizer=None)), tokenizer=shared.tokenizer)


@contextmanager
def machine_on(device: str, model_type: str = "qwen3_moe") -> Iterator[Machine]:
    """A tiny model, ready to run on a device that is closed at the end."""
    with open_device(device) as opened:
        yield Machine.prepare(own_model(model_type), opened)


@dataclass
class Run:
    """What came out of a run: each lane's tokens, the logits [B, V] of every step, and the executor's tables."""

    tokens: list[list[int]]
    logits: list[torch.Tensor]
    executor: Executor

    @property
    def layers(self) -> pd.DataFrame:
        return self._tables.layers

    @property
    def operations(self) -> pd.DataFrame:
        return self._tables.operations

    @property
    def _tables(self) -> RunResult:
        fields = {"model": "", "hardware": "", "system": {}, "trace_digest": "", "workload": {}}
        counts = {"capacity_slots": 0, "capacity_bytes": 0, "staging_slots": 0}
        return self.executor.log.result(RunInfo.model_validate({"source": "measured", **fields, **counts}))


def controller_of(loaded: LoadedModel, slots: int, **system: Any) -> OffloadController:
    spec = loaded.spec
    shape = ExpertShape(spec.moe_layers, spec.experts, spec.top_k, spec.expert_bytes)
    predicted = Predicted(COSTS.gpu_expert_s, COSTS.cpu_expert_s, 1.0)
    return OffloadController(SystemSpec(**system), shape, Budget(slots=slots), predicted)


def decoded(machine: Machine, prompts: list[list[int]], count: int, slots: int, **system: Any) -> Run:
    """Greedy tokens and logits of prompts, decoded under the executor."""
    controller = controller_of(machine.loaded, slots, **system)
    with Executor(machine.loaded, controller, machine.device, machine.store, grouped=machine.grouped) as executor:
        made = generate(
            machine.loaded.model,
            *on(machine.device, prompts),
            max_new_tokens=count,
            sampler=Sampler(),
            hooks=executor,
            keep_logits=True,
        )
    return Run(made.tokens, made.logits, executor)


def forced(
    machine: Machine, workload: Workload, prompts: list[list[int]], tokens: list[list[int]], slots: int, **system: Any
) -> Run:
    """The logits of given tokens under a workload's routing, which every policy can run; lane i is sequence i."""
    spec = SystemSpec(**system)
    controller = build_controller(workload, spec, Budget(slots=slots), COSTS)
    replay = Replay(workload.trace, machine.loaded, device=machine.device.torch_device)
    guide = Guide(replay, workload, spec.lookahead_depth)
    with Executor(
        machine.loaded,
        controller,
        machine.device,
        machine.store,
        listeners=[replay],
        forecast=lambda layer: guide.predictions[layer],
        grouped=machine.grouped,
    ) as executor:
        made = generate(
            machine.loaded.model,
            *on(machine.device, prompts),
            forced_tokens=tokens,
            hooks=HookChain(guide, executor),
            keep_logits=True,
        )
    return Run(made.tokens, made.logits, executor)


class Guide:
    """Tells a replay which rows of its trace come next, and keeps the predictions of the step."""

    def __init__(self, replay: Replay, workload: Workload, depth: int) -> None:
        self._replay, self._steps = replay, iter(workload)
        self._predictions_of: Callable[..., Any] = predictions_of(workload.trace, depth)
        self.predictions: Any = ()

    def begin_step(self, step_index, phase, mask, positions, token_ids) -> None:
        self._replay.begin_step(self._replay.rows(range(len(mask)), mask, positions))
        self.predictions = self._predictions_of(next(self._steps))

    def end_step(self, next_tokens) -> None:
        pass


def on(device: Device, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask on a device."""
    ids, mask = left_pad(prompts)
    return ids.to(device.torch_device), mask.to(device.torch_device)


@cache
def plain(device: str, model_type: str, lanes: int, count: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """What the model gives for the prompts without any offloading."""
    loaded = own_model(model_type)
    loaded.model.to(torch.device(device))
    ids, mask = (tensor.to(device) for tensor in left_pad(PROMPTS[:lanes]))
    made = generate(loaded.model, ids, mask, max_new_tokens=count, sampler=Sampler(), keep_logits=True)
    return made.tokens, made.logits


PROMPTS = [[5, 17, 200, 31, 8, 77, 140], [90, 4, 33], [1, 2, 3, 250, 9]]


def assert_near(got: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Logits agree within ``tolerance`` of the largest one, in every step."""
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert float((one - other).abs().max()) <= tolerance * float(other.abs().max())


def follow(operations: pd.DataFrame, slots: int, staging: int = 2) -> None:
    """Walks an operation log and checks that every read finds what was copied; ``slots`` counts all but staging."""
    holds: dict[int, tuple[int, int]] = {}
    for row in operations.itertuples(index=False):
        expert = (row.layer, row.expert)
        if row.op == COPY:
            assert 0 <= row.slot < slots + staging
            assert row.slot >= slots or row.slot not in holds, f"{row} overwrites {holds.get(row.slot)}"
            assert row.bytes > 0
            holds[row.slot] = expert
        elif row.op == EVICT:
            assert holds.pop(row.slot) == expert
        elif row.op == GPU:
            assert holds[row.slot] == expert
            assert row.tokens > 0
        else:
            assert row.op == CPU
            assert row.slot == -1
    assert list(operations["n"]) == list(range(len(operations)))


def untouched(machine: Machine) -> bool:
    """Whether no hook, implementation or mark of an executor is left on the model."""
    return (
        machine.loaded.config._experts_implementation == "eager"
        and not any(layer.router._forward_hooks for layer in machine.loaded.layers)
        and not any(hasattr(layer.experts, "moetwin") for layer in machine.loaded.layers)
    )

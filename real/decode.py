"""Measured runs: decode prompts under a memory limit, or replay a trace's routing through a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from real.device import Device
from real.executor import Executor, Predictions
from real.generate import HookChain, Sampler, StopTexts, TextStream, generate, left_pad
from real.memory import begin_peak, peak, told_when_full
from real.models.load import LoadedModel
from real.record import Collector, check_positions, means_tensor
from real.routing import Replay
from real.store import DeviceSlots, HostStore
from sim.controller import ExpertShape, OffloadController
from sim.costs import Costs
from sim.needs import check_causal, router_means
from sim.policies.base import Calibration
from sim.results import RunResult
from sim.run import build_controller, predicted_of, predictions_of, run_info
from sim.systems import Budget, SystemSpec
from traces.errors import InputError
from traces.memory import check_free
from traces.schema import Phase, Trace
from traces.workload import Step, Workload, lock_step, router_scores


@dataclass
class Machine:
    """A model ready to run under offloading: its dense part on the device, its experts on the host.

    ``grouped`` is for :func:`real.grouped.together`: None leaves it to that.
    """

    loaded: LoadedModel
    device: Device
    store: HostStore
    grouped: bool | None = None
    _slots: DeviceSlots | None = field(default=None, repr=False)

    @classmethod
    def prepare(
        cls, loaded: LoadedModel, device: Device, *, seed: int = 0, progress: Callable[[], None] | None = None
    ) -> Machine:
        """Moves a model's experts to the host store and the rest to the device.

        Raises :class:`InputError`, with nothing left on the device, when that has not the memory.
        """
        store = HostStore(loaded, pin=device.torch_device.type == "cuda", seed=seed, progress=progress)
        with told_when_full():
            try:
                loaded.model.to(device.torch_device)  # type: ignore[arg-type]
            except RuntimeError:
                loaded.model.to("meta")  # type: ignore[arg-type]
                raise
        return cls(loaded, device, store)

    def slots(self, count: int) -> DeviceSlots:
        """``count`` empty slots on the device, allocated once and used again by the next run of that size.

        Raises :class:`InputError` when the free memory does not hold them: the host's where the CPU plays the device.
        """
        if self._slots is None or len(self._slots) != count:
            if self._slots is not None:
                self._slots.release()
                self._slots = None
            if self.device.torch_device.type == "cpu":
                needed = count * self.store.spec.expert_bytes
                together = f"{count} slots of {needed / 1e9:.1f} GB together"
                check_free(needed, "cache (or gpu-memory) must be lower: its slots", together)
            with told_when_full():
                self._slots = DeviceSlots(self.store, count, self.device.torch_device)
        self._slots.clear()
        return self._slots

    def text(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``; empty for a model without tokenizer."""
        tokenizer = self.loaded.tokenizer
        return "" if tokenizer is None else str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    @property
    def hardware(self) -> str:
        """Name of the machine for results: the GPU's own, or the CPU in its role."""
        if self.device.torch_device.type == "cuda":
            return torch.cuda.get_device_name()
        return "cpu device"


def decode(
    machine: Machine,
    encoded: Sequence[Sequence[int]],
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    *,
    calibration: Calibration | None = None,
    batch: int = 1,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    stop: Sequence[str] = (),
    on_prompt: Callable[[int], None] = lambda first: None,
    on_text: Callable[[str], None] | None = None,
    progress: Callable[[], None] = lambda: None,
    full_trace: bool = True,
    **header: object,
) -> tuple[RunResult, Trace, list[list[int]]]:
    """Decodes prompts (token ids) under ``budget``, ``batch`` at a time: the measured run, its trace, the new tokens.

    The trace has full scores and look-ahead with ``full_trace``, whose cost is a part of the measured dense time.
    ``on_prompt`` is told the index of a batch's first prompt before it is run, and ``on_text`` is handed the text of
    that prompt's continuation as it grows; a continuation also ends with the first of the texts ``stop``. ``header``
    fields go into the trace. Raises :class:`InputError` for a system that has to know the future, and for more tokens
    than the model has positions. A residual router is corrected by the means that ``calibration`` was recorded with.
    """
    check_causal(system, calibration)
    check_host(system, budget)
    if batch < 1:
        raise InputError(f"batch must be at least 1, got {batch}")
    loaded = machine.loaded
    check_positions(loaded, encoded, max_new_tokens)
    stops = StopTexts(loaded.tokenizer, stop) if stop and loaded.tokenizer else None
    means = router_means(calibration) if "residuals" in system.needs else ""
    collector = Collector(loaded, lookahead_depth=3 if full_trace else 0, scores=full_trace, router_means=means)
    controller = _controller(loaded, system, budget, costs, calibration)
    tokens: list[list[int]] = []
    slots = machine.slots(controller.cache.total_slots)
    residuals = means_tensor(means, loaded)
    given: dict[str, Any] = {
        "slots": slots,
        "listeners": [collector],
        "router_means": residuals,
        "grouped": machine.grouped,
    }
    begin_peak(machine.device.torch_device)
    with told_when_full(), Executor(loaded, controller, machine.device, machine.store, **given) as executor:
        hooks = HookChain(collector, executor, _Progress(progress))
        for start in range(0, len(encoded), batch):
            on_prompt(start)
            prompts = [loaded.as_run(one) for one in encoded[start : start + batch]]
            ids, mask = (tensor.to(machine.device.torch_device) for tensor in left_pad(prompts))
            stream = TextStream(loaded.tokenizer, on_text) if on_text and loaded.tokenizer else None
            ends: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_ids": loaded.eos_ids, "stops": stops}
            outcome = generate(loaded.model, ids, mask, **ends, sampler=sampler, hooks=hooks, stream=stream)
            tokens.extend(outcome.tokens)
    trace = collector.finish(**header)
    return _result(machine, executor, controller, lock_step(trace, batch), scored=True), trace, tokens


def replay(
    machine: Machine,
    workload: Workload,
    system: SystemSpec,
    budget: Budget,
    costs: Costs,
    *,
    calibration: Calibration | None = None,
    progress: Callable[[], None] = lambda: None,
) -> RunResult:
    """Runs the tokens of a workload through the model with the workload's routing forced on it, and measures.

    Every policy can run here, also those that know the future. Token ids beyond the model's vocabulary are wrapped
    round. Raises :class:`InputError` when trace and model do not fit each other.
    """
    check_host(system, budget)
    trace, loaded = workload.trace, machine.loaded
    router = Replay(trace, loaded, device=machine.device.torch_device)
    controller = build_controller(workload, system, budget, costs, calibration)
    guide = _Guide(router, workload, predictions_of(trace, system.lookahead_depth))
    begin_peak(machine.device.torch_device)
    with (
        told_when_full(),
        Executor(
            loaded,
            controller,
            machine.device,
            machine.store,
            slots=machine.slots(controller.cache.total_slots),
            listeners=[router],
            forecast=guide.forecast,
            scores=guide.scores,
            steps=workload.steps,
            router_means=_no_means(loaded) if "residuals" in system.needs else None,
            grouped=machine.grouped,
        ) as executor,
    ):
        hooks = HookChain(guide, executor, _Progress(progress))
        for steps in _batches(workload):
            prompts, continuations = _tokens(trace, steps, loaded.spec.vocab)
            ids, mask = left_pad(prompts)
            device = machine.device.torch_device
            generate(loaded.model, ids.to(device), mask.to(device), forced_tokens=continuations, hooks=hooks)
    return _result(machine, executor, controller, workload)


def _no_means(loaded: LoadedModel) -> torch.Tensor:
    """Means [L, H] that correct nothing: the forecast is the trace's, but adding them is a part of the cost."""
    like = next(loaded.model.parameters())
    return like.new_zeros((len(loaded.layers), loaded.spec.hidden))


def check_host(system: SystemSpec, budget: Budget) -> None:
    """Raises :class:`InputError` for what only the simulator knows: experts on a disk, dense layers on the CPU,
    deferral of experts to the next layer."""
    if budget.host_slots is not None:
        raise InputError(f"host_slots must be left out of a measured run, got {budget.host_slots}")
    if system.dense_follows:
        raise InputError("dense_follows must be left out of a measured run, where dense layers stay, got true")
    if system.deferral:
        raise InputError(f"place.defer must be 0 in a measured run, which changes no output, got {system.deferral}")


class _Guide:
    """Tells the replay, before each forward pass, which rows of the trace it is about to compute."""

    def __init__(self, router: Replay, workload: Workload, predictions: Callable[[Step], Sequence[object]]) -> None:
        self._router, self._steps, self._predictions = router, iter(workload.steps), predictions
        self._trace = workload.trace
        self._batch_of = _lanes_of(workload)
        self._forecast: Sequence[object] = ()
        self._step: Step

    def begin_step(
        self, step_index: int, phase: Phase, mask: torch.Tensor, positions: torch.Tensor, token_ids: torch.Tensor
    ) -> None:
        step = self._step = next(self._steps)
        self._router.begin_step(self._router.rows(self._batch_of[step.index], mask, positions))
        self._forecast = self._predictions(step)

    def end_step(self, next_tokens: list[int]) -> None:
        """Nothing to do."""

    def forecast(self, layer: int) -> Predictions:
        """What the trace expected of the layers after ``layer``."""
        return self._forecast[layer]  # type: ignore[return-value]

    def scores(self, layer: int) -> object:
        """The router's scores of ``layer`` in the trace."""
        return router_scores(self._trace, self._step.rows, layer)


class _Progress:
    """Hooks that only count forward passes."""

    def __init__(self, progress: Callable[[], None]) -> None:
        self._progress = progress

    def begin_step(self, *args: object) -> None:
        """Nothing to do."""

    def end_step(self, next_tokens: list[int]) -> None:
        self._progress()


def _controller(
    loaded: LoadedModel, system: SystemSpec, budget: Budget, costs: Costs, calibration: Calibration | None
) -> OffloadController:
    spec = loaded.spec
    shape = ExpertShape(spec.moe_layers, spec.experts, spec.top_k, spec.expert_bytes)
    return OffloadController(system, shape, budget, predicted_of(costs, shape.expert_bytes), None, calibration)


def _result(
    machine: Machine,
    executor: Executor,
    controller: OffloadController,
    workload: Workload,
    *,
    scored: bool | None = None,
) -> RunResult:
    """The run; ``scored`` as in :func:`sim.run.run_info`: while prompts are decoded the routers' own scores are there,
    whatever is recorded."""
    packages = ("numpy", "torch", "transformers")
    info = run_info("measured", workload, controller, hardware=machine.hardware, packages=packages, scored=scored)
    seen = {
        "peak": peak(machine.device.torch_device),
        "cpu_threads": machine.device.cpu_threads,
        "notes": [*info.notes, *executor.notes, *machine.store.notes],
    }
    return _from_zero(executor.log.result(info.model_copy(update=seen)))


def _from_zero(run: RunResult) -> RunResult:
    """The run with its times counted from its first step, not from when the device was opened."""
    origin_s = run.tokens.start_s.min()
    for table in (run.requests, run.tokens, run.layers, run.events):
        points = [name for name in ("arrival_s", "start_s", "first_token_s", "end_s") if name in table]
        table[points] -= origin_s
    return run


def _batches(workload: Workload) -> list[list[Step]]:
    """The steps of every batch: a batch begins with a prefill."""
    batches: list[list[Step]] = []
    for step in workload:
        if step.phase == Phase.PREFILL:
            batches.append([])
        if not batches:
            raise InputError("trace must have a prompt for each sequence to be replayed on a model, got decode only")
        batches[-1].append(step)
    return batches


def _lanes_of(workload: Workload) -> dict[int, tuple[int, ...]]:
    """For every step the sequences of all lanes of its batch, those that have ended included."""
    return {step.index: steps[0].sequences for steps in _batches(workload) for step in steps}


def _tokens(trace: Trace, steps: Sequence[Step], vocab: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of a batch, by lane: the prompts, and what follows."""
    lanes = steps[0].sequences
    prompts: dict[int, list[int]] = {lane: [] for lane in lanes}
    continuations: dict[int, list[int]] = {lane: [] for lane in lanes}
    for step in steps:
        into = prompts if step.phase == Phase.PREFILL else continuations
        for row in step.rows:
            sequence = int(trace.sequence[row])
            if sequence not in into:
                raise InputError(f"sequence {sequence} must have a prompt to be replayed on a model, got none")
            into[sequence].append(int(trace.token_ids[row]) % vocab)
    return list(prompts.values()), list(continuations.values())

"""The programs that `benchmarks/peers.py` runs: moetwin's own systems, accelerate's offload, moe-policylang's runtime.

All of them run the very same weights, tokens and routing. Theirs get a model of their own, whose experts are ordinary
tensors in host memory, as a checkpoint is loaded for them; ours are in the host store.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch

from real.decode import Machine, replay
from real.generate import HookChain, generate, left_pad
from real.models.load import LoadedModel, quiet
from real.routing import Replay, RouterTap
from sim.costs import Costs
from sim.memory import MemoryPlan
from sim.policies.base import Calibration
from sim.systems import Budget, SystemSpec
from traces.schema import Phase
from traces.workload import Workload

ROOM_OF_THE_HOST_BYTES = 2**60
"""What accelerate may take of what is not limited."""

Lap = Callable[[], None]


class UnableError(RuntimeError):
    """A program cannot run here; the text says why."""


class Program(Protocol):
    """Something that decodes under a limit of device memory."""

    name: str
    loaded: LoadedModel
    note: str

    def ready(self) -> AbstractContextManager[object]:
        """Takes its memory for the time of a ``with`` block; raises :class:`UnableError` where it cannot run."""

    def run(self, workload: Workload, lap: Lap) -> None:
        """Decodes with forced tokens and routing, and calls ``lap`` after every forward pass."""


@dataclass
class Own:
    """One of moetwin's systems under a budget; ``plan`` counts the bytes that it takes."""

    name: str
    machine: Machine
    system: SystemSpec
    budget: Budget
    plan: MemoryPlan
    costs: Costs
    calibration: Calibration | None
    note: str = ""

    @property
    def loaded(self) -> LoadedModel:
        return self.machine.loaded

    def ready(self) -> AbstractContextManager[object]:
        return nullcontext()

    def run(self, workload: Workload, lap: Lap) -> None:
        replay(self.machine, workload, self.system, self.budget, self.costs, calibration=self.calibration, progress=lap)


@dataclass
class Accelerate:
    """``accelerate``: whole layers on the device up to a limit, the others copied whole whenever they run.

    On a CUDA device the other layers are in host memory. With the CPU as the device they are in files, which is another
    thing: they are read in place from the page cache, so that nothing limits the memory.
    """

    loaded: LoadedModel
    limit_bytes: int
    device: torch.device
    name: str = "accelerate"
    note: str = ""
    offloaded_bytes: int = 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        if find_spec("accelerate") is None:
            raise UnableError("accelerate is not installed (pip install accelerate)")
        from accelerate import dispatch_model
        from accelerate.hooks import remove_hook_from_submodules

        logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what is asked of it
        model: Any = self.loaded.model
        with tempfile.TemporaryDirectory() as folder, quiet():
            try:
                kept_where_they_are = model._skip_keys_device_placement  # as transformers itself asks for
                dispatch_model(model, self._placed(), offload_dir=folder, skip_keys=kept_where_they_are)
                if model.device.type == "meta":
                    raise UnableError("the embedding does not fit beside accelerate's reserve for its largest layer")
                yield
            finally:
                remove_hook_from_submodules(model)
                _leave_device(model)

    def run(self, workload: Workload, lap: Lap) -> None:
        decode_forced(self.loaded, workload, self.device, lap)

    def _placed(self) -> dict[str, int | str]:
        """Where each module goes; the limit is for the weights alone, which favours accelerate by its KV cache."""
        from accelerate import infer_auto_device_map

        main, others = (0, "cpu") if self.device.type == "cuda" else ("cpu", "disk")
        limits = {main: self.limit_bytes, others: ROOM_OF_THE_HOST_BYTES}
        whole = sorted(self.loaded.model._no_split_modules or ())
        placed: dict[str, int | str] = infer_auto_device_map(
            self.loaded.model, max_memory=limits, no_split_module_classes=whole
        )
        away = [name for name, place in placed.items() if place == others]
        self.offloaded_bytes = sum(
            weight.nbytes
            for name, weight in self.loaded.model.named_parameters()
            if any(f"{name}.".startswith(f"{one}.") for one in away)
        )
        self.note = f"{len(away)} of {len(placed)} modules in {'files' if others == 'disk' else 'host memory'}"
        return placed


@dataclass
class PolicyLang:
    """``moe-policylang``: least recently used experts in a pool of each layer's, as many as our slots a layer.

    Its cache knows experts by their number alone, whatever the layer; a prompt that uses more experts than the pool
    holds takes memory beyond it, which the table shows. It copies from pageable memory and waits for every copy.
    """

    loaded: LoadedModel
    slots: int
    device: torch.device
    name: str = "moe-policylang"
    note: str = ""

    @contextmanager
    def ready(self) -> Iterator[None]:
        if find_spec("moe_policylang") is None:
            raise UnableError("moe-policylang is not installed (pip install moe-policylang)")
        if self.device.type != "cuda":
            raise UnableError("its runtime needs a CUDA device: it waits for one after every copy")
        import moe_policylang

        model: Any = self.loaded.model
        policy = f"policy lru {{ cache {{ capacity = {self.slots}  eviction = lru }} }}"
        try:
            move_dense(self.loaded, self.device)
            manager = moe_policylang.attach(model, policy)
            try:
                if manager._mode != "backend":
                    raise UnableError(f"it only watches this model, and offloads nothing (mode {manager._mode})")
                yield
            finally:
                moved = manager.stats.bytes_transferred
                self.note = f"LRU of {self.slots} expert numbers; {moved / 1e9:.1f} GB copied in a run"
                manager.detach()
        finally:
            for layer in self.loaded.layers:
                layer.experts.__dict__.pop("_moe_policylang_ctx", None)  # it holds the layer's pool
            model.set_experts_implementation("eager")
            _leave_device(model)

    def run(self, workload: Workload, lap: Lap) -> None:
        decode_forced(self.loaded, workload, self.device, lap)


def decode_forced(loaded: LoadedModel, workload: Workload, device: torch.device, lap: Lap) -> None:
    """Runs the tokens of a workload through a model's own experts, with the workload's routing forced on it."""
    trace = workload.trace
    router = Replay(trace, loaded, device=device)
    with RouterTap(loaded.layers, router):
        for sequence in dict.fromkeys(trace.sequence.tolist()):
            rows = trace.sequence == sequence
            ids = trace.token_ids % loaded.spec.vocab
            prompt = ids[rows & (trace.phase == Phase.PREFILL)].tolist()
            rest = ids[rows & (trace.phase == Phase.DECODE)].tolist()
            hooks = HookChain(_Forced(router, sequence), _Lap(lap))
            tokens, mask = (tensor.to(device) for tensor in left_pad([prompt]))
            generate(loaded.model, tokens, mask, forced_tokens=[rest], hooks=hooks)


def take_experts(loaded: LoadedModel, machine: Machine) -> None:
    """Gives a model that has no experts, or others, copies of those in a machine's host store."""
    store = machine.store
    with torch.no_grad():  # not inference mode: what is made in that cannot be moved by others later
        for layer in loaded.layers:
            layer.experts.to_empty(device="cpu")
            for expert in range(loaded.spec.experts):
                held = store.views(store.expert(layer.index, expert))
                for into, weights in zip(loaded.family.experts_tensors(layer.experts, expert), held, strict=True):
                    into.copy_(weights)


def move_dense(loaded: LoadedModel, device: torch.device) -> None:
    """Moves all weights but the routed experts'."""
    experts = [module for layer in loaded.layers for module in layer.experts.modules()]
    for module in loaded.model.modules():
        if not any(module is one for one in experts):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                tensor.data = tensor.data.to(device)


def _leave_device(model: torch.nn.Module) -> None:
    model.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Forced:
    """Tells the replay of the routing which rows of the trace a forward pass is."""

    def __init__(self, router: Replay, sequence: int) -> None:
        self._router, self._sequence = router, sequence

    def begin_step(self, step: int, phase: Phase, mask: torch.Tensor, positions: torch.Tensor, ids: object) -> None:
        self._router.begin_step(self._router.rows([self._sequence], mask, positions))

    def end_step(self, next_tokens: list[int]) -> None:
        """Nothing to do."""


class _Lap:
    """Hooks that only tell when a forward pass has been submitted."""

    def __init__(self, lap: Lap) -> None:
        self._lap = lap

    def begin_step(self, *args: object) -> None:
        """Nothing to do."""

    def end_step(self, next_tokens: list[int]) -> None:
        self._lap()

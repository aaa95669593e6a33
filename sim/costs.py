"""Seconds for a piece of work: from a roofline over catalogue numbers, or from a calibrated profile."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from sim.spec.compute_table import ComputeTable
from sim.spec.hardware import HardwareSpec, HostSpec
from sim.spec.model import ModelSpec
from traces.errors import InputError

SHARERS = frozenset({"cpu", "link"})
"""Resources that draw on the host's memory."""

DENSE_KERNELS, EXPERT_KERNELS = 12, 3
"""Kernels of a layer outside its experts, and of one expert [I]: counted from the modules' code."""


class Costs(Protocol):
    """What the engine asks. All answers are seconds of undisturbed work."""

    name: str
    host: HostSpec

    @property
    def notes(self) -> list[str]:
        """What is doubtful about the answers given so far, one sentence each."""

    def dense_s(self, tokens: int, context: int) -> float:
        """One layer outside its routed experts: attention over ``context`` tokens, norms, router, shared experts."""

    def head_s(self, tokens: int, context: int) -> float:
        """What a forward pass does outside the MoE layers: dense layers, final norm, language-model head, sampling."""

    def gpu_expert_s(self, tokens: int) -> float:
        """One resident expert on the GPU."""

    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        """One expert on the CPU; ``first`` of its layer or a later one."""

    def copy_s(self, size_bytes: int) -> float:
        """One copy from host to device."""

    def lookahead_s(self, depth: int) -> float:
        """Running the routers of ``depth`` later layers on one layer's hidden state."""

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        """Factor (1 or more) by which work on ``resource`` takes longer while all of ``others`` are busy."""


class RooflineCosts:
    """Costs from catalogue numbers: time = max(FLOPs / rate, bytes / bandwidth) + fixed costs.

    An expert is so bound by memory for few tokens and by arithmetic for many, on the GPU as on the CPU. Rates are the
    nominal ones times the named efficiencies of the specs. A multiply-add counts as two FLOPs. Latent attention is
    counted as if its cache were expanded. Every fixed cost is a field of the specs, and 0 switches it off.
    """

    def __init__(self, model: ModelSpec, hardware: HardwareSpec) -> None:
        regime = "" if hardware.regime == "eager" else f", {hardware.regime}-captured"
        self.name = f"roofline {model.name} on {hardware.name}{regime}"
        self.model, self.hardware, self.host = model, hardware, hardware.dispatching_host
        cpu = hardware.cpu
        takes_int8 = cpu.int8_ops_per_s > 0 and model.expert_bits <= 8
        self._cpu_flops_per_s = cpu.int8_ops_per_s if takes_int8 else cpu.reached_flops_per_s

    @cache  # noqa: B019 - a run keeps its one costs object alive anyway
    def dense_s(self, tokens: int, context: int) -> float:
        return self._layers_s(1, self.model.moe_layer_elements, tokens, context)

    @cache  # noqa: B019
    def head_s(self, tokens: int, context: int) -> float:
        model = self.model
        matrix = model.hidden * model.vocab
        head = self._gpu_s(2.0 * tokens * matrix, matrix * model.bytes_per_element, 2)
        return head + self._layers_s(model.layers - model.moe_layers, model.dense_layer_elements, tokens, context)

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        model = self.model
        work_s = self._gpu_s(2.0 * tokens * model.expert_elements, model.expert_bytes, EXPERT_KERNELS)
        return work_s + self.hardware.gpu.expert_fixed_s

    @cache  # noqa: B019
    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        model, cpu = self.model, self.hardware.cpu
        flops_s = 2.0 * tokens * model.expert_elements / self._cpu_flops_per_s
        work_s = max(flops_s, model.expert_bytes / cpu.reached_bytes_per_s) + cpu.expert_fixed_s
        return work_s + (cpu.handoff_s + cpu.first_expert_s if first else 0.0)

    @cache  # noqa: B019
    def copy_s(self, size_bytes: int) -> float:
        return self.hardware.link.latency_s + size_bytes / self.hardware.link.reached_bytes_per_s

    def read_s(self, size_bytes: int) -> float:
        """One read from the disk; raises :class:`InputError` for a machine without one."""
        disk = self.hardware.disk
        if disk is None:
            raise InputError(f"hardware must have a disk to read experts from, got {self.hardware.name}")
        return disk.latency_s + size_bytes / disk.bytes_per_s

    @property
    def notes(self) -> list[str]:
        """None: a roofline has no range in which it was measured."""
        return []

    def lookahead_s(self, depth: int) -> float:
        router_bytes = self.model.hidden * self.model.experts * self.model.bytes_per_element
        return depth * self._gpu_s(0.0, router_bytes, 2)

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        """CPU experts and copies that together ask for more than the host's memory gives wait in proportion.

        Taken as if a CPU expert always asked for its full bandwidth, which is so for few tokens.
        """
        shared = self.hardware.cpu.shared_bytes_per_s
        if not shared or {resource, *others} & SHARERS != SHARERS or resource not in SHARERS:
            return 1.0
        return max(1.0, (self.hardware.cpu.reached_bytes_per_s + self.hardware.link.reached_bytes_per_s) / shared)

    def _gpu_s(self, flops: float, size_bytes: float, kernels: int) -> float:
        gpu = self.hardware.gpu
        work_s = max(flops / gpu.reached_flops_per_s, size_bytes / gpu.reached_bytes_per_s)
        return work_s + kernels * self.hardware.kernel_s

    def _layers_s(self, layers: int, elements: int, tokens: int, context: int) -> float:
        model = self.model
        attention = 4.0 * tokens * context * model.heads * model.head_dim
        kv_bytes = context * model.kv_bytes_per_token / model.layers
        size_bytes = elements * model.bytes_per_element + kv_bytes
        return layers * self._gpu_s(2.0 * tokens * elements + attention, size_bytes, DENSE_KERNELS)


class TableCosts(RooflineCosts):
    """A roofline whose GPU experts come from a measured table of whole layers.

    An expert of n tokens takes a k-th of a layer in which n tokens all choose the same k experts: the table's time for
    n tokens and k activated experts, divided by k, the model's top-k. Launches are in it, whatever the regime.
    """

    def __init__(self, model: ModelSpec, hardware: HardwareSpec, table: ComputeTable) -> None:
        super().__init__(model, hardware)
        self.name = f"{self.name}, GPU experts from {table.name}"
        self.table = table
        self._most_tokens = 0

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        self._most_tokens = max(self._most_tokens, tokens)
        return self.table.layer_s(tokens, self.model.top_k) / self.model.top_k

    @property
    def notes(self) -> list[str]:
        """What was asked beyond the largest batch that was measured, where time is taken in proportion."""
        if self._most_tokens <= self.table.most_tokens:
            return []
        return [f"{self.table.name} was asked for {self._most_tokens} tokens, measured to {self.table.most_tokens}"]

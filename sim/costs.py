"""Seconds for a piece of work: from a roofline over catalogue numbers, or from a calibrated profile."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from sim.spec.hardware import HardwareSpec, HostSpec
from sim.spec.model import ModelSpec

DENSE_KERNELS, EXPERT_KERNELS = 12, 3
"""Kernels that an eager layer launches outside its experts, and for one expert [I]: counted from the modules' code."""


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

    Rates are the nominal ones times the named efficiencies of the specs. A multiply-add counts as two FLOPs.
    """

    def __init__(self, model: ModelSpec, hardware: HardwareSpec) -> None:
        self.name = f"roofline {model.name} on {hardware.name}"
        self.model, self.hardware, self.host = model, hardware, hardware.host
        gpu = hardware.gpu
        self._gpu_bytes_per_s = gpu.bytes_per_s * gpu.memory_efficiency
        self._gpu_flops_per_s = gpu.flops_per_s * gpu.compute_efficiency

    @cache  # noqa: B019 - a run keeps its one costs object alive anyway
    def dense_s(self, tokens: int, context: int) -> float:
        return self._layers_s(1, self.model.moe_layer_elements, tokens, context)

    @cache  # noqa: B019
    def head_s(self, tokens: int, context: int) -> float:
        model = self.model
        dense_layers = model.layers - model.moe_layers
        elements = model.attention_elements + 3 * model.hidden * model.dense_width
        matrix = model.hidden * model.vocab
        head = self._gpu_s(2.0 * tokens * matrix, matrix * model.bytes_per_element, 2)
        return head + self._layers_s(dense_layers, elements, tokens, context)

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        model = self.model
        return self._gpu_s(2.0 * tokens * model.expert_elements, model.expert_bytes, EXPERT_KERNELS)

    @cache  # noqa: B019
    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        model, cpu = self.model, self.hardware.cpu
        work_s = max(2.0 * tokens * model.expert_elements / cpu.flops_per_s, model.expert_bytes / cpu.bytes_per_s)
        return work_s + cpu.expert_fixed_s + (cpu.first_expert_s if first else 0.0)

    @cache  # noqa: B019
    def copy_s(self, size_bytes: int) -> float:
        return self.hardware.link.latency_s + size_bytes / self.hardware.link.bytes_per_s

    @property
    def notes(self) -> list[str]:
        """None: a roofline has no range in which it was measured."""
        return []

    def lookahead_s(self, depth: int) -> float:
        router_bytes = self.model.hidden * self.model.experts * self.model.bytes_per_element
        return depth * self._gpu_s(0.0, router_bytes, 2)

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        """Always 1: the catalogue has no measured contention."""
        return 1.0

    def _gpu_s(self, flops: float, size_bytes: float, kernels: int) -> float:
        launch_s = kernels * self.hardware.gpu.launch_s
        return max(flops / self._gpu_flops_per_s, size_bytes / self._gpu_bytes_per_s) + launch_s

    def _layers_s(self, layers: int, elements: int, tokens: int, context: int) -> float:
        model = self.model
        attention = 4.0 * tokens * context * model.heads * model.head_dim
        kv_bytes = context * model.kv_bytes_per_token / model.layers
        size_bytes = elements * model.bytes_per_element + kv_bytes
        return layers * self._gpu_s(2.0 * tokens * elements + attention, size_bytes, DENSE_KERNELS)

"""Seconds for a piece of work: from a roofline over catalogue numbers, or from a calibrated profile."""

from __future__ import annotations

from functools import cache
from typing import Protocol

from sim.spec.compute_table import ComputeTable
from sim.spec.hardware import HardwareSpec, HostSpec
from sim.spec.model import ModelSpec
from traces.errors import InputError


class Costs(Protocol):
    """What the engine asks. All answers are seconds of undisturbed work."""

    name: str
    host: HostSpec
    chunk_bytes: int
    """Bytes of a copy after which a demand overtakes a prefetch; 0: copies are whole."""

    @property
    def notes(self) -> list[str]:
        """What is doubtful about the answers given so far, one sentence each."""

    def dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        """One layer outside its routed experts on the GPU: attention, norms, router, shared experts.

        ``tokens`` are those of the pass, of ``lanes`` sequences with KV caches of ``context`` tokens each.
        """

    def cpu_dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        """The same on the CPU; raises :class:`InputError` where the costs do not tell."""

    def head_s(self, lanes: int, context: int, tokens: int = 0) -> float:
        """What a forward pass does outside the MoE layers: dense layers, final norm, language-model head, sampling.

        The head sees one token a lane, the dense layers all ``tokens`` of the pass (0: one a lane).
        """

    def gpu_expert_s(self, tokens: int) -> float:
        """One resident expert on the GPU."""

    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        """One expert on the CPU; ``first`` of its layer or a later one."""

    def copy_s(self, size_bytes: int) -> float:
        """One copy from host to device, all its chunks together."""

    def write_back_s(self, size_bytes: int) -> float:
        """One copy from device to host."""

    def deciding_s(self, experts: int) -> float:
        """Deciding a layer in which so many distinct experts were chosen, beyond ``host.controller_s``."""

    def read_s(self, size_bytes: int) -> float:
        """One read from the disk; raises :class:`InputError` for a machine without one."""

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes of the hidden state of ``tokens``, which moves where neighbouring layers run on different devices."""

    def lookahead_s(self, depth: int) -> float:
        """Running the routers of ``depth`` later layers on one layer's hidden state."""

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        """Factor (1 or more) by which work on ``resource`` takes longer while all of ``others`` are busy."""


class RooflineCosts:
    """Costs from catalogue numbers: time = max(FLOPs / rate, bytes / bandwidth) + fixed costs.

    An expert is so bound by memory for few tokens and by arithmetic for many, on the GPU as on the CPU. Rates are the
    nominal ones times the named efficiencies of the specs. A multiply-add counts as two FLOPs. Latent attention is
    counted on whole heads, as if its cache were expanded, and expanding it costs nothing. Every fixed cost is a field
    of the specs, and 0 switches it off.
    """

    def __init__(self, model: ModelSpec, hardware: HardwareSpec) -> None:
        regime = "" if hardware.regime == "eager" else f", {hardware.regime}-captured"
        self.name = f"roofline {model.name} on {hardware.name}{regime}"
        self.model, self.hardware, self.host = model, hardware, hardware.dispatching_host
        self.chunk_bytes = hardware.link.chunk_bytes
        cpu, link, disk = hardware.cpu, hardware.link, hardware.disk
        takes_int8 = cpu.int8_ops_per_s > 0 and model.expert_bits < 9  # codes of 8 bits and their scales
        self._cpu_flops_per_s = cpu.int8_ops_per_s if takes_int8 else cpu.reached_flops_per_s
        self._host_bytes_per_s = {  # what each resource asks of the host's memory
            "cpu": cpu.reached_bytes_per_s,
            "link": link.reached_bytes_per_s,
            "link-back": link.reached_back_bytes_per_s,
            "disk": disk.bytes_per_s if disk else 0.0,
        }

    @cache  # noqa: B019 - a run keeps its one costs object alive anyway
    def dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        work = self._dense_work(self.model.moe_layer_elements, tokens, context, lanes)
        return self._gpu_s(*work, self.hardware.gpu.dense_kernels)

    @cache  # noqa: B019
    def cpu_dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        flops, size_bytes = self._dense_work(self.model.moe_layer_elements, tokens, context, lanes)
        return max(flops / self.hardware.cpu.reached_flops_per_s, size_bytes / self.hardware.cpu.reached_bytes_per_s)

    @cache  # noqa: B019
    def head_s(self, lanes: int, context: int, tokens: int = 0) -> float:
        model = self.model
        matrix = model.hidden * model.vocab
        head_s = self._gpu_s(2.0 * lanes * matrix, matrix * model.bytes_per_element, 2)
        work = self._dense_work(model.dense_layer_elements, tokens or lanes, context, lanes)
        return head_s + (model.layers - model.moe_layers) * self._gpu_s(*work, self.hardware.gpu.dense_kernels)

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        model, gpu = self.model, self.hardware.gpu
        work_s = self._gpu_s(2.0 * tokens * model.expert_elements, model.expert_bytes, gpu.expert_kernels)
        return work_s + gpu.expert_fixed_s

    @cache  # noqa: B019
    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        model, cpu = self.model, self.hardware.cpu
        flops_s = 2.0 * tokens * model.expert_elements / self._cpu_flops_per_s
        work_s = max(flops_s, model.expert_bytes / cpu.reached_bytes_per_s) + cpu.expert_fixed_s
        return work_s + (cpu.handoff_s + cpu.first_expert_s if first else 0.0)

    @cache  # noqa: B019
    def copy_s(self, size_bytes: int) -> float:
        link = self.hardware.link
        return self._chunks(size_bytes) * link.latency_s + size_bytes / link.reached_bytes_per_s

    @cache  # noqa: B019
    def write_back_s(self, size_bytes: int) -> float:
        link = self.hardware.link
        return self._chunks(size_bytes) * link.latency_s + size_bytes / link.reached_back_bytes_per_s

    @cache  # noqa: B019
    def read_s(self, size_bytes: int) -> float:
        disk = self.hardware.disk
        if disk is None:
            raise InputError(f"hardware must have a disk to read experts from, got {self.hardware.name}")
        return disk.latency_s + size_bytes / disk.bytes_per_s

    def deciding_s(self, experts: int) -> float:
        """Nothing: catalogues tell one number for all layers."""
        return 0.0

    def hidden_bytes(self, tokens: int) -> int:
        return round(tokens * self.model.hidden * self.model.bytes_per_element)

    @property
    def notes(self) -> list[str]:
        """None: a roofline has no range in which it was measured."""
        return []

    def lookahead_s(self, depth: int) -> float:
        router_bytes = self.model.hidden * self.model.experts * self.model.bytes_per_element
        return depth * self._gpu_s(0.0, router_bytes, 2)

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        """Resources that together ask for more than the host's memory gives wait in proportion.

        Taken as if each always asked for its full bandwidth; for a CPU expert that is so for few tokens.
        """
        shared, asked = self.hardware.cpu.shared_bytes_per_s, self._host_bytes_per_s
        busy = [name for name in asked if name == resource or name in others]
        if not shared or resource not in asked or len(busy) == 1:
            return 1.0
        return max(1.0, sum([asked[name] for name in busy]) / shared)

    def _gpu_s(self, flops: float, size_bytes: float, kernels: int) -> float:
        gpu = self.hardware.gpu
        work_s = max(flops / gpu.reached_flops_per_s, size_bytes / gpu.reached_bytes_per_s)
        return work_s + kernels * self.hardware.kernel_s

    def _chunks(self, size_bytes: int) -> int:
        return max(1, -(-size_bytes // self.chunk_bytes)) if self.chunk_bytes else 1

    def _dense_work(self, elements: int, tokens: int, context: int, lanes: int) -> tuple[float, float]:
        """FLOPs and bytes of one layer with ``elements`` weights outside its routed experts.

        Attention is causal: of its lane's n new tokens, the last one sees the whole context, the first n - 1 fewer.
        A pair of tokens takes a product of a query and a key, and one of a weight and a value, in every head.
        """
        model = self.model
        flops, size_bytes = 2.0 * tokens * elements, elements * model.bytes_per_element
        if not model.context_costs:
            return flops, size_bytes
        new = min(tokens / lanes, context)
        attended = context - (new - 1) / 2  # on average
        pair_flops = 2.0 * model.heads * (model.key_dim + model.head_dim)
        cache_bytes = lanes * context * model.kv_bytes_per_token / model.layers
        return flops + tokens * attended * pair_flops, size_bytes + cache_bytes


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
        """Whose table it is, and what was asked beyond what was measured, where time is taken in proportion."""
        doubts = self.table.doubts(self.model.name, self.model.top_k, self.model.expert_bits)
        if self._most_tokens > (most := self.table.most_tokens):
            doubts.append(f"{self.table.name} was asked for {self._most_tokens} tokens, measured to {most}")
        return doubts

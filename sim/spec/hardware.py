"""HardwareSpec: a machine as the simulator sees it, a GPU, a CPU, the link between them and the host program."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Processor(_Part):
    name: str
    source: str
    bytes_per_s: PositiveFloat
    flops_per_s: PositiveFloat
    memory_efficiency: PositiveFloat = Field(default=1.0, le=1, description="share of bytes_per_s that kernels reach")
    compute_efficiency: PositiveFloat = Field(default=1.0, le=1, description="share of flops_per_s that kernels reach")

    @property
    def reached_bytes_per_s(self) -> float:
        """Memory bandwidth that an expert kernel reaches."""
        return self.bytes_per_s * self.memory_efficiency

    @property
    def reached_flops_per_s(self) -> float:
        """Arithmetic rate that an expert kernel reaches."""
        return self.flops_per_s * self.compute_efficiency


class GpuSpec(_Processor):
    """A GPU: nominal rates and the share of them that inference kernels reach."""

    memory_bytes: PositiveInt
    memory_efficiency: PositiveFloat = Field(default=0.7, le=1)
    compute_efficiency: PositiveFloat = Field(default=0.6, le=1)
    launch_s: NonNegativeFloat = Field(default=5e-6, description="fixed cost of one kernel on the GPU's timeline")
    graph_launch_s: NonNegativeFloat = Field(default=3.1e-6, description="the same inside a captured graph")
    expert_fixed_s: NonNegativeFloat = Field(default=0.0, description="cost of one expert beyond its kernels")


class CpuSpec(_Processor):
    """A CPU as an expert engine, on all its cores. With efficiencies of 1 the rates are those that kernels reach."""

    int8_ops_per_s: NonNegativeFloat = Field(
        default=0.0, description="reached rate for experts of 8 bits a weight and less; 0: flops_per_s"
    )
    expert_fixed_s: NonNegativeFloat = Field(default=21e-6, description="fixed cost of one expert")
    handoff_s: NonNegativeFloat = Field(default=0.0, description="handing a layer over and back, once a layer")
    first_expert_s: NonNegativeFloat = Field(default=0.0, description="extra cost of a layer's first CPU expert")
    shared_bytes_per_s: NonNegativeFloat = Field(
        default=0.0, description="memory bandwidth that CPU experts and copies share; 0: never the limit"
    )


class LinkSpec(_Part):
    """The link from host to device. ``bytes_per_s`` is what a copy from pinned memory reaches."""

    name: str
    source: str
    bytes_per_s: PositiveFloat
    latency_s: NonNegativeFloat = Field(default=7e-6, description="fixed cost of one copy")
    pinned: bool = Field(default=True, description="whether copies come from pinned memory")
    pageable_efficiency: PositiveFloat = Field(default=0.28, le=1, description="share that pageable memory reaches")

    @property
    def reached_bytes_per_s(self) -> float:
        """Bandwidth of a copy from the memory that ``pinned`` tells of."""
        return self.bytes_per_s * (1.0 if self.pinned else self.pageable_efficiency)


class HostSpec(_Part):
    """What the host program itself costs: Python dispatch, reading the router's choice, the controller."""

    source: str
    layer_s: NonNegativeFloat = Field(default=60e-6, description="dispatch of one layer's dense part")
    readback_s: NonNegativeFloat = Field(default=15e-6, description="reading the router's choice back")
    controller_s: NonNegativeFloat = Field(default=30e-6, description="deciding one layer")
    operation_s: NonNegativeFloat = Field(default=8e-6, description="submitting one operation")
    join_s: NonNegativeFloat = Field(default=0.0, description="waking up when a layer's work has ended")
    joins_layers: bool = Field(default=False, description="the host waits for each layer's end, as a CPU device does")


class DiskSpec(_Part):
    """A disk below the host's memory. A read costs ``latency_s`` and its bytes at ``bytes_per_s``, so that small reads
    reach far less than large ones."""

    name: str
    source: str
    bytes_per_s: PositiveFloat = Field(description="sequential reads")
    latency_s: NonNegativeFloat = Field(default=100e-6, description="fixed cost of one read")


class HardwareSpec(_Part):
    """One machine. ``regime`` tells how kernels reach the GPU: each launched by the host, or a layer's in one graph."""

    name: str
    source: str = Field(default="", description="why these parts stand together")
    regime: Literal["eager", "graph"] = "eager"
    gpu: GpuSpec
    cpu: CpuSpec
    link: LinkSpec
    host: HostSpec
    disk: DiskSpec | None = None

    @property
    def kernel_s(self) -> float:
        """Fixed cost of one kernel in the machine's regime."""
        return self.gpu.graph_launch_s if self.regime == "graph" else self.gpu.launch_s

    @property
    def dispatching_host(self) -> HostSpec:
        """The host's costs in the machine's regime: a captured layer is submitted as one operation."""
        if self.regime == "eager":
            return self.host
        return self.host.model_copy(update={"layer_s": min(self.host.layer_s, self.host.operation_s)})

"""HardwareSpec: a machine as the simulator sees it, a GPU, a CPU, the link between them and the host program."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

MOST = 10**18
"""Of bytes, and of bytes or operations a second: more is a slip, and what is divided by it or by its inverse overflows.
Likewise at least 1 a second, an hour for a fixed cost, and a millionth for a share."""


def _none_or_one(value: float) -> float:
    if 0 < value < 1:
        raise ValueError("0, or at least 1 a second")
    return value


Rate = Annotated[float, Field(ge=1, le=MOST)]
RateOrZero = Annotated[float, Field(ge=0, le=MOST), AfterValidator(_none_or_one)]
Seconds = Annotated[float, Field(ge=0, le=3600)]
Share = Annotated[float, Field(ge=1e-6, le=1)]
Bytes = Annotated[PositiveInt, Field(le=MOST)]
Kernels = Annotated[NonNegativeInt, Field(le=10**6)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Processor(_Part):
    name: str
    source: str
    bytes_per_s: Rate
    flops_per_s: Rate
    memory_efficiency: Share = Field(default=1.0, description="share of bytes_per_s that kernels reach")
    compute_efficiency: Share = Field(default=1.0, description="share of flops_per_s that kernels reach")

    @property
    def reached_bytes_per_s(self) -> float:
        """Memory bandwidth that an expert kernel reaches."""
        return self.bytes_per_s * self.memory_efficiency

    @property
    def reached_flops_per_s(self) -> float:
        """Arithmetic rate that an expert kernel reaches."""
        return self.flops_per_s * self.compute_efficiency


class GpuSpec(_Processor):
    """A GPU: nominal rates and the share of them that inference kernels reach.

    How many kernels the program launches is counted from the modules' code [I], not measured.
    """

    memory_bytes: Bytes
    memory_efficiency: Share = Field(default=0.7)
    compute_efficiency: Share = Field(default=0.6)
    launch_s: Seconds = Field(default=5e-6, description="fixed cost of one kernel on the GPU's timeline")
    graph_launch_s: Seconds = Field(default=3.1e-6, description="the same inside a captured graph")
    dense_kernels: Kernels = Field(default=12, description="kernels of a layer outside its experts")
    expert_kernels: Kernels = Field(default=3, description="kernels of one expert")
    expert_fixed_s: Seconds = Field(default=0.0, description="cost of one expert beyond its kernels")


class CpuSpec(_Processor):
    """A CPU as an expert engine, on all its cores. With efficiencies of 1 the rates are those that kernels reach."""

    int8_ops_per_s: RateOrZero = Field(
        default=0.0, description="reached rate for experts of 8 bits a weight and less; 0: flops_per_s"
    )
    expert_fixed_s: Seconds = Field(default=21e-6, description="fixed cost of one expert")
    handoff_s: Seconds = Field(default=0.0, description="handing a layer over and back, once a layer")
    first_expert_s: Seconds = Field(default=0.0, description="extra cost of a layer's first CPU expert")
    shared_bytes_per_s: RateOrZero = Field(
        default=0.0, description="memory bandwidth that CPU experts and copies share; 0: never the limit"
    )


class LinkSpec(_Part):
    """The link between host and device, both directions at once. ``bytes_per_s`` is what a copy from pinned memory to
    the device reaches."""

    name: str
    source: str
    bytes_per_s: Rate
    back_bytes_per_s: RateOrZero = Field(default=0.0, description="from device to host; 0: as bytes_per_s")
    latency_s: Seconds = Field(default=7e-6, description="fixed cost of one copy, or of one chunk")
    chunk_bytes: NonNegativeInt = Field(
        default=0, le=MOST, description="copies go in chunks, and a demand overtakes a prefetch between two; 0: whole"
    )
    pinned: bool = Field(default=True, description="whether copies come from pinned memory")
    pageable_efficiency: Share = Field(default=0.28, description="share that pageable memory reaches")

    @property
    def reached_bytes_per_s(self) -> float:
        """Bandwidth of a copy from the memory that ``pinned`` tells of."""
        return self.bytes_per_s * self._share

    @property
    def reached_back_bytes_per_s(self) -> float:
        """Bandwidth of a copy to that memory."""
        return (self.back_bytes_per_s or self.bytes_per_s) * self._share

    @property
    def _share(self) -> float:
        return 1.0 if self.pinned else self.pageable_efficiency


class HostSpec(_Part):
    """What the host program itself costs: Python dispatch, reading the router's choice, the controller."""

    source: str
    layer_s: Seconds = Field(default=60e-6, description="dispatch of one layer's dense part")
    readback_s: Seconds = Field(default=15e-6, description="reading the router's choice back")
    controller_s: Seconds = Field(default=30e-6, description="deciding one layer")
    operation_s: Seconds = Field(default=8e-6, description="submitting one operation")
    join_s: Seconds = Field(default=0.0, description="waking up when a layer's work has ended")
    cpu_s: Seconds = Field(default=0.0, description="deciding and submitting more where a layer has CPU experts")
    cpu_join_s: Seconds = Field(default=0.0, description="waking up later where a layer has CPU experts")
    joins_layers: bool = Field(default=False, description="the host waits for each layer's end, as a CPU device does")


class DiskSpec(_Part):
    """A disk below the host's memory. A read costs ``latency_s`` and its bytes at ``bytes_per_s``, so that small reads
    reach far less than large ones."""

    name: str
    source: str
    bytes_per_s: Rate = Field(description="sequential reads")
    latency_s: Seconds = Field(default=100e-6, description="fixed cost of one read")


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

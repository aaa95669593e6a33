"""HardwareSpec: a machine as the simulator sees it, a GPU, a CPU, the link between them and the host program."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GpuSpec(_Part):
    """A GPU: nominal rates and the share of them that inference kernels reach."""

    name: str
    source: str
    memory_bytes: PositiveInt
    bytes_per_s: PositiveFloat
    flops_per_s: PositiveFloat
    memory_efficiency: PositiveFloat = Field(default=0.7, le=1)
    compute_efficiency: PositiveFloat = Field(default=0.6, le=1)
    launch_s: NonNegativeFloat = Field(default=5e-6, description="fixed cost of one kernel on the GPU's timeline")


class CpuSpec(_Part):
    """A CPU as an expert engine: rates that an expert kernel reaches on all its cores."""

    name: str
    source: str
    bytes_per_s: PositiveFloat
    flops_per_s: PositiveFloat
    expert_fixed_s: NonNegativeFloat = Field(default=21e-6, description="fixed cost of one expert")
    first_expert_s: NonNegativeFloat = Field(default=0.0, description="extra cost of a layer's first CPU expert")


class LinkSpec(_Part):
    """The host-to-device link, pinned memory."""

    name: str
    source: str
    bytes_per_s: PositiveFloat
    latency_s: NonNegativeFloat = Field(default=7e-6, description="fixed cost of one copy")


class HostSpec(_Part):
    """What the host program itself costs: Python dispatch, reading the router's choice, the controller."""

    source: str
    layer_s: NonNegativeFloat = Field(default=60e-6, description="dispatch of one layer's dense part")
    readback_s: NonNegativeFloat = Field(default=15e-6, description="reading the router's choice back")
    controller_s: NonNegativeFloat = Field(default=30e-6, description="deciding one layer")
    operation_s: NonNegativeFloat = Field(default=8e-6, description="submitting one operation")
    join_s: NonNegativeFloat = Field(default=0.0, description="waking up when a layer's work has ended")
    joins_layers: bool = Field(default=False, description="the host waits for each layer's end, as a CPU device does")


class HardwareSpec(_Part):
    """One machine."""

    name: str
    source: str = Field(default="", description="why these parts stand together")
    gpu: GpuSpec
    cpu: CpuSpec
    link: LinkSpec
    host: HostSpec

"""Models and machines as numbers, each with its source."""

from sim.spec.hardware import CpuSpec, DiskSpec, GpuSpec, HardwareSpec, HostSpec, LinkSpec
from sim.spec.model import BITS_PER_WEIGHT, ModelSpec

__all__ = ["BITS_PER_WEIGHT", "CpuSpec", "DiskSpec", "GpuSpec", "HardwareSpec", "HostSpec", "LinkSpec", "ModelSpec"]

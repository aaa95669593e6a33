"""Whether what is planned for a GPU's memory fits the card that costs are told of."""

from __future__ import annotations

from sim.memory import MemoryPlan
from sim.spec.hardware import GpuSpec
from sim.target import parse_bytes
from traces.errors import InputError

GIB, GB = 1 << 30, 10**9
"""A data sheet's gigabyte may be either; the catalogue takes the smaller one."""


def check_limit(gpu_memory: str, card: GpuSpec) -> None:
    """Raises :class:`InputError` for a limit beyond the card's memory, even if the data sheet counts in GiB."""
    excess = parse_bytes(gpu_memory, "gpu-memory") - card.memory_bytes
    if excess > _ambiguous(card):
        raise InputError(
            f"gpu-memory must fit {card.name}, which has {_shown(card.memory_bytes)} (another number: gpu.memory_gb "
            f"of hardware-set), got {gpu_memory}, {_shown(excess)} too much"
        )


def notes_on(plan: MemoryPlan, card: GpuSpec) -> list[str]:
    """What has to be told of a plan that the card does not hold; nothing where it does."""
    excess = plan.total_bytes - card.memory_bytes
    if excess <= 0:
        return []
    told = f"{_shown(plan.total_bytes)} are planned on the GPU, and {card.name} has {_shown(card.memory_bytes)}"
    if excess <= _ambiguous(card):
        return [f"{told}: it fits only if the data sheet's GB are GiB"]
    return [f"what-if: {told}, {_shown(excess)} too few"]


def _shown(size_bytes: int) -> str:
    return f"{size_bytes / GB:,.1f} GB" if size_bytes >= GB else f"{size_bytes / 1e6:,.1f} MB"


def _ambiguous(card: GpuSpec) -> float:
    """Bytes by which the card is larger if its data sheet counts in GiB."""
    return card.memory_bytes * (GIB / GB - 1)

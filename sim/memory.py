"""What a GPU's memory is given to: weights outside the experts, KV cache, staging slots, and the expert cache."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sim.spec.model import ModelSpec
from sim.systems import Budget
from traces.errors import InputError


class MemoryPlan(BaseModel):
    """Bytes on the GPU, by purpose. The KV cache is that of ``lanes`` sequences of ``context`` tokens each.

    The workspace, what a forward pass needs for a while, is counted for real runs alone. Departure from a real program:
    what the framework itself takes, such as a CUDA context, is not counted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dense_bytes: int
    kv_bytes: int
    staging_bytes: int
    experts_bytes: int
    workspace_bytes: int = 0
    lanes: int
    context: int

    @classmethod
    def of(
        cls, model: ModelSpec, budget: Budget, *, scope: str, lanes: int, context: int, workspace_bytes: int = 0
    ) -> MemoryPlan:
        """The plan of a run of ``model`` under ``budget``."""
        return cls(
            dense_bytes=model.dense_bytes,
            kv_bytes=kv_bytes(model, lanes, context),
            staging_bytes=budget.staging * model.expert_bytes,
            experts_bytes=budget.total(model.moe_layers, scope) * model.expert_bytes,
            workspace_bytes=workspace_bytes,
            lanes=lanes,
            context=context,
        )

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.dense_bytes + self.kv_bytes + self.staging_bytes + self.experts_bytes + self.workspace_bytes

    def told(self) -> str:
        """The plan in one line, in GB, or in MB where it is small."""
        unit, scale = ("GB", 1e9) if self.total_bytes >= 1e9 else ("MB", 1e6)
        parts = {
            "dense": self.dense_bytes,
            f"KV of {self.lanes} x {self.context:,} tokens": self.kv_bytes,
            "staging": self.staging_bytes,
            "experts": self.experts_bytes,
            **({"workspace": self.workspace_bytes} if self.workspace_bytes else {}),
        }
        told = " + ".join(f"{_in_units(size, scale)} {name}" for name, size in parts.items())
        return f"{self.total_bytes / scale:.2f} {unit} = {told}"


def budget_for_memory(
    memory_bytes: int, model: ModelSpec, *, scope: str, lanes: int, context: int, workspace_bytes: int = 0
) -> Budget:
    """The largest cache that fits ``memory_bytes`` beside all else that a :class:`MemoryPlan` counts.

    Raises :class:`InputError`, with the least that would do, what takes it and how much is missing, when not even one
    expert a layer (one in all, when global) fits.
    """
    sizes = {"lanes": lanes, "context": context, "workspace_bytes": workspace_bytes}
    least = MemoryPlan.of(model, Budget(slots=1), scope=scope, **sizes)
    spare = memory_bytes - least.total_bytes
    if spare < 0:
        held = f"one expert{'' if scope == 'global' else ' a layer'} of {shown_bytes(model.expert_bytes)}"
        raise InputError(
            f"gpu-memory must be at least {least.total_bytes} bytes ({least.told()}: {held}, whatever a system keeps), "
            f"got {memory_bytes}, {shown_bytes(-spare)} too few"
        )
    most = model.experts * (model.moe_layers if scope == "global" else 1)
    return Budget(slots=min(1 + spare // least.experts_bytes, most))


def shown_bytes(size_bytes: int) -> str:
    """Bytes in the largest unit of ten to the third, sixth and ninth of which there is one."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:,.2f} {unit}"
    return f"{size_bytes} B"


def _in_units(size_bytes: int, scale: float) -> str:
    """Bytes in units of ``scale``, or in smaller ones, named, where that would round to nothing."""
    if size_bytes >= 0.01 * scale or not size_bytes:
        return f"{size_bytes / scale:.2f}"
    unit, scale = ("MB", 1e6) if size_bytes >= 1e4 else ("kB", 1e3)
    return f"{size_bytes / scale:.2f} {unit}"


def kv_bytes(model: ModelSpec, lanes: int, context: int) -> int:
    """Bytes of the KV cache of ``lanes`` sequences of ``context`` tokens."""
    return lanes * context * model.kv_bytes_per_token

"""How a trace is replayed: the policy, what a pool holds, and the meaning of a hit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sim.systems import parse_capacity
from sim.target import parse_bytes
from traces.errors import InputError
from traces.schema import TraceHeader

Scope = Literal["layer", "global"]
Contract = Literal["atomic", "serial"]
UseOrder = Literal["as-routed", "ascending", "shuffled"]
Sequences = Literal["carry", "fresh"]

ORDERS: tuple[UseOrder, ...] = ("as-routed", "ascending", "shuffled")
"""Orders in which the serial contract looks up the experts of an event."""

UNSIZED = ", whose sizes the trace does not know (`moetwin trace import --expert-bytes N` gives them)"
"""What a message adds when each expert counts as 1 byte, as an import without sizes has it."""


@dataclass(frozen=True)
class Capacity:
    """What one pool holds: ``amount`` slots, or bytes. ``label`` is how it was asked for."""

    amount: int
    unit: Literal["slots", "bytes"]
    label: str

    @classmethod
    def slots(cls, text: str, header: TraceHeader, scope: Scope) -> Capacity:
        """Reads ``25%`` or ``8``: floor(f * experts), of the whole pool when global."""
        budget = parse_capacity(text, layers=header.layers, experts=header.experts, scope=scope, field="capacity")
        return cls(budget.slots, "slots", text.strip())

    @classmethod
    def bytes(cls, text: str, header: TraceHeader, scope: Scope) -> Capacity:
        """Reads ``4000MiB``, for the whole cache: a layer's pool gets an equal share, rounded down.

        Raises :class:`InputError` when a pool does not hold one expert, or more than there are.
        """
        total, sizes = parse_bytes(text, "bytes"), header.expert_bytes
        amount = total if scope == "global" else total // header.layers
        pools = "the cache" if scope == "global" else "each layer's share"
        if amount < max(sizes):
            raise InputError(f"bytes must leave {pools} room for one expert of {max(sizes)} bytes, got {amount}")
        if total > sum(sizes) * header.experts:
            rule = f"at most the {sum(sizes) * header.experts} of all experts{'' if header.sized else UNSIZED}"
            raise InputError(f"bytes must be {rule}, got {total}")
        return cls(amount, "bytes", text.strip())

    def weights(self, header: TraceHeader) -> tuple[int, ...]:
        """What a block takes of the pool, by layer."""
        return header.expert_bytes if self.unit == "bytes" else (1,) * header.layers


@dataclass(frozen=True)
class Settings:
    """One replay, but for the trace. ``seed`` is for the shuffled order and for policies that draw at random."""

    policy: str
    capacity: Capacity
    scope: Scope = "layer"
    contract: Contract = "atomic"
    order: UseOrder = "as-routed"
    sequences: Sequences = "carry"
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

"""A system: the named combination of policies that a run uses, and the capacity that it gets."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator

from sim.policies import EVICTION, PLACEMENT, PREFETCH
from traces.errors import InputError, unknown_name

STAGING_SLOTS = 2
"""Slots beside the cache through which experts that are not kept are streamed; two, so that a copy can overlap."""


class SystemSpec(BaseModel):
    """Which policies decide. Names are keys of the registries in ``sim.policies``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    evict: str = "lru"
    prefetch: str = "none"
    place: str = "fetch"
    scope: Literal["layer", "global"] = "layer"
    synchronous: bool = Field(default=False, description="demand only, one operation at a time: the mode of parity")

    @field_validator("evict", "prefetch", "place")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        known = {"evict": [*EVICTION], "prefetch": [*PREFETCH], "place": [*PLACEMENT]}[info.field_name]
        if value not in known:
            raise unknown_name(info.field_name, value, known)
        return value

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that the policies ask for, beyond the chosen experts."""
        return EVICTION[self.evict].needs | PREFETCH[self.prefetch].needs | PLACEMENT[self.place].needs

    @property
    def lookahead_depth(self) -> int:
        """Layers ahead for which predictions are needed."""
        return 0 if self.synchronous else PREFETCH[self.prefetch].depth

    def label(self) -> str:
        """Short name for tables, such as ``lru + fetch + next-router``."""
        ahead = [] if self.synchronous or self.prefetch == "none" else [self.prefetch]
        parts = [self.evict, self.place, *ahead]
        return " + ".join(parts)


class Budget(BaseModel):
    """Device slots that a run may use: ``slots`` a layer (or in all, when global) and the staging slots."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: PositiveInt
    staging: PositiveInt = STAGING_SLOTS


def parse_capacity(text: str, *, layers: int, experts: int, scope: str = "layer", field: str = "cache") -> Budget:
    """Reads a capacity such as ``25%``, ``12.5%`` or ``8`` (slots a layer; of the whole pool when global).

    A percentage means floor(f * experts). Raises :class:`InputError` for 0, above 100 %, or less than one expert.
    """
    pool = experts * (layers if scope == "global" else 1)
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)\s*(%?)\s*", text)
    if not match:
        raise InputError(f"{field} must be a number of slots or a percentage, got {text!r}")
    number, percent = Fraction(match[1]), bool(match[2])
    if not percent and number.denominator != 1:
        raise InputError(f"{field} must be a whole number of slots (or carry a %), got {text!r}")
    slots = math.floor(pool * number / 100 if percent else number)
    if not 1 <= slots <= pool or (percent and number > 100):
        raise InputError(f"{field} must be between 1 and {pool} slots, got {text.strip()} which is {slots}")
    return Budget(slots=slots)


def budget_for_memory(
    memory_bytes: int, *, layers: int, experts: int, expert_bytes: int, outside_bytes: int, scope: str = "layer"
) -> Budget:
    """The largest cache that fits ``memory_bytes`` beside ``outside_bytes`` (dense weights, KV cache, workspace).

    Raises :class:`InputError`, with the least that would do, when not even one expert a layer (one in all, when
    global) fits.
    """
    pools = 1 if scope == "global" else layers
    room = memory_bytes - outside_bytes - STAGING_SLOTS * expert_bytes
    slots = min(room // (pools * expert_bytes), experts * layers // pools)
    if slots < 1:
        least = outside_bytes + (pools + STAGING_SLOTS) * expert_bytes
        experts_held = "one expert" if scope == "global" else "one expert a layer"
        raise InputError(
            f"gpu-memory must be at least {least} bytes ({outside_bytes} outside the experts, {STAGING_SLOTS} staging "
            f"slots and {experts_held} of {expert_bytes} bytes each), got {memory_bytes}"
        )
    return Budget(slots=slots)

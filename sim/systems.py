"""A system: the named combination of policies that a run uses, and the capacity that it gets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from sim.custom import load_policy
from sim.policies import (
    EVICTION,
    PLACEMENT,
    PREFETCH,
    EvictionPolicy,
    PlacementPolicy,
    PolicyContext,
    PrefetchPolicy,
)
from sim.policies.base import Policy, check_constants
from traces.errors import InputError, unknown_name

STAGING_SLOTS = 2
"""Slots beside the cache through which experts that are not kept are streamed; two, so that a copy can overlap."""


KINDS: dict[str, Mapping[str, type[Policy]]] = {"evict": EVICTION, "prefetch": PREFETCH, "place": PLACEMENT}
"""The kinds of policies that make a system, and their registries."""

Constant: TypeAlias = bool | int | float | str


class SystemSpec(BaseModel):
    """Which policies decide, and what they need around them.

    Policies are keys of the registries in ``sim.policies``, or classes of a user's own as ``FILE.py:CLASS``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="", description="what results call it; empty: the names of its policies")
    evict: str = "lru"
    prefetch: str = "none"
    place: str = "fetch"
    scope: Literal["layer", "global"] = "layer"
    options: dict[str, dict[str, Constant]] = Field(
        default_factory=dict, description="constants of the policies, by kind: evict, prefetch, place"
    )
    slots_by_layer: Literal["even", "miss-costs"] = Field(
        default="even", description="miss-costs: split over layers by what misses cost on a calibration trace"
    )
    starts_with: str = Field(
        default="", description="the eviction policy whose set fills the cache beforehand; empty: what evict loads"
    )
    holds: Literal["cache", "two layers", "nothing"] = Field(
        default="cache", description="what of the slots is used: all as a cache, a double buffer, or none of them"
    )
    write_back: bool = Field(default=False, description="victims are copied back to the host, as a swap does")
    dense_follows: bool = Field(
        default=False, description="a layer that is not loaded whole runs on the CPU, attention too"
    )
    synchronous: bool = Field(default=False, description="demand only, one operation at a time: the mode of parity")

    @field_validator("evict", "prefetch", "place")
    @classmethod
    def _known(cls, value: str, info: Any) -> str:
        _policy(info.field_name, value)
        return value

    @field_validator("starts_with")
    @classmethod
    def _known_start(cls, value: str) -> str:
        if value and not loads_beforehand(value):
            raise InputError(f"starts_with must be an eviction policy that loads something beforehand, got {value!r}")
        return value

    @model_validator(mode="after")
    def _known_options(self) -> SystemSpec:
        for kind, constants in self.options.items():
            if kind not in KINDS:
                raise unknown_name("options", kind, KINDS)
            defaults = self.policy(kind).defaults
            for constant in constants:
                if constant not in defaults:
                    raise no_constant(kind, getattr(self, kind), constant, defaults)
            _accepted(f"options.{kind}", check_constants, constants, defaults)
        _accepted("options.prefetch", self.policy("prefetch").depth, self.options_of("prefetch"))
        if loads_beforehand(self.evict) and (self.starts_with or self.slots_by_layer != "even"):
            raise InputError(
                f"starts_with and slots_by_layer must be left out for {self.evict}, which has a set of its own"
            )
        if self.slots_by_layer != "even" and self.scope != "layer":
            raise InputError(f"scope must be layer with slots_by_layer {self.slots_by_layer}, got {self.scope}")
        if self.deferral and self.dense_follows:
            raise InputError(f"defer must be 0 with dense_follows, got {self.deferral}")
        if self.holds != "cache" and self.scope != "global":
            raise InputError(f"scope must be global where a system holds {self.holds}, got {self.scope}")
        return self

    def policy(self, kind: str) -> type[Any]:
        """The class of its policy of a kind, a key of :data:`KINDS`."""
        return _policy(kind, getattr(self, kind))

    def options_of(self, kind: str) -> dict[str, Constant]:
        """The constants that its policy of a kind is given, beside its defaults."""
        return self.options.get(kind, {})

    def eviction(self, context: PolicyContext) -> EvictionPolicy:
        """Its eviction policy, made for a run; raises :class:`InputError` for constants that it refuses."""
        return cast(EvictionPolicy, self._made("evict", context))

    def first_set(self, context: PolicyContext) -> EvictionPolicy | None:
        """The policy whose set fills the cache beforehand, if it is not its eviction policy."""
        return _policy("evict", self.starts_with)(context) if self.starts_with else None

    def placement(self, context: PolicyContext) -> PlacementPolicy:
        """Its placement policy, as :meth:`eviction`."""
        return cast(PlacementPolicy, self._made("place", context))

    def prefetching(self, context: PolicyContext) -> PrefetchPolicy:
        """Its prefetch policy, as :meth:`eviction`."""
        return cast(PrefetchPolicy, self._made("prefetch", context))

    def _made(self, kind: str, context: PolicyContext) -> Any:
        try:
            return self.policy(kind)(replace(context, options=self.options_of(kind)))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{kind} {getattr(self, kind)}: {error}") from error

    @property
    def needs(self) -> frozenset[str]:
        """Inputs that the policies ask for, beyond the chosen experts."""
        of_policies = frozenset[str]().union(*(self.policy(kind).needs for kind in KINDS))
        if self.starts_with:
            of_policies |= _policy("evict", self.starts_with).needs
        of_policies |= {"gates"} if self.deferral else set()
        return of_policies | ({"calibration"} if self.slots_by_layer == "miss-costs" else set())

    def needing(self, need: str) -> str:
        """The name of the policy (or of the field) that asks for ``need``."""
        return next(
            (getattr(self, kind) for kind in KINDS if need in self.policy(kind).needs),
            self.starts_with or f"slots_by_layer {self.slots_by_layer}",
        )

    @property
    def deferral(self) -> int:
        """Experts of a token, those with the lowest gates, that may join the next layer's output; 0: none."""
        deferred: int = self.policy("place").defers(self.options_of("place"))
        return deferred

    @property
    def lookahead_depth(self) -> int:
        """Layers ahead for which predictions are needed."""
        depth: int = self.policy("prefetch").depth(self.options_of("prefetch"))
        return 0 if self.synchronous else depth

    def label(self) -> str:
        """Short name for tables: its own, or such as ``lru + fetch + next-router``."""
        if self.name:
            return self.name
        ahead = [] if self.synchronous or self.prefetch == "none" else [self.prefetch]
        parts = [self.evict, self.place, *ahead]
        constants = [f"{kind}.{name} {value}" for kind, own in self.options.items() for name, value in own.items()]
        told = f" with {', '.join(constants)}" if constants else ""
        return " + ".join(part.rpartition(":")[2] for part in parts) + told


def loads_beforehand(evict: str) -> bool:
    """Whether an eviction policy brings a set that is loaded before the first step."""
    found: bool = _policy("evict", evict).preload is not EvictionPolicy.preload
    return found


def _accepted(field: str, check: Callable[..., Any], *constants: Any) -> None:
    """Raises :class:`InputError`, which names ``field``, for constants that ``check`` refuses."""
    try:
        check(*constants)
    except ValueError as error:
        raise InputError(f"{field}: {error}") from error


def _policy(kind: str, name: str) -> type[Any]:
    """The class that ``name`` means, of a registry or of a user's file."""
    if ":" in name:
        return load_policy(name, kind)
    if name not in KINDS[kind]:
        raise unknown_name(kind, name, KINDS[kind])
    found: type[Any] = KINDS[kind][name]
    return found


def no_constant(kind: str, policy: str, constant: str, defaults: Mapping[str, Any]) -> InputError:
    """The error for a constant that a policy does not have."""
    if not defaults:
        return InputError(f"options.{kind} must be left out for {policy}, which has none, got {constant}")
    return unknown_name(f"options.{kind}", constant, defaults)


class Budget(BaseModel):
    """Device slots that a run may use: ``slots`` a layer (or in all, when global) and the staging slots.

    ``by_layer`` gives each layer its own number in place of ``slots``, which is then their mean, rounded down. Without
    slots nothing is kept: every expert passes through the staging slots.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: NonNegativeInt
    staging: PositiveInt = STAGING_SLOTS
    by_layer: tuple[NonNegativeInt, ...] = ()
    host_slots: PositiveInt | None = Field(
        default=None, description="experts that the host's memory holds, above a disk that holds all; None: all"
    )

    def total(self, layers: int, scope: str) -> int:
        """Slots in all, staging slots apart."""
        return sum(self.by_layer) or self.slots * (1 if scope == "global" else layers)


def parse_capacity(text: str, *, layers: int, experts: int, scope: str = "layer", field: str = "cache") -> Budget:
    """Reads a capacity such as ``25%``, ``12.5%`` or ``8`` (slots a layer; of the whole pool when global).

    A percentage means floor(f * experts). Raises :class:`InputError` for 0, above 100 %, or less than one expert.
    """
    pool = experts * (layers if scope == "global" else 1)
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,9})?)\s*(%?)\s*", text)
    if not match:
        raise InputError(f"{field} must be a number of slots or a percentage, got {text!r}")
    number, percent = Fraction(match[1]), bool(match[2])
    if not percent and number.denominator != 1:
        raise InputError(f"{field} must be a whole number of slots (or carry a %), got {text!r}")
    slots = math.floor(pool * number / 100 if percent else number)
    if percent and number > 100:
        raise InputError(f"{field} must be at most 100%, got {text.strip()}")
    if not 1 <= slots <= pool:
        got = f"{text.strip()} which is {slots}" if percent else text.strip()
        raise InputError(f"{field} must be between 1 and {pool} slots, got {got}")
    return Budget(slots=slots)

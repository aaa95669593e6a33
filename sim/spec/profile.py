"""A calibrated profile: what pieces of work took on one machine, for one model's dimensions, with their spread."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from sim.spec.catalogue import first_fault
from sim.spec.hardware import HostSpec
from sim.spec.model import ModelSpec
from traces.errors import InputError
from traces.paths import whole_file

PROFILE_VERSION = 1


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


POINTS = ("copies", "gpu_expert", "cpu_expert_first", "cpu_expert_later", "head")
"""Fields of a profile that are points by size."""


class Point(_Table):
    """Seconds of one piece of work: ``value_s`` is what predictions use, median and p90 show the spread."""

    size: NonNegativeInt = Field(description="tokens of an expert, bytes of a copy, lanes of the head")
    value_s: NonNegativeFloat
    median_s: NonNegativeFloat
    p90_s: NonNegativeFloat
    repeats: PositiveInt

    def slow(self) -> Point:
        """The same at its 90th percentile."""
        return self.model_copy(update={"value_s": max(self.value_s, self.p90_s)})


class DensePoint(_Table):
    """Seconds of a layer's dense part for ``tokens``, as ``base_s + per_context_s * context``."""

    tokens: PositiveInt
    base_s: NonNegativeFloat
    per_context_s: NonNegativeFloat
    least_context: PositiveInt
    most_context: PositiveInt
    p90_s: NonNegativeFloat
    repeats: PositiveInt

    def slow(self) -> DensePoint:
        """The same where a layer in the middle of the measured contexts takes its 90th percentile."""
        context = (self.least_context + self.most_context) / 2
        rise_s = max(0.0, self.p90_s - self.base_s - self.per_context_s * context)
        return self.model_copy(update={"base_s": self.base_s + rise_s})


class Slowdown(_Table):
    """Factor by which work on ``resource`` takes longer while ``others`` are busy."""

    resource: str
    others: tuple[str, ...]
    factor: float = Field(ge=1.0)


class Planning(_Table):
    """Seconds a layer that the host takes to decide with one policy, beyond the plainest of its kind.

    Of the kind :data:`TOGETHER` are the policies of a whole system, which may cost each other more than their sum.
    """

    kind: str
    policy: str
    layer_s: NonNegativeFloat
    expert_s: NonNegativeFloat = Field(
        default=0.0, description="more for each of a layer's distinct experts beyond those of one token"
    )

    @model_serializer(mode="wrap")
    def _told(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Profiles without the later field keep their digest."""
        told: dict[str, Any] = fields(self)
        return told if self.expert_s else {name: value for name, value in told.items() if name != "expert_s"}


TOGETHER = "system"
"""Kind of a :class:`Planning` whose policy is :func:`sim.profile.decided_by` of a system."""


class Pool(_Table):
    """Copies and GPU experts where a run has no more than ``slots``: so few may stay in a processor's cache."""

    slots: PositiveInt
    copies: tuple[Point, ...] = Field(min_length=1)
    gpu_expert: tuple[Point, ...] = Field(min_length=1)


Direction = Literal["to-device", "to-host"]
Memory = Literal["pinned", "pageable"]
TO_DEVICE: Direction = "to-device"
TO_HOST: Direction = "to-host"


class Transfers(_Table):
    """Seconds of single copies by bytes, between the device and one kind of the host's memory: alone, or beside work
    that keeps the GPU busy."""

    direction: Direction
    memory: Memory
    beside_gpu: bool
    points: tuple[Point, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _usable(self) -> Transfers:
        _check_ascending("transfers", [point.size for point in self.points])
        if not all(point.value_s for point in self.points):
            raise ValueError("transfers must take longer than 0 s, got 0")
        return self


class CpuThreads(_Table):
    """Seconds of one CPU expert by tokens, with that many threads."""

    threads: PositiveInt
    points: tuple[Point, ...] = Field(min_length=1)


LATER = ("transfers", "experts_pinned", "cpu_by_threads", "cpu_threads")
"""Fields that count for a digest only where they say something: profiles without them keep theirs."""


class Profile(_Table):
    """One machine, one model's dimensions, one device. Times are seconds."""

    profile_version: int = PROFILE_VERSION
    name: str
    device: str
    date: str
    machine: dict[str, str]
    model: ModelSpec
    host: HostSpec
    copies: tuple[Point, ...] = Field(min_length=1)
    gpu_expert: tuple[Point, ...] = Field(min_length=1)
    cpu_expert_first: tuple[Point, ...] = Field(min_length=1)
    cpu_expert_later: tuple[Point, ...] = Field(min_length=1)
    dense: tuple[DensePoint, ...] = Field(min_length=1)
    head: tuple[Point, ...] = Field(min_length=1)
    lookahead_s: NonNegativeFloat
    chunk_bytes: NonNegativeInt = Field(default=0, description="a demand overtakes a prefetch between two; 0: whole")
    small_pool: Pool | None = Field(default=None, description="what is quicker in a run of few slots")
    slowdowns: tuple[Slowdown, ...] = ()
    planning: tuple[Planning, ...] = Field(default=(), description="none for a policy: it counts as the plainest")
    transfers: tuple[Transfers, ...] = Field(default=(), description="none: a copy back is as fast as one there")
    experts_pinned: bool = Field(default=False, description="whether the experts were in pinned memory")
    cpu_by_threads: tuple[CpuThreads, ...] = ()
    cpu_threads: PositiveInt | None = Field(default=None, description="that a CPU expert had; none: not known")
    notes: tuple[str, ...] = Field(default=(), description="what is doubtful about these numbers")
    token_s: NonNegativeFloat = Field(description="mean measured seconds of a decode token in the calibration runs")

    @model_validator(mode="after")
    def _usable(self) -> Profile:
        if self.profile_version != PROFILE_VERSION:
            raise ValueError(f"profile_version must be {PROFILE_VERSION}, got {self.profile_version}")
        for name in POINTS:
            _check_ascending(name, [point.size for point in getattr(self, name)])
        _check_ascending("dense", [point.tokens for point in self.dense])
        return self

    @property
    def digest(self) -> str:
        """SHA-256 of the content: a result names the profile that it was computed with."""
        empty = {name for name in LATER if not getattr(self, name)}
        content = json.dumps(self.model_dump(mode="json", exclude=empty), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def transfer_points(self, direction: Direction) -> tuple[Point, ...]:
        """Copies alone between the device and where the experts are; empty where they were not measured."""
        memory: Memory = "pinned" if self.experts_pinned else "pageable"
        wanted = (direction, memory, False)
        tables = (one for one in self.transfers if (one.direction, one.memory, one.beside_gpu) == wanted)
        return next((one.points for one in tables), ())

    def slow(self) -> Profile:
        """The same machine where every measured piece of work takes its 90th percentile."""
        fields = {name: tuple(point.slow() for point in getattr(self, name)) for name in (*POINTS, "dense")}
        return self.model_copy(update=fields)

    def save(self, path: Path, *, force: bool = False) -> None:
        """Writes TOML, whole or not at all; raises :class:`InputError` for a file that exists, without ``force``."""
        if path.exists() and not force:
            raise InputError(f"out must be a new file (or give --force), got {path}")
        with whole_file(path) as draft:
            draft.write_text(tomli_w.dumps(self.model_dump(mode="json", exclude_none=True)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Profile:
        """Reads what :meth:`save` wrote; raises :class:`InputError` naming the file and what is wrong with it."""
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise InputError(f"profile must be readable, got {path} ({error.strerror})") from error
        except ValidationError as error:
            raise InputError(f"{path}: {first_fault(error)}") from error
        except ValueError as error:
            raise InputError(f"profile must be TOML, got {path} ({error})") from error


def _check_ascending(name: str, sizes: Sequence[int]) -> None:
    for one, other in pairwise(sizes):
        if other <= one:
            raise ValueError(f"{name} must be in ascending order of size, got {other} after {one}")

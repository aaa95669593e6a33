"""What every importer is given, and what it hands back.

Shapes: n tokens of a part, L MoE layers, K experts a token, E experts a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from traces.known import KnownModel
from traces.schema import Array, Phase, TraceError

Advance = Callable[[int], None]
"""Told how many bytes of the files, as they lie on disk, were read since the last call."""

DIMENSIONS = ("layers", "experts", "top_k")
"""What a user may say only when no file says otherwise."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user says about a trace; None where the files decide."""

    layers: int | None = None
    experts: int | None = None
    top_k: int | None = None
    expert_bytes: tuple[int, ...] | None = None  # one entry, or one a layer
    model: str | None = None
    dtype: str | None = None
    licence: str | None = None
    prefill_as_batch: bool = False
    drop_identical_rows: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Consecutive tokens of the trace to be; steps and sequences are numbered within the part."""

    expert_ids: Array  # uint16 [n, L, K]
    position: Array  # [n]
    step: Array  # [n], not decreasing
    phase: Array  # [n]
    sequence: Array  # [n]
    sequences: int = 1  # more than the largest entry of ``sequence``
    token_ids: Array | None = None  # [n]
    gates: Array | None = None  # float16 [n, L, K]
    scores: Array | None = None  # float16 [n, L, E]
    domains: tuple[str, ...] = ()  # of each sequence of the part, or none
    residency: dict[str, Array] | None = None  # another engine's record, by column; ``token`` counts within the part

    @classmethod
    def one_sequence(cls, expert_ids: Array, *, phase: Phase, as_batch: bool = False, **more: Any) -> Part:
        """The tokens of one sequence, one forward pass each, or all in one when ``as_batch``."""
        tokens = len(expert_ids)
        return cls(
            expert_ids=expert_ids,
            position=more.pop("position", np.arange(tokens)),
            step=np.zeros(tokens, dtype=np.int32) if as_batch else np.arange(tokens),
            phase=np.full(tokens, phase),
            sequence=np.zeros(tokens, dtype=np.int32),
            **more,
        )


@dataclass(slots=True, eq=False)
class Job:
    """One import under way: the files, what the user said, and what the files turn out to say."""

    files: list[Path]
    options: Options
    advance: Advance
    catalogue: Mapping[str, KnownModel] = field(default_factory=dict)
    family: str = ""  # how the names of the models begin that the format was made for
    facts: dict[str, Any] = field(default_factory=dict)  # fields of the header
    notes: list[str] = field(default_factory=list)  # what was assumed, for the user to read
    _told_by: dict[str, Path] = field(default_factory=dict)

    def say(self, name: str, value: Any, file: Path) -> None:
        """``file`` says that ``name`` of the header is ``value``; raises TraceError when another one says otherwise.

        So it does when the user says otherwise of one of :data:`DIMENSIONS`.
        """
        told = getattr(self.options, name) if name in DIMENSIONS else None
        if told not in (None, value):
            raise TraceError(f"{name} must be {value}, as {file} has it, or be left out, got {told}")
        first = self._told_by.setdefault(name, file)
        if self.facts.setdefault(name, value) != value:
            raise TraceError(f"{file}: {name} must be {self.facts[name]}, as in {first}, got {value}")

    def dimension(self, name: str) -> int | None:
        """A dimension as a file or the user has it, None where it is still open."""
        value: int | None = self.facts.get(name, getattr(self.options, name))
        return value


@dataclass(frozen=True, slots=True)
class Importer:
    """One public format."""

    read: Callable[[Job], Iterator[Part]]
    patterns: tuple[str, ...]  # names of its files in a folder
    about: str
    prompts_only: bool = False  # it does not say which tokens ran together: --prefill-as-batch does
    in_folders: bool = False  # its files lie in folders below the one that is named
    family: str = ""  # of the models that it was made for, whose names begin so

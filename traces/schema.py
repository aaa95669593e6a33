"""The routing trace: which experts every token was sent to, in which forward pass, and how that is checked.

Shapes: T tokens, L MoE layers, K experts a token, E experts a layer, D look-ahead depth.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from traces.errors import InputError
from traces.limits import MOST_EXPERT_BYTES
from traces.router_means import unpacked

SCHEMA_VERSION = 1
NOT_ROUTED = 65535
"""Value of ``expert_ids`` where a token was not sent to any expert (a dropped or padded place)."""

WeightDtype = Literal["float32", "bfloat16", "float16", "fp32", "bf16", "fp16"]
"""Types of weights that a header may name, long or short."""

CHUNK_ELEMENTS = 4_000_000
"""Elements of a large array that a check looks at together: it bounds the memory that checking takes."""

Array = npt.NDArray[Any]


class TraceError(InputError):
    """A trace breaks a rule of the schema; the message names the tensor, the rule and the value."""


class Phase(IntEnum):
    """The phase of inference that a token ran in."""

    PREFILL = 0
    DECODE = 1


LookaheadRouter = Literal["plain", "residual"]
"""Which router predicts later layers."""


class TraceHeader(BaseModel):
    """Provenance and dimensions of a trace; stored as JSON beside the arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    model: str = Field(min_length=1, description="name of the model, or of the generator")
    revision: str = Field(default="", description="digest or version of the model's weights")
    layers: PositiveInt
    experts: PositiveInt = Field(lt=NOT_ROUTED)
    top_k: PositiveInt
    expert_bytes: tuple[Annotated[NonNegativeInt, Field(le=MOST_EXPERT_BYTES)], ...] = Field(
        description="bytes of one expert, for each MoE layer"
    )
    dtype: WeightDtype = Field(default="float32", description="dtype of the weights that expert_bytes counts")
    made_by: str = Field(default="", description="command or generator with its parameters")
    synthetic: bool = False
    domains: tuple[str, ...] = Field(default=(), description="domain of each sequence id, in order; may be empty")
    prompts_digest: str = ""
    software: dict[str, str] = Field(default_factory=dict)
    licence: str = ""
    lookahead_router: LookaheadRouter = Field(
        default="plain", description="what the later routers read: the layer's own input, or that plus mean residuals"
    )
    router_means: str = Field(
        default="", description="with residual: the mean input of each router on other prompts, float16 in base64"
    )

    @classmethod
    def of(cls, values: Any) -> TraceHeader:
        """Builds a header from ``values`` as JSON gives them; raises :class:`TraceError` with one line."""
        version = values.get("schema_version", SCHEMA_VERSION) if isinstance(values, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise TraceError(f"schema_version must be {SCHEMA_VERSION} (the only one read here), got {version!r}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise TraceError(_one_line(error)) from error

    @property
    def sized(self) -> bool:
        """Whether the bytes of the experts are known: a recording that does not tell them counts each expert as 1."""
        return {*self.expert_bytes} != {1}

    @property
    def means(self) -> Array | None:
        """The mean input of each router, float32 [L, H], by which look-ahead was corrected; None where not told."""
        return unpacked(self.router_means, self.layers) if self.router_means else None

    @model_validator(mode="after")
    def _consistent(self) -> TraceHeader:
        if self.schema_version != SCHEMA_VERSION:
            raise ValueError(f"schema_version must be {SCHEMA_VERSION}, got {self.schema_version}")
        if self.top_k > self.experts:
            raise ValueError(f"top_k must be at most experts ({self.experts}), got {self.top_k}")
        if len(self.expert_bytes) != self.layers:
            raise ValueError(f"expert_bytes must have one entry a layer ({self.layers}), got {len(self.expert_bytes)}")
        if self.router_means:
            unpacked(self.router_means, self.layers)
        return self


def _one_line(error: ValidationError) -> str:
    """The first complaint of pydantic, worded as ``FIELD must RULE, got VALUE``."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "header"
    if first["type"] == "missing":
        return f"{field} must be given, got nothing"
    if first["type"] == "extra_forbidden":
        return f"header must have no other field than {', '.join(TraceHeader.model_fields)}, got {field}"
    if first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ")
    return f"{field} {first['msg'].replace('Input should', 'must')}, got {first['input']!r}"


@dataclass(frozen=True, eq=False)
class Trace:
    """A recorded (or generated) routing trace. Rows are tokens, in the order in which they were computed.

    A row belongs to one forward pass (``step``, non-decreasing), one ``sequence`` and one ``position`` in it; a
    sequence's prefill rows come before its decode rows. Build one from arrays of any integer or float type with
    :meth:`of`, which casts, and checks every rule. Two traces have equal content when their digests are equal.
    """

    header: TraceHeader
    expert_ids: Array  # uint16 [T, L, K], NOT_ROUTED where a token was not routed
    token_ids: Array  # int32 [T]
    sequence: Array  # int32 [T]
    position: Array  # int32 [T]
    step: Array  # int32 [T]
    phase: Array  # uint8 [T]
    gates: Array | None = None  # float16 [T, L, K], the weights that the chosen experts' outputs got
    scores: Array | None = None  # float16 [T, L, E], the router's full softmax
    lookahead: Array | None = None  # uint16 [T, L, D, K], routers of layers l+1..l+D on layer l's hidden state

    @classmethod
    def of(cls, header: TraceHeader, **arrays: Any) -> Trace:
        """Casts ``arrays`` to the schema's types, checks them, and returns the trace; raises :class:`TraceError`."""
        cast = {name: _cast(name, value) for name, value in arrays.items() if value is not None}
        for name in REQUIRED:
            if name not in cast:
                raise TraceError(f"{name} must be given, got nothing")
        trace = cls(header=header, **cast)
        trace.check()
        return trace

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """Yields (name, array) for every array that the trace has, in the order of the schema."""
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value is not None:
                yield field.name, value

    def __len__(self) -> int:
        return int(self.expert_ids.shape[0])

    @property
    def lookahead_depth(self) -> int:
        """Layers that ``lookahead`` predicts ahead, 0 when the trace has none."""
        return 0 if self.lookahead is None else int(self.lookahead.shape[2])

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the dimensions and all arrays: equal content gives an equal digest, whoever recorded it."""
        sha = hashlib.sha256()
        dims = self.header.model_dump(include={"schema_version", "layers", "experts", "top_k", "expert_bytes"})
        sha.update(json.dumps(dims, sort_keys=True).encode())
        for name, array in self.arrays():
            sha.update(f"{name} {array.dtype} {array.shape}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def check_shapes(self) -> None:
        """Raises :class:`TraceError` unless every array has the shape and the type of the schema; reads no data."""
        _check_shapes(self)

    def check(self) -> None:
        """Raises :class:`TraceError` unless shapes, types, ranges and the order of rows are as the schema says.

        The arrays of three and four dimensions are looked at in chunks, so that a trace larger than memory is fine.
        """
        _check_shapes(self)
        _check_rows(self)
        for name, array in self.arrays():
            if name in ("expert_ids", "lookahead"):
                _check_ids(name, array, self.header.experts)
            elif name in ("gates", "scores"):
                _check_weights(name, array)
        if self.lookahead is not None:
            _check_beyond(self.lookahead)


DTYPES: dict[str, type[np.generic]] = {
    "expert_ids": np.uint16,
    "token_ids": np.int32,
    "sequence": np.int32,
    "position": np.int32,
    "step": np.int32,
    "phase": np.uint8,
    "gates": np.float16,
    "scores": np.float16,
    "lookahead": np.uint16,
}
"""The stored type of every array of the schema."""

REQUIRED = ("expert_ids", "token_ids", "sequence", "position", "step", "phase")
"""The arrays that every trace has."""


def _cast(name: str, value: Any) -> Array:
    if name not in DTYPES:
        raise TraceError(f"array must be one of {', '.join(DTYPES)}, got {name}")
    target = np.dtype(DTYPES[name])
    try:
        array = np.asarray(value)
        whole = target.kind == "f" or array.dtype.kind in "iub" or _all_whole(array)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{name} must be an array of numbers, got {type(value).__name__}: {error}") from error
    if not whole:
        raise TraceError(f"{name} must hold whole numbers, got {array.dtype} with others among them")
    if target.kind in "iu" and array.size and array.dtype != target:
        low, high, info = int(array.min()), int(array.max()), np.iinfo(target)
        if low < info.min or high > info.max:
            raise TraceError(f"{name} must fit {target}, got values from {low} to {high}")
    with np.errstate(over="ignore"):  # an overflow becomes infinite, which the check of the range reports
        return array.astype(target, copy=False)


def _all_whole(array: Array) -> bool:
    return bool(np.isfinite(array).all() and (array == np.trunc(array)).all())


def _check_shapes(trace: Trace) -> None:
    header = trace.header
    tokens = len(trace) if trace.expert_ids.ndim else 0
    if not tokens:
        raise TraceError("expert_ids must have at least one token, got 0")
    ahead = trace.lookahead
    depth = ahead.shape[2] if ahead is not None and ahead.ndim == 4 and ahead.shape[2] else "at least 1"
    expected: dict[str, tuple[Any, ...]] = {
        "expert_ids": (tokens, header.layers, header.top_k),
        "gates": (tokens, header.layers, header.top_k),
        "scores": (tokens, header.layers, header.experts),
        "lookahead": (tokens, header.layers, depth, header.top_k),
    }
    for name, array in trace.arrays():
        shape = expected.get(name, (tokens,))
        if array.shape != shape:
            raise TraceError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
        if array.dtype != DTYPES[name]:
            raise TraceError(f"{name} must be {np.dtype(DTYPES[name])}, got {array.dtype}")


def _chunks(array: Array) -> Iterator[tuple[int, Array]]:
    """Yields (first row, rows) so that no piece has more than about :data:`CHUNK_ELEMENTS` elements."""
    rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


def _first(wrong: Array, start: int) -> tuple[int, ...] | None:
    """The first place where ``wrong`` is true, its row counted from ``start``, or None."""
    if not wrong.any():
        return None
    place = np.unravel_index(int(wrong.argmax()), wrong.shape)
    return (start + int(place[0]), *(int(i) for i in place[1:]))


def _check_ids(name: str, ids: Array, experts: int) -> None:
    for start, chunk in _chunks(ids):
        place = _first((chunk >= experts) & (chunk != NOT_ROUTED), start)
        if place is not None:
            raise TraceError(f"{name} must be below {experts} (or {NOT_ROUTED}), got {ids[place]} at {list(place)}")
        ordered = np.sort(chunk, axis=-1)
        place = _first((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] != NOT_ROUTED), start)
        if place is not None:
            twice = ordered[(place[0] - start, *place[1:])]
            raise TraceError(f"{name} must be distinct within a token, got {twice} twice at {list(place[:-1])}")


def _check_beyond(lookahead: Array) -> None:
    """There is no layer beyond the last one to predict: the entries of layer l, depth d with l + d >= L are empty."""
    layers, depth = lookahead.shape[1:3]
    beyond = (np.arange(layers)[:, None] + np.arange(1, depth + 1) >= layers)[..., None]
    for start, chunk in _chunks(lookahead):
        place = _first(beyond & (chunk != NOT_ROUTED), start)
        if place is not None:
            raise TraceError(
                f"lookahead must be {NOT_ROUTED} beyond the last layer, got {lookahead[place]} at {list(place)}"
            )


def _check_rows(trace: Trace) -> None:
    if trace.phase.max() > max(Phase):
        raise TraceError(f"phase must be 0 (prefill) or 1 (decode), got {int(trace.phase.max())}")
    for name in ("token_ids", "sequence", "position", "step"):
        if getattr(trace, name).min() < 0:
            raise TraceError(f"{name} must be at least 0, got {int(getattr(trace, name).min())}")
    back = np.flatnonzero(np.diff(trace.step) < 0)
    if back.size:
        row = int(back[0]) + 1
        raise TraceError(f"step must not decrease, got {trace.step[row]} after {trace.step[row - 1]} at token {row}")
    _check_positions(trace)
    domains = len(trace.header.domains)
    if domains and int(trace.sequence.max()) >= domains:
        raise TraceError(f"sequence must be below the {domains} domains of the header, got {int(trace.sequence.max())}")


def _check_positions(trace: Trace) -> None:
    order = np.argsort(trace.sequence, kind="stable")
    same = trace.sequence[order][1:] == trace.sequence[order][:-1]
    jump = np.flatnonzero(same & (np.diff(trace.position[order]) != 1))
    if jump.size:
        row = int(order[jump[0] + 1])
        raise TraceError(
            f"position must count up by one within a sequence, got {trace.position[row]} at token {row} "
            f"of sequence {trace.sequence[row]}"
        )
    phase = trace.phase[order]
    back = np.flatnonzero(same & (phase[1:] < phase[:-1]))
    if back.size:
        row = int(order[back[0] + 1])
        raise TraceError(
            f"phase must not return to prefill within a sequence, got 0 after 1 at token {row} "
            f"of sequence {trace.sequence[row]}"
        )


def _check_weights(name: str, weights: Array) -> None:
    for start, chunk in _chunks(weights):
        place = _first(~np.isfinite(chunk) | (chunk < 0), start)
        if place is not None:
            raise TraceError(f"{name} must be finite and at least 0, got {weights[place]} at {list(place)}")

"""Which model a trace is run on: its own, or another with the same layers, experts and top-k."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from sim.memory import budget_for_memory
from sim.spec import BITS_PER_WEIGHT, ModelSpec, catalogue
from sim.systems import Budget, parse_capacity
from traces.batching import BatchSpec, Requests, schedule_of
from traces.errors import InputError
from traces.schema import Trace, WeightDtype
from traces.workload import Workload, lock_step, sequence_rows

DTYPE_OF: dict[WeightDtype, str] = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "fp32": "fp32",
    "bf16": "bf16",
    "fp16": "fp16",
}
"""All dtypes that a trace's header may have, as the specs name them."""

_SIZES = {"": 1, "B": 1} | {
    f"{letter}{kind}": base**power
    for power, letter in enumerate("KMGT", 1)
    for kind, base in (("B", 1000), ("IB", 1024))
}
"""Bytes of a unit, by its name in capitals."""


def model_for(trace: Trace, name: str | None = None, quant: str | None = None) -> ModelSpec:
    """The model to run ``trace`` on: ``name`` of the catalogue or a TOML file, or the trace's own, in the trace's
    dtype unless its experts have the bytes that the catalogue gives them.

    ``quant`` is the format of the routed experts. Raises :class:`InputError` when the model is unknown.
    """
    if quant is not None and quant not in BITS_PER_WEIGHT:
        raise InputError(f"quant must be one of {', '.join(BITS_PER_WEIGHT)}, got {quant!r}")
    if name is None and trace.header.model not in catalogue.model_names():
        raise InputError(
            f"model must be given (--model, a catalogue name or a TOML file) for a trace of {trace.header.model!r}, "
            "which is not in the catalogue"
        )
    spec = catalogue.find_model(name or trace.header.model)
    if spec.name == trace.header.model and {*trace.header.expert_bytes} != {spec.expert_bytes}:
        spec = spec.in_dtype(DTYPE_OF[trace.header.dtype])
    return spec if quant is None else spec.with_experts_in(quant)


def retarget(trace: Trace, spec: ModelSpec) -> Trace:
    """The same routing with the expert bytes of ``spec``; the trace itself when nothing changes.

    Raises :class:`InputError` unless layers, experts and top-k agree.
    """
    header = trace.header
    for field, wanted in (("layers", spec.moe_layers), ("experts", spec.experts), ("top_k", spec.top_k)):
        if getattr(header, field) != wanted:
            raise InputError(f"trace {field} must be {wanted} as in {spec.name}, got {getattr(header, field)}")
    sizes = (spec.expert_bytes,) * spec.moe_layers
    if header.expert_bytes == sizes and header.model == spec.name:
        return trace
    return replace(trace, header=header.model_copy(update={"expert_bytes": sizes, "model": spec.name}))


def budget_of(
    spec: ModelSpec,
    *,
    lanes: int,
    context: int,
    cache: str | None,
    gpu_memory: str | None,
    scope: str,
    workspace_bytes: int = 0,
) -> Budget:
    """The slots of a run: from ``cache`` (such as 25% or 8), or what fits ``gpu_memory`` (such as 8GiB).

    The memory also holds the weights outside the experts, the KV cache of ``lanes`` sequences of ``context`` tokens,
    the staging slots, and ``workspace_bytes``. One pool for all layers gets as many slots as the layers' own would be,
    so that systems of either kind compare. Raises :class:`InputError` when both are given, or nothing fits.
    """
    if cache is not None and gpu_memory is not None:
        raise InputError(f"cache must not be given together with gpu-memory, got {cache} and {gpu_memory}")
    if gpu_memory is None:
        return parse_capacity(
            "25%" if cache is None else cache, layers=spec.moe_layers, experts=spec.experts, scope=scope
        )
    found = budget_for_memory(
        parse_bytes(gpu_memory, "gpu-memory"),
        spec,
        scope=scope,
        lanes=lanes,
        context=context,
        workspace_bytes=workspace_bytes,
    )
    rest = found.slots % spec.moe_layers if scope == "global" and found.slots > spec.moe_layers else 0
    return found.model_copy(update={"slots": found.slots - rest})


def plan_of(trace: Trace, spec: ModelSpec, batching: BatchSpec) -> tuple[Workload | Requests, int, int]:
    """What of ``trace`` is run on the model ``spec``; the lanes that this takes at most, and the longest KV cache."""
    plan = schedule_of(retarget(trace, spec), batching)
    if isinstance(plan, Requests):
        return plan, min(plan.batch, len(sequence_rows(trace))), plan.context
    return plan, lanes_of(plan), max(step.context for step in plan)


def workload_of(trace: Trace, spec: ModelSpec, batch: int) -> tuple[Workload, int]:
    """The forward passes of ``trace`` on the model ``spec``, and the tokens of its longest KV cache."""
    workload = lock_step(retarget(trace, spec), batch)
    return workload, max(step.context for step in workload)


def lanes_of(workload: Workload) -> int:
    """Sequences that run at the same time, at the most: fewer than its batch where the trace has fewer."""
    return max(len(step.sequences) for step in workload)


def parse_bytes(text: str, field: str) -> int:
    """Reads a size such as ``8GiB``, ``500 MB`` or ``1048576``; GiB are powers of two, GB of ten.

    Raises :class:`InputError` for anything else, and for more than 18 digits.
    """
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _SIZES:
        raise InputError(f"{field} must be a size such as 8GiB or 500MB, got {text!r}")
    return int(Fraction(match[1]) * _SIZES[match[2].upper()])

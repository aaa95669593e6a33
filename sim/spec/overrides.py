"""A user's own numbers in place of a catalogue's, each one marked as theirs in the source and in the name."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from sim.spec.faults import first_fault
from sim.spec.hardware import CpuSpec, DiskSpec, GpuSpec, HardwareSpec, HostSpec, LinkSpec
from sim.spec.model import ModelSpec
from traces.errors import InputError, unknown_name
from traces.limits import MOST_EXPERT_BYTES

Value: TypeAlias = float | bool | str
Spec = TypeVar("Spec", bound=BaseModel)

PARTS: dict[str, type[BaseModel]] = {
    "gpu": GpuSpec,
    "cpu": CpuSpec,
    "link": LinkSpec,
    "host": HostSpec,
    "disk": DiskSpec,
}
"""The parts of a machine, in the order in which a composed name gives them."""

UNITS: dict[str, tuple[str, float]] = {
    "flops_per_s": ("tflops_per_s", 1e12),
    "ops_per_s": ("tops_per_s", 1e12),
    "bytes_per_s": ("gb_per_s", 1e9),
    "_bytes": ("_gb", 1e9),
    "_s": ("_us", 1e-6),
}
"""How the end of a field's name reads in handy units, and what one of these is in the field's own."""


def handy(field: str) -> tuple[str, float]:
    """A field's name in handy units and their size, such as ``("gb_per_s", 1e9)`` for ``bytes_per_s``.

    A field without a unit comes back as it is, with 1.
    """
    for ending, (unit, scale) in UNITS.items():
        if field.endswith(ending):
            return field.removesuffix(ending) + unit, scale
    return field, 1.0


@cache
def hardware_settings() -> dict[str, tuple[str, str, float]]:
    """What :func:`overridden` knows: name -> (part, field, size of the unit). The part is empty for a machine's own."""
    known = {"regime": ("", "regime", 1.0)}
    for part, spec in PARTS.items():
        for field in spec.model_fields.keys() - {"name", "source"}:
            name, scale = handy(field)
            known |= {f"{part}_{field}": (part, field, 1.0), f"{part}_{name}": (part, field, scale)}
    return known


def overridden(hardware: HardwareSpec, changes: Mapping[str, Value]) -> HardwareSpec:
    """``hardware`` with a user's numbers: ``{"link_gb_per_s": 12.0, "gpu_launch_us": 0}``.

    A name is PART_FIELD (a dot does for the first underscore), in the field's own unit, as in ``link_bytes_per_s``, or
    in the handy one of :data:`UNITS`. Raises :class:`InputError` for an unknown name, a part that the machine does not
    have, or a value that breaks the field's rule.
    """
    for given, value in changes.items():
        name, known = given.replace(".", "_", 1), hardware_settings()
        if name not in known:
            raise unknown_name("hardware setting", given, known)
        part, field, scale = known[name]
        if not part:
            hardware = _changed(hardware, name, field, value, value)
            continue
        whole = getattr(hardware, part)
        if whole is None:
            raise InputError(f"{name} must be left out for a machine without a {part}, got {value}")
        hardware = hardware.model_copy(update={part: _changed(whole, name, field, value, _scaled(value, scale), scale)})
    return hardware.model_copy(update={"name": _renamed(hardware.name, changes)})


def overridden_model(model: ModelSpec, changes: Mapping[str, Value]) -> ModelSpec:
    """``model`` with a user's numbers: fields of :class:`ModelSpec`, or ``expert_bytes``, which sets ``expert_bits``.

    Raises :class:`InputError` for an unknown name, or a value that breaks the field's rule.
    """
    known = (ModelSpec.model_fields.keys() | {"expert_bytes"}) - {"name", "source"}
    for name, value in changes.items():
        if name not in known:
            raise unknown_name("model setting", name, known)
        if name == "expert_bytes":
            if not isinstance(value, str | bool) and value > MOST_EXPERT_BYTES:
                raise InputError(f"{name} must be at most {MOST_EXPERT_BYTES}, got {_shown(value)}")
            model = _changed(model, name, "expert_bits", value, _bits(model, value))
        else:
            model = _changed(model, name, name, value, value)
    return model.model_copy(update={"name": _renamed(model.name, changes)})


def settings_of(texts: Iterable[str], field: str = "hardware-set") -> dict[str, Value]:
    """The changes that options such as ``link.gb_per_s=12`` ask for, by name; ``field`` is what an error calls them.

    Raises :class:`InputError` for a text without a name or value, and for a name given twice.
    """
    changes: dict[str, Value] = {}
    for text in texts:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not (name and equals and value):
            raise InputError(f"{field} must be NAME=VALUE, got {text!r}")
        name = name.replace(".", "_", 1)
        if name in changes:
            raise InputError(f"{field} must give {name} once, got {text!r} as well")
        changes[name] = _read(value)
    return changes


def marked(source: str, changes: Iterable[str]) -> str:
    """``source``, and which numbers are not from there but the user's, under the mark [U]."""
    told = ", ".join(changes)
    return "; ".join([text for text in (source, f"{told}: set by the user [U]" if told else "") if text])


def _changed(spec: Spec, name: str, field: str, given: Value, value: Value, scale: float = 1.0) -> Spec:
    """``spec`` with ``field`` at ``value``, checked; errors are about ``name``, as ``given``, in units of ``scale``."""
    fields = spec.model_dump()
    fields |= {field: value, "source": marked(fields["source"], [f"{name} = {_shown(given)}"])}
    try:
        return type(spec).model_validate(fields)
    except ValidationError as error:
        fault = first_fault(error)
        if fault.startswith(f"{field} must ") and name != field:
            rule = fault.removeprefix(field).rpartition(", got ")[0]
            fault = f"{name}{_in_units(rule, error, scale)}, got {_shown(given)}"
        raise InputError(fault) from error


def _in_units(rule: str, error: ValidationError, scale: float) -> str:
    """``rule`` with the limit that it ends in, if there is one, in units of ``scale``."""
    limits = [value for value in error.errors()[0].get("ctx", {}).values() if type(value) in (int, float)]
    return re.sub(r"[0-9.e+-]+$", f"{limits[0] / scale:.12g}", rule) if limits and scale != 1 else rule


def _bits(model: ModelSpec, size_bytes: Value) -> Value:
    """Bits a weight that make an expert ``size_bytes`` large, its biases taken off first."""
    if isinstance(size_bytes, str | bool):
        return size_bytes
    biases_bytes = model.expert_biases * model.bytes_per_element
    return 8 * (size_bytes - biases_bytes) / (model.expert_elements - model.expert_biases)


def _scaled(value: Value, scale: float) -> Value:
    """``value`` in a field's own unit; large units leave no fractions of a byte."""
    if isinstance(value, str | bool) or not math.isfinite(value):
        return value
    scaled = min(max(value * scale, -sys.float_info.max), sys.float_info.max)  # beyond the numbers there are: refused
    return round(scaled) if scale > 1 and abs(scaled) >= 1 else scaled


def _read(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _renamed(name: str, changes: Mapping[str, Value]) -> str:
    told = [f"{change.replace('.', '_', 1)}={_shown(value)}" for change, value in changes.items()]
    return f"{name} with {', '.join(told)}" if told else name


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, str | bool) else f"{value:.12g}"

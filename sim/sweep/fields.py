"""The fields that a sweep may set, by dotted path, and the scenario that they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sim.constants import constant_of
from sim.presets import Preset, find_preset
from sim.scenario import Scenario
from sim.spec.faults import first_fault
from sim.spec.model import ModelSpec
from sim.spec.overrides import hardware_settings
from sim.systems import KINDS, SystemSpec, no_constant
from traces.errors import InputError, unknown_name

SETS = {"model": "model_set", "hardware": "hardware_set"}
"""Fields of a scenario that hold the changes to what another field names."""

PLAIN = tuple(field for field in Scenario.model_fields if field not in SETS.values())
OPTIONS = "system.options."
FILES = (".toml", ".safetensors", ".csv", ".json", ".jsonl", ".parquet")
"""Endings of texts that name files."""


@cache
def known_fields() -> frozenset[str]:
    """All that a grid may set, but for the constants of policies (``system.options.KIND.NAME``)."""
    of_system = SystemSpec.model_fields.keys() - {"name", "options"}
    of_model = (ModelSpec.model_fields.keys() | {"expert_bytes"}) - {"name", "source"}
    parts = {"system": of_system, "model": of_model, "hardware": hardware_settings()}
    return frozenset([*PLAIN, *(f"{part}.{name}" for part, names in parts.items() for name in names)])


def check_field(field: str) -> str:
    """``field`` in the one form that is used from here on; raises :class:`InputError` with near names if unknown."""
    if field.startswith(OPTIONS):
        kind, _, constant = field.removeprefix(OPTIONS).partition(".")
        if kind not in KINDS:
            raise unknown_name("system.options", kind, KINDS)
        if not constant:
            raise InputError(f"{field} must go on with the name of a constant, got none")
        return field
    head, dot, rest = field.partition(".")
    usual = f"{head}.{rest.replace('.', '_', 1)}" if dot and head == "hardware" else field
    if usual not in known_fields():
        raise unknown_name("field", field, known_fields())
    return usual


def scenarios_of(points: Sequence[Mapping[str, Any]], folder: Path) -> list[Scenario]:
    """The scenario of each point; systems are read once. Raises :class:`InputError` for the first that is wrong."""
    systems: dict[tuple[Any, ...], Preset] = {}
    found = []
    for point in points:
        settings = {field: located(value, folder) for field, value in point.items()}
        wanted = tuple((field, value) for field, value in settings.items() if field.split(".")[0] == "system")
        if wanted not in systems:
            systems[wanted] = _system(dict(wanted))
        found.append(_scenario(settings, systems[wanted]))
    return found


def located(value: Any, folder: Path) -> Any:
    """``value``, and where it names files (also policies, and parts of a machine), their place from ``folder`` on."""
    if not isinstance(value, str):
        return value
    return "+".join(_place(part, folder) for part in value.split("+"))


def _place(text: str, folder: Path) -> str:
    if not (text.endswith(FILES) or ".py:" in text):
        return text
    return str((folder / text).resolve())


def _scenario(settings: Mapping[str, Any], system: Preset) -> Scenario:
    fields: dict[str, Any] = {"system": system, **{name: {} for name in SETS.values()}}
    for path, value in settings.items():
        head, _, rest = path.partition(".")
        if head == "system":
            continue
        if rest:
            fields[SETS[head]][rest] = value
        else:
            fields[head] = _as_text(head, value)
    try:
        return Scenario(**fields)
    except ValidationError as error:
        raise InputError(first_fault(error)) from error


def _as_text(field: str, value: Any) -> Any:
    """A number as the text that the command line would have, where the field is one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return str(value) if number and Scenario.model_fields[field].annotation in (str, str | None) else value


def _system(settings: Mapping[str, Any]) -> Preset:
    """The system that the settings ``system`` and ``system.FIELD`` describe.

    A policy that takes the place of another does not take over its constants.
    """
    changes = {field.removeprefix("system."): value for field, value in settings.items()}
    base = changes.pop("system", None)
    if base is not None and not isinstance(base, str):
        raise InputError(f"system must be the name of a system, or a TOML file, got {base!r}")
    preset = Preset(system=SystemSpec()) if base is None else find_preset(base)
    own = {field: value for field, value in changes.items() if not field.startswith("options.")}
    fields = preset.system.model_dump() | own
    fields["options"] = {kind: values for kind, values in fields["options"].items() if kind not in own}
    spec = _spec(fields)
    for field, value in changes.items():
        if field not in own:
            _, kind, constant = field.split(".", 2)
            fields["options"].setdefault(kind, {})[constant] = _constant(spec, kind, constant, value)
    if changes and preset.name:
        fields["name"] = f"{preset.name} with {', '.join(f'{field} {value}' for field, value in changes.items())}"
    uncalibrated = {field: value for field, value in preset.uncalibrated.items() if field not in own}
    return preset.model_copy(update={"system": _spec(fields), "uncalibrated": uncalibrated})


def _constant(spec: SystemSpec, kind: str, constant: str, value: Any) -> Any:
    defaults = spec.policy(kind).defaults
    if constant not in defaults:
        raise no_constant(kind, getattr(spec, kind), constant, defaults)
    return constant_of(defaults[constant], str(value), f"{OPTIONS}{kind}.{constant}")


def _spec(fields: Mapping[str, Any]) -> SystemSpec:
    try:
        return SystemSpec(**fields)
    except ValidationError as error:
        raise InputError(f"system: {first_fault(error)}") from error

"""Published systems by name, and systems of a user's own from TOML files."""

from __future__ import annotations

import re
import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sim.spec.faults import first_fault, read_toml
from sim.systems import Budget, SystemSpec
from traces.errors import InputError, unknown_name

SYSTEM, CLAIRVOYANT, CEILING, OTHER = "system", "clairvoyant", "no limit", "other outputs"
"""Roles: only systems compete. Who is clairvoyant knows the future, the ceiling ignores the budget: both are bounds.
Others compute something else than the model."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*(?:[ .][A-Za-z0-9_+-]+)*")
"""What a system may be called: its results are a folder of that name."""


class Preset(BaseModel):
    """A system, what it stands for, and what of its source it leaves out.

    ``uncalibrated`` are the fields of the system that hold where no calibration trace is given, ``without_residuals``
    those where the look-ahead at hand is not corrected by mean residuals.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: SystemSpec
    summary: str = ""
    source: str = ""
    leaves_out: str = ""
    uncalibrated: dict[str, Any] = Field(default_factory=dict)
    without_residuals: dict[str, Any] = Field(default_factory=dict)
    sim_only: bool = Field(default=False, description="it needs what no real model here can give")
    clairvoyant: bool = Field(default=False, description="it knows the future: nothing that could be built")
    unlimited: bool = Field(default=False, description="it holds every expert, whatever the limit")

    @property
    def name(self) -> str:
        return self.system.name

    @property
    def role(self) -> str:
        """What it is to others that it is compared with: one of the roles above."""
        if self.unlimited:
            return CEILING
        if self.clairvoyant or "future" in self.system.needs:
            return CLAIRVOYANT
        return OTHER if self.system.deferral else SYSTEM

    def fitted(self, *, calibrated: bool, residuals: bool = True) -> tuple[SystemSpec, list[str]]:
        """The system as it runs with what there is of a calibration trace and of residuals, and what has to be told."""
        fields, notes = dict[str, Any](), list[str]()
        if self.uncalibrated and not calibrated:
            fields |= self.uncalibrated
            notes.append(f"no calibration trace was given: {_told(self.uncalibrated)} stands in")
        if self.without_residuals and not residuals:
            fields |= self.without_residuals
            notes.append(f"look-ahead has no mean residuals: {_told(self.without_residuals)} stands in")
        return (SystemSpec(**{**self.system.model_dump(), **fields}) if fields else self.system), notes

    def budget(self, even: Budget, *, layers: int, experts: int, calibration: Any = None) -> Budget:
        """What it makes of ``even`` slots: all there are, a part of them, or another split over the layers.

        ``calibration`` is the trace that a split by miss costs is measured on.
        """
        if self.unlimited:
            return even.model_copy(update={"slots": experts})
        if self.system.holds != "cache":
            held = 2 * experts if self.system.holds == "two layers" else 0
            return even.model_copy(update={"slots": min(even.slots, held)})
        if self.system.slots_by_layer == "even" or calibration is None:
            return even
        from sim.slots import split_by_misses  # numba is imported with it

        return even.model_copy(update={"by_layer": split_by_misses(calibration, even.slots * layers)})


def preset_names() -> list[str]:
    """Names of the published systems, in the order of the file."""
    return list(_table())


def preset(name: str) -> Preset:
    """The published system called ``name``; raises :class:`InputError` with the near names when unknown."""
    if name not in _table():
        raise unknown_name("system", name, _table())
    return _built(name, _table()[name], "presets.toml")


def find_preset(name: str) -> Preset:
    """A published system, or, when ``name`` ends in ``.toml``, the one that this file describes.

    The file holds the fields of a preset at its top level; with ``like = "NAME"`` it takes over those that it leaves
    out from the published system NAME. Policies in files of Python are sought beside it. Raises :class:`InputError`.
    """
    if not name.endswith(".toml"):
        return preset(name)
    path = Path(name)
    fields = read_toml(path, "system")
    like = fields.pop("like", None)
    if like is not None:
        if like not in _table():
            raise InputError(f"{name}: {unknown_name('like', str(like), _table())}")
        fields = {**_table()[like], **fields}
    for kind in ("evict", "prefetch", "place"):
        if isinstance(fields.get(kind), str) and ".py:" in fields[kind]:
            fields[kind] = str(path.parent / fields[kind])
    return _built(str(fields.pop("name", path.stem)), fields, name)


def _told(fields: dict[str, Any]) -> str:
    return ", ".join(f"{field} {value}" for field, value in fields.items())


def _built(name: str, fields: dict[str, Any], origin: str) -> Preset:
    of_preset = Preset.model_fields.keys() - {"system"}
    own = {field: value for field, value in fields.items() if field in of_preset}
    of_system = {field: value for field, value in fields.items() if field not in of_preset}
    for field in of_system:
        if field not in SystemSpec.model_fields:
            raise InputError(f"{origin}: {unknown_name('field', field, {*of_preset, *SystemSpec.model_fields})}")
    if not _NAME.fullmatch(name):
        raise InputError(f"{origin}: name must be letters, digits, dots, blanks and dashes, got {name!r}")
    try:
        found = Preset(system=SystemSpec(name=name, **of_system), **own)
        found.fitted(calibrated=False, residuals=False)
    except ValidationError as error:
        raise InputError(f"{origin}: {first_fault(error)}") from error
    return found


@cache
def _table() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("sim").joinpath("presets.toml").read_text(encoding="utf-8"))

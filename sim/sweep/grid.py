"""The grid of a sweep: what all its points share, and the axes along which they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from sim.spec.faults import read_toml
from sim.spec.overrides import hardware_settings
from sim.sweep.fields import check_field
from traces.errors import InputError, unknown_name

Setting: TypeAlias = bool | int | float | str
RANGE = ("from", "to", "steps", "scale")
SCALES = ("linear", "log")
DIGITS = 6
"""Significant digits of the values of a range, so that 4 to 64 in powers of two are whole numbers."""

MOST_POINTS = 100_000


@dataclass(frozen=True)
class Grid:
    """``base`` and ``axes`` by dotted field, in the order of the file; ``folder`` is where files that they name are."""

    base: dict[str, Setting]
    axes: dict[str, tuple[Setting, ...]]
    folder: Path = Path()

    @classmethod
    def load(cls, path: Path) -> Grid:
        """Reads the tables ``[base]`` and ``[axes]``; raises :class:`InputError` that names the file and the field.

        An axis is a list of values, or a range ``{from, to, steps, scale}`` with the scale linear (the default) or log.
        """
        tables = read_toml(path, "grid")
        try:
            return cls.of(tables, path.parent)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    @classmethod
    def of(cls, tables: dict[str, Any], folder: Path = Path()) -> Grid:
        """The grid of the tables of a file; raises :class:`InputError`."""
        for name, table in tables.items():
            if name not in ("base", "axes"):
                raise unknown_name("table", name, ("base", "axes"))
            if not isinstance(table, dict):
                raise InputError(f"{name} must be a table, got {table!r}")
        base = {field: _setting(field, value) for field, value in _flat(tables.get("base", {}), ranges=False).items()}
        axes = {field: _axis(field, value) for field, value in _flat(tables.get("axes", {}), ranges=True).items()}
        if not axes:
            raise InputError("axes must have at least one field, got none")
        _check_apart(axes)
        count = math.prod(len(values) for values in axes.values())
        if count > MOST_POINTS:
            raise InputError(f"axes must give at most {MOST_POINTS:,} points in all, got {count:,}")
        return cls(base, axes, folder)

    def points(self) -> list[dict[str, Setting]]:
        """The settings of every point: all of the base, those of the axes in its place. The last axis runs fastest."""
        return [self.base | dict(zip(self.axes, values, strict=True)) for values in product(*self.axes.values())]


def _flat(table: dict[str, Any], *, ranges: bool, prefix: str = "") -> dict[str, Any]:
    """Tables in tables as dotted fields, which are checked to be known; a range stays a table."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        field = prefix + name
        nested = isinstance(value, dict) and not (ranges and any(key in RANGE for key in value))
        inner = _flat(value, ranges=ranges, prefix=f"{field}.") if nested else {check_field(field): value}
        for known, one in inner.items():
            if known in found:
                raise InputError(f"{known} must be given once, got {found[known]!r} and {one!r}")
            found[known] = one
    return found


def _setting(field: str, value: Any) -> Setting:
    if not isinstance(value, (bool, int, float, str)) or (isinstance(value, float) and not math.isfinite(value)):
        raise InputError(f"{field} must be text, true, false, or a finite number, got {value!r}")
    return value


def _axis(field: str, value: Any) -> tuple[Setting, ...]:
    if isinstance(value, dict):
        return _range(field, value)
    if not isinstance(value, list):
        raise InputError(f"{field} must be a list or a range {{from, to, steps}} as an axis, got {value!r}")
    if not value:
        raise InputError(f"{field} must have at least one value as an axis, got none")
    values = tuple(_setting(field, one) for one in value)
    for place, one in enumerate(values):
        if one in values[:place]:
            raise InputError(f"{field} must have each value once as an axis, got {one!r} twice")
    return values


def _range(field: str, value: dict[str, Any]) -> tuple[Setting, ...]:
    for key in value:
        if key not in RANGE:
            raise unknown_name(f"{field}'s range", key, RANGE)
    for key in RANGE[:3]:
        if key not in value:
            raise InputError(f"{field}'s range must have from, to and steps, got no {key}")
    first, last, steps, scale = (value.get(key, "linear") for key in RANGE)
    if scale not in SCALES:
        raise unknown_name(f"{field}'s scale", str(scale), SCALES)
    for end in (first, last):
        if isinstance(end, bool) or not isinstance(end, (int, float)) or not math.isfinite(end):
            raise InputError(f"{field}'s range must go from one number to another, got {end!r}")
        if scale == "log" and end <= 0:
            raise InputError(f"{field}'s range must be above 0 on a log scale, got {end!r}")
    if isinstance(steps, bool) or not isinstance(steps, int) or not 2 <= steps <= MOST_POINTS:
        raise InputError(f"{field}'s steps must be a whole number from 2 to {MOST_POINTS:,}, got {steps!r}")
    space = np.geomspace if scale == "log" else np.linspace
    numbers = [float(f"{number:.{DIGITS}g}") for number in space(first, last, steps).tolist()]
    whole = isinstance(first, int) and isinstance(last, int) and all(number.is_integer() for number in numbers)
    return _axis(field, [int(number) for number in numbers] if whole else numbers)


def _check_apart(axes: dict[str, tuple[Setting, ...]]) -> None:
    """Raises :class:`InputError` when two axes set the same number, in two units."""
    owners: dict[tuple[str, str], str] = {}
    for field in axes:
        head, _, name = field.partition(".")
        if head != "hardware" or not name:
            continue
        part, own, _ = hardware_settings()[name]
        other = owners.setdefault((part, own), field)
        if other != field:
            raise InputError(f"{field} must be another number than {other}, got two axes for one")

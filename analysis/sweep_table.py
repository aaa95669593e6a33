"""The table of a sweep and its axes, and what of them a plot shows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.presets import OTHER, SYSTEM
from sim.sweep.store import TABLE, manifest_of
from sim.target import parse_bytes
from traces.errors import InputError, unknown_name

KINDS = ("lines", "heatmap", "crossovers", "pareto")
WORDS = frozenset(
    {"status", "reason", "notes", "key", "role", "synthetic", "seconds", "decode_s_by_group", "decode_tokens_by_group"}
)
"""Columns that are neither axes nor figures."""

WHY_UNKNOWN = {"link_busy_share": ": where a system prefetches, a sweep does not note how long those copies took"}
"""What follows on a figure that is not known of a point, beginning with its colon."""

SPREAD = 8
"""An axis is logarithmic where its largest value is this many times the smallest."""

UNITS = {
    "_tflops_per_s": "TFLOP/s",
    "_tops_per_s": "TOP/s",
    "_gb_per_s": "GB/s",
    "_flops_per_s": "FLOP/s",
    "_ops_per_s": "operations/s",
    "_bytes_per_s": "bytes/s",
    "_per_s": "a second",
    "_us": "µs",
    "_gb": "GB",
    "_bytes": "bytes",
    "_bits": "bits",
    "_s": "s",
}
OWN_UNITS = {"batch": "sequences", "context": "tokens", "prefill_chunk": "tokens"}
SIZES = ("gpu_memory", "host_memory")
"""Axes of sizes, shown in the unit in which they all are given, else in GiB."""


@dataclass(frozen=True)
class Axis:
    """An axis of a grid. ``numbers`` is None where the values are words; ``unit`` may be empty."""

    name: str
    values: tuple[Any, ...]
    numbers: tuple[float, ...] | None
    unit: str

    @classmethod
    def of(cls, name: str, values: Sequence[Any]) -> Axis:
        """The axis of a grid, with its unit from the name, or from the values (25%, 8GiB)."""
        numbers, unit = _numbers(name, values)
        return cls(name, tuple(values), numbers, unit)

    @property
    def log(self) -> bool:
        """Whether it is shown, and interpolated, on a logarithmic scale."""
        numbers = self.numbers
        return numbers is not None and min(numbers) > 0 and max(numbers) >= SPREAD * min(numbers)

    @property
    def label(self) -> str:
        """What stands beside it in a plot."""
        words = _without_unit(self.name.removeprefix("system.options.").removeprefix("hardware."))
        return f"{words} ({self.unit})" if self.unit else words

    def told(self, number: float) -> str:
        """A place on it, with its unit."""
        space = "" if self.unit.startswith("%") else " "
        return f"{number:.3g}{space}{self.unit}".strip()

    def ascending(self) -> Axis:
        """The axis with its numbers in ascending order; words stay as they are."""
        if self.numbers is None:
            return self
        order = sorted(range(len(self.values)), key=self.numbers.__getitem__)
        return Axis.of(self.name, [self.values[place] for place in order])

    def kept(self, values: Sequence[Any]) -> Axis:
        """The axis with only those of its values."""
        return Axis.of(self.name, [value for value in self.values if value in values])


def _numbers(name: str, values: Sequence[Any]) -> tuple[tuple[float, ...] | None, str]:
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return tuple(map(float, values)), "slots a layer" if name == "cache" else _unit(name)
    texts = [str(value) for value in values]
    if all(re.fullmatch(r"[0-9.]+%", text) for text in texts):
        return tuple(float(text[:-1]) for text in texts), "% of the experts" if name == "cache" else "%"
    if name in SIZES:
        units = {re.sub(r"[0-9.\s]", "", text) for text in texts}
        unit = units.pop() if len(units) == 1 else "GiB"
        return tuple(parse_bytes(text, name) / parse_bytes(f"1{unit}", name) for text in texts), unit or "bytes"
    return None, ""


def _unit(name: str) -> str:
    return OWN_UNITS.get(name, next((unit for ending, unit in UNITS.items() if name.endswith(ending)), ""))


def _without_unit(name: str) -> str:
    ending = next((ending for ending in UNITS if name.endswith(ending)), "")
    return name.removesuffix(ending).replace("_", " ")


def figure_label(name: str) -> tuple[str, float]:
    """What a figure is called in a plot, with its unit, and by what its values are multiplied for that."""
    if name.endswith(("_share", "_ratio_union", "_ratio_assignments", "regret")):
        return f"{name.replace('_', ' ')} (%)", 100.0
    if name.endswith("bytes_per_token"):
        return "demand fetches (MB a token)", 1e-6
    if name == "copied_bytes_per_processed_token":
        return "copies with prefetches (MB a token)", 1e-6
    if name == "tokens_per_s":
        return "decode rate (tokens/s)", 1.0
    if name.endswith("_bytes"):
        return f"{_without_unit(name)} (GB)".replace("gpu (", "GPU memory (").replace("capacity (", "cache ("), 1e-9
    if name.endswith("_s") and not name.endswith("_per_s"):
        return f"{_without_unit(name)} (ms)", 1e3
    words = _without_unit(name)
    return (f"{words} ({_unit(name)})" if _unit(name) else words), 1.0


def lower_is_better(figure: str) -> bool:
    """Whether less of a figure is better: of times, misses, late hits, bytes, stalls, and regret."""
    time = figure.endswith("_s") and not figure.endswith("_per_s")
    return time or figure in ("misses", "late_hits", "stall_share") or "bytes" in figure or figure.endswith("regret")


@dataclass(frozen=True)
class View:
    """What a plot is asked to show, as given; None is for what follows from the axes."""

    kind: str | None = None
    value: str = "tokens_per_s"
    x: str | None = None
    y: str | None = None
    hue: str | None = None
    where: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SweepTable:
    """The rows of a sweep that ran, its axes, and how many points were refused or failed."""

    frame: pd.DataFrame
    axes: dict[str, Axis]
    left_out: int = 0
    title: str = ""

    @classmethod
    def load(cls, folder: Path) -> SweepTable:
        """Reads a sweep's folder; raises :class:`InputError` when it holds none, or one that has no table yet."""
        tables = manifest_of(folder)
        try:
            frame = pd.read_parquet(folder / TABLE)
        except (OSError, ValueError) as error:
            raise InputError(
                f"sweep must have a readable {TABLE} (sweep --resume writes it), got {folder} without one"
            ) from error
        axes = {name: Axis.of(name, _as_stored(values)) for name, values in tables["axes"].items()}
        missing = [name for name in (*axes, "role") if name not in frame]
        if missing:
            raise InputError(f"{TABLE} must be of the last grid (sweep --resume writes it), got none of {missing[0]}")
        ran = frame[frame.status == "ok"].reset_index(drop=True)
        if not len(ran):
            raise InputError(f"sweep must have a point that ran, got {len(frame)} that did not in {folder}")
        title = ", ".join(f"{name}\N{NO-BREAK SPACE}{value}" for name, value in tables.get("base", {}).items())
        return cls(ran, axes, len(frame) - len(ran), title)

    @property
    def competing(self) -> pd.DataFrame:
        """The rows that are compared: neither bounds, nor such as compute something else than the model."""
        return self.frame[self.frame.role == SYSTEM]

    @property
    def outside(self) -> pd.DataFrame:
        """The rows that are only shown."""
        return self.frame[self.frame.role != SYSTEM]

    @property
    def origin(self) -> str:
        """What its figures are: simulated, and on which routing."""
        made = int(self.frame.synthetic.sum())
        some = "" if made == len(self.frame) else f" in {made:,} of {len(self.frame):,} points"
        return f"simulated, on synthetic routing{some}" if made else "simulated"

    def only(self, where: Sequence[str]) -> SweepTable:
        """The rows with these values, each as AXIS=VALUE; raises :class:`InputError` when there is none."""
        frame = self.frame
        for text in where:
            name, equals, value = (part.strip() for part in text.partition("="))
            if not (name and equals and value):
                raise InputError(f"where must be AXIS=VALUE, got {text!r}")
            axis = self.axis(name, "where")
            known = [one for one in axis.values if str(one) == value or _same_number(one, value)]
            if not known:
                raise unknown_name(f"value of {name}", value, map(str, axis.values))
            frame = frame[frame[name] == known[0]]
        if not len(frame):
            raise InputError(f"where must leave points that ran, got {', '.join(where)}")
        axes = {name: axis.kept(frame[name].unique().tolist()) for name, axis in self.axes.items()}
        fixed = "".join(f", {text}" for text in where)
        return SweepTable(frame.reset_index(drop=True), axes, self.left_out, self.title + fixed)

    def axis(self, name: str, field: str) -> Axis:
        """The axis of that name; raises :class:`InputError`, which speaks of ``field``, with the near names."""
        if name not in self.axes:
            raise unknown_name(field, name, self.axes)
        return self.axes[name]

    def figure(self, name: str, field: str) -> str:
        """``name`` when it is a column of figures; raises :class:`InputError` with the near names."""
        figures = [column for column in self.frame if column not in WORDS and column not in self.axes]
        if name not in figures:
            raise unknown_name(field, name, figures)
        if not self.frame[name].notna().any():
            raise InputError(f"{field} must be known of at least one point, got {name}{WHY_UNKNOWN.get(name, '')}")
        return name

    def unknown(self, name: str) -> str:
        """How many of the points that ran have no value of a figure, and why; empty where all have one."""
        count = int(self.frame[name].isna().sum())
        told = f"{name} is not known of {count:,} of {len(self.frame):,} points"
        return f"{told}{WHY_UNKNOWN.get(name, '')}" if count else ""

    def free(self) -> list[Axis]:
        """The axes that have more than one value."""
        return [axis for axis in self.axes.values() if len(axis.values) > 1]


def _as_stored(values: Sequence[Any]) -> list[Any]:
    """Values of an axis as the table has them: words, where not all are numbers or all true or false."""
    kinds = {type(value) for value in values}
    return list(values) if kinds <= {int, float} or kinds == {bool} else [str(value) for value in values]


def _same_number(one: Any, text: str) -> bool:
    try:
        return isinstance(one, (int, float)) and float(one) == float(text)
    except ValueError:
        return False


@dataclass(frozen=True, eq=False)
class Shown:
    """A view that fits its table: what is drawn of which axes. ``y`` is for heat maps, ``hue`` for lines."""

    kind: str
    table: SweepTable
    value: str
    x: Axis
    y: Axis | None = None
    hue: Axis | None = None

    def curves(self, how: str = "mean") -> dict[str, list[float]]:
        """By value of ``hue`` (or the one curve): the value of what competes at each of ``x``, nan where nothing ran;
        over seeds, the ``how`` of them (mean, min, max)."""
        return self._curves(self.table.competing, how)

    def beside(self) -> dict[str, list[float]]:
        """The same of what does not compete, by a name that says what it is."""
        rows = self.table.outside
        return {
            outside_label(name, role): curve
            for role in dict.fromkeys(rows.role)
            for name, curve in self._curves(rows[rows.role == role], "mean").items()
        }

    def _curves(self, frame: pd.DataFrame, how: str) -> dict[str, list[float]]:
        found = {}
        for name in self.hue.values if self.hue else (None,):
            rows = frame if self.hue is None else frame[frame[self.hue.name] == name]
            if not len(rows):
                continue
            means = rows.groupby(self.x.name, sort=False)[self.value].agg(how)
            label = self.value if self.hue is None else hue_label(self.hue, name)
            found[label] = [float(means.get(place, np.nan)) for place in self.x.values]
        return found


def outside_label(name: str, role: str) -> str:
    """What a system that does not compete is called in a legend, or in a sentence."""
    return f"{name} ({'computes something else' if role == OTHER else f'a bound: {role}'})"


def hue_label(axis: Axis, value: Any) -> str:
    """One value of an axis in a legend: a word as it is, a number with what it is a number of."""
    if axis.numbers is None:
        return str(value)
    return axis.told(axis.numbers[axis.values.index(value)]) if axis.unit else f"{axis.label} {value}"


def shown(table: SweepTable, view: View) -> Shown:
    """What ``view`` shows of ``table``, with all that it leaves open chosen from the axes.

    One axis: lines. Two: a heat map of two numbers or of two kinds of words, else lines over the number. Raises
    :class:`InputError` for what is unknown, and for axes that are neither shown nor fixed.
    """
    if view.kind is not None and view.kind not in KINDS:
        raise unknown_name("kind", view.kind, KINDS)
    table = table.only(view.where)
    value = table.figure(view.value, "value")
    if view.kind == "pareto":
        return _pareto(table, view, value)
    given = {name: table.axis(one, name) for name in ("x", "y", "hue") if (one := getattr(view, name)) is not None}
    open_axes = [axis for axis in table.free() if axis not in given.values() and axis.name != "seed"]
    kind = view.kind or _kind(given, open_axes)
    second = "y" if kind == "heatmap" else "hue"
    for name in {"y", "hue"} - {second}:
        if name in given:
            raise InputError(f"{name} must be left out for {kind}, got {given[name].name}")
    if len({axis.name for axis in given.values()}) < len(given):
        raise InputError(f"x must be another axis than {given['x'].name}, got it twice")
    if "x" not in given:
        given["x"] = _take(open_axes, kind)
    if second not in given and open_axes:
        given[second] = open_axes.pop(0)
    if open_axes:
        left = open_axes[0]
        raise InputError(f"where must fix {left.name} ({', '.join(map(str, left.values))}), got an axis too many")
    _check(kind, given)
    return Shown(kind, table, value, **{name: axis.ascending() for name, axis in given.items()})


def _kind(given: dict[str, Axis], left: Sequence[Axis]) -> str:
    if "y" in given or "hue" in given:
        return "heatmap" if "y" in given else "lines"
    numeric = [axis.numbers is not None for axis in (*given.values(), *left)]
    return "heatmap" if len(numeric) >= 2 and (all(numeric) or not any(numeric)) else "lines"


def _take(left: list[Axis], kind: str) -> Axis:
    """The axis for x, taken off the list: for lines the first number, for a heat map the last axis."""
    if not left:
        raise InputError("sweep must have an axis of more than one value to be plotted, got none")
    numbers = [axis for axis in left if axis.numbers is not None]
    best = left[-1] if kind == "heatmap" else (numbers or left)[0]
    left.remove(best)
    return best


def _check(kind: str, given: dict[str, Axis]) -> None:
    if kind == "heatmap" and "y" not in given:
        raise InputError("y must be an axis, for a heatmap, got a sweep of one axis")
    if kind != "crossovers":
        return
    if given["x"].numbers is None:
        raise InputError(f"x must be an axis of numbers for crossovers, got {given['x'].name}")
    if "hue" not in given:
        raise InputError("hue must be an axis for crossovers, got a sweep of one axis")


def _pareto(table: SweepTable, view: View, value: str) -> Shown:
    """Points of two figures: x is a column, and takes no axis."""
    cost = table.figure(view.x or "gpu_bytes", "x")
    if view.y is not None:
        raise InputError(f"y must be left out for pareto (see value), got {view.y}")
    if view.hue is not None:
        hue: Axis | None = table.axis(view.hue, "hue")
    else:
        hue = next((axis for axis in table.free() if axis.numbers is None), None)
    return Shown("pareto", table, value, Axis(cost, (), (), ""), hue=hue)

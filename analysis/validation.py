"""Judging measured runs against their simulation, over many systems and cache sizes: tables, and figures from them.

A point is one system at one cache size on one model, and where several traces or batches were measured, on one of them.
The figures are computed from the tables alone, so that anybody
can compute them again; ``docs/validation.md`` and ``docs/metrics.md`` define each one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from analysis import metrics
from analysis.compare import Comparison

POINT = ["model", "system", "cache", "workload"]
"""What names a point in every table; ``workload`` is empty where a folder of runs holds one only."""

WORDS = {"workload": str}
"""Columns that may hold nothing but empty words."""

ORDERED = ["model", "workload"]
"""Points are put in order of their times where these are equal."""


class Judged(NamedTuple):
    """One point: measured runs against their simulation, with the names that :data:`POINT` has for cache and workload.

    ``constant_s`` is the system's constant in seconds a decode token, where there is one.
    """

    comparison: Comparison
    cache: str
    workload: str = ""
    constant_s: float | None = None

    @property
    def place(self) -> dict[str, str]:
        """By :data:`POINT`, what names this one."""
        names = (self.comparison.measured.model, self.comparison.label, self.cache, self.workload)
        return dict(zip(POINT, names, strict=True))


@dataclass(frozen=True)
class Tables:
    """``points`` has a row a point, ``tokens`` one a decode token of a point, ``components`` one a component of it."""

    points: pd.DataFrame
    tokens: pd.DataFrame
    components: pd.DataFrame

    @classmethod
    def of(cls, judged: Iterable[Judged]) -> Tables:
        """From points that differ in their names."""
        points, tokens, components = [], [], []
        for one in judged:
            comparison, place = one.comparison, one.place
            points.append({**place, **_point(comparison)})
            own = comparison.tokens.assign(**place, constant_s=math.nan if one.constant_s is None else one.constant_s)
            tokens.append(own[[*POINT, *(name for name in own if name not in POINT)]])
            components += [{**place, **asdict(part)} for part in comparison.components]
        return cls(pd.DataFrame(points), pd.concat(tokens, ignore_index=True), pd.DataFrame(components))

    def save(self, folder: Path) -> None:
        """Writes ``points.csv``, ``components.csv`` and ``tokens.parquet`` into ``folder``."""
        self.points.to_csv(folder / "points.csv", index=False, lineterminator="\n")
        self.components.to_csv(folder / "components.csv", index=False, lineterminator="\n")
        self.tokens.to_parquet(folder / "tokens.parquet", index=False)

    @classmethod
    def load(cls, folder: Path) -> Tables:
        """Reads what :meth:`save` wrote; tables without a column ``workload`` are of one."""
        points, components = (pd.read_csv(folder / f"{name}.csv", dtype=WORDS) for name in ("points", "components"))
        tables = (points, pd.read_parquet(folder / "tokens.parquet"), components)
        return cls(*(_with_workload(table) for table in tables))

    def of_model(self, model: str) -> Tables:
        """The rows of one model."""
        return Tables(*(table[table.model == model].reset_index(drop=True) for table in vars(self).values()))


def _with_workload(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(workload=table["workload"].fillna("") if "workload" in table else "")


def named(cache: str, workload: str) -> str:
    """A cache size and a workload as a person reads them in one place."""
    return f"{cache}, {workload}" if workload else cache


def _point(comparison: Comparison) -> dict[str, Any]:
    decisions, info = comparison.decisions, comparison.measured
    first = next((check for check in decisions.checks if check.column == "hits_union"), None)
    return {
        "slots": info.capacity_slots,
        "repeats": comparison.repeats,
        "decisions_promised": decisions.promised,
        "decisions_exact": decisions.exact,
        "hits_measured": first.measured if first else 0,
        "hits_simulated": first.simulated if first else 0,
        "prefill_measured_ms": comparison.prefill_ms[0],
        "prefill_simulated_ms": comparison.prefill_ms[1],
        "memory_planned_bytes": sum(size for name, size in info.memory.items() if name.endswith("_bytes")),
        "memory_peak_bytes": info.peak.get("device_allocated_bytes", 0),
        "first_mismatch": decisions.first_mismatch if not decisions.exact else "",
    }


@dataclass(frozen=True)
class Order:
    """Two systems on one model and workload change places between two cache sizes, as measured, beyond the noise.

    ``simulated`` says how the simulator orders them there: "the same", or what it has instead.
    """

    model: str
    below: str  # who is quicker at the smaller cache
    above: str
    low: str
    high: str
    simulated: str


def figures(tables: Tables) -> dict[str, Any]:
    """All figures of a validation: over all points, by model, by point, by component; JSON-ready but for nan."""
    rows = rows_of(tables)
    models = list(dict.fromkeys(tables.points.model))
    return {
        "overall": overall(tables),
        "models": {model: overall(tables.of_model(model)) for model in models} if len(models) > 1 else {},
        "components": component_errors(tables.components),
        "systems": by_system(tables),
        "points": rows.to_dict("records"),
        "crossovers": [asdict(one) for _, own in rows.groupby(ORDERED, sort=False) for one in orders(own)],
    }


def overall(tables: Tables) -> dict[str, Any]:
    """The figures over all decode tokens of all points; ranks and order are of the points."""
    tokens, rows = tables.tokens, rows_of(tables)
    measured, simulated = tokens.measured_s.to_numpy(float), tokens.simulated_s.to_numpy(float)
    known = tokens.constant_s.notna().all()
    noise = float(rows.noise.median())
    taus = [
        (metrics.kendall_tau(own.measured_ms, own.simulated_ms, noise), len(own) * (len(own) - 1) // 2)
        for _, own in rows.groupby(ORDERED, sort=False)
    ]
    error = asdict(metrics.summarise_errors(measured, simulated))
    return {
        **error,
        "noise": noise,
        "skill": metrics.skill(measured, simulated, tokens.constant_s.to_numpy(float)) if known else math.nan,
        "kendall_tau": _mean([one.tau for one, _ in taus], [pairs * (1 - one.left_out) for one, pairs in taus]),
        "pairs_left_out": _mean([one.left_out for one, _ in taus], [pairs for _, pairs in taus]),
        "points": len(rows),
        "systems": int(rows.system.nunique()),
        "repeats": [int(rows.repeats.min()), int(rows.repeats.max())],
        "decisions_exact": bool(rows.decisions_exact.all()),
        "memory_off": _memory_off(rows),
        "decisions_promised": int(rows.decisions_promised.sum()),
    }


def by_system(tables: Tables) -> list[dict[str, Any]]:
    """One system on one model, over its cache sizes and workloads: its errors, beside that of its constant.

    The figures over all points weigh every system by its tokens, and can hide one whose constant is hard to beat.
    ``constant_error`` is the median error of the system's constant, ``skill`` our median error over it.
    """
    found = []
    for (model, system), own in tables.tokens.groupby(["model", "system"], sort=False):
        columns = ("measured_s", "simulated_s", "constant_s")
        measured, simulated, constant = (own[name].to_numpy(float) for name in columns)
        error, known = metrics.summarise_errors(measured, simulated), bool(own.constant_s.notna().all())
        found.append(
            {
                "model": model,
                "system": system,
                "tokens": error.tokens,
                "median_error": error.median,
                "bias": error.bias,
                "constant_error": metrics.summarise_errors(measured, constant).median if known else math.nan,
                "skill": metrics.skill(measured, simulated, constant) if known else math.nan,
            }
        )
    return found


def rows_of(tables: Tables) -> pd.DataFrame:
    """The points with their times, errors and noise, which follow from the tokens."""
    found = [_row(own) for _, own in tables.tokens.groupby(POINT, sort=False)]
    return tables.points.merge(pd.DataFrame(found), on=POINT, how="left")


def _row(tokens: pd.DataFrame) -> dict[str, Any]:
    measured, simulated = tokens.measured_s.to_numpy(float), tokens.simulated_s.to_numpy(float)
    error = metrics.summarise_errors(measured, simulated)
    spread = (tokens.median_s.to_numpy(float) - measured) / measured
    return {
        **{name: tokens[name].iloc[0] for name in POINT},
        "measured_ms": float(measured.mean() * 1e3),
        "simulated_ms": float(simulated.mean() * 1e3),
        "median_error": error.median,
        "p90_error": error.p90,
        "bias": error.bias,
        "noise": metrics.percentile(spread, 50) if tokens.median_s.notna().all() else math.nan,
        "constant_ms": float(tokens.constant_s.iloc[0] * 1e3),
    }


def _memory_off(rows: pd.DataFrame) -> float:
    """The largest share by which the device's measured peak differs from the planned bytes; nan where none is known."""
    known = rows[(rows.memory_planned_bytes > 0) & (rows.memory_peak_bytes > 0)]
    return float((known.memory_peak_bytes / known.memory_planned_bytes - 1).abs().max()) if len(known) else math.nan


def component_errors(components: pd.DataFrame) -> list[dict[str, Any]]:
    """By component: mean ms of both clocks over the points, and its mean signed and absolute share of a token."""
    found = []
    for name, rows in components.groupby("name", sort=False):
        found.append(
            {
                "name": name,
                "label": rows.label.iloc[0],
                "critical": bool(rows.critical.iloc[0]),
                "measured_ms": float(rows.measured_ms.mean()),
                "simulated_ms": float(rows.simulated_ms.mean()),
                "of_token": float(rows.of_token.mean()),
                "absolute_of_token": float(rows.of_token.abs().mean()),
            }
        )
    return found


def orders(rows: pd.DataFrame) -> list[Order]:
    """Every change of places of two systems with a growing cache, measured beyond the noise, and what is simulated.

    ``rows`` are those of one model and workload. Between two cache sizes at which the measured times of both differ by
    more than the noise (its median over the points), in opposite directions, and between which they do not, the order
    has changed.
    """
    noise, found = float(rows.noise.median()), []
    caches = sorted(dict.fromkeys(rows.cache), key=_share)
    times = {
        name: rows.pivot(index="cache", columns="system", values=f"{name}_ms") for name in ("measured", "simulated")
    }
    for one, other in combinations(dict.fromkeys(rows.system), 2):
        apart = [(cache, sign) for cache in caches if (sign := _sign(times["measured"], cache, one, other, noise))]
        for (low, before), (high, after) in pairwise(apart):
            if before == after:
                continue
            below, above = (one, other) if before < 0 else (other, one)
            first, last = (_sign(times["simulated"], cache, below, above, 0.0) for cache in (low, high))
            known = {(-1, 1): "the same", (-1, -1): f"{below} at both", (1, 1): f"{above} at both", (1, -1): "reversed"}
            words = known.get((first, last), "equal at one")
            model, workload = str(rows.model.iloc[0]), str(rows.workload.iloc[0])
            found.append(Order(model, below, above, named(low, workload), named(high, workload), words))
    return found


def _sign(times: pd.DataFrame, cache: str, one: str, other: str, noise: float) -> int:
    """-1 where ``one`` is quicker, 1 where ``other`` is, 0 within the noise or where either is not known."""
    ours, theirs = float(times.at[cache, one]), float(times.at[cache, other])
    if not abs(ours - theirs) > noise * min(ours, theirs):
        return 0
    return -1 if ours < theirs else 1


def _share(cache: str) -> tuple[bool, float]:
    """Order of cache sizes in words: shares by their size, then numbers of slots."""
    number = "".join(letter for letter in cache if letter.isdigit() or letter == ".")
    return "%" not in cache, float(number or 0)


def _mean(values: list[float], weights: list[float]) -> float:
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan

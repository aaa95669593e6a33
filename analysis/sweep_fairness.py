"""What makes points of a sweep comparable: who of them competes, and with how much of the GPU's memory."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import text
from analysis.sweep_table import Shown, outside_label
from sim.presets import SYSTEM

MEMORY = "gpu_bytes"
MOST_NAMES = 5


def told_outside(table: pd.DataFrame) -> list[str]:
    """Which points compete with no other, and why, by the settings of their systems; nothing where all compete."""
    outside = table[(table.role != SYSTEM) & (table.status == "ok")]
    if not len(outside):
        return []
    columns = [name for name in table if name == "system" or str(name).startswith("system.")]
    found = []
    for role, rows in outside.groupby("role", sort=False):
        names = [_named(row) for row in rows[columns].drop_duplicates().to_dict("records")]
        found.append(outside_label(few(names) if columns else "all points", str(role)))
    return [f"outside the comparison: {', '.join(found)}"]


def _named(row: Mapping[Hashable, Any]) -> str:
    """A system by its name and its settings, each with what it sets."""
    fields = {str(column).removeprefix("system.").removeprefix("options."): value for column, value in row.items()}
    return " ".join(str(value) if field == "system" else f"{field} {value}" for field, value in fields.items())


def told_of_memory(picture: Shown) -> list[str]:
    """What GPU memory the compared points take: the same, the same at each place of a picture of lines, or not."""
    rows = picture.table.competing
    if MEMORY not in rows or rows[MEMORY].isna().all():
        return []
    at = picture.x.name
    if _span(rows[MEMORY]) == _span(rows[MEMORY][:1]) or picture.hue is None or picture.kind == "pareto":
        return [memory_line(rows)]
    if (rows.groupby(at)[MEMORY].nunique() <= 1).all():
        return [f"GPU memory of what is compared: equal at each {at}, {_span(rows[MEMORY])}"]
    alike: dict[str, list[str]] = {}
    for name, sizes in rows.groupby(picture.hue.name, sort=False)[MEMORY]:
        alike.setdefault(_span(sizes), []).append(str(name))
    own = [f"{size} ({few(names)})" for size, names in alike.items()]
    return [f"GPU memory of what is compared is not equal: {few(own)}"]


def memory_line(rows: pd.DataFrame) -> str:
    """The GPU memory of points, from the least to the most."""
    sizes = rows[MEMORY].dropna()
    return f"GPU memory of what is compared{'' if sizes.nunique() == 1 else ' is not equal'}: {_span(sizes)}"


def _span(sizes: pd.Series[float]) -> str:
    least, most = (_told_bytes(size) for size in (float(sizes.min()), float(sizes.max())))
    return least if sizes.min() == sizes.max() else f"{least} to {most}"


def _told_bytes(size: float) -> str:
    return text.number(size / 1e9, "GB") if size >= 1e9 else text.number(size / 1e6, "MB")


def few(names: Sequence[str]) -> str:
    """The first of the names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more

"""Numbers as people read them: milliseconds, percentages, bytes."""

from __future__ import annotations

import math

MISSING = "–"  # noqa: RUF001  an en dash stands for "not observed"


def number(value: float, unit: str = "") -> str:
    """Three significant digits without powers of ten, 0 below half a thousandth, or a dash for nan."""
    if not math.isfinite(value):
        return MISSING
    size = float(f"{abs(value):.3g}")
    if size < 0.0005:
        value = 0.0
    digits = 0 if size >= 100 or not value else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return f"{text} {unit}" if unit else text


def percent(share: float, *, signed: bool = False) -> str:
    """A share as a percentage with one digit after the point (two below 1%), or a dash for nan."""
    if not math.isfinite(share):
        return MISSING
    if abs(share) < 0.00005:
        share = 0.0
    digits = 0 if not share else 2 if abs(share) < 0.01 else 1
    sign = "+" if signed and share else ""
    return f"{share * 100:{sign}.{digits}f}%".replace("-", "\N{MINUS SIGN}")


def signed_number(value: float, unit: str = "") -> str:
    """As :func:`number`, with a plus sign before positive values."""
    return ("+" if value >= 0.0005 else "") + number(value, unit)


def binary_bytes(count: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1, or a dash for nan."""
    if not math.isfinite(count):
        return MISSING
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if abs(count) >= size:
            return number(count / size, unit)
    return f"{count:.0f} B"

"""The rules that constants of prefetch policies must keep."""

from __future__ import annotations

from typing import Any

MOST_AHEAD = 3
"""Layers ahead for which traces hold what the routers would choose."""


def check_depth(depth: Any) -> None:
    """Raises ValueError for a depth that no trace has."""
    if depth not in range(1, MOST_AHEAD + 1):
        raise ValueError(f"depth must be from 1 to {MOST_AHEAD}, got {depth}")


def check_count(name: str, value: Any, *, least: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is above 0 and at most 1."""
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")

"""The rules that constants of prefetch policies must keep."""

from __future__ import annotations

from typing import Any


def check_count(name: str, value: Any, *, least: int) -> None:
    """Raises ValueError unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is above 0 and at most 1."""
    if not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")

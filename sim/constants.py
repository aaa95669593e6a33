"""A policy's constant as a user writes it on the command line."""

from __future__ import annotations

from math import isfinite
from typing import Any

from traces.errors import InputError

TRUTH = {"true": True, "yes": True, "false": False, "no": False}


def constant_of(default: Any, text: str, field: str) -> Any:
    """``text`` as the kind of value that ``default`` is; raises :class:`InputError`, which speaks of ``field``."""
    if isinstance(default, bool):
        if text.lower() not in TRUTH:
            raise InputError(f"{field} must be true or false, got {text!r}")
        return TRUTH[text.lower()]
    kind = type(default) if isinstance(default, (int, float)) else str
    try:
        value = kind(text)
    except ValueError:
        raise InputError(f"{field} must be {'a whole number' if kind is int else 'a number'}, got {text!r}") from None
    if isinstance(value, float) and not isfinite(value):
        raise InputError(f"{field} must be a finite number, got {text!r}")
    if isinstance(value, int) and abs(value) >= 1 << 63:  # more than the compiled policies can count
        raise InputError(f"{field} must be below 2**63, got {text}")
    return value

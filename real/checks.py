"""Rules of what a user gives, looked at without torch, so that a mistake is told at once."""

from __future__ import annotations

import math

from traces.errors import InputError

LEAST_TEMPERATURE = 1e-3
"""Logits divided by less could overflow; what is this cold is greedy in all but name."""


def check_temperature(value: float) -> None:
    """Raises :class:`InputError` for a temperature that nothing can be sampled at; 0 is greedy."""
    if value != 0.0 and not LEAST_TEMPERATURE <= value < math.inf:
        raise InputError(f"temperature must be 0, or at least {LEAST_TEMPERATURE} and finite, got {value}")

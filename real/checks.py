"""Rules of what a user gives, looked at without torch, so that a mistake is told at once."""

from __future__ import annotations

import math
import os

from real.models.names import checkpoint_folder
from traces.errors import InputError

LEAST_TEMPERATURE = 1e-3
"""Logits divided by less could overflow; what is this cold is greedy in all but name."""


def check_temperature(value: float) -> None:
    """Raises :class:`InputError` for a temperature that nothing can be sampled at; 0 is greedy."""
    if value != 0.0 and not LEAST_TEMPERATURE <= value < math.inf:
        raise InputError(f"temperature must be 0, or at least {LEAST_TEMPERATURE} and finite, got {value}")


TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
"""A checkpoint with either of them has a tokenizer."""


def check_tokenizer(model: str) -> None:
    """Raises :class:`InputError` for a checkpoint that cannot read prompts."""
    folder = checkpoint_folder(model)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise InputError(
            f"model must have a tokenizer to read prompts, got {folder} without {' or '.join(TOKENIZER_FILES)} "
            "(--routing TRACE needs none)"
        )


def most_cpu_threads(device: str) -> int:
    """The most threads that a CPU expert can have beside a device of that name; the CPU in its role is one core."""
    if device == "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cpu_threads(count: int | None, device: str) -> None:
    """Raises :class:`InputError` for threads of a CPU expert that there are no cores for; None are as many as ever."""
    most = most_cpu_threads(device)
    if count is None or 1 <= count <= most:
        return
    rule = f"at most {most}, the cores that there are" if device != "cpu" else "1 on the device cpu, a core a lane"
    raise InputError(f"cpu-threads must be {rule}, got {count}")

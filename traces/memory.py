"""The host's free memory: asked before what would not fit in it is built."""

from __future__ import annotations

import os
from pathlib import Path

from traces.errors import InputError


def check_free(needed_bytes: int, field: str, got: str) -> None:
    """Raises :class:`InputError` about ``field`` when the host's free memory is less than ``needed_bytes``."""
    free = free_bytes()
    if needed_bytes > free:
        raise InputError(f"{field} must fit the host's free memory ({free / 1e9:.1f} GB), got {got}")


def free_bytes() -> int:
    """Memory that programs can still get; that of cached files counts where the system tells it."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))

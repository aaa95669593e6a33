"""The compiled twins of the eviction policies, and the kernels that replay a stream through them.

What numba compiles is kept in the user's cache folder, under a digest of its sources, so that a change of any of them
compiles anew; what older sources have left is removed.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

from sim.compiled.folder import PREFIX, hold, remove_old


def _cache_folder() -> Path:
    """Where compiled code is kept: NUMBA_CACHE_DIR, else the user's cache folder, else a temporary one."""
    sources = hashlib.sha256(numba.__version__.encode())
    here = Path(__file__).parent
    for file in (*sorted(here.glob("*.py")), here.parent / "policies" / "evict" / "random.py"):
        sources.update(file.read_bytes())
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or home / "moetwin")
    folder = base / f"{PREFIX}{sources.hexdigest()[:16]}"
    try:
        hold(folder)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="moetwin-compiled-"))
    remove_old(folder)
    return folder


CACHE_FOLDER = _cache_folder()
numba.config.CACHE_DIR = str(CACHE_FOLDER)

_F = TypeVar("_F", bound=Callable[..., Any])


def jit(function: _F) -> _F:
    """Compiles a function that allocates nothing: without numba's book of references, which would cost more than the
    work."""
    return cast("_F", numba.njit(cache=True, nogil=True, _nrt=False)(function))


def jit_inlined(function: _F) -> _F:
    """The same, compiled into its callers: a call would hand over every field of every tuple, more than a hundred
    numbers, which takes as long as the work."""
    return cast("_F", numba.njit(cache=True, nogil=True, _nrt=False, forceinline=True)(function))


def jit_allocating(function: _F) -> _F:
    """Compiles a function that makes arrays."""
    return cast("_F", numba.njit(cache=True, nogil=True)(function))

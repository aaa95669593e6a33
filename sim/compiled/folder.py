"""Folders of compiled code, one for each state of the sources: held while a process runs, and removed later."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

PREFIX = "compiled-"
LOCK = "in-use"
"""A file in each folder: locked by who uses it, and its time is that of the last use."""

KEPT = 3
"""The folders used last are kept, so that going back and forth between versions does not compile anew each time."""

YOUNG_S = 86_400.0
"""Nor is what was used within a day removed: processes of versions that lock nothing may still run."""

_held: list[int] = []
"""Descriptors of the locks of this process, which end with it."""


def hold(folder: Path) -> None:
    """Makes ``folder``, and lets nobody remove it as long as this process runs; raises OSError where it cannot."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # removed between the two lines: once more
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_SH)
            if _is_same(lock, folder / LOCK):
                os.utime(lock)
                _held.append(lock)
                return
            os.close(lock)


def _is_same(lock: int, path: Path) -> bool:
    """Whether the open file is the one at ``path``: it is not when the folder was removed while the lock was sought."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def remove_old(folder: Path) -> None:
    """Removes the folders beside ``folder`` that are not among the last used, not young, and not held by a process."""
    with suppress(OSError):  # whatever is wrong with them, this process can do its work
        others = sorted(folder.parent.glob(f"{PREFIX}*"), key=_last_use, reverse=True)
        for other in others[KEPT:]:
            if other != folder and time.time() - _last_use(other) > YOUNG_S:
                _remove(other)


def _last_use(folder: Path) -> float:
    lock = folder / LOCK
    return (lock if lock.exists() else folder).stat().st_mtime


def _remove(folder: Path) -> None:
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError where a process holds it
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)

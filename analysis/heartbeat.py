"""How far some work is, in a line now and then, where nobody watches a bar."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic

EVERY_S = 30.0
"""Between two lines; what ends sooner says nothing."""


class Heartbeat:
    """Tells how many of how many ``what`` are done, at most once in :data:`EVERY_S`."""

    def __init__(self, what: str, tell: Callable[[str], object], clock: Callable[[], float] = monotonic) -> None:
        self._what, self._tell, self._clock = what, tell, clock
        self._begun_s = self._told_s = clock()

    def done(self, count: int, total: int | None) -> None:
        """So many are done; ``total`` is None where nobody knows how many there will be."""
        now_s = self._clock()
        if now_s - self._told_s < EVERY_S:
            return
        self._told_s = now_s
        whole = "" if total is None else f" of {total:,}"
        self._tell(f"{self._what}: {count:,}{whole} after {now_s - self._begun_s:,.0f} s")

"""Prefetch nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from sim.policies.base import PrefetchPolicy, PrefetchView


class NoPrefetch(PrefetchPolicy):
    """Moves an expert only when it is asked for."""

    name: ClassVar[str] = "none"

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        return ()

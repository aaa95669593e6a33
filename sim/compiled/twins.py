"""All compiled twins, registered by being imported."""

from __future__ import annotations

from sim.compiled import lru
from sim.compiled.twin import TWINS

__all__ = ["TWINS", "lru"]

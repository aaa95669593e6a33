"""Costs from a calibrated profile: interpolated between measured points, and flagged outside them."""

from __future__ import annotations

from functools import cache

import numpy as np

from sim.spec.model import ModelSpec
from sim.spec.profile import Point, Profile
from traces.errors import InputError

COVERED = ("hidden", "expert_width", "experts", "top_k", "heads", "kv_heads", "head_dim", "dtype", "expert_bits")
"""Dimensions that a profile's times depend on; the number of layers is not among them."""


class ProfileCosts:
    """Answers with measured seconds. ``outside`` collects what was asked beyond the measured range.

    Between two points the seconds are linear in the size; beyond the last one they grow at the last slope.
    """

    def __init__(self, profile: Profile, model: ModelSpec | None = None) -> None:
        """Raises :class:`InputError` when ``model`` has other dimensions than the profile was measured with."""
        for field in COVERED if model is not None else ():
            wanted, got = getattr(model, field), getattr(profile.model, field)
            if wanted != got:
                raise InputError(f"profile must be measured with {field} {wanted}, as in the model, got {got}")
        self.profile, self.host = profile, profile.host
        self.name = f"profile {profile.name} {profile.digest[:12]}"
        self.outside: set[str] = set()
        self._factors = {(one.resource, frozenset(one.others)): one.factor for one in profile.slowdowns}

    @cache  # noqa: B019 - a run keeps its one costs object alive anyway
    def dense_s(self, tokens: int, context: int) -> float:
        points = self.profile.dense
        self._flag("dense", tokens, points[0].tokens, points[-1].tokens)
        contexts = [size for point in points for size in (point.least_context, point.most_context)]
        self._flag("context", context, min(contexts), max(contexts))
        sizes = [point.tokens for point in points]
        base_s = _line(tokens, sizes, [point.base_s for point in points])
        per_context_s = float(np.interp(tokens, sizes, [point.per_context_s for point in points]))
        return base_s + per_context_s * context

    @cache  # noqa: B019
    def head_s(self, tokens: int, context: int) -> float:
        return self._at("head", self.profile.head, tokens)

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        return self._at("gpu_expert", self.profile.gpu_expert, tokens)

    @cache  # noqa: B019
    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        points = self.profile.cpu_expert_first if first else self.profile.cpu_expert_later
        return self._at("cpu_expert", points, tokens)

    @cache  # noqa: B019
    def copy_s(self, size_bytes: int) -> float:
        return self._at("copy", self.profile.copies, size_bytes)

    def lookahead_s(self, depth: int) -> float:
        return depth * self.profile.lookahead_s

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        return self._factors.get((resource, others), 1.0)

    def _at(self, name: str, points: tuple[Point, ...], size: int) -> float:
        self._flag(name, size, points[0].size, points[-1].size)
        return _line(size, [point.size for point in points], [point.best_s for point in points])

    def _flag(self, name: str, size: int, least: int, most: int) -> None:
        if not least <= size <= most:
            self.outside.add(f"{name} was asked for {size}, measured from {least} to {most}")


def _line(size: float, sizes: list[int], seconds: list[float]) -> float:
    """Piecewise linear through the points, at the last slope (or the mean rate, with one point) beyond them."""
    if size <= sizes[-1] or len(sizes) == 1:
        scale = size / sizes[-1] if size > sizes[-1] else 1.0
        return float(np.interp(size, sizes, seconds)) * scale
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    return seconds[-1] + slope * (size - sizes[-1])

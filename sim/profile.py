"""Costs from a calibrated profile: interpolated between measured points, and flagged outside them."""

from __future__ import annotations

from functools import cache

import numpy as np

from sim.spec.model import ModelSpec
from sim.spec.profile import TO_DEVICE, TO_HOST, TOGETHER, Planning, Point, Profile
from sim.systems import KINDS, SystemSpec
from traces.errors import InputError

IGNORED = ("name", "source", "layers", "moe_layers")
"""Fields of a model that a profile's times do not depend on, as long as no layers are dense."""


MEASURED = frozenset({"gpu", "link", "cpu"})
"""Resources whose influence on each other a profile tells of."""


class ProfileCosts:
    """Answers with measured seconds; ``notes`` says what was asked beyond the measured range.

    Between two points the seconds are linear in the size; beyond the last one they grow at the last slope.
    """

    def __init__(self, profile: Profile, model: ModelSpec | None = None) -> None:
        """Raises :class:`InputError` when ``model`` has other dimensions than the profile was measured with."""
        if model is not None:
            _check_same(model, profile.model)
        self.profile, self.host, self.chunk_bytes = profile, profile.host, profile.chunk_bytes
        self.name = f"profile {profile.name} {profile.digest[:12]}"
        self._expert_s = 0.0
        self._outside: dict[str, tuple[int, int, int, int]] = {}
        self._to_device, self._to_host = profile.transfer_points(TO_DEVICE), profile.transfer_points(TO_HOST)
        self._factors = {(one.resource, frozenset(one.others)): one.factor for one in profile.slowdowns}

    def for_run(self, system: SystemSpec, slots: int) -> ProfileCosts:
        """The costs of one run: with the time that the policies of ``system`` take to decide, and with what is quicker
        where the run has few ``slots``, staging included."""
        profile, deciding = self.profile, self._planning(system)
        deciding_s = sum(one.layer_s for one in deciding)
        host = profile.host.model_copy(update={"controller_s": profile.host.controller_s + deciding_s})
        pool = profile.small_pool
        quicker = {} if pool is None or slots > pool.slots else {"copies": pool.copies, "gpu_expert": pool.gpu_expert}
        made = ProfileCosts(profile.model_copy(update={"host": host, **quicker}))
        made.name, made._expert_s = self.name, sum(one.expert_s for one in deciding)
        return made

    def slow(self) -> ProfileCosts:
        """The costs where every piece of work takes its 90th percentile, which carries the spread into a run's time."""
        made = ProfileCosts(self.profile.slow())
        made._expert_s = self._expert_s
        return made

    def deciding_s(self, experts: int) -> float:
        """What was timed beyond decode's layers grows with the distinct experts beyond those of one token."""
        return self._expert_s * max(0, experts - self.profile.model.top_k)

    @cache  # noqa: B019 - a run keeps its one costs object alive anyway
    def dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        points = self.profile.dense
        self._flag("dense", tokens, points[0].tokens, points[-1].tokens)
        contexts = [size for point in points for size in (point.least_context, point.most_context)]
        self._flag("context", context, min(contexts), max(contexts))
        sizes = [point.tokens for point in points]
        base_s = _line(tokens, sizes, [point.base_s for point in points])
        per_context_s = float(np.interp(tokens, sizes, [point.per_context_s for point in points]))
        return base_s + per_context_s * context

    def cpu_dense_s(self, tokens: int, context: int, lanes: int = 1) -> float:
        """Raises :class:`InputError`: what a whole layer takes on the CPU is not measured."""
        raise InputError("dense_follows must be false with a profile, which has no dense work on the CPU, got true")

    @cache  # noqa: B019
    def head_s(self, lanes: int, context: int, tokens: int = 0) -> float:
        return self._at("head", self.profile.head, lanes)

    @cache  # noqa: B019
    def gpu_expert_s(self, tokens: int) -> float:
        return self._at("gpu_expert", self.profile.gpu_expert, tokens)

    @cache  # noqa: B019
    def cpu_expert_s(self, tokens: int, first: bool) -> float:
        points = self.profile.cpu_expert_first if first else self.profile.cpu_expert_later
        return self._at("cpu_expert", points, tokens)

    @cache  # noqa: B019
    def copy_s(self, size_bytes: int) -> float:
        """Sizes that were measured within runs, as one expert's is, take what they took there; others, such as that of
        a chunk, what they took alone, times the ratio of the two for one expert. Where nothing was measured alone, a
        chunk takes its share of an expert."""
        within = self.profile.copies
        if self._to_device and not within[0].size <= size_bytes <= within[-1].size:
            return self._in_runs("copy", self._to_device, size_bytes)
        if self.chunk_bytes and size_bytes < within[0].size:
            return within[0].value_s * size_bytes / within[0].size
        return self._at("copy", within, size_bytes)

    @cache  # noqa: B019
    def write_back_s(self, size_bytes: int) -> float:
        """What it took alone, times what a copy to the device takes within runs for each second that it takes alone;
        as such a copy where no copies back were measured."""
        if not (self._to_host and self._to_device):
            return self.copy_s(size_bytes)
        return self._in_runs("write-back", self._to_host, size_bytes)

    def read_s(self, size_bytes: int) -> float:
        """Raises :class:`InputError`: no disk is measured."""
        raise InputError("host_slots must be left out with a profile, which has no disk, got a number")

    def hidden_bytes(self, tokens: int) -> int:
        return round(tokens * self.profile.model.hidden * self.profile.model.bytes_per_element)

    def lookahead_s(self, depth: int) -> float:
        return depth * self.profile.lookahead_s

    def slowdown(self, resource: str, others: frozenset[str]) -> float:
        return self._factors.get((resource, others & MEASURED), 1.0)

    @property
    def notes(self) -> list[str]:
        """What is doubtful about the answers so far: the profile's own notes, and what lay outside it."""
        asked = [
            f"{name} was asked for {low}{f' to {high}' if high > low else ''}, measured from {least} to {most}"
            for name, (low, high, least, most) in sorted(self._outside.items())
        ]
        return [*self.profile.notes, *asked]

    def _planning(self, system: SystemSpec) -> list[Planning]:
        """What the policies of ``system`` were timed with: together, or else each."""
        together = (TOGETHER, decided_by(system))
        policies = {(kind, getattr(system, kind)) for kind in KINDS}
        timed = {(one.kind, one.policy): one for one in self.profile.planning}
        return [timed[together]] if together in timed else [one for key, one in timed.items() if key in policies]

    def _in_runs(self, name: str, points: tuple[Point, ...], size_bytes: int) -> float:
        """Seconds of a copy within runs, of which ``points`` tell what it took alone."""
        expert = self.profile.copies[0]
        return self._at(name, points, size_bytes) * expert.value_s / _through(expert.size, self._to_device)

    def _at(self, name: str, points: tuple[Point, ...], size: int) -> float:
        self._flag(name, size, points[0].size, points[-1].size)
        return _through(size, points)

    def _flag(self, name: str, size: int, least: int, most: int) -> None:
        """Remembers the farthest size asked for on either side of the measured range."""
        if size < least or size > most:
            low, high, _, _ = self._outside.get(name, (size, size, least, most))
            self._outside[name] = (min(low, size), max(high, size), least, most)


def decided_by(system: SystemSpec) -> str:
    """What the time to decide depends on, of a system: its policies, their constants, and whether layers share."""
    constants = [f"{kind}.{name}={value}" for kind, own in system.options.items() for name, value in own.items()]
    return " ".join([system.evict, system.place, system.prefetch, system.scope, *sorted(constants)])


def other_threads(profile: Profile, threads: int | None) -> list[str]:
    """What has to be told of a run on another number of ``threads`` for a CPU expert than ``profile`` tells of."""
    if None in (profile.cpu_threads, threads) or profile.cpu_threads == threads:
        return []
    return [f"the profile was measured with {profile.cpu_threads} threads for a CPU expert, the run had {threads}"]


def _through(size: float, points: tuple[Point, ...]) -> float:
    return _line(size, [point.size for point in points], [point.value_s for point in points])


def _line(size: float, sizes: list[int], seconds: list[float]) -> float:
    """Piecewise linear through the points, at the last slope (or the mean rate, with one point) beyond them."""
    if size <= sizes[-1] or len(sizes) == 1:
        scale = size / sizes[-1] if size > sizes[-1] else 1.0
        return float(np.interp(size, sizes, seconds)) * scale
    slope = max(0.0, (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2]))
    return seconds[-1] + slope * (size - sizes[-1])


def _check_same(model: ModelSpec, measured: ModelSpec) -> None:
    """Raises :class:`InputError` unless a profile measured with ``measured`` holds for ``model``."""
    for field in sorted(set(ModelSpec.model_fields) - set(IGNORED)):
        wanted, got = getattr(model, field), getattr(measured, field)
        if wanted != got:
            raise InputError(f"profile must be measured with {field} {wanted}, as in the model, got {got}")
    dense, got = model.layers - model.moe_layers, measured.layers - measured.moe_layers
    if dense != got:
        raise InputError(f"profile must be measured with {dense} dense layers, as in the model, got {got}")

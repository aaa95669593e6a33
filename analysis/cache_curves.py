"""Curves over capacities, exact for LRU and Belady, with replayed points for the other policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd

from analysis.cache_options import Session, words
from analysis.cache_study import resampled, run_all
from sim.replay import Capacity, Settings
from sim.replay.curves import ONE_PASS, POINTS, Curve, curve, points
from sim.replay.result import Replay

Unit = Literal["slots", "bytes"]
Progress = Callable[[str, int], None]


@dataclass(frozen=True, eq=False)
class Curves:
    """The lines of policies that one pass measures at every capacity, and replays of the others at a few."""

    lines: list[Curve]
    runs: list[list[Replay]]  # by capacity, then by policy
    settings: list[Settings]  # of these capacities
    phase: str

    def exact(self) -> pd.DataFrame | None:
        """The lines, or None when there is none."""
        frames = [line.frame(self.phase) for line in self.lines]
        return pd.concat(frames, ignore_index=True) if frames else None

    def sampled(self, rng: np.random.Generator) -> pd.DataFrame | None:
        """The points, with the ends ``low`` and ``high`` of their intervals where there are such; None for no point."""
        frames = [with_intervals(replays, self.phase, rng) for replays in self.runs if replays]
        return pd.concat(frames, ignore_index=True) if frames else None

    def at(self, place: int) -> dict[str, float]:
        """The hit ratios by assignment at one of the few capacities, by policy."""
        amount = self.settings[place].capacity.amount
        found = {line.policy: line.hit_ratios(self.phase)[line.capacities.searchsorted(amount)] for line in self.lines}
        return found | {one.settings.policy: one.row(self.phase)["hit_ratio_assignments"] for one in self.runs[place]}


def with_intervals(replays: Sequence[Replay], phase: str, rng: np.random.Generator) -> pd.DataFrame:
    """:func:`sim.replay.curves.points`, and the columns ``low`` and ``high`` where there are sequences enough."""
    frame, found = points(replays, phase), resampled(replays, phase, rng)
    intervals = [interval for place in range(len(replays)) if (interval := found.interval(place)) is not None]
    if not intervals:
        return frame
    return frame.assign(low=[one.low for one in intervals], high=[one.high for one in intervals])


def frame_rows(frame: pd.DataFrame | None, session: Session) -> list[dict[str, Any]]:
    """A frame as rows that are ready for JSON, with what else tells the figures from others."""
    if frame is None:
        return []
    settings = session.settings
    extra = {
        "order": settings.order if settings.contract == "serial" else "at-once",
        "sequences": settings.sequences,
        "batch": session.feed.plan.batch,
        "warmup_steps": session.feed.warmup_steps,
        "seed": settings.seed,
        "trace_digest": session.feed.trace.digest,
    }
    plain = frame.astype(object).where(frame.notna(), None)
    return [{str(name): value for name, value in row.items()} | extra for row in plain.to_dict("records")]


def settings_at(shares: str, unit: Unit, session: Session) -> list[Settings]:
    """The settings at each of ``shares``, such as ``25%``: of the slots, or of the bytes of all experts."""
    return [replace(session.settings, capacity=_capacity(text, unit, session)) for text in words(shares, "capacity")]


def _capacity(text: str, unit: Unit, session: Session) -> Capacity:
    header, scope = session.feed.trace.header, session.settings.scope
    if unit == "bytes" and not text.endswith("%"):
        return Capacity.bytes(text, header, scope)
    slots = Capacity.slots(text, header, scope)
    if unit == "slots":
        return slots
    size = int(Fraction(text[:-1]) * header.experts * sum(header.expert_bytes) / 100)
    return replace(Capacity.bytes(str(size), header, scope), label=text)


def measure(session: Session, settings: list[Settings], unit: Unit, phase: str, progress: Progress) -> Curves:
    """One pass for each policy that it serves, and a replay at each of ``settings`` for every other one."""
    once = [choice for choice in session.choices if choice.name in ONE_PASS]
    others = [choice for choice in session.choices if choice.name not in ONE_PASS]
    wanted = None if unit == "slots" else _bytes_of_pools(session, settings)
    lines = []
    for choice in once:
        progress(choice.name, 0)
        lines.append(_line(session, choice.name, unit, wanted, partial(progress, choice.name)))
    runs = [*run_all(session.feed, others, settings, calibration=session.calibration, progress=progress)]
    return Curves(lines, runs, settings, phase)


def _line(
    session: Session, policy: str, unit: Unit, wanted: Sequence[int] | None, progress: Callable[[int], None]
) -> Curve:
    how = session.settings
    return curve(
        session.feed,
        policy,
        scope=how.scope,
        contract=how.contract,
        order=how.order,
        sequences=how.sequences,
        seed=how.seed,
        unit=unit,
        capacities=wanted,
        progress=progress,
    )


def _bytes_of_pools(session: Session, settings: Sequence[Settings]) -> list[int]:
    """Even steps up to all bytes, and the capacities that are looked at by name."""
    header, scope = session.feed.trace.header, session.settings.scope
    most = header.experts * sum(header.expert_bytes) // (1 if scope == "global" else header.layers)
    even = np.linspace(max(header.expert_bytes), most, POINTS).astype(np.int64).tolist()
    return [*even, *(setting.capacity.amount for setting in settings)]

"""Many replays of one trace, and the rows that they come to: intervals, and shares of the gap to the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import isnan
from typing import Any

import numpy as np

from analysis.metrics import gap_closed
from analysis.uncertainty import Resampled, caveat
from sim.policies.base import Calibration, EvictionPolicy
from sim.replay import Feed, Settings
from sim.replay.result import PHASES, Replay
from sim.replay.run import replay
from traces.errors import InputError

BOUND = "belady"
"""What no policy without knowledge of the future can pass."""


@dataclass(frozen=True)
class Choice:
    """A policy that was asked for, with all its constants; ``registered`` ones may have a compiled twin."""

    name: str
    kind: type[EvictionPolicy]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def clairvoyant(self) -> bool:
        """Whether it knows the future, and so competes with nobody."""
        return "future" in self.kind.needs


@dataclass(frozen=True, eq=False)
class Cell:
    """All policies at one capacity, in one phase: what is compared with each other."""

    rows: list[dict[str, Any]]
    best: str | None  # highest hit ratio by assignment of those that do not know the future
    alike: tuple[str, ...]  # not distinguishable from the best
    caveat: str | None
    rivals: int = 0  # of the best: others that do not know the future


def run_all(
    feed: Feed,
    choices: Sequence[Choice],
    settings: Sequence[Settings],
    *,
    calibration: Calibration | None = None,
    progress: Callable[[str, int], None] = lambda policy, passes: None,
) -> Iterator[list[Replay]]:
    """Replays every choice under each of ``settings``, whose policy and options are replaced; yields one list for each.

    ``progress`` is told the policy, and how many passes were replayed.
    """
    for setting in settings:
        yield [_run(feed, choice, setting, calibration, partial(progress, choice.name)) for choice in choices]


def _run(
    feed: Feed, choice: Choice, setting: Settings, calibration: Calibration | None, progress: Callable[[int], None]
) -> Replay:
    progress(0)
    own = replace(setting, policy=choice.name, options=choice.options)
    try:
        return replay(feed, own, policy=choice.kind, calibration=calibration, progress=progress)
    except ValueError as error:
        if isinstance(error, InputError) or choice.options == choice.kind.defaults or " must " not in str(error):
            raise
        raise InputError(f"{choice.name}: {error}") from error  # a constant that the policy refuses


def cells(
    runs: Sequence[Sequence[Replay]], choices: Sequence[Choice], phases: Sequence[str], rng: np.random.Generator
) -> Iterator[Cell]:
    """What :func:`run_all` found, by capacity and phase; ``rng`` draws the resamples."""
    for replays, phase in product(runs, phases):
        yield _cell(replays, choices, phase, rng)


def _cell(replays: Sequence[Replay], choices: Sequence[Choice], phase: str, rng: np.random.Generator) -> Cell:
    rows = [_row(one, phase) for one in replays]
    found = resampled(replays, phase, rng)
    gaps = gap_closed([row["policy"] for row in rows], [row["hit_ratio_union"] for row in rows])
    for place, row in enumerate(rows):
        interval = found.interval(place)
        row["hit_ratio_assignments_low"] = None if interval is None else interval.low
        row["hit_ratio_assignments_high"] = None if interval is None else interval.high
        row["gap_closed"] = None if isnan(gaps[place]) else gaps[place]
    fair = [place for place, choice in enumerate(choices) if not choice.clairvoyant]
    best = max(fair, key=lambda place: found.ratios[place], default=None)
    verdicts = {place: found.alike(place, best) for place in fair if place != best} if best is not None else {}
    for place, row in enumerate(rows):
        row["not_distinguishable_from_best"] = True if place == best else verdicts.get(place)
    alike = tuple(choices[place].name for place, same in verdicts.items() if same)
    return Cell(
        rows, None if best is None else choices[best].name, alike, caveat(found.sequences), max(len(fair) - 1, 0)
    )


def resampled(replays: Sequence[Replay], phase: str, rng: np.random.Generator) -> Resampled:
    """The hit ratios by assignment of replays of the same feed, with resamples of its sequences."""
    groups = [one.groups(phase) for one in replays]
    return Resampled.of(np.stack([counts["hit_assignments"] for counts in groups]), groups[0]["assignments"], rng=rng)


def _row(one: Replay, phase: str) -> dict[str, Any]:
    row, tokens = one.row(phase), tokens_of(one.feed, phase)
    size = row["bytes_loaded"]
    return row | {"tokens": tokens, "bytes_a_token": None if size is None else size / tokens}


def tokens_of(feed: Feed, phase: str) -> int:
    """Tokens of ``phase`` that are counted, so without those of the warm-up."""
    sizes = np.diff(feed.plan.offsets)[feed.warmup_steps :]
    return int(sizes[np.isin(feed.plan.phase[feed.warmup_steps :], PHASES[phase])].sum())


def is_bound(settings: Settings, expert_bytes: Sequence[int]) -> bool:
    """Whether Belady bounds the hits: it does while all blocks take the same room."""
    return settings.capacity.unit == "slots" or len(set(expert_bytes)) == 1

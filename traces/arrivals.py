"""When requests arrive: at random at a given rate, or at times that were recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from traces.errors import InputError
from traces.schema import Array

SECONDS, MOMENT = "arrival_s", "TIMESTAMP"
"""Columns of a recording: seconds since the run begins, or dates with times of day, of which the first is 0 s."""


LENGTHS = ("ContextTokens", "GeneratedTokens")
"""Columns of the Azure LLM inference traces that no run uses."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Times of arrival in order. Raises :class:`InputError` unless they are finite, at least 0, and do not decrease."""

    times_s: Array  # float64 [requests], seconds since the run began
    source: str  # as a record of a run names it
    left_aside: tuple[str, ...] = ()  # columns of a recording that say how long requests are

    def __post_init__(self) -> None:
        times_s = self.times_s
        wrong = ~np.isfinite(times_s) | (times_s < 0) | (np.diff(times_s, prepend=0.0) < 0)
        if wrong.any():
            place = int(wrong.argmax())
            raise InputError(
                f"arrivals must be finite seconds from 0 on that do not decrease, got {times_s[place]} for request "
                f"{place} of {self.source}"
            )

    @classmethod
    def poisson(cls, rate_per_s: float, count: int, rng: np.random.Generator) -> Arrivals:
        """``count`` arrivals of a Poisson process: gaps are independent, exponential, with mean 1 / ``rate_per_s``.

        The first gap begins at 0 s. Raises :class:`InputError` unless the rate is above 0.
        """
        if not rate_per_s > 0:
            raise InputError(f"rate_per_s must be above 0, got {rate_per_s}")
        return cls(np.cumsum(rng.exponential(size=count)) / rate_per_s, "poisson")

    @classmethod
    def read(cls, path: Path, count: int | None = None) -> Arrivals:
        """The first ``count`` times of a CSV file; all of them where no count is given.

        Used is the column ``arrival_s``, in seconds, or else ``TIMESTAMP``, the date and time of the Azure LLM
        inference traces. Their numbers of tokens are left aside, which ``notes`` tell: a sequence of the routing trace
        has its own. Raises :class:`InputError`, with the row, for a file that is not like that, and when it has fewer
        times.
        """
        column, words, left_aside = _column(path, count)
        seconds = pd.to_numeric(words, errors="coerce") if column == SECONDS else _since_first(words)
        wrong = ~np.isfinite(seconds) | (seconds < 0) | (np.diff(seconds, prepend=0.0) < 0)
        if wrong.any():
            place = int(wrong.argmax())
            what = "seconds from 0 on" if column == SECONDS else "dates and times such as 2023-11-16 18:17:03.98"
            raise InputError(
                f"{path} must have {what} that do not decrease in column {column}, got {words.iloc[place]!r} "
                f"in row {place + 1}"
            )
        if len(words) < (1 if count is None else count):
            raise InputError(f"{path} must have a time for each of {count or 1} requests, got {len(words)}")
        return cls(seconds.to_numpy(np.float64), path.name, left_aside)

    @property
    def notes(self) -> list[str]:
        """What has to be told of a run with these arrivals."""
        if not self.left_aside:
            return []
        others = " and ".join(self.left_aside)
        return [f"of {self.source} the times alone are used, not {others}: requests are as long as the trace has them"]

    def at_rate(self, rate_per_s: float) -> Arrivals:
        """The same pattern, faster or slower, so that from the first to the last ``rate_per_s`` arrive on average.

        Raises :class:`InputError` when all arrive at once.
        """
        span_s = float(self.times_s[-1] - self.times_s[0])
        if not span_s:
            raise InputError(f"rate_per_s must be left out where all requests arrive at once, as in {self.source}")
        return replace(self, times_s=self.times_s * ((len(self.times_s) - 1) / span_s / rate_per_s))


def _column(path: Path, count: int | None) -> tuple[str, pd.Series[str], tuple[str, ...]]:
    """The name of the column with the times, its cells as they stand in the file, and which of :data:`LENGTHS` it
    has."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, nrows=count, encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pandas' own errors are ValueErrors
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise InputError(f"arrivals must be poisson or a CSV file with times, got {path}: {reason}") from error
    for name in (SECONDS, MOMENT):
        if name in table:
            return name, table[name], tuple(length for length in LENGTHS if length in table)
    raise InputError(f"{path} must have a column {SECONDS} or {MOMENT}, got {', '.join(map(str, table.columns))}")


def _since_first(words: pd.Series[str]) -> pd.Series[float]:
    """Seconds since the first of these moments; NaN for what is none."""
    moments = pd.to_datetime(words, errors="coerce", format="ISO8601", utc=True)
    return (moments - moments.iloc[:1].squeeze()).dt.total_seconds() if len(words) else pd.Series(dtype=float)

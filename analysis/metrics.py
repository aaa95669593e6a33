"""The numbers that the reports show, each defined in symbols in ``docs/metrics.md``: small functions without state.

A ratio whose denominator is empty is not a number (nan), never zero: nothing was observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from traces.errors import InputError
from traces.schema import Phase

Floats = npt.NDArray[np.float64]


def ratio(part: float, whole: float) -> float:
    """``part / whole``, or nan when ``whole`` is zero."""
    return float(part) / float(whole) if whole else float("nan")


def gap_closed(policies: Sequence[str], hit_ratios: Sequence[float]) -> list[float]:
    """The share of the way from the hit ratio of ``lru`` to that of ``belady`` that each policy has come.

    Hits are by union: there Belady is the bound. It is 0 for ``lru``, 1 for ``belady``, and below 0 for what hits less
    than ``lru``; nan where one of the two is missing, or Belady hits no more.
    """
    ratio_of = dict(zip(policies, hit_ratios, strict=True))
    least, bound = (ratio_of.get(name, float("nan")) for name in ("lru", "belady"))
    return [ratio(one - least, bound - least) if bound > least else float("nan") for one in hit_ratios]


def hit_ratio_union(counts: pd.DataFrame) -> float:
    """Share of the distinct experts asked for that were resident, over all rows of a layer or step frame."""
    return ratio(counts["hits_union"].sum(), counts["union"].sum())


def hit_ratio_assignments(counts: pd.DataFrame) -> float:
    """Share of the token-expert pairs whose expert was resident, over all rows of a layer or step frame."""
    return ratio(counts["hits_assignments"].sum(), counts["assignments"].sum())


def late_hit_ratio(counts: pd.DataFrame) -> float:
    """Share of the distinct experts asked for that had been prefetched and were still in flight."""
    return ratio(counts["late_hits"].sum(), counts["union"].sum())


def bytes_per_token(steps: pd.DataFrame) -> float:
    """Bytes of demand copies and streamed weights for each token, over the rows of a step frame."""
    return ratio(steps["bytes"].sum(), steps["tokens"].sum())


def tokens_per_s(steps: pd.DataFrame) -> float:
    """Tokens a second of step time, over the rows of a step frame; time between steps is left out."""
    return ratio(steps["tokens"].sum(), steps["latency_s"].sum())


def percentile(values: npt.ArrayLike, percent: float) -> float:
    """The percentile by linear interpolation between order statistics; nan when there are no values."""
    array = np.asarray(values, dtype=np.float64)
    return float(np.percentile(array, percent)) if array.size else float("nan")


def stall_share(steps: pd.DataFrame) -> float:
    """Share of the step time in which the GPU waited for copies or for CPU results."""
    return ratio(steps["stall_s"].sum(), steps["latency_s"].sum())


def covered_s(starts: npt.ArrayLike, ends: npt.ArrayLike) -> float:
    """Seconds that the union of the intervals [start, end] covers: overlapping work is counted once."""
    order = np.argsort(np.asarray(starts, dtype=np.float64), kind="stable")
    begin = np.asarray(starts, dtype=np.float64)[order]
    if not begin.size:
        return 0.0
    reach = np.maximum.accumulate(np.asarray(ends, dtype=np.float64)[order])
    already = np.concatenate(([begin[0]], reach[:-1]))
    return float(np.maximum(reach - np.maximum(begin, already), 0.0).sum())


def busy_shares(events: pd.DataFrame, span_s: float) -> dict[str, float]:
    """Share of ``span_s`` in which each resource of an events table was busy, by the resource's name."""
    groups = events.groupby("resource", sort=True)
    return {str(name): ratio(covered_s(group["start_s"], group["end_s"]), span_s) for name, group in groups}


def busy_within(events: pd.DataFrame, spans: npt.ArrayLike) -> dict[str, float]:
    """Share of ``spans`` in which each resource of an events table was busy, by the resource's name.

    ``spans`` [N, 2] are disjoint intervals (start_s, end_s); work counts as far as it lies within one.
    """
    within = np.asarray(spans, dtype=np.float64)
    total_s = float((within[:, 1] - within[:, 0]).sum())
    shares = {}
    for name, group in events.groupby("resource", sort=True):
        times_s, busy_s = _busy_until(group["start_s"].to_numpy(float), group["end_s"].to_numpy(float))
        until = np.interp(within, times_s, busy_s)
        shares[str(name)] = ratio(float((until[:, 1] - until[:, 0]).sum()), total_s)
    return shares


def _busy_until(starts: Floats, ends: Floats) -> tuple[Floats, Floats]:
    """Times, and the seconds that the union of the intervals covers up to each: linear in between."""
    order = np.argsort(starts, kind="stable")
    begin, reach = starts[order], np.maximum.accumulate(ends[order])
    first = np.concatenate(([True], begin[1:] > reach[:-1]))  # of a piece of the union
    opens, closes = begin[first], reach[np.concatenate((first[1:], [True]))]
    covered = np.cumsum(closes - opens)
    return np.stack([opens, closes], axis=1).ravel(), np.stack([covered - (closes - opens), covered], axis=1).ravel()


def waits(layers: pd.DataFrame) -> tuple[Floats, Floats]:
    """The ``stall_s`` of each row of a layers table in two: what the CPU alone would have caused, and the rest.

    Experts of the CPU that take longer than those of the GPU keep the layer waiting by the difference, whatever the
    link does; all further waiting is for copies.
    """
    stall_s, gpu_s, cpu_s = (layers[name].to_numpy(float) for name in ("stall_s", "gpu_experts_s", "cpu_experts_s"))
    for_cpu_s = np.minimum(stall_s, np.maximum(cpu_s - gpu_s, 0.0))
    return for_cpu_s, stall_s - for_cpu_s


def signed_errors(measured: npt.ArrayLike, simulated: npt.ArrayLike) -> Floats:
    """(simulated - measured) / measured for each token; raises InputError unless measured is above 0 everywhere."""
    base, guess = np.asarray(measured, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    if base.shape != guess.shape:
        raise InputError(f"simulated must have as many tokens as measured ({base.size}), got {guess.size}")
    if base.size and not base.min() > 0:
        raise InputError(f"measured latency must be above 0 s, got {base.min()}")
    return (guess - base) / base


def absolute_errors(measured: npt.ArrayLike, simulated: npt.ArrayLike) -> Floats:
    """|simulated - measured| / measured for each token."""
    return np.abs(signed_errors(measured, simulated))


def skill(measured: npt.ArrayLike, simulated: npt.ArrayLike, calibration_mean_s: npt.ArrayLike) -> float:
    """Our median absolute error over that of predicting the mean of a calibration; below 1 is better.

    ``calibration_mean_s`` is one mean for all tokens, or [N], one for each of the N tokens: with the tokens of several
    systems in one array, each system's own calibration mean is the harder constant to beat. nan when the constants make
    no error at all; raises InputError for another number of means.
    """
    tokens, means = np.shape(measured), np.asarray(calibration_mean_s, dtype=np.float64)
    if means.ndim and means.shape != tokens:
        raise InputError(
            f"calibration_mean_s must be one number or one a token ({np.size(measured)}), got {means.size}"
        )
    constant = np.broadcast_to(means, tokens)
    ours, theirs = absolute_errors(measured, simulated), absolute_errors(measured, constant)
    return ratio(percentile(ours, 50), percentile(theirs, 50))


def noise_floor(repeats: npt.ArrayLike) -> float:
    """Median over tokens of (median repeat - fastest repeat) / fastest repeat.

    ``repeats`` is [R, N]: seconds of N tokens in each of R repeats. nan for fewer than two repeats, or no tokens.
    """
    table = np.asarray(repeats, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] < 2 or not table.shape[1]:
        return float("nan")
    best = table.min(axis=0)
    return float(np.median((np.median(table, axis=0) - best) / best))


@dataclass(frozen=True)
class RankAgreement:
    """Kendall's tau over the pairs that can be told apart, and the share of pairs that cannot."""

    tau: float
    left_out: float


def kendall_tau(measured: npt.ArrayLike, simulated: npt.ArrayLike, noise: float = 0.0) -> RankAgreement:
    """Kendall's tau-b between two sets of points, without the pairs whose measured values are closer than the noise.

    A pair is left out when ``|m_i - m_j| / min(m_i, m_j) < noise``; with ``noise`` 0 none is, and the value is the
    tau-b of M. G. Kendall, "The treatment of ties in ranking problems" (Biometrika, 1945).
    """
    ours, theirs = np.asarray(measured, dtype=np.float64), np.asarray(simulated, dtype=np.float64)
    first, second = np.triu_indices(ours.size, k=1)
    distance = np.abs(ours[first] - ours[second])
    kept = distance >= noise * np.minimum(ours[first], ours[second])
    order = np.sign(ours[first] - ours[second])[kept]
    guess = np.sign(theirs[first] - theirs[second])[kept]
    untied = np.count_nonzero(order) * np.count_nonzero(guess)
    left_out = ratio(int(kept.size) - int(np.count_nonzero(kept)), kept.size)
    return RankAgreement(tau=ratio(float(order @ guess), float(np.sqrt(untied))), left_out=left_out)


@dataclass(frozen=True)
class ErrorSummary:
    """Relative errors of a set of tokens (or steps), as shares: 0.05 is 5%."""

    tokens: int
    median: float
    mape: float
    p90: float
    p99: float
    worst: float
    bias: float


def summarise_errors(measured: npt.ArrayLike, simulated: npt.ArrayLike) -> ErrorSummary:
    """The absolute errors by their quantiles and mean, and the signed bias."""
    signed = signed_errors(measured, simulated)
    absolute = np.abs(signed)
    if not signed.size:
        return ErrorSummary(0, *[float("nan")] * 6)
    return ErrorSummary(
        tokens=int(signed.size),
        median=percentile(absolute, 50),
        mape=float(absolute.mean()),
        p90=percentile(absolute, 90),
        p99=percentile(absolute, 99),
        worst=float(absolute.max()),
        bias=float(signed.mean()),
    )


@dataclass(frozen=True)
class RunSummary:
    """What one run did, in the numbers of ``docs/metrics.md``; decode only, but for ``ttft_s`` and ``busy``."""

    tokens: int
    tokens_per_s: float
    tpot_p50_s: float
    tpot_p90_s: float
    tpot_p99_s: float
    ttft_s: float
    hit_ratio_union: float
    hit_ratio_assignments: float
    late_hit_ratio: float
    bytes_per_token: float
    stall_share: float
    busy: dict[str, float]


def summarise_run(steps: pd.DataFrame, requests: pd.DataFrame, events: pd.DataFrame) -> RunSummary:
    """The summary of a run from its step frame, its requests frame and its events table."""
    decode = steps[steps["phase"] == Phase.DECODE]
    per_token: Any = np.repeat(decode["latency_s"].to_numpy(float), decode["lanes"].to_numpy(int))
    span_s = float(steps["end_s"].max() - steps["start_s"].min()) if len(steps) else 0.0
    return RunSummary(
        tokens=int(decode["tokens"].sum()),
        tokens_per_s=tokens_per_s(decode),
        tpot_p50_s=percentile(per_token, 50),
        tpot_p90_s=percentile(per_token, 90),
        tpot_p99_s=percentile(per_token, 99),
        ttft_s=percentile(requests["ttft_s"].to_numpy(float), 50),
        hit_ratio_union=hit_ratio_union(decode),
        hit_ratio_assignments=hit_ratio_assignments(decode),
        late_hit_ratio=late_hit_ratio(decode),
        bytes_per_token=bytes_per_token(decode),
        stall_share=stall_share(decode),
        busy=busy_shares(events, span_s),
    )

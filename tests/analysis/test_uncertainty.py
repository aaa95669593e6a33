"""Bootstrap intervals over sequences: what they are by hand, and what holds for any counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.uncertainty import CONFIDENCE, FEW, FEWEST, Resampled, caveat


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_ratio_is_that_of_the_sums_and_not_the_mean_of_ratios() -> None:
    found = Resampled.of(np.array([[1, 90]]), np.array([10, 100]), rng=rng())
    assert found.ratios.tolist() == [91 / 110]
    assert found.sequences == 2


def test_sequences_that_are_all_alike_leave_no_doubt() -> None:
    found = Resampled.of(np.array([[3, 6, 9, 3, 6]]), np.array([10, 20, 30, 10, 20]), rng=rng())
    interval = found.interval(0)
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((0.3, 0.3))


def test_a_resample_draws_sequences_with_replacement() -> None:
    """Five sequences, of which one hits always and four never: a resample holds the first one k times of five."""
    found = Resampled.of(np.array([[4, 0, 0, 0, 0]]), np.array([4, 4, 4, 4, 4]), rng=rng(), resamples=20_000)
    shares = np.bincount(np.rint(found.draws[:, 0] * 5).astype(int), minlength=6) / 20_000
    binomial = [1024 / 3125, 1280 / 3125, 640 / 3125, 160 / 3125, 20 / 3125, 1 / 3125]
    assert shares == pytest.approx(binomial, abs=0.015)
    interval = found.interval(0)
    assert interval is not None
    assert (interval.low, interval.high) == (0.0, 0.6)  # P(k <= 2) = 0.94, P(k <= 3) = 0.99


def test_the_interval_has_the_width_of_the_normal_one_where_there_are_many_sequences() -> None:
    ratios = rng(1).uniform(0.2, 0.6, 400)
    found = Resampled.of(ratios[None] * 50, np.full(400, 50), rng=rng())
    interval = found.interval(0)
    assert interval is not None
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * ratios.std() / 20, rel=0.1)
    assert interval.holds(float(ratios.mean()))


def test_paired_differences_tell_apart_what_the_intervals_alone_do_not() -> None:
    uses = np.full(30, 1000)
    hard = rng(2).integers(100, 900, 30)
    found = Resampled.of(np.stack([hard, hard - 10, hard]), uses, rng=rng())
    first, second = found.interval(0), found.interval(1)
    assert first is not None
    assert second is not None
    assert first.low < second.high
    between = found.difference(0, 1)
    assert between is not None
    assert (between.low, between.high) == pytest.approx((0.01, 0.01))
    assert found.alike(0, 1) is False
    assert found.alike(0, 2) is True


def test_a_difference_that_changes_its_sign_is_not_distinguishable() -> None:
    uses = np.full(10, 100)
    found = Resampled.of(np.array([[50] * 10, [40, 60] * 5]), uses, rng=rng())
    assert found.alike(0, 1) is True


@pytest.mark.parametrize("sequences", [1, FEWEST - 1])
def test_few_sequences_have_no_interval_and_no_verdict(sequences: int) -> None:
    found = Resampled.of(np.full((2, sequences), 3), np.full(sequences, 9), rng=rng())
    assert found.ratios.tolist() == [1 / 3, 1 / 3]
    assert found.interval(0) is None
    assert found.difference(0, 1) is None
    assert found.alike(0, 1) is None
    assert f"{sequences} sequences are too few" in str(caveat(sequences))


def test_the_caveat_ends_where_the_sequences_are_many() -> None:
    assert "too narrow" in str(caveat(FEWEST))
    assert "too narrow" in str(caveat(FEW - 1))
    assert caveat(FEW) is None


def test_sequences_without_a_use_do_not_count() -> None:
    uses = np.array([4, 0, 4, 4, 0, 4, 4])
    hits = np.array([[1, 0, 2, 3, 0, 4, 0]])
    found = Resampled.of(hits, uses, rng=rng())
    same = Resampled.of(hits[:, uses > 0], uses[uses > 0], rng=rng())
    assert found.sequences == 5
    assert np.array_equal(found.draws, same.draws)


def test_nothing_used_is_no_ratio() -> None:
    found = Resampled.of(np.zeros((1, 3)), np.zeros(3), rng=rng())
    assert np.isnan(found.ratios).all()
    assert found.interval(0) is None


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hits must be \[policies, groups\] with uses \[groups\]"):
        Resampled.of(np.zeros((2, 3)), np.zeros(4), rng=rng())


def test_many_resamples_of_many_sequences_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    hits, uses = rng(3).integers(0, 9, (2, 40)), np.full(40, 10)
    whole = Resampled.of(hits, uses, rng=rng(), resamples=50)
    monkeypatch.setattr("analysis.uncertainty._MOST_DRAWS", 40 * 7)
    assert np.array_equal(Resampled.of(hits, uses, rng=rng(), resamples=50).draws, whole.draws)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=FEWEST, max_size=30), st.integers(0, 99))
def test_what_holds_for_any_counts(counts: list[tuple[int, int]], seed: int) -> None:
    hits = np.array([[min(pair) for pair in counts], [min(pair) // 2 for pair in counts]])
    uses = np.array([max(pair) for pair in counts])
    found = Resampled.of(hits, uses, rng=rng(seed), resamples=200)
    again = Resampled.of(hits, uses, rng=rng(seed), resamples=200)
    assert np.array_equal(found.draws, again.draws)
    if found.sequences < FEWEST:
        assert found.interval(0) is None
        return
    ours, theirs, between = found.interval(0), found.interval(1), found.difference(0, 1)
    assert ours is not None
    assert theirs is not None
    assert between is not None
    assert 0 <= ours.low <= ours.high <= 1
    assert theirs.high <= ours.high + 1e-12
    assert between.low >= -1e-12
    reverse = found.difference(1, 0)
    assert reverse is not None
    assert (reverse.low, reverse.high) == pytest.approx((-between.high, -between.low))


def test_the_confidence_is_what_the_table_says() -> None:
    assert CONFIDENCE == 0.95

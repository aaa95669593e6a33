"""Arrivals: the Poisson process, recorded times, and files that are not like that."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.traces.requesting import requests_of
from traces.arrivals import Arrivals
from traces.batching import BatchSpec, Requests, schedule_of
from traces.errors import InputError

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04,3180,8\n"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "serving" / "azure-2023"


def written(folder: Path, text: str) -> Path:
    path = folder / "times.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_poisson_gaps_are_exponential() -> None:
    arrivals = Arrivals.poisson(4.0, 20_000, np.random.default_rng(0))
    gaps = np.diff(arrivals.times_s, prepend=0.0)
    assert gaps.mean() == pytest.approx(0.25, rel=0.02)
    assert gaps.std() == pytest.approx(0.25, rel=0.02)
    assert np.mean(gaps > 0.25) == pytest.approx(np.exp(-1), rel=0.02)


def test_a_seed_gives_the_same_arrivals_and_a_rate_scales_them() -> None:
    times = [Arrivals.poisson(rate, 5, np.random.default_rng(seed)).times_s for rate, seed in ((1, 0), (1, 0), (2, 0))]
    np.testing.assert_array_equal(times[0], times[1])
    np.testing.assert_allclose(times[0], 2 * times[2])
    assert (Arrivals.poisson(1, 5, np.random.default_rng(1)).times_s != times[0]).all()


def test_seconds_are_read_as_they_are(tmp_path: Path) -> None:
    arrivals = Arrivals.read(written(tmp_path, "name,arrival_s,TIMESTAMP\na,0.5,x\nb, 2,x\nc,2,x\nd,1e1,x\n"))
    assert arrivals.times_s.tolist() == [0.5, 2.0, 2.0, 10.0]
    assert arrivals.source == "times.csv"


def test_dates_count_from_the_first(tmp_path: Path) -> None:
    assert Arrivals.read(written(tmp_path, AZURE)).times_s == pytest.approx([0.0, 0.02004], abs=1e-9)
    zoned = "\ufeffTIMESTAMP\n2024-05-10 00:00:00.009930+00:00\n2024-05-10 02:00:01+02:00\n"
    assert Arrivals.read(written(tmp_path, zoned)).times_s == pytest.approx([0.0, 0.99007], abs=1e-9)


def test_no_more_is_read_than_is_needed(tmp_path: Path) -> None:
    path = written(tmp_path, "arrival_s\n1\n2\nnonsense\n")
    assert Arrivals.read(path, 2).times_s.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "arrivals must be poisson or a CSV file with times, got {path}: No columns to parse from file"),
        ("time,tokens\n1,2\n", "{path} must have a column arrival_s or TIMESTAMP, got time, tokens"),
        ("arrival_s\n", "{path} must have a time for each of 2 requests, got 0"),
        ("TIMESTAMP\n", "{path} must have a time for each of 2 requests, got 0"),
        ("arrival_s\n1\n", "{path} must have a time for each of 2 requests, got 1"),
        *[
            (
                f"arrival_s\n1\n{cell}\n",
                "{path} must have seconds from 0 on that do not decrease in column arrival_s, "
                f"got {cell!r} in row 2",
            )
            for cell in ("soon", "nan", "inf", "-1", "0.5")
        ],
        *[
            (
                f"TIMESTAMP,tokens\n2023-11-16 18:17:03,2\n{cell},2\n",
                "{path} must have dates and times such as 2023-11-16 18:17:03.98 that do not decrease in column "
                f"TIMESTAMP, got {cell!r} in row 2",
            )
            for cell in ("yesterday", "", "2023-11-16 18:17:02")
        ],
        ("TIMESTAMP\nno\n2023-11-16\n", "{path} must have dates and times such as 2023-11-16 18:17:03.98 that do not "
         "decrease in column TIMESTAMP, got 'no' in row 1"),
    ],
)  # fmt: skip
def test_a_file_that_is_wrong(tmp_path: Path, text: str, fault: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as error:
        Arrivals.read(path, 2)
    assert str(error.value) == fault.format(path=path)


def test_a_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"times\.csv: .*line 3"):
        Arrivals.read(written(tmp_path, "arrival_s,tokens\n1,2\n2,3,4,5\n"))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"got .*none\.csv: No such file or directory$"):
        Arrivals.read(tmp_path / "none.csv")
    with pytest.raises(InputError, match=r"Is a directory$"):
        Arrivals.read(tmp_path)
    (tmp_path / "image").write_bytes(b"\x89PNG\r\n\x00\xff")
    with pytest.raises(InputError, match="arrivals must be poisson or a CSV file with times, got"):
        Arrivals.read(tmp_path / "image")


@pytest.mark.parametrize("times", [[1.0, 0.5], [-1.0], [float("nan")], [float("inf")]])
def test_times_must_be_in_order(times: list[float]) -> None:
    with pytest.raises(InputError, match=f"got {times[-1]} for request {len(times) - 1} of hand$"):
        Arrivals(np.array(times), "hand")


def test_a_rate_must_be_above_nothing() -> None:
    with pytest.raises(InputError, match=r"rate_per_s must be above 0, got 0"):
        Arrivals.poisson(0.0, 3, np.random.default_rng(0))


def test_recorded_times_are_stretched_to_a_rate() -> None:
    stretched = Arrivals(np.array([0.0, 1.0, 4.0]), "hand").at_rate(0.25)
    assert stretched.times_s.tolist() == [0.0, 2.0, 8.0]
    with pytest.raises(InputError, match="rate_per_s must be left out where all requests arrive at once, as in hand"):
        Arrivals(np.zeros(3), "hand").at_rate(1.0)


def test_a_trace_takes_the_times_and_keeps_its_own_lengths(tmp_path: Path) -> None:
    spec = BatchSpec(arrivals=str(written(tmp_path, AZURE)), rate_per_s=0.5)
    plan = schedule_of(requests_of((2, 1), (1, 1)), spec)
    assert isinstance(plan, Requests)
    assert plan.arrivals is not None
    assert plan.arrivals.times_s == pytest.approx([0.0, 2.0])
    assert [len(step.rows) for step in plan.in_order()] == [2, 1, 1, 1]
    with pytest.raises(InputError, match="must have a time for each of 3 requests, got 2"):
        schedule_of(requests_of((2, 1), (1, 1), (1, 1)), spec)


def test_lengths_that_are_left_aside_are_told(tmp_path: Path) -> None:
    told = Arrivals.read(written(tmp_path, AZURE)).at_rate(0.5).notes
    assert told == [
        "of times.csv the times alone are used, not ContextTokens and GeneratedTokens: requests are as long as the "
        "trace has them"
    ]
    assert Arrivals.read(written(tmp_path, "arrival_s\n0\n1\n")).notes == []


@pytest.mark.parametrize(("name", "requests", "last_s"), [("code", 8819, 3435.948056), ("conv", 19366, 3501.721937)])
def test_the_azure_traces(name: str, requests: int, last_s: float) -> None:
    path = SHARED / f"AzureLLMInferenceTrace_{name}.csv"
    if not path.exists():
        pytest.skip("the shared recordings are not beside this checkout")
    times_s = Arrivals.read(path).times_s
    assert (len(times_s), times_s[0], times_s[-1]) == (requests, 0.0, pytest.approx(last_s))

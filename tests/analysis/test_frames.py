from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.frames import (
    COMPONENTS,
    fastest,
    layer_frame,
    load_runs,
    requests_frame,
    step_frame,
    token_frame,
)
from sim.results import ResultError, RunInfo, RunResult


def test_step_frame_sums_layers(measured: RunResult) -> None:
    steps = step_frame(measured)
    assert steps["step"].tolist() == [0, 1, 2, 3]
    assert steps["phase"].tolist() == [0, 1, 1, 1]
    assert steps["tokens"].tolist() == [3, 1, 1, 1]
    assert steps["latency_s"].to_numpy() == pytest.approx([0.020, 0.010, 0.012, 0.008])
    assert steps["stall_s"].to_numpy() == pytest.approx([0.005, 0.002, 0.0035, 0.0])
    assert steps["transfer_s"].to_numpy() == pytest.approx([0.0025, 0.001, 0.00175, 0.0])
    assert steps["misses"].tolist() == [7, 1, 2, 0]
    assert steps["bytes"].tolist() == [700, 100, 100, 0]


def test_components_add_up_to_the_latency(measured: RunResult) -> None:
    steps = step_frame(measured)
    assert steps[list(COMPONENTS)].sum(axis=1).to_numpy() == pytest.approx(steps["latency_s"].to_numpy())
    assert steps["other_s"].to_numpy() == pytest.approx([0.001, 0.0, 0.0005, 0.0], abs=1e-12)


def test_a_step_without_layer_rows_has_zero_counts(measured: RunResult) -> None:
    measured.layers = measured.layers[measured.layers["step"] != 2]
    steps = step_frame(measured)
    assert steps["misses"].tolist() == [7, 1, 0, 0]
    assert steps.loc[2, "other_s"] == pytest.approx(0.011)


def test_lanes_of_a_batch_share_the_step(measured: RunResult) -> None:
    lane = measured.tokens.assign(sequence=1)
    measured.tokens = pd.concat([measured.tokens, lane], ignore_index=True)
    steps, tokens = step_frame(measured), token_frame(measured)
    assert steps["lanes"].tolist() == [2, 2, 2, 2]
    assert steps["tokens"].tolist() == [6, 2, 2, 2]
    assert steps.loc[1, "head_s"] == pytest.approx(0.001)
    assert list(zip(tokens["step"], tokens["sequence"], strict=True)) == [
        (1, 0),
        (2, 0),
        (3, 0),
        (1, 1),
        (2, 1),
        (3, 1),
    ]
    assert tokens["latency_s"].to_numpy() == pytest.approx([0.010, 0.012, 0.008] * 2)


def test_token_frame_is_decode_only(measured: RunResult) -> None:
    tokens = token_frame(measured)
    assert tokens["step"].tolist() == [1, 2, 3]
    assert tokens["start_s"].to_numpy() == pytest.approx([0.020, 0.030, 0.042])


def test_layer_frame_counts_decode(measured: RunResult) -> None:
    layers = layer_frame(measured)
    assert layers["layer"].tolist() == [0, 1]
    assert layers["union"].tolist() == [6, 6]
    assert layers["hit_ratio"].to_numpy() == pytest.approx([4 / 6, 4 / 6])
    assert layer_frame(measured, None)["hit_ratio"].to_numpy() == pytest.approx([4 / 9, 4 / 10])


def test_layer_that_nothing_asked_has_no_ratio(measured: RunResult) -> None:
    measured.layers.loc[measured.layers["layer"] == 1, ["union", "hits_union"]] = 0
    assert np.isnan(layer_frame(measured)["hit_ratio"].iloc[1])


def test_requests_frame(measured: RunResult) -> None:
    frame = requests_frame(measured)
    assert frame.loc[0, "ttft_s"] == pytest.approx(0.020)
    assert frame.loc[0, "latency_s"] == pytest.approx(0.050)
    assert frame.loc[0, "tpot_s"] == pytest.approx(0.010)
    assert "ttft_s" not in measured.requests


def test_one_new_token_has_no_time_per_token(measured: RunResult) -> None:
    measured.requests["new_tokens"] = 1
    assert np.isnan(requests_frame(measured).loc[0, "tpot_s"])


def test_fastest_takes_whole_rows(measured: RunResult, slower: RunResult, make_run: Callable[..., RunResult]) -> None:
    rows = [(0, 3, 30, 4, 8, 1, 5), (1, 1, 9, 1, 4, 1, 2), (1, 1, 13, 2, 4, 1, 3.5), (1, 1, 9, 2, 4, 1, 0)]
    third = make_run("measured", steps_ms=rows)
    best = fastest([step_frame(run) for run in (slower, measured, third)])
    assert best["step"].tolist() == [0, 1, 2, 3]
    assert best["latency_s"].to_numpy() == pytest.approx([0.020, 0.009, 0.012, 0.008])
    assert best["dense_s"].to_numpy() == pytest.approx([0.004, 0.001, 0.002, 0.002])


def test_fastest_gives_a_tie_to_the_earlier(measured: RunResult, make_run: Callable[..., RunResult]) -> None:
    rows = [(0, 3, 20, 4, 8, 1, 5), (1, 1, 10, 3, 3, 1, 2), (1, 1, 12, 2, 4, 1, 3.5), (1, 1, 8, 2, 4, 1, 0)]
    twin = make_run("measured", steps_ms=rows)
    frames = [step_frame(measured), step_frame(twin)]
    for frame in frames:
        frame["latency_s"] = [0.020, 0.010, 0.012, 0.008]
    assert fastest(frames).loc[1, "dense_s"] == pytest.approx(0.002)
    assert fastest(frames[::-1]).loc[1, "dense_s"] == pytest.approx(0.003)


def test_load_runs_keeps_the_order(folders: tuple[Path, Path]) -> None:
    runs = load_runs([folders[1], folders[0]])
    assert [run.info.source for run in runs] == ["simulated", "measured"]
    assert step_frame(runs[1])["latency_s"].to_numpy() == pytest.approx([0.020, 0.010, 0.012, 0.008])


def test_load_runs_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="nowhere must be a result folder"):
        load_runs([tmp_path / "nowhere"])


def test_empty_run_gives_empty_frames(measured: RunResult) -> None:
    empty = RunResult.of(RunInfo.model_validate(measured.info.model_dump()))
    assert (
        len(step_frame(empty)) == len(token_frame(empty)) == len(layer_frame(empty)) == len(requests_frame(empty)) == 0
    )

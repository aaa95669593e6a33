"""DALI's residual router: which look-ahead serves for it, and what stands in where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.needs import check_causal, check_needs
from sim.presets import preset
from sim.replay.calibration import TraceCalibration
from sim.scenario import Scenario
from sim.systems import SystemSpec
from tests.sim.hand import run, trace_of
from traces.edit import slice_trace
from traces.errors import InputError
from traces.router_means import packed
from traces.schema import Trace
from traces.shipped import find_trace
from traces.store import load, save

STEPS = [[[0], [1]], [[2], [3]], [[0], [2]]]
AHEAD = [[[1], []], [[3], []], [[2], []]]
WANTS = SystemSpec(prefetch="residual-router")


def with_header(trace: Trace, **changed: Any) -> Trace:
    return replace(trace, header=trace.header.model_copy(update=changed))


PLAIN = trace_of(STEPS, lookahead=AHEAD)
MEANS = packed(np.array([[1.0, 0.0], [0.0, 1.0]]))
RESIDUAL = with_header(PLAIN, lookahead_router="residual", router_means=MEANS)


def test_a_plain_look_ahead_is_refused() -> None:
    told = r"trace must have look-ahead by the residual router for prefetch residual-router, got another one's \(rec"
    with pytest.raises(InputError, match=told):
        check_needs(PLAIN, WANTS)


def test_a_corrected_look_ahead_serves() -> None:
    check_needs(RESIDUAL, WANTS)


def test_it_prefetches_what_the_look_ahead_names() -> None:
    ours = run(RESIDUAL, 1, prefetch="residual-router")
    plain = run(RESIDUAL, 1, prefetch="next-router")
    assert ours.operations.equals(plain.operations)
    assert ours.info.prefetched_bytes > 0


def test_decoding_takes_the_means_of_the_calibration_trace() -> None:
    check_causal(WANTS, TraceCalibration.of(RESIDUAL, None))
    for calibration, got in ((None, "none"), (TraceCalibration.of(PLAIN, None), "another")):
        with pytest.raises(InputError, match=f"recorded with --lookahead-router residual for residual-.* got {got}$"):
            check_causal(WANTS, calibration)


def test_dali_falls_back_to_the_plain_router_and_says_so(tmp_path: Path) -> None:
    piece = slice_trace(load(find_trace("mixed")), sequences="0", tokens=52)
    save(piece, tmp_path / "plain.safetensors")
    save(with_header(piece, lookahead_router="residual"), tmp_path / "residual.safetensors")

    def prepared(name: str) -> Any:
        return Scenario(trace=str(tmp_path / name), system=preset("dali"), calibration="code").prepare()

    plain, residual = prepared("plain.safetensors"), prepared("residual.safetensors")
    note = "look-ahead has no mean residuals: prefetch next-router stands in"
    assert (plain.system.prefetch, note in plain.notes) == ("next-router", True)
    assert (residual.system.prefetch, note in residual.notes) == ("residual-router", False)
    assert plain.system.options == residual.system.options == {"prefetch": {"width": 1}}

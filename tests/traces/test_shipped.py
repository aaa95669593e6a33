"""The recordings that ship: whole, of the shipped model, and regenerable.

Balance and locality are checked of ``mixed`` alone: one domain may favour some experts, and sequences that are decoded
together share a batch's locality.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from traces.errors import InputError
from traces.schema import Phase, Trace
from traces.shipped import SHIPPED_TRACES, find_trace
from traces.stats import imbalance, lru_hit_ratio
from traces.store import load, stored_digest

ROOT = Path(__file__).parents[2]
WEIGHTS = ROOT / "real" / "models" / "small" / "model.safetensors"


@pytest.fixture(scope="module", params=sorted(SHIPPED_TRACES))
def trace(request: pytest.FixtureRequest) -> Trace:
    return load(SHIPPED_TRACES[request.param], verify=True)


def test_three_ship_in_under_ten_megabytes() -> None:
    assert set(SHIPPED_TRACES) == {"batch4", "code", "mixed"}
    assert sum(path.stat().st_size for path in SHIPPED_TRACES.values()) < 10_000_000
    assert all(stored_digest(path) for path in SHIPPED_TRACES.values())


def test_each_was_recorded_from_the_model_that_ships(trace: Trace) -> None:
    header = trace.header
    assert (header.model, header.layers, header.experts, header.top_k) == ("moetwin-small", 8, 32, 4)
    assert header.revision == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert header.made_by.startswith("moetwin trace record ")
    assert not header.synthetic
    assert header.licence == "Apache-2.0"


def test_each_has_both_phases_gates_full_scores_and_three_layers_of_lookahead(trace: Trace) -> None:
    assert set(trace.phase.tolist()) == {int(Phase.PREFILL), int(Phase.DECODE)}
    assert trace.gates is not None
    assert trace.scores is not None
    assert trace.lookahead_depth == 3
    np.testing.assert_allclose(trace.scores.astype(float).sum(axis=-1), 1.0, atol=5e-3)


def test_mixed_is_balanced_and_has_locality_that_shuffling_destroys() -> None:
    mixed = load(find_trace("mixed"))
    assert len(set(mixed.header.domains)) == 6
    assert imbalance(mixed).max() <= 3
    shuffled = lru_hit_ratio(mixed, 8, np.random.default_rng(0))
    assert lru_hit_ratio(mixed, 8) >= shuffled + 0.08


def test_a_name_that_does_not_ship_is_refused_with_near_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean mixed"):
        find_trace("mixd")
    with pytest.raises(InputError, match=r"^routing must be an existing file, got mine\.safetensors$"):
        find_trace("mine.safetensors", "routing")


@pytest.mark.slow
def test_recording_again_makes_the_same_choices() -> None:
    """Prompts are compared, not what is sampled from them: sums may differ in the last bit on another processor."""
    from real.cli import RecordOptions, record_with

    code = load(find_trace("code"))
    again = record_with(RecordOptions.parse(code.header.made_by))
    prefill = [one.expert_ids[one.phase == Phase.PREFILL] for one in (code, again)]
    assert prefill[0].shape == prefill[1].shape
    assert (prefill[0] == prefill[1]).mean() > 0.999

"""Fitting: a known law is found again, and what is generated resembles recorded traces in what policies live on."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from traces import InputError, Trace, store
from traces.edit import slice_trace
from traces.fit import fit, likeness, twin
from traces.fitted import Law, generate
from traces.importers import import_files
from traces.locality import batch_unions
from traces.portrait import BATCHES, Portrait, portrait
from traces.shipped import find_trace
from traces.synthetic import Shape, Sizes, markov, zipf

SHARED = Path(__file__).parents[3] / "shared" / "data" / "routing"

RECORDINGS = {
    "gpt-oss": ("gpt-oss-json", "gpt-oss-20b-decode", "0:32"),
    "law": ("esft", "deepseek-v2-lite-esft/law", "0:20"),
    "intent": ("esft", "deepseek-v2-lite-esft/intent", ""),
}
"""Format, folder and the sequences that are taken, as a part is quicker."""


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@cache
def source(name: str) -> Trace:
    """The shipped trace, or a recording of another model; skips the test where that is not there."""
    if name == "mixed":
        return store.load(find_trace(name))
    form, folder, sequences = RECORDINGS[name]
    if not (SHARED / folder).is_dir():
        pytest.skip("the shared recordings are not beside this checkout")
    return slice_trace(import_files(form, [SHARED / folder]).trace, sequences=sequences, layers="4:10")


@cache
def law_of(name: str) -> Law:
    return fit(source(name), rng())


@cache
def portraits(name: str) -> tuple[Portrait, Portrait]:
    """Of the source, and of what is generated at its dimensions, the mean of three: one alone scatters."""
    made = [portrait(twin(law_of(name), rng(seed), source(name))) for seed in range(3)]
    recorded = portrait(source(name))
    return recorded, {key: value and float(np.mean([one[key] for one in made])) for key, value in recorded.items()}


def belady(trace: Trace, share: float) -> float:
    slots = int(share * trace.header.experts)
    played = replay(Feed.of(trace), Settings(policy="belady", capacity=Capacity(slots, "slots", str(slots))))
    return float(played.row()["hit_ratio_assignments"])


SOURCES = ["mixed", "gpt-oss", "law", "intent"]
UNIONS = {"gpt-oss": 0.09}
"""Neighbouring sequences of this one are of kindred domains, which a law does not know."""


@pytest.mark.parametrize("name", SOURCES)
def test_what_is_generated_has_the_overlaps_and_the_hits_of_the_source(name: str) -> None:
    recorded, generated = portraits(name)
    for key in (
        "overlap_between",
        "overlap_lag_1",
        "overlap_lag_2",
        "overlap_lag_8",
        "overlap_lag_32",
        "lru_25",
        "lru_50",
    ):
        assert generated[key] == pytest.approx(recorded[key], abs=0.03), key
    for key in ("overlap_domain", "overlap_place", "cross_layer_1", "cross_layer_3", "gini"):
        assert generated[key] == pytest.approx(recorded[key], abs=0.06), key
    assert generated["busiest_tenth"] == pytest.approx(recorded["busiest_tenth"], abs=0.02)
    assert generated["largest_gate"] == pytest.approx(recorded["largest_gate"], abs=0.01)


@pytest.mark.parametrize("name", SOURCES)
def test_batches_need_as_many_experts_as_in_the_source(name: str) -> None:
    recorded, generated = portraits(name)
    for batch in BATCHES:
        key = f"union_{batch}"
        assert generated[key] == pytest.approx(recorded[key], rel=UNIONS.get(name, 0.05)), key


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_an_optimal_cache_hits_as_often_as_in_the_source(name: str, share: float) -> None:
    recorded, generated = source(name), twin(law_of(name), rng(1), source(name))
    assert belady(generated, share) == pytest.approx(belady(recorded, share), abs=0.03)


def test_the_lookahead_is_as_good_as_that_of_the_source() -> None:
    recorded, generated = portraits("mixed")
    for distance in (1, 2, 3):
        key = f"lookahead_{distance}"
        assert generated[key] == pytest.approx(recorded[key], abs=0.01)


def test_a_law_names_its_source() -> None:
    law, trace = law_of("mixed"), source("mixed")
    assert (law.source, law.source_digest) == (trace.header.model, trace.digest)
    assert law.domains == trace.header.domains
    assert law.scores
    assert law.renormalised


def test_a_fit_is_the_same_again() -> None:
    small = slice_trace(source("mixed"), sequences="0:6", layers="0:4")
    told: list[str] = []
    corrected = replace(small, header=small.header.model_copy(update={"lookahead_router": "residual"}))
    laws = [fit(one, rng(3), say=told.append) for one in (small, small, corrected)]
    assert laws[0] == laws[1]
    assert [law.lookahead_router for law in laws] == ["plain", "plain", "residual"]
    assert told[0] == "popularity and memory"


def test_a_twin_has_the_rows_of_its_source() -> None:
    trace = slice_trace(source("mixed"), sequences="0:6", layers="0:4")
    order = np.argsort(trace.position, kind="stable")  # lock-step: sequences alternate
    rows = {name: array[order] for name, array in trace.arrays()} | {"step": trace.position[order]}
    mixed = Trace.of(trace.header, **rows)
    law = law_of("mixed")
    one, other = twin(law, rng(), trace), twin(law, rng(), mixed)
    assert one.header.synthetic
    np.testing.assert_array_equal(one.sequence, trace.sequence)
    np.testing.assert_array_equal(one.expert_ids[order], other.expert_ids)


def test_a_known_law_is_found_again() -> None:
    shape = Shape(sequences=24, prompt_tokens=0, new_tokens=160, layers=6, experts=32, top_k=4)
    bias = tuple(np.linspace(0.6, -0.6, 16).tolist())
    law = Law(source="x", source_digest="", bias=bias, sequence=0.2, windows=((4, 0.3),), rank=6.0, drift=0.95)
    found = fit(generate(law, 0, shape), rng())
    assert found.rank == pytest.approx(6.0, abs=1.5)
    assert found.drift == pytest.approx(0.95, abs=0.03)
    assert found.sharpness == pytest.approx(1.0, abs=0.1)
    assert found.bias_of(32)[0] - found.bias_of(32)[-1] == pytest.approx(1.2, abs=0.35)
    lasting = {tokens: share for tokens, share in found.windows if tokens <= 8}
    assert sum(lasting.values()) == pytest.approx(0.3, abs=0.08)
    assert found.sequence + sum(share for tokens, share in found.windows if tokens > 8) == pytest.approx(0.2, abs=0.06)
    assert found.domain == 0
    assert found.place < 0.02


def test_other_dimensions_keep_what_is_beyond_chance() -> None:
    big = generate(law_of("mixed"), 0, Shape(sequences=16, layers=6, experts=128, top_k=16, prompt_tokens=8))
    recorded, generated = portraits("mixed")[0], likeness(law_of("mixed"), rng(), big)[0]
    for key in ("overlap_lag_1", "overlap_lag_8", "overlap_between", "lru_25", "lru_50"):
        assert generated[key] == pytest.approx(recorded[key], abs=0.04), key
    assert generated["lookahead_1"] == pytest.approx(recorded["lookahead_1"], abs=0.01)


def test_unions_of_a_larger_model_come_near_those_that_were_published() -> None:
    """Qwen3-30B-A3B: mean unions of 15.02 and 26.58 at batches 2 and 4 (arXiv 2608.07911); nothing is fitted on it."""
    shape = Shape(sequences=16, prompt_tokens=0, new_tokens=64, layers=4, experts=128, top_k=8)
    found = np.nanmean(batch_unions(generate(law_of("mixed"), 0, shape), (1, 2, 4))[0], axis=1)
    np.testing.assert_allclose(found, [8.00, 15.02, 26.58], rtol=0.08)


SMALL = Sizes(sequences=4, prompt_tokens=16, new_tokens=16, layers=3, experts=8, top_k=2)


@pytest.mark.parametrize(
    "trace",
    [
        markov(rng(), Sizes(sequences=1, prompt_tokens=64, new_tokens=64, layers=2, experts=8, top_k=2), locality=0.6),
        zipf(rng(), Sizes(sequences=4, layers=1, experts=8, top_k=2)),
        zipf(rng(), Sizes(sequences=4, layers=3, experts=8, top_k=1)),
        zipf(rng(), Sizes(sequences=4, layers=3, experts=2, top_k=1)),
        zipf(rng(), Sizes(sequences=40, prompt_tokens=0, new_tokens=2, layers=4, experts=8, top_k=2)),
    ],
    ids=["one sequence", "one layer", "top-1", "two experts", "short sequences"],
)
def test_what_a_trace_does_not_tell_keeps_its_default(trace: Trace) -> None:
    law = fit(trace, rng())
    recorded, generated = likeness(law, rng(1), trace)
    assert generated["lru_25"] == pytest.approx(recorded["lru_25"], abs=0.12)
    assert generate(law, 0, Shape(layers=2, experts=16, top_k=4)).header.synthetic


def test_a_trace_without_gates_and_with_holes_can_be_fitted() -> None:
    trace = zipf(rng(), SMALL)
    rows = dict(trace.arrays())
    ids = rows["expert_ids"].copy()
    ids[5:9] = 65535
    law = fit(Trace.of(trace.header, **rows | {"expert_ids": ids, "gates": None}), rng())
    assert (law.sharpness, law.renormalised) == (1.0, True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"top_k": 8}, r"trace must have more experts than top_k \(8\) to choose from, got as many"),
        ({"sequences": 1}, "trace must have at least 64 tokens to be fitted, got 32"),
        (
            {"sequences": 64, "prompt_tokens": 0, "new_tokens": 1},
            "trace must have a sequence of 2 tokens or more to be fitted, got single tokens",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(changed: dict[str, Any], message: str) -> None:
    sizes = {"sequences": 4, "prompt_tokens": 16, "new_tokens": 16, "layers": 3, "experts": 8, "top_k": 2} | changed
    with pytest.raises(InputError, match=f"^{message}$"):
        fit(zipf(rng(), Sizes(**sizes)), rng())

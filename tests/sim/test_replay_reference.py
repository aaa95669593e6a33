"""Published routing of real models, replayed: figures that were worked out elsewhere.

The recordings lie beside the checkout, and are not shipped: without them these tests are skipped.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim.replay import Capacity, Feed, Settings
from sim.replay.run import replay
from traces.importers import import_files
from traces.schema import NOT_ROUTED, Trace

SHARED = Path(__file__).parents[3] / "shared" / "data" / "routing"
RECORDINGS = {
    "gpt-oss": ("gpt-oss-json", "gpt-oss-20b-decode"),
    "law": ("esft", "deepseek-v2-lite-esft/law"),
    "intent": ("esft", "deepseek-v2-lite-esft/intent"),
    "switch": ("router-trace-v2", "switch-base-8-encoder"),
}
ASSIGNMENTS = {"gpt-oss": 3_581_184, "law": 1_299_012, "intent": 1_282_632, "switch": 215 * 6}


@cache
def recording(name: str) -> Trace:
    """The trace, one token a pass; skips the test where the files are not there."""
    form, folder = RECORDINGS[name]
    if not (SHARED / folder).is_dir():
        pytest.skip("the shared recordings are not beside this checkout")
    return import_files(form, [SHARED / folder]).trace


@cache
def feed(name: str) -> Feed:
    return Feed.of(recording(name))


def hit_ratio(one: Feed, capacity: str, contract: Any, sequences: Any) -> float:
    amount = Capacity.slots(capacity, one.trace.header, "layer")
    row = replay(one, Settings("lru", amount, contract=contract, sequences=sequences)).row()
    return float(row["hit_ratio_assignments"])


LRU = {
    ("gpt-oss", "25%"): (0.6299, 0.6280, 0.6596, 0.6574),
    ("gpt-oss", "50%"): (0.8922, 0.8859, 0.8974, 0.8909),
    ("law", "25%"): (0.4721, 0.4686, 0.4967, 0.4929),
    ("law", "50%"): (0.7170, 0.7090, 0.7289, 0.7206),
    ("intent", "25%"): (0.4727, 0.4591, 0.5067, 0.4909),
    ("intent", "50%"): (0.7263, 0.6921, 0.7356, 0.7002),
}
"""Hit ratio over all assignments: serial and carried, serial and fresh, atomic and carried, atomic and fresh."""

WAYS = [(contract, sequences) for contract in ("serial", "atomic") for sequences in ("carry", "fresh")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capacity"), LRU, ids=[" ".join(key) for key in LRU])
def test_lru_by_layer_meets_the_reference_to_four_decimals(name: str, capacity: str) -> None:
    one = feed(name)
    assert int((one.trace.expert_ids != NOT_ROUTED).sum()) == ASSIGNMENTS[name]
    found = [round(hit_ratio(one, capacity, *way), 4) for way in WAYS]
    assert found == list(LRU[name, capacity])


SHUFFLED = {"gpt-oss": (0.318, 0.659), "law": (0.292, 0.586), "intent": (0.344, 0.663)}
"""The same with the tokens of all sequences in a random order, serial and carried, 25 % and 50 %.

The order is ``default_rng(0).permutation(T)`` over whole tokens; other seeds move the third decimal by up to 3.
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", SHUFFLED)
def test_lru_on_shuffled_tokens_meets_the_reference_to_three_decimals(name: str) -> None:
    one = Feed.of(shuffled(recording(name), np.random.default_rng(0)))
    found = [round(hit_ratio(one, capacity, "serial", "carry"), 3) for capacity in ("25%", "50%")]
    assert found == list(SHUFFLED[name])


def shuffled(trace: Trace, rng: np.random.Generator) -> Trace:
    """The tokens in a random order, whole: a token keeps its experts in all layers."""
    return Trace.of(
        trace.header.model_copy(update={"domains": ()}),
        expert_ids=trace.expert_ids[rng.permutation(len(trace))],
        token_ids=trace.token_ids,
        sequence=np.zeros(len(trace)),
        position=np.arange(len(trace)),
        step=np.arange(len(trace)),
        phase=np.full(len(trace), 1),
    )


SWITCH = {"lru": 0.2744, "lfu-global": 0.3566, "belady-forced": 0.5411, "belady": 0.5504}
"""One pool of 12 slots, token by token."""


@pytest.mark.parametrize("name", SWITCH)
def test_the_published_row_of_the_switch_encoder(name: str) -> None:
    one = feed("switch")
    row = replay(one, Settings(name, Capacity(12, "slots", "12"), scope="global", contract="serial")).row()
    assert row["assignments"] == ASSIGNMENTS["switch"]
    assert round(row["hit_ratio_assignments"], 4) == SWITCH[name]

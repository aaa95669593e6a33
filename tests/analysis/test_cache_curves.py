"""``moetwin cache curve`` and ``locality``: what they find, and what they tell."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from analysis.shuffled import order_gain
from tests.analysis.caching import SIZES, rows, shown
from traces.locality import locality
from traces.schema import Phase, Trace, TraceHeader
from traces.synthetic import generate

pytestmark = pytest.mark.usefixtures("cache_folder")

# Curves.


@pytest.mark.parametrize("settings", [(), ("--contract", "serial", "--phase", "decode", "--sequences", "fresh")])
def test_a_curve_is_the_replay_at_every_capacity(settings: tuple[str, ...]) -> None:
    every = ",".join(str(slots) for slots in range(1, 9))
    curve = rows("curve", "t.safetensors", "--policies", "belady,lru,lfu", "--capacity", "2,6", *settings)
    replayed = rows(
        "t.safetensors",
        *("--policies", "lru,belady,lfu", "--capacity", every),
        *(word.replace("--phase", "--phases") for word in settings),
    )
    ratios = {(row["policy"], row["capacity_slots"]): row["hit_ratio_assignments"] for row in replayed}
    found = {(row["policy"], row["capacity_slots"]): row["hit_ratio_assignments"] for row in curve}
    assert found == {key: pytest.approx(value) for key, value in ratios.items() if key[0] != "lfu" or key[1] in (4, 12)}
    assert {row["contract"] for row in curve} == {"serial" if settings else "atomic"}
    assert all(row["trace_digest"] == replayed[0]["trace_digest"] for row in curve)


def test_the_table_of_a_curve_shows_the_capacities_named_and_the_knee() -> None:
    (row,) = rows("t.safetensors", "--policies", "lru", "--capacity", "50%")
    text = shown("curve", "t.safetensors", "--capacity", "50%,100%", "--policies", "lru,lfu")
    (line,) = [line for line in text.splitlines() if line.startswith("lru")]
    assert line.split()[1] == f"{row['hit_ratio_assignments']:.4f}"
    assert re.search(r"^knees: lru at \d slots of a pool \(\d+\.\d% of all\)$", text, re.MULTILINE)
    assert "belady, hit-rate bound" in shown("curve", "t.safetensors")


def test_a_curve_in_bytes_meets_the_capacities_named() -> None:
    (row,) = rows("t.safetensors", "--policies", "lru", "--scope", "global", "--bytes", "7MiB")
    words = ("curve", "t.safetensors", "--unit", "bytes", "--scope", "global", "--policies", "lru,lfu")
    found = [one for one in rows(*words, "--capacity", "7MiB,50%") if one["capacity_bytes"] == 7 << 20]
    assert [one["policy"] for one in found] == ["lru", "lfu"]
    assert found[0]["hit_ratio_assignments"] == row["hit_ratio_assignments"]
    assert "50%" in shown(*words, "--capacity", "50%")


# Locality.


def one_expert_a_token(ids: list[int]) -> Trace:
    index = np.arange(len(ids))
    header = TraceHeader(model="m", layers=1, experts=4, top_k=1, expert_bytes=(1,))
    zeros = np.zeros_like(index)
    chosen = np.array(ids, np.uint16).reshape(-1, 1, 1)
    phase = np.where(index < len(ids) // 2, Phase.PREFILL, Phase.DECODE)
    return Trace.of(header, expert_ids=chosen, token_ids=zeros, sequence=zeros, position=index, step=index, phase=phase)


def test_order_is_worth_what_lru_loses_when_it_is_shuffled() -> None:
    """Runs of eight equal experts: with one slot, all but the first of a run hit."""
    ids = [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    found = order_gain(one_expert_a_token(ids), rng=np.random.default_rng(5))
    shuffled = np.array(ids)[np.random.default_rng(5).permutation(32)]
    alike = int((shuffled[1:] == shuffled[:-1]).sum())
    assert found[1]["capacity_slots"] == 1
    assert found[1]["capacity_share"] == 0.25
    assert found[1]["hit_ratio"] == 28 / 32
    assert found[1]["hit_ratio_shuffled"] == alike / 32
    assert found[1]["order_gain"] == (28 - alike) / 32
    assert [entry["capacity_slots"] for entry in found] == [1, 1, 2, 3]


def test_a_token_of_a_prompt_is_a_pass_of_its_own() -> None:
    """Eight sequences over prompts of three tokens: recorded and shuffled replays see every token alone."""
    trace = generate("zipf", 1, SIZES)
    full = order_gain(trace, rng=np.random.default_rng(0), contract="serial")
    atomic = order_gain(trace, rng=np.random.default_rng(0))
    assert [entry["hit_ratio"] for entry in full] == sorted(entry["hit_ratio"] for entry in full)
    assert full != atomic


def test_locality_tells_a_verdict_and_the_worth_of_order() -> None:
    def never(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads(shown("locality", "t.safetensors", "--json"), parse_constant=never)
    assert record["verdict"]["at_work"] in ("popularity", "order", "neither")
    assert record["lru"] == order_gain_again()
    text = shown("locality", "t.safetensors")
    assert record["verdict"]["sentence"] in text
    for words in ("chance", "lag 64", "SRP", "SCH with", "in a window", "LRU, one token a pass, atomic contract"):
        assert words in text


def order_gain_again() -> list[dict[str, Any]]:
    """The same draws as the command's: locality takes its own first."""
    trace, rng = generate("zipf", 1, SIZES), np.random.default_rng(0)
    locality(trace, rng=rng)
    return order_gain(trace, rng=rng)

"""The examples run as they are shown, and the policy among them decides as it says."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import moetwin
from sim.custom import load_policy
from sim.policies import PolicyContext
from sim.replay import Capacity, Feed, Replay, Settings, replay
from traces.shipped import find_trace
from traces.store import load
from traces.synthetic import Sizes, generate

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples/half_life.py:HalfLife"
COMMANDS = [
    line.strip().removeprefix("moetwin ")
    for page in ("examples/README.md", "examples/half_life.py")
    for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
    if line.startswith("    moetwin ")
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(half_life: float, scope: str) -> Replay:
    trace = generate("markov", 0, Sizes(sequences=3, prompt_tokens=4, new_tokens=30, layers=2, experts=8, top_k=2))
    settings = Settings("half-life", Capacity.slots("4", trace.header, scope), scope, options={"half_life": half_life})
    return replay(Feed.of(trace), settings, policy=load_policy(EXAMPLE), log=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_examples_run(command: str) -> None:
    result = CliRunner().invoke(moetwin.app, [*shlex.split(command), "--json"])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows[-1]["policy"] == "half-life"
    assert rows[-1]["hits_union"] > rows[0]["hits_union"]


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) == 3


def test_a_key_is_the_logarithm_of_weights_that_halve() -> None:
    """Two layers, a half-life of two passes: uses in passes 0, 2 and 3 weigh 1 + 2 + 2 sqrt 2."""
    context = PolicyContext(layers=2, experts=2, top_k=1, options={"half_life": 2.0})
    policy = load_policy(EXAMPLE)(context)
    for event, block in ((0, 0), (1, 2), (4, 0), (6, 0), (7, 3)):
        policy.observe(event, [block], [1])
    assert 2 ** policy.key(0) == pytest.approx(1 + 2 + 2 * math.sqrt(2))
    assert [policy.key(block) for block in (2, 3, 1)] == [0.0, 1.5, -math.inf]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize(("half_life", "name"), [(0.01, "lru"), (math.inf, "lfu-global")])
def test_its_ends_are_recency_and_frequency(half_life: float, name: str, scope: str) -> None:
    found = small(half_life, scope)
    settings = Settings(name, found.settings.capacity, found.settings.scope)
    other = replay(found.feed, settings, by_object=True, log=True)
    assert np.array_equal(found.log, other.log)
    assert len(found.log) > 50


def test_it_beats_lru_on_the_recording_that_ships() -> None:
    trace = load(find_trace("code"))
    capacity = Capacity.slots("25%", trace.header, "layer")
    mine = replay(Feed.of(trace), Settings("half-life", capacity), policy=load_policy(EXAMPLE))
    lru = replay(Feed.of(trace), Settings("lru", capacity))
    assert mine.row()["hits_union"] > lru.row()["hits_union"]

"""The examples run as they are shown, on both clocks, and the policies among them decide as they say."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import moetwin
from real.decode import Machine
from real.decode import replay as replay_really
from sim.custom import load_policy
from sim.policies import LayerView, PolicyContext, PrefetchView
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.run import replay
from sim.results import RunResult
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real.running import COSTS, follow, machine_on
from tests.sim.hand import HandCosts, host, misses_by_step, run, trace_of
from traces.shipped import find_trace
from traces.store import load
from traces.synthetic import Sizes, generate
from traces.workload import lock_step

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples/half_life.py:HalfLife"
PREFETCH, PLACE = "examples/successors.py:Successors", "examples/best_split.py:BestSplit"
PAGES = ("README.md", "half_life.py", "successors.py", "best_split.py")
COMMANDS = [
    line.strip().removeprefix("moetwin ")
    for page in PAGES
    for line in (ROOT / "examples" / page).read_text(encoding="utf-8").splitlines()
    if line.startswith("    moetwin ")
]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def small(half_life: float, scope: str) -> Replay:
    trace = generate("markov", 0, Sizes(sequences=3, prompt_tokens=4, new_tokens=30, layers=2, experts=8, top_k=2))
    settings = Settings("half-life", Capacity.slots("4", trace.header, scope), scope, options={"half_life": half_life})
    return replay(Feed.of(trace), settings, policy=load_policy(EXAMPLE), log=True)


def rows(command: str) -> list[dict[str, Any]]:
    result = CliRunner().invoke(moetwin.app, [*shlex.split(command), "--json"])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith("cache")])
def test_commands_that_replay_eviction_run(command: str) -> None:
    found = rows(command)
    assert found[-1]["policy"] == "half-life"
    assert found[-1]["hits_union"] > found[0]["hits_union"]


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(("simulate", "decode"))])
def test_commands_of_a_clock_run(command: str) -> None:
    (row,) = rows(command)
    named = next(word for word in shlex.split(command) if ".py:" in word)
    assert named in row["system"].values()
    assert row["decode_tokens"] > 0


def test_there_are_commands_to_run() -> None:
    counts = [sum(one.startswith(word) for one in COMMANDS) for word in ("cache", "simulate", "decode", "sweep")]
    assert counts == [3, 5, 2, 2]
    assert len(COMMANDS) == 12


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


# Prefetch.


def test_successors_are_wanted_by_how_often_they_followed() -> None:
    """Two layers of four experts: after 0 came 2 twice and 3 once, after 1 came 3 twice."""
    policy = load_policy(PREFETCH, "prefetch")(PolicyContext(2, 4, 2, options={"width": 2}))
    for step, (one, other) in enumerate((([0], [2]), ([0, 1], [2, 3]), ([1], [3]))):
        policy.observe(2 * step, one, [1] * len(one))
        policy.observe(2 * step + 1, [4 + expert for expert in other], [1] * len(other))
    for used, wanted in (([0], [6, 7]), ([1], [7, 6]), ([0, 1], [6, 7]), ([3], [])):
        policy.observe(6, used, [1] * len(used))
        assert [*policy.candidates(seen(0))] == wanted
    policy.observe(7, [6], [1])
    assert [*policy.candidates(seen(1))] == [], "nothing follows the last layer"


def seen(layer: int) -> PrefetchView:
    return PrefetchView(layer, layer, (), lambda block: False, lambda here, missing: 0.0, 1.0)


def test_successors_turn_misses_into_hits() -> None:
    """Where the experts of a layer follow from those of the layer before, all but the first of their uses hit."""
    pairs = [[[expert], [(expert + 1) % 4]] for expert in (0, 1, 2, 3) * 3]
    costs = HandCosts(copy=0.25, host=host(joins_layers=False))
    plain, ahead = (run(trace_of(pairs), 2, costs, prefetch=name) for name in ("none", PREFETCH))
    of_layer_1 = [[row[1] for row in misses_by_step(result)] for result in (plain, ahead)]
    assert of_layer_1 == [[1] * 12, [1] * 4 + [0] * 8]


# Placement.


@pytest.mark.parametrize(
    ("copy_s", "cpu_s", "on_cpu"),
    [
        (1.0, 9.0, []),  # the CPU is too slow for one
        (9.0, 1.0, [1, 2, 0]),  # the link is
        (2.0, 3.0, [1]),  # 3 s on the CPU, beside two copies that the GPU follows in 5; the other ways take 6 and 7
    ],
)
def test_the_best_split_ends_first(copy_s: float, cpu_s: float, on_cpu: list[int]) -> None:
    policy = load_policy(PLACE, "place")(PolicyContext(1, 4, 2))
    view = LayerView(0, [(3, 1)], [(0, 5), (2, 2), (1, 1)], 4, lambda tokens: 1.0, lambda tokens, first: cpu_s, copy_s)
    found = policy.place(view)
    assert found.cpu == on_cpu
    assert [*found.gpu] == [3, *found.copies]
    few = load_policy(PLACE, "place")(PolicyContext(1, 4, 2, options={"most": 1}))
    assert len(few.place(view).cpu) <= 1


# Both clocks: the very objects, on the CPU as a device.


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    with machine_on("cpu") as one:
        yield one


def both(machine: Machine, **system: Any) -> tuple[RunResult, RunResult]:
    """A run of three requests, as it was measured and as it was simulated."""
    sizes = Sizes(
        sequences=3,
        prompt_tokens=4,
        new_tokens=8,
        layers=2,
        experts=8,
        top_k=2,
        expert_bytes=machine.loaded.spec.expert_bytes,
    )
    workload, spec, budget = lock_step(generate("markov", 2, sizes), 1), SystemSpec(**system), Budget(slots=3)
    return replay_really(machine, workload, spec, budget, COSTS), simulate(
        workload, spec, budget, COSTS, hardware="by hand"
    )


@pytest.mark.parametrize("synchronous", [True, False])
@pytest.mark.parametrize("own", [{"evict": EXAMPLE}, {"place": PLACE}, {"evict": EXAMPLE, "place": PLACE}])
def test_both_clocks_submit_the_same(machine: Machine, own: dict[str, str], synchronous: bool) -> None:
    """On demand alone, entry for entry."""
    measured, simulated = both(machine, **own, synchronous=synchronous)
    pd.testing.assert_frame_equal(measured.operations, simulated.operations)
    follow(measured.operations, 6)
    assert set(measured.operations.op) == {"copy", "evict", "gpu", *(["cpu"] if "place" in own else [])}


def test_both_clocks_prefetch(machine: Machine) -> None:
    """What has arrived when is the clock's; what is computed is not, and in synchronous mode nothing is prefetched."""
    measured, simulated = both(machine, prefetch=PREFETCH, options={"prefetch": {"width": 2}})
    for run_of_one in (measured, simulated):
        assert (run_of_one.events.kind == "prefetch").sum() > 0
        layers = run_of_one.layers
        assert (layers.hits_union + layers.late_hits + layers.misses == layers.union).all()
        follow(run_of_one.operations, 6)
    same = ["step", "layer", "phase", "assignments", "union"]
    pd.testing.assert_frame_equal(measured.layers[same], simulated.layers[same])
    alone = both(machine, prefetch=PREFETCH, synchronous=True)
    pd.testing.assert_frame_equal(alone[0].operations, alone[1].operations)
    assert not (alone[1].events.kind == "prefetch").any()

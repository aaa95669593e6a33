"""The contract of all eviction policies: one suite over the registry, on random traces.

Every law runs for each policy by itself, so that a failure names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sim.compiled.counts import COLUMNS
from sim.compiled.twins import TWINS
from sim.policies import EVICTION
from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.settings import ORDERS
from tests.sim.replaying import (
    EVERY,
    capacities,
    decisions,
    feeds,
    fingerprint,
    longer_feed,
    play,
    recount,
    traces,
    ways,
)
from traces.schema import NOT_ROUTED, Array, Trace

CONTRACT = pytest.mark.parametrize("contract", ["atomic", "serial"])
SCOPE = pytest.mark.parametrize("scope", ["layer", "global"])
FEW = settings(max_examples=10)
SOME = settings(max_examples=20)

FORCED = [name for name, kind in EVICTION.items() if not kind.bypass]
"""Policies that keep each miss under the serial contract."""

UNSCORED = [name for name, kind in EVICTION.items() if "scores" not in kind.needs]
"""Policies that do not know how many experts a token could have had: what is taken from the scores depends on it."""

BY_NUMBER = ("random", "static-uniform", "static-front")
"""Policies that draw or choose by an expert's number."""

NUMBER_BLIND = [name for name, kind in EVICTION.items() if name not in BY_NUMBER and "calibration" not in kind.needs]
"""Policies to which it is nothing but the last tie; a calibration trace would have to be renumbered, too."""


def counted(outcome: Replay, name: str) -> int:
    """A count over the whole replay, warm-up included."""
    return int(outcome.table[:, COLUMNS.index(name)].sum())


def misses(outcome: Replay) -> int:
    """Misses, and what was loaded before the first pass."""
    return counted(outcome, "accesses") - counted(outcome, "hits") + outcome.static_blocks


# Two ways, one meaning.


@EVERY
def test_every_policy_has_a_twin(name: str) -> None:
    assert EVICTION[name] in TWINS


@EVERY
@CONTRACT
@SCOPE
@FEW
@given(data=st.data())
def test_the_twin_is_the_policy(name: str, contract: str, scope: str, data: Any) -> None:
    """Decision by decision: who leaves and who is not kept, and every count."""
    feed = data.draw(feeds(warm=True))
    way = data.draw(ways(feed.trace, name, contract, scope))
    compiled, by_object = play(feed, way), play(feed, way, by_object=True)
    assert decisions(compiled.log) == decisions(by_object.log)
    assert (compiled.table == by_object.table).all()
    assert (compiled.histogram == by_object.histogram).all()
    assert (compiled.static_blocks, compiled.static_load_bytes) == (
        by_object.static_blocks,
        by_object.static_load_bytes,
    )


@EVERY
@SCOPE
@FEW
@given(data=st.data())
def test_the_twin_is_the_policy_where_a_pass_is_one_use_a_layer(name: str, scope: str, data: Any) -> None:
    feed = Feed.of(data.draw(traces(tokens=True, most_k=1)))
    contract = data.draw(st.sampled_from(["atomic", "serial"]))
    way = data.draw(ways(feed.trace, name, contract, scope))
    compiled, by_object = play(feed, way), play(feed, way, by_object=True)
    assert decisions(compiled.log) == decisions(by_object.log)
    assert (compiled.table == by_object.table).all()
    assert (compiled.histogram == by_object.histogram).all()


@EVERY
@CONTRACT
@SCOPE
def test_the_twin_is_the_policy_on_a_longer_trace(name: str, contract: Any, scope: Any) -> None:
    """With the constants of the policy, where ghosts, windows and intervals have come into play."""
    feed = longer_feed(batch=2 if scope == "global" else 1)
    amount = Capacity.slots("30%", feed.trace.header, scope)
    way = Settings(name, amount, scope=scope, contract=contract, order="shuffled", seed=5)
    compiled, by_object = play(feed, way), play(feed, way, by_object=True)
    assert decisions(compiled.log) == decisions(by_object.log)
    assert (compiled.table == by_object.table).all()


# What is counted.


@EVERY
@CONTRACT
@SCOPE
@FEW
@given(data=st.data())
def test_the_counts_are_those_of_the_log(name: str, contract: str, scope: str, data: Any) -> None:
    """A recount from the log alone: residents fit, nobody leaves without need, hits, bytes and kinds of misses."""
    feed = data.draw(feeds(warm=True))
    outcome = play(feed, data.draw(ways(feed.trace, name, contract, scope)), by_object=True)
    again = recount(outcome)
    assert dict(zip(COLUMNS, outcome.table.T.tolist(), strict=True)) == dict(
        zip(COLUMNS, again.table.T.tolist(), strict=True)
    )
    pools = len(again.preloaded) * (feed.plan.groups if outcome.settings.sequences == "fresh" else 1)
    assert outcome.static_blocks == pools


@CONTRACT
@SOME
@given(data=st.data())
def test_the_histogram_is_that_of_the_passes_that_count(contract: str, data: Any) -> None:
    """Passes by phase and number of misses, those of the warm-up left out."""
    feed = data.draw(feeds(warm=True))
    outcome = play(feed, data.draw(ways(feed.trace, "lru", contract, "layer")), by_object=True)
    assert outcome.histogram.tolist() == recount(outcome).histogram.tolist()


@EVERY
@CONTRACT
@FEW
@given(data=st.data())
def test_the_row_that_a_person_reads_adds_up(name: str, contract: str, data: Any) -> None:
    feed = data.draw(feeds())
    assume((feed.trace.expert_ids != NOT_ROUTED).any())
    outcome = play(feed, data.draw(ways(feed.trace, name, contract, "layer")))
    row = outcome.row()
    sizes = dict.fromkeys(feed.trace.header.expert_bytes)
    assert row["hits_union"] + row["misses_union"] == row["union_accesses"]
    kinds = [row[f"{kind}_misses"] for kind in ("compulsory", "capacity", "collision")]
    assert min(kinds) >= 0
    assert sum(kinds) == row["misses_union"]
    assert row["hit_ratio_union"] == row["hits_union"] / row["union_accesses"]
    assert row["hit_ratio_assignments"] == row["hits_assignments"] / row["assignments"]
    if len(sizes) == 1:
        assert row["bytes_loaded"] == row["misses_union"] * next(iter(sizes))
        assert row["static_load_bytes"] == outcome.static_blocks * next(iter(sizes))


COUNTS = (
    "assignments",
    "union_accesses",
    "hits_assignments",
    "hits_union",
    "misses_union",
    "compulsory_misses",
    "capacity_misses",
    "collision_misses",
    "evictions",
    "bytes_loaded",
)


@EVERY
@FEW
@given(data=st.data())
def test_the_phases_add_up_to_all(name: str, data: Any) -> None:
    feed = data.draw(feeds())
    ids, phase = feed.trace.expert_ids, feed.trace.phase
    assume(all((ids[phase == one] != NOT_ROUTED).any() for one in (0, 1)))
    outcome = play(feed, data.draw(ways(feed.trace, name, "atomic", "layer")))
    rows = {phase: outcome.row(phase) for phase in ("all", "prefill", "decode")}
    for column in COUNTS:
        assert rows["prefill"][column] + rows["decode"][column] == rows["all"][column]


@EVERY
@CONTRACT
@FEW
@given(data=st.data())
def test_a_warm_up_is_left_out_and_changes_nothing_else(name: str, contract: str, data: Any) -> None:
    feed = data.draw(feeds())
    warm = data.draw(st.integers(0, len(feed.plan) - 1))
    way = data.draw(ways(feed.trace, name, contract, "global"))
    whole, part = play(feed, way), play(Feed.of(feed.trace, feed.plan.batch, warm), way)
    assert decisions(part.log) == decisions(whole.log)
    assert (part.table.sum(axis=0) == whole.table.sum(axis=0)).all()
    first = 2 * int(feed.plan.group[warm]) + int(feed.plan.phase[warm])
    assert not part.table[:first].any()
    assert (part.table[first + 1 : -1] == whole.table[first + 1 : -1]).all()


# Who misses less than whom.


@EVERY
@CONTRACT
@SCOPE
@FEW
@given(data=st.data())
def test_no_policy_misses_less_than_belady(name: str, contract: str, scope: str, data: Any) -> None:
    feed = data.draw(feeds(unequal=False))
    way = data.draw(ways(feed.trace, name, contract, scope, slots=True))
    assert misses(play(feed, replace(way, policy="belady", options={}))) <= misses(play(feed, way))


@pytest.mark.parametrize("name", FORCED)
@SCOPE
@FEW
@given(data=st.data())
def test_no_policy_that_keeps_all_misses_less_than_belady_forced(name: str, scope: str, data: Any) -> None:
    """Serial, where each miss has to be kept by all of them."""
    feed = data.draw(feeds(unequal=False))
    way = data.draw(ways(feed.trace, name, "serial", scope, slots=True))
    assert misses(play(feed, replace(way, policy="belady-forced", options={}))) <= misses(play(feed, way))


@pytest.mark.parametrize(
    ("name", "other", "scope"),
    [("two-generation", "lru", "layer"), ("two-generation", "lru", "global"), ("lowest-layer", "lru", "layer")],
)
@CONTRACT
@FEW
@given(data=st.data())
def test_on_demand_alone_two_policies_are_one(name: str, other: str, scope: str, contract: str, data: Any) -> None:
    feed = data.draw(feeds())
    way = data.draw(ways(feed.trace, name, contract, scope))
    one, two = (play(feed, replace(way, policy=policy)) for policy in (name, other))
    assert decisions(one.log) == decisions(two.log)
    assert (one.table == two.table).all()


@CONTRACT
@SCOPE
@SOME
@given(data=st.data())
def test_a_larger_lru_cache_hits_whenever_a_smaller_one_does(contract: str, scope: str, data: Any) -> None:
    """Unequal bytes in one pool included: what does not fit ends the ranking, and is not skipped."""
    feed = data.draw(feeds())
    way = data.draw(ways(feed.trace, "lru", contract, scope))
    other = data.draw(capacities(feed.trace.header, scope, way.capacity.unit == "bytes"))
    small, large = sorted([way.capacity, other], key=lambda capacity: capacity.amount)
    hits = [set(recount(play(feed, replace(way, capacity=one))).hits) for one in (small, large)]
    assert hits[0] <= hits[1]


# Where the contracts cannot differ.


@EVERY
@FEW
@given(data=st.data())
def test_one_layer_and_one_expert_at_a_time_is_the_same_under_both_contracts(name: str, data: Any) -> None:
    """The trace has room for a second expert that is never routed, so that the general kernels run."""
    trace = widened(data.draw(traces(tokens=True, most_k=1).filter(lambda trace: trace.header.layers == 1)))
    way = data.draw(ways(trace, name, "atomic", "layer"))
    atomic, serial = (play(Feed.of(trace), replace(way, contract=contract)) for contract in ("atomic", "serial"))
    assert (atomic.table == serial.table).all()
    assert atomic.log[:, 1:].tolist() == serial.log[:, 1:].tolist()


@pytest.mark.parametrize("name", UNSCORED)
@CONTRACT
@SCOPE
@FEW
@given(data=st.data())
def test_a_stream_of_single_uses_is_the_same_in_every_kernel(name: str, contract: str, scope: str, data: Any) -> None:
    """The short kernel for one use an event counts as the general one does."""
    trace = data.draw(traces(tokens=True, most_k=1))
    way = data.draw(ways(trace, name, contract, scope))
    short, general = play(Feed.of(trace), way), play(Feed.of(widened(trace)), way)
    assert (short.table == general.table).all()
    assert (short.histogram == general.histogram).all()
    assert short.log[:, 1:].tolist() == general.log[:, 1:].tolist()


def widened(trace: Trace) -> Trace:
    """The same trace with a place for one more expert a token, which stays empty."""
    hole = np.full((*trace.expert_ids.shape[:2], 1), NOT_ROUTED, np.uint16)
    return rerouted(
        trace,
        top_k=trace.header.top_k + 1,
        expert_ids=np.concatenate([trace.expert_ids, hole], axis=-1),
        gates=np.concatenate([trace.gates, np.zeros(hole.shape)], axis=-1),
    )


def rerouted(trace: Trace, *, top_k: int, **arrays: Array) -> Trace:
    """``trace`` with other arrays."""
    header = trace.header.model_copy(update={"top_k": top_k})
    return Trace.of(header, **{**dict(trace.arrays()), **arrays})


# What must not decide.


@pytest.mark.parametrize("name", NUMBER_BLIND)
@SCOPE
@FEW
@given(data=st.data())
def test_the_numbers_of_the_experts_do_not_decide(name: str, scope: str, data: Any) -> None:
    """Serial and as routed no two blocks were last used at once, so that no tie goes down to the number."""
    trace = data.draw(traces(tokens=True))
    way = data.draw(ways(trace, name, "serial", scope))
    way = replace(way, order="as-routed")
    header = trace.header
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    order = np.stack([rng.permutation(header.experts) for _ in range(header.layers)])  # [L, E], the new number
    new = (order + header.experts * np.arange(header.layers)[:, None]).ravel()
    before, after = play(Feed.of(trace), way), play(Feed.of(renumbered(trace, order)), way)
    assert (before.table == after.table).all()
    expected = before.log.copy()
    expected[:, 1] = new[before.log[:, 1]]
    assert decisions(expected) == decisions(after.log)


def renumbered(trace: Trace, order: Array) -> Trace:
    """``trace`` with expert e of layer l called ``order[l, e]``."""
    table = np.concatenate([order, np.full((len(order), 1), NOT_ROUTED)], axis=1)
    places = np.minimum(trace.expert_ids, trace.header.experts).astype(np.int64)
    ids = np.stack([table[layer][places[:, layer]] for layer in range(len(order))], axis=1)
    before: Any = trace.scores
    scores = np.empty_like(before)
    for layer, numbers in enumerate(order):
        scores[:, layer, numbers] = before[:, layer]
    return rerouted(trace, top_k=trace.header.top_k, expert_ids=ids, scores=scores)


@pytest.fixture(scope="module")
def elsewhere() -> list[dict[str, str]]:
    """The fingerprints of all policies in two processes that hash strings differently."""
    code = "import json; from tests.sim.replaying import *; print(json.dumps({n: fingerprint(n) for n in EVICTION}))"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    found = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return [json.loads(text) for text in found]


@EVERY
def test_neither_the_process_nor_its_hash_seed_decides(name: str, elsewhere: list[dict[str, str]]) -> None:
    assert [found[name] for found in elsewhere] == [fingerprint(name)] * 2


@CONTRACT
@FEW
@given(feed=feeds())
def test_a_shuffle_is_a_matter_of_the_seed(contract: str, feed: Feed) -> None:
    """An order matters under the serial contract alone, and the same seed gives the same one."""
    amount = Capacity(1, "slots", "1")
    by_order = {
        (order, seed): play(feed, Settings("lru", amount, contract=contract, order=order, seed=seed))  # type: ignore[arg-type]
        for order in ORDERS
        for seed in (1, 1, 2)
    }
    tables = {way: outcome.table for way, outcome in by_order.items()}
    if contract == "atomic":
        assert all((table == tables["as-routed", 1]).all() for table in tables.values())
    again = play(feed, Settings("lru", amount, contract=contract, order="shuffled", seed=1))  # type: ignore[arg-type]
    assert (again.log == by_order["shuffled", 1].log).all()
    assert (tables["ascending", 1] == tables["ascending", 2]).all()

"""The compiled twins of the policies of MoE papers, with other constants than those that stand by themselves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.replay import Capacity, Feed, Settings
from sim.replay.result import Replay
from sim.replay.run import replay
from tests.sim.formulas import FEW, shipped
from tests.sim.replaying import calibration_for, capacities, decisions, feeds
from traces.schema import Trace

OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "mrs": st.fixed_dictionaries(
        {"alpha": st.floats(0.01, 1), "p": st.integers(0, 5), "batch": st.sampled_from(["mean", "first", "max"])}
    ),
    "two-generation": st.just({}),
    "ewma-reuse": st.fixed_dictionaries({"beta": st.floats(0.01, 1)}),
    "lowest-layer": st.just({}),
    "blend": st.fixed_dictionaries({name: st.floats(0, 1) for name in ("freshness", "regularity", "height")}),
    "eam": st.fixed_dictionaries({"as_released": st.booleans()}),
    "hobbit": st.fixed_dictionaries(
        {name: st.floats(0, 1) for name in ("recency", "frequency", "high_precision", "layer")}
    ),
    "window-score": st.fixed_dictionaries({"window": st.integers(1, 4), "swaps": st.integers(1, 3)}),
    "static": st.just({}),
    "belady-imitator": st.fixed_dictionaries(
        {"hidden": st.integers(1, 4), "horizon": st.integers(1, 9), "updates": st.just(5)}
    ),
}


def departures(outcome: Replay) -> list[tuple[int, ...]]:
    """The log in order; without the numbers of decisions where every pass is one use a layer, for there both contracts
    mean the same, and number by events or by uses."""
    entries = decisions(outcome.log)
    return [entry[1:] for entry in entries] if outcome.feed.single else entries


def same(feed: Feed, way: Settings) -> None:
    """The compiled replay is that of the object, decision by decision."""
    calibration = calibration_for(feed)
    compiled, by_object = (
        replay(feed, way, calibration=calibration, by_object=by_object, log=True) for by_object in (False, True)
    )
    assert departures(compiled) == departures(by_object)
    assert compiled.table.tolist() == by_object.table.tolist()
    assert compiled.histogram.tolist() == by_object.histogram.tolist()


@pytest.mark.parametrize("name", [*OPTIONS])
@pytest.mark.parametrize("contract", ["atomic", "serial"])
@pytest.mark.parametrize("scope", ["layer", "global"])
@FEW
@given(data=st.data())
def test_the_twin_is_the_policy_whatever_its_constants(name: str, contract: Any, scope: Any, data: Any) -> None:
    feed = data.draw(feeds())
    sequences, in_bytes = data.draw(st.sampled_from(["carry", "fresh"])), data.draw(st.booleans())
    capacity = data.draw(capacities(feed.trace.header, scope, in_bytes))
    options = data.draw(OPTIONS[name])
    same(feed, Settings(name, capacity, scope, contract, sequences=sequences, options=options))


@pytest.mark.parametrize("batch", ["mean", "first", "max"])
@FEW
@given(data=st.data())
def test_mrs_reads_gates_where_there_are_no_scores(batch: str, data: Any) -> None:
    feed = data.draw(feeds())
    arrays = {**dict(feed.trace.arrays()), "scores": None}
    gated = Feed.of(Trace.of(feed.trace.header, **arrays), feed.plan.batch)
    capacity = data.draw(capacities(feed.trace.header, "global", False))
    same(gated, Settings("mrs", capacity, "global", options={"batch": batch}))


@pytest.mark.parametrize(("name", "contract"), [*zip(OPTIONS, ["atomic", "serial"] * 5, strict=True)])
def test_the_twin_is_the_policy_on_a_recording(name: str, contract: Any) -> None:
    """Prompts whose unions do not fit, in lock-step batches; new policies for each."""
    trace = shipped("batch4")
    capacity = Capacity.slots("25%", trace.header, "layer")
    way = Settings(name, capacity, contract=contract, sequences="fresh")
    same(Feed.of(trace, 4), way)

"""Taps on the routers, routing replay, and the look-ahead through the next routers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from real.generate import HookChain, generate, left_pad
from real.models.families import FAMILIES
from real.models.load import LoadedModel
from real.record import Collector
from real.routing import LEAST_GATE, MeanInputs, Replay, RouterCall, RouterTap, lookahead
from tests.real import tiny
from traces.errors import InputError
from traces.schema import NOT_ROUTED, Phase, Trace

EVERY = pytest.mark.parametrize("model_type", list(FAMILIES))
DECODERS = pytest.mark.parametrize("model_type", tiny.DECODERS)
PROMPTS = [[5, 17, 200, 31, 8], [90, 4]]
FORCED = [[3, 4, 5, 6], [7, 8]]


class Calls:
    """Keeps every call, and returns what it is told to."""

    def __init__(self, answer: Any = None) -> None:
        self.calls: list[RouterCall] = []
        self._answer = answer

    def on_route(self, call: RouterCall) -> Any:
        self.calls.append(RouterCall(call.layer, call.hidden, call.logits, call.weights, call.ids))
        return None if self._answer is None else self._answer(call)


class Follow:
    """Tells a replay which rows of its trace come next, as a decoder does; lane i is sequence i."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay

    def begin_step(self, step_index, phase, mask, positions, token_ids) -> None:
        self._replay.begin_step(self._replay.rows(range(len(mask)), mask, positions))

    def end_step(self, next_tokens) -> None:
        pass


def recorded(loaded: LoadedModel, lanes: int = 2) -> tuple[Trace, torch.Tensor]:
    """A trace of the forced tokens, and the logits of that run."""
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        logits = tiny.logits_of(loaded, PROMPTS[:lanes], FORCED[:lanes], hooks=collector)
    return collector.finish(), logits


def replayed(loaded: LoadedModel, trace: Trace, *listeners: Any, lanes: int = 2, **options: Any) -> torch.Tensor:
    replay = Replay(trace, loaded, **options)
    hooks = HookChain(Follow(replay), *(one for one in listeners if hasattr(one, "begin_step")))
    with RouterTap(loaded.layers, replay, *listeners):
        return tiny.logits_of(loaded, PROMPTS[:lanes], FORCED[:lanes], hooks=hooks)


def real_rows(logits: torch.Tensor) -> torch.Tensor:
    """Logits of both lanes while both go on, and of the first one after that."""
    return torch.cat([logits[:3].flatten(0, 1), logits[3:, 0]])


@DECODERS
def test_tap_sees_every_layer_in_order_with_the_routers_choice(model_type: str) -> None:
    loaded, calls = tiny.model(model_type), Calls()
    with RouterTap(loaded.layers, calls):
        generate(loaded.model, *left_pad(PROMPTS), max_new_tokens=2)
    assert [call.layer for call in calls.calls] == [0, 1, 0, 1]
    for call, rows in zip(calls.calls, (10, 10, 2, 2), strict=True):
        assert call.hidden.shape == (rows, 32)
        assert call.logits.shape == (rows, 8)
        assert call.weights.shape == call.ids.shape == (rows, 2)
        best = tiny.best_two(loaded.layers[call.layer].router, call.logits)
        assert torch.equal(call.ids.sort(-1).values, best.sort(-1).values)


def test_tap_detaches_also_after_an_error() -> None:
    loaded = tiny.model()

    def fail(call: RouterCall) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), RouterTap(loaded.layers, Calls(fail)):
        tiny.greedy(loaded, PROMPTS, 1)
    assert not any(layer.router._forward_hooks for layer in loaded.layers)
    tiny.greedy(loaded, PROMPTS, 1)


def test_listeners_see_what_those_before_them_chose() -> None:
    loaded, after = tiny.model(), Calls()
    first = Calls(lambda call: (torch.full_like(call.weights, 0.5), torch.tensor([[6, 1]]).expand_as(call.ids)))
    with RouterTap(loaded.layers, first, after):
        tiny.greedy(loaded, PROMPTS, 1)
    assert (after.calls[1].ids == torch.tensor([6, 1])).all()
    assert (after.calls[1].weights == 0.5).all()
    assert not (first.calls[1].ids == torch.tensor([6, 1])).all()


@EVERY
def test_own_routing_replayed_with_own_gates_gives_the_same_logits(model_type: str) -> None:
    loaded = tiny.model(model_type)
    trace, logits = recorded(loaded)
    again = replayed(loaded, trace, own_gates=True)
    torch.testing.assert_close(real_rows(again), real_rows(logits), rtol=1e-5, atol=1e-5)
    with_stored = replayed(loaded, trace)
    torch.testing.assert_close(real_rows(with_stored), real_rows(logits), rtol=0.05, atol=0.05)
    assert not torch.equal(with_stored, logits)


@EVERY
def test_replay_without_padding_is_exact(model_type: str) -> None:
    loaded = tiny.model(model_type)
    trace, logits = recorded(loaded, lanes=1)
    assert torch.equal(replayed(loaded, trace, lanes=1, own_gates=True), logits)


@DECODERS
def test_another_routing_changes_the_logits_and_is_what_runs(model_type: str) -> None:
    loaded = tiny.model(model_type)
    trace, logits = recorded(loaded)
    forced = Trace.of(trace.header, **{**dict(trace.arrays()), "expert_ids": (trace.expert_ids + 1) % 8})
    collector = Collector(loaded)
    changed = replayed(loaded, forced, collector, own_gates=True)
    assert (real_rows(changed) - real_rows(logits)).abs().amax() > 0.01
    ran = collector.finish().expert_ids
    assert np.array_equal(np.sort(ran, axis=-1), np.sort(forced.expert_ids, axis=-1))


def test_replayed_gates_are_those_of_the_trace() -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    arrays = {**dict(trace.arrays()), "gates": np.full_like(trace.gates, 0.25)}
    calls = Calls()
    replayed(loaded, Trace.of(trace.header, **arrays), calls)
    assert set(calls.calls[-1].weights[0].tolist()) == {0.25}


def test_places_without_a_choice_get_weight_zero() -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    ids = trace.expert_ids.copy()
    ids[2, 1] = [4, NOT_ROUTED]
    replay = Replay(Trace.of(trace.header, **{**dict(trace.arrays()), "expert_ids": ids}), loaded)
    replay.begin_step(np.array([2, -1, 0]))
    logits = torch.zeros(3, 8)
    weights, forced = replay.on_route(RouterCall(1, torch.zeros(3, 32), logits, torch.zeros(3, 2), torch.zeros(3, 2)))
    assert forced.tolist() == [[4, 0], [0, 0], ids[0, 1].tolist()]
    assert weights[0].tolist() == [pytest.approx(float(trace.gates[2, 1, 0])), 0.0]
    assert weights[1].tolist() == [0.0, 0.0]
    assert (weights[2] > 0).all()


def test_places_without_a_choice_are_recorded_as_such() -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    ids, gates = trace.expert_ids.copy(), trace.gates.copy()
    ids[2, 1, 1], gates[2, 1, 1] = NOT_ROUTED, 0
    forced = Trace.of(trace.header, **{**dict(trace.arrays()), "expert_ids": ids, "gates": gates})
    collector = Collector(loaded)
    replayed(loaded, forced, collector)
    assert np.array_equal(collector.finish().expert_ids, ids)
    assert np.array_equal(collector.finish().gates, gates)


@pytest.mark.parametrize("own_gates", [True, False])
def test_a_chosen_expert_whose_gate_is_nothing_counts_as_routed(own_gates: bool) -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    gates = np.where(np.arange(2) == 1, 0, trace.gates)
    replay = Replay(Trace.of(trace.header, **{**dict(trace.arrays()), "gates": gates}), loaded, own_gates=own_gates)
    replay.begin_step(np.array([2, -1]))
    logits = torch.full((2, 8), -200.0)
    logits[:, trace.expert_ids[2, 1, 0]] = 200.0  # so that the other gate is 0 in fp32
    weights, _ = replay.on_route(RouterCall(1, torch.zeros(2, 32), logits, torch.zeros(2, 2), torch.zeros(2, 2)))
    assert weights[0, 1] == LEAST_GATE
    assert weights[0, 1].half() > 0
    assert weights[1].tolist() == [0.0, 0.0]


def test_rows_of_a_pass_are_found_by_sequence_and_position() -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    replay = Replay(trace, loaded)
    mask = torch.tensor([[True, True], [False, True], [True, False]])
    positions = torch.tensor([[5, 6], [0, 1], [0, 0]])
    rows = replay.rows([0, 1, 1], mask, positions)
    assert rows[[2, 5]].tolist() == [-1, -1]
    kept = rows[[0, 1, 3, 4]]
    assert trace.sequence[kept].tolist() == [0, 0, 1, 1]
    assert trace.position[kept].tolist() == [5, 6, 1, 0]
    later = Trace.of(trace.header, **{**dict(trace.arrays()), "position": trace.position + 10})
    assert Replay(later, loaded).rows([0, 1, 1], mask, positions + 10).tolist() == rows.tolist()


def test_replay_refuses_what_does_not_fit() -> None:
    loaded = tiny.model()
    trace, _ = recorded(loaded)
    replay = Replay(trace, loaded)
    one = torch.ones(1, 1)
    with pytest.raises(InputError, match="sequence must be in the trace, got 7"):
        replay.rows([7], one.bool(), one.long())
    with pytest.raises(InputError, match="position must be in the trace's sequence 1 of 4 tokens, got 4"):
        replay.rows([1], one.bool(), 4 * one.long())
    with pytest.raises(InputError, match="trace layers must be 3, as in model tiny-olmoe, got 2"):
        Replay(trace, tiny.model("olmoe", layers=3))
    replay.begin_step(np.array([0]))
    with pytest.raises(ValueError, match="told of 1 rows, but the pass has 2"):
        replay.on_route(RouterCall(0, torch.zeros(2, 32), torch.zeros(2, 8), torch.zeros(2, 2), torch.zeros(2, 2)))


@DECODERS
def test_lookahead_is_the_next_routers_top_k(model_type: str) -> None:
    loaded = tiny.model(model_type, layers=4 if model_type in ("olmoe", "mixtral") else None)
    routers = [layer.router for layer in loaded.layers]
    hidden = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    with RouterTap(loaded.layers, calls := Calls()):
        ahead = lookahead(hidden, 0, 2, routers, 2)
    assert not calls.calls
    assert ahead.shape == (6, 2, 2)
    logits = [torch.nn.functional.linear(hidden, one.weight, getattr(one, "bias", None)) for one in routers]
    assert torch.equal(ahead[:, 0], tiny.best_two(routers[1], logits[1]))
    if len(routers) > 2:
        assert torch.equal(ahead[:, 1], tiny.best_two(routers[2], logits[2]))
    else:
        assert (ahead[:, 1] == NOT_ROUTED).all()
    assert (lookahead(hidden, len(routers) - 1, 2, routers, 2) == NOT_ROUTED).all()


def test_lookahead_with_means_reads_the_input_plus_what_the_mean_changes_by() -> None:
    loaded = tiny.model("olmoe", layers=4)
    routers = [layer.router for layer in loaded.layers]
    random = torch.Generator().manual_seed(3)
    hidden, means = torch.randn(6, 32, generator=random), torch.randn(4, 32, generator=random)
    corrected = lookahead(hidden, 1, 2, routers, 2, means)
    for ahead in range(2):
        residual = means[2 + ahead] - means[1]
        own = lookahead(hidden + residual, 1, 2, routers, 2)
        assert torch.equal(corrected[:, ahead], own[:, ahead])
    assert torch.equal(lookahead(hidden, 1, 2, routers, 2, means * 0), lookahead(hidden, 1, 2, routers, 2))
    assert not torch.equal(corrected, lookahead(hidden, 1, 2, routers, 2))


def test_mean_inputs_are_those_of_the_real_tokens() -> None:
    found, steps = MeanInputs(1), [([[True, False], [True, True]], [[1.0], [9.0], [2.0], [6.0]]), ([[True]], [[7.0]])]
    for mask, hidden in steps:
        found.begin_step(0, Phase.PREFILL, torch.tensor(mask), torch.zeros(1), torch.zeros(1))
        found.on_route(RouterCall(0, torch.tensor(hidden), torch.zeros(1), torch.zeros(1), torch.zeros(1)))
    assert found.means().tolist() == [[4.0]]
    with pytest.raises(InputError, match="must have at least one token, got none"):
        MeanInputs(1).means()

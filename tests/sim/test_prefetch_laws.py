"""Laws of prefetch policies, on random runs in simulated time: one suite over the registry, and some of their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.policies import PREFETCH, PolicyContext, PrefetchView
from sim.policies.prefetch.eam import FLOOR
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.sim.hand import HandCosts, host, workloads
from traces.synthetic import Sizes, markov
from traces.workload import NEVER, Workload, next_uses, one_at_a_time, routings

EVERY = pytest.mark.parametrize("name", [*PREFETCH])
COSTS = HandCosts(copy=0.7, gpu=0.3, cpu=0.9, host=host(joins_layers=False))
FEW = settings(max_examples=15)

Asked = tuple[PrefetchView, list[bool], list[int]]
"""What a policy was shown, which blocks were there, and what it wanted."""


def asked(workload: Workload, name: str, slots: int = 2, **options: Any) -> list[Asked]:
    """Every question to a prefetch policy in a run with the hybrid placement, and its answer."""
    answers, kind = list[Asked](), PREFETCH[name]

    class Spy(kind):  # type: ignore[misc,valid-type]
        def candidates(self, view: PrefetchView) -> list[int]:
            there = [view.is_there(block) for block in range(self.context.blocks)]
            answers.append((view, there, [*super().candidates(view)]))
            return answers[-1][2]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PREFETCH, name, Spy)  # type: ignore[arg-type]
        system = SystemSpec(place="hybrimoe", prefetch=name, options={"prefetch": options})
        simulate(workload, system, Budget(slots=slots), COSTS, hardware="by hand")
    return answers


@EVERY
@FEW
@given(workload=workloads(), slots=st.integers(1, 4))
def test_what_is_wanted_is_of_the_model_and_wanted_once(name: str, workload: Workload, slots: int) -> None:
    header = workload.trace.header
    answers = asked(workload, name, slots)
    assert name == "none" or len(answers) == len(workload) * header.layers
    for _, _, wanted in answers:
        assert len({*wanted}) == len(wanted)
        assert {*wanted} <= {*range(header.layers * header.experts)}
        assert all(type(block) is int for block in wanted)


@EVERY
@FEW
@given(workload=workloads(), slots=st.integers(1, 4))
def test_the_same_run_wants_the_same_again(name: str, workload: Workload, slots: int) -> None:
    one, other = ([wanted for _, _, wanted in asked(workload, name, slots)] for _ in range(2))
    assert one == other


@FEW
@given(workload=workloads(), slots=st.integers(1, 4), most=st.integers(1, 4))
def test_impact_wants_what_is_named_not_there_and_of_use(workload: Workload, slots: int, most: int) -> None:
    """Each on top of those before it, in whatever layer: the schedule of its layer becomes shorter."""
    experts = workload.trace.header.experts
    for view, there, wanted in asked(workload, "impact", slots, most=most):
        assert len(wanted) <= most
        tokens = {
            (view.layer + distance) * experts + expert: count
            for distance, named in enumerate(view.expected, 1)
            for expert, count in named
        }
        for block in wanted:
            layer = block // experts
            alike = [one for one in tokens if one // experts == layer]
            assert block in alike
            assert not there[block]
            before = makespan_s(view, tokens, [one for one in alike if there[one]], alike)
            there[block] = True
            assert makespan_s(view, tokens, [one for one in alike if there[one]], alike) < before


def makespan_s(view: PrefetchView, tokens: dict[int, int], here: list[int], layer: list[int]) -> float:
    parts = ([tokens[one] for one in part] for part in (here, [one for one in layer if one not in here]))
    one, other = (tuple(sorted(part, reverse=True)) for part in parts)
    return view.makespan_s(one, other)


@FEW
@given(workload=workloads(), horizon=st.integers(1, 4))
def test_a_perfect_oracle_wants_exactly_what_comes(workload: Workload, horizon: int) -> None:
    layers, experts = workload.trace.header.layers, workload.trace.header.experts
    used = [
        [layer * experts + expert for expert in routing.experts]
        for step in workload
        for layer, routing in enumerate(routings(workload.trace, step))
    ]
    for view, _, wanted in asked(workload, "oracle", horizon=horizon):
        ahead = used[view.event + 1 : view.event + 1 + min(horizon, layers)]
        assert wanted == [block for blocks in ahead for block in blocks]


@pytest.fixture(scope="module")
def longer() -> Workload:
    sizes = Sizes(sequences=4, prompt_tokens=3, new_tokens=60, layers=6, experts=16, top_k=3, expert_bytes=100)
    return one_at_a_time(markov(np.random.default_rng(1), sizes, locality=0.3))


def said(workload: Workload, events: list[int], seed: int = 0, **options: Any) -> dict[int, list[int]]:
    """By event: what the oracle wants, asked in the given order."""
    header = workload.trace.header
    context = PolicyContext(
        header.layers, header.experts, header.top_k, next_uses(workload), seed=seed, options=options
    )
    policy = PREFETCH["oracle"](context)
    views = [PrefetchView(one, one % header.layers, (), lambda _: False, lambda *_: 0.0, 1.0) for one in events]
    return {view.event: [*policy.candidates(view)] for view in views}


@pytest.mark.parametrize(("recall", "precision"), [(0.6, 1.0), (1.0, 0.7), (0.8, 0.5)])
def test_the_oracle_is_as_good_as_it_is_told(longer: Workload, recall: float, precision: float) -> None:
    """Both shares are within 4 standard errors of what was asked for."""
    experts, layers = longer.trace.header.experts, longer.trace.header.layers
    events = [*range(len(longer) * layers - 1)]
    right = named = true = 0
    answers = said(longer, events, horizon=1, recall=recall, precision=precision)
    future = next_uses(longer)
    for event in events:
        layer = (event + 1) % layers
        truth = [b for b in range(layer * experts, (layer + 1) * experts) if future.next_use(b, event) == event + 1]
        right += len({*answers[event]} & {*truth})
        named += len(answers[event])
        true += len(truth)
    assert abs(right / true - recall) <= 4 * np.sqrt(recall * (1 - recall) / true)
    assert abs(right / named - precision) <= 4 * np.sqrt(precision * (1 - precision) / named)
    assert true > 4000


def test_a_late_prediction_is_known_uniformly_later(longer: Workload) -> None:
    """With a horizon of 4 and up to 2 layers of lateness, a third is known 4 layers ahead, two thirds 3, then all."""
    experts, layers = longer.trace.header.experts, longer.trace.header.layers
    events = [*range(layers, 200 * layers)]
    late, prompt = (said(longer, events, horizon=4, lateness=lateness) for lateness in (2, 0))
    known, all_of_it = np.zeros(5), np.zeros(5)
    for event in events:
        distances = {(event + d) % layers: d for d in range(1, 5)}
        for counts, wanted in ((known, late[event]), (all_of_it, prompt[event])):
            for block in wanted:
                counts[distances[block // experts]] += 1
    assert (known[:3] == all_of_it[:3]).all()
    shares = known[3:] / all_of_it[3:]
    assert shares == pytest.approx([2 / 3, 1 / 3], abs=4 * np.sqrt(2 / 9 / all_of_it[4]))


def test_what_the_oracle_says_does_not_depend_on_when_it_is_asked(longer: Workload) -> None:
    events = [*range(0, 300)]
    options = {"horizon": 3, "recall": 0.7, "precision": 0.6, "lateness": 2}
    forward = said(longer, events, **options)
    assert said(longer, events[::-1], **options) == forward
    shuffled = np.random.default_rng(0).permutation(events)[:60].tolist()
    assert said(longer, shuffled, **options) == {event: forward[event] for event in shuffled}
    assert said(longer, events, seed=1, **options) != forward


def test_the_oracle_is_silent_where_nothing_comes(longer: Workload) -> None:
    layers = longer.trace.header.layers
    end = len(longer) * layers
    assert said(longer, [end - 1, end + 5], horizon=3) == {end - 1: [], end + 5: []}
    assert next_uses(longer).next_use(0, end) == NEVER


@FEW
@given(workload=workloads(batch=1), library=st.integers(1, 3))
def test_eam_follows_its_formulas(workload: Workload, library: int) -> None:
    """Against whole matrices in double precision: what is wanted falls in P of a matrix that is among the nearest."""
    header = workload.trace.header
    shape = layers, _ = header.layers, header.experts
    matrix, past = np.zeros(shape), list[np.ndarray]()
    answers = iter(asked(workload, "eam", library=library, most=5))
    for step in workload:
        if step.starts and matrix.any():
            past.append(matrix)
            matrix = np.zeros(shape)
        for layer, routing in enumerate(routings(workload.trace, step)):
            matrix[layer, list(routing.experts)] += routing.counts
            _, _, wanted = next(answers)
            if not past or not matrix.any() or layer + 1 == layers:
                assert wanted == []
                continue
            nearness = np.array([near(matrix, one) for one in past[-library:]])
            good = [past[-library:][place] for place in np.flatnonzero(nearness > nearness.max() - 1e-6)]
            assert any(falls(wanted, predicted(one, layer)) for one in good)


def near(matrix: np.ndarray, other: np.ndarray) -> float:
    """The mean cosine of rows [L, E], over those that ``matrix`` has."""
    rows = matrix.any(axis=1)
    one, two = matrix[rows], shares_of(other)[rows]
    return float(((one * two).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)).mean())


def shares_of(matrix: np.ndarray) -> np.ndarray:
    sums = matrix.sum(axis=1, keepdims=True)
    return np.where(sums > 0, matrix / np.maximum(sums, 1), 1 / matrix.shape[1])


def predicted(matrix: np.ndarray, layer: int) -> np.ndarray:
    """P [L * E], minus infinity for the layers up to this one."""
    distance = np.arange(len(matrix)) - layer
    worth = (shares_of(matrix) + FLOOR) * (1 - distance / (len(matrix) + 1))[:, None]
    worth[distance <= 0] = -np.inf
    return worth.ravel()


def falls(wanted: list[int], worth: np.ndarray) -> bool:
    """Whether ``wanted`` are the blocks of the highest worth, the highest first."""
    best = np.sort(worth)[::-1][: len(wanted)]
    return bool(np.allclose(worth[wanted], best, rtol=1e-5, atol=1e-12))

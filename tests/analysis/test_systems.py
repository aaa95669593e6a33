"""Systems side by side: the figures of each by hand, who is told from whom, and what may not be compared."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from analysis.plots_systems import plot
from analysis.systems import COMPONENTS, Entry, side_by_side, systems_plot, systems_table, verdicts
from analysis.systems_table import ranked
from sim.bounds import bounds_of
from sim.groups import decode_by_group
from sim.presets import Preset
from sim.results import RunResult
from sim.systems import SystemSpec
from tests.sim.hand import HandCosts, host, run, trace_of
from traces.errors import InputError
from traces.schema import Trace
from traces.workload import lock_step, one_at_a_time

COSTS = HandCosts(cpu=4.0, copy=3.0, host=host(controller_s=0.5))
SLOTS = 2


def sequences(count: int = 6) -> Trace:
    """``count`` sequences of a prompt of one token and three new ones, on two layers of four experts."""
    rng = np.random.default_rng(5)
    trace = trace_of([[rng.permutation(4)[:2].tolist() for _ in range(2)] for _ in range(4 * count)])
    trace.sequence[:] = np.arange(len(trace)) // 4
    trace.position[:] = np.arange(len(trace)) % 4
    trace.phase[:] = trace.position > 0
    return trace


def entry(
    name: str,
    trace: Trace,
    *,
    slots: int = SLOTS,
    batch: int = 1,
    costs: HandCosts = COSTS,
    marks: dict[str, bool] | None = None,
    **system: Any,
) -> Entry:
    workload = lock_step(trace, batch)
    result = run(workload, slots, costs, name=name, **system)
    preset = Preset(system=SystemSpec(name=name, **system), **(marks or {}))
    return Entry(preset, result, costs, bounds_of(workload, costs, result.info.capacity_slots))


def several(trace: Trace) -> list[Entry]:
    return [
        entry("slow", trace, synchronous=True),
        entry("fetching", trace),
        entry("same", trace),
        entry("seer", trace, evict="belady", place="optimal", marks={"clairvoyant": True}),
        entry("ceiling", trace, slots=4, evict="static-uniform", marks={"unlimited": True}),
    ]


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return side_by_side(several(sequences()))


def by_name(records: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(one for one in records if one["system"] == name)


def test_the_figures_of_one_system_by_hand() -> None:
    """One token, experts 0 and 1, with 1 there: dense 1, decision 0.5, GPU 0 to 1, copy 0 to 3, GPU 3 to 4, head 1."""
    (one,) = side_by_side([entry("mine", trace_of([[[0, 1]]]), slots=1, evict="static-uniform")])
    assert (one["token_s"], one["tokens_per_s"], one["role"]) == (6.5, 1 / 6.5, "system")
    assert one["components_s"] == {
        **dict.fromkeys(COMPONENTS, 0.0),
        "dense": 1.0,
        "GPU experts": 2.0,
        "transfer wait": 2.0,
        "host": 0.5,
        "head": 1.0,
    }
    assert one["busy"] == pytest.approx({"gpu": 4 / 6.5, "cpu": 0, "link": 3 / 6.5, "host": 0.5 / 6.5})
    assert one["binding"] == "gpu"
    assert (one["bytes_per_token"], one["written_back_bytes_per_token"]) == (100.0, 0.0)
    assert (one["resident_experts"], one["gpu_bytes"]) == (1, 300)
    assert one["bound_token_s"] == pytest.approx(1 + 0.5 + 2 + 1 + 0.5)  # the link: 3 + 1 + 1, beside the chain
    assert one["regret"] == pytest.approx(6.5 / 5.0 - 1)
    assert (one["token_low_s"], one["best"], one["not_distinguishable_from_best"]) == (None, True, True)
    assert one["prefill_regret"] is None


def test_waiting_for_the_cpu_is_told_from_waiting_for_the_link() -> None:
    """Two experts on the CPU for 4 s each: the GPU has nothing to do, and nothing is copied."""
    (one,) = side_by_side([entry("cpu", trace_of([[[2, 3]]]), slots=1, evict="static-uniform", place="cpu-on-miss")])
    assert (one["components_s"]["CPU wait"], one["components_s"]["transfer wait"]) == (8.0, 0.0)
    assert one["binding"] == "cpu"


def test_the_parts_of_a_token_add_up(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert sum(record["components_s"].values()) == pytest.approx(record["token_s"])
        assert all(0 <= share <= 1 + 1e-12 for share in record["busy"].values())
        assert record["regret"] >= -1e-12
        assert record["prefill_regret"] >= -1e-12


@pytest.mark.parametrize("system", [{}, {"place": "hybrimoe"}, {"synchronous": True, "prefetch": "oracle"}])
def test_busy_shares_without_events_are_those_with(system: dict[str, Any]) -> None:
    full = entry("mine", sequences(), **system)
    lean = Entry(full.preset, RunResult(**{**vars(full.run), "events": full.run.events.iloc[:0]}), full.costs)
    (ours,), (theirs,) = side_by_side([full]), side_by_side([lean])
    assert theirs["busy"] == pytest.approx(ours["busy"])


@pytest.mark.parametrize(
    ("joins", "layer_s", "token_s"),
    [
        (False, 0.5, 0.5 + 3 + 5 + 0.25 + 1),  # all but the first dispatch beside the experts
        (False, 5.0, 5 + 1 + 5 + 1 + 5 + 0.25 + 1),  # instead of the experts' 2 and 4 s
        (True, 0.5, 0.5 + 3 + 0.5 + 5 + 0.5 + 0.25 + 1),
    ],
)
def test_dense_parts_on_the_cpu_keep_it_busy_and_not_the_gpu(joins: bool, layer_s: float, token_s: float) -> None:
    """The first layer on the GPU: dense 1 s, two experts of 1 s; the second on the CPU: 1 s, twice 2 s. Back to the
    head, which takes 1 s, the link takes 0.25 s."""
    system = {"evict": "static-front", "place": "static", "scope": "global", "dense_follows": True}
    costs = HandCosts(cpu=2.0, copy=0.25, back=0.0, host=host(layer_s=layer_s, joins_layers=joins))
    full = entry("split", trace_of([[[0, 1], [2, 3]]]), slots=4, costs=costs, **system)
    lean = Entry(full.preset, RunResult(**{**vars(full.run), "events": full.run.events.iloc[:0]}), full.costs)
    assert full.run.tokens["end_s"].max() == pytest.approx(token_s)
    wanted = {"gpu": 4 / token_s, "cpu": 5 / token_s, "link": 0.25 / token_s}
    for (one,) in (side_by_side([full]), side_by_side([lean])):
        assert {name: one["busy"][name] for name in wanted} == pytest.approx(wanted)


def test_what_was_not_kept_is_not_told() -> None:
    """Prefetches are only in events and operations."""
    full = entry("mine", sequences(), prefetch="oracle")
    bare = {name: getattr(full.run, name).iloc[:0] for name in ("events", "operations")}
    (one,) = side_by_side([Entry(full.preset, RunResult(**{**vars(full.run), **bare}), full.costs)])
    assert (one["busy"]["link"], one["binding"], one["bytes_per_token"], one["regret"]) == (None, None, None, None)
    assert one["busy"]["gpu"] is not None


def test_prefetches_are_part_of_the_bytes() -> None:
    (one,) = side_by_side([entry("mine", sequences(), prefetch="oracle")])
    operations = entry("mine", sequences(), prefetch="oracle").run.operations
    assert one["bytes_per_token"] > one["demand_bytes_per_token"]
    assert len(operations) > 0


def test_who_is_best_and_who_cannot_be_told_from_it(records: list[dict[str, Any]]) -> None:
    assert [one["system"] for one in records if one["best"]] == ["fetching"]
    assert by_name(records, "same")["not_distinguishable_from_best"] is True
    slow = by_name(records, "slow")
    assert slow["not_distinguishable_from_best"] is False
    assert 0 < slow["behind_best_low_s"] <= slow["token_s"] - by_name(records, "fetching")["token_s"]
    for name in ("seer", "ceiling"):
        assert by_name(records, name)["not_distinguishable_from_best"] is None
    assert by_name(records, "fetching")["token_low_s"] <= by_name(records, "fetching")["token_s"]


def test_resamples_draw_sequences_and_the_same_ones_for_all() -> None:
    entries = several(sequences(12))[:2]
    assert side_by_side(entries, seed=3) == side_by_side(entries, seed=3)
    assert by_name(side_by_side(entries, seed=3), "slow") != by_name(side_by_side(entries, seed=4), "slow")


def test_a_batch_is_one_group() -> None:
    entries = [entry(name, sequences(12), batch=2) for name in ("first", "second")]
    seconds, tokens = decode_by_group([one.run for one in entries])
    assert tokens.tolist() == [6.0] * 6
    assert seconds.shape == (2, 6)
    steps = entries[0].run.tokens.query("phase == 1").drop_duplicates("step")
    assert seconds.sum(axis=1) == pytest.approx([(steps.end_s - steps.start_s).sum()] * 2)
    assert side_by_side(entries)[0]["groups"] == 6


def test_sequences_that_meet_in_one_run_are_one_group_in_all() -> None:
    trace = sequences(4)
    alone, together = (entry("mine", trace, batch=batch).run for batch in (1, 2))
    assert decode_by_group([alone])[0].shape == (1, 4)
    seconds, tokens = decode_by_group([alone, together])
    assert (seconds.shape, tokens.tolist()) == ((2, 2), [6.0, 6.0])


def test_few_sequences_have_no_interval(records: list[dict[str, Any]]) -> None:
    (one, _) = side_by_side([entry(name, sequences(3)) for name in ("first", "second")])
    assert (one["token_low_s"], one["not_distinguishable_from_best"]) == (None, True)
    assert "too few" in one["caveat"]
    assert "too narrow" in records[0]["caveat"]


def test_prompts_alone_have_no_token_and_no_best() -> None:
    trace = sequences()
    trace.phase[:] = 0
    entries = [entry("first", trace), entry("second", trace)]
    records = side_by_side(entries)
    assert [one["token_s"] for one in records] == [None, None]
    assert records[0]["busy"] == {}
    assert not any(one["best"] for one in records)
    shown(records)
    plot(records)


def test_unequal_memory_is_refused() -> None:
    trace = sequences()
    with pytest.raises(InputError, match="GPU memory must be equal for all systems, got 600 bytes for small and 800"):
        side_by_side([entry("small", trace), entry("large", trace, slots=3)])
    buffers = entry("buffers", trace, slots=5, scope="global", holds="two layers")
    with pytest.raises(InputError, match="got 600 bytes for small and 700 for buffers"):
        side_by_side([entry("small", trace), buffers])
    less = entry("less", trace, slots=0, scope="global", holds="nothing")
    records = side_by_side([entry("small", trace), less])
    assert [one["fills_budget"] for one in records] == [True, False]
    assert [one["gpu_bytes"] for one in records] == [600, 200], "staging slots count where nothing else is held"


def test_other_work_is_refused() -> None:
    trace = sequences()
    with pytest.raises(InputError, match="systems must have run the same trace, got"):
        side_by_side([entry("one", trace), entry("two", sequences(7))])
    with pytest.raises(InputError, match="systems must have run the same workload, got"):
        side_by_side([entry("one", trace), entry("two", trace, batch=2)])
    with pytest.raises(InputError, match="systems must be at least one"):
        side_by_side([])


def shown(records: list[dict[str, Any]], width: int = 160) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(systems_table(records))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text


def test_the_tables_have_a_row_a_system_the_quickest_first(records: list[dict[str, Any]]) -> None:
    lines = shown(records).splitlines()
    names = ["ceiling (no limit)", "seer (clairvoyant)", "fetching", "same", "slow"]
    assert [one["system"] for one in ranked(records)] == [name.split(" (")[0] for name in names]
    for name in names:
        assert sum(line.startswith(f"{name} ") for line in lines) == 2
    assert "…" not in shown(records, width=120)


def test_the_sentences_say_what_was_equal_and_who_is_alike(records: list[dict[str, Any]]) -> None:
    memory, best, bound, caveat = verdicts(records)
    assert memory == "equal for all: 600 B of GPU memory, room for 4 experts; but ceiling holds 8"
    assert best == "quickest without knowing the future: fetching; not distinguishable from it: same"
    assert bound.startswith("no system can take less than ")
    assert "too narrow" in caveat
    told = verdicts(side_by_side([entry("a", sequences()), entry("b", sequences(), synchronous=True)]))
    assert told[1].endswith("all others are distinguishable from it")


def test_who_holds_as_much_as_the_others_is_no_exception(records: list[dict[str, Any]]) -> None:
    outside = dict(by_name(records, "slow"), system="outside", fills_budget=False)
    given = "equal for all: 600 B of GPU memory, room for 4 experts"
    fair = [one for one in records if one["role"] != "no limit"]
    assert verdicts([*fair, outside])[0] == given
    assert verdicts([*fair, {**outside, "gpu_bytes": 500}])[0] == f"{given}; but outside holds 4 in 500 B"
    assert verdicts([*fair, {**outside, "resident_experts": 3}])[0] == f"{given}; but outside holds 3"
    assert verdicts([*fair, {**outside, "resident_experts": 0}])[0] == f"{given}; but outside holds none"


def test_every_kind_of_bound_is_named_whoever_comes_first(records: list[dict[str, Any]]) -> None:
    first = dict(by_name(records, "fetching"), bound_token_s=0.004, bound_by="link")
    split = {**first, "system": "split", "bound_with_dense_on_cpu": True, "bound_token_s": 0.002, "bound_by": "chain"}
    defers = {**first, "system": "defers", "bound_with_deferral": True, "bound_token_s": 0.003}
    for order in permutations((first, split, defers)):
        assert verdicts(order)[2] == (
            "no system can take less than 4.00 ms a token here, for its copies; with dense work on the CPU, 2.00 ms a "
            "token; with experts that join the next layer, 3.00 ms a token"
        )
    assert verdicts([split])[2] == (
        "no system with dense work on the CPU can take less than 2.00 ms a token here, for its host, GPU and CPU"
    )
    assert verdicts([{**first, "bound_token_s": 0.005}, first])[2].startswith("no system can take less than 4.00 ms")


def test_the_bound_of_a_system_that_defers_is_marked() -> None:
    trace = sequences()
    trace = replace(trace, gates=np.full(trace.expert_ids.shape, 0.5, np.float32))
    (one,) = side_by_side([entry("later", trace, place="static", options={"place": {"defer": 1}})])
    assert (one["bound_with_deferral"], one["bound_with_dense_on_cpu"]) == (True, False)


def test_records_are_json(records: list[dict[str, Any]]) -> None:
    assert json.loads(json.dumps(records, allow_nan=False)) == records


def test_the_figure_shows_every_part_and_the_bound(records: list[dict[str, Any]], tmp_path: Path) -> None:
    bars, points = plot(records).axes
    labels = [text.get_text() for text in bars.get_yticklabels()]
    assert labels == ["ceiling (no limit)  1", "seer (clairvoyant)  2", "fetching  3", "same  4", "slow  5"]
    ends = {round(patch.get_x() + patch.get_width(), 6) for patch in bars.patches}
    assert {round(one["token_s"] * 1e3, 6) for one in records} <= ends
    keys = bars.get_legend_handles_labels()[1]
    assert {"dense", "GPU experts", "CPU wait", "transfer wait", "host", "head"} < set(keys)
    assert "lower bound of its budget" in keys
    assert len(points.lines) == len(records)
    out = tmp_path / "systems.png"
    systems_plot(records, out)
    assert out.read_bytes().startswith(b"\x89PNG")


def test_points_that_fall_together_share_a_label(records: list[dict[str, Any]]) -> None:
    _, points = plot([dict(records[1], system=str(place)) for place in range(4)]).axes
    assert [text.get_text() for text in points.texts] == ["1-4"]
    _, points = plot(records).axes
    told = [text.get_text() for text in points.texts]
    assert len(told) > 1
    assert "3-4" in told


def test_one_system_at_a_time_can_be_shown() -> None:
    records = side_by_side([entry("mine", one_at_a_time(sequences()).trace)])
    assert verdicts(records)[1] == "quickest without knowing the future: mine"
    plot(records)

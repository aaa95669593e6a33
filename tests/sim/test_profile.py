"""Costs from a profile: between its points, beyond them, and never for another model; profiles as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.profile import IGNORED, ProfileCosts, other_threads
from sim.run import simulate
from sim.spec import ModelSpec
from sim.spec.profile import (
    LATER,
    TO_DEVICE,
    TO_HOST,
    CpuThreads,
    DensePoint,
    Direction,
    Point,
    Profile,
    Slowdown,
    Transfers,
)
from sim.systems import Budget, SystemSpec
from tests.sim.hand import host, trace_of
from traces.errors import InputError
from traces.workload import one_at_a_time

MODEL = ModelSpec(
    name="by-hand",
    source="test",
    layers=4,
    moe_layers=4,
    experts=8,
    top_k=2,
    hidden=16,
    expert_width=8,
    heads=2,
    kv_heads=2,
    head_dim=8,
    vocab=100,
)


def points(*sizes_and_seconds: tuple[int, float]) -> tuple[Point, ...]:
    return tuple(
        Point(size=size, value_s=seconds, median_s=2 * seconds, p90_s=3 * seconds, repeats=7)
        for size, seconds in sizes_and_seconds
    )


def dense(tokens: int, base_s: float, per_context_s: float) -> DensePoint:
    return DensePoint(
        tokens=tokens, base_s=base_s, per_context_s=per_context_s, least_context=4, most_context=64, p90_s=1, repeats=7
    )


def copies(direction: Direction, *sizes_and_seconds: tuple[int, float], **fields: Any) -> Transfers:
    about = {"memory": "pageable", "beside_gpu": False, **fields}
    return Transfers(direction=direction, points=points(*sizes_and_seconds), **about)


BOTH_WAYS = (
    copies(TO_DEVICE, (100, 0.25), (500, 0.75), (1000, 1.0), (2000, 1.5)),
    copies(TO_HOST, (100, 0.5), (1000, 1.25), (2000, 2.0)),
)
"""Copies that within runs take twice as long: one expert has 1000 bytes, and takes 2 s there."""


def profile(**fields: Any) -> Profile:
    given: dict[str, Any] = {
        "name": "desk",
        "device": "cpu",
        "date": "2026-01-01",
        "machine": {"processor": "x"},
        "model": MODEL,
        "host": host(controller_s=0.5),
        "copies": points((1000, 2.0)),
        "gpu_expert": points((1, 1.0), (4, 4.0), (8, 12.0)),
        "cpu_expert_first": points((1, 5.0), (8, 19.0)),
        "cpu_expert_later": points((1, 3.0), (8, 10.0)),
        "dense": (dense(1, 1.0, 0.25), dense(5, 3.0, 0.75)),
        "head": points((1, 7.0), (4, 8.5)),
        "lookahead_s": 0.125,
        "slowdowns": (
            Slowdown(resource="gpu", others=("link",), factor=1.5),
            Slowdown(resource="gpu", others=("link", "cpu"), factor=2.0),
        ),
        "token_s": 40.0,
    }
    return Profile(**{**given, **fields})


def test_measured_points_are_answered_as_they_are_and_between_them_linearly() -> None:
    costs = ProfileCosts(profile())
    assert [costs.gpu_expert_s(tokens) for tokens in (1, 2, 4, 6, 8)] == [1.0, 2.0, 4.0, 8.0, 12.0]
    assert [costs.cpu_expert_s(tokens, True) for tokens in (1, 3, 8)] == [5.0, 9.0, 19.0]
    assert [costs.cpu_expert_s(tokens, False) for tokens in (1, 3, 8)] == [3.0, 5.0, 10.0]
    assert costs.head_s(3, 1) == 8.0
    assert costs.copy_s(1000) == 2.0
    assert costs.lookahead_s(3) == 0.375
    assert not costs.notes


def test_dense_parts_depend_on_tokens_and_context() -> None:
    costs = ProfileCosts(profile())
    assert costs.dense_s(1, 10) == 1.0 + 0.25 * 10
    assert costs.dense_s(3, 20) == 2.0 + 0.5 * 20
    assert not costs.notes
    assert costs.dense_s(9, 10) == 5.0 + 0.75 * 10
    assert costs.dense_s(1, 100) == 1.0 + 0.25 * 100
    assert set(costs.notes) == {
        "dense was asked for 9, measured from 1 to 5",
        "context was asked for 100, measured from 4 to 64",
    }


def test_beyond_the_last_point_it_grows_at_the_last_slope_and_is_flagged() -> None:
    costs = ProfileCosts(profile())
    assert costs.gpu_expert_s(10) == 16.0
    assert costs.cpu_expert_s(15, False) == 17.0
    assert costs.copy_s(3000) == 6.0, "one point: at its rate"
    assert costs.copy_s(500) == 2.0, "never less than what was measured"
    assert set(costs.notes) == {
        "gpu_expert was asked for 10, measured from 1 to 8",
        "cpu_expert was asked for 15, measured from 1 to 8",
        "copy was asked for 500 to 3000, measured from 1000 to 1000",
    }


def test_copies_of_other_sizes_follow_what_they_took_alone() -> None:
    costs = ProfileCosts(profile(transfers=BOTH_WAYS, chunk_bytes=500))
    assert costs.copy_s(1000) == 2.0, "an expert as within runs"
    assert [costs.copy_s(size) for size in (100, 300, 500, 750, 2000)] == [0.5, 1.0, 1.5, 1.75, 3.0]
    assert [costs.write_back_s(size) for size in (100, 1000, 2000)] == [1.0, 2.5, 4.0]
    assert not costs.notes
    assert costs.copy_s(10) == 0.5, "never less than the smallest"
    assert costs.copy_s(4000) == 5.0, "at the last slope"
    assert costs.write_back_s(3000) == 5.5
    assert set(costs.notes) == {
        "copy was asked for 10 to 4000, measured from 100 to 2000",
        "write-back was asked for 3000, measured from 100 to 2000",
    }


def test_copies_alone_are_those_of_the_memory_that_experts_are_in() -> None:
    other = (
        copies(TO_DEVICE, (500, 0.5), (1000, 1.0), memory="pinned"),
        copies(TO_DEVICE, (500, 9.0), (1000, 9.5), memory="pinned", beside_gpu=True),
    )
    both = (copies(TO_DEVICE, (500, 7.0), (1000, 8.0), beside_gpu=True), *other, *BOTH_WAYS)
    assert ProfileCosts(profile(transfers=both)).copy_s(500) == 1.5
    pinned = ProfileCosts(profile(transfers=both, experts_pinned=True))
    assert pinned.copy_s(500) == 1.0
    assert pinned.write_back_s(1000) == pinned.copy_s(1000), "none back was measured there"


def test_slower_copies_of_experts_are_slower_in_every_size() -> None:
    costs = ProfileCosts(profile(transfers=BOTH_WAYS)).slow()
    assert (costs.copy_s(1000), costs.copy_s(500), costs.write_back_s(1000)) == (6.0, 4.5, 7.5)


def test_another_number_of_threads_is_told() -> None:
    assert other_threads(profile(cpu_threads=4), 4) == other_threads(profile(), 4) == []
    assert other_threads(profile(cpu_threads=4), None) == []
    (told,) = other_threads(profile(cpu_threads=4), 8)
    assert told == "the profile was measured with 4 threads for a CPU expert, the run had 8"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.lists(st.integers(1, 200), min_size=2, max_size=2))
def test_more_tokens_never_cost_less(seconds: list[float], sizes: list[int]) -> None:
    measured = points(*((1 + 7 * place, value) for place, value in enumerate(sorted(seconds))))
    costs = ProfileCosts(profile(gpu_expert=measured))
    less, more = sorted(sizes)
    assert costs.gpu_expert_s(less) <= costs.gpu_expert_s(more) * (1 + 1e-12)


def test_contention_is_that_of_the_profile_and_else_none() -> None:
    costs = ProfileCosts(profile())
    assert costs.slowdown("gpu", frozenset({"link"})) == 1.5
    assert costs.slowdown("gpu", frozenset({"cpu", "link"})) == 2.0
    assert costs.slowdown("gpu", frozenset()) == 1.0
    assert costs.slowdown("link", frozenset({"gpu"})) == 1.0


FIELDS = sorted(set(ModelSpec.model_fields) - {*IGNORED, "tied_embeddings"})


@pytest.mark.parametrize("field", FIELDS)
def test_a_model_of_other_dimensions_is_refused(field: str) -> None:
    value: Any = "fp32" if field == "dtype" else 2 * getattr(MODEL, field) or 7
    with pytest.raises(InputError, match=f"profile must be measured with {field} {value}, as in the model, got"):
        ProfileCosts(profile(), MODEL.model_copy(update={field: value}))


def test_a_model_with_other_layers_or_another_name_may_be_predicted() -> None:
    costs = ProfileCosts(profile(), MODEL.model_copy(update={"layers": 40, "moe_layers": 40, "name": "deep"}))
    assert costs.name == f"profile desk {profile().digest[:12]}"
    assert costs.host.controller_s == 0.5


def test_the_digest_follows_the_content() -> None:
    assert profile().digest == profile().digest
    others = [
        profile(token_s=41.0),
        profile(name="lap"),
        profile(copies=points((1000, 2.5))),
        profile(date="2026-01-02"),
    ]
    assert len({profile().digest, *(one.digest for one in others)}) == 5


def test_a_digest_from_before_a_field_came_is_still_that_of_its_profile() -> None:
    for path in sorted((Path(__file__).parents[2] / "analysis" / "results").glob("*/*/profile.toml")):
        facts = json.loads((path.parents[1] / "summary.json").read_text(encoding="utf-8"))["facts"]
        assert f"digest {Profile.load(path).digest[:12]}" in facts[f"profile of {path.parent.name}"]
    later = {
        "transfers": (copies(TO_DEVICE, (1000, 1.0)),),
        "experts_pinned": True,
        "cpu_by_threads": (CpuThreads(threads=1, points=points((1, 1.0))),),
        "cpu_threads": 1,
    }
    assert later.keys() == {*LATER}
    assert len({profile(**{name: value}).digest for name, value in later.items()} | {profile().digest}) == 5


def test_a_profile_is_stored_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "desk.toml"
    profile().save(path)
    assert Profile.load(path) == profile()
    with pytest.raises(InputError, match=r"out must be a new file \(or give --force\), got"):
        profile().save(path)
    profile(token_s=1.0).save(path, force=True)
    assert Profile.load(path).token_s == 1.0
    whole = profile(
        transfers=BOTH_WAYS, cpu_by_threads=(CpuThreads(threads=2, points=points((1, 1.0))),), cpu_threads=2
    )
    whole.save(path, force=True)
    assert Profile.load(path) == whole
    assert Profile.load(path).digest == whole.digest
    assert [file.name for file in tmp_path.iterdir()] == ["desk.toml"]


def test_a_profile_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    with pytest.raises(InputError, match="out must be a file that can be written, got"):
        profile().save(folder, force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out must be a file that can be written, got"):
        profile().save(tmp_path / "file" / "desk.toml")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "taken"]


def table(*sizes_and_seconds: tuple[int, float]) -> str:
    """A field of a stored profile: copies to the device."""
    inner = ", ".join(
        f"{{size = {size}, value_s = {seconds}, median_s = 1.0, p90_s = 1.0, repeats = 1}}"
        for size, seconds in sizes_and_seconds
    )
    about = 'direction = "to-device", memory = "pinned", beside_gpu = false'
    return f"transfers = [{{{about}, points = [{inner}]}}]"


def stored(tmp_path: Path, old: str, new: str) -> Path:
    """A stored profile with one piece of its text replaced."""
    path = tmp_path / "desk.toml"
    profile().save(path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("profile_version = 1", "profile_version = 2", "profile_version must be 1, got 2"),
        ("token_s = 40.0", "token_s = -1.0", "token_s must be greater than or equal to 0, got -1.0"),
        ("token_s = 40.0", "", "token_s must be given, got nothing"),
        ("token_s = 40.0", "token_s = 1.0\ncolour = 3", "colour must be left out"),
        ("size = 4,", "size = 1,", "gpu_expert must be in ascending order of size, got 1 after 1"),
        ("tokens = 5\n", "tokens = 1\n", "dense must be in ascending order of size, got 1 after 1"),
        ("factor = 1.5", "factor = 0.5", "factor must be greater than or equal to 1"),
        ("transfers = []", 'transfers = [{direction = "up"}]', "transfers"),
        (
            "transfers = []",
            table((100, 1.0), (100, 2.0)),
            "transfers must be in ascending order of size, got 100 after",
        ),
        ("transfers = []", table((100, 0.0)), "transfers must take longer than 0 s, got 0"),
        ("token_s = 40.0", "token_s = = 40.0", "profile must be TOML, got"),
    ],
)
def test_a_file_that_is_no_profile_is_refused_with_its_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = stored(tmp_path, old, new)
    with pytest.raises(InputError) as error:
        Profile.load(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_or_binary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"profile must be readable, got .*none\.toml"):
        Profile.load(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=r"profile must be TOML, got .*binary\.toml"):
        Profile.load(binary)


def test_a_slow_profile_takes_the_ninetieth_percentile_of_every_piece() -> None:
    slow = ProfileCosts(profile(dense=(dense(1, 0.5, 0.0).model_copy(update={"p90_s": 2.0}),))).slow()
    assert slow.gpu_expert_s(4) == 12.0
    assert slow.copy_s(1000) == 6.0
    assert slow.cpu_expert_s(1, True) == 15.0
    assert slow.head_s(4, 1) == 25.5
    assert slow.dense_s(1, 64) == 2.0


def test_the_spread_is_carried_into_a_run_whose_decisions_stay() -> None:
    workload = one_at_a_time(trace_of([[[0], [1]], [[0], [2]]]))
    costs = ProfileCosts(profile(dense=(dense(1, 1.0, 0.0).model_copy(update={"p90_s": 3.0}),), slowdowns=()))
    system, budget = SystemSpec(place="fiddler"), Budget(slots=1)
    plain, slow = (simulate(workload, system, budget, costs, hardware="desk", slow=slow) for slow in (False, True))
    assert plain.operations.equals(slow.operations)
    for column in ("gpu_experts_s", "cpu_experts_s", "dense_s", "transfer_s"):
        assert slow.layers[column].sum() == pytest.approx(3 * plain.layers[column].sum())

"""A user's own prefetch and placement policies: equal to registered ones that say the same, watched for mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from pydantic import ValidationError

from sim.custom import kind_of, load_policy
from sim.policies import EvictionPolicy, PlacementPolicy, PrefetchPolicy
from sim.results import RunResult
from sim.spec.faults import first_fault
from sim.systems import SystemSpec
from tests.sim.hand import HandCosts, host, run, trace_of
from traces.errors import InputError

HEAD = """
from sim.policies import Assignment, EvictionPolicy, PlacementPolicy, PrefetchPolicy
from sim.policies.evict.lru import Lru
from sim.policies.place.fetch import Fetch
from sim.policies.place.split import split
from sim.policies.prefetch.next_router import NextRouter

class Keeps(EvictionPolicy):
    def key(self, block):
        return 0

class Wants(PrefetchPolicy):
    needs = {"lookahead"}
    defaults = {"depth": 1}
    def candidates(self, view):
        first = (view.layer + 1) * self.context.experts
        return [first + expert for named in view.expected for expert, _ in named]

class Sends(PlacementPolicy):
    def place(self, view):
        return split(view, [expert for expert, _ in view.misses])
"""
TRACE = trace_of([[[0, 1], [1, 2]], [[1, 2], [3, 0]], [[2, 3], [0, 1]]], lookahead=[[[1, 2], []], [[3], []], [[0], []]])
COSTS = HandCosts(copy=0.25, host=host(joins_layers=False))


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes ``my.py``: a class of each kind, and what is given."""
    monkeypatch.chdir(tmp_path)

    def written(body: str = "") -> None:
        Path("my.py").write_text(HEAD + body)

    return written


def ran(slots: int = 3, **system: Any) -> RunResult:
    return run(TRACE, slots, COSTS, **system)


def refused(**system: Any) -> str:
    with pytest.raises(InputError) as caught:
        ran(**system)
    return str(caught.value)


def assert_equal_runs(one: RunResult, other: RunResult) -> None:
    for table in ("operations", "events", "layers"):
        pd.testing.assert_frame_equal(getattr(one, table), getattr(other, table))
    assert len(one.operations)


def test_policies_that_say_what_registered_ones_say_decide_like_them(write: Callable[[str], None]) -> None:
    write()
    own = ran(prefetch="my.py:Wants", place="my.py:Sends")
    assert_equal_runs(own, ran(prefetch="next-router", place="static"))
    assert (own.events["kind"] == "prefetch").any()
    assert own.layers["cpu_experts"].sum() > 0


def test_heirs_of_registered_policies_decide_like_them(write: Callable[[str], None]) -> None:
    write("\nclass Near(NextRouter):\n    pass\n\nclass Gets(Fetch):\n    pass\n\nclass Late(Lru):\n    pass\n")
    own = ran(evict="my.py:Late", prefetch="my.py:Near", place="my.py:Gets")
    assert_equal_runs(own, ran(prefetch="next-router"))
    assert SystemSpec(prefetch="my.py:Near", evict="my.py:Late").label() == "Late + fetch + Near"


def test_a_kind_is_told_by_the_class(write: Callable[[str], None]) -> None:
    write("\nclass Near(NextRouter):\n    pass\n")
    kinds = {name: kind_of(f"my.py:{name}") for name in ("Keeps", "Wants", "Sends", "Near", "Lru")}
    assert kinds == {"Keeps": "evict", "Wants": "prefetch", "Sends": "place", "Near": "prefetch", "Lru": "evict"}
    bases = {"evict": EvictionPolicy, "prefetch": PrefetchPolicy, "place": PlacementPolicy}
    for name, kind in kinds.items():
        assert issubclass(load_policy(f"my.py:{name}", kind), bases[kind])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("my.py", "policy_file must name a file and a class in it, as my.py:MyPolicy, got 'my.py'"),
        ("none.py:Wants", "policy_file must be an existing file, got none.py"),
        ("my.py:Want", "class in my.py must be a known name, got 'Want' (did you mean Wants?)"),
        (
            "my.py:Assignment",
            "policy_file must name a class derived from EvictionPolicy or PrefetchPolicy or PlacementPolicy, got class "
            "Assignment in my.py",
        ),
    ],
)
def test_what_is_of_no_kind_is_told_in_one_line(write: Callable[[str], None], text: str, message: str) -> None:
    write()
    with pytest.raises(InputError) as caught:
        kind_of(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("prefetch", "my.py:Keeps", "name a class derived from PrefetchPolicy, got class Keeps in my.py"),
        ("place", "my.py:Wants", "name a class derived from PlacementPolicy, got class Wants in my.py"),
        ("prefetch", "my.py:PrefetchPolicy", "name a complete policy, got my.py:PrefetchPolicy without candidates"),
        ("place", "my.py:Vague", "name a complete policy, got my.py:Vague without place"),
        ("place", "my.py:Idle", "set uses_cpu = True where it defines place, got my.py:Idle, whose place is not asked"),
        ("place", "my.py:Odd", "have True or False as takes_hits, got 'no' in my.py:Odd"),
        ("prefetch", "my.py:Hasty", "have True or False as weighs_time, got 1 in my.py:Hasty"),
        ("place", "my.py:Ahead", "need nothing but future, calibration, got 'lookahead' in my.py:Ahead"),
        (
            "prefetch",
            "my.py:Lucky",
            "need nothing but scores, future, calibration, lookahead, residuals, got 'luck' in my.py:Lucky",
        ),
        (
            "prefetch",
            "my.py:Flat",
            "have a depth in defaults where it needs lookahead: depth must be from 1 to 3, got None in my.py:Flat",
        ),
        (
            "prefetch",
            "my.py:Deep",
            "have a depth in defaults where it needs lookahead: depth must be from 1 to 3, got 4 in my.py:Deep",
        ),
    ],
)
def test_what_is_no_policy_of_that_kind_is_told_in_one_line(
    write: Callable[[str], None], kind: str, text: str, message: str
) -> None:
    write(
        "\nclass Vague(PlacementPolicy):\n    pass\n"
        "\nclass Idle(Fetch):\n    def place(self, view):\n        return split(view, ())\n"
        "\nclass Odd(Sends):\n    takes_hits = 'no'\n"
        "\nclass Hasty(Wants):\n    weighs_time = 1\n"
        "\nclass Ahead(Sends):\n    needs = {'lookahead'}\n"
        "\nclass Lucky(Wants):\n    needs = {'luck'}\n"
        "\nclass Flat(Wants):\n    defaults = {}\n"
        "\nclass Deep(Wants):\n    defaults = {'depth': 4}\n"
    )
    with pytest.raises(InputError) as caught:
        load_policy(text, kind)
    assert str(caught.value) == f"policy_file must {message}"
    with pytest.raises(ValidationError, match="policy_file must"):
        SystemSpec(**{kind: text})


def method(name: str, *lines: str) -> str:
    """A class ``Bad`` of the kind that has this method, with another body."""
    base, argument = ("Wants", "view") if name == "candidates" else ("Sends", "view")
    return f"\nclass Bad({base}):\n    def {name}(self, {argument}):\n" + "".join(f"        {one}\n" for one in lines)


WANTED = {
    "of no layer": ("return [8]", "policy_file must want blocks from 0 to 7, got 8"),
    "before the first": ("return [3, -1]", "policy_file must want blocks from 0 to 7, got -1"),
    "no block": ("return [None]", "policy_file must want blocks that are whole numbers, got None"),
    "half a block": ("return [1.5]", "policy_file must want blocks that are whole numbers, got 1.5"),
    "nothing at all": (
        "return None",
        "policy_file must decide without errors, got my.py: TypeError: 'NoneType' object is not iterable",
    ),
    "an error": (
        "raise KeyError(3)",
        "policy_file must decide without errors, got my.py, line 25: KeyError: 3",
    ),
    "an error on the way": (
        "yield 1 / 0",
        "policy_file must decide without errors, got my.py, line 25: ZeroDivisionError: division by zero",
    ),
}


@pytest.mark.parametrize("case", [*WANTED])
def test_what_cannot_be_prefetched_is_told_in_one_line(write: Callable[[str], None], case: str) -> None:
    body, message = WANTED[case]
    write(method("candidates", body))
    assert refused(prefetch="my.py:Bad") == f"{message} (my.py:Bad, candidates)"


PLACED = {
    "no assignment": ("return None", "policy_file must return an Assignment, got NoneType"),
    "a tuple": ("return (), (), ()", "policy_file must return an Assignment, got tuple"),
    "one left out": ("return Assignment([], [0], [0])", "policy_file must place each expert once, got no expert 1"),
    "one twice": (
        "return Assignment([0], [0, 1], [0, 1])",
        "policy_file must place each expert once, got expert 0 2 times",
    ),
    "another": (
        "return Assignment([0, 3], [1], [1])",
        "policy_file must place each expert once, got expert 3, which is not one of them",
    ),
    "one not copied": (
        "return Assignment([], [0, 1], [0])",
        "policy_file must copy the missing experts that the GPU takes, each once, got no expert 1",
    ),
    "one copied for the CPU": (
        "return Assignment([0], [1], [1, 0])",
        "policy_file must copy the missing experts that the GPU takes, each once, got expert 0, which is not one of "
        "them",
    ),
    "one copied twice": (
        "return Assignment([], [0, 1], [0, 1, 1])",
        "policy_file must copy the missing experts that the GPU takes, each once, got expert 1 2 times",
    ),
    "a side that is none": (
        "return Assignment(None, [0, 1], [0, 1])",
        "policy_file must decide without errors, got my.py: TypeError: 'NoneType' object is not iterable",
    ),
    "an error": ("assert False", "policy_file must decide without errors, got my.py, line 25: AssertionError"),
}


@pytest.mark.parametrize("case", [*PLACED])
def test_what_cannot_be_placed_is_told_in_one_line(write: Callable[[str], None], case: str) -> None:
    body, message = PLACED[case]
    write(method("place", body))
    assert refused(place="my.py:Bad") == f"{message} (my.py:Bad, place)"


def test_a_resident_expert_is_not_copied(write: Callable[[str], None]) -> None:
    """Step 1 finds expert 1 in layer 0 where step 0 has left it."""
    gpu = "gpu = [expert for part in (view.hits, view.misses) for expert, _ in part]"
    write(method("place", gpu, "return Assignment([], gpu, gpu)"))
    message = "policy_file must copy the missing experts that the GPU takes, each once, got expert 1, which is not one "
    assert refused(place="my.py:Bad").startswith(message)


def test_numbers_of_other_kinds_and_generators_will_do(write: Callable[[str], None]) -> None:
    write(
        "\nimport numpy as np\n"
        "\nclass Loose(Wants):\n    def candidates(self, view):\n"
        "        yield from (np.int64(block) for block in super().candidates(view))\n"
        "\nclass Floats(Sends):\n    def place(self, view):\n        cpu, gpu, copies, _ = super().place(view)\n"
        "        return Assignment(map(float, cpu), tuple(gpu), (np.int32(one) for one in copies), np.bool_(False))\n"
    )
    own = ran(prefetch="my.py:Loose", place="my.py:Floats")
    assert_equal_runs(own, ran(prefetch="next-router", place="static"))


def test_what_a_policy_does_to_its_lists_stays_with_it(write: Callable[[str], None]) -> None:
    write(
        "\nclass Spoils(Wants):\n"
        "    def observe(self, event, blocks, counts):\n        blocks.clear()\n        counts.clear()\n"
        "    def candidates(self, view):\n        wanted = super().candidates(view)\n"
        "        for named in view.expected:\n            named.clear()\n"
        "        return wanted\n"
    )
    assert_equal_runs(ran(slots=1, prefetch="my.py:Spoils"), ran(slots=1, prefetch="next-router"))


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (0, "depth must be from 1 to 3, got 0 (my.py:Wants)"),
        (7, "depth must be from 1 to 3, got 7 (my.py:Wants)"),
        ("x", "depth must be a whole number, got 'x'"),
    ],
)
def test_a_depth_that_no_trace_has_is_refused(write: Callable[[str], None], depth: Any, message: str) -> None:
    write()
    with pytest.raises(ValidationError) as caught:
        SystemSpec(prefetch="my.py:Wants", options={"prefetch": {"depth": depth}})
    assert first_fault(caught.value) == f"options.prefetch: {message}"


def test_a_constant_that_a_class_refuses_keeps_its_words(write: Callable[[str], None]) -> None:
    write(
        "\nclass Most(Sends):\n    defaults = {'most': 1}\n    def __init__(self, context):\n"
        "        super().__init__(context)\n        if self.options['most'] < 0:\n"
        "            raise ValueError(f\"most must be at least 0, got {self.options['most']}\")\n"
    )
    assert (
        refused(place="my.py:Most", options={"place": {"most": -1}}) == "most must be at least 0, got -1 (my.py:Most)"
    )
    assert len(ran(place="my.py:Most", options={"place": {"most": 2}}).operations)


def test_what_a_policy_needs_it_gets(write: Callable[[str], None]) -> None:
    """A clairvoyant of one's own names what comes next."""
    write(
        "\nclass Knows(PrefetchPolicy):\n    needs = {'future'}\n    def candidates(self, view):\n"
        "        event, context = view.event + 1, self.context\n"
        "        return [b for b in range(context.blocks) if context.future.next_use(b, view.event) == event]\n"
    )
    own = ran(prefetch="my.py:Knows")
    assert_equal_runs(own, ran(prefetch="oracle", options={"prefetch": {"horizon": 1}}))

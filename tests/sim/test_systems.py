"""Systems and budgets: what is refused, and in which words."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sim.policies import EVICTION, PLACEMENT, PREFETCH
from sim.spec.catalogue import first_fault
from sim.systems import Budget, SystemSpec, parse_capacity
from traces.errors import InputError


@pytest.mark.parametrize(
    ("text", "scope", "slots"),
    [
        ("25%", "layer", 8),
        (" 25 % ", "layer", 8),
        ("12.5%", "layer", 4),
        ("100%", "layer", 32),
        ("3.125%", "layer", 1),
        ("28%", "layer", 8),  # floor(8.96)
        ("25%", "global", 64),
        ("0.5%", "global", 1),  # floor(1.28)
        ("1", "layer", 1),
        ("32", "layer", 32),
        ("256", "global", 256),
        ("7.0", "layer", 7),
    ],
)
def test_capacity_is_read(text: str, scope: str, slots: int) -> None:
    assert parse_capacity(text, layers=8, experts=32, scope=scope) == Budget(slots=slots)


@given(st.integers(1, 10_000), st.integers(1, 1000))
def test_a_percentage_is_the_floor_of_the_exact_share(experts: int, thousandths: int) -> None:
    exact = Fraction(thousandths, 1000) * experts
    text = f"{thousandths // 10}.{thousandths % 10}%"
    if exact < 1:
        with pytest.raises(InputError, match="cache must be between 1 and"):
            parse_capacity(text, layers=2, experts=experts)
    else:
        assert parse_capacity(text, layers=2, experts=experts).slots == int(exact)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0", "cache must be between 1 and 32 slots, got 0"),
        ("0%", "cache must be between 1 and 32 slots, got 0% which is 0"),
        ("3%", "cache must be between 1 and 32 slots, got 3% which is 0"),
        ("101%", "cache must be at most 100%, got 101%"),
        ("100.1%", "cache must be at most 100%, got 100.1%"),
        ("33", "cache must be between 1 and 32 slots, got 33"),
        ("9" * 30, f"cache must be between 1 and 32 slots, got {'9' * 30}"),
        ("2.5", "cache must be a whole number of slots (or carry a %), got '2.5'"),
        ("-1", "cache must be a number of slots or a percentage, got '-1'"),
        ("", "cache must be a number of slots or a percentage, got ''"),
        ("a quarter", "cache must be a number of slots or a percentage, got 'a quarter'"),
        ("1e1", "cache must be a number of slots or a percentage, got '1e1'"),
        ("25%%", "cache must be a number of slots or a percentage, got '25%%'"),
        ("٣", "cache must be a number of slots or a percentage, got '٣'"),
    ],
)
def test_a_capacity_that_makes_no_sense_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_capacity(text, layers=8, experts=32)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("field", "value", "hint"),
    [
        ("evict", "lruu", "did you mean lru"),
        ("evict", "belady's", "did you mean belady"),
        ("place", "cpu on miss", "did you mean cpu-on-miss"),
        ("prefetch", "next_router", "did you mean next-router"),
        ("prefetch", "xyz", "one of eam, impact, mrs-next, next-router"),
    ],
)
def test_an_unknown_policy_offers_near_names(field: str, value: str, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SystemSpec(**{field: value})
    assert first_fault(caught.value).startswith(f"{field} must be a known name, got {value!r} ({hint}")


def test_an_unknown_scope_or_field_is_refused() -> None:
    with pytest.raises(ValidationError, match="scope"):
        SystemSpec(scope="pool")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="evicts"):
        SystemSpec(evicts="lru")  # type: ignore[call-arg]


@pytest.mark.parametrize("registry", [EVICTION, PLACEMENT, PREFETCH])
def test_a_registry_names_its_policies(registry: dict[str, type]) -> None:
    assert {name: policy.name for name, policy in registry.items()} == {name: name for name in registry}


def test_a_system_says_what_it_needs() -> None:
    assert SystemSpec().needs == frozenset()
    assert SystemSpec(evict="belady", prefetch="next-router").needs == {"future", "lookahead"}
    assert SystemSpec(prefetch="next-router").lookahead_depth == 1
    assert SystemSpec(prefetch="next-router", synchronous=True).lookahead_depth == 0
    assert SystemSpec(prefetch="next-router").label() == "lru + fetch + next-router"
    assert SystemSpec(prefetch="next-router", synchronous=True).label() == "lru + fetch"
    assert SystemSpec(evict="lfu", place="cpu-on-miss").label() == "lfu + cpu-on-miss"

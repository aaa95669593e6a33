"""FreeToken's split against its rule in whole fractions, where nothing is rounded."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import pytest

from tests.sim.layers import policy, view


def wanted(count: int, cpu: int, copy: int, how: str) -> int:
    """q of ``count`` misses, as the rule says."""
    share = Fraction(cpu, cpu + copy) if how == "together" else min(Fraction(1), Fraction(cpu, copy))
    low = floor(count * share)
    low_s, next_s = (max(fetched * (1 - share), (count - fetched) * share) for fetched in (low, low + 1))
    return min(low if low_s <= next_s else low + 1, count if how != "unknown" else 1)


def fetched(count: int, cpu: float, copy: float, how: str) -> int:
    layer = view({}, {expert: 1 for expert in range(count)}, cpu=cpu, copy=copy)
    return len(policy("freetoken-split", bandwidths=how).place(layer).copies)


def test_a_tie_that_rounding_would_hide_goes_to_the_lower() -> None:
    """f = 2/5 of four misses: one on the link and three on the CPU take max(3/5, 6/5), two and two max(6/5, 4/5)."""
    assert fetched(4, 2, 3, "together") == 1
    assert fetched(4, 2e-4, 3e-4, "together") == 1


@pytest.mark.parametrize("unit_s", [1.0, 1e-3, 0.7e-5])
@pytest.mark.parametrize("how", ["together", "apart", "unknown"])
def test_it_is_the_rule_in_whole_fractions(how: str, unit_s: float) -> None:
    for cpu in range(1, 11):
        for copy in range(1, 11):
            for count in range(13):
                case = (count, cpu, copy, how)
                assert fetched(count, cpu * unit_s, copy * unit_s, how) == wanted(*case), case

"""What a limit of the GPU's memory buys, and what is said where it buys nothing."""

from __future__ import annotations

import re

import pytest

from sim.memory import MemoryPlan, budget_for_memory, shown_bytes
from sim.systems import STAGING_SLOTS, Budget
from tests.sim.test_costs import MODEL
from traces.errors import InputError

SIZES = {"lanes": 2, "context": 7, "workspace_bytes": 40}
OUTSIDE_BYTES = MODEL.dense_bytes + 2 * 7 * MODEL.kv_bytes_per_token + 40
EXPERT_BYTES = 3 * 100 * 10 * 2


@pytest.mark.parametrize(("scope", "pools"), [("layer", 2), ("global", 1)])
def test_memory_buys_slots_to_the_byte(scope: str, pools: int) -> None:
    exact = OUTSIDE_BYTES + (STAGING_SLOTS + 3 * pools) * EXPERT_BYTES
    assert budget_for_memory(exact, MODEL, scope=scope, **SIZES) == Budget(slots=3)
    assert budget_for_memory(exact - 1, MODEL, scope=scope, **SIZES).slots == 2
    assert budget_for_memory(10**9, MODEL, scope=scope, **SIZES).slots == 2 * 4 // pools
    assert MemoryPlan.of(MODEL, Budget(slots=3), scope=scope, **SIZES).total_bytes == exact


@pytest.mark.parametrize(("scope", "pools", "held"), [("layer", 2, "expert a layer"), ("global", 1, "expert")])
def test_too_little_memory_is_refused_with_the_least_that_would_do(scope: str, pools: int, held: str) -> None:
    least = OUTSIDE_BYTES + (pools + STAGING_SLOTS) * EXPERT_BYTES
    with pytest.raises(InputError) as caught:
        budget_for_memory(least - 1500, MODEL, scope=scope, **SIZES)
    message = str(caught.value)
    assert message.startswith(f"gpu-memory must be at least {least} bytes (")
    assert message.endswith(f": one {held} of 6.00 kB, whatever a system keeps), got {least - 1500}, 1.50 kB too few")
    assert budget_for_memory(least, MODEL, scope=scope, **SIZES).slots == 1


def test_the_shortfall_is_told_by_what_takes_the_memory() -> None:
    """Dense weights, a KV cache with its lanes and tokens, staging, experts and workspace add up to the least."""
    with pytest.raises(InputError) as caught:
        budget_for_memory(10**6, MODEL, scope="layer", lanes=2, context=700, workspace_bytes=401_000)
    (told,) = re.findall(r"bytes \((.*): one", str(caught.value))
    assert "\n" not in str(caught.value)
    assert told == "2.80 MB = 0.69 dense + 1.68 KV of 2 x 700 tokens + 0.01 staging + 0.01 experts + 0.40 workspace"


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(1, "1 B"), (999, "999 B"), (1000, "1.00 kB"), (1_500_000, "1.50 MB"), (2 * 10**12, "2,000.00 GB")],
)
def test_bytes_are_told_in_the_largest_unit(size_bytes: int, shown: str) -> None:
    assert shown_bytes(size_bytes) == shown

"""The compiled twin of ``window-score``."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from sim.compiled.twin import Array, Cache, Twin, register
from sim.policies.evict.window_score import WindowScore

_SPENT = float(1 << 50)  # lifts a resident above every block that is not one; sums of tokens stay exact


class WindowScoreState(NamedTuple):
    """Workloads of the last passes, and who has left."""

    tokens: Array  # int64 [window, B], by pass modulo window
    workload: Array  # int64 [B], the sum of them
    kept: Array  # uint8 [B]
    left: Array  # int64 [P], residents that have left in this window
    number: Array  # int64 [1], the pass at hand
    experts: int
    budget: int


def build(policy: WindowScore) -> WindowScoreState:
    """No uses."""
    context = policy.context
    return WindowScoreState(
        np.zeros((policy.options["window"], context.blocks), np.int64),
        np.zeros(context.blocks, np.int64),
        np.zeros(context.blocks, np.uint8),
        np.zeros(1 if context.shared else context.layers, np.int64),
        np.full(1, -1, np.int64),
        context.experts,
        policy.budget,
    )


def observe(policy: Any, cache: Cache, block: int, tokens: int, event: int) -> None:
    width, layers = policy.tokens.shape[0], policy.workload.size // policy.experts
    number = event // layers
    if number != policy.number[0]:
        for old in range(max(policy.number[0] + 1, number - width + 1), number + 1):
            for other in range(policy.workload.size):
                policy.workload[other] -= policy.tokens[old % width, other]
                policy.tokens[old % width, other] = 0
        if number // width != policy.number[0] // width:
            for pool in range(policy.left.size):
                policy.left[pool] = 0
        policy.number[0] = number
    policy.tokens[number % width, block] += tokens
    policy.workload[block] += tokens


def key(policy: Any, cache: Cache, block: int, event: int) -> float:
    pool = block // policy.experts if policy.left.size > 1 else 0
    stays = policy.kept[block] and policy.left[pool] >= policy.budget
    return float(policy.workload[block] + _SPENT if stays else policy.workload[block])


def admit(policy: Any, block: int, event: int) -> None:
    policy.kept[block] = 1


def forget(policy: Any, block: int) -> None:
    if policy.kept[block]:
        policy.left[block // policy.experts if policy.left.size > 1 else 0] += 1
    policy.kept[block] = 0


register(WindowScore, Twin(WindowScoreState, build, observe=observe, key=key, admit=admit, forget=forget))

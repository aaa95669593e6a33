"""A placement policy of one's own: the CPU computes as many missing experts as makes the layer end soonest.

It runs in simulated time, and on a real device, from this file:

    moetwin simulate mixed --policy-file examples/best_split.py:BestSplit
"""

from __future__ import annotations

from typing import Any, ClassVar

from sim.policies import Assignment, LayerView, PlacementPolicy, PolicyContext
from sim.policies.place.split import makespan_s, split


class BestSplit(PlacementPolicy):
    """Leaves the missing experts with the fewest tokens to the CPU, and has the others copied to the GPU.

    How many, up to ``most``, is tried out on the predicted seconds: the split that would end first is taken, and of
    equal ones the one that leaves the CPU less. Copies, unlike the CPU, take as long for one token as for a hundred.
    """

    name: ClassVar[str] = "best-split"
    defaults: ClassVar[dict[str, Any]] = {"most": 1000}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        if self.options["most"] < 0:
            raise ValueError(f"most must be at least 0 experts, got {self.options['most']}")

    def place(self, view: LayerView) -> Assignment:
        fewest_first = [expert for expert, _ in reversed(view.misses)]
        most = min(self.options["most"], len(fewest_first))
        splits = [split(view, fewest_first[:count]) for count in range(most + 1)]
        return min(splits, key=lambda one: makespan_s(view, one))

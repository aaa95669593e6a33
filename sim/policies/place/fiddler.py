"""Compute a missing expert wherever that is quicker for it alone."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class Fiddler(PlacementPolicy):
    """Sends a missing expert to the CPU if cpu(n) < copy + gpu(n), and fetches it otherwise; a tie goes to the GPU.

    Source: Kamahori et al., *Fiddler: CPU-GPU orchestration for fast inference of Mixture-of-Experts models* (arXiv
    2402.07033), section 3. Each expert is judged as if it were alone, as there; cpu(n) is that of a later expert of the
    layer, without the extra of the first, which the rule does not know.
    """

    name: ClassVar[str] = "fiddler"

    def place(self, view: LayerView) -> Assignment:
        return split(view, [expert for expert, tokens in view.misses if self._is_cheaper(view, tokens)])

    @staticmethod
    def _is_cheaper(view: LayerView, tokens: int) -> bool:
        return view.cpu_expert_s(tokens, False) < view.copy_s + view.gpu_expert_s(tokens)

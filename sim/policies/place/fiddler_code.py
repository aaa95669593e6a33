"""Fiddler's released rule: a price a token on the CPU against a price a fetch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class FiddlerCode(PlacementPolicy):
    """Minimises the *sum* of both sides' prices, where n tokens cost n * ``cpu_token_s`` and a fetch ``fetch_s``.

    The sum falls apart into one choice an expert: to the CPU when it is missing and n * cpu_token_s < fetch_s, which is
    n <= 9 with their constants (7 ms and 70 ms); a tie goes to the GPU. With the option ``calibrated`` the two prices
    are this machine's for one token: a later CPU expert, and a copy with the GPU's work after it. Source: the released
    code of arXiv 2402.07033; its paper's rule is ``fiddler``.
    """

    name: ClassVar[str] = "fiddler-code"
    defaults: ClassVar[Mapping[str, Any]] = {"calibrated": False, "cpu_token_s": 7e-3, "fetch_s": 70e-3}

    def place(self, view: LayerView) -> Assignment:
        token_s, fetch_s = self.options["cpu_token_s"], self.options["fetch_s"]
        if self.options["calibrated"]:
            token_s, fetch_s = view.cpu_expert_s(1, False), view.copy_s + view.gpu_expert_s(1)
        return split(view, [expert for expert, tokens in view.misses if tokens * token_s < fetch_s])

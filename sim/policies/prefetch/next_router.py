"""Prefetch what the next layers' routers say of this layer's hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sim.policies.base import PolicyContext, PrefetchPolicy, PrefetchView, check_depth
from sim.policies.prefetch.checks import check_count


class NextRouter(PrefetchPolicy):
    """Copies the experts that the next layers' routers would choose for the hidden state at hand, nearest layer first.

    ``depth`` is how many layers it looks ahead, ``width`` how many experts of each it takes at most (0: all that are
    named). Source: Eliseev and Mazur, *Fast inference of Mixture-of-Experts language models with offloading* (arXiv
    2312.17238), section 3.2, where it is called speculative expert loading; depth 1 there.
    """

    name: ClassVar[str] = "next-router"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead"})
    defaults: ClassVar[Mapping[str, Any]] = {"depth": 1, "width": 0}

    def __init__(self, context: PolicyContext) -> None:
        super().__init__(context)
        check_depth(self.options["depth"])
        check_count("width", self.options["width"], least=0)

    def candidates(self, view: PrefetchView) -> Sequence[int]:
        experts, width = self.context.experts, self.options["width"] or None
        return [
            layer * experts + expert
            for layer, named in enumerate(view.expected, view.layer + 1)
            for expert, _ in named[:width]
        ]

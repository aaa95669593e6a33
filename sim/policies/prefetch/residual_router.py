"""Prefetch what the next layers' routers say of this layer's hidden state, corrected by how it changes on the mean."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.prefetch.next_router import NextRouter


class ResidualRouter(NextRouter):
    """As :class:`~sim.policies.prefetch.next_router.NextRouter`, on better predictions: the later router reads the
    hidden state at hand plus the mean residual between the two layers' router inputs, measured on other prompts.

    Source: DALI (arXiv 2602.03495), residual-based prefetching. The correction is made where the routers are run, by
    who records a trace or decodes; without it this policy is refused. Chosen here: residuals further ahead than one
    layer are sums of those of the layers between.
    """

    name: ClassVar[str] = "residual-router"
    needs: ClassVar[frozenset[str]] = frozenset({"lookahead", "residuals"})

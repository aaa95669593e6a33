"""Synthetic routing of a catalogue model in two halves of the same domains: one to judge, one to fit a set to.

Sequences of a law stand domain by domain, so that the first half of a trace is about other things than the second. A
set that was fitted to one and judged on the other would hardly know which experts are popular.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sim.spec import ModelSpec
from traces.edit import slice_trace
from traces.fitted import Law, generate
from traces.schema import Trace
from traces.stats import loads
from traces.synthetic import Shape


def shape_of(spec: ModelSpec, sequences: int, prompt_tokens: int, new_tokens: int) -> Shape:
    """``sequences`` sequences at the dimensions of a model."""
    return Shape(
        sequences=sequences,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        layers=spec.moe_layers,
        experts=spec.experts,
        top_k=spec.top_k,
        expert_bytes=spec.expert_bytes,
    )


def halves(
    law: Law,
    spec: ModelSpec,
    sequences: int,
    prompt_tokens: int,
    new_tokens: int,
    *,
    fitted_domains: tuple[str, ...] | None = None,
) -> tuple[Trace, Trace]:
    """(judged, fitted): ``sequences`` sequences each, of the same domains unless others are named for the second.

    ``fitted_domains`` are as many as those of the law.
    """
    both = replace(law, domains=law.domains + (law.domains if fitted_domains is None else fitted_domains))
    trace = generate(both, 0, shape_of(spec, 2 * sequences, prompt_tokens, new_tokens), dtype="bfloat16")
    return slice_trace(trace, sequences=f":{sequences}"), slice_trace(trace, sequences=f"{sequences}:")


def covered(judged: Trace, fitted: Trace, share: int) -> float:
    """The part of ``judged``'s uses that go to the most used ``share`` percent of ``fitted``'s experts of a layer."""
    experts = judged.header.experts
    most = np.argsort(-loads(fitted), axis=1, kind="stable")[:, : experts * share // 100]
    uses = loads(judged)
    return float(np.take_along_axis(uses, most, axis=1).sum() / uses.sum())

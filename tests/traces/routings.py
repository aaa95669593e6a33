"""Small routings for the numbers of locality: by hand, and drawn at random."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from hypothesis import strategies as st

from traces import NOT_ROUTED, Phase, Trace, TraceHeader


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def trace_of(ids: Any, sequence: Any = None, phase: Any = None, experts: int = 4) -> Trace:
    """Tokens in the order of ``ids`` [T, L, K], one forward pass each; decode tokens of one sequence by default."""
    ids = np.asarray(ids)
    tokens, layers, top_k = ids.shape
    sequence = [0] * tokens if sequence is None else list(sequence)
    header = TraceHeader(model="hand", layers=layers, experts=experts, top_k=top_k, expert_bytes=(1,) * layers)
    return Trace.of(
        header,
        expert_ids=ids,
        token_ids=[0] * tokens,
        sequence=sequence,
        position=[sequence[:row].count(own) for row, own in enumerate(sequence)],
        step=range(tokens),
        phase=[Phase.DECODE] * tokens if phase is None else phase,
    )


def single(*experts: int, sequence: Any = None, number: int = 4) -> Trace:
    """One layer, one expert a token."""
    return trace_of([[[expert]] for expert in experts], sequence, experts=number)


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    """Up to four sequences, interleaved, with a prompt or without, in which some places are not routed."""
    layers, experts = draw(st.integers(1, 2)), draw(st.integers(2, 9))
    top_k = draw(st.integers(1, min(3, experts)))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    sequence = draw(st.permutations([number for number, length in enumerate(lengths) for _ in range(length)]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = (len(sequence), layers)
    ids = generator.permuted(np.broadcast_to(np.arange(experts), (*shape, experts)), axis=-1)[..., :top_k]
    ids = np.where(generator.random(ids.shape) < 0.2, NOT_ROUTED, ids)
    prompts = [draw(st.integers(0, length)) for length in lengths]
    seen: Counter[int] = Counter()
    phase = []
    for own in sequence:
        phase.append(Phase.PREFILL if seen[own] < prompts[own] else Phase.DECODE)
        seen[own] += 1
    return trace_of(ids, sequence, phase, experts)


def same(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.asarray(got, dtype=float), np.asarray(wanted, dtype=float), rtol=1e-12, atol=1e-12)

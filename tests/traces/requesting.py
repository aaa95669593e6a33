"""Requests by hand and at random, and a clock that only counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.traces.routings import trace_of, traces
from traces.batching import BatchSpec, Requests, Scheduler
from traces.schema import Phase, Trace
from traces.workload import Step

Played = list[tuple[float, float, Step]]
"""Begin and end of each pass, in seconds."""


def requests_of(*lengths: tuple[int, int]) -> Trace:
    """A trace of (prompt tokens, new tokens) for each sequence 0, 1, ...; one layer, always the same expert."""
    sequence = [number for number, parts in enumerate(lengths) for _ in range(sum(parts))]
    phase = [one for prompt, new in lengths for one in [Phase.PREFILL] * prompt + [Phase.DECODE] * new]
    return trace_of([[[0]]] * len(sequence), sequence, phase)


def arriving(folder: Any, *times_s: float, **spec: Any) -> BatchSpec:
    """A spec whose requests arrive at these times, recorded in a file."""
    path = folder / "times.csv"
    path.write_text("\n".join(["arrival_s", *map(str, times_s)]))
    return BatchSpec(arrivals=str(path), **spec)


def play(scheduler: Scheduler, seconds: Callable[[Step], float]) -> Played:
    """Runs all passes, each of which takes what ``seconds`` says."""
    now_s, played = 0.0, []
    while (turn := scheduler.next(now_s)) is not None:
        if isinstance(turn, Step):
            played.append((now_s, now_s + seconds(turn), turn))
            now_s = played[-1][1]
        else:
            assert turn > now_s
            now_s = turn
    return played


def table(steps: Sequence[Step]) -> list[tuple[Any, ...]]:
    """Everything in a pass."""
    return [
        (s.index, s.phase, s.rows.tolist(), s.sequences, s.tokens, s.context, s.starts, s.ends, s.others) for s in steps
    ]


@st.composite
def plans(draw: st.DrawFn, **fixed: Any) -> Requests:
    """Random requests whose arrivals, lanes and chunks are random too, apart from what is ``fixed``."""
    trace = draw(traces())
    free = {
        "batch": st.integers(1, 4),
        "batching": st.sampled_from(["lock-step", "continuous"]),
        "prefill_chunk": st.integers(0, 4),
        "arrivals": st.sampled_from([None, "poisson"]),
        "seed": st.integers(0, 99),
    }
    values = {name: draw(choice) for name, choice in free.items() if name not in fixed} | fixed
    rate = draw(st.sampled_from([0.05, 0.3, 2.0])) if values["arrivals"] else None
    spec = BatchSpec(**values, rate_per_s=rate)
    return Requests(trace, spec, spec.arrivals_for(len(np.unique(trace.sequence))))

"""A seeded stand-in for look-ahead that was not recorded: predictions of a stated recall and precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from traces.errors import InputError
from traces.schema import Trace
from traces.synthetic import predict

MOST_AHEAD = 3
"""Layers ahead that a stand-in predicts."""


def with_lookahead(trace: Trace, recall: float, *, seed: int = 0) -> Trace:
    """``trace`` with look-ahead of depth :data:`MOST_AHEAD`, made from its true routing; marked as synthetic.

    Each prediction names as many experts as were chosen, of which a true one is kept with probability ``recall``,
    whatever the distance: recall and precision are the same. Raises :class:`InputError` unless ``recall`` is from 0 to
    1, and for a trace that has recorded look-ahead.
    """
    if not 0 <= recall <= 1:
        raise InputError(f"lookahead-recall must be from 0 to 1, got {recall}")
    if trace.lookahead is not None:
        raise InputError("lookahead-recall must be left out for a trace that has recorded look-ahead, got both")
    header = trace.header
    predicted = predict(np.random.default_rng(seed), np.asarray(trace.expert_ids), header.experts, MOST_AHEAD, recall)
    told = f"{header.made_by}; look-ahead made up with recall {recall:g}, seed {seed}".removeprefix("; ")
    return replace(trace, header=header.model_copy(update={"synthetic": True, "made_by": told}), lookahead=predicted)

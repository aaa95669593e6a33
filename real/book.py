"""Numbers of forward passes and sequences, as a model that is run hands them out."""

from __future__ import annotations

import torch
from torch import Tensor

from real.generate import NO_TOKEN
from traces.schema import Phase
from traces.workload import Step


class StepBook:
    """Numbers forward passes and sequences as they come by; every prefill begins new sequences, one a lane."""

    def __init__(self) -> None:
        self.index = -1
        self._sequences = 0
        self._first = 0
        self._step: Step | None = None

    def begin(self, phase: Phase, mask: Tensor, positions: Tensor) -> Step:
        """A pass over ``mask`` [B, S] of real tokens at ``positions`` [B, S] begins."""
        self.index += 1
        if phase == Phase.PREFILL:
            self._first, self._sequences = self._sequences, self._sequences + len(mask)
        counts = mask.sum(dim=1).tolist()
        active = [lane for lane, count in enumerate(counts) if count]
        sequences = tuple(self._first + lane for lane in active)
        self._step = Step(
            index=self.index,
            phase=phase,
            rows=torch.empty(0, dtype=torch.int64).numpy(),
            sequences=sequences,
            tokens=tuple(counts[lane] for lane in active),
            context=int(positions.max()) + 1,
            starts=sequences if phase == Phase.PREFILL else (),
            ends=(),
        )
        return self._step

    def end(self, next_tokens: list[int]) -> Step:
        """The pass has ended; lanes without a next token end with it."""
        step = self._step
        assert step is not None, "a pass that ends has begun"
        ends = tuple(one for one in step.sequences if next_tokens[one - self._first] == NO_TOKEN)
        return Step(step.index, step.phase, step.rows, step.sequences, step.tokens, step.context, step.starts, ends)

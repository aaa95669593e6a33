"""Switch Transformers with sparse blocks of the other families' shape: routers that can be watched, experts served.

Names of weights stay. Shapes: B sequences, S tokens of a call, T rows, E experts, H hidden width, P prompt tokens that
the encoder reads, padded on the right. The pass that begins sequences has B * (P + 1) rows: in every sequence the P
tokens of the encoder, then the first one of the decoder. Either stack's routers are called with all of these, the other
stack's as rows of zeros and of weight 0; so one mask tells of both which rows are real. A later pass has B rows, and
calls the decoder alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, SwitchTransformersConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersExperts,
    SwitchTransformersForConditionalGeneration,
    SwitchTransformersSparseMLP,
    SwitchTransformersTop1Router,
)

ENCODER, DECODER = "encoder", "decoder"


class SwitchRouter(SwitchTransformersTop1Router):
    """The expert of the highest probability, unless ``expert_capacity`` earlier tokens of the sequence chose it.

    A token beyond the capacity has weight 0. Source: Fedus, Zoph and Shazeer, "Switch Transformers" (arXiv:2101.03961),
    section 2.2; a sequence is the group that shares a capacity, as in transformers 5.23 (5.17 drops no token).
    """

    stack: str

    def forward(self, hidden: Tensor, before: int = 0, after: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], weights and ids [T, 1] for ``hidden`` [B, S, H], or [T, H], which has no capacity.

        Of the S tokens, ``before`` at the begin and ``after`` at the end are absent.
        """
        seen = hidden[..., before : hidden.shape[-2] - after, :]
        logits = functional.linear(seen.to(self.dtype), self.classifier.weight.to(self.dtype), self.classifier.bias)
        probabilities = logits.softmax(dim=-1, dtype=self.dtype).to(hidden.dtype)
        ids = probabilities.argmax(dim=-1, keepdim=True)  # [B, S, 1]
        weights = probabilities.gather(-1, ids)
        if seen.ndim == 3 and seen.shape[1] > self.expert_capacity:
            place = functional.one_hot(ids[..., 0], self.num_experts).cumsum(dim=1).gather(-1, ids)
            weights = weights.masked_fill(place > self.expert_capacity, 0)
        if before or after:
            logits, weights, ids = (functional.pad(one, (0, 0, before, after)) for one in (logits, weights, ids))
        return logits.flatten(0, -2), weights.flatten(0, -2), ids.flatten(0, -2)


class SwitchExperts(SwitchTransformersExperts):
    """The experts behind the interface that the fused families have."""

    config: PretrainedConfig

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The output [T, H] for ``hidden`` [T, H], ``ids`` and ``weights`` [T, 1]."""
        run = ALL_EXPERTS_FUNCTIONS.get_interface(self.config._experts_implementation, _eager)
        output: Tensor = run(self, hidden, ids, weights)
        return output


def _eager(experts: nn.ModuleDict, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One expert after the other; rows of weight 0 get nothing."""
    output = torch.zeros_like(hidden)
    for expert in ids[weights != 0].unique().tolist():
        rows, places = torch.where((ids == expert) & (weights != 0))
        own = experts[f"expert_{expert}"](hidden[rows]) * weights[rows, places, None]
        output.index_add_(0, rows, own.to(hidden.dtype))
    return output


class SwitchBlock(SwitchTransformersSparseMLP):
    """A sparse block that routes all rows of a pass: ``before`` and ``after`` its own are those of the other stack."""

    before: int
    after: int

    def forward(self, hidden: Tensor) -> Tensor:
        """The output [B, S, H] for ``hidden`` [B, S, H]."""
        before, after = self.before, self.after
        rows = functional.pad(hidden, (0, 0, before, after)) if before or after else hidden
        _, weights, ids = self.router(rows, before, after)
        output: Tensor = self.experts(rows.flatten(0, 1), ids, weights).view_as(rows)
        return output[:, before : before + hidden.shape[1]]


class SwitchModel(SwitchTransformersForConditionalGeneration):
    """The model with such blocks. Its encoder is called by itself, its forward pass is the decoder's."""

    def __init__(self, config: SwitchTransformersConfig) -> None:
        super().__init__(config)
        for stack in (ENCODER, DECODER):
            for block in self.sparse_blocks(stack):
                block.__class__, block.before, block.after = SwitchBlock, 0, int(stack == ENCODER)
                block.router.__class__, block.router.stack = SwitchRouter, stack
                block.experts.__class__, block.experts.config = SwitchExperts, self.config

    def sparse_blocks(self, stack: str) -> Iterator[Any]:
        """The sparse blocks of a stack, first to last."""
        blocks: Any = self.get_submodule(stack).block
        return (one.layer[-1].mlp for one in blocks if one.is_sparse)

    def forward(self, *, encoder_outputs: Any, past_key_values: Any, **given: Any) -> Any:
        """As in transformers; on an empty cache the pass also has the rows of the encoder."""
        read = 0 if past_key_values.get_seq_length() else encoder_outputs[0].shape[1]
        for block in self.sparse_blocks(DECODER):
            block.before = read
        return super().forward(encoder_outputs=encoder_outputs, past_key_values=past_key_values, **given)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True

"""Fast training passes for Qwen3-MoE on a CPU: sorted experts, blocked causal attention, chunked cross-entropy.

The functions compute what transformers' own modules compute, from the same parameters, in a chosen number format
(bfloat16 runs on matrix units where the processor has them). They exist for training speed only: a trained model is an
ordinary transformers checkpoint. Weights, router and residual stream stay in float32.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

ATTENTION_BLOCK = 128
ROW_BUCKET = 32
LOSS_CHUNK = 1024


def keep_heap_memory() -> None:
    """Ask the C library to reuse freed memory: fresh pages for every large tensor cost more than the arithmetic.

    Does nothing where the C library has no `mallopt`.
    """
    mmap_max, trim_threshold, top_pad, arena_max = -4, -1, -2, -8
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(arena_max, 1)
            mallopt(mmap_max, 0)
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(top_pad, 256 * 2**20)


def _sorted_rows(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
    """Lay out assignments (flat expert indices [N]) by expert, each expert's rows padded to a multiple of ROW_BUCKET.

    Few distinct row counts let the matrix library reuse its compiled kernels. Returns the assignment of each row
    (padding rows repeat assignment 0), whether a row is real, the row of each assignment and each expert's row range.
    """
    order = torch.argsort(index, stable=True)
    counts = torch.bincount(index, minlength=num_experts)
    padded = (counts + ROW_BUCKET - 1) // ROW_BUCKET * ROW_BUCKET
    ends = padded.cumsum(0)
    shift = (ends - padded) - (counts.cumsum(0) - counts)
    position = torch.arange(index.numel()) + shift.repeat_interleave(counts)
    rows = torch.zeros(int(ends[-1]), dtype=torch.int64)
    rows[position] = order
    real = torch.zeros(rows.numel(), dtype=torch.bool)
    real[position] = True
    inverse = torch.empty_like(order)
    inverse[order] = position
    return rows, real, inverse, list(zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True))


class SortedExperts(torch.autograd.Function):
    """Gated experts over tokens sorted by expert: one matrix product per expert and projection."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        """Map x [T, H], index and weight [T, k], gate_up [E, 2I, H], down [E, H, I] to [T, H]."""
        k, inner = index.shape[1], down.shape[2]
        assignment, real, inverse, ranges = _sorted_rows(index.reshape(-1), gate_up.shape[0])
        token = assignment // k
        rows = x.index_select(0, token)
        gates = rows.new_empty(rows.shape[0], 2 * inner)
        for expert, (a, b) in enumerate(ranges):
            torch.mm(rows[a:b], gate_up[expert].T, out=gates[a:b])
        scale = (weight.reshape(-1).index_select(0, assignment) * real).unsqueeze(1).to(x.dtype)
        hidden = F.silu(gates[:, :inner]) * gates[:, inner:]
        scaled = hidden * scale
        out = torch.empty_like(rows)
        for expert, (a, b) in enumerate(ranges):
            torch.mm(scaled[a:b], down[expert].T, out=out[a:b])
        ctx.save_for_backward(rows, gates, hidden, scaled, scale, token, inverse, gate_up, down)
        ctx.ranges, ctx.k = ranges, k
        return out.index_select(0, inverse).view(-1, k, x.shape[1]).sum(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of x, weight, gate_up and down; the index has none."""
        rows, gates, hidden, scaled, scale, token, inverse, gate_up, down = ctx.saved_tensors
        inner = down.shape[2]
        grad_out = grads[0].index_select(0, token)
        grad_scaled = torch.empty_like(hidden)
        grad_gate_up, grad_down = torch.empty_like(gate_up), torch.empty_like(down)
        for expert, (a, b) in enumerate(ctx.ranges):
            torch.mm(grad_out[a:b], down[expert], out=grad_scaled[a:b])
            torch.mm(grad_out[a:b].T, scaled[a:b], out=grad_down[expert])
        grad_weight = (grad_scaled * hidden).sum(1, dtype=torch.float32).index_select(0, inverse).view(-1, ctx.k)
        grad_hidden = grad_scaled.mul_(scale)
        grad_gates = torch.empty_like(gates)
        torch.mul(grad_hidden, F.silu(gates[:, :inner]), out=grad_gates[:, inner:])
        grad_gates[:, :inner] = torch.ops.aten.silu_backward(grad_hidden.mul_(gates[:, inner:]), gates[:, :inner])
        grad_rows = torch.empty_like(rows)
        for expert, (a, b) in enumerate(ctx.ranges):
            torch.mm(grad_gates[a:b], gate_up[expert], out=grad_rows[a:b])
            torch.mm(grad_gates[a:b].T, rows[a:b], out=grad_gate_up[expert])
        grad_x = grad_rows.index_select(0, inverse).view(-1, ctx.k, rows.shape[1]).sum(1)
        return grad_x, None, grad_weight, grad_gate_up, grad_down


class BlockedCausalAttention(torch.autograd.Function):
    """Causal attention with grouped heads, in blocks of query rows that see only the keys before their end."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map q [G, R, L, D] (already scaled), k and v [G, L, D] to [G, R, L, D]; G = batch x key heads."""
        groups, repeat, length, dim = q.shape
        out = torch.empty_like(q)
        saved = [q, k, v]
        for a in range(0, length, ATTENTION_BLOCK):
            b = min(a + ATTENTION_BLOCK, length)
            scores = torch.bmm(q[:, :, a:b].reshape(groups, -1, dim), k[:, :b].transpose(1, 2))
            mask = torch.full((b - a, b - a), float("-inf"), dtype=q.dtype).triu(1)
            scores.view(groups, repeat, b - a, b)[..., a:b] += mask
            probs = torch.softmax(scores, -1)
            out[:, :, a:b] = torch.bmm(probs, v[:, :b]).view(groups, repeat, b - a, dim)
            saved.append(probs)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the gradients of q, k and v."""
        q, k, v, *blocks = ctx.saved_tensors
        groups, repeat, length, dim = q.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for number, probs in enumerate(blocks):
            a, b = number * ATTENTION_BLOCK, min((number + 1) * ATTENTION_BLOCK, length)
            rows = q[:, :, a:b].reshape(groups, -1, dim)
            grad_rows = grads[0][:, :, a:b].reshape(groups, -1, dim)
            grad_v[:, :b] += torch.bmm(probs.transpose(1, 2), grad_rows)
            grad_probs = torch.bmm(grad_rows, v[:, :b].transpose(1, 2))
            grad_scores = torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
            grad_q[:, :, a:b] = torch.bmm(grad_scores, k[:, :b]).view(groups, repeat, b - a, dim)
            grad_k[:, :b] += torch.bmm(grad_scores.transpose(1, 2), rows)
        return grad_q, grad_k, grad_v


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a tied output layer; logits exist for one chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Map hidden [T, H], weight [V, H] and targets [T] to the mean loss (float32 scalar, nats per token)."""
        total = torch.zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for a in range(0, hidden.shape[0], LOSS_CHUNK):
            rows, wanted = hidden[a : a + LOSS_CHUNK], targets[a : a + LOSS_CHUNK, None]
            logits = rows @ weight.T
            chosen = logits.gather(1, wanted).float()
            total += (torch.logsumexp(logits, 1, keepdim=True).float() - chosen).sum()
            grad = torch.softmax(logits, 1)
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))
            grad_hidden[a : a + LOSS_CHUNK] = grad @ weight
            grad_weight += grad.T @ rows
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.tokens = hidden.shape[0]
        return total / hidden.shape[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients that the forward pass already computed."""
        grad_hidden, grad_weight = ctx.saved_tensors
        factor = grads[0] / ctx.tokens
        return grad_hidden * factor, (grad_weight * factor).to(grad_hidden.dtype), None


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x [B, L, N, D]; cos and sin [L, 1, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _prepare_heads(
    joint: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Split, norm and rotate joint projections [B, L, (N + 2 KV) D].

    Returns q [B*KV, N/KV, L, D], scaled, and k and v [B*KV, L, D].
    """
    batch, length, width = joint.shape
    dim = q_weight.shape[0]
    heads = width // dim - 2 * kv_heads
    q, k, v = joint.view(batch, length, -1, dim).split((heads, kv_heads, kv_heads), dim=2)
    q = _rotate(_rms_norm(q.float(), q_weight, eps), cos, sin) * dim**-0.5
    k = _rotate(_rms_norm(k.float(), k_weight, eps), cos, sin)
    q = q.view(batch, length, kv_heads, -1, dim).permute(0, 2, 3, 1, 4).to(joint.dtype).contiguous()
    k, v = (t.to(joint.dtype).transpose(1, 2).contiguous() for t in (k, v))
    return q.view(batch * kv_heads, -1, length, dim), k.view(-1, length, dim), v.view(-1, length, dim)


_fused: dict[str, Any] = {"norm": _rms_norm, "heads": _prepare_heads}


def compile_pieces() -> None:
    """Compile the elementwise pieces (about a sixth faster); needs a C++ compiler and half a minute."""
    _fused["norm"] = torch.compile(_rms_norm, dynamic=False)
    _fused["heads"] = torch.compile(_prepare_heads, dynamic=False)


def _attend(attention: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """Compute self-attention for normed x [B, L, H] in x's number format, projections included."""
    batch, length, _ = x.shape
    dim = attention.head_dim
    heads = attention.k_proj.out_features // dim
    weight = torch.cat((attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight)).to(x.dtype)
    norms = attention.q_norm.weight, attention.k_norm.weight
    q, k, v = _fused["heads"](F.linear(x, weight), *norms, cos, sin, heads, eps)
    out = BlockedCausalAttention.apply(q, k, v)
    out = out.view(batch, heads, -1, length, dim).permute(0, 3, 1, 2, 4).reshape(batch, length, -1)
    return F.linear(out, attention.o_proj.weight.to(x.dtype))


def _mix_experts(mlp: Any, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Route normed x [T, H] in float32 and run the experts; return the output [T, H] and the logits [T, E]."""
    logits = F.linear(x, mlp.gate.weight)
    top, index = torch.topk(torch.softmax(logits, -1), mlp.gate.top_k, dim=-1)
    weight = top / top.sum(-1, keepdim=True)
    experts = mlp.experts
    out = SortedExperts.apply(x.to(dtype), index, weight, experts.gate_up_proj.to(dtype), experts.down_proj.to(dtype))
    return out, logits


def training_forward(
    model: Qwen3MoeForCausalLM, tokens: Tensor, targets: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Run the model on tokens [B, L] and give the mean cross-entropy and each layer's router logits [B*L, E].

    `targets` [B, L] are the next tokens. `dtype` is the number format of matrix products. All layers must be sparse
    and the router must renormalise the chosen probabilities.
    """
    config, body = model.config, model.model
    eps = config.rms_norm_eps
    x = F.embedding(tokens, body.embed_tokens.weight)
    cos, sin = body.rotary_emb(x, torch.arange(tokens.shape[1])[None])
    cos, sin = cos[0, :, None], sin[0, :, None]
    all_logits = []
    for layer in body.layers:
        normed = _fused["norm"](x, layer.input_layernorm.weight, eps)
        x = x + _attend(layer.self_attn, normed.to(dtype), cos, sin, eps)
        normed = _fused["norm"](x, layer.post_attention_layernorm.weight, eps)
        mixed, logits = _mix_experts(layer.mlp, normed.view(-1, x.shape[-1]), dtype)
        x = x + mixed.view_as(x)
        all_logits.append(logits)
    hidden = _fused["norm"](x, body.norm.weight, eps).view(-1, x.shape[-1]).to(dtype)
    loss = ChunkedCrossEntropy.apply(hidden, body.embed_tokens.weight.to(dtype), targets.reshape(-1))
    return loss, all_logits

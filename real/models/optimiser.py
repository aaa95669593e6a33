"""Optimisers of the small model: orthogonalised momentum (Muon) for matrices, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Bring the singular values of matrices [N, rows, cols] (rows <= cols) near 1 by a Newton-Schulz iteration.

    Coefficients: Keller Jordan, "Muon: an optimizer for hidden layers" (2024). Runs in bfloat16, returns float32.
    """
    a, b, c = NEWTON_SCHULZ
    x = (matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(torch.bfloat16)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(1, 2))
        x = a * x + torch.bmm(b * gram + c * torch.bmm(gram, gram), x)
    return x.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised, scaled to the size of an AdamW update.

    Scale 0.2 sqrt(max(rows, cols)) after Liu et al., "Muon is scalable for LLM training" (2025). Groups
    with `fused_pair` hold weights whose rows are two matrices on top of each other.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "fused_pair": False})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor, bool]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    matrices, update = self._update(weight, group)
                    turned = matrices.shape[1] > matrices.shape[2]
                    update = update.transpose(1, 2) if turned else update
                    shapes.setdefault((update.shape[1], update.shape[2]), []).append((matrices, update, turned))
            for (_, cols), entries in shapes.items():
                self._apply(entries, 0.2 * cols**0.5 * group["lr"], group)

    def _update(self, weight: Tensor, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Advance the momentum of `weight`; return its matrices and their Nesterov updates."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
        update = weight.grad.lerp(momentum, group["momentum"])
        shape = (-1, weight.shape[-2] // 2 if group["fused_pair"] else weight.shape[-2], weight.shape[-1])
        return weight.view(shape), update.view(shape)

    def _apply(self, entries: list[tuple[Tensor, Tensor, bool]], rate: float, group: dict[str, Any]) -> None:
        """Orthogonalise the updates of one shape together and subtract them, with decoupled weight decay."""
        directions = orthogonalise(torch.cat([update for _, update, _ in entries]))
        parts = directions.split([update.shape[0] for _, update, _ in entries])
        for (matrices, _, turned), direction in zip(entries, parts, strict=True):
            matrices.mul_(1 - group["lr"] * group["weight_decay"])
            matrices.sub_(direction.transpose(1, 2) if turned else direction, alpha=rate)


def make_optimisers(model: nn.Module, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Give Muon for attention and expert matrices and AdamW for embeddings, routers and norms.

    Weights named `gate_up_proj` are treated as two matrices. Norm weights get no weight decay.
    """
    plain, fused, adam, norms = [], [], [], []
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            norms.append(weight)
        elif "gate_up_proj" in name:
            fused.append(weight)
        elif "embed_tokens" in name or "mlp.gate." in name:
            adam.append(weight)
        else:
            plain.append(weight)
    muons = [
        Muon([{"params": fused, "fused_pair": True}], lr=lr, weight_decay=weight_decay),
        Muon([{"params": plain}], lr=lr, weight_decay=weight_decay),
    ]
    groups: list[dict[str, Any]] = [{"params": adam}, {"params": norms, "weight_decay": 0.0}]
    return [*muons, torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)]

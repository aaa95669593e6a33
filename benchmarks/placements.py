"""How near HybriMoE's rule for one layer comes to the best assignment that there is, on machines at random.

    python -m benchmarks.placements

Layers of 6 and 8 experts, of one token each and of 1 to 8, any number of them resident. A GPU expert takes 0.05 to 1
copies, a token on the CPU 0.2 to 5 (both log-uniform), the CPU's first expert up to a token more (uniform), and in half
of the layers the GPU first has work of two experts. The rule is taken without its fallback to one device alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import typer

from sim.policies import LayerView, PolicyContext
from sim.policies.place import HybriMoe, Optimal
from sim.policies.place.hybrimoe import assignment_of
from sim.policies.place.split import makespan_s

LAYERS, SEED = 250, 20250405
EXPERTS, MOST_TOKENS = (6, 8), (1, 8)
ID_SPACE = 64


def machine(rng: np.random.Generator, count: int, most_tokens: int) -> LayerView:
    """A layer of ``count`` experts of 1 to ``most_tokens`` tokens, as the module's text draws them."""
    ids, tokens = rng.permutation(ID_SPACE)[:count].tolist(), rng.integers(1, most_tokens + 1, count).tolist()
    hits = int(rng.integers(0, count + 1))
    loads = [*zip(ids, tokens, strict=True)]
    gpu, cpu = (float(np.exp(rng.uniform(np.log(low), np.log(high)))) for low, high in ((0.05, 1.0), (0.2, 5.0)))
    first, shared = cpu * float(rng.random()), gpu * float(rng.choice([0, 2]))
    resident, missing = (
        tuple(sorted(part, key=lambda load: (-load[1], load[0]))) for part in (loads[:hits], loads[hits:])
    )
    return LayerView(
        0,
        resident,
        missing,
        0,
        gpu_expert_s=lambda tokens: gpu,
        cpu_expert_s=lambda tokens, is_first: cpu * tokens + first * is_first,
        copy_s=1.0,
        gpu_free_s=shared,
    )


def ratios(count: int, most_tokens: int) -> list[float]:
    """Makespan of the rule over that of the optimum, for each of :data:`LAYERS` layers."""
    rng, context = np.random.default_rng(SEED), PolicyContext(layers=1, experts=ID_SPACE, top_k=6)
    rule, best = HybriMoe(context), Optimal(context)
    drawn = [machine(rng, count, most_tokens) for _ in range(LAYERS)]
    return [makespan_s(one, assignment_of(rule.moves(one))) / best.schedule(one)[1] for one in drawn]


def measured() -> list[dict[str, Any]]:
    """Mean, worst, and share of layers above the optimum, for each size of a layer."""
    return [
        {
            "experts": count,
            "most_tokens": most,
            "layers": LAYERS,
            "mean": float(np.mean(found)),
            "worst": max(found),
            "above": float(np.mean(np.array(found) > 1 + 1e-9)),
        }
        for count in EXPERTS
        for most in MOST_TOKENS
        for found in [ratios(count, most)]
    ]


def shown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each of :func:`measured`."""
    return "\n".join(
        f"{row['experts']} experts of {'1 token' if row['most_tokens'] == 1 else '1 to 8 tokens':<13}  mean "
        f"{row['mean']:.4f}, worst {row['worst']:.2f}, above the optimum in {row['above']:.0%} of {row['layers']}"
        for row in rows
    )


def main() -> None:
    """Prints the ratios."""
    print(shown(measured()))


if __name__ == "__main__":
    typer.run(main)

"""Split a layer between CPU and GPU greedily, so that the longer side is short."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy
from sim.policies.place.split import split


class DaliGreedy(PlacementPolicy):
    """Gives one expert after the other, most tokens first, to the side that would then have less to do.

    The problem is the 0-1 program min max(T_cpu, T_gpu), each the sum over its experts. A missing expert costs the GPU
    the longer of copy and compute, which overlap. Source: DALI (arXiv 2602.03495), greedy assignment. Chosen here: the
    order, most tokens first and then the lowest id; a tie goes to the GPU; experts that are being prefetched count
    as resident; a side begins with what it is busy with; the GPU then takes what is resident first.
    """

    name: ClassVar[str] = "dali-greedy"
    takes_hits: ClassVar[bool] = True

    def place(self, view: LayerView) -> Assignment:
        missing = {expert for expert, _ in view.misses}
        loads = sorted([*view.hits, *view.late, *view.misses], key=lambda load: (-load[1], load[0]))
        cpu_s, gpu_s, cpu = view.cpu_free_s, view.gpu_free_s, list[int]()
        for expert, tokens in loads:
            on_gpu_s = gpu_s + max(view.gpu_expert_s(tokens), view.copy_s if expert in missing else 0.0)
            on_cpu_s = cpu_s + view.cpu_expert_s(tokens, not cpu)
            if on_gpu_s <= on_cpu_s:
                gpu_s = on_gpu_s
            else:
                cpu_s = on_cpu_s
                cpu.append(expert)
        return split(view, cpu)

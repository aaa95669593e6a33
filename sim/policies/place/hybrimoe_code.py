"""The decode rule of HybriMoE's released code, which is another than its paper's."""

from __future__ import annotations

from typing import ClassVar

from sim.policies.base import Assignment, LayerView, PlacementPolicy


class HybriMoeCode(PlacementPolicy):
    """Walks a list (resident, then missing; each most tokens first) from both ends at once.

    The GPU would take the first, the CPU the last; whoever would end sooner takes it, a tie goes to the GPU. For a
    missing expert the GPU waits for its copy, which begins when the one before has ended; a copy is booked on the link
    only when the GPU takes its expert. Source: the released code of arXiv 2504.05897, decode.

    Their constants are terms of the machine's costs here: the CPU's intercept is what a layer's first expert takes
    longer there, and is paid once. The GPU's intercept, paid when it is idle, has no term of its own: a GPU expert's
    launch is part of ``gpu_expert_s`` of every expert, and what an idle GPU would take longer to begin counts nothing.

    Departures: applied to prefill as well, where that code sends every expert to the GPU; what is being prefetched
    counts as resident, and is waited for.
    """

    name: ClassVar[str] = "hybrimoe-code"
    takes_hits: ClassVar[bool] = True

    def place(self, view: LayerView) -> Assignment:
        missing = {expert for expert, _ in view.misses}
        there_s = {expert: arrival_s for (expert, _), arrival_s in zip(view.late, view.arrivals_s, strict=True)}
        resident = sorted([*view.hits, *view.late], key=lambda load: (-load[1], load[0]))
        loads = [*resident, *view.misses]
        gpu_s, link_s, cpu_s = view.gpu_free_s, view.link_free_s, view.cpu_free_s
        cpu, gpu = list[int](), list[int]()
        while loads:
            (first, first_tokens), (last, last_tokens) = loads[0], loads[-1]
            waits_s = link_s + view.copy_s if first in missing else there_s.get(first, gpu_s)
            on_gpu_s = max(gpu_s, waits_s) + view.gpu_expert_s(first_tokens)
            on_cpu_s = cpu_s + view.cpu_expert_s(last_tokens, not cpu)
            if on_gpu_s > on_cpu_s:
                cpu_s = on_cpu_s
                cpu.append(last)
                loads.pop()
                continue
            gpu_s = on_gpu_s
            link_s += view.copy_s if first in missing else 0.0
            gpu.append(first)
            del loads[0]
        return Assignment(cpu, gpu, [expert for expert in gpu if expert in missing])

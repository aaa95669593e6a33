"""How long each resource worked, told from the layers table: for runs that kept no events."""

from __future__ import annotations

import pandas as pd

from sim.costs import Costs
from sim.results import RunResult


def busy_s(run: RunResult, layers: pd.DataFrame, tokens: pd.DataFrame, costs: Costs) -> dict[str, float | None]:
    """Seconds in which the GPU, the CPU and the link worked for ``layers`` and ``tokens``, rows of the run's tables.

    A dense part counts for the device that its layer ran on. The hidden state crosses the link on its way to a layer on
    the GPU, and to the head, which is there; the other direction on its way to the CPU. The table has the way to the
    head, and its dispatch, in the head's seconds: what they took is told by the ``costs`` of the run. The link's
    seconds are None where a system prefetches: nobody noted how long those copies took.
    """
    head_s = float(tokens.drop_duplicates("step")["head_s"].sum())
    crossed_s, dispatched_s = _way_to_the_head(run, tokens, costs)
    on_cpu = layers["layer"].isin(run.info.layers_on_cpu)
    prefetches = run.info.system["prefetch"] != "none" and not run.info.system["synchronous"]
    return {
        "gpu": float(layers.loc[~on_cpu, "dense_s"].sum() + layers["gpu_experts_s"].sum())
        + head_s
        - crossed_s
        - dispatched_s,
        "cpu": float(layers.loc[on_cpu, "dense_s"].sum() + layers["cpu_experts_s"].sum()),
        "link": None if prefetches else float(layers.loc[~on_cpu, "transfer_s"].sum()) + crossed_s,
    }


def _way_to_the_head(run: RunResult, tokens: pd.DataFrame, costs: Costs) -> tuple[float, float]:
    """Seconds on the link, and of the dispatch before it, where the last layer is on the CPU; else none.

    The dispatch runs beside the layer's experts, unless the host waits for these.
    """
    last = run.layers["layer"].max()
    if last not in run.info.layers_on_cpu:
        return 0.0, 0.0
    sizes = tokens.groupby("step")["tokens"].sum()
    crossed_s = sum(costs.copy_s(costs.hidden_bytes(int(size))) for size in sizes)
    layers = run.layers[(run.layers["layer"] == last) & run.layers["step"].isin(sizes.index)]
    beside_s = layers["cpu_experts_s"] * (not costs.host.joins_layers)
    return crossed_s, float((costs.host.layer_s - beside_s).clip(lower=0.0).sum())

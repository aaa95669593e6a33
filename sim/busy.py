"""How long each resource worked, told from the layers table: for runs that kept no events."""

from __future__ import annotations

import pandas as pd

from sim.results import RunResult


def busy_s(run: RunResult, layers: pd.DataFrame, head_s: float) -> dict[str, float | None]:
    """Seconds in which the GPU, the CPU and the link worked for ``layers``, rows of the run's table, and for the head.

    A dense part counts for the device that its layer ran on. The hidden state crosses the link on its way to a layer on
    the GPU, and the other direction on its way to the CPU. The link's seconds are None where a system prefetches:
    nobody noted how long those copies took.
    """
    on_cpu = layers["layer"].isin(run.info.layers_on_cpu)
    prefetches = run.info.system["prefetch"] != "none" and not run.info.system["synchronous"]
    return {
        "gpu": float(layers.loc[~on_cpu, "dense_s"].sum() + layers["gpu_experts_s"].sum() + head_s),
        "cpu": float(layers.loc[on_cpu, "dense_s"].sum() + layers["cpu_experts_s"].sum()),
        "link": None if prefetches else float(layers.loc[~on_cpu, "transfer_s"].sum()),
    }

"""KTransformers over the share of experts on the GPU: the shape of its published curve.

    python -m benchmarks.residency [--out analysis/results/residency.json]

The published one (Qwen3-Next-80B in 8 bits, four RTX 4090s) rises slowly at first and steeply at the end, and the
steeper the later where the set is not chosen by frequency: each further expert saves CPU time, and the last ones save
the hand-over to the CPU as well. Simulated here is Qwen3-30B-A3B in 8 bits on one RTX 4090, with routing generated in
the manner of `mixed`: the shape is to be compared, not the numbers. The catalogue's host is an eager Python program,
whose own time flattens the end of the curve; so the same is simulated under a compiled one with fused experts.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from sim.presets import preset
from sim.scenario import Scenario
from sim.spec import catalogue
from traces import store
from traces.edit import slice_trace
from traces.fit import fit
from traces.fitted import generate
from traces.shipped import find_trace
from traces.synthetic import Shape

MODEL, MACHINE = "qwen3-30b-a3b", "rtx4090-epyc9374f"
PROGRAMS: dict[str, dict[str, float | str]] = {
    "as catalogued": {},
    "compiled": {
        "regime": "graph",
        "gpu_graph_launch_us": 0.4,  # an eighth of a launch: one kernel computes all experts of a token
        "host_operation_us": 1.0,
        "host_controller_us": 5.0,
    },
}
"""What is changed of the machine, by the program that runs on it; the compiled one's constants are assumed [I]."""
SHARES = (10, 25, 50, 75, 90, 100)
PUBLISHED = {
    "uniform": {0: 53, 10: 57, 50: 65, 90: 81, 100: 112},
    "frequency": {0: 53, 10: 59, 50: 76, 90: 107, 100: 114},
}
"""Tokens a second by percent of experts on the GPU."""


def main(
    sequences: Annotated[int, typer.Option(min=1)] = 4,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
) -> None:
    """Simulates both sets at every share, and prints them beside the published curve."""
    found = {
        f"{name}, {program}": curve
        for program, change in PROGRAMS.items()
        for name, curve in simulated(sequences, change).items()
    }
    figures = {"model": MODEL, "machine": MACHINE, "tokens_per_s": found}
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(shown(json.loads(json.dumps(figures))))


def shown(figures: Mapping[str, Any]) -> str:
    """The table of the figures that ``--out`` keeps."""
    curves = {**figures["tokens_per_s"], **{f"{name}, published": _named(curve) for name, curve in PUBLISHED.items()}}
    table = Table("on the GPU", box=None, pad_edge=False)
    for name in curves:
        table.add_column(name.replace(", ", ",\n"), justify="right")
    for share in SHARES:
        cells = [curve.get(str(share)) for curve in curves.values()]
        table.add_row(f"{share} %", *("-" if cell is None else f"{cell:.0f}" for cell in cells))
    console = Console(width=100, file=StringIO(), record=True)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _named(curve: Mapping[int, int]) -> dict[str, float]:
    return {str(share): float(speed) for share, speed in curve.items()}


def simulated(sequences: int, change: Mapping[str, float | str]) -> dict[str, dict[int, float]]:
    """Decode tokens a second by share, with the set chosen evenly, and by frequency on other sequences."""
    spec = catalogue.model(MODEL)
    shape = Shape(
        sequences=2 * sequences,
        prompt_tokens=32,
        new_tokens=32,
        layers=spec.moe_layers,
        experts=spec.experts,
        top_k=spec.top_k,
        expert_bytes=spec.expert_bytes,
    )
    law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
    trace = generate(law, 0, shape, dtype="bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        judged, fitted = Path(folder) / "judged.safetensors", Path(folder) / "fitted.safetensors"
        store.save(slice_trace(trace, sequences=f":{sequences}"), judged)
        store.save(slice_trace(trace, sequences=f"{sequences}:"), fitted)
        base = Scenario(
            trace=str(judged),
            system=preset("ktransformers"),
            model=MODEL,
            quant="int8",
            hardware=MACHINE,
            hardware_set=dict(change),
        )
        sets = {"uniform": base, "frequency": base.model_copy(update={"calibration": str(fitted)})}
        return {name: {share: _tokens_per_s(one, share) for share in SHARES} for name, one in sets.items()}


def _tokens_per_s(scenario: Scenario, share: int) -> float:
    run = scenario.model_copy(update={"cache": f"{share}%"}).prepare().run(events=False, operations=False)
    return run.headline()["tokens_per_s"] or 0.0


if __name__ == "__main__":
    typer.run(main)

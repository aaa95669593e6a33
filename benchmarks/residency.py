"""KTransformers over the share of experts on the GPU: the shape of its published curve.

    python -m benchmarks.residency [--out analysis/results/published/residency.json] [--page docs/hybrimoe.md]

The published one (Qwen3-Next-80B in 8 bits, four RTX 4090s) has two sets: chosen evenly it rises slowly from 10 % on
and steeply at the end, chosen by frequency it is 17 % above that at 50 % and 32 % at 90 %. Each further expert saves
CPU time, and the last ones save the hand-over to the CPU as well. Simulated here is Qwen3-30B-A3B in 8 bits on one
RTX 4090, with routing generated in the manner of `mixed`: the shape is to be compared, not the numbers. At 0 % the
system holds no expert. The catalogue's host is an eager Python program, whose own time flattens the end of the curve;
so the same is simulated under a compiled one with fused experts. What a set chosen by frequency gains hangs on the
routing alone: it is told for texts of one, two and all six kinds of `mixed`, and for a popularity that is more
uneven.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.halves import covered, halves
from benchmarks.pages import publish
from sim.presets import Preset, preset
from sim.scenario import Scenario
from sim.spec import catalogue
from sim.systems import SystemSpec
from traces import store
from traces.fit import fit
from traces.fitted import Law
from traces.schema import Trace
from traces.shipped import find_trace

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
SHARES = (0, 10, 25, 50, 75, 90, 100)
PUBLISHED = {
    "uniform": {0: 53, 10: 57, 50: 65, 90: 81, 100: 112},
    "frequency": {0: 53, 10: 59, 50: 76, 90: 107, 100: 114},
}
"""Tokens a second by percent of experts on the GPU."""


COMPARED = (50, 90)
"""Shares at which a set by frequency is held against an even one."""
KINDS: dict[str, tuple[int, float]] = {
    "one kind of text": (1, 1.0),
    "two kinds": (2, 1.0),
    "all six kinds": (6, 1.0),
    "all six, popularity 10 times as uneven": (6, 10.0),
    "all six, popularity 20 times as uneven": (6, 20.0),
}
"""Domains of `mixed` that are generated, and by how much the biases that make experts popular are multiplied."""
NONE_RESIDENT = Preset(
    system=SystemSpec(name="ktransformers", evict="static-uniform", place="static", scope="global", holds="nothing")
)
"""KTransformers with every expert on the CPU."""


def main(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences that are judged, and as many to fit to.")] = 6,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
    page: Annotated[Path | None, typer.Option(help="Put the tables into this page.")] = None,
) -> None:
    """Simulates both sets at every share, and prints them beside the published curve."""
    law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
    curves = {
        f"{name}, {program}": curve
        for program, change in PROGRAMS.items()
        for name, curve in simulated(law, sequences, change).items()
    }
    gains = {name: gained(of_kinds(law, *kinds), sequences) for name, kinds in KINDS.items()}
    figures = {
        "command": f"python -m benchmarks.residency --sequences {sequences}",
        "model": MODEL,
        "machine": MACHINE,
        "tokens_per_s": curves,
        "gains": gains,
    }
    publish(figures, "residency", shown, out=out, page=page)


def shown(figures: Mapping[str, Any]) -> str:
    """The tables of the figures that ``--out`` keeps."""
    return f"{_shown_curves(figures['tokens_per_s'])}\n{_shown_gains(figures['gains'])}"


def simulated(
    law: Law, sequences: int, change: Mapping[str, float | str], shares: Iterable[int] = SHARES
) -> dict[str, dict[int, float]]:
    """Decode tokens a second by share, with the set chosen evenly, and by frequency on other sequences."""
    judged, fitted = _routing(law, sequences)
    with tempfile.TemporaryDirectory() as folder:
        store.save(judged, Path(folder) / "judged.safetensors")
        store.save(fitted, Path(folder) / "fitted.safetensors")
        base = Scenario(
            trace=str(Path(folder) / "judged.safetensors"),
            system=preset("ktransformers"),
            model=MODEL,
            quant="int8",
            hardware=MACHINE,
            hardware_set=dict(change),
        )
        by_use = base.model_copy(update={"calibration": str(Path(folder) / "fitted.safetensors")})
        sets = {"uniform": base, "frequency": by_use}
        return {name: {share: _tokens_per_s(one, share) for share in shares} for name, one in sets.items()}


def gained(law: Law, sequences: int) -> dict[str, dict[int, float]]:
    """By share: of the uses, the part that a set chosen by frequency covers, and how many times as fast it decodes."""
    curves = simulated(law, sequences, PROGRAMS["compiled"], COMPARED)
    routing = _routing(law, sequences)
    return {
        "covered": {share: covered(*routing, share) for share in COMPARED},
        "gain": {share: curves["frequency"][share] / curves["uniform"][share] for share in COMPARED},
    }


def of_kinds(law: Law, kinds: int, uneven: float) -> Law:
    """``law`` with its first ``kinds`` domains alone, and a popularity ``uneven`` times as uneven."""
    first = tuple(dict.fromkeys(law.domains))[:kinds]
    return replace(law, domains=first, bias=tuple(uneven * bias for bias in law.bias))


def _routing(law: Law, sequences: int) -> tuple[Trace, Trace]:
    return halves(law, catalogue.model(MODEL), sequences, prompt_tokens=32, new_tokens=32)


def _tokens_per_s(scenario: Scenario, share: int) -> float:
    change = {"cache": f"{share}%"} if share else {"cache": "1", "system": NONE_RESIDENT, "calibration": None}
    run = scenario.model_copy(update=change).prepare().run(events=False, operations=False)
    return run.headline()["tokens_per_s"] or 0.0


def _shown_curves(found: Mapping[str, Mapping[str, float]]) -> str:
    published = {f"{name}, published": _named(curve) for name, curve in PUBLISHED.items()}
    curves = {**found, **published}
    table = Table("on the GPU", title="Decode tokens a second", box=None, pad_edge=False)
    for name in curves:
        table.add_column(name.replace(", ", ",\n"), justify="right")
    for share in SHARES:
        cells = [curve.get(str(share)) for curve in curves.values()]
        table.add_row(f"{share} %", *("-" if cell is None else f"{cell:.0f}" for cell in cells))
    return _text(table)


def _shown_gains(gains: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    table = Table("routing", title="A set by frequency: uses it covers, and gain over an even set (compiled)")
    table.box, table.pad_edge = None, False
    for share in COMPARED:
        table.add_column(f"covered\nat {share} %", justify="right")
        table.add_column(f"gain\nat {share} %", justify="right")
    published = {share: PUBLISHED["frequency"][share] / PUBLISHED["uniform"][share] - 1 for share in COMPARED}
    table.add_row("published", *(cell for share in COMPARED for cell in ("-", f"{published[share]:+.0%}")))
    for name, row in gains.items():
        cells = ((row["covered"][str(share)], row["gain"][str(share)] - 1) for share in COMPARED)
        table.add_row(name, *(text for part, gain in cells for text in (f"{part:.2f}", f"{gain:+.0%}")))
    return _text(table)


def _text(table: Table) -> str:
    console = Console(width=100, file=StringIO(), record=True)
    console.print(table, highlight=False)
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def _named(curve: Mapping[int, int]) -> dict[str, float]:
    return {str(share): float(speed) for share, speed in curve.items()}


if __name__ == "__main__":
    typer.run(main)

"""HybriMoE against KTransformers: the published speed-ups beside simulated ones, and what they hang on.

    python -m benchmarks.hybrimoe [--sequences 4] [--jobs 2] [--out analysis/results/published/hybrimoe.json]

The paper's three models in 4 bits, at 25, 50 and 75 % of their experts, on its machine (an A6000 and ten cores of a
Xeon 5220R). No routing of these models is public: it is generated in the manner of `mixed`, the recording that ships,
at their dimensions (`moetwin trace like`), and so every figure here is synthetic. KTransformers' set is fitted on other
sequences of the same routing. Decode is the ratio of tokens a second after prompts of 32 tokens; prefill that of the
time to first token, over prompts of 32, 128, 512 and 1,024 tokens. Constants that the paper does not state, of the
machine and of the method, are varied one at a time, and the rule for one layer is held against the best assignment, on
machines at random (:mod:`benchmarks.placements`). Last, the CPU is made as slow as published: its bandwidth, which
binds a decode token, and its 8-bit arithmetic, which binds a prompt, are each set so that KTransformers takes the
published seconds for Qwen2 at 25 % (0.21 a token; 1.47 a prompt, whose length is not stated: the mean of the four). The
speed-ups are then predicted, as none was used.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Annotated, Any

import numpy as np
import typer
from joblib import Parallel, delayed
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

from benchmarks import placements
from sim.presets import Preset, preset
from sim.scenario import Scenario
from sim.spec import catalogue
from sim.systems import SystemSpec
from traces import store
from traces.edit import slice_trace
from traces.fit import fit
from traces.fitted import Law, generate
from traces.shipped import find_trace
from traces.synthetic import Shape

MODELS = ("mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite")
CACHES = ("25%", "50%", "75%")
PROMPTS = (32, 128, 512, 1024)
PREFILLS = tuple(f"prefill {prompt}" for prompt in PROMPTS)
NEW_TOKENS = {32: 48}
"""Tokens that are decoded after prompts of a length; one after all others."""
MACHINE = "a6000-xeon5220r-10c"
PUBLISHED = {"decode": 1.70, "prefill": 1.33}
BASELINE_S = {"decode": 0.21, "prefill": 1.47}
"""Published seconds of KTransformers: Qwen2-57B-A14B at 25 %, a decode token and a prompt."""
ABLATION_PUBLISHED = {
    "+ scheduling": {"decode": 1.46, "prefill": 1.26},
    "+ prefetching": {"decode": 1.15, "prefill": 1.06},
    "+ caching": {"decode": 1.38},
    "all": {"decode": 1.86, "prefill": 1.31},
}
RATES = {"decode": ("cpu_memory_efficiency", 0.01, 1.0), "prefill": ("cpu_int8_tops_per_s", 0.1, 100.0)}
"""The rate of the CPU that binds each phase, and the limits between which it is sought."""
ABLATION: dict[str, dict[str, str]] = {
    "+ scheduling": {"evict": "static", "place": "hybrimoe"},
    "+ prefetching": {"evict": "static", "place": "static", "prefetch": "impact"},
    "+ caching": {"evict": "mrs", "starts_with": "static", "place": "static", "prefetch": "mrs-next"},
    "all": {"evict": "mrs", "starts_with": "static", "place": "hybrimoe", "prefetch": "impact"},
}
"""What each row of the paper's ablation adds to KTransformers: a cache can only follow the routing if something is
copied into it, for which its released code has a prefetch by the scores of the next layer."""
CATALOGUED = {"cpu_memory_efficiency": 0.3125, "cpu_int8_tops_per_s": 2.8}
WIDTH = 100
EVERYWHERE = (MODELS, CACHES, {"hybrimoe": dict[str, str]()})
ABLATED = (MODELS[1:2], CACHES[:1], ABLATION)
"""Models, caches and systems that are run."""
SLOW = "CPU as slow as published"
VARIATIONS: dict[str, dict[str, float | str]] = {
    "as catalogued": {},
    "captured graphs": {"regime": "graph"},
    "0.5 ms a GPU expert, as their constants": {"gpu_expert_fixed_us": 500.0},
    "0.79 ms for a layer's first CPU expert, as theirs": {"cpu_first_expert_us": 790.0},
    "CPU kernels reach half the bandwidth": {"cpu_memory_efficiency": 0.156},
    "CPU kernels reach twice the bandwidth": {"cpu_memory_efficiency": 0.625},
    "CPU kernels in fp32, without its 8-bit instructions": {"cpu_int8_tops_per_s": 0.0},
    "PCIe 4": {"link_gb_per_s": 25.2},
    "copies and CPU experts share 45 GB/s of host memory": {"cpu_shared_gb_per_s": 45.0},
    "copies from pageable memory": {"link_pinned": False},
}
LIMITING: dict[str, dict[str, float | str]] = {
    "as catalogued": {},
    "CPU's 8-bit arithmetic 5.6 TOPS, all that its ten cores could do": {"cpu_int8_tops_per_s": 5.6},
    "11.2 TOPS, which they cannot": {"cpu_int8_tops_per_s": 11.2},
    "link at 6 GB/s (the catalogue: 12.5)": {"link_gb_per_s": 6.0},
    "link at 3 GB/s": {"link_gb_per_s": 3.0},
}
"""The two constants that a long prompt hangs on."""
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "MRS alpha 0.1 (0.5)": {"evict": {"alpha": 0.1}},
    "MRS alpha 0.9 (0.5)": {"evict": {"alpha": 0.9}},
    "1 prefetch at an event (2)": {"prefetch": {"most": 1}},
    "4 prefetches at an event (2)": {"prefetch": {"most": 4}},
    "gains not discounted by distance (1 / distance)": {"prefetch": {"discount": 0.0}},
    "gains discounted by 1 / distance^2 (1 / distance)": {"prefetch": {"discount": 2.0}},
    "the CPU may take what is in transfer (it may not)": {"place": {"cpu_takes_transfers": True}},
}
"""Constants of the method that the paper leaves out, on the machine as catalogued; in brackets what is chosen here."""

CHOICES: dict[str, dict[str, Any]] = {name: {**ABLATION["all"], "options": own} for name, own in CHOSEN.items()}

Times = dict[str, float]
"""Seconds of a decode token, and of a prompt by its length."""


def main(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each kind that are judged.")] = 4,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
) -> None:
    """Measures all ratios, and prints them beside the published ones."""
    with tempfile.TemporaryDirectory() as folder:
        law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
        for model in MODELS:
            write_routing(law, model, sequences, Path(folder))
        with Parallel(n_jobs=jobs) as parallel:
            found = {
                name: _ratios(parallel, Path(folder), *EVERYWHERE, change)["hybrimoe"]
                for name, change in VARIATIONS.items()
            }
            chosen = _ratios(parallel, Path(folder), MODELS, CACHES[:1], CHOICES, {})
            limiting = {
                name: _ratios(parallel, Path(folder), MODELS[1:2], CACHES[:1], {"hybrimoe": {}}, change)["hybrimoe"]
                for name, change in LIMITING.items()
            }
            rates = {what: rate_of_baseline(Path(folder), what) for what in BASELINE_S}
            slow = {what: {RATES[what][0]: rate} for what, rate in rates.items()}
            every = {what: _ratios(parallel, Path(folder), *EVERYWHERE, change) for what, change in slow.items()}
            found[SLOW] = _each_by_its_own(every)["hybrimoe"]
            parts = {what: _ratios(parallel, Path(folder), *ABLATED, change) for what, change in slow.items()}
            plain = _ratios(parallel, Path(folder), *ABLATED, {})
            ablations = {"as catalogued": plain, SLOW: _each_by_its_own(parts)}
    figures = {
        "command": f"python -m benchmarks.hybrimoe --sequences {sequences}",
        "date": datetime.now(UTC).date().isoformat(),
        "moetwin": version("moetwin"),
        "machine": MACHINE,
        "sequences": sequences,
        "cpu_of_baseline": {RATES[what][0]: rate for what, rate in rates.items()},
        "variations": found,
        "limiting": limiting,
        "choices": chosen,
        "ablations": ablations,
        "placements": placements.measured(),
    }
    if out is not None:
        out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(shown(figures))


def shown(figures: Mapping[str, Any]) -> str:
    """The tables of the figures that ``--out`` keeps."""
    found = figures["variations"]
    console = Console(width=WIDTH, file=StringIO(), record=True)
    console.print(_by_setting(found["as catalogued"]))
    console.print(_by_variation("Mean over models and caches, and what it hangs on", found))
    console.print(_by_length("Qwen2-57B-A14B at 25 %, prefill (published 1.31)", figures["limiting"]))
    here = {setting: times for setting, times in found["as catalogued"].items() if setting.endswith(CACHES[0])}
    choices = {"as here, with what is in brackets": here, **figures["choices"]}
    console.print(_by_variation("At 25 %, as catalogued: constants of the method", choices, published=False))
    for name, ablation in figures["ablations"].items():
        console.print(_by_part(name, ablation))
    console.print(
        "HybriMoE's rule for one layer, without its fallback, times as long as the best assignment", style="italic"
    )
    console.print(placements.shown(figures["placements"]), highlight=False)
    for name, rate in figures["cpu_of_baseline"].items():
        console.print(f"{SLOW}: {name} {rate:.3g}, where the catalogue has {CATALOGUED[name]:.3g}")
    return "\n".join(line.rstrip() for line in console.export_text().splitlines())


def write_routing(law: Law, model: str, sequences: int, folder: Path) -> None:
    """Writes, for each length of prompt, a trace to be judged, and one to fit KTransformers' set to."""
    spec = catalogue.model(model)
    for prompt in PROMPTS:
        shape = Shape(
            sequences=2 * sequences,
            prompt_tokens=prompt,
            new_tokens=NEW_TOKENS.get(prompt, 1),
            layers=spec.moe_layers,
            experts=spec.experts,
            top_k=spec.top_k,
            expert_bytes=spec.expert_bytes,
        )
        trace = generate(law, 0, shape, dtype="bfloat16")
        for name, part in (("judged", f":{sequences}"), ("fitted", f"{sequences}:")):
            store.save(slice_trace(trace, sequences=part), folder / f"{model}-{prompt}-{name}.safetensors")


def times_of(folder: Path, model: str, cache: str, system: Preset, change: Mapping[str, Any]) -> Times:
    """Seconds of a decode token and of the prompts under one system."""
    times = {}
    for prompt in PROMPTS:
        scenario = Scenario(
            trace=str(folder / f"{model}-{prompt}-judged.safetensors"),
            calibration=str(folder / f"{model}-{PROMPTS[0]}-fitted.safetensors"),
            model=model,
            quant="int4",
            hardware=MACHINE,
            hardware_set=dict(change),
            cache=cache,
            system=system,
        )
        figures = scenario.prepare().run(events=False, operations=False).headline()
        times[f"prefill {prompt}"] = figures["time_to_first_token_p50_s"] or 0.0
        if prompt in NEW_TOKENS:
            times["decode"] = 1.0 / (figures["tokens_per_s"] or 1.0)
    return times


def rate_of_baseline(folder: Path, what: str) -> float:
    """The rate of the CPU with which KTransformers takes the published seconds for ``what``, or comes nearest."""
    name, low, high = RATES[what]

    def excess(exponent: float) -> float:
        times = times_of(folder, MODELS[1], CACHES[0], preset("ktransformers"), {name: math.exp(exponent)})
        return fmean(value for key, value in times.items() if key.startswith(what)) - BASELINE_S[what]

    ends = math.log(low), math.log(high)
    if excess(ends[0]) < 0:
        return low
    if excess(ends[1]) > 0:
        return high
    return math.exp(brentq(excess, *ends, xtol=0.01))


Ratios = dict[str, dict[str, Times]]
"""By system, by model and cache: how many times as fast as KTransformers it is."""


def _each_by_its_own(by_phase: Mapping[str, Ratios]) -> Ratios:
    """The ratios of each phase from the run whose constants are fitted to it."""
    return {
        name: {
            setting: {key: by_phase[key.split()[0]][name][setting][key] for key in times}
            for setting, times in settings.items()
        }
        for name, settings in by_phase["decode"].items()
    }


def _ratios(
    parallel: Parallel,
    folder: Path,
    models: tuple[str, ...],
    caches: tuple[str, ...],
    systems: Mapping[str, Mapping[str, Any]],
    change: Mapping[str, Any],
) -> Ratios:
    """Runs ``systems`` and KTransformers on ``models`` and ``caches``, on the machine with ``change``."""
    baseline = preset("ktransformers")
    chosen = {name: _system(name, fields) for name, fields in systems.items()}
    settings = [(model, cache) for model in models for cache in caches]
    work = [(model, cache, system) for model, cache in settings for system in (baseline, *chosen.values())]
    done = parallel(delayed(times_of)(folder, model, cache, system, change) for model, cache, system in work)
    width = 1 + len(chosen)
    found: Ratios = {name: {} for name in chosen}
    for place, (model, cache) in enumerate(settings):
        slow, *quick = done[place * width : (place + 1) * width]
        for name, times in zip(chosen, quick, strict=True):
            found[name][f"{model} {cache}"] = {what: slow[what] / times[what] for what in times}
    return found


def _system(name: str, fields: Mapping[str, Any]) -> Preset:
    return Preset(system=SystemSpec(name=name, **fields)) if fields else preset(name)


def mean_of(found: Mapping[str, Times], what: str) -> float:
    """Geometric mean of a speed-up over all settings, and of prefill over all lengths."""
    return geometric_mean(ratio for times in found.values() for key, ratio in times.items() if key.startswith(what))


def _by_setting(found: Mapping[str, Times]) -> Table:
    table = _table(f"HybriMoE, times as fast as KTransformers, on {MACHINE}", "setting", "decode", *PREFILLS)
    for setting, times in found.items():
        table.add_row(setting, *(f"{times[what]:.2f}" for what in ("decode", *PREFILLS)))
    return table


def _by_length(title: str, found: Mapping[str, Mapping[str, Times]]) -> Table:
    table = _table(title, "constants", *map(str, PROMPTS), "mean")
    for name, ratios in found.items():
        (times,) = ratios.values()
        table.add_row(name, *(f"{times[what]:.2f}" for what in PREFILLS), f"{mean_of(ratios, 'prefill'):.2f}")
    return table


def _by_variation(title: str, found: Mapping[str, Mapping[str, Times]], *, published: bool = True) -> Table:
    table = _table(title, "constants", "decode", "prefill")
    if published:
        table.add_row("published", *(f"{PUBLISHED[what]:.2f}" for what in ("decode", "prefill")))
    for name, ratios in found.items():
        table.add_row(name, *(f"{mean_of(ratios, what):.2f}" for what in ("decode", "prefill")))
    return table


def _by_part(constants: str, found: Mapping[str, Mapping[str, Times]]) -> Table:
    title = f"Ablation, Qwen2-57B-A14B at 25 %, {constants}"
    table = _table(title, "added", "decode", "published", "prefill", "published")
    for name, ratios in found.items():
        cells = []
        for what in ("decode", "prefill"):
            published = ABLATION_PUBLISHED[name].get(what)
            cells += [f"{mean_of(ratios, what):.2f}", "-" if published is None else f"{published:.2f}"]
        table.add_row(name, *cells)
    return table


def _table(title: str, name: str, *figures: str) -> Table:
    """An empty table: what each row is, and its figures."""
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column(name)
    for figure in figures:
        table.add_column(figure, justify="right")
    return table


if __name__ == "__main__":
    typer.run(main)

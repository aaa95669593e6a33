"""HybriMoE against KTransformers: the published speed-ups beside simulated ones, and what they hang on.

    python -m benchmarks.hybrimoe [--sequences 6] [--jobs 2] [--out analysis/results/published/hybrimoe.json]
        [--page docs/hybrimoe.md]

The paper's three models in 4 bits, at 25, 50 and 75 % of their experts, on its machine (an A6000 and ten cores of a
Xeon 5220R). No routing of these models is public: it is generated in the manner of `mixed`, the recording that ships,
at their dimensions (`moetwin trace like`), and so every figure here is synthetic. KTransformers' set is fitted on other
sequences of the same domains. Decode is the ratio of tokens a second after prompts of 32 tokens; prefill that of the
time to first token, over prompts of 32, 128, 512 and 1,024 tokens. Constants that the paper does not state, of the
machine and of the method, are varied one at a time, and the rule for one layer is held against the best assignment, on
machines at random (:mod:`benchmarks.placements`); MRS against LRU is :mod:`benchmarks.hit_rates`, the released code
against KTransformers :func:`of_released`. Last, the CPU is made as slow as published: its bandwidth, which
binds a decode token, and its 8-bit arithmetic, which binds a prompt, are each set so that KTransformers takes the
published seconds for Qwen2 at 25 % (0.21 a token; 1.47 a prompt, whose length is not stated: the mean of the four). The
speed-ups are then predicted, as none was used.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from joblib import Parallel
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq

from benchmarks import hit_rates, placements
from benchmarks.halves import covered
from benchmarks.hybrimoe_runs import (
    CACHES,
    MACHINE,
    MODELS,
    PREFILLS,
    PROMPTS,
    Ratios,
    Times,
    mean_of,
    ratios_of,
    times_of,
    write_routing,
)
from benchmarks.pages import empty_table, publish
from sim.presets import preset
from sim.spec import catalogue
from traces import store
from traces.fit import fit
from traces.fitted import Law
from traces.shipped import find_trace

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
    "CPU's 8-bit arithmetic 2.8 TOPS, all that its ten cores could do": {"cpu_int8_tops_per_s": 2.8},
    "5.6 TOPS, which they cannot": {"cpu_int8_tops_per_s": 5.6},
    "11.2 TOPS": {"cpu_int8_tops_per_s": 11.2},
    "link at 6 GB/s (the catalogue: 12.5)": {"link_gb_per_s": 6.0},
    "link at 3 GB/s": {"link_gb_per_s": 3.0},
}
"""The two constants that a long prompt hangs on."""
EVERY = 1024
"""As many numbers of tokens as an expert can have here."""
CHOSEN: dict[str, dict[str, dict[str, Any]]] = {
    "MRS alpha 0.1 (0.5)": {"evict": {"alpha": 0.1}},
    "MRS alpha 0.9 (0.5)": {"evict": {"alpha": 0.9}},
    "1 prefetch at an event (2)": {"prefetch": {"most": 1}},
    "4 prefetches at an event (2)": {"prefetch": {"most": 4}},
    "gains not discounted by distance (1 / distance)": {"prefetch": {"discount": 0.0}},
    "gains discounted by 1 / distance^2 (1 / distance)": {"prefetch": {"discount": 2.0}},
    "prefetch minds demand of nearer layers (of its own)": {"prefetch": {"delays": "nearest"}},
    "the CPU may take what is in transfer (once it is there)": {"place": {"cpu_takes_transfers": True}},
    "the GPU takes first what is there (the most tokens)": {"place": {"gpu_order": "ready-first"}},
    "prefetch weighs every number of tokens (the 4 largest)": {"prefetch": {"tried": EVERY}},
    "MRS by a batch's first token (its mean)": {"evict": {"batch": "first"}},
    "MRS by a batch's maximum (its mean)": {"evict": {"batch": "max"}},
}
"""Constants of the method that the paper leaves out, on the machine as catalogued; in brackets what is chosen here."""

CHOICES: dict[str, dict[str, Any]] = {name: {**ABLATION["all"], "options": own} for name, own in CHOSEN.items()}
NO_SHARED = "shared experts cost neither system anything"
"""More than any overlap of them with the CPU's experts could give: here the host waits for them, as for dense work."""
TEXTS: dict[str, tuple[slice, slice]] = {
    "one kind of text, the same": (slice(0, 1), slice(0, 1)),
    "all six kinds, the same": (slice(0, 6), slice(0, 6)),
    "three kinds, the three others": (slice(0, 3), slice(3, 6)),
}
"""Which domains of `mixed` are judged, and which KTransformers' set is fitted to."""
TEXT_SEQUENCES = 6
THEIRS: dict[str, float | str] = {
    "gpu_expert_fixed_us": 500.0,
    "cpu_first_expert_us": 790.0,
    "cpu_memory_efficiency": 0.036,  # 1.0 ms for an expert of DeepSeek-V2-Lite in 4 bits
}
"""The constants of the released code, as terms of the machine's costs."""
RELEASED: dict[str, tuple[str, dict[str, float | str]]] = {
    "hybrimoe-code, eager": ("hybrimoe-code", {}),
    "hybrimoe-code, eager, 0.5 ms a GPU expert": ("hybrimoe-code", {"gpu_expert_fixed_us": 500.0}),
    "hybrimoe-code, eager, CPU as their constants too": ("hybrimoe-code", THEIRS),
    "hybrimoe-code, captured graphs": ("hybrimoe-code", {"regime": "graph"}),
    "ktransformers, eager": ("ktransformers", {}),
    "ktransformers, captured graphs": ("ktransformers", {"regime": "graph"}),
}
"""Systems, and what is changed of the machine, for what users measured."""
RELEASED_PUBLISHED = {"hybrimoe-code, eager": 9.8, "ktransformers, captured graphs": 42.0}
"""Tokens a second that users of the released code report for DeepSeek-V2-Lite, on a machine that they do not name."""


def main(
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each kind that are judged.")] = 6,
    jobs: Annotated[int, typer.Option(min=1)] = 2,
    out: Annotated[Path | None, typer.Option(help="Keep the figures here (.json).")] = None,
    page: Annotated[Path | None, typer.Option(help="Put the tables into this page.")] = None,
) -> None:
    """Measures all ratios, and prints them beside the published ones."""
    law = fit(store.load(find_trace("mixed")), np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder, Parallel(n_jobs=jobs) as parallel:
        for model in MODELS:
            write_routing(law, model, sequences, Path(folder))
        found = measured(parallel, Path(folder))
    figures = {
        "command": f"python -m benchmarks.hybrimoe --sequences {sequences}",
        "date": datetime.now(UTC).date().isoformat(),
        "moetwin": version("moetwin"),
        "machine": MACHINE,
        "sequences": sequences,
        "catalogued": catalogued(),
        **found,
        "placements": placements.measured(),
        "texts": by_texts(law),
        "hit_rates": hit_rates.measured(law),
    }
    publish(figures, "hybrimoe", shown, out=out, page=page)


def measured(parallel: Parallel, folder: Path) -> dict[str, Any]:
    """All that is simulated on the traces of ``folder``."""
    found = {name: ratios_of(parallel, folder, *EVERYWHERE, change)["hybrimoe"] for name, change in VARIATIONS.items()}
    chosen = ratios_of(parallel, folder, MODELS, CACHES[:1], CHOICES, {})
    at_25 = (CACHES[:1], {"hybrimoe": dict[str, str]()})
    chosen[NO_SHARED] = ratios_of(parallel, folder, MODELS, *at_25, {}, {"shared_width": 0})["hybrimoe"]
    limiting = {
        name: ratios_of(parallel, folder, MODELS[1:2], *at_25, change)["hybrimoe"] for name, change in LIMITING.items()
    }
    rates = {what: rate_of_baseline(folder, what) for what in BASELINE_S}
    slow = {what: {RATES[what][0]: rate} for what, rate in rates.items()}
    every = {what: ratios_of(parallel, folder, *EVERYWHERE, change) for what, change in slow.items()}
    found[SLOW] = _each_by_its_own(every)["hybrimoe"]
    parts = {what: ratios_of(parallel, folder, *ABLATED, change) for what, change in slow.items()}
    plain = ratios_of(parallel, folder, *ABLATED, {})
    return {
        "cpu_of_baseline": {RATES[what][0]: rate for what, rate in rates.items()},
        "variations": found,
        "limiting": limiting,
        "choices": chosen,
        "ablations": {"as catalogued": plain, SLOW: _each_by_its_own(parts)},
        "released": of_released(folder),
    }


def by_texts(law: Law) -> dict[str, dict[str, list[float]]]:
    """By what the set is fitted to, and model: the part of all uses it covers at 25 %, and HybriMoE's decode ratio."""
    kinds = tuple(dict.fromkeys(law.domains))
    found: dict[str, dict[str, list[float]]] = {}
    for name, (judged, fitted) in TEXTS.items():
        own = replace(law, domains=kinds[judged])
        found[name] = {model: _on_texts(own, kinds[fitted], model) for model in MODELS}
    return found


def _on_texts(law: Law, fitted: tuple[str, ...], model: str) -> list[float]:
    with tempfile.TemporaryDirectory() as name:
        folder, prompts = Path(name), PROMPTS[:1]
        write_routing(law, model, TEXT_SEQUENCES, folder, prompts=prompts, fitted_domains=fitted)
        parts = [store.load(folder / f"{model}-{prompts[0]}-{part}.safetensors") for part in ("judged", "fitted")]
        slow, quick = (
            times_of(folder, model, CACHES[0], preset(system), {}, prompts=prompts)["decode"]
            for system in ("ktransformers", "hybrimoe")
        )
        return [covered(parts[0], parts[1], 25), slow / quick]


def of_released(folder: Path) -> dict[str, float]:
    """Decode tokens a second of DeepSeek-V2-Lite at 25 %: the released code's rule, and KTransformers."""
    return {
        name: 1.0 / times_of(folder, MODELS[2], CACHES[0], preset(system), change)["decode"]
        for name, (system, change) in RELEASED.items()
    }


def catalogued() -> dict[str, float]:
    """What the catalogue has for the rates that are fitted."""
    cpu = catalogue.find_hardware(MACHINE).cpu
    return {"cpu_memory_efficiency": cpu.memory_efficiency, "cpu_int8_tops_per_s": cpu.int8_ops_per_s / 1e12}


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
        console.print(f"{SLOW}: {name} {rate:.3g}, where the catalogue has {figures['catalogued'][name]:.3g}")
    console.print(texts_table(figures["texts"]), highlight=False)
    console.print(_of_released(figures["released"]), highlight=False)
    tables = "\n".join(line.rstrip() for line in console.export_text().splitlines())
    return f"{tables}\n{hit_rates.shown(figures['hit_rates'])}"


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


def _each_by_its_own(by_phase: Mapping[str, Ratios]) -> Ratios:
    """The ratios of each phase from the run whose constants are fitted to it."""
    return {
        name: {
            setting: {key: by_phase[key.split()[0]][name][setting][key] for key in times}
            for setting, times in settings.items()
        }
        for name, settings in by_phase["decode"].items()
    }


def _by_setting(found: Mapping[str, Times]) -> Table:
    table = empty_table(f"HybriMoE, times as fast as KTransformers, on {MACHINE}", "setting", "decode", *PREFILLS)
    for setting, times in found.items():
        table.add_row(setting, *(f"{times[what]:.2f}" for what in ("decode", *PREFILLS)))
    return table


def _by_length(title: str, found: Mapping[str, Mapping[str, Times]]) -> Table:
    table = empty_table(title, "constants", *map(str, PROMPTS), "mean")
    for name, one in found.items():
        (times,) = one.values()
        table.add_row(name, *(f"{times[what]:.2f}" for what in PREFILLS), f"{mean_of(one, 'prefill'):.2f}")
    return table


def _by_variation(title: str, found: Mapping[str, Mapping[str, Times]], *, published: bool = True) -> Table:
    table = empty_table(title, "constants", "decode", "prefill")
    if published:
        table.add_row("published", *(f"{PUBLISHED[what]:.2f}" for what in ("decode", "prefill")))
    for name, one in found.items():
        table.add_row(name, *(f"{mean_of(one, what):.2f}" for what in ("decode", "prefill")))
    return table


def _by_part(constants: str, found: Mapping[str, Mapping[str, Times]]) -> Table:
    title = f"Ablation, Qwen2-57B-A14B at 25 %, {constants}"
    table = empty_table(title, "added", "decode", "published", "prefill", "published")
    for name, one in found.items():
        cells = []
        for what in ("decode", "prefill"):
            published = ABLATION_PUBLISHED[name].get(what)
            cells += [f"{mean_of(one, what):.2f}", "-" if published is None else f"{published:.2f}"]
        table.add_row(name, *cells)
    return table


def texts_table(found: Mapping[str, Mapping[str, list[float]]]) -> Table:
    """The uses that the fitted set covers, and the ratio, by texts and model."""
    title = "Decode at 25 %: uses that the set covers, and ratio"
    table = empty_table(title, "judged, and fitted to", *MODELS)
    for name, by_model in found.items():
        cells = [by_model[model] for model in MODELS]
        table.add_row(name, *(f"{part:.2f}  {ratio:.2f}" for part, ratio in cells))
    return table


def _of_released(found: Mapping[str, float]) -> Table:
    title = "DeepSeek-V2-Lite at 25 %: decode tokens a second"
    table = empty_table(title, "system", "here", "users measured", "ratio")
    for name, speed in found.items():
        measured_one = RELEASED_PUBLISHED.get(name)
        cells = ("-", "-") if measured_one is None else (f"{measured_one:.1f}", f"{speed / measured_one:.1f}")
        table.add_row(name, f"{speed:.1f}", *cells)
    return table


if __name__ == "__main__":
    typer.run(main)

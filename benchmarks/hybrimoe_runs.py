"""Times of systems on synthetic routing of HybriMoE's three models, and their ratios to those of KTransformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from joblib import Parallel, delayed

from benchmarks.halves import halves
from sim.presets import Preset, preset
from sim.scenario import Scenario
from sim.spec import catalogue
from sim.systems import SystemSpec
from traces import store
from traces.fitted import Law

MODELS = ("mixtral-8x7b", "qwen2-57b-a14b", "deepseek-v2-lite")
CACHES = ("25%", "50%", "75%")
PROMPTS = (32, 128, 512, 1024)
PREFILLS = tuple(f"prefill {prompt}" for prompt in PROMPTS)
NEW_TOKENS = {32: 48}
"""Tokens that are decoded after prompts of a length; one after all others."""
MACHINE = "a6000-xeon5220r-10c"

Times = dict[str, float]
"""Seconds of a decode token, and of a prompt by its length."""

Ratios = dict[str, dict[str, Times]]
"""By system, by model and cache: how many times as fast as KTransformers it is."""


def write_routing(
    law: Law,
    model: str,
    sequences: int,
    folder: Path,
    *,
    prompts: tuple[int, ...] = PROMPTS,
    fitted_domains: tuple[str, ...] | None = None,
) -> None:
    """Writes, for each length of prompt, a trace to be judged, and one to fit KTransformers' set to.

    The two are of the same draw: another one, as that of another length, has other experts that are popular.
    """
    for prompt in prompts:
        spec, new = catalogue.model(model), NEW_TOKENS.get(prompt, 1)
        parts = halves(law, spec, sequences, prompt, new, fitted_domains=fitted_domains)
        for name, part in zip(("judged", "fitted"), parts, strict=True):
            store.save(part, folder / f"{model}-{prompt}-{name}.safetensors")


def times_of(
    folder: Path,
    model: str,
    cache: str,
    system: Preset,
    change: Mapping[str, Any],
    model_change: Mapping[str, Any] | None = None,
    prompts: tuple[int, ...] = PROMPTS,
) -> Times:
    """Seconds of a decode token and of the prompts under one system."""
    times = {}
    for prompt in prompts:
        scenario = Scenario(
            trace=str(folder / f"{model}-{prompt}-judged.safetensors"),
            calibration=str(folder / f"{model}-{prompt}-fitted.safetensors"),
            model=model,
            model_set=dict(model_change or {}),
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


def ratios_of(
    parallel: Parallel,
    folder: Path,
    models: tuple[str, ...],
    caches: tuple[str, ...],
    systems: Mapping[str, Mapping[str, Any]],
    change: Mapping[str, Any],
    model_change: Mapping[str, Any] | None = None,
) -> Ratios:
    """Runs ``systems`` and KTransformers on ``models`` and ``caches``, on the machine with ``change``."""
    baseline = preset("ktransformers")
    chosen = {name: system_of(name, fields) for name, fields in systems.items()}
    settings = [(model, cache) for model in models for cache in caches]
    work = [(model, cache, system) for model, cache in settings for system in (baseline, *chosen.values())]
    done = parallel(delayed(times_of)(folder, *setting, change, model_change) for setting in work)
    width = 1 + len(chosen)
    found: Ratios = {name: {} for name in chosen}
    for place, (model, cache) in enumerate(settings):
        slow, *quick = done[place * width : (place + 1) * width]
        for name, times in zip(chosen, quick, strict=True):
            found[name][f"{model} {cache}"] = {what: slow[what] / times[what] for what in times}
    return found


def system_of(name: str, fields: Mapping[str, Any]) -> Preset:
    """A system of its own fields, or, without any, the published one of that name."""
    return Preset(system=SystemSpec(name=name, **fields)) if fields else preset(name)


def mean_of(found: Mapping[str, Times], what: str) -> float:
    """Geometric mean of a speed-up over all settings, and of prefill over all lengths."""
    return geometric_mean(ratio for times in found.values() for key, ratio in times.items() if key.startswith(what))

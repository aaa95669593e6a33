"""A comparison as one self-contained HTML page, and as a short Markdown table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from analysis import text
from analysis.compare import Comparison
from analysis.decisions import CountCheck, Decisions, OperationCheck, is_synchronous
from analysis.figures import report_figures
from analysis.files import check_file, write_text
from analysis.metrics import ErrorSummary
from sim.results import RunResult
from traces.schema import Trace

MEMORY_GIVEN, MEMORY_NEEDED = "GPU memory given", "GPU memory needed"
"""Keys of ``facts`` that replace the memory card's own figures (bytes of the expert cache, bytes of all experts)."""

COLUMN_NAMES: dict[str, str] = {
    "assignments": "token-expert pairs",
    "union": "distinct experts asked for",
    "hits_union": "hits (distinct experts)",
    "hits_assignments": "hits (token-expert pairs)",
    "late_hits": "late hits (still in flight)",
    "misses": "misses",
    "cpu_experts": "experts run on the CPU",
    "bytes": "bytes copied",
}


NOT_PROMISED = "not promised: arrival times decide"
"""What stands beside counts and logs that differ where nothing says that they are equal."""


@dataclass(frozen=True)
class Card:
    """One headline number of the page."""

    title: str
    value: str
    note: str


def render_report(
    *,
    comparison: Comparison,
    measured: RunResult,
    simulated: RunResult,
    trace: Trace | None = None,
    samples: Sequence[tuple[str, str]] = (),
    facts: Mapping[str, str],
) -> str:
    """The HTML page. It holds its pictures and styles itself and asks no other server for anything.

    ``trace`` adds the picture of expert popularity and the memory that all experts need; ``samples`` are (prompt,
    completion) pairs; ``facts`` are shown as they are, in order (machine, device, versions), but for
    :data:`MEMORY_GIVEN` and :data:`MEMORY_NEEDED`, which go to the memory card.
    """
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = report_figures(comparison, measured, simulated, trace)
    return environment.get_template("report.html.j2").render(
        model=comparison.measured.model,
        system=system_label(comparison.measured.system),
        synthetic=comparison.measured.synthetic or comparison.simulated.synthetic,
        verdict=verdict(comparison),
        cards=_cards(comparison, measured, trace, facts),
        badge=_badge(comparison.decisions),
        first_mismatch=comparison.decisions.first_mismatch,
        decision_rows=_decision_rows(comparison),
        component_rows=_component_rows(comparison),
        error_rows=_error_rows(comparison),
        summary_rows=_summary_rows(comparison),
        figures={figure.name: figure for figure in figures},
        samples=list(samples),
        provenance=provenance(comparison, facts),
        limits=limits(comparison),
    )


def write_report(out_path: Path, *, force: bool = False, **contents: Any) -> Path:
    """Writes :func:`render_report` (same keywords) to ``out_path``, complete or not at all; returns the path.

    Raises InputError when the file exists and ``force`` is not given.
    """
    check_file(out_path, force=force)
    return write_text(out_path, render_report(**contents), force=force)


def render_markdown(comparison: Comparison) -> str:
    """The outcome as a short Markdown text: the verdict, the components, the errors, the remarks of the runs."""
    lines = [
        f"**{comparison.measured.model}**, {system_label(comparison.measured.system)}.",
        "",
        verdict(comparison),
        "",
    ]
    lines += [
        "| time of a decode token | measured | simulated | difference | of the token |",
        "| --- " + "| ---: " * 4 + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in _component_rows(comparison)]
    lines += ["", "| error of a token | decode | prefill |", "| --- | ---: | ---: |"]
    lines += ["| " + " | ".join(row) + " |" for row in _error_rows(comparison)]
    remarks = notes(comparison)
    lines += ["", *(f"- {remark}" for remark in remarks)] if remarks else []
    return "\n".join(lines) + "\n"


def system_label(system: Mapping[str, Any]) -> str:
    """The system in one line: its name, its policies and their constants, and its switches where they are on."""
    fields = {key: value for key, value in system.items() if key not in ("name", "options") and value not in UNSAID}
    policies = [f"{key} {value}" for key, value in fields.items() if not isinstance(value, bool)]
    constants = [
        f"{kind}.{name} {value}" for kind, given in system.get("options", {}).items() for name, value in given.items()
    ]
    switches = [key for key, value in fields.items() if value is True]
    told = ", ".join([*policies, *constants, *switches])
    return ": ".join(part for part in (system.get("name"), told) if part) or "default system"


UNSAID: tuple[Any, ...] = (None, "", "none", "even", "cache")
"""Values of a system's fields that go without saying."""

MOST_NOISE = 0.15
"""Noise of the repeats beyond which times are not worth judging."""


def verdict(comparison: Comparison) -> str:
    """The whole comparison in two or three sentences."""
    ours, theirs = (comparison.tokens[f"{side}_s"].mean() * 1e3 for side in ("measured", "simulated"))
    return (
        f"{_decided(comparison.decisions)} "
        f"A decode token takes {text.number(ours, 'ms')} measured and {text.number(theirs, 'ms')} simulated; "
        f"the median error of a token is {text.percent(comparison.error.median)}{_noise(comparison)}"
    )


def _decided(decisions: Decisions) -> str:
    """One sentence on the decisions: equal, different against a promise, or different where nothing is promised."""
    rows = decisions.checks[0].rows
    wrong = max((check.mismatching for check in decisions.checks if check.promised), default=0)
    if wrong:
        return f"The clocks decided differently in {wrong:,} of {rows:,} layer-steps ({decisions.first_mismatch})."
    if not decisions.exact:
        return f"The clocks executed different operations ({decisions.first_mismatch})."
    if all(check.exact for check in decisions.checks):
        return f"Both clocks decided the same in all {rows:,} layer-steps."
    hits = next(check for check in decisions.checks if check.column == "hits_union")
    return (
        f"Both clocks asked for the same experts in all {rows:,} layer-steps, with {hits.measured:,} hits measured and "
        f"{hits.simulated:,} simulated ({NOT_PROMISED})."
    )


def _noise(comparison: Comparison) -> str:
    if not math.isfinite(comparison.noise):
        return ". It was measured once: how far repeats would differ is not known."
    known = f", where repeats of the measurement differ by {text.percent(comparison.noise)}."
    if comparison.noise <= MOST_NOISE:
        return known
    return f"{known} The machine was too busy to judge the times: measure again when it is idle."


def _cards(comparison: Comparison, measured: RunResult, trace: Trace | None, facts: Mapping[str, str]) -> list[Card]:
    ours, theirs = comparison.measured_summary, comparison.simulated_summary
    noise = (
        f"repeat noise {text.percent(comparison.noise)}"
        if math.isfinite(comparison.noise)
        else "repeat noise not known"
    )
    given = facts.get(MEMORY_GIVEN) or text.binary_bytes(comparison.measured.capacity_bytes)
    needed = facts.get(MEMORY_NEEDED) or text.binary_bytes(needed_bytes(measured, trace))
    return [
        Card("Tokens a second", text.number(ours.tokens_per_s), f"simulated {text.number(theirs.tokens_per_s)}"),
        Card("Median error of a token", text.percent(comparison.error.median), noise),
        Card("Hit ratio", text.percent(ours.hit_ratio_union), "of the distinct experts asked for, decode"),
        Card("Copied a token", text.binary_bytes(ours.bytes_per_token), "expert weights, decode"),
        Card("GPU memory", given, "for experts" if needed == text.MISSING else f"of {needed} that the experts need"),
    ]


def needed_bytes(run: RunResult, trace: Trace | None) -> float:
    """Bytes of all experts: their number from the trace, their size from the run's header (nan without a trace).

    The run's own size counts, since a trace can be replayed on a model whose experts have another one.
    """
    if trace is None:
        return math.nan
    size_bytes = run.info.bytes_of_expert
    if not size_bytes:
        return float(sum(trace.header.expert_bytes) * trace.header.experts)
    return float(size_bytes * trace.header.layers * trace.header.experts)


def _badge(decisions: Decisions) -> tuple[str, str]:
    """(style, words) of the mark before the verdict."""
    if not decisions.exact:
        return "bad", "decisions differ"
    return ("good", "decisions equal") if decisions.equal else ("neutral", "equal where promised")


def _decision_rows(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """(name, measured, simulated, style of the outcome, outcome) of every check."""

    def row(name: str, check: CountCheck | OperationCheck, differing: str) -> tuple[str, str, str, str, str]:
        style, outcome = ("good", "equal") if check.exact else ("bad", differing)
        if not (check.exact or check.promised):
            style, outcome = "neutral", NOT_PROMISED
        return name, f"{check.measured:,}", f"{check.simulated:,}", style, outcome

    decisions = comparison.decisions
    rows = [
        row(COLUMN_NAMES[check.column], check, f"{check.mismatching:,} of {check.rows:,} rows differ")
        for check in decisions.checks
    ]
    log = decisions.operations
    return rows + ([row("executed operations", log, f"{log.mismatching:,} entries differ")] if log else [])


def _component_rows(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """(name, measured, simulated, difference, of the token) of every component, and of the whole token."""

    def row(name: str, ours: float, theirs: float, share: float) -> tuple[str, str, str, str, str]:
        shown = [text.number(value, "ms") for value in (ours, theirs)]
        return name, *shown, text.signed_number(theirs - ours, "ms"), text.percent(share, signed=True)  # type: ignore[return-value]

    critical = comparison.critical()
    ours, theirs = (sum(getattr(part, f"{side}_ms") for part in critical) for side in ("measured", "simulated"))
    beside = [part for part in comparison.components if not part.critical]
    return [
        *(row(part.label, part.measured_ms, part.simulated_ms, part.of_token) for part in critical),
        row("whole token", ours, theirs, (theirs - ours) / ours),
        *(
            row(f"{part.label} busy, beside the above", part.measured_ms, part.simulated_ms, part.of_token)
            for part in beside
        ),
    ]


def _error_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(name, decode, prefill) of every error figure."""

    def row(name: str, field: str, *, signed: bool = False) -> tuple[str, str, str]:
        sides: tuple[ErrorSummary, ErrorSummary] = (comparison.error, comparison.prefill)
        shown = [text.percent(getattr(side, field), signed=signed) for side in sides]
        return name, shown[0], shown[1]

    rows = [
        row("median", "median"),
        row("mean (MAPE)", "mape"),
        row("p90", "p90"),
        row("p99", "p99"),
        row("worst", "worst"),
        row("bias (signed mean)", "bias", signed=True),
        ("tokens, or passes", f"{comparison.error.tokens:,}", f"{comparison.prefill.tokens:,}"),
        ("repeat noise", text.percent(comparison.noise), text.MISSING),
    ]
    if math.isfinite(comparison.skill):
        rows.append(("skill (below 1 beats a constant)", text.number(comparison.skill), text.MISSING))
    return rows


def _summary_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(name, measured, simulated) of the whole-run figures."""
    sides = (comparison.measured_summary, comparison.simulated_summary)
    rows = [("tokens a second", *(text.number(side.tokens_per_s) for side in sides))]
    for rank in ("p50", "p90", "p99"):
        values = (getattr(side, f"tpot_{rank}_s") * 1e3 for side in sides)
        rows.append((f"time per output token, {rank}", *(text.number(value, "ms") for value in values)))
    rows.append(("time to first token, median", *(text.number(side.ttft_s * 1e3, "ms") for side in sides)))
    rows.append(("prefill pass, mean", *(text.number(value, "ms") for value in comparison.prefill_ms)))
    for name, field in (
        ("hit ratio by token-expert pair", "hit_ratio_assignments"),
        ("late hits of distinct experts", "late_hit_ratio"),
        ("stall share", "stall_share"),
    ):
        rows.append((name, *(text.percent(getattr(side, field)) for side in sides)))
    for resource in sorted({*sides[0].busy, *sides[1].busy}):
        rows.append((f"{resource} busy", *(text.percent(side.busy.get(resource, math.nan)) for side in sides)))
    return rows  # type: ignore[return-value]


def provenance(comparison: Comparison, facts: Mapping[str, str]) -> list[tuple[str, str]]:
    """(name, value) of everything that tells where the two runs come from."""
    ours, theirs = comparison.measured, comparison.simulated
    rows = [("model", ours.model), ("trace digest", ours.trace_digest)]
    rows += [("system", ", ".join(f"{key} {value}" for key, value in ours.system.items()))]
    rows += [("capacity", f"{ours.capacity_slots} slots, {text.binary_bytes(ours.capacity_bytes)}")]
    rows += [("staging slots", str(ours.staging_slots))]
    rows += [("workload", ", ".join(f"{key} {value}" for key, value in ours.workload.items()))]
    rows += [("measured on", ours.hardware), ("simulated as", theirs.hardware)]
    rows += [("costs of the simulation", theirs.costs)] if theirs.costs else []
    rows += [("measured repeats", str(comparison.repeats))]
    rows += [(key, value) for key, value in facts.items() if key not in (MEMORY_GIVEN, MEMORY_NEEDED)]
    software = {**theirs.software, **ours.software}
    return rows + [("software", ", ".join(f"{name} {version}" for name, version in software.items()))] * bool(software)


def limits(comparison: Comparison) -> list[str]:
    """What the numbers of this comparison do not say, in plain sentences."""
    found = [
        "One model, one trace, one machine and one capacity: nothing here says how the error changes with any of them.",
        "Times of the measured run include the measuring itself; time between two forward passes is in neither clock.",
    ]
    if comparison.repeats < 2:
        found.append("The measurement was made once, so that noise and error cannot be told apart.")
    elif comparison.repeats < 7:
        found.append(f"The measurement was repeated {comparison.repeats} times; seven are needed for a steady minimum.")
    if not math.isfinite(comparison.skill):
        found.append(
            "Skill is not given: without other runs to calibrate on, a constant could do as well as the simulation."
        )
    if not comparison.decisions.promised:
        found.append(
            "Prefetched copies overlap with work: hits, late hits, misses and the order of operations depend on when "
            "copies arrive, and are not promised to be equal on both clocks."
        )
    elif not (is_synchronous(comparison.measured) and is_synchronous(comparison.simulated)):
        found.append("Copies overlap with work: the order of operations is not promised to be equal on both clocks.")
    if comparison.measured.synthetic or comparison.simulated.synthetic:
        found.append("The routing, or a prediction of it, is synthetic: no model chose these experts.")
    return [*found, *notes(comparison)]


def notes(comparison: Comparison) -> list[str]:
    """The remarks that the runs carry, each once, with the run that it is about."""
    ours, theirs = comparison.measured.notes, comparison.simulated.notes
    sides = {note: "Measured run" for note in ours} | {note: "Simulated run" for note in theirs}
    sides |= {note: "Both runs" for note in ours if note in theirs}
    return [f"{side}: {note}" for note, side in sides.items()]

"""A validation as one HTML page, as Markdown, and as lines for a terminal: the same rows in all three."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.box import SIMPLE_HEAD
from rich.table import Table

from analysis import plots_validation as plots
from analysis import text
from analysis.bars import BARS, SHARES, asked, holds
from analysis.figures import FigureEntry
from analysis.report import MOST_NOISE
from analysis.svg import inline_svg
from analysis.validation import Tables, named, rows_of

POINT_HEAD = ("model", "system", "cache", "measured ms", "simulated ms", "median error", "bias", "noise", "counts")
COMPONENT_HEAD = ("component", "measured ms", "simulated ms", "of the token", "absolute")
SYSTEM_HEAD = ("model", "system", "tokens", "median error", "bias", "its constant's error", "skill")
ORDER_HEAD = ("quicker before", "quicker after", "between", "simulated")
PERCENT = text.percent


@dataclass(frozen=True)
class Outcome:
    """What is shown: the tables, the figures from them, and what was asked for and is missing, in words."""

    tables: Tables
    figures: Mapping[str, Any]
    facts: Mapping[str, str]
    device: str
    missing: Sequence[str] = ()

    @property
    def bars(self) -> dict[str, float]:
        return BARS["cpu" if self.device == "cpu" else "gpu"]

    @property
    def title(self) -> str:
        models = list(dict.fromkeys(self.tables.points.model))
        return models[0] if len(models) == 1 else f"{len(models)} models"


@dataclass(frozen=True)
class Card:
    """One headline figure, beside what is asked for."""

    title: str
    value: str
    style: str
    outcome: str
    note: str


def verdict(outcome: Outcome) -> str:
    """The whole validation in a few sentences."""
    found = outcome.figures["overall"]
    low, high = found["repeats"]
    repeats = f"{low}" if low == high else f"{low} to {high}"
    told = [
        f"{found['points']} points ({found['systems']} systems) with {found['tokens']:,} decode tokens, each measured "
        f"{repeats} times: the median error of a token is {PERCENT(found['median'])}, the 90th percentile "
        f"{PERCENT(found['p90'])}, the bias {PERCENT(found['bias'], signed=True)}; repeats differ by "
        f"{PERCENT(found['noise'])}.",
        "Hits, misses and bytes are exact wherever that is promised."
        if found["decisions_exact"]
        else "The clocks decided differently where equality is promised.",
    ]
    if found["noise"] > MOST_NOISE:
        told.append("The machine was too busy to judge the times: measure again when it is idle.")
    return " ".join([*told, *outcome.missing])


def cards(outcome: Outcome) -> list[Card]:
    """The figures that have a bar, and whether they hold it."""
    found, bars = outcome.figures["overall"], outcome.bars
    names = {"median": "Median error", "p90": "90th percentile", "skill": "Skill", "kendall_tau": "Kendall's tau"}
    notes = {
        "median": f"of a decode token; noise {PERCENT(found['noise'])}",
        "p90": "of the errors of all tokens",
        "skill": f"our error over that of each system's calibration mean{_by_system(outcome)}",
        "kendall_tau": f"over all points; {PERCENT(found['pairs_left_out'])} of the pairs are closer than the noise",
    }
    made = []
    for name, bar in bars.items():
        value = found[name]
        shown = PERCENT if name in SHARES else text.number
        style, word = ("good", "holds") if holds(name, value, bar) else ("bad", "misses")
        if not math.isfinite(value):
            style, word = "neutral", "not known;"
        made.append(Card(names[name], shown(value), style, f"{word} {asked(name, shown(bar))}", notes[name]))
    return made


def _by_system(outcome: Outcome) -> str:
    """The lowest and the highest skill of a system, where there are several."""
    known = [one["skill"] for one in outcome.figures["systems"] if math.isfinite(one["skill"])]
    return f"; by system {text.number(min(known))} to {text.number(max(known))}" if len(known) > 1 else ""


def system_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row a system and model, as :data:`SYSTEM_HEAD` names them."""
    return [
        (
            one["model"],
            one["system"],
            f"{one['tokens']:,}",
            PERCENT(one["median_error"]),
            PERCENT(one["bias"], signed=True),
            PERCENT(one["constant_error"]),
            text.number(one["skill"]),
        )
        for one in outcome.figures["systems"]
    ]


def point_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row a point, as :data:`POINT_HEAD` names them."""
    return [
        (
            row["model"],
            row["system"],
            named(row["cache"], row["workload"]),
            text.number(row["measured_ms"]),
            text.number(row["simulated_ms"]),
            PERCENT(row["median_error"]),
            PERCENT(row["bias"], signed=True),
            PERCENT(row["noise"]),
            ("exact" if row["decisions_promised"] else "arrival") if row["decisions_exact"] else "differ",
        )
        for row in outcome.figures["points"]
    ]


def component_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row a component, as :data:`COMPONENT_HEAD` names them."""
    return [
        (
            part["label"] if part["critical"] else f"{part['label']} (in or beside the above)",
            text.number(part["measured_ms"]),
            text.number(part["simulated_ms"]),
            PERCENT(part["of_token"], signed=True),
            PERCENT(part["absolute_of_token"]),
        )
        for part in outcome.figures["components"]
    ]


def figure_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row a figure, with a column for all models and one for each where there are several."""
    columns = [outcome.figures["overall"], *outcome.figures["models"].values()]
    shares = {
        "median": "median absolute error",
        "mape": "mean absolute error (MAPE)",
        "p90": "90th percentile",
        "p99": "99th percentile",
        "worst": "worst",
        "noise": "noise of the repeats",
        "pairs_left_out": "pairs closer than the noise",
    }
    rows = [(name, *(PERCENT(column[key]) for column in columns)) for key, name in shares.items()]
    rows.insert(5, ("signed bias", *(PERCENT(column["bias"], signed=True) for column in columns)))
    rows.append(("skill", *(text.number(column["skill"]) for column in columns)))
    rows.append(("Kendall's tau", *(text.number(column["kendall_tau"]) for column in columns)))
    rows.append(("decode tokens", *(f"{column['tokens']:,}" for column in columns)))
    if any(math.isfinite(column["memory_off"]) for column in columns):
        rows.append(("device memory, peak against planned", *(PERCENT(column["memory_off"]) for column in columns)))
    return rows


def order_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """One row a change of places, as :data:`ORDER_HEAD` names them."""
    return [
        (one["below"], one["above"], f"{one['low']} and {one['high']}", one["simulated"])
        for one in outcome.figures["crossovers"]
    ]


def render_html(outcome: Outcome) -> str:
    """The page. It holds its pictures and styles itself and asks no other server for anything."""
    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("validation.html.j2").render(
        title=outcome.title,
        verdict=verdict(outcome),
        cards=cards(outcome),
        figures={figure.name: figure for figure in _figures(outcome)},
        system_head=SYSTEM_HEAD,
        system_rows=system_rows(outcome),
        point_head=POINT_HEAD,
        point_rows=point_rows(outcome),
        figure_head=_figure_head(outcome),
        figure_rows=figure_rows(outcome),
        component_head=COMPONENT_HEAD,
        component_rows=component_rows(outcome),
        order_head=ORDER_HEAD,
        order_rows=order_rows(outcome),
        provenance=list(outcome.facts.items()),
        limits=limits(outcome),
    )


def _figures(outcome: Outcome) -> list[FigureEntry]:
    rows = rows_of(outcome.tables)
    drawn = (
        (
            "scatter",
            plots.predicted_against_measured(rows, outcome.bars["median"]),
            "Simulated against measured",
            "Each mark is one system at one cache size; on the line both clocks agree.",
        ),
        (
            "ranking",
            plots.ranking(rows),
            "Which is quicker",
            "All points by their measured time; where the diamonds go down with the dots, the simulator ranks as the "
            "machine does.",
        ),
        (
            "components",
            plots.error_by_component(outcome.tables.components),
            "Where the error is",
            "Each mark is one system, mean over its cache sizes; marks on both sides of the line mean that errors of "
            "components cancel in the total.",
        ),
    )
    return [
        FigureEntry(name, inline_svg(figure, name, f"{title}. {caption}"), title, caption)
        for name, figure, title, caption in drawn
    ]


def render_markdown(outcome: Outcome) -> str:
    """The figures, the systems, the points, the components and the changes of order as a Markdown text."""
    parts = [f"**{outcome.title}**", "", verdict(outcome), ""]
    parts += _markdown(_figure_head(outcome), figure_rows(outcome), 1)
    parts += _markdown(SYSTEM_HEAD, system_rows(outcome), 2)
    parts += _markdown(POINT_HEAD, point_rows(outcome), 3)
    parts += _markdown(COMPONENT_HEAD, component_rows(outcome), 1)
    if order_rows(outcome):
        parts += _markdown(ORDER_HEAD, order_rows(outcome), 4)
    parts += [f"- {key}: {value}" for key, value in outcome.facts.items()]
    return "\n".join(parts) + "\n"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A table whose columns after the first ``words`` are set to the right."""
    rule = [" --- " if place < words else " ---: " for place in range(len(head))]
    lines = [f"| {' | '.join(head)} |", f"|{'|'.join(rule)}|"]
    return [*lines, *(f"| {' | '.join(row)} |" for row in rows), ""]


def point_table(outcome: Outcome) -> Table:
    """The points for a terminal, times in ms."""
    title = f"{outcome.title}: mean decode token in ms"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    several = len(outcome.figures["models"]) > 0
    for place, name in enumerate(POINT_HEAD):
        if place or several:
            short = name.removesuffix(" ms").removeprefix("median ")
            table.add_column(short, justify="left" if place < 3 else "right", no_wrap=place < 3)
    for row in point_rows(outcome):
        table.add_row(*(row if several else row[1:]))
    return table


def limits(outcome: Outcome) -> list[str]:
    """What these figures do not say, in plain sentences."""
    found = [
        "One machine; dense work of one model family a model: nothing here says how the error changes with them.",
        "A point is each token's fastest repeat, so that the slow tail of a busy machine is not predicted.",
        "With prefetch, what has arrived in time decides what hits: counts are then compared, and not promised.",
    ]
    return [*found, *outcome.missing]


def _figure_head(outcome: Outcome) -> tuple[str, ...]:
    models = list(outcome.figures["models"])
    return ("error of a decode token", *(["all models", *models] if models else [outcome.title]))

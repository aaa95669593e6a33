from __future__ import annotations

import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis import report, text
from analysis.compare import Comparison, compare
from analysis.figures import shown_steps, typical_layer, typical_step
from analysis.files import write_text
from analysis.frames import layer_frame
from sim.results import RunResult
from traces.errors import InputError
from traces.schema import Trace

VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Reads a page, and fails on tags that are not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture
def comparison(measured: RunResult, simulated: RunResult, slower: RunResult) -> Comparison:
    return compare(measured, simulated, repeats=[slower], calibration_mean_s=0.010)


@pytest.fixture
def page(comparison: Comparison, measured: RunResult, simulated: RunResult, trace: Trace) -> str:
    return report.render_report(
        comparison=comparison,
        measured=measured,
        simulated=simulated,
        trace=trace,
        samples=[("2 < 3 <script>", " is & stays true")],
        facts={"device": "cpu"},
    )


def test_page_is_well_formed_and_self_contained(page: str) -> None:
    parsed = Page(page)
    assert all(link.startswith(("#", "data:")) for link in parsed.links)
    assert "http:" not in page
    assert "https:" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert len(parsed.ids) == len(set(parsed.ids))


def test_page_shows_the_numbers(page: str) -> None:
    words = " ".join(" ".join(Page(page).words).split())
    assert "Both clocks decided the same in all 8 layer-steps." in words
    assert "10.0 ms measured and 9.67 ms simulated" in words
    assert "median error of a token is 10.0%, where repeats of the measurement differ by 5.0%" in words
    assert "Hit ratio 66.7%" in words
    assert "GPU memory 400 B of 800 B that the experts need" in words
    assert "skill (below 1 beats a constant) 0.600" in words
    assert "tiny-moe" in words
    assert "device cpu" in words
    assert "2 < 3 <script> is & stays true" in words


def test_page_has_every_figure_with_a_caption(page: str) -> None:
    assert page.count("<svg") == page.count("<figcaption>") == 7
    for title in ("One step on both clocks", "What the cache did in layer", "What the router likes"):
        assert title in page


def test_page_without_events_operations_and_trace(measured: RunResult, simulated: RunResult) -> None:
    for run in (measured, simulated):
        run.events, run.operations = run.events.iloc[:0], run.operations.iloc[:0]
    outcome = compare(measured, simulated)
    page = report.render_report(comparison=outcome, measured=measured, simulated=simulated, facts={})
    assert Page(page).links is not None
    assert page.count("<svg") == 4
    assert "Generated text" not in page
    assert "made once" in page


def test_page_says_where_decisions_differ(measured: RunResult, simulated: RunResult) -> None:
    simulated.layers.loc[3, "misses"] = 5
    outcome = compare(measured, simulated)
    page = report.render_report(comparison=outcome, measured=measured, simulated=simulated, facts={})
    assert '<span class="badge bad">decisions differ</span>' in page
    assert "1 of 8 rows differ" in page
    assert "First difference: step 1, layer 1: misses is 0 measured, 5 simulated." in page


def overlapped(make_run: Callable[..., RunResult], prefetch: str) -> list[RunResult]:
    system = {"evict": "lru", "prefetch": prefetch, "synchronous": False}
    return [make_run(source, system=system) for source in ("measured", "simulated")]


def test_page_does_not_judge_what_arrival_times_decide(make_run: Callable[..., RunResult]) -> None:
    ours, theirs = overlapped(make_run, "next-router")
    theirs.layers.loc[3, ["hits_union", "late_hits"]] = [1, 1]
    outcome = compare(ours, theirs)
    page = report.render_report(comparison=outcome, measured=ours, simulated=theirs, facts={})
    assert '<span class="badge neutral">equal where promised</span>' in page
    assert page.count('<span class="badge neutral">not promised: arrival times decide</span>') == 2
    assert '<td>hits (distinct experts)</td><td class="n">8</td><td class="n">7</td>' in page
    assert "decided differently" not in report.verdict(outcome)
    assert "with 8 hits measured and 7 simulated (not promised: arrival times decide)" in report.verdict(outcome)
    assert any("Prefetched copies overlap" in limit for limit in report.limits(outcome))


def test_other_operations_are_not_other_counts(measured: RunResult, simulated: RunResult) -> None:
    simulated.operations.loc[2, "slot"] = 3
    told = report.verdict(compare(measured, simulated))
    assert "The clocks executed different operations (entry 2 (step 0, layer 1): slot=2 measured" in told


def test_without_prefetch_only_the_order_is_not_promised(make_run: Callable[..., RunResult]) -> None:
    ours, theirs = overlapped(make_run, "none")
    limits = " ".join(report.limits(compare(ours, theirs)))
    assert "the order of operations is not promised" in limits
    assert "Prefetched copies" not in limits
    theirs.layers.loc[3, "hits_union"] = 1
    assert "decided differently in 1 of 8 layer-steps" in report.verdict(compare(ours, theirs))


def test_facts_replace_the_memory_card(comparison: Comparison, measured: RunResult, simulated: RunResult) -> None:
    facts = {report.MEMORY_GIVEN: "2 GiB", report.MEMORY_NEEDED: "9 GiB"}
    page = report.render_report(comparison=comparison, measured=measured, simulated=simulated, facts=facts)
    assert "of 9 GiB that the experts need" in page
    assert report.MEMORY_GIVEN not in page


def test_needed_bytes_are_those_of_the_model_that_was_run(
    measured: RunResult, make_run: Callable[..., RunResult], trace: Trace
) -> None:
    assert report.needed_bytes(measured, trace) == 800.0
    larger = make_run("measured", capacity_bytes=4000)
    assert report.needed_bytes(larger, trace) == 8000.0
    none_held = make_run("measured", capacity_slots=0, capacity_bytes=0)
    assert report.needed_bytes(none_held, trace) == 800.0
    assert math.isnan(report.needed_bytes(measured, None))


def test_needed_bytes_do_not_depend_on_who_computed_hits(measured: RunResult, trace: Trace) -> None:
    measured.layers["cpu_experts"] = measured.layers["union"]
    assert report.needed_bytes(measured, trace) == 800.0


@pytest.mark.parametrize(
    ("system", "label"),
    [
        ({"evict": "lru", "prefetch": "none", "synchronous": True}, "evict lru, synchronous"),
        (
            {"name": "mine", "evict": "lru", "options": {"prefetch": {"depth": 3}}, "holds": "cache"},
            "mine: evict lru, prefetch.depth 3",
        ),
        ({"name": "", "options": {}, "holds": "two layers"}, "holds two layers"),
        ({}, "default system"),
    ],
)
def test_a_system_in_one_line(system: dict[str, Any], label: str) -> None:
    assert report.system_label(system) == label


def test_limits_say_what_is_missing(
    measured: RunResult, simulated: RunResult, make_run: Callable[..., RunResult]
) -> None:
    once = " ".join(report.limits(compare(measured, simulated)))
    assert "made once" in once
    assert "Skill is not given" in once
    assert "Copies overlap" not in once
    system = {"evict": "lru", "prefetch": "next-router"}
    runs = [
        make_run(source, system=system, synthetic=True, notes=["Cold start."]) for source in ("measured", "simulated")
    ]
    found = report.limits(compare(runs[0], runs[1], calibration_mean_s=0.01))
    assert found[-1] == "Both runs: Cold start."
    assert sum("Cold start." in limit for limit in found) == 1
    assert any("copies overlap" in limit for limit in found)
    assert any("synthetic" in limit for limit in found)
    assert not any("Skill" in limit for limit in found)


def test_remarks_name_their_run(make_run: Callable[..., RunResult]) -> None:
    asked = "dense was asked for 60, measured from 1 to 48"
    ours, theirs = make_run("measured", notes=["Cold start."]), make_run("simulated", notes=[asked])
    outcome = compare(ours, theirs)
    page = report.render_report(comparison=outcome, measured=ours, simulated=theirs, facts={})
    assert f"<li>Simulated run: {asked}</li>" in page
    assert "<li>Measured run: Cold start.</li>" in page
    assert report.render_markdown(outcome).endswith(f"\n\n- Measured run: Cold start.\n- Simulated run: {asked}\n")


def test_write_report_keeps_what_exists(
    tmp_path: Path, comparison: Comparison, measured: RunResult, simulated: RunResult
) -> None:
    out = tmp_path / "deep" / "report.html"
    contents = {"comparison": comparison, "measured": measured, "simulated": simulated, "facts": {}}
    assert report.write_report(out, **contents) == out
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(InputError, match=r"out must be a new file \(or give --force\)"):
        report.write_report(out, **contents)


def test_interrupted_writing_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = write_text(tmp_path / "report.html", "old")

    def interrupted(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(out, "new", force=True)
    assert out.read_text(encoding="utf-8") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_an_impossible_place_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here", encoding="utf-8")
    with pytest.raises(InputError, match="markdown must be a file that can be written"):
        write_text(tmp_path / "file" / "out.md", "new", field="markdown")
    with pytest.raises(InputError, match="markdown must be a file name, got the folder"):
        write_text(tmp_path, "new", field="markdown")


def test_markdown(comparison: Comparison) -> None:
    lines = report.render_markdown(comparison).splitlines()
    assert lines[0] == "**tiny-moe**, evict lru, place fetch, scope layer, synchronous."
    assert "| whole token | 10.0 ms | 9.67 ms | \N{MINUS SIGN}0.333 ms | \N{MINUS SIGN}3.3% |" in lines
    assert "| median | 10.0% | 10.0% |" in lines
    assert not any(line.startswith("- ") for line in lines)


def test_typical_step_is_nearest_to_the_median(measured: RunResult, simulated: RunResult) -> None:
    outcome = compare(measured, simulated)
    assert typical_step(outcome, measured, simulated) == 1
    measured.events = measured.events[measured.events["step"] != 1]
    assert typical_step(outcome, measured, simulated) == 2
    measured.events = measured.events.iloc[:0]
    assert typical_step(outcome, measured, simulated) is None


def test_shown_steps_are_the_longest_decode_run(measured: RunResult) -> None:
    assert shown_steps(measured) == range(1, 4)
    measured.tokens.loc[1, "phase"] = 0
    assert shown_steps(measured) == range(2, 4)


def test_typical_layer(measured: RunResult) -> None:
    assert typical_layer(layer_frame(measured)) == 0


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (text.number(1234.5, "ms"), "1,234 ms"),
        (text.number(12.345), "12.3"),
        (text.number(9.9999), "10.0"),
        (text.number(-1.2345), "\N{MINUS SIGN}1.23"),
        (text.number(0.01234), "0.012"),
        (text.number(0.0), "0"),
        (text.signed_number(1e-9, "ms"), "0 ms"),
        (text.signed_number(-1e-9, "ms"), "0 ms"),
        (text.percent(-1e-9, signed=True), "0%"),
        (text.number(math.nan), text.MISSING),
        (text.signed_number(2.0), "+2.00"),
        (text.percent(0.1234), "12.3%"),
        (text.percent(-0.0012, signed=True), "\N{MINUS SIGN}0.12%"),
        (text.percent(0.5, signed=True), "+50.0%"),
        (text.percent(0.0, signed=True), "0%"),
        (text.percent(math.nan), text.MISSING),
        (text.binary_bytes(1536), "1.50 KiB"),
        (text.binary_bytes(3 * 2**30), "3.00 GiB"),
        (text.binary_bytes(12), "12 B"),
        (text.binary_bytes(math.nan), text.MISSING),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert shown == expected


def test_a_noisy_machine_and_a_single_run_are_said(make_run: Callable[..., RunResult]) -> None:
    measured, simulated = make_run("measured"), make_run("simulated")
    assert "It was measured once" in report.verdict(compare(measured, simulated))
    slow = make_run("measured")
    for table in (slow.tokens, slow.layers, slow.events):
        table[["start_s", "end_s"]] *= 2
    assert "too busy to judge" in report.verdict(compare(measured, simulated, repeats=[slow]))

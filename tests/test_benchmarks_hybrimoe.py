"""What HybriMoE's benchmark runs its systems on, and how it counts hits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from benchmarks import hit_rates, hybrimoe, residency
from benchmarks.halves import covered, halves
from benchmarks.hybrimoe_runs import system_of, write_routing
from benchmarks.pages import refresh
from sim.presets import preset
from sim.scenario import Scenario
from sim.spec import catalogue
from traces import store, synthetic
from traces.errors import InputError
from traces.fitted import Law
from traces.schema import Phase, Trace

LAW = Law(
    source="a test's",
    source_digest="none",
    bias=(0.1, 0.0, -0.1),
    domain=0.5,
    rank=4.0,
    sharpness=3.0,
    scores=True,
    domains=("prose", "prose", "code", "code"),
    lookahead_recall=(0.8, 0.7, 0.6),
)
SMALL = catalogue.overridden_model(
    catalogue.model("deepseek-v2-lite"), {"moe_layers": 2, "layers": 3, "top_k": 2, "experts": 16}
)
WEIGHTS = ("mrs", "lru")


def tokens(*chosen: tuple[int, ...], experts: int) -> Trace:
    """A trace of one layer, in which every token is a decode step."""
    sizes = synthetic.Sizes(
        sequences=1,
        prompt_tokens=0,
        new_tokens=len(chosen),
        layers=1,
        experts=experts,
        top_k=len(chosen[0]),
        expert_bytes=1,
        scores=True,
    )
    trace = synthetic.generate("zipf", 0, sizes)
    ids = np.array(chosen, np.uint16)[:, None, :]
    scores = np.full((len(chosen), 1, experts), 0.01, np.float16)
    np.put_along_axis(scores, ids.astype(np.int64), np.float16(0.4), axis=-1)
    return replace(trace, expert_ids=ids, scores=scores)


def test_both_halves_are_of_the_same_domains_in_the_same_order() -> None:
    judged, fitted = halves(LAW, SMALL, sequences=2, prompt_tokens=4, new_tokens=2)
    assert judged.header.domains == fitted.header.domains == ("prose", "code")
    assert len(judged) == len(fitted) == 12
    assert not np.array_equal(judged.expert_ids, fitted.expert_ids)


def test_the_second_half_is_of_the_domains_that_are_named_for_it() -> None:
    prose = replace(LAW, domains=("prose",))
    judged, fitted = halves(prose, SMALL, sequences=2, prompt_tokens=4, new_tokens=2, fitted_domains=("code",))
    assert (judged.header.domains, fitted.header.domains) == (("prose", "prose"), ("code", "code"))


def test_a_set_fitted_to_the_same_domain_covers_more_than_one_fitted_to_another() -> None:
    prose = replace(LAW, domains=("prose",))
    same = covered(*halves(prose, SMALL, 2, 64, 1), 25)
    other = covered(*halves(prose, SMALL, 2, 64, 1, fitted_domains=("code",)), 25)
    assert same > other + 0.05


def test_uses_that_a_set_covers_are_counted_by_hand() -> None:
    judged = tokens((0, 1), (0, 2), (3, 1), experts=4)
    fitted = tokens((0, 1), (1, 0), (1, 2), experts=4)  # 1 is used three times, 0 twice
    assert covered(judged, fitted, 50) == 4 / 6
    assert covered(judged, fitted, 25) == 2 / 6
    assert covered(judged, fitted, 100) == 1.0


def test_prompts_of_every_length_are_calibrated_on_their_own_draw(tmp_path: Path) -> None:
    write_routing(LAW, "deepseek-v2-lite", 1, tmp_path, prompts=(4, 8))
    lengths = {path.stem: len(store.load(path)) for path in tmp_path.iterdir()}
    assert lengths == {
        f"deepseek-v2-lite-{prompt}-{part}": prompt + 1 for prompt in (4, 8) for part in ("judged", "fitted")
    }


def test_hits_are_counted_at_once_or_one_by_one() -> None:
    """Two slots, two experts a token: at once, the cache is the token before; one by one, a miss drives one out.

    One by one under LRU: 0, 1 come; 2 drives out 0, and then 0 is gone, and drives out 1. MRS knows the token's scores:
    2 drives out 1, and 0 is there.
    """
    trace = tokens((0, 1), (2, 0), experts=8)
    assert hit_rates.pair(trace, "25%", "atomic") == [25.0, 25.0]
    assert dict(zip(WEIGHTS, hit_rates.pair(trace, "25%", "serial"), strict=True)) == {"mrs": 25.0, "lru": 0.0}


def test_decode_alone_is_counted_where_there_is_any() -> None:
    judged, _ = halves(LAW, SMALL, sequences=2, prompt_tokens=6, new_tokens=2)
    prompts = replace(judged, phase=np.full(len(judged), Phase.PREFILL, np.uint8))
    assert hit_rates.pair(judged, "25%", "atomic") != hit_rates.pair(prompts, "25%", "atomic")


def test_uniform_routing_hits_by_the_share_that_is_cached() -> None:
    rows = hit_rates.rates({"uniform": hit_rates.uniform("deepseek-v2-lite")})
    for row, share in zip(rows, (25, 50, 75), strict=True):
        assert row["atomic"] == pytest.approx([share, share], abs=0.7)


def test_traces_that_are_named_are_replayed_alone(tmp_path: Path) -> None:
    store.save(tokens((0, 1), (2, 0), experts=8), tmp_path / "mine.safetensors")
    app = typer.Typer()
    app.command()(hit_rates.main)
    result = CliRunner().invoke(app, [str(tmp_path / "mine.safetensors")])
    assert result.exit_code == 0, result.output
    _, _, *rows = result.stdout.splitlines()
    assert [row.split()[:2] for row in rows] == [["mine", cache] for cache in hit_rates.CACHES]
    assert rows[0].split()[2:] == ["25.0", "/", "25.0", "+0.0", "25.0", "/", "0.0", "+25.0", "-"]


def test_published_hit_rates_stand_beside_ours() -> None:
    row = {"routing": "mixtral-8x7b", "cache": "25%", "atomic": [30.0, 29.5], "serial": [34.0, 30.25]}
    line = hit_rates.shown_rates([row]).splitlines()[-1].split()
    assert line[2:] == ["30.0", "/", "29.5", "+0.5", "34.0", "/", "30.2", "+3.8", "36.2", "/", "30.2", "+6.0"]


def test_without_any_expert_on_the_gpu_nothing_is_copied(tmp_path: Path) -> None:
    judged, _ = halves(LAW, SMALL, 1, 2, 2)
    store.save(judged, tmp_path / "judged.safetensors")
    scenario = Scenario(
        trace=str(tmp_path / "judged.safetensors"),
        model="deepseek-v2-lite",
        model_set={"moe_layers": 2, "layers": 3, "top_k": 2, "experts": 16},
        system=residency.NONE_RESIDENT,
        cache="1",
    )
    assert {*scenario.prepare().run().operations["op"]} == {"cpu"}


def test_every_choice_and_part_of_the_study_is_a_system_that_exists() -> None:
    for name, fields in {**hybrimoe.CHOICES, **hybrimoe.ABLATION}.items():
        assert system_of(name, fields).name == name
    assert {preset(system).name for system, _ in hybrimoe.RELEASED.values()} == {"hybrimoe-code", "ktransformers"}
    machine = catalogue.find_hardware(hybrimoe.MACHINE)
    for change in (
        *hybrimoe.VARIATIONS.values(),
        *hybrimoe.LIMITING.values(),
        *(c for _, c in hybrimoe.RELEASED.values()),
    ):
        assert catalogue.overridden(machine, dict(change)).gpu.name == machine.gpu.name


def test_what_the_texts_are_is_told_by_model() -> None:
    one = {model: [0.25, 1.5] for model in hybrimoe.MODELS}
    table = hybrimoe.texts_table({"the same": one})
    assert [list(column.cells) for column in table.columns][1:] == [["0.25  1.50"]] * 3


def test_a_page_is_refreshed_below_its_command(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    told = "```text\nfirst\n```\n\n    python -m benchmarks.one --out x\n\n```text\n{}\n```\nend\n"
    page.write_text(told.format("old"), encoding="utf-8")
    refresh(page, "one", "new\nlines")
    assert page.read_text(encoding="utf-8") == told.format("new\nlines")
    with pytest.raises(InputError, match="page must have the command of two and a block of text after it"):
        refresh(page, "two", "new")

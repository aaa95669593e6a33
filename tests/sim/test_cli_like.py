"""``moetwin trace like``: what it writes, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from sim.cli_like import like
from sim.spec import catalogue
from traces import InputError, store
from traces.edit import slice_trace
from traces.portrait import LABELS
from traces.shipped import find_trace

app = typer.Typer()
app.command()(like)
SHORT = ("--sequences", "2", "--prompt-tokens", "4", "--new-tokens", "12")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corner of the shipped trace, which is quicker to fit."""
    corner = slice_trace(store.load(find_trace("mixed")), sequences="0:4", layers="0:4", tokens=48)
    return store.save(corner, tmp_path_factory.mktemp("source") / "small.safetensors")


def run(*arguments: str | Path) -> str:
    """Runs the command and returns what it printed; its errors are raised as they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_model_of_the_catalogue_gives_the_dimensions(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    record = json.loads(run(small, "--model", "qwen2-57b-a14b", "--out", out, *SHORT, "--json"))
    trace, spec = store.load(out, verify=True), catalogue.model("qwen2-57b-a14b")
    header = trace.header
    assert (header.layers, header.experts, header.top_k) == (spec.moe_layers, spec.experts, spec.top_k)
    assert set(header.expert_bytes) == {spec.expert_bytes}
    assert (header.synthetic, header.dtype) == (True, "bf16")
    assert record["digest"] == trace.digest
    assert record["synthetic"]
    assert record["law"]["source_digest"] in header.made_by
    assert list(record["statistics"]) == ["source", "like_source", "written"]
    assert all(list(portrait) == list(LABELS) for portrait in record["statistics"].values())
    assert trace.scores is not None
    assert trace.lookahead_depth == 3


def test_dimensions_may_be_given_and_else_are_the_sources(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    options = ("--experts", "48", "--seed", "3", "--no-scores", "--lookahead-recall", "0.9")
    said = run(small, "--out", out, *SHORT, *options)
    trace, own = store.load(out), store.load(small).header
    assert (trace.header.layers, trace.header.experts, trace.header.top_k) == (own.layers, 48, own.top_k)
    assert trace.header.expert_bytes == own.expert_bytes
    assert trace.scores is None
    assert trace.lookahead_depth == 1
    assert "overlap of tokens 1 apart" in said
    assert "written, 4x48x4" in said
    assert said.rstrip().endswith(f"{out}: 32 tokens, synthetic, digest {trace.digest}")


def test_other_layers_take_the_largest_expert_of_the_source(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.safetensors"
    run(small, "--out", out, *SHORT, "--layers", "2", "--lookahead-recall", "none")
    trace = store.load(out)
    assert trace.header.expert_bytes == (max(store.load(small).header.expert_bytes),) * 2
    assert trace.lookahead is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mixd",), "trace must be a known name, got 'mixd' (did you mean mixed?)"),
        (("mixed", "--model", "qwen2-57b-a14"), "model must be a known name, got 'qwen2-57b-a14' (did you mean"),
        (
            ("mixed", "--model", "qwen2-57b-a14b", "--top-k", "2"),
            "top-k must not be given together with model, got 2 and qwen2-57b-a14b",
        ),
        (("mixed", "--top-k", "33"), "top-k must be from 1 to 32, got 33"),
        (
            ("mixed", "--prompt-tokens", "0", "--new-tokens", "0"),
            "prompt-tokens + new-tokens must be at least 1, got 0",
        ),
        (
            ("mixed", "--lookahead-recall", "a"),
            "lookahead-recall must be shares with commas as 0.9,0.8, or none, got 'a'",
        ),
        (("mixed", "--lookahead-recall", "1.5"), "lookahead-recall must be from 0.0 to 1.0, got 1.5"),
    ],
)
def test_a_mistake_is_told_before_anything_is_fitted(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sim.cli_like.fit", pytest.fail)
    with pytest.raises(InputError) as error:
        run(*arguments, "--out", tmp_path / "t.safetensors")
    assert str(error.value).startswith(message)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_is_kept(small: Path) -> None:
    with pytest.raises(InputError, match="out must be a new file"):
        run("mixed", "--out", small)

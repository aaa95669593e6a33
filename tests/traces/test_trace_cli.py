"""``moetwin trace info|check|synth``, and the examples of the format's page."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from traces import InputError, TraceError, TraceHeader, store
from traces.cli import app
from traces.schema import DTYPES
from traces.synthetic import GENERATORS

FORMAT_PAGE = Path(__file__).parents[2] / "docs" / "trace-format.md"
SMALL = ("--sequences", "2", "--prompt-tokens", "4", "--new-tokens", "3", "--layers", "2", "--experts", "6")


def run(*arguments: str | Path) -> str:
    """Runs the command and returns what it printed; its errors are raised as they are."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.safetensors"
    run("synth", "markov", "--locality", "0.5", "--out", path, *SMALL, "--expert-bytes", "900,800")
    return path


def test_synth_writes_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    options = ("--top-k", "3", "--skew", "0.5", "--scores", "--lookahead", "2", "--lookahead-recall", "0.75")
    said = run("synth", "phase_change", "--period", "5", "--seed", "7", "--out", path, *SMALL, *options)
    trace = store.load(path, verify=True)
    assert trace.digest in said
    assert trace.header.made_by == (
        "phase_change(seed=7, period=5, sequences=2, prompt_tokens=4, new_tokens=3, layers=2, experts=6, top_k=3, "
        "expert_bytes=1048576, skew=0.5, scores=True, lookahead=2, lookahead_recall=0.75)"
    )
    assert trace.lookahead_depth == 2
    assert trace.scores is not None


def test_expert_bytes_may_differ_between_layers(file: Path) -> None:
    assert store.load(file).header.expert_bytes == (900, 800)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("synth", "zip"), "generator must be a known name, got 'zip'"),
        (("synth", "zipf", "--top-k", "33"), "top-k must be from 1 to 32, got 33"),
        (("synth", "zipf", "--locality", "0.5"), "locality must be left out for zipf, got 0.5"),
        (("synth", "zipf", "--expert-bytes", "1,x"), "expert-bytes must be a whole number.* got '1,x'"),
        (
            ("synth", "zipf", "--sequences", "99999999", "--new-tokens", "999999"),
            r"sequences x tokens x layers must fit the host's free memory \(.* GB\), got 99999999 x 1000063 x 8",
        ),
        (("synth", "zipf", "--expert-bytes", "1,2"), "expert-bytes must have one entry or 8 entries, got 2"),
        (("synth", "zipf", "--expert-bytes", "9" * 19), "expert-bytes must be a whole number up to 68719476736, or"),
        (("synth", "zipf", "--expert-bytes", "68719476737"), "expert-bytes must be from 0 to 68719476736, got 687"),
        (("synth", "zipf", "--layers", "9" * 26), "layers must be from 1 to 65536, got 9"),
        (("synth", "zipf", "--sequences", "9" * 26), "sequences must be from 1 to 2147483647, got 9"),
        (("synth", "zipf", "--prompt-tokens", "9" * 26), "prompt-tokens must be from 0 to 2147483647, got 9"),
        (("synth", "zipf", "--new-tokens", "9" * 26), "new-tokens must be from 0 to 2147483647, got 9"),
        (("synth", "zipf", "--lookahead", "9" * 26), "lookahead must be from 0 to 65536, got 9"),
        (("synth", "phase_change", "--period", "9" * 26), "period must be from 1 to 2147483647, got 9"),
    ],
)
def test_synth_refuses_and_writes_nothing(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*arguments, "--out", tmp_path / "t.safetensors")
    assert not list(tmp_path.iterdir())


def test_synth_replaces_a_file_only_by_force(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(InputError, match="out must be a new file"):
        run("synth", "zipf", "--out", file)
    with pytest.raises(TraceError, match=r"out must end in \.safetensors, .* got .*trace\.csv"):
        run("synth", "zipf", "--out", file.with_suffix(".csv"))
    assert file.read_bytes() == before
    run("synth", "zipf", "--out", file, "--force", *SMALL)
    assert store.load(file).header.model == "zipf"


def test_every_generator_is_in_the_help() -> None:
    said = run("synth", "--help")
    assert all(name in said for name in GENERATORS)


def test_info_as_json(file: Path) -> None:
    record = json.loads(run("info", file, "--json"))
    assert record["tokens"] == {"total": 14, "prefill": 8, "decode": 6}
    assert record["sequences"] == 2
    assert record["steps"] == 8
    assert record["digest"] == store.load(file).digest
    assert record["file_bytes"] == file.stat().st_size
    assert record["header"]["expert_bytes"] == [900, 800]
    assert record["layers"]["mean_union_decode"] == [4.0, 4.0]
    assert record["chance_overlap"] == pytest.approx(4 / 6)


def test_info_as_tables(file: Path) -> None:
    said = run("info", file)
    for words in ("markov", "14 (8 prefill, 6 decode)", "800 to 900", "expert_ids [14, 2, 4]", "chance 0.667", "4.000"):
        assert words in said
    assert store.load(file).digest in said


def test_info_shows_a_dash_where_there_is_no_value(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    run("synth", "zipf", "--out", path, "--prompt-tokens", "0", "--new-tokens", "3", "--layers", "1")
    last = run("info", path).splitlines()[-1].split()
    assert last[0] == "mean"
    assert last[3:] == ["-", "4.000"]


def test_check_accepts_a_good_trace(file: Path) -> None:
    assert "ok, 14 tokens of markov, digest matches" in run("check", file)
    assert "ok" in run("check", file, "--model", "markov")
    assert "ok" in run("check", file, "--model", "2x6x4")


@pytest.mark.parametrize("model", ["mixtral", "2x6x2", "8x32x4"])
def test_check_refuses_another_model(file: Path, model: str) -> None:
    with pytest.raises(TraceError, match=rf"trace.safetensors: model must be {model}, got markov \(2x6x4\)"):
        run("check", file, "--model", model)


def test_check_finds_a_changed_value(file: Path) -> None:
    content = bytearray(file.read_bytes())
    layout = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    start = 8 + int.from_bytes(content[:8], "little") + layout["token_ids"]["data_offsets"][0]
    content[start] ^= 1
    file.write_bytes(content)
    with pytest.raises(TraceError, match=r"digest must be .* \(the content was changed\)"):
        run("check", file)


def test_check_finds_a_truncated_file(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(TraceError, match="truncated"):
        run("check", file)


def examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", FORMAT_PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)


def run_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for example in examples():
        exec(example, names)
    return names


def test_the_examples_of_the_format_page_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_examples(tmp_path, monkeypatch)
    assert capsys.readouterr().out == "my-model 3 [3, 0]\n"
    assert "ok, 3 tokens of my-model, no digest stored" in run("check", "hand.safetensors", "--model", "2x4x2")


def test_the_digest_is_what_the_format_page_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run_examples(tmp_path, monkeypatch)
    header, tensors = names["header"], names["tensors"]
    dims = {name: header[name] for name in ("schema_version", "layers", "experts", "top_k", "expert_bytes")}
    sha = hashlib.sha256(json.dumps(dims, sort_keys=True).encode())
    for name in ("expert_ids", "token_ids", "sequence", "position", "step", "phase"):
        sha.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode() + tensors[name].tobytes())
    assert store.load("hand.safetensors").digest == sha.hexdigest()


def test_the_format_page_names_every_field_and_tensor(file: Path) -> None:
    page = FORMAT_PAGE.read_text(encoding="utf-8")
    for name in [*DTYPES, *TraceHeader.model_fields]:
        assert f"`{name}`" in page


def test_a_tensor_changed_in_place_is_named(file: Path) -> None:
    header = store.load(file).header
    tensors = load_file(file) | {"gates": np.full((14, 2, 4), np.nan, dtype=np.float16)}
    save_file(tensors, file, metadata={"moetwin_trace": header.model_dump_json()})
    with pytest.raises(TraceError, match=r"trace.safetensors: gates must be finite"):
        run("info", file)

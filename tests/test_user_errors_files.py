"""Mistakes in files and sizes that a user gives, and what runs that succeed must not spoil or say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w

from real.cli import choose
from real.jobs import announce
from real.outputs import fastest
from real.quant import QUANTS
from sim.results import RunResult
from sim.target import DTYPE_OF, parse_bytes
from tests.commanding import SMALL, refused, run
from tests.sim.test_profile import MODEL, profile
from traces import store, synthetic
from traces.errors import InputError
from traces.prompts import Prompt, load_prompts
from traces.schema import TraceHeader, WeightDtype

pytestmark = pytest.mark.usefixtures("own_folder")


def test_simulate_writes_into_the_working_folder_beside_other_files(tmp_path: Path) -> None:
    short = store.save(synthetic.generate("zipf", 0, SMALL), "short.safetensors")
    words = ("simulate", str(short), "--model", "moetwin-small", "--out", ".")
    assert refused(*words).startswith("error: out must be an empty or new folder (or give --force), got .")
    for _ in range(2):
        assert run(*words, "--force").exit_code == 0
    assert (tmp_path / "run.json").exists()
    assert (tmp_path / "afile").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("made_by", "message"),
    [
        ("moetwin trace record --seed -1", "seed must be from 0 to"),
        ("moetwin trace record --seed one", "made_by must be a command"),
        ("moetwin trace record --seed", "made_by must be a command"),
        ("moetwin trace record --model 'x", "made_by must be a command"),
        ("moetwin trace record --speed 1", "made_by must be a command"),
        ("by hand", "made_by must be a command"),
    ],
)
def test_a_trace_made_by_something_else_cannot_be_recorded_again(made_by: str, message: str) -> None:
    trace = synthetic.generate("zipf", 0, SMALL)
    other = store.save(with_header(trace, made_by=made_by), "other.safetensors")
    assert refused("trace", "record", "--like", str(other)).startswith(f"error: {message}")


def with_header(trace: Any, **changed: Any) -> Any:
    arrays = dict(trace.arrays())
    return type(trace).of(TraceHeader.of({**trace.header.model_dump(), **changed}), **arrays)


@pytest.mark.parametrize("size", ["9" * 400, "1" + "0" * 18, "1." + "0" * 10, "٣GiB", "1e3", "-1"])
def test_a_size_without_sense_is_refused(size: str) -> None:
    message = refused("simulate", "mixed", "--gpu-memory", size)
    assert message.startswith("error: gpu-memory must be a size such as 8GiB or 500MB, got")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("8GiB", 8 << 30),
        (" 0.1 gb ", 10**8),
        ("9" * 18, int("9" * 18)),
        ("1.5KiB", 1536),
        ("1TiB", 1 << 40),
        ("2tb", 2 * 10**12),
        ("3 MB", 3 * 10**6),
    ],
)
def test_a_size_is_read_to_the_byte(size: str, expected: int) -> None:
    assert parse_bytes(size, "memory") == expected


def raw_trace(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A trace file whose JSON header was changed by hand."""
    whole = store.save(synthetic.generate("zipf", 0, SMALL), path, force=True).read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    layout = json.loads(whole[8:end])
    change(layout)
    text = json.dumps(layout).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[end:])
    return path


@pytest.mark.parametrize("command", ["trace info", "trace check", "simulate"])
def test_a_trace_without_metadata_is_refused(command: str, tmp_path: Path) -> None:
    file = raw_trace(tmp_path / "t.safetensors", lambda layout: layout.update({"__metadata__": None}))
    message = refused(*command.split(), str(file))
    assert message.endswith("metadata must have the entry moetwin_trace, got none")
    assert store.stored_digest(file) is None


@pytest.mark.parametrize("command", ["trace check", "simulate"])
def test_a_trace_of_another_weight_type_is_refused(command: str, tmp_path: Path) -> None:
    def change(layout: dict[str, Any]) -> None:
        header = json.loads(layout["__metadata__"]["moetwin_trace"]) | {"dtype": "int3"}
        layout["__metadata__"]["moetwin_trace"] = json.dumps(header)

    message = refused(*command.split(), str(raw_trace(tmp_path / "t.safetensors", change)))
    assert "dtype must be 'float32', 'bfloat16', 'float16', 'fp32', 'bf16' or 'fp16', got 'int3'" in message


def test_every_weight_type_of_a_header_is_known_to_the_simulator() -> None:
    assert set(DTYPE_OF) == set(get_args(WeightDtype))
    assert set(DTYPE_OF.values()) == {"fp32", "bf16", "fp16"}


def test_half_a_surrogate_pair_in_a_prompt_is_refused_with_its_line(tmp_path: Path) -> None:
    good = json.dumps({"domain": "a", "text": "smile \U0001f600"})
    for field in ("domain", "text"):
        bad = json.dumps({"domain": "a", "text": "b", field: "x\ud800"})
        (tmp_path / "p.jsonl").write_text(f"{good}\n{bad}\n", encoding="utf-8")
        with pytest.raises(InputError, match=rf"line 2: {field} must hold whole characters, got '\\ud800' at 1"):
            load_prompts(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text(good, encoding="utf-8")
    assert load_prompts(tmp_path / "p.jsonl")[0].text.endswith("\U0001f600")


class _Machine:
    """As much of a machine as showing the prompts needs: a token's text is its number."""

    @staticmethod
    def text(tokens: list[int]) -> str:
        return " ".join(map(str, tokens))


def test_each_prompt_is_shown_before_its_continuation(capsys: pytest.CaptureFixture[str]) -> None:
    show = announce(_Machine(), [[1, 2], [3, 4]])  # type: ignore[arg-type]
    for index in (0, 1):
        show(index)
        print(f"<{index}>", end="")
    assert capsys.readouterr().out == "\n1 2<0>\n\n3 4<1>"


def test_a_profile_of_another_format_says_the_way_out_and_the_way_works(tmp_path: Path) -> None:
    sizes = synthetic.Sizes(sequences=1, prompt_tokens=2, new_tokens=2, layers=4, experts=8, top_k=2)
    store.save(synthetic.generate("zipf", 0, sizes), "t.safetensors")
    for dtype in ("fp32", "bf16"):
        profile(model=MODEL.in_dtype(dtype)).save(tmp_path / f"{dtype}.toml")

    def words(dtype: str, measured: str) -> list[str]:
        fields = {**MODEL.model_dump(), "dtype": dtype}
        (tmp_path / "mine.toml").write_text(tomli_w.dumps(fields), encoding="utf-8")
        return ["simulate", "t.safetensors", "--model", "mine.toml", "--profile", f"{measured}.toml"]

    assert refused(*words("bf16", "fp32")).endswith(", got fp32 (calibrate with --dtype bf16)")
    assert run(*words("bf16", "bf16")).exit_code == 0
    assert refused(*words("fp32", "bf16")).endswith(", got bf16 (calibrate with --dtype fp32)")
    assert refused(*words("fp32", "fp32")).endswith(
        "with expert_bits 16.0, as in the model, got 32.0 (simulate with --quant fp32)"
    )
    assert run(*words("fp32", "fp32"), "--quant", "fp32").exit_code == 0


def test_a_profile_of_quantised_experts_is_that_of_the_simulated_format(tmp_path: Path) -> None:
    sizes = synthetic.Sizes(sequences=1, prompt_tokens=2, new_tokens=2, layers=4, experts=8, top_k=2)
    store.save(synthetic.generate("zipf", 0, sizes), "t.safetensors")
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(MODEL.model_dump()), encoding="utf-8")
    words = ["simulate", "t.safetensors", "--model", "mine.toml", "--profile"]
    for quant, how in QUANTS.items():
        profile(model=MODEL.model_copy(update={"expert_bits": how.bits})).save(tmp_path / f"{quant}.toml")
        assert refused(*words, f"{quant}.toml").endswith(f"got {how.bits} (simulate with --quant {quant})")
        assert run(*words, f"{quant}.toml", "--quant", quant).exit_code == 0
    profile(model=MODEL.model_copy(update={"expert_bits": 5.0})).save(tmp_path / "odd.toml")
    assert refused(*words, "odd.toml").endswith("got 5.0 (simulate with --model-set expert_bits=5)")
    assert run(*words, "odd.toml", "--model-set", "expert_bits=5").exit_code == 0


def test_repeats_are_written_side_by_side(tmp_path: Path) -> None:
    file = store.save(synthetic.generate("zipf", 0, SMALL), "t.safetensors")
    words = ("decode", "--routing", str(file), "--device", "cpu", "--out", "run", "--json")
    result = run(*words, "--repeats", "3")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["result"] == "run, run-2, run-3"
    names = ("run", "run-2", "run-3")
    runs = [RunResult.load(tmp_path / name) for name in names]
    shown_name = names[fastest(runs)]
    assert told["shown"] == f"{shown_name}, whose median token is the fastest of 3 repeats"
    shown = RunResult.load(tmp_path / shown_name).headline()["time_per_output_token_p50_s"]
    assert told["time_per_output_token_p50_s"] == shown
    assert shown == min(run.headline()["time_per_output_token_p50_s"] for run in runs)
    assert [type(told[name]) for name in ("decode_tokens", "misses", "tokens_per_s")] == [int, int, float]
    assert {one.info.trace_digest for one in runs} == {runs[0].info.trace_digest}
    assert runs[0].operations.equals(runs[2].operations)
    assert not runs[0].tokens.end_s.equals(runs[2].tokens.end_s)
    assert refused(*words, "--repeats", "2").startswith("error: out must be an empty or new folder")


def test_repeats_of_the_working_folder_stand_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = store.save(synthetic.generate("zipf", 0, SMALL), tmp_path / "t.safetensors")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = ("decode", "--routing", str(file), "--device", "cpu", "--out", ".", "--repeats", "2", "--json")
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["result"] == f"., {tmp_path / 'here-2'}"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"here", "here-2"}


def test_a_long_prompt_is_cut_without_a_word(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("word " * 4000)
    with caplog.at_level("WARNING"):
        result = run("decode", "--prompts", "long.txt", "--max-new-tokens", "1", "--device", "cpu", "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert caplog.records == []


@pytest.mark.parametrize("domains", [None, "a", " b ,, a "])
def test_domains_choose_prompts_in_the_order_of_the_file(domains: str | None) -> None:
    prompts = [Prompt("a", "1"), Prompt("b", "2"), Prompt("a", "3"), Prompt("c", "4")]
    wanted = {"a", "b", "c"} if domains is None else {name for name in domains if name in "abc"}
    assert choose(prompts, domains) == [prompt for prompt in prompts if prompt.domain in wanted]

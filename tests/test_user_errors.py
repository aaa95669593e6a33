"""Mistakes on the command line: each is one line and exit code 2, found before the work; and examples that hold."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w
from typer.testing import CliRunner, Result

import moetwin
from real import cli_run
from real.cli import RecordOptions, choose
from real.cli_run import _fastest
from real.generate import Sampler
from real.jobs import announce
from sim.results import RunResult
from sim.spec import catalogue
from sim.systems import SystemSpec
from sim.target import DTYPE_OF, parse_bytes
from tests.sim.test_profile import MODEL, profile
from traces import store, synthetic
from traces.errors import InputError
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import TraceHeader, WeightDtype
from traces.shipped import find_trace


def run(*words: str) -> Result:
    return CliRunner().invoke(moetwin.app, list(words))


def refused(*words: str) -> str:
    """The error of a command that must end with exit code 2, which is one line on stderr."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "afile").write_text("mine")


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded, or a trace is read to be simulated."""
    monkeypatch.setattr(cli_run, "machine_of", pytest.fail)
    monkeypatch.setattr("sim.cli_run.load_trace", pytest.fail)
    monkeypatch.setattr("real.cli.record_with", pytest.fail)


def test_simulate_writes_into_the_working_folder_beside_other_files(tmp_path: Path) -> None:
    short = store.save(synthetic.generate("zipf", 0, SMALL), "short.safetensors")
    words = ("simulate", str(short), "--model", "moetwin-small", "--out", ".")
    assert refused(*words).startswith("error: out must be an empty or new folder (or give --force), got .")
    for _ in range(2):
        assert run(*words, "--force").exit_code == 0
    assert (tmp_path / "run.json").exists()
    assert (tmp_path / "afile").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


OLMOE = "--model olmoe-1b-7b --random-weights"
SMALL = synthetic.Sizes(sequences=1, prompt_tokens=2, new_tokens=2, layers=8, experts=32, top_k=4)


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("simulate mixed --out afile/x", "out must be a folder that can be written, got afile/x"),
        ("simulate mixed --out afile", "out must be a folder, got the file afile"),
        ("decode --prompt a --out afile/x", "out must be a folder that can be written, got afile/x"),
        ("simulate mixed --batch 0", "batch must be greater than or equal to 1, got '0'"),
        ("simulate mixed --cache=", "cache must be a number of slots or a percentage, got ''"),
        (
            "simulate mixed --synchronous --prefetch next-router",
            "prefetch must be none with synchronous (demand only), got next-router",
        ),
        ("decode --prompt a --trace-out afile/x", "trace-out must be a file that can be written, got afile/x"),
        ("decode --prompt a --trace-out . --force", "trace-out must be a file, got the folder ."),
        (
            "decode --prompt a --out n.safetensors --trace-out n.safetensors",
            "trace-out must be apart from the folder of out",
        ),
        (
            "decode --prompt a --out n --trace-out ./x/../n/t.safetensors",
            "trace-out must be apart from the folder of out, got",
        ),
        (
            "decode --prompt a --out n.safetensors/t --trace-out n.safetensors",
            "trace-out must be apart from the folder of out",
        ),
        ("decode --prompt a --evict belady", "evict must be causal to decode prompts, got belady (replay a trace"),
        ("decode --prompt a --evict static", "calibration must be given for static, a trace apart from"),
        ("decode --prompt a --cache 0", "cache must be between 1 and 32 slots, got 0 which is 0"),
        ("decode --prompt a --cache=", "cache must be a number of slots or a percentage, got ''"),
        ("decode --prompt a --gpu-memory 1MB", "gpu-memory must be at least 8241920 bytes"),
        ("decode --prompt a --gpu-memory x", "gpu-memory must be a size such as 8GiB or 500MB, got 'x'"),
        ("decode --prompt a --dtype int99", "dtype must be a known name, got 'int99' (one of bf16, fp16, fp32)"),
        ("decode --routing olmoe.safetensors", "trace layers must be 8 as in moetwin-small, got 16"),
        ("decode --routing plain.safetensors --prefetch next-router", "trace must have look-ahead of depth 1"),
        ("decode --domains=", "domains must name at least one domain, got ''"),
        ("decode --domains ,", "domains must name at least one domain, got ','"),
        ("trace record --out x.safetensors --domains ,", "domains must name at least one domain, got ','"),
        ("decode --routing code --domains=", "routing must be given without prompts, domains and trace-out, got both"),
        ("decode --prompt a --domains=", "prompt must be given without prompts and domains, got both"),
        ("decode --routing code --repeats 3", "out must be given for 3 repeats, which are written side by side"),
        ("calibrate --out afile/x.toml", "out must be a file that can be written, got afile/x.toml"),
        ("calibrate --out afile", "out must be a new file (or give --force), got afile"),
        ("calibrate --out .", "out must be a file, got the folder ."),
        ("calibrate --out . --force", "out must be a file, got the folder ."),
        ("trace record --out afile/x", "out must be a file that can be written, got afile/x"),
        ("trace synth zipf --out afile/x", "out must be a file that can be written, got afile/x"),
        ("decode --prompt \ud800", "prompt must hold whole characters, got '\\ud800' at 0"),
        ("decode --temperature -1", "temperature must be at least 0 and finite, got -1.0"),
        ("decode --repeats 3", "repeats must be 1 without routing, got 3"),
        ("decode --routing code --domains speeches", "routing must be given without prompts, domains and trace-out"),
        ("decode --routing code --repeats 0", "repeats must be greater than or equal to 1, got '0'"),
        (
            "decode --routing code --repeats 2 --out runs",
            "out must be an empty or new folder (or give --force), got runs-2",
        ),
        (
            "decode --routing code --repeats 2 --out old --force",
            "out must have no folder of more repeats beside it, got old-3, which exists",
        ),
        ("decode --model olmoe-1b-7b --random-weights", "routing must be given with random-weights"),
        (f"decode {OLMOE} --routing code", "trace layers must be 16 as in olmoe-1b-7b, got 8"),
        (f"decode {OLMOE} --routing olmoe.safetensors --gpu-memory 1MiB", "gpu-memory must be at least"),
        (f"decode {OLMOE} --routing olmoe.safetensors --dtype int8", "dtype must be a known name, got 'int8'"),
        (
            "decode --model moetwin-small --random-weights --routing code",
            "random-weights must go with a catalogue model",
        ),
        (
            "decode --model nowhere.toml --random-weights --routing code",
            "model file must be readable, got nowhere.toml",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_work(words: str, message: str, tmp_path: Path) -> None:
    store.save(synthetic.generate("zipf", 0, replace(SMALL, layers=16, experts=64, top_k=8)), "olmoe.safetensors")
    store.save(synthetic.generate("zipf", 0, SMALL), "plain.safetensors")
    (tmp_path / "old-3").mkdir()
    (tmp_path / "runs-2").mkdir()
    (tmp_path / "runs-2" / "mine").touch()
    assert refused(*words.split(" ")).startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("decode --prompt a --dtype fp8", "dtype must be a known name, got 'fp8' (did you mean fp32 or fp16?)"),
        ("decode --model moetwin-smal", "model must be a known name, got 'moetwin-smal' (did you mean moetwin-small?)"),
        ("decode --prompt a --device gpu", "device must be cpu, cuda or auto, got 'gpu'"),
        ("calibrate --out x --device gpu", "device must be cpu, cuda or auto, got 'gpu'"),
        (
            "trace record --out x.safetensors --lookahead 99",
            "lookahead must be from 0 to 7 for this model's layers, got 99",
        ),
        (
            "trace record --out x.safetensors --lookahead -1",
            "lookahead must be from 0 to 7 for this model's layers, got -1",
        ),
        ("trace record --out x.safetensors --temperature -1", "temperature must be at least 0 and finite, got -1.0"),
        ("trace record --out x.safetensors --batch 0", "batch must be greater than or equal to 1, got '0'"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_it_is_loaded(
    words: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("real.models.load._load_checkpoint", pytest.fail)
    assert refused(*words.split(" ")) == f"error: {message}"


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    "command",
    [
        "decode --prompt a",
        "calibrate --out x",
        "trace record --out x.safetensors",
        SYNTH := "trace synth zipf --out x.safetensors",
    ],
)
@pytest.mark.parametrize("seed", [-1, 2**63, 10**26])
def test_a_seed_beyond_63_bits_is_refused(command: str, seed: int, tmp_path: Path) -> None:
    message = refused(*command.split(), "--seed", str(seed))
    assert message.startswith("error: seed must be ")
    assert message.endswith(f", got '{seed}'")
    assert [path.name for path in tmp_path.iterdir()] == ["afile"]


def test_the_largest_seed_is_taken(tmp_path: Path) -> None:
    assert run(*SYNTH.split(), "--seed", str(2**63 - 1), "--new-tokens", "2", "--sequences", "1").exit_code == 0
    Sampler(seed=2**63 - 1)
    assert RecordOptions(seed=2**63 - 1).seed == 2**63 - 1


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
    ("size", "expected"), [("8GiB", 8 << 30), (" 0.1 gb ", 10**8), ("9" * 18, int("9" * 18)), ("1.5KiB", 1536)]
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


def test_repeats_are_written_side_by_side(tmp_path: Path) -> None:
    file = store.save(synthetic.generate("zipf", 0, SMALL), "t.safetensors")
    words = ("decode", "--routing", str(file), "--device", "cpu", "--out", "run", "--json")
    result = run(*words, "--repeats", "3")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["result"] == "run, run-2, run-3"
    names = ("run", "run-2", "run-3")
    runs = [RunResult.load(tmp_path / name) for name in names]
    fastest = names[_fastest(runs)]
    assert told["shown"] == f"{fastest}, whose median token is the fastest of 3 repeats"
    shown = RunResult.load(tmp_path / fastest).headline()["time_per_output_token_p50_s"]
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("decode --prompt a --max-new-tokens 2200", "prompt and max-new-tokens must together be at most the model's"),
        ("decode --prompt a --max-new-tokens 4 --gpu-memory 8241920 --prefetch next-router", ""),
        (
            "trace record --out x.safetensors --max-new-tokens 2048 --domains speeches",
            "prompt and max-new-tokens must together",
        ),
        ("simulate mixed --out /proc/x", "out must be a folder that can be written, got /proc/x"),
    ],
)
def test_nothing_but_an_error_is_told_outside_a_terminal(words: str, message: str) -> None:
    result = run(*words.split())
    lines = result.stderr.splitlines()
    assert result.exit_code == (2 if message else 0), result.output
    assert [line.startswith(f"error: {message}") for line in lines] == ([True] if message else [])


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


def commands() -> Iterator[tuple[str, Any]]:
    """Every command with its words, such as "trace record"."""
    for name, entry in moetwin.ENTRIES.items():
        command = moetwin._load(entry, name)
        if not hasattr(command, "commands"):
            yield name, command
            continue
        for own, below in command.commands.items():
            borrowed = entry.more.get(own)
            yield f"{name} {own}", below if borrowed is None else moetwin._load(borrowed, own)


COMMANDS = dict(commands())


def mistakes(command: Any) -> Iterator[tuple[list[str], str]]:
    """Words that a command's parser must refuse, and how the error about each begins."""
    needed = [one for one in command.params if one.required]
    given = [word for one in needed for word in ([] if one.param_type_name == "argument" else one.opts[:1]) + ["x"]]
    yield ["--no-such-option"], "option must be a known name, got '--no-such-option' ("
    if needed:
        yield [], f"{needed[0].opts[0].lstrip('-')} must be given, got nothing"
    if all(one.nargs == 1 for one in command.params):
        yield [*given, "one-too-many"], "Got unexpected extra argument"
    taking = [one for one in command.params if one.param_type_name == "option" and not one.is_flag]
    for one in taking:
        yield [*given, one.opts[0]], f"Option '{one.opts[0]}' requires an argument"
    for one in taking:
        if type(one.default) in (int, float):
            yield [*given, one.opts[0], "x"], f"{one.opts[0][2:]} must be a valid "


@pytest.mark.parametrize("name", COMMANDS)
def test_every_usage_error_of_every_command_is_one_line(name: str) -> None:
    found = list(mistakes(COMMANDS[name]))
    assert len(found) >= 2
    for words, message in found:
        assert refused(*name.split(), *words).startswith(f"error: {message}"), words


@pytest.mark.parametrize("name", ["", "trace", "models", "hardware"])
def test_usage_errors_of_a_group_are_one_line(name: str) -> None:
    words = name.split()
    assert refused(*words, "--hlep").startswith("error: option must be a known name, got '--hlep' (did you mean --help")
    assert refused(*words, "chow").startswith("error: command must be a known name, got 'chow' (")
    alone = run(*words)
    assert alone.exit_code == 2
    assert "Usage: " in alone.output
    assert "error:" not in alone.output


def test_a_mistyped_option_offers_options_alone_both_ways_of_a_switch() -> None:
    assert "(did you mean --no-events or " in refused("simulate", "mixed", "--no-event")
    message = refused("simulate", "mixed", "--trace", "x")
    offered = message.partition("(did you mean ")[2].rstrip("?)").split(" or ")
    assert offered
    assert all(name.startswith("--") for name in offered)


def test_a_mistyped_option_offers_the_near_ones() -> None:
    assert refused("decode", "--repeat", "2").endswith(
        "got '--repeat' (did you mean --repeats or --temperature or --prefetch?)"
    )


EXAMPLES = [
    (name, command, example.strip())
    for name, command in COMMANDS.items()
    for example in re.findall(r"(?:^|Examples?:) *(moetwin .*)$", command.help or "", re.MULTILINE)
]


def test_every_command_has_an_example_of_its_own() -> None:
    assert set(COMMANDS) == {name for name, _, _ in EXAMPLES}


@pytest.mark.parametrize(("name", "command", "example"), EXAMPLES, ids=[example for *_, example in EXAMPLES])
def test_an_example_of_the_help_is_a_command_with_names_that_exist(name: str, command: Any, example: str) -> None:
    words = shlex.split(example)
    assert words[: len(name.split()) + 1] == ["moetwin", *name.split()]
    given = command.make_context(name, words[len(name.split()) + 1 :]).params
    choose(load_prompts(SHIPPED_PROMPTS), given.get("domains") or None)
    policies = {kind: given[kind] for kind in ("evict", "place", "prefetch", "scope") if kind in given}
    assert SystemSpec(**policies)
    for trace in (given.get("trace"), given.get("routing")):
        assert trace is None or trace.endswith(".safetensors") or find_trace(trace).exists()
    assert given.get("generator", "zipf") in synthetic.GENERATORS
    model = given.get("model")
    assert model is None or "/" in model or model in [*catalogue.model_names(), "moetwin-small"] or "x" in model
    if name in ("simulate", "hardware show"):
        catalogue.hardware(given.get("hardware") or given.get("name") or catalogue.REFERENCE_MACHINE)

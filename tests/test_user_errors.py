"""Mistakes on the command line: each is one line and exit code 2, found before the work."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import moetwin
from benchmarks import replay_speed
from real import cli_run
from real.cli import RecordOptions
from real.generate import Sampler
from tests.commanding import SMALL, refused, run
from traces import store, synthetic
from traces.shipped import find_trace

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test when a model is loaded, or a trace is read to be simulated."""
    monkeypatch.setattr(cli_run, "machine_of", pytest.fail)
    monkeypatch.setattr("sim.scenario.load_trace", pytest.fail)
    monkeypatch.setattr("real.cli.record_with", pytest.fail)


OLMOE = "--model olmoe-1b-7b --random-weights"


@pytest.mark.usefixtures("_no_work")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("simulate mixed --out afile/x", "out must be a folder that can be written, got afile/x"),
        ("simulate mixed --out afile", "out must be a folder, got the file afile"),
        ("decode --prompt a --out afile/x", "out must be a folder that can be written, got afile/x"),
        ("simulate mixed --batch 0", "batch must be greater than or equal to 1, got '0'"),
        ("simulate mixed --cache=", "cache must hold something, got ''"),
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
        ("decode --prompt a --evict belady", "policies must be causal to decode prompts, got belady (replay a"),
        ("decode --prompt a --evict static", "calibration must be given for static, a trace apart from"),
        ("decode --prompt a --cache 0", "cache must be between 1 and 32 slots, got 0"),
        ("decode --prompt a --cache=", "cache must hold something, got ''"),
        ("decode --prompt a --device cpu --gpu-memory 1MB", "gpu-memory must be at least 8430600 bytes (8.43 MB = "),
        ("decode --prompt a --device cpu --context 4", "context must be at least the 65 tokens of a sequence, got 4"),
        ("decode --routing code --device cpu --context 4", "context must be at least the 319 tokens of a sequence"),
        ("decode --prompt a --stop=", "stop must hold something, got ''"),
        ("decode --prompt a --systems lru-baseline,x", "system must be a known name, got 'lru-baseline'"),
        ("decode --prompt a --systems hybrimoe,fiddler", "routing must be given to run 2 systems side by side"),
        (
            "decode --prompt a --systems fiddler --out n.safetensors --trace-out n.safetensors",
            "trace-out must be apart from the folder of out",
        ),
        ("decode --prompt a --model speechless", "model must have a tokenizer to read prompts, got speechless without"),
        ("decode --prompt a --gpu-memory x", "gpu-memory must be a size such as 8GiB or 500MB, got 'x'"),
        ("decode --prompt a --dtype int99", "dtype must be a known name, got 'int99' (one of bf16, fp16, fp32)"),
        ("decode --routing olmoe.safetensors", "trace layers must be 8 as in moetwin-small, got 16"),
        ("decode --routing plain.safetensors --prefetch next-router", "trace must have look-ahead of depth 1"),
        ("decode --domains=", "domains must hold something, got ''"),
        ("decode --domains ,", "domains must name at least one domain, got ','"),
        ("trace record --out x.safetensors --domains ,", "domains must name at least one domain, got ','"),
        ("decode --routing code --domains ,", "routing must be given without prompts and domains, got both"),
        ("decode --prompt a --domains ,", "prompt must be given without prompts and domains, got both"),
        ("decode --routing code --repeats 3", "out must be given for 3 repeats, which are written side by side"),
        ("calibrate --out afile/x.toml", "out must be a file that can be written, got afile/x.toml"),
        ("calibrate --out afile", "out must be a new file (or give --force), got afile"),
        ("calibrate --out .", "out must be a file, got the folder ."),
        ("calibrate --out x.txt", "out must end in .toml, as a profile is such a file, got x.txt"),
        ("calibrate --out . --force", "out must be a file, got the folder ."),
        ("trace record --out afile/x", "out must be a file that can be written, got afile/x"),
        ("trace check mixed --model moetwin-smal", "model must be a known name, got 'moetwin-smal' (did you mean"),
        ("trace check mixed --model olmoe-1b-7b", f"{find_trace('mixed')}: model must be olmoe-1b-7b"),
        (
            f"trace check {find_trace('mixed')} --model 8x32x5",
            f"{find_trace('mixed')}: model must be 8x32x5, got moetw",
        ),
        ("trace synth zipf --out afile/x", "out must be a file that can be written, got afile/x"),
        ("decode --prompt \ud800", "prompt must hold whole characters, got '\\ud800' at 0"),
        ("decode --temperature -1", "temperature must be 0, or at least 0.001 and finite, got -1.0"),
        ("decode --repeats 3", "repeats must be 1 without routing, got 3"),
        ("decode --routing code --domains speeches", "routing must be given without prompts and domains"),
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
        (
            f"decode {OLMOE} --routing code",
            "trace layers must be 16 as in olmoe-1b-7b, got 8 (`moetwin trace like` makes routing of any dimensions",
        ),
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
    (tmp_path / "speechless").mkdir()
    (tmp_path / "speechless" / "config.json").write_text('{"model_type": "qwen3_moe"}')
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
        ("calibrate --out x.toml --device gpu", "device must be cpu, cuda or auto, got 'gpu'"),
        (
            "trace record --out x.safetensors --lookahead 99",
            "lookahead must be from 0 to 7 for this model's layers, got 99",
        ),
        (
            "trace record --out x.safetensors --lookahead -1",
            "lookahead must be from 0 to 7 for this model's layers, got -1",
        ),
        (
            "trace record --out x.safetensors --temperature -1",
            "temperature must be 0, or at least 0.001 and finite, got -1.0",
        ),
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
    ("words", "message"),
    [
        ("decode --prompt a --max-new-tokens 2200", "prompt and max-new-tokens must together be at most the model's"),
        ("decode --prompt a --max-new-tokens 4 --device cpu --gpu-memory 8089952 --prefetch next-router --json", ""),
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


def test_an_interrupt_while_the_parser_is_imported_is_one_line(tmp_path: Path) -> None:
    """A parser that takes its time: the interrupt comes before anything of the command line has begun."""
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    program = "import sys; sys.path.insert(0, '.'); import moetwin"
    root = {"PYTHONPATH": str(Path(moetwin.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=root)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_benchmark_without_its_rival_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libcachesim", None)
    app = typer.Typer()
    app.command()(replay_speed.main)
    result = CliRunner().invoke(app, ["--accesses", "10"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "error: libcachesim must be installed (pip install '.[bench]'), got none\n"

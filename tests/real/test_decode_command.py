"""`moetwin decode` as it is typed: where text, figures and files go, on any checkpoint, with every option."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from real.calibrate import describe_machine
from real.cli import unused_lanes
from real.jobs import TraceJob
from real.models.load import dimensions, load, load_spec
from sim.presets import find_preset
from sim.profile import ProfileCosts
from sim.results import RunResult
from tests.commanding import SMALL, refused, run
from tests.real import tiny
from tests.real.test_memory import limits
from tests.sim.test_profile_runs import PROFILE
from traces import store, synthetic
from traces.errors import InputError

PROMPT = "def add(a, b):"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def decoded(*words: str) -> Any:
    result = run("decode", "--device", "cpu", *words, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_text_goes_to_standard_output_and_figures_to_standard_error() -> None:
    result = run("decode", "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "6", "--out", "run")
    assert result.exit_code == 0, result.output
    told = decoded("--prompt", PROMPT, "--max-new-tokens", "6")
    assert result.stdout == f"\n{PROMPT}{told['texts'][0]}\n"
    for label in ("tokens a second", "time to first token", "hit ratio", "copied to the device", "stalled"):
        assert label in result.stderr
    found = RunResult.load(Path("run"))
    copied = found.operations.bytes[found.operations.op == "copy"].sum()
    assert f"{copied / 1e6:,.1f} MB" in result.stderr
    assert "memory, planned" in result.stderr
    assert "roofline" in found.info.costs
    assert "cpu device" in result.stderr
    assert "roofline" not in result.stderr
    assert found.info.recorded == "experts and weights"
    assert "routing was recorded (experts and weights), which is a part of the dense layers' time" in found.info.notes
    assert f"{found.info.peak['host_resident_bytes'] / 1e6:,.1f} MB on the host" in result.stderr
    parts = [size for name, size in found.info.memory.items() if name.endswith("_bytes")]
    assert all(size > 0 for size in parts)
    assert found.info.memory["experts_bytes"] == found.info.capacity_bytes


@pytest.mark.parametrize("words", [("--prompt", PROMPT, "--max-new-tokens", "2"), ("--routing", "t.safetensors")])
def test_the_profile_that_policies_weigh_is_named_and_of_this_device(words: tuple[str, ...]) -> None:
    spec = dimensions("moetwin-small", dtype="fp32", random_weights=False)
    shape = {"layers": spec.moe_layers, "experts": spec.experts, "top_k": spec.top_k}
    store.save(synthetic.generate("zipf", 0, replace(SMALL, **shape)), "t.safetensors")
    profile = PROFILE.model_copy(update={"model": spec})
    profile.save(Path("here.toml"))
    told = decoded(*words, "--profile", "here.toml", "--out", "run")
    assert RunResult.load_info(Path("run")).costs == ProfileCosts(profile).name
    (note,) = [note for note in told["notes"] if note.startswith("the profile was measured with the processor unknown")]
    assert describe_machine()["processor"] in note
    profile.model_copy(update={"device": "cuda"}).save(Path("gpu.toml"))
    line = refused("decode", "--device", "cpu", *words, "--profile", "gpu.toml", "--out", "other")
    assert line == "error: profile must be measured on the device of the run, cpu, got one of cuda"
    assert not Path("other").exists()


def test_a_batch_is_shown_text_by_text_when_it_has_ended() -> None:
    prompts = [{"domain": "a", "text": PROMPT}, {"domain": "b", "text": "Once upon a time"}]
    Path("p.jsonl").write_text("".join(json.dumps(one) + "\n" for one in prompts), encoding="utf-8")
    words = ("--prompts", "p.jsonl", "--max-new-tokens", "4")
    alone = run("decode", "--device", "cpu", *words)
    together = run("decode", "--device", "cpu", *words, "--batch", "2")
    assert alone.exit_code == together.exit_code == 0, together.output
    assert together.stdout == alone.stdout
    assert together.stdout.count("\n\nOnce upon a time") == 1
    assert "lanes used" not in together.stderr


def test_lanes_that_find_no_prompt_are_told() -> None:
    told = decoded("--prompt", PROMPT, "--max-new-tokens", "2", "--batch", "3")
    assert "batch: 1 of 3 lanes used, as many as there are prompts" in told["notes"]
    assert unused_lanes(2, 2) == unused_lanes(2, 3) == []
    Path("one.txt").write_text(f"{PROMPT}\n\nand more\n", encoding="utf-8")
    words = ("--prompts", "one.txt", "--max-new-tokens", "2", "--max-prompt-tokens", "4", "--batch", "2")
    result = run("trace", "record", *words, "--out", "t.safetensors")
    assert result.exit_code == 0, result.output
    assert "note: batch: 1 of 2 lanes used, as many as there are prompts" in result.stderr.splitlines()


@pytest.mark.parametrize("words", [("decode",), ("trace", "record")])
def test_the_help_tells_what_a_file_of_prompts_holds(words: tuple[str, ...]) -> None:
    told = " ".join(run(*words, "--help").stdout.replace("│", " ").split())
    assert "A .txt file, which is one prompt whatever its lines, or a .jsonl file with a prompt a line" in told
    assert '{"domain": "mine", "text":' in told


def test_any_local_checkpoint_decodes() -> None:
    """One of another family, as transformers writes it, with the small model's tokenizer."""
    tokenizer = load("moetwin-small").tokenizer
    assert tokenizer is not None
    spec = tiny.SPECS["olmoe"].model_copy(update={"vocab": len(tokenizer)})
    load_spec(spec, model_type="olmoe", with_experts=True, seed=1).model.save_pretrained("mine")
    tokenizer.save_pretrained("mine")
    told = decoded("--model", "mine", "--prompt", PROMPT, "--max-new-tokens", "4", "--trace-out", "t.safetensors")
    assert told["model"] == "mine"
    assert told["decode_tokens"] == 3
    assert store.load(Path("t.safetensors")).digest == told["trace_digest"]
    kept = decoded("--model", "mine", "--prompt", PROMPT, "--max-new-tokens", "4", "--quant", "int8", "--dtype", "bf16")
    assert kept["capacity_bytes"] < told["capacity_bytes"] / 2


def test_a_checkpoint_without_a_tokenizer_replays_routing() -> None:
    sizes = replace(SMALL, layers=2, experts=8, top_k=2)
    store.save(synthetic.generate("zipf", 0, sizes), "t.safetensors")
    load_spec(tiny.SPECS["olmoe"], model_type="olmoe", with_experts=True).model.save_pretrained("mute")
    assert decoded("--model", "mute", "--routing", "t.safetensors")["decode_tokens"] == 2
    told = refused("decode", "--model", "mute", "--prompt", "a")
    assert told.startswith("error: model must have a tokenizer to read prompts, got mute without tokenizer_config.json")
    assert told.endswith("(--routing TRACE needs none)")


@pytest.mark.parametrize("words", [("--evict", "lru"), ("--batch", "2", "--prompts", "p.jsonl")])
def test_a_text_to_stop_at_ends_the_continuation(words: tuple[str, ...]) -> None:
    Path("p.jsonl").write_text(f"{json.dumps({'domain': 'a', 'text': PROMPT})}\n" * 2, encoding="utf-8")
    given = words if "--prompts" in words else (*words, "--prompt", PROMPT)
    whole = decoded(*given, "--max-new-tokens", "24")["texts"][0]
    wanted = whole[8:14]
    for text in decoded(*given, "--max-new-tokens", "24", "--stop", "no such text", "--stop", wanted)["texts"]:
        assert whole.startswith(text)
        assert wanted in text
        assert len(text) < len(whole)


def test_a_prompt_that_is_cut_is_told() -> None:
    told = decoded("--prompt", PROMPT * 3, "--max-prompt-tokens", "4", "--max-new-tokens", "2")
    assert told["workload"]["prompt_tokens"] == 4
    assert "prompts were cut after 4 tokens (--max-prompt-tokens): 1 of 1" in told["notes"]
    assert not any("cut" in note for note in decoded("--prompt", "a", "--max-new-tokens", "2")["notes"])


def test_a_system_of_a_file_and_policies_of_files_continue_a_prompt() -> None:
    Path("mine.toml").write_text('like = "mixtral-offloading"\nevict = "lfu"\n', encoding="utf-8")
    words = ("--prompt", PROMPT, "--max-new-tokens", "3")
    plain = decoded(*words)
    own = decoded(*words, "--system", "mine.toml", "--gpu-memory", "20MB", "--context", "512")
    assert (own["system"]["name"], own["system"]["evict"]) == ("mine", "lfu")
    assert own["memory"]["context"] == 512
    files = [f"{ROOT}/examples/{one}" for one in ("successors.py:Successors", "best_split.py:BestSplit")]
    theirs = decoded(*words, "--policy-file", files[0], "--policy-file", files[1], "--option", "prefetch.width=2")
    assert [theirs["system"][kind] for kind in ("prefetch", "place")] == files
    assert plain["texts"] == own["texts"] == theirs["texts"]


def test_systems_side_by_side_are_saved_together_and_their_memory_is_told() -> None:
    store.save(synthetic.generate("zipf", 0, SMALL), "t.safetensors")
    words = ("decode", "--device", "cpu", "--routing", "t.safetensors", "--systems")
    result = run(
        *words, "all-resident,fiddler,cpu-experts,pre-gated", "--cache", "25%", "--repeats", "2", "--out", "runs"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("left out: pre-gated: system must be one that real models can run")
    names = ("all-resident", "fiddler", "cpu-experts")
    assert {one.name for one in Path("runs").iterdir()} == {*names, *(f"{name}-2" for name in names)}
    runs = {name: RunResult.load(Path("runs") / name).info for name in names}
    assert runs["fiddler"].memory == runs["cpu-experts"].memory
    assert "experts held by each: 64 slots, 9.4 MB; all-resident 256 slots, 37.7 MB" in result.stdout
    assert "memory planned for each: " in result.stdout


def test_a_run_tells_the_trace_that_its_policies_were_given() -> None:
    """Also where the system needs none, as here: what a run was told is a part of what it is."""
    for number in (0, 1):
        store.save(synthetic.generate("zipf", number, SMALL), f"t{number}.safetensors")
    words = ("--routing", "t0.safetensors", "--evict", "lru")
    told = decoded(*words, "--calibration", "t1.safetensors")
    assert told["calibration_digest"] == store.load(Path("t1.safetensors")).digest
    assert decoded(*words)["calibration_digest"] == told["recorded"] == ""


def test_a_system_that_finds_no_room_is_left_out() -> None:
    trace, spec = synthetic.generate("zipf", 0, SMALL), load("moetwin-small").spec
    job = TraceJob(trace, [find_preset(name) for name in ("all-resident", "fiddler")], limits(cache="25%"), 1)
    largest = job.check(spec)

    def room(plan: Any) -> None:
        if plan.total_bytes >= largest.total_bytes:
            raise InputError("no room")

    job.find_room(room)
    assert job.left_out == {"all-resident": "no room"}

    def none(plan: Any) -> None:
        raise InputError("none at all")

    with pytest.raises(InputError, match="none at all"):
        job.find_room(none)


def test_the_seed_and_the_temperature_decide_the_text() -> None:
    def text(*words: str) -> str:
        return str(decoded("--prompt", "Once upon a time", "--max-new-tokens", "8", *words)["texts"][0])

    assert text("--temperature", "1", "--seed", "1") == text("--temperature", "1", "--seed", "1")
    assert text("--temperature", "1", "--seed", "1") != text("--temperature", "1", "--seed", "2")


def test_a_damaged_checkpoint_and_an_unknown_family_are_one_line() -> None:
    load_spec(tiny.SPECS["olmoe"], model_type="olmoe", with_experts=True).model.save_pretrained("mine")
    tiny.tokenizer().save_pretrained("mine")
    weights = Path("mine/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "mine" in refused("decode", "--model", "mine", "--prompt", "a", "--device", "cpu")
    Path("mine/config.json").write_text('{"model_type": "gpt2"}', encoding="utf-8")
    message = refused("decode", "--model", "mine", "--prompt", "a", "--device", "cpu")
    assert "gpt2" in message
    assert "mixtral" in message


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("decode", "--prompt", "a", "--device", "cuda")
    assert message == "error: device must be available, got cuda, and torch finds no CUDA device (try --device cpu)"

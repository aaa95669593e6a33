"""`moetwin simulate`: one system or several, what a person is told, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import moetwin
from sim.results import RunResult
from sim.spec import catalogue
from tests.sim.profiles import point, profile
from traces import store
from traces.edit import slice_trace
from traces.shipped import find_trace

PREFETCHER = """
from sim.policies import PrefetchPolicy

class Mine(PrefetchPolicy):
    defaults = {"width": 2}
    def candidates(self, view):
        first = (view.layer + 1) % self.context.layers * self.context.experts
        return [first + expert for expert in range(self.options["width"])]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with the first six sequences of the recording that ships, and a policy."""
    monkeypatch.chdir(tmp_path)
    mixed = store.load(find_trace("mixed"))
    store.save(slice_trace(mixed, sequences="0:6", tokens=60), tmp_path / "t.safetensors")
    store.save(slice_trace(mixed, sequences="6:12", tokens=60), tmp_path / "other.safetensors")
    Path("my.py").write_text(PREFETCHER)
    Path("e.toml").write_text('name = "hybrimoe"\n')
    return tmp_path


def simulate(*words: str) -> Result:
    return CliRunner().invoke(moetwin.app, ["simulate", "t.safetensors", *words])


def shown(*words: str) -> str:
    result = simulate(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


def records(*words: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in shown(*words, "--json").splitlines()]


def refused(*words: str) -> str:
    result = simulate(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line.removeprefix("error: ")


def test_a_published_system_runs_by_its_name() -> None:
    (record,) = records("--system", "hybrimoe", "--calibration", "other.safetensors")
    system = record["system"]
    assert isinstance(system, dict)
    assert system["name"] == "hybrimoe"
    assert (system["evict"], system["prefetch"], system["place"]) == ("mrs", "impact", "hybrimoe")
    memory = record["memory"]
    assert isinstance(memory, dict)
    assert memory["experts_bytes"] == record["capacity_bytes"]


def test_a_system_can_be_changed_and_says_so() -> None:
    (record,) = records("--system", "hybrimoe", "--evict", "lfu", "--option", "prefetch.depth=1")
    system = record["system"]
    assert isinstance(system, dict)
    assert system["name"] == "hybrimoe with evict lfu, prefetch.depth 1"
    assert system["options"] == {"prefetch": {"depth": 1}}


def test_an_eviction_policy_with_a_set_of_its_own_takes_the_place_of_the_first_set() -> None:
    for evict, start in (("static-uniform", ""), ("lru", "static-uniform")):
        (record,) = records("--system", "hybrimoe", "--evict", evict)
        system = record["system"]
        assert isinstance(system, dict)
        assert (system["name"], system["starts_with"]) == (f"hybrimoe with evict {evict}", start)


def test_what_was_not_calibrated_is_told() -> None:
    assert "no calibration trace was given" in " ".join(shown("--system", "ktransformers").split())


def test_a_policy_of_ones_own_is_found_by_its_kind() -> None:
    (record,) = records("--policy-file", "my.py:Mine", "--option", "prefetch.width=4")
    system = record["system"]
    assert isinstance(system, dict)
    assert system["prefetch"] == "my.py:Mine"
    assert system["options"] == {"prefetch": {"width": 4}}


def test_a_system_file_with_a_policy_and_a_memory_limit() -> None:
    Path("mine.toml").write_text('like = "mixtral-offloading"\nprefetch = "my.py:Mine"\n')
    (record,) = records("--system", "mine.toml", "--gpu-memory", "24MB", "--context", "256")
    memory = record["memory"]
    assert isinstance(memory, dict)
    assert memory["context"] == 256
    assert sum(memory[part] for part in ("dense_bytes", "kv_bytes", "staging_bytes", "experts_bytes")) <= 24e6


def test_systems_stand_side_by_side_with_equal_bytes(folder: Path) -> None:
    names = ["hybrimoe", "ktransformers", "moe-infinity"]
    found = records("--systems", ",".join(names), "--calibration", "other.safetensors", "--out", "runs")
    assert {record["system"] for record in found} == set(names)
    assert len({record["gpu_bytes"] for record in found}) == 1
    for record in found:
        bound, token = record["bound_token_s"], record["token_s"]
        assert isinstance(bound, float)
        assert isinstance(token, float)
        assert token >= bound * (1 - 1e-12)
    for name in names:
        assert RunResult.load(folder / "runs" / name).info.system["name"] == name


def test_the_table_tells_of_memory_and_of_who_is_quickest() -> None:
    text = shown("--systems", "all", "--out", "runs")
    assert "equal for all: " in text
    assert "quickest without knowing the future: " in text
    assert Path("runs/systems.png").stat().st_size > 10_000
    assert max(map(len, text.split("equal for all")[0].splitlines())) <= 80


def test_constants_that_are_set_are_in_the_title_and_the_name(folder: Path) -> None:
    own = ["--system", "hybrimoe", "--option", "prefetch.depth=1", "--option", "evict.alpha=0.3", "--out", "own"]
    assert "hybrimoe with prefetch.depth 1, evict.alpha 0.3" in " ".join(shown(*own).split())
    assert RunResult.load_info(folder / "own").system["name"] == "hybrimoe with prefetch.depth 1, evict.alpha 0.3"
    assert "mrs + fetch with evict.alpha 0.3," in shown("--evict", "mrs", "--option", "evict.alpha=0.3")


def test_misses_are_told_from_experts_on_the_cpu() -> None:
    words = ["--system", "hybrimoe", "--link-gb-per-s", "2"]
    (record,) = records(*words)
    run = shown(*words)
    assert f"{record['misses']:,}, of which {record['misses_fetched']:,} fetched" in run
    assert f"experts on the CPU, also resident ones  {record['cpu_experts']:,}" in run
    fetched, misses = record["misses_fetched"], record["misses"]
    assert isinstance(fetched, int)
    assert isinstance(misses, int)
    assert 0 < fetched < misses


def test_side_by_side_says_what_ran_on_what(monkeypatch: pytest.MonkeyPatch) -> None:
    titles = []
    monkeypatch.setattr("analysis.systems.systems_plot", lambda records, path, title: titles.append(title))
    words = ["--systems", "fiddler,on-demand", "--quant", "int8", "--batch", "2", "--out", "runs"]
    text = " ".join(shown(*words).split())
    title = "simulated: moetwin-small, experts in int8, on rtx4090-epyc9374f, 25% of the experts on the GPU, batch 2"
    assert text.startswith(title)
    assert titles == [title]
    trace = store.load(Path("t.safetensors"))
    made = type(trace).of(trace.header.model_copy(update={"synthetic": True}), **dict(trace.arrays()))
    store.save(made, Path("t.safetensors"), force=True)
    of_model = "simulated, synthetic routing: moetwin-small, experts in 32 bits"
    limited = f"{of_model}, on rtx4090-epyc9374f, 24MB of GPU memory"
    assert " ".join(shown("--systems", "on-demand,fiddler", "--gpu-memory", "24MB").split()).startswith(limited)
    assert "simulated, on synthetic routing" in " ".join(shown().split())
    (record, _) = records("--systems", "on-demand,fiddler")
    assert (record["model"], record["hardware"]) == ("moetwin-small", "rtx4090-epyc9374f")
    assert (record["source"], record["synthetic"]) == ("simulated", True)


def test_memory_beyond_the_card_and_no_limit_are_notes_of_every_output() -> None:
    words = ["--system", "all-resident", "--hardware-set", "gpu.memory_gb=0.01"]
    for text in (shown(*words), shown("--systems", "all-resident,on-demand", *words[2:])):
        assert "every expert is held, whatever the limit" in " ".join(text.split())
        assert "MB are planned on the GPU, and rtx4090 has 10.0 MB, " in " ".join(text.split())
    for found in (records(*words), records("--systems", "all-resident", *words[2:])):
        (record,) = found
        notes = record["notes"]
        assert isinstance(notes, list)
        assert [note.partition(",")[0] for note in notes][:1] == ["every expert is held"]


def test_times_that_are_used_without_their_lengths_are_noted() -> None:
    Path("azure.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"2023-11-16 18:17:0{s},4808,10\n" for s in range(6))
    )
    assert "not ContextTokens and GeneratedTokens" in " ".join(shown("--arrivals", "azure.csv").split())


def test_who_cannot_run_is_named_with_the_reason() -> None:
    trace = store.load(Path("t.safetensors"))
    arrays = {name: array for name, array in trace.arrays() if name != "lookahead"}
    store.save(type(trace).of(trace.header, **arrays), Path("t.safetensors"), force=True)
    result = simulate("--systems", "hybrimoe,ktransformers", "--json")
    assert result.exit_code == 0
    assert "left out: hybrimoe: trace must have look-ahead of depth 3" in result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert len(records("--systems", "hybrimoe,ktransformers", "--lookahead-recall", "0.8")) == 2


def test_who_asks_for_what_a_profile_does_not_tell_is_left_out(folder: Path) -> None:
    spec = catalogue.model("moetwin-small")
    profile(model=spec, copies=(point(spec.expert_bytes, 1.0),)).save(folder / "p.toml")
    result = simulate("--systems", "layer-split,on-demand", "--profile", "p.toml")
    assert result.exit_code == 0
    assert "left out: layer-split: dense_follows must be false with a profile" in result.stderr
    assert "quickest without knowing the future: on-demand" in result.stdout
    assert refused("--system", "layer-split", "--profile", "p.toml").startswith("dense_follows must be false")


def test_a_run_has_a_bound_and_keeps_it(folder: Path) -> None:
    words = ["--system", "hybrimoe", "--out", "own"]
    (record,) = records(*words)
    bound_s, beyond_s, regret = (record[name] for name in ("bound_token_s", "regret_token_s", "regret"))
    assert isinstance(bound_s, float)
    assert isinstance(beyond_s, float)
    assert bound_s + beyond_s == pytest.approx(1 / float(str(record["tokens_per_s"])))
    assert regret == pytest.approx(beyond_s / bound_s)
    kept = RunResult.load_info(folder / "own").bounds_s
    assert kept["decode"] == pytest.approx(bound_s * int(str(record["decode_tokens"])))
    assert kept["run"] >= kept["decode"] + kept["prefill"] - 1e-9
    assert record["bounds_s"] == kept
    assert f"{bound_s * 1e3:.2f} ms; " in shown("--system", "hybrimoe")
    (side,) = records("--systems", "hybrimoe", "--out", "runs")
    assert (side["bound_token_s"], side["regret"]) == (bound_s, regret)
    assert RunResult.load_info(folder / "runs" / "hybrimoe").bounds_s == kept


def test_a_run_of_requests_that_arrive_has_no_bound() -> None:
    words = ["--arrivals", "poisson", "--rate-per-s", "20"]
    (record,) = records(*words)
    assert (record["bounds_s"], record["regret"]) == ({}, None)
    assert "by bound" not in shown(*words)


def test_who_computes_something_else_is_marked_and_stands_outside(folder: Path) -> None:
    Path("later.toml").write_text('like = "ktransformers"\nname = "later"\n[options.place]\ndefer = 2\n')
    text = shown("--systems", "ktransformers,later.toml", "--calibration", "other.safetensors")
    assert sum(line.startswith("later (other outputs)") for line in text.splitlines()) == 2
    assert "quickest without knowing the future: ktransformers\n" in text
    assert "later: deferral changes the model's outputs" in text


@pytest.mark.parametrize("width", ["40", "80"])
def test_tables_cut_nothing(monkeypatch: pytest.MonkeyPatch, width: str) -> None:
    monkeypatch.setenv("COLUMNS", width)
    for words in (["--systems", "oracle,hybrimoe,layer-split", "--batch", "4"], ["--system", "hybrimoe"]):
        assert "\N{HORIZONTAL ELLIPSIS}" not in shown(*words)


def test_what_needs_the_order_of_passes_is_left_out_where_requests_arrive(folder: Path) -> None:
    result = simulate(
        "--systems", "oracle,dali", "--arrivals", "poisson", "--rate-per-s", "20", "--out", "runs", "--json"
    )
    assert result.exit_code == 0
    assert "left out: oracle: arrivals must be left out (or all be 0) for belady" in result.stderr
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["dali", "systems.png"]


def test_a_note_that_several_systems_share_is_told_once() -> None:
    text = shown("--systems", "fiddler,ktransformers,on-demand")
    assert "fiddler, ktransformers: no calibration trace was given: evict static-uniform stands in" in text


def test_an_interrupt_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("analysis.systems.side_by_side", interrupted)
    before = sorted(folder.iterdir())
    assert simulate("--systems", "dali,fiddler", "--out", "runs").exit_code == 130
    assert sorted(folder.iterdir()) == before


def test_requests_may_arrive_over_time() -> None:
    words = ["--batch", "2", "--batching", "continuous", "--arrivals", "poisson", "--rate-per-s", "20"]
    (record,) = records(*words)
    workload = record["workload"]
    assert isinstance(workload, dict)
    assert workload["order"] == "continuous"
    assert workload["arrivals"] == "poisson"
    first = records(*words, "--systems", "mixtral-offloading,on-demand")
    assert first == records(*words, "--systems", "mixtral-offloading,on-demand")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--system hybridmoe", "system must be a known name, got 'hybridmoe' (did you mean hybrimoe"),
        ("--systems hybrimoe,gone.toml", "system file must be readable, got gone.toml"),
        ("--systems , ", "systems must be names with commas, or all, got ','"),
        ("--systems hybrimoe,e.toml", "systems must have different names, got hybrimoe 2 times"),
        ("--systems all --evict lru", "evict must not be given together with systems, got lru"),
        ("--option depth=1", "option must be KIND.NAME=VALUE, got 'depth=1'"),
        ("--option evict.alpha=1", "options.evict must be left out for lru, which has none, got alpha"),
        ("--evict mrs --option evict.alpha=x", "evict.alpha must be a number, got 'x'"),
        ("--evict mrs --option evict.alpha=7", "evict mrs: alpha must be above 0 and at most 1, got 7.0"),
        ("--policy-file my.py:Mine --prefetch none", "prefetch must be given once, got none and my.py:Mine"),
        ("--context 3", "context must be at least"),
        ("--gpu-memory 1MB", "gpu-memory must be at least"),
        ("--batching sometimes", "batching must be a known name, got 'sometimes'"),
        ("--arrivals poisson", "rate_per_s must be given with poisson arrivals, got nothing"),
        ("--arrivals gone.csv", "arrivals must be"),
        ("--evict belady --arrivals poisson --rate-per-s 9", "arrivals must be left out (or all be 0) for belady"),
        ("--lookahead-recall 0.5", "lookahead-recall must be left out for a trace that has recorded look-ahead"),
    ],
)
def test_mistakes_are_one_line(words: str, told: str, folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert refused(*words.split()).startswith(told)
    assert sorted(folder.iterdir()) == before

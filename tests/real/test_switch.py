"""Switch Transformers: capacity, the rows of two stacks, recording, replay and simulation of an encoder-decoder."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tomli_w
import torch
from transformers.models.switch_transformers import modeling_switch_transformers as theirs
from typer.testing import CliRunner

from moetwin import app
from real.calibrate import calibrate
from real.decode import Machine, decode, replay
from real.device import open_device
from real.generate import generate, left_pad
from real.jobs import LEFT_OUT
from real.models.load import LoadedModel, load_spec
from real.record import Collector, record
from real.routing import MeanInputs, Replay, RouterTap, routable
from real.subjects import subject
from sim.run import simulate
from sim.systems import Budget, SystemSpec
from tests.real import tiny
from tests.real.running import COSTS, DEVICES, assert_near, decoded
from tests.real.test_parity import DECIDED
from traces import store
from traces.errors import InputError
from traces.prompts import Prompt
from traces.schema import NOT_ROUTED, Phase, Trace
from traces.synthetic import Sizes, zipf
from traces.workload import lock_step

PROMPTS = [[5, 17, 200, 31, 8, 77, 140, 9, 65, 66, 0], [90, 4, 33, 0], [1, 2, 3, 250, 9, 0], [61, 0]]
"""Four lanes, all but the first one padded; each ends with what begins the decoder's text."""
ENCODER = 2
"""MoE layers of the encoder, and as many of the decoder."""
SIZES = Sizes(sequences=2, prompt_tokens=3, new_tokens=2, layers=4, experts=8, top_k=1, expert_bytes=4096, lookahead=2)


def switch() -> LoadedModel:
    """Two MoE layers in either stack, with a capacity of two tokens."""
    return tiny.model("switch_transformers", 4)


@pytest.fixture(scope="module", params=DEVICES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    own = replace(copy.deepcopy(replace(switch(), tokenizer=None)), tokenizer=tiny.tokenizer())
    with open_device(request.param) as opened:
        yield Machine.prepare(own, opened)


def recorded(prompts: list[list[int]], count: int) -> Trace:
    """What the model's own routers choose while it continues prompts."""
    collector = Collector(switch(), lookahead_depth=3)
    with RouterTap(switch().layers, collector):
        tiny.greedy(switch(), prompts, count, hooks=collector)
    return collector.finish()


def of_transformers() -> theirs.SwitchTransformersForConditionalGeneration:
    """The same weights in transformers' own classes."""
    loaded = switch()
    config = copy.deepcopy(loaded.config)
    config._experts_implementation_internal = "eager"
    model = theirs.SwitchTransformersForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.load_state_dict(loaded.model.state_dict())
    return model.eval()


def drops_by_sequence() -> bool:
    """Whether the transformers that is installed keeps a capacity, and one for each sequence."""
    config = copy.deepcopy(switch().config)
    config._experts_implementation_internal, config.expert_capacity = "eager", 1
    block = theirs.SwitchTransformersSparseMLP(config).eval()
    with torch.inference_mode():
        output = block(torch.ones(2, 2, 32))
    return bool(output[:, 0].any(dim=-1).all()) and not output[:, 1].any()


def given_capacity(model: torch.nn.Module, capacity: int) -> None:
    for module in model.modules():
        if isinstance(module, theirs.SwitchTransformersTop1Router):
            module.expert_capacity = capacity


@pytest.mark.parametrize("capacity", [1, tiny.CAPACITY, 64])
def test_text_is_that_of_transformers(capacity: int) -> None:
    """With whatever capacity where transformers counts it as here; else with one that is never reached."""
    if capacity < 64 and not drops_by_sequence():
        pytest.skip("this transformers keeps no capacity by sequence")
    model, plain = copy.deepcopy(switch().model), of_transformers()
    given_capacity(model, capacity)
    given_capacity(plain, capacity)
    length = max(map(len, PROMPTS)) - 1
    ids = torch.tensor([prompt[:-1] + [0] * (length + 1 - len(prompt)) for prompt in PROMPTS])
    mask = torch.tensor([[1] * (len(prompt) - 1) + [0] * (length + 1 - len(prompt)) for prompt in PROMPTS])
    wanted = plain.generate(
        ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    made = generate(model, *left_pad(PROMPTS), max_new_tokens=6, keep_logits=True)
    assert made.tokens == wanted.sequences[:, 1:].tolist()
    assert_near(made.logits, wanted.logits)


def test_the_capacity_decides_what_is_written() -> None:
    few, many = copy.deepcopy(switch().model), copy.deepcopy(switch().model)
    given_capacity(many, 64)
    logits = [generate(one, *left_pad(PROMPTS), max_new_tokens=1, keep_logits=True).logits for one in (few, many)]
    with pytest.raises(AssertionError):
        assert_near(*logits)


def test_an_expert_takes_no_more_tokens_of_a_sequence_than_its_capacity() -> None:
    router = switch().layers[0].router
    hidden = torch.randn(1, 32).expand(2, 5, 32)
    logits, weights, ids = router(hidden, 0, 0)
    chosen, weight = int(logits[0].argmax()), logits[0].softmax(-1).max()
    assert ids.flatten().tolist() == [chosen] * 10
    torch.testing.assert_close(weights.view(2, 5), weight * torch.tensor([[1.0, 1, 0, 0, 0]] * 2))
    padded = torch.nn.functional.pad(hidden[:, :2], (0, 0, 3, 1))
    logits, weights, ids = router(padded, 3, 1)
    torch.testing.assert_close(weights.view(2, 6), weight * torch.tensor([[0.0, 0, 0, 1, 1, 0]] * 2))
    assert logits.shape == (12, 8)


def test_the_first_step_has_the_rows_of_both_stacks() -> None:
    trace = recorded(PROMPTS[:2], 3)
    assert trace.header.layers == 4
    first = trace.sequence == 1
    assert trace.position[first].tolist() == [0, 1, 2, 3, 4, 5]
    assert trace.token_ids[first][:4].tolist() == [90, 4, 33, 0]
    assert trace.phase[first].tolist() == [0, 0, 0, 0, 1, 1]
    assert trace.step[first].tolist() == [0, 0, 0, 0, 1, 2]
    ids = trace.expert_ids[first][..., 0]
    assert (ids[3:, :ENCODER] == NOT_ROUTED).all()
    assert (ids[:3, ENCODER:] == NOT_ROUTED).all()
    assert (ids[3:, ENCODER:] != NOT_ROUTED).all()  # a decoder's step is one token, which has room
    assert trace.gates is not None
    assert ((trace.gates == 0) == (trace.expert_ids == NOT_ROUTED)).all()
    assert trace.lookahead is not None
    ahead = trace.lookahead[first][..., 0]  # [6, L, D]
    assert (ahead[:3, 0, 0] != NOT_ROUTED).all()
    assert (ahead[:3, 0, 1:] == NOT_ROUTED).all()  # the encoder has no layer behind its second
    assert (ahead[:3, 1:] == NOT_ROUTED).all()
    assert (ahead[3:, :ENCODER] == NOT_ROUTED).all()
    assert (ahead[3:, ENCODER, 0] != NOT_ROUTED).all()


def test_a_dropped_token_is_not_routed() -> None:
    trace, calls = recorded(PROMPTS[:1], 1), []

    class Keep:
        def on_route(self, call: Any) -> None:
            calls.append(call.logits)

    with RouterTap(switch().layers, Keep()):
        tiny.greedy(switch(), PROMPTS[:1], 1)
    dropped = 0
    for layer in range(ENCODER):
        seen: Counter[int] = Counter()
        for row, expert in enumerate(calls[layer][:10].argmax(-1).tolist()):
            seen[expert] += 1
            wanted = expert if seen[expert] <= tiny.CAPACITY else NOT_ROUTED
            dropped += wanted == NOT_ROUTED
            assert trace.expert_ids[row, layer, 0] == wanted
    assert dropped


@pytest.mark.parametrize("lanes", [1, 4])
def test_every_way_to_run_gives_the_resident_models_text(machine: Machine, lanes: int) -> None:
    model = copy.deepcopy(switch().model).to(machine.device.torch_device)  # type: ignore[arg-type]
    ids, mask = (one.to(machine.device.torch_device) for one in left_pad(PROMPTS[:lanes]))
    wanted = generate(model, ids, mask, max_new_tokens=5, keep_logits=True)
    systems = product(("lru", "lfu"), ("fetch", "cpu-on-miss"), ("none", "next-router"), ("layer", "global"))
    for (evict, place, prefetch, scope), slots in product(systems, (1, 4)):
        fields = {"evict": evict, "place": place, "prefetch": prefetch, "scope": scope}
        run = decoded(machine, PROMPTS[:lanes], 5, slots, **fields)
        assert run.tokens == wanted.tokens, fields
        assert_near(run.logits, wanted.logits)
        decode_steps = run.layers[(run.layers.phase == Phase.DECODE) & (run.layers.layer < ENCODER)]
        assert len(decode_steps) == 4 * ENCODER
        assert not decode_steps[["union", "misses", "bytes", "dense_s"]].any().any()


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("place", ["fetch", "cpu-on-miss", "fiddler"])
def test_the_simulator_and_both_real_ways_decide_alike(machine: Machine, batch: int, place: str) -> None:
    system, budget = SystemSpec(place=place, scope="global", synchronous=True), Budget(slots=5)
    prompts = [prompt[:-1] for prompt in PROMPTS]  # what begins the text is the model's own
    run, trace, tokens = decode(machine, prompts, system, budget, COSTS, batch=batch, max_new_tokens=5)
    assert tokens == [text for i in range(0, 4, batch) for text in tiny.greedy(switch(), PROMPTS[i : i + batch], 5)]
    assert routable(trace, ENCODER) is trace
    workload = lock_step(trace, batch)
    simulated = simulate(workload, system, budget, COSTS, hardware="by hand")
    again = replay(machine, workload, system, budget, COSTS)
    for other in (simulated, again):
        pd.testing.assert_frame_equal(run.operations, other.operations)
        pd.testing.assert_frame_equal(run.layers[DECIDED], other.layers[DECIDED])
    assert len(run.operations)


def test_a_replayed_recording_gives_its_logits() -> None:
    loaded, forced = switch(), [[7, 8, 9], [10]]
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        wanted = tiny.logits_of(loaded, PROMPTS[:2], forced, hooks=collector)
    router = Replay(collector.finish(), loaded, own_gates=True)

    class Follow:
        def begin_step(self, step_index, phase, mask, positions, token_ids) -> None:
            router.begin_step(router.rows(range(2), mask, positions))

        def end_step(self, next_tokens: Sequence[int]) -> None:
            pass

    with RouterTap(loaded.layers, router):
        got = tiny.logits_of(loaded, PROMPTS[:2], forced, hooks=Follow())
    torch.testing.assert_close(got[:, 0], wanted[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:2, 1], wanted[:2, 1], rtol=1e-5, atol=1e-5)


def test_what_no_encoder_decoder_chooses_is_left_out() -> None:
    trace = zipf(np.random.default_rng(0), SIZES)
    assert routable(trace, 0) is trace
    left = routable(trace, ENCODER)
    left.check()
    for sequence in (0, 1):
        rows = np.flatnonzero(trace.sequence == sequence)
        assert len(rows) == 5
        for place, row in enumerate(rows):
            kept = slice(0, 2) if place < 2 else slice(2, 4)  # two tokens are read, three are written
            assert np.array_equal(left.expert_ids[row, kept], trace.expert_ids[row, kept])
            assert (np.delete(left.expert_ids[row], kept, axis=0) == NOT_ROUTED).all()
    assert left.lookahead is not None
    assert trace.lookahead is not None
    ahead = left.lookahead[:, :, 0, 0] != NOT_ROUTED
    assert ahead.any(axis=0).tolist() == [True, False, True, False]
    assert routable(left, ENCODER) is left
    with pytest.raises(InputError, match=r"trace must route what is read in the first 2 layers alone, .* got other"):
        Replay(trace, switch())
    Replay(left, switch())


def test_mean_inputs_are_those_of_the_rows_that_a_layer_has() -> None:
    found, seen = MeanInputs(4), {layer: [] for layer in range(4)}

    class Keep:
        def on_route(self, call: Any) -> None:
            seen[call.layer].append(call.hidden)

    with RouterTap(switch().layers, found, Keep()):
        tiny.greedy(switch(), PROMPTS[:1], 3, hooks=found)
    rows = {0: seen[0][0][:10], 2: torch.cat([seen[2][0][10:], *seen[2][1:]])}
    assert len(rows[2]) == 3
    for layer, own in rows.items():
        torch.testing.assert_close(torch.from_numpy(found.means()[layer]), own.double().mean(0))


def test_an_encoder_has_to_be_given_something_to_read() -> None:
    with pytest.raises(InputError, match=r"prompt must have two tokens or more, .* got one"):
        tiny.greedy(switch(), [[5, 6], [7]], 2)


def test_a_prompt_is_followed_by_what_begins_the_text() -> None:
    assert switch().as_run([5, 6]) == [5, 6, 0]
    assert tiny.model("olmoe").as_run([5, 6]) == [5, 6]
    trace = record(replace(switch(), tokenizer=tiny.tokenizer()), [Prompt("a", "ab")], max_new_tokens=2)
    assert trace.token_ids[:3].tolist() == [*tiny.tokenizer()("ab")["input_ids"], 0]


def test_seconds_of_an_encoder_decoder_are_not_predicted(machine: Machine) -> None:
    with pytest.raises(InputError, match=r"model must be a decoder to be calibrated with, .* got tiny-switch"):
        calibrate(machine, name="here")
    with pytest.raises(InputError, match="model must be a decoder to be validated on, got the encoder-decoder switch-"):
        subject("switch-base-8", "fp32", recorded(PROMPTS, 2), recorded(PROMPTS, 2), sequences=1, tokens=1)


def run(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["decode", "--device", "cpu", "--json", *words])
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def test_the_command_continues_prompts_of_a_checkpoint_and_replays_their_routing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = switch().spec.model_copy(update={"name": "mine"})
    loaded = load_spec(spec, with_experts=True, seed=1)
    loaded.model.save_pretrained("mine")
    tiny.tokenizer().save_pretrained("mine")
    words = ("--model", "mine", "--cache", "1", "--batch", "2")
    told = run(*words, "--prompt", "what is read", "--max-new-tokens", "4", "--trace-out", "t.safetensors")
    assert told["decode_tokens"] == 3
    assert told["workload"]["prompt_tokens"] == len("what is read") + 1
    again = run(*words, "--routing", "t.safetensors")
    assert again["trace_digest"] == told["trace_digest"]
    assert LEFT_OUT not in again["notes"]


def test_the_command_leaves_out_what_the_model_cannot_choose_and_tells(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(tomli_w.dumps(switch().spec.model_dump()), encoding="utf-8")
    trace = zipf(np.random.default_rng(0), replace(SIZES, expert_bytes=1))  # of another model's size
    store.save(trace, "t.safetensors")
    words = ("--model", "mine.toml", "--random-weights", "--routing", "t.safetensors", "--trace-out", "run.safetensors")
    told = run(*words)
    assert LEFT_OUT in told["notes"]
    assert told["trace_digest"] == store.load("run.safetensors").digest
    assert np.array_equal(store.load("run.safetensors").expert_ids, routable(trace, ENCODER).expert_ids)

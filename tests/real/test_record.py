"""Recording: what the trace says is what the routers chose, whatever the batch; and the command around it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import real.cli
from real.cli import RecordOptions, _check_lookahead, _summary
from real.generate import Sampler, generate, left_pad
from real.models.families import FAMILIES
from real.models.load import load, load_spec
from real.record import Collector, _by_weight, encode, record, router_means_of
from real.routing import RouterCall, RouterTap, lookahead
from tests.real import tiny
from traces import store
from traces.errors import InputError
from traces.prompts import Prompt, digest
from traces.router_means import packed, unpacked
from traces.schema import NOT_ROUTED, Phase, Trace

EVERY = pytest.mark.parametrize("model_type", list(FAMILIES))
DECODERS = pytest.mark.parametrize("model_type", tiny.DECODERS)
PROMPTS = [Prompt("greeting", "Hello there"), Prompt("code", "def"), Prompt("code", "x = 1\n")]


def rows_of(trace: Trace, sequence: int) -> dict[str, np.ndarray]:
    """Everything of one sequence but its steps, which depend on the batch."""
    chosen = trace.sequence == sequence
    return {name: array[chosen] for name, array in trace.arrays() if name not in ("step", "sequence")}


@DECODERS
def test_trace_holds_what_the_routers_returned(model_type: str) -> None:
    loaded = tiny.model(model_type)
    calls: list[RouterCall] = []

    class Listener:
        def on_route(self, call: RouterCall) -> None:
            calls.append(call)

    with RouterTap(loaded.layers, Listener()):
        trace = record(loaded, PROMPTS[:1], max_new_tokens=4)
    for layer in range(2):
        mine = [call for call in calls if call.layer == layer]
        logits = torch.cat([call.logits for call in mine]).float()
        order = torch.cat([call.weights for call in mine]).argsort(-1, descending=True)
        ids = torch.cat([call.ids for call in mine]).gather(1, order)
        weights = torch.cat([call.weights for call in mine]).gather(1, order)
        assert np.array_equal(trace.expert_ids[:, layer], ids.numpy())
        assert np.array_equal(trace.expert_ids[:, layer], tiny.best_two(loaded.layers[layer].router, logits).numpy())
        assert np.array_equal(trace.gates[:, layer], weights.half().numpy())
        assert np.array_equal(trace.scores[:, layer], logits.softmax(-1).half().numpy())
    assert (np.diff(trace.gates.astype(float), axis=-1) <= 0).all()
    assert np.allclose(trace.scores.astype(float).sum(-1), 1, atol=2e-3)


def test_lookahead_is_recorded_from_each_layers_router_input() -> None:
    loaded = tiny.model("mixtral", layers=3)
    hidden: list[torch.Tensor] = []

    class Listener:
        def on_route(self, call: RouterCall) -> None:
            hidden.append(call.hidden)

    with RouterTap(loaded.layers, Listener()):
        trace = record(loaded, PROMPTS[1:2], max_new_tokens=1, lookahead_depth=2)
    routers = [layer.router for layer in loaded.layers]
    assert trace.lookahead.shape == (3, 3, 2, 2)
    for layer in range(3):
        assert np.array_equal(trace.lookahead[:, layer], lookahead(hidden[layer], layer, 2, routers, 2).numpy())
    assert (trace.lookahead[:, 2] == NOT_ROUTED).all()
    assert (trace.lookahead[:, 1, 1] == NOT_ROUTED).all()


def test_rows_say_whose_tokens_they_are() -> None:
    loaded = tiny.model()
    trace = record(loaded, PROMPTS[:2], batch=2, max_prompt_tokens=4, max_new_tokens=3)
    prompts = [list(tiny.tokenizer()(text)["input_ids"]) for text in ("Hell", "def")]
    new = tiny.greedy(loaded, prompts, 3)
    assert trace.sequence.tolist() == [0] * 4 + [1] * 3 + [0, 1] * 2
    assert trace.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 3, 5, 4]
    assert trace.step.tolist() == [0] * 7 + [1, 1, 2, 2]
    assert trace.phase.tolist() == [Phase.PREFILL] * 7 + [Phase.DECODE] * 4
    assert trace.token_ids.tolist() == [*prompts[0], *prompts[1], new[0][0], new[1][0], new[0][1], new[1][1]]


@EVERY
def test_batch_and_padding_change_nothing_for_a_sequence(model_type: str) -> None:
    loaded = tiny.model(model_type)
    alone, together = (record(loaded, PROMPTS, batch=batch, max_new_tokens=6) for batch in (1, 2))
    assert len(alone) == len(together)
    assert int(together.step[-1]) < int(alone.step[-1])
    for sequence in range(3):
        one, other = rows_of(alone, sequence), rows_of(together, sequence)
        for name in ("token_ids", "position", "phase", "expert_ids", "lookahead"):
            assert np.array_equal(one[name], other[name]), name
        for name in ("gates", "scores"):
            assert np.allclose(one[name].astype(float), other[name].astype(float), atol=2e-3)


def test_equal_weights_are_ordered_by_expert() -> None:
    loaded = tiny.model()
    collector = Collector(loaded, scores=False, lookahead_depth=0)
    one = torch.ones(1, 1)
    collector.begin_step(0, Phase.PREFILL, one.bool(), one.long(), one.long())
    for layer, ids in enumerate(([5, 2], [6, 7])):
        call = RouterCall(layer, one, one, torch.tensor([[0.5, 0.5]]), torch.tensor([ids]))
        collector.on_route(call)
    assert collector.finish().expert_ids.tolist() == [[[2, 5], [6, 7]]]


def test_an_ended_lane_is_not_recorded() -> None:
    loaded = tiny.model()
    prompts = [[5, 17, 200], [90, 4]]
    free = tiny.greedy(loaded, prompts, 6)
    end = free[1][0]
    assert end not in free[0]
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        tiny.greedy(loaded, prompts, 6, eos_ids=[end], hooks=collector)
    trace = collector.finish()
    assert trace.sequence.tolist() == [0] * 3 + [1] * 2 + [0] * 5


def test_steps_and_sequences_are_numbered_over_the_whole_recording() -> None:
    loaded = tiny.model()
    seen: list[tuple[int, int]] = []
    trace = record(loaded, PROMPTS, batch=2, max_new_tokens=2, progress=lambda done, steps: seen.append((done, steps)))
    assert sorted(set(trace.step.tolist())) == [0, 1, 2, 3]
    assert set(trace.sequence[trace.step >= 2].tolist()) == {2}
    assert seen == [(0, 1), (0, 2), (2, 2), (2, 3), (2, 4), (3, 4)]


def test_header_says_where_the_trace_comes_from() -> None:
    loaded = tiny.model()
    header = record(loaded, PROMPTS, max_new_tokens=1, made_by="by hand", licence="CC0-1.0").header
    assert (header.model, header.revision, header.dtype) == ("tiny-qwen3_moe", "random-3", "float32")
    assert (header.layers, header.experts, header.top_k) == (2, 8, 2)
    assert header.expert_bytes == (3 * 32 * 16 * 4,) * 2
    assert header.domains == ("greeting", "code", "code")
    assert header.prompts_digest == digest(PROMPTS)
    assert {"torch", "transformers", "numpy", "python"} <= header.software.keys()
    assert (header.made_by, header.licence, header.synthetic) == ("by hand", "CC0-1.0", False)


def test_optional_arrays_can_be_left_out() -> None:
    trace = record(tiny.model(), PROMPTS[:1], max_new_tokens=1, lookahead_depth=0, scores=False)
    assert trace.scores is None
    assert trace.lookahead is None
    assert trace.gates is not None


def test_equal_recordings_have_equal_digests() -> None:
    def sampled(seed: int) -> str:
        return record(tiny.model(), PROMPTS, max_new_tokens=4, sampler=Sampler(1.0, seed=seed)).digest

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_low_precision_models_can_be_recorded() -> None:
    loaded = load_spec(tiny.SPECS["mixtral"], dtype="bf16", with_experts=True)
    collector = Collector(loaded)
    with RouterTap(loaded.layers, collector):
        generate(loaded.model, *left_pad([[1, 2, 3]]), max_new_tokens=2)
        with pytest.raises(InputError, match="at least one forward pass"):
            collector.finish()
    with RouterTap(loaded.layers, collector := Collector(loaded)):
        generate(loaded.model, *left_pad([[1, 2, 3]]), max_new_tokens=2, hooks=collector)
    trace = collector.finish()
    assert trace.header.dtype == "bfloat16"
    assert trace.header.expert_bytes == (3 * 32 * 16 * 2,) * 2


@pytest.mark.parametrize("name", ["batch", "max_prompt_tokens", "max_new_tokens"])
def test_counts_must_be_positive(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be at least 1, got 0"):
        record(tiny.model(), PROMPTS, **{name: 0})


def test_recording_needs_prompts_a_tokenizer_and_a_depth() -> None:
    with pytest.raises(InputError, match="prompts must be at least one, got none"):
        record(tiny.model(), [])
    with pytest.raises(InputError, match="model must have a tokenizer to read prompts, got 'tiny-olmoe'"):
        record(load_spec(tiny.SPECS["olmoe"]), PROMPTS)
    with pytest.raises(InputError, match="lookahead must be at least 0, got -1"):
        record(tiny.model(), PROMPTS, lookahead_depth=-1)


def test_tokens_of_another_models_tokenizer_are_refused() -> None:
    small = replace(load_spec(tiny.SPECS["olmoe"].model_copy(update={"vocab": 200})), tokenizer=tiny.tokenizer())
    assert encode(small, [Prompt("", "x")]) == [list(tiny.tokenizer()("x")["input_ids"])]
    with pytest.raises(
        InputError, match=r"^prompts must have tokens below 200, the embeddings of model tiny-olmoe, got \d+ "
    ):
        encode(small, [Prompt("", "x"), Prompt("", "\N{GRINNING FACE}")])


@pytest.mark.parametrize("smallest", [1e-9, 2.0**-25, 1e-30])
def test_a_positive_gate_is_recorded_as_one(smallest: float) -> None:
    """Whoever reads the trace takes it that the expert was chosen, as its id says."""
    weights = np.array([[smallest, 0.75], [0.0, 0.5]], np.float32)
    ids, gates = _by_weight(np.array([[3, 5], [1, 2]]), weights)
    assert ids.tolist() == [[5, 3], [2, NOT_ROUTED]]
    assert (gates.astype(np.float16) > 0).tolist() == [[True, True], [True, False]]


words = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)


@given(
    st.builds(
        RecordOptions,
        model=words.filter(bool),
        prompts=words,
        domains=words,
        batch=st.integers(1, 9),
        seed=st.integers(0, 99),
        temperature=st.floats(0, 2),
    )
)
@settings(max_examples=50)
def test_options_are_read_back_from_the_command(options: RecordOptions) -> None:
    assert RecordOptions.parse(options.command()) == options


@pytest.mark.parametrize(
    "command", ["", "zipf(seed=1)", "moetwin trace record --nothing 1", "moetwin trace record --batch"]
)
def test_other_commands_are_refused(command: str) -> None:
    with pytest.raises(InputError, match="made_by must be a command moetwin trace record"):
        RecordOptions.parse(command)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    tiny.model().model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    (tmp_path / "prompts.jsonl").write_text(
        '{"domain": "a", "text": "one"}\n{"domain": "b", "text": "three"}\n{"domain": "a", "text": "no"}\n'
    )
    return folder


def test_command_records_and_records_again(checkpoint: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "a.safetensors"
    options = {"model": str(checkpoint), "prompts": tmp_path / "prompts.jsonl", "max_new_tokens": 3}
    real.cli.record(**options, domains="a", temperature=0.8, seed=4, batch=2, out=out)
    trace = store.load(out, verify=True)
    assert trace.header.domains == ("a", "a")
    assert trace.header.made_by.startswith("moetwin trace record --model ")
    assert trace.header.licence == ""
    assert trace.digest in capsys.readouterr().out
    real.cli.record(like=out)
    assert "identical to" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(InputError, match="out must be a new file"):
        real.cli.record(**options, out=out)
    real.cli.record(**options, out=out, force=True)
    assert store.load(out).header.domains == ("a", "b", "a")


def test_command_notices_another_result(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    real.cli.record(model=str(checkpoint), prompts=tmp_path / "prompts.jsonl", max_new_tokens=3, out=out)
    trace = store.load(out)
    ids = trace.expert_ids.copy()
    ids[0, 0] = ids[0, 0, ::-1]
    other = Trace.of(trace.header, **{**dict(trace.arrays()), "expert_ids": ids})
    store.save(other, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"digest must be .* got .* \(9\d\.\d\d% of the expert ids are equal\)"):
        real.cli.record(like=tmp_path / "b.safetensors")


def test_command_refuses_what_it_cannot_do(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(InputError, match="out must be given"):
        real.cli.record(model=str(checkpoint))
    with pytest.raises(InputError, match="domain must be a known name, got 'c'"):
        real.cli.record(model=str(checkpoint), prompts=tmp_path / "prompts.jsonl", domains="a,c", out=out)
    assert not out.exists()


def test_interrupt_leaves_no_file(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Collector, "end_step", interrupt)
    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        real.cli.record(model=str(checkpoint), prompts=tmp_path / "prompts.jsonl", out=tmp_path / "a.safetensors")
    assert set(tmp_path.iterdir()) == before


MODELS = " for this model's layers"


@pytest.mark.parametrize(("layers", "most", "why"), [(8, 7, MODELS), (5, 4, MODELS), (4, 3, MODELS), (2, 3, "")])
def test_a_look_ahead_is_as_deep_as_the_layers_or_the_default(layers: int, most: int, why: str) -> None:
    _check_lookahead(most, layers)
    with pytest.raises(InputError, match=f"^lookahead must be from 0 to {most}{why}, got {most + 1}$"):
        _check_lookahead(most + 1, layers)


@pytest.mark.parametrize(("count", "words"), [(1, "1 over 1 domain"), (3, "3 over 2 domains")])
def test_the_summary_counts_domains(count: int, words: str) -> None:
    trace = record(tiny.model(), PROMPTS[:count], max_new_tokens=1)
    assert list(_summary(trace, None).columns[1].cells)[1] == words


def test_more_tokens_than_the_model_has_positions_are_refused() -> None:
    loaded = tiny.model()
    most = loaded.config.max_position_embeddings
    with pytest.raises(InputError, match=rf"together be at most the model's {most} positions, got 2 and {most - 1}$"):
        record(loaded, PROMPTS[1:2], max_prompt_tokens=2, max_new_tokens=most - 1)


def test_residuals_of_other_prompts_correct_the_look_ahead() -> None:
    loaded = tiny.model("mixtral", layers=3)
    hidden: list[torch.Tensor] = []

    class Listener:
        def on_route(self, call: RouterCall) -> None:
            hidden.append(call.hidden)

    with RouterTap(loaded.layers, Listener()):
        router_means = router_means_of(loaded, PROMPTS[:1], max_prompt_tokens=4, max_new_tokens=3)
    means = torch.stack([torch.cat(hidden[layer::3]).mean(dim=0) for layer in range(3)])
    assert torch.allclose(means, torch.from_numpy(unpacked(router_means, 3)), atol=2e-3)
    hidden.clear()
    with RouterTap(loaded.layers, Listener()):
        trace = record(loaded, PROMPTS[1:2], max_new_tokens=1, lookahead_depth=2, router_means=router_means)
    header, routers = trace.header, [layer.router for layer in loaded.layers]
    assert (header.lookahead_router, header.router_means) == ("residual", router_means)
    for layer in range(3):
        ahead = lookahead(hidden[layer], layer, 2, routers, 2, torch.from_numpy(header.means))
        assert np.array_equal(trace.lookahead[:, layer], ahead.numpy())
    with pytest.raises(InputError, match="router_means must have the model's hidden width 32, got 1"):
        record(loaded, PROMPTS, router_means=packed(np.ones((3, 1))))


def test_command_fits_the_residual_router_to_prompts_that_are_not_recorded(checkpoint: Path, tmp_path: Path) -> None:
    out, prompts = tmp_path / "a.safetensors", tmp_path / "prompts.jsonl"
    options = {"model": str(checkpoint), "prompts": prompts, "max_new_tokens": 2, "lookahead_router": "residual"}
    real.cli.record(**options, domains="a", residual_prompts=prompts, out=out)
    header = store.load(out).header
    model = load(str(checkpoint), with_experts=True)
    assert header.router_means == router_means_of(model, [Prompt("b", "three")], max_new_tokens=2)
    assert header.lookahead_router == "residual"
    real.cli.record(like=out)
    with pytest.raises(InputError, match=r"residual-prompts must hold others than those recorded, got none in prompts"):
        real.cli.record(**options, residual_prompts=prompts, out=out, force=True)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lookahead_router": "residul"}, "lookahead-router must be a known name, got 'residul'"),
        ({"lookahead_router": "residual", "lookahead": 0}, "lookahead must be at least 1 with lookahead-router res"),
        ({"residual_prompts": "x.txt"}, "residual-prompts must be left out without lookahead-router residual"),
    ],
)
def test_options_of_the_residual_router_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        RecordOptions(**options)

"""The decode loop: against transformers' own, with padding, ended lanes, forced tokens, sampling and streaming."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from real.generate import NO_TOKEN, HookChain, Sampler, StopTexts, TextStream, generate, left_pad
from real.models.families import FAMILIES
from tests.real import tiny
from traces.errors import InputError
from traces.schema import Phase

PROMPTS = [[5, 17, 200, 31, 8], [90, 4], [66, 67, 68]]


class Log:
    """Hooks that write down what they are told."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, Phase, Any, Any, Any]] = []
        self.ended: list[list[int]] = []

    def begin_step(self, step_index, phase, mask, positions, token_ids) -> None:
        self.begun.append((step_index, phase, mask.tolist(), positions.tolist(), token_ids.tolist()))

    def end_step(self, next_tokens) -> None:
        self.ended.append(next_tokens)


@pytest.mark.parametrize("model_type", tiny.DECODERS)
def test_greedy_tokens_are_those_of_transformers(model_type: str) -> None:
    loaded = tiny.model(model_type)
    ids, mask = left_pad(PROMPTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = loaded.model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert tiny.greedy(loaded, PROMPTS, 8) == theirs[:, ids.shape[1] :].tolist()


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_a_lane_does_not_see_the_others_or_its_padding(model_type: str) -> None:
    loaded = tiny.model(model_type)
    alone = [tiny.greedy(loaded, [prompt], 8)[0] for prompt in PROMPTS]
    assert tiny.greedy(loaded, PROMPTS, 8) == alone
    forced = [tokens[:-1] for tokens in alone]
    together = tiny.logits_of(loaded, PROMPTS, forced)
    apart = torch.cat([tiny.logits_of(loaded, [p], [f]) for p, f in zip(PROMPTS, forced, strict=True)], dim=1)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


def test_hooks_see_phases_positions_and_what_follows() -> None:
    log = Log()
    tokens = tiny.greedy(tiny.model(), [[5, 6, 7], [9]], 3, hooks=log)
    assert [(step, phase) for step, phase, *_ in log.begun] == [
        (0, Phase.PREFILL),
        (1, Phase.DECODE),
        (2, Phase.DECODE),
    ]
    _, _, mask, positions, ids = log.begun[0]
    assert mask == [[True, True, True], [False, False, True]]
    assert positions == [[0, 1, 2], [0, 0, 0]]
    assert ids == [[5, 6, 7], [0, 0, 9]]
    assert [positions for *_, positions, _ in log.begun[1:]] == [[[3], [1]], [[4], [2]]]
    assert [ids for *_, ids in log.begun[1:]] == [[[lane[i]] for lane in tokens] for i in (0, 1)]
    assert log.ended == [[lane[i] for lane in tokens] for i in (0, 1, 2)]


def test_an_ended_lane_idles_masked_and_changes_nothing() -> None:
    loaded = tiny.model()
    free = tiny.greedy(loaded, PROMPTS, 8)
    end = free[1][2]
    assert all(end not in lane for lane in (free[0], free[2]))
    first, log = free[1].index(end), Log()
    tokens = tiny.greedy(loaded, PROMPTS, 8, eos_ids=[end], hooks=log)
    assert tokens == [free[0], free[1][: first + 1], free[2]]
    for step, (*_, mask, positions, _) in enumerate(log.begun[1:], 1):
        assert mask == [[True], [step <= first], [True]]
        assert positions == [[4 + step], [1 + min(step, first)], [2 + step]]
    assert [following[1] for following in log.ended] == free[1][: first + 1] + [NO_TOKEN] * (7 - first)


def test_generation_stops_when_every_lane_has_ended() -> None:
    loaded = tiny.model()
    end = tiny.greedy(loaded, [PROMPTS[0]], 1)[0][0]
    generation = generate(loaded.model, *left_pad([PROMPTS[0]]), max_new_tokens=9, eos_ids=[end])
    assert (generation.tokens, generation.steps) == ([[end]], 1)


def test_forced_tokens_are_run_and_give_the_logits_of_a_single_pass() -> None:
    loaded = tiny.model()
    forced = [[7, 8, 9, 10]]
    stepwise = tiny.logits_of(loaded, [[1, 2, 3]], forced)
    with torch.inference_mode():
        at_once = loaded.model(torch.tensor([[1, 2, 3, 7, 8, 9, 10]])).logits[0, 2:]
    torch.testing.assert_close(stepwise[:, 0], at_once, rtol=1e-4, atol=1e-4)


def test_forced_lanes_of_unequal_length() -> None:
    log = Log()
    ids, mask = left_pad([[1, 2], [3]])
    generation = generate(tiny.model().model, ids, mask, forced_tokens=[[7], [8, 9, 10]], eos_ids=[8], hooks=log)
    assert generation.tokens == [[7], [8, 9, 10]]
    assert generation.steps == 4
    assert [mask for _, _, mask, *_ in log.begun[1:]] == [[[True], [True]], [[False], [True]], [[False], [True]]]
    assert log.ended == [[7, 8], [NO_TOKEN, 9], [NO_TOKEN, 10], [NO_TOKEN, NO_TOKEN]]


def test_hook_chain_calls_in_order() -> None:
    first, second = Log(), Log()
    tiny.greedy(tiny.model(), [[1, 2]], 2, hooks=HookChain(first, second))
    assert first.begun == second.begun
    assert first.ended == second.ended
    assert len(first.ended) == 2


def test_sampling_is_seeded() -> None:
    def sample(seed: int, temperature: float = 1.5, top_p: float = 1.0) -> list[list[int]]:
        return tiny.greedy(tiny.model(), PROMPTS, 6, sampler=Sampler(temperature, top_p, seed))

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert sample(3, top_p=1e-6) == tiny.greedy(tiny.model(), PROMPTS, 6)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(400, 4)
    assert set(Sampler(1.0, 0.5)(logits)) == {0}
    assert set(Sampler(1.0, 0.79)(logits)) == {0, 1}
    assert set(Sampler(1.0, 1.0)(logits)) == {0, 1, 2, 3}


def test_temperature_flattens() -> None:
    logits = torch.tensor([[2.0, 0.0]]).expand(4000, 2)
    for temperature in (0.5, 2.0):
        share = float(np.mean(np.equal(Sampler(temperature)(logits), 1)))
        assert share == pytest.approx(1 / (1 + np.exp(2.0 / temperature)), abs=0.03)


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    assert Sampler()(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])) == [1, 0]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=12))
def test_streamed_text_is_the_decoded_text_in_whole_characters(text: str) -> None:
    pieces: list[str] = []
    stream = TextStream(tiny.tokenizer(), pieces.append)
    for token in tiny.tokenizer()(text)["input_ids"]:
        stream.push(token)
    assert "".join(pieces) == text
    assert pieces == list(text)
    stream.close()
    assert pieces == list(text)


def test_stream_shows_an_unfinished_character_at_the_end_only() -> None:
    pieces: list[str] = []
    stream = TextStream(tiny.tokenizer(), pieces.append)
    for token in tiny.tokenizer()("aé")["input_ids"][:-1]:
        stream.push(token)
    assert pieces == ["a"]
    stream.close()
    assert pieces == ["a", "\ufffd"]


def test_generate_streams_the_chosen_lane_without_its_end_mark() -> None:
    loaded, pieces = tiny.model(), []
    stream = TextStream(tiny.tokenizer(), pieces.append, lane=1)
    generate(
        loaded.model,
        *left_pad(PROMPTS),
        forced_tokens=[[1], [*tiny.tokenizer()("héy")["input_ids"], 256], [2]],
        stream=stream,
    )
    assert pieces == ["h", "é", "y"]


def test_wrong_arguments() -> None:
    with pytest.raises(InputError, match=r"temperature must be 0, or at least 0\.001 and finite, got -1"):
        Sampler(-1)
    with pytest.raises(InputError, match="top_p must be above 0 and at most 1, got 0"):
        Sampler(1.0, 0.0)
    with pytest.raises(InputError, match="prompt must have at least one token, got none in prompt 1"):
        left_pad([[1], []])
    with pytest.raises(InputError, match="max_new_tokens must be at least 1, got 0"):
        tiny.greedy(tiny.model(), PROMPTS, 0)
    with pytest.raises(InputError, match="either max_new_tokens or forced_tokens"):
        tiny.greedy(tiny.model(), PROMPTS, 1, forced_tokens=[[1]] * 3)
    with pytest.raises(InputError, match="one list a lane \\(3\\), got 1"):
        tiny.logits_of(tiny.model(), PROMPTS, [[1]])


def test_a_lane_ends_with_the_token_that_completes_a_text() -> None:
    """One token a byte: the text is in the last of them, and other lanes go on."""
    loaded = tiny.model()
    whole = tiny.greedy(loaded, PROMPTS, 8)
    seen: list[list[int]] = []

    def stops(tokens: Sequence[int]) -> bool:
        seen.append([*tokens])
        return [*tokens] == whole[1][:3]

    assert tiny.greedy(loaded, PROMPTS, 8, stops=stops) == [whole[0], whole[1][:3], *whole[2:]]
    assert seen[0] == whole[0][:1], "the prompt is no part of what is looked at"


@pytest.mark.parametrize(
    ("text", "at"), [("lo w", 7), ("hello", 5), ("\u00e9", 13), ("d\u00e9", 13), ("x", None), ("", 1)]
)
def test_a_text_is_found_when_its_last_token_comes(text: str, at: int | None) -> None:
    tokens = [*tiny.tokenizer()("hello world\u00e9!")["input_ids"]]
    found = StopTexts(tiny.tokenizer(), ["no such text", text])
    ends = [count for count in range(1, len(tokens) + 1) if found(tokens[:count])]
    assert (ends[0] if ends else None) == at

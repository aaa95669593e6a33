"""Decode with a model's own forward pass: batches with padding, greedy or seeded sampling, teacher forcing, streaming.

Shapes: B lanes (sequences of a batch), S tokens a lane in a step (the prompt's in prefill, 1 in decode), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel, PreTrainedTokenizerBase

from real.checks import check_temperature
from traces.errors import InputError
from traces.schema import Phase

NO_TOKEN = -1
"""The next token of a lane that has ended."""
_IDLE_TOKEN = 0
"""What padding holds and an ended lane is fed: no token of a lane that goes on ever attends to it."""


class StepHooks(Protocol):
    """Something that is told when a forward pass begins and ends."""

    def begin_step(self, step_index: int, phase: Phase, mask: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        """Before the pass: ``mask`` [B, S] bool of the real tokens (neither padding nor of an ended lane), their
        ``positions`` in their sequences and their ``token_ids`` [B, S]; all three are on the model's device."""

    def end_step(self, next_tokens: list[int]) -> None:
        """After the pass: the token that follows in each of the B lanes, :data:`NO_TOKEN` where there is none."""


class HookChain:
    """Several hooks as one, called in the order given."""

    def __init__(self, *hooks: StepHooks) -> None:
        self._hooks = hooks

    def begin_step(self, step_index: int, phase: Phase, mask: Tensor, positions: Tensor, token_ids: Tensor) -> None:
        for hooks in self._hooks:
            hooks.begin_step(step_index, phase, mask, positions, token_ids)

    def end_step(self, next_tokens: list[int]) -> None:
        for hooks in self._hooks:
            hooks.end_step(next_tokens)


class Sampler:
    """Chooses the next tokens: the likeliest at temperature 0, else at random from the ``top_p`` likeliest mass.

    The draw happens on the CPU, so that a seed means the same on every device. Equal logits: the lowest token id.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        """Raises :class:`InputError` for a temperature that is none, or a ``top_p`` outside (0, 1]."""
        check_temperature(temperature)
        if not 0.0 < top_p <= 1.0:
            raise InputError(f"top_p must be above 0 and at most 1, got {top_p}")
        self._temperature = temperature
        self._top_p = top_p
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor) -> list[int]:
        """One token id for each row of ``logits`` [B, V]."""
        if self._temperature == 0.0:
            return [int(token) for token in logits.argmax(dim=-1).tolist()]
        probabilities = (logits.float().cpu() / self._temperature).softmax(dim=-1)
        ordered, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        nucleus = ordered.masked_fill(before >= self._top_p, 0.0)  # the likeliest token always stays
        drawn = torch.multinomial(nucleus, 1, generator=self._generator)
        return [int(token) for token in tokens.gather(-1, drawn).squeeze(-1).tolist()]


class TextStream:
    """Hands the text of one lane to ``on_text`` as it grows, whole characters only.

    A character of a byte-level vocabulary can span tokens: text that still ends in the replacement character waits.
    Only the tokens since the piece before last are decoded anew, because a piece's spacing can depend on the one
    before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None], lane: int = 0) -> None:
        self.lane = lane
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._tokens: list[int] = []
        self._shown = 0

    def push(self, token: int) -> None:
        """Takes the lane's next token."""
        self._tokens.append(token)
        self._emit(final=False)

    def close(self) -> None:
        """Hands over what still waits: the bytes of an unfinished character come out as a replacement character."""
        self._emit(final=True)

    def _emit(self, *, final: bool) -> None:
        text, before = self._decode(self._tokens), self._decode(self._tokens[: self._shown])
        if text.endswith("\ufffd") and not final:
            return
        if len(text) > len(before):
            self._on_text(text[len(before) :])
        self._tokens = self._tokens[self._shown :]
        self._shown = len(self._tokens)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class StopTexts:
    """Whether the tokens of a continuation have just come to hold one of some texts.

    The texts are sought in the last tokens, of which each has a byte of text or more, unless it is a special one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
        self._tokenizer, self._texts = tokenizer, texts
        self._most = 2 + max(len(text.encode()) for text in texts)

    def __call__(self, tokens: Sequence[int]) -> bool:
        last = self._tokenizer.decode(
            [*tokens[-self._most :]], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return any(text in last for text in self._texts)


@dataclass
class Generation:
    """What was generated: each lane's new tokens, the number of forward passes, and their last logits if asked for."""

    tokens: list[list[int]]
    steps: int
    logits: list[Tensor] = field(default_factory=list)  # a [B, V] for each step


def left_pad(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask [B, S] of prompts that end together; raises :class:`InputError` for an empty one."""
    empty = [lane for lane, tokens in enumerate(sequences) if not tokens]
    if empty or not sequences:
        raise InputError(f"prompt must have at least one token, got none in prompt {empty[0] if empty else 0}")
    length = max(len(tokens) for tokens in sequences)
    ids = torch.tensor([[_IDLE_TOKEN] * (length - len(tokens)) + list(tokens) for tokens in sequences])
    mask = torch.tensor([[0] * (length - len(tokens)) + [1] * len(tokens) for tokens in sequences])
    return ids, mask


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    *,
    max_new_tokens: int | None = None,
    eos_ids: Collection[int] = (),
    stops: Callable[[Sequence[int]], bool] | None = None,
    sampler: Sampler | None = None,
    hooks: StepHooks | None = None,
    forced_tokens: Sequence[Sequence[int]] | None = None,
    stream: TextStream | None = None,
    keep_logits: bool = False,
) -> Generation:
    """Decodes a left-padded batch ``input_ids`` [B, S] in lock-step: prefill is step 0, every further token one step.

    A lane ends with a token of ``eos_ids``, when ``stops`` says so of its new tokens, or after ``max_new_tokens``; its
    last token is not run through the model. It then idles, out of the hooks' mask, until all lanes have ended. With
    ``forced_tokens`` (the tokens that follow, for each lane) nothing is chosen: every given token *is* run through the
    model, as in their recording. An encoder-decoder reads a prompt's tokens but the last, which begins what it writes.
    Raises :class:`InputError` unless exactly one of ``max_new_tokens`` (at least 1) and ``forced_tokens`` is given.
    """
    lanes = _Lanes(len(input_ids), max_new_tokens, frozenset(eos_ids), forced_tokens, stops)
    choose = sampler or Sampler()
    generation = Generation(tokens=lanes.tokens, steps=0)
    with torch.inference_mode():
        batch = (_ReadBatch if model.config.is_encoder_decoder else _Batch)(model, input_ids, attention_mask)
        while True:
            if hooks is not None:
                phase = Phase.PREFILL if generation.steps == 0 else Phase.DECODE
                hooks.begin_step(generation.steps, phase, batch.mask, batch.positions, batch.token_ids)
            logits = batch.forward()
            next_tokens = lanes.advance(partial(choose, logits))
            generation.steps += 1
            if keep_logits:
                generation.logits.append(logits)
            if hooks is not None:
                hooks.end_step(next_tokens)
            if stream is not None and next_tokens[stream.lane] != NO_TOKEN:
                stream.push(next_tokens[stream.lane])
            if not any(lanes.alive):
                break
            batch.extend(next_tokens, lanes.alive)
    if stream is not None:
        stream.close()
    return generation


class _Lanes:
    """Which lanes go on, and with which token."""

    def __init__(
        self,
        count: int,
        limit: int | None,
        eos_ids: frozenset[int],
        forced: Sequence[Sequence[int]] | None,
        stops: Callable[[Sequence[int]], bool] | None,
    ) -> None:
        if (limit is None) == (forced is None):
            raise InputError("generate must be given either max_new_tokens or forced_tokens")
        if limit is not None and limit < 1:
            raise InputError(f"max_new_tokens must be at least 1, got {limit}")
        if forced is not None and len(forced) != count:
            raise InputError(f"forced_tokens must have one list a lane ({count}), got {len(forced)}")
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.alive = [True] * count
        self._limit = limit
        self._eos_ids = eos_ids
        self._forced = forced
        self._stops = stops

    def advance(self, choose: Callable[[], list[int]]) -> list[int]:
        """The next token of every lane (``NO_TOKEN`` for ended ones); a lane is alive while its token is to be run."""
        chosen = self._next_forced(self._forced) if self._forced is not None else choose()
        next_tokens = [token if alive else NO_TOKEN for token, alive in zip(chosen, self.alive, strict=True)]
        for lane, token in enumerate(next_tokens):
            if token != NO_TOKEN:
                self.tokens[lane].append(token)
            self.alive[lane] = token != NO_TOKEN and not self._ends(lane, token)
        return next_tokens

    def _next_forced(self, forced: Sequence[Sequence[int]]) -> list[int]:
        done = [len(tokens) for tokens in self.tokens]
        return [tokens[at] if at < len(tokens) else NO_TOKEN for tokens, at in zip(forced, done, strict=True)]

    def _ends(self, lane: int, token: int) -> bool:
        if self._limit is None:
            return False
        tokens = self.tokens[lane]
        return token in self._eos_ids or len(tokens) >= self._limit or (self._stops is not None and self._stops(tokens))


class _Batch:
    """The tensors of the next forward pass, and the KV cache."""

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        self._model = model
        self._cache: Cache = DynamicCache(config=model.config)
        self._attention = attention_mask.to(model.device, torch.long)
        self._padded = not bool(attention_mask.all())
        self.token_ids = input_ids.to(model.device)
        self.mask = self._attention.bool()
        self.positions = (self._attention.cumsum(dim=-1) - 1).clamp(min=0)

    def forward(self) -> Tensor:
        """Runs the step; returns the last position's logits [B, V]."""
        output = self._model(
            input_ids=self.token_ids,
            # without padding the mask says nothing, and looking into it would make the host wait for the device
            attention_mask=self._attention if self._padded else None,
            position_ids=self.positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def extend(self, next_tokens: list[int], alive: list[bool]) -> None:
        """Sets up a decode step; lanes that are not alive idle at their last position, out of ``mask``."""
        device = self._attention.device
        fed = [token if going else _IDLE_TOKEN for token, going in zip(next_tokens, alive, strict=True)]
        self.token_ids = torch.tensor(fed, device=device)[:, None]  # [B, 1]
        self.mask = torch.tensor(alive, device=device)[:, None]  # [B, 1]
        self.positions = self.positions[:, -1:] + self.mask.long()
        # an ended lane's idle tokens need no masking here: only that lane could attend to them
        self._attention = torch.cat([self._attention, torch.ones_like(self.token_ids)], dim=-1)


class _ReadBatch(_Batch):
    """The same of an encoder-decoder: the first step's rows are those of the encoder, then the decoder's first token.

    The encoder's are padded on the right, where they take no expert's capacity from others.
    """

    def __init__(self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor) -> None:
        """Raises :class:`InputError` for a prompt of one token, which leaves the encoder nothing to read."""
        if int(attention_mask.sum(dim=-1).min()) < 2:
            raise InputError("prompt must have two tokens or more, the last of which begins what is written, got one")
        order = attention_mask[:, :-1].argsort(dim=-1, descending=True, stable=True)  # padding last
        order = torch.cat([order, torch.full_like(order[:, :1], order.shape[1])], dim=-1)
        super().__init__(model, input_ids.gather(-1, order), attention_mask.gather(-1, order))
        self._cache = EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
        self._attention = self._attention[:, :-1]
        self._encoded: object = None

    def forward(self) -> Tensor:
        mask = self._attention if self._padded else None
        if self._encoded is None:
            self._encoded = self._model.get_encoder()(input_ids=self.token_ids[:, :-1], attention_mask=mask)
        output = self._model(
            encoder_outputs=self._encoded,
            attention_mask=mask,
            decoder_input_ids=self.token_ids[:, -1:],
            past_key_values=self._cache,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def extend(self, next_tokens: list[int], alive: list[bool]) -> None:
        read = self._attention  # it does not grow with what is written
        super().extend(next_tokens, alive)
        self._attention = read

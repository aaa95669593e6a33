"""Tokenizer of the small model and the token streams it is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
TokenArray = npt.NDArray[np.int64]


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with <pad>, <bos>, <eos> (ids 0, 1, 2); encoding puts <bos> first.

    Every byte sequence can be encoded. `vocab_size` must be at least 259 (256 bytes and three special tokens).
    """
    if vocab_size < 259:
        raise ValueError(f"vocab_size must be at least 259, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[TokenArray]:
    """Encode whole documents as <bos> text <eos>, one int64 array each."""
    encoded: list[TokenArray] = []
    backend = tokenizer.backend_tokenizer
    eos = backend.token_to_id(EOS)
    for start in range(0, len(texts), 64):
        batch = backend.encode_batch(list(texts[start : start + 64]))
        encoded.extend(np.array([*item.ids, eos], dtype=np.int64) for item in batch)
    return encoded


def training_stream(tokenizer: PreTrainedTokenizerFast, domains: Mapping[str, Sequence[str]], seed: int) -> TokenArray:
    """Join the documents of all domains in one seeded order, so that a sequence mostly stays in one document."""
    documents = encode_documents(tokenizer, [text for name in sorted(domains) for text in domains[name]])
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([documents[i] for i in order])


class SequenceSampler:
    """Cut a token stream in sequences and give batches in a seeded order that depends only on the step number.

    Each epoch visits every sequence once, in its own order and from its own starting offset.
    """

    def __init__(self, stream: TokenArray, length: int, batch_size: int, seed: int) -> None:
        self.count = (len(stream) - 1) // length - 1
        if self.count < batch_size:
            needed = (batch_size + 1) * length + 1
            raise ValueError(f"stream must hold at least {needed} tokens, got {len(stream)}")
        self._stream, self._length, self._batch_size, self._seed = stream, length, batch_size, seed
        self._epoch, self._order, self._offset = -1, np.empty(0, dtype=np.int64), 0

    def _enter(self, epoch: int) -> None:
        if epoch != self._epoch:
            rng = np.random.default_rng((self._seed, epoch))
            self._epoch, self._order = epoch, rng.permutation(self.count)
            self._offset = int(rng.integers(self._length))

    def batch(self, step: int) -> TokenArray:
        """Give the batch of step `step` (from 0): token ids [batch, length + 1], inputs and targets overlapping."""
        rows = []
        for number in range(step * self._batch_size, (step + 1) * self._batch_size):
            self._enter(number // self.count)
            start = self._offset + int(self._order[number % self.count]) * self._length
            rows.append(self._stream[start : start + self._length + 1])
        return np.stack(rows)

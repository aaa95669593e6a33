"""Measure a trained model on held-out text: losses against n-gram baselines, expert balance, locality of routing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from real.models.tokens import TokenArray, encode_documents

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class TrigramModel:
    """Interpolated Witten-Bell trigram over token ids, with bigram and add-one unigram below it.

    P(c|ab) = (n(abc) + t(ab) P(c|b)) / (n(ab) + t(ab)), where t counts the distinct tokens seen after a context;
    Witten and Bell, "The zero-frequency problem" (1991).
    """

    def __init__(self, stream: TokenArray, vocab_size: int) -> None:
        self._vocab = vocab_size
        self._unigrams = np.bincount(stream, minlength=vocab_size).astype(np.float64)
        pairs = stream[:-1] * vocab_size + stream[1:]
        triples = pairs[:-1] * vocab_size + stream[2:]
        self._pairs, self._triples = np.unique(pairs, return_counts=True), np.unique(triples, return_counts=True)
        heads = self._pairs[0] // vocab_size
        self._kinds_after_one = np.bincount(heads, minlength=vocab_size).astype(np.float64)
        self._count_after_one = np.bincount(heads, weights=self._pairs[1], minlength=vocab_size).astype(np.float64)
        heads, starts, kinds = np.unique(self._triples[0] // vocab_size, return_index=True, return_counts=True)
        self._kinds_after_two = heads, kinds
        self._count_after_two = heads, np.add.reduceat(self._triples[1], starts)

    def unigram(self, tokens: TokenArray) -> FloatArray:
        """Give the add-one unigram probability of each token."""
        return (self._unigrams[tokens] + 1.0) / (self._unigrams.sum() + self._vocab)

    def trigram(self, tokens: TokenArray) -> FloatArray:
        """Give the interpolated probability of each token of a document from the third on."""
        a, b, c = tokens[:-2], tokens[1:-1], tokens[2:]
        found = _lookup(self._pairs, b * self._vocab + c)
        bigram = _interpolate(found, self._count_after_one[b], self._kinds_after_one[b], self.unigram(c))
        pair = a * self._vocab + b
        found = _lookup(self._triples, pair * self._vocab + c)
        count, kinds = _lookup(self._count_after_two, pair), _lookup(self._kinds_after_two, pair)
        return _interpolate(found, count, kinds, bigram)


def _interpolate(found: FloatArray, count: FloatArray, kinds: FloatArray, lower: FloatArray) -> FloatArray:
    """Mix an estimate with the one below it; a context that was never seen leaves the lower one."""
    return np.where(count > 0, (found + kinds * lower) / np.maximum(count + kinds, 1.0), lower)


def _lookup(table: tuple[IntArray, IntArray], keys: IntArray) -> FloatArray:
    """Give the counts of `keys` in a sorted (keys, counts) table, 0 where absent."""
    position = np.minimum(np.searchsorted(table[0], keys), len(table[0]) - 1)
    return np.where(table[0][position] == keys, table[1][position], 0).astype(np.float64)


def lru_hit_ratio(choices: IntArray, num_experts: int, slots: int) -> float:
    """Give the share of assignments found in a least-recently-used cache of `slots` experts, token by token.

    `choices` [tokens, k] are one layer's experts. A token's experts are all looked up in the cache as it stood, then
    all admitted; the least recently used leave, the lowest id first among equals. The cache starts empty.
    """
    if not choices.shape[1] <= slots:
        raise ValueError(f"slots must be at least k = {choices.shape[1]}, got {slots}")
    last_use = [-1] * num_experts
    held, hits = 0, 0
    for now, experts in enumerate(choices.tolist()):
        for expert in experts:
            hits += last_use[expert] >= 0
        for expert in experts:
            held += last_use[expert] < 0
            last_use[expert] = now
        while held > slots:
            oldest = min((used, expert) for expert, used in enumerate(last_use) if used >= 0)[1]
            last_use[oldest] = -1
            held -= 1
    return hits / choices.size


def neighbour_overlap(choices: IntArray) -> float:
    """Give the mean share of a token's experts that the token before it also chose; `choices` [tokens, k]."""
    shared = (choices[1:, :, None] == choices[:-1, None, :]).any(2)
    return float(shared.mean())


def load_ratio(choices: IntArray, num_experts: int) -> float:
    """Give the load of the most used expert over the mean load; 1 is perfectly even. `choices` [tokens, k]."""
    load = np.bincount(choices.ravel(), minlength=num_experts)
    return float(load.max() / load.mean())


def routing_figures(choices: IntArray, num_experts: int, seed: int, lru_tokens: int) -> dict[str, Any]:
    """Give balance, overlap and cache figures of choices [layers, tokens, k], per layer means and the worst layer.

    The cache figures use the first `lru_tokens` tokens, once in order and once shuffled with `seed`.
    """
    k = choices.shape[2]
    loads = [load_ratio(layer, num_experts) for layer in choices]
    part = choices[:, :lru_tokens]
    shuffled = part[:, np.random.default_rng(seed).permutation(part.shape[1])]
    figures: dict[str, Any] = {
        "load_max_over_mean": max(loads),
        "load_max_over_mean_per_layer": loads,
        "neighbour_overlap": float(np.mean([neighbour_overlap(layer) for layer in choices])),
        "neighbour_overlap_chance": k / num_experts,
        "unused_experts": int(sum(num_experts - len(np.unique(layer)) for layer in choices)),
    }
    for percent in (25, 50):
        slots = num_experts * percent // 100
        ordered_ratios = [lru_hit_ratio(layer, num_experts, slots) for layer in part]
        shuffled_ratios = [lru_hit_ratio(layer, num_experts, slots) for layer in shuffled]
        figures[f"lru_{percent}"] = float(np.mean(ordered_ratios))
        figures[f"lru_{percent}_shuffled"] = float(np.mean(shuffled_ratios))
        figures[f"lru_{percent}_per_layer"] = [a - b for a, b in zip(ordered_ratios, shuffled_ratios, strict=True)]
    return figures


@dataclass
class DomainRun:
    """What one domain's held-out documents gave: summed losses (nats), counts and expert choices."""

    loss_nats: float
    predicted: int
    text_bytes: int
    choices: IntArray


@torch.no_grad()
def run_model(model: Qwen3MoeForCausalLM, documents: Sequence[TokenArray], length: int) -> tuple[float, int, IntArray]:
    """Run documents in windows of `length` tokens; return summed loss (nats), predicted tokens and choices.

    Choices are [layers, tokens, k] of every token that is an input, in reading order. Windows do not overlap, so a
    window's first tokens have little context.
    """
    total, predicted = 0.0, 0
    parts: list[IntArray] = []
    k = model.config.num_experts_per_tok
    for document in documents:
        for start in range(0, len(document) - 1, length):
            window = torch.from_numpy(document[start : start + length + 1])
            output = model(input_ids=window[None, :-1], output_router_logits=True, use_cache=False)
            losses = torch.nn.functional.cross_entropy(output.logits[0].float(), window[1:], reduction="sum")
            total, predicted = total + float(losses), predicted + len(window) - 1
            probs = torch.softmax(torch.stack(output.router_logits).float(), -1)
            parts.append(torch.topk(probs, k, dim=-1).indices.numpy())
    return total, predicted, np.concatenate(parts, axis=1)


def baseline_losses(baseline: TrigramModel, documents: Sequence[TokenArray]) -> dict[str, float]:
    """Give unigram and trigram cross-entropy (nats per token) of documents; <bos> stands twice before the text."""
    unigram, trigram, predicted = 0.0, 0.0, 0
    for document in documents:
        unigram -= float(np.log(baseline.unigram(document[1:])).sum())
        trigram -= float(np.log(baseline.trigram(np.concatenate((document[:1], document)))).sum())
        predicted += len(document) - 1
    return {"unigram_loss": unigram / predicted, "trigram_loss": trigram / predicted}


def evaluate(
    model: Qwen3MoeForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    heldout: Mapping[str, Sequence[str]],
    stream: TokenArray,
    *,
    seed: int,
    length: int = 512,
    lru_tokens: int = 4096,
    domain_tokens: int = 20_000,
) -> dict[str, Any]:
    """Evaluate on every domain's held-out documents; `stream` is the training stream, for the baselines.

    Losses are nats per token, and bits per byte of text. The first `domain_tokens` held-out tokens
    of each domain are run.
    """
    baseline = TrigramModel(stream, len(tokenizer))
    experts = model.config.num_experts
    runs: dict[str, DomainRun] = {}
    figures: dict[str, Any] = {"domains": {}}
    with Progress() as progress:
        for name in progress.track(sorted(heldout), description="evaluating"):
            documents = _limited(encode_documents(tokenizer, heldout[name]), domain_tokens)
            loss, predicted, choices = run_model(model, documents, length)
            runs[name] = DomainRun(loss, predicted, _text_bytes(tokenizer, documents), choices)
            entry = _loss_figures([runs[name]]) | baseline_losses(baseline, documents)
            figures["domains"][name] = entry | routing_figures(choices, experts, seed, lru_tokens)
    whole = np.concatenate([run.choices for run in runs.values()], axis=1)
    part = np.concatenate([run.choices[:, :lru_tokens] for run in runs.values()], axis=1)
    figures["overall"] = _loss_figures(list(runs.values())) | _overall_routing(whole, part, experts, seed)
    for kind in ("unigram_loss", "trigram_loss"):
        weighted = sum(figures["domains"][name][kind] * run.predicted for name, run in runs.items())
        figures["overall"][kind] = weighted / figures["overall"]["tokens"]
    return figures


def _limited(documents: list[TokenArray], domain_tokens: int) -> list[TokenArray]:
    """Keep documents in order until `domain_tokens` are reached; the last one is cut there."""
    kept: list[TokenArray] = []
    for document in documents:
        room = domain_tokens - sum(map(len, kept))
        if room >= 2:
            kept.append(document[:room])
    return kept


def _text_bytes(tokenizer: PreTrainedTokenizerFast, documents: Sequence[TokenArray]) -> int:
    """Give the size of the documents' text in UTF-8."""
    backend = tokenizer.backend_tokenizer
    return sum(len(backend.decode(document.tolist(), skip_special_tokens=True).encode()) for document in documents)


def _loss_figures(runs: Sequence[DomainRun]) -> dict[str, float | int]:
    loss, predicted = sum(run.loss_nats for run in runs), sum(run.predicted for run in runs)
    bits = loss / np.log(2.0)
    return {
        "tokens": predicted,
        "loss": loss / predicted,
        "bits_per_byte": float(bits / sum(run.text_bytes for run in runs)),
    }


def _overall_routing(whole: IntArray, part: IntArray, experts: int, seed: int) -> dict[str, Any]:
    """Join the load and overlap of all tokens with the cache figures of every domain's first tokens."""
    figures = routing_figures(whole, experts, seed, whole.shape[2])
    cached = routing_figures(part, experts, seed, part.shape[1])
    return figures | {name: value for name, value in cached.items() if name.startswith("lru_")}

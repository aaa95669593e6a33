"""Write the model card of the small model from its machine-readable figures (`training.json`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Figures = Mapping[str, Any]

HEADER = """---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [mixture-of-experts, qwen3_moe, expert-offloading]
---

# moetwin small

A small Mixture-of-Experts language model, trained from scratch for this project so that expert offloading can be
measured on real routing, offline and on an ordinary processor. Its architecture is Qwen3-MoE in small; it loads with
`AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`. It is a measuring object, not an assistant:
it continues text in the manner of its sources and knows next to nothing.
"""

LIMITS = """## Limitations

- It learned from a few tens of megabytes of English text and code, much of it old; its continuations are often wrong
  or senseless, and may repeat the prejudices of their sources. Do not use it for anything that matters.
- It was trained on sequences of {length} tokens; positions beyond that (up to {positions}) are accepted but untrained.
- Its experts are tiny ({expert_bytes:,} bytes each in bfloat16): loading times of such experts are latency, not
  bandwidth, and say nothing about large models. What carries over is the structure of the routing.
- Held-out documents come from the same packages as the training documents: the losses say how well the model fits
  these kinds of text, not how well it fits English.
- Wall-clock budget and thread timing decide how many steps a run gets, so a retrained model has other weights;
  `--steps` fixes the number of steps.
"""

LICENCE = """## Licence

The weights, the tokenizer and this card are licensed under Apache-2.0. The texts the model was trained on carry their
own licences, listed above; they are not included here, and the corpus builder fetches them from their packages.
"""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Give a Markdown table; the first column is text, the others are aligned to the right."""
    lines = ["| " + " | ".join(head) + " |", "|:--|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _architecture(figures: Figures) -> str:
    r = figures["recipe"]
    rows = [
        ("layers, all sparse", f"{r['layers']}"),
        ("hidden width", f"{r['hidden']}"),
        ("experts per layer, chosen per token", f"{r['experts']}, {r['top_k']}"),
        ("expert inner width", f"{r['expert_width']}"),
        ("query heads, key heads, head width", f"{r['heads']}, {r['kv_heads']}, {r['head_dim']}"),
        ("vocabulary (byte-level BPE)", f"{r['vocab_size']}"),
        ("parameters", f"{figures['parameters']:,}"),
        ("parameters used per token", f"{figures['active_parameters']:,}"),
        ("weights file, bfloat16", f"{figures['weights_bytes']:,} bytes"),
    ]
    return "## Architecture\n\n" + table(("property", "value"), rows)


def _data(figures: Figures) -> str:
    corpus = figures["corpus"]
    rows = []
    for source in corpus["sources"]:
        package = f"{source['kind']} {source['package']} {source['version']}"
        sizes = corpus["domains"][source["domain"]]
        counts = [f"{sizes[split]['documents']} / {sizes[split]['text_bytes']:,}" for split in ("train", "heldout")]
        rows.append((source["domain"], package, source["licence"], *counts))
    head = ("domain", "package", "licence", "training documents / bytes", "held-out documents / bytes")
    text = "Whole documents are held out by a seeded hash; repeated paragraphs are kept once over all domains.\n"
    return "## Data\n\n" + table(head, rows) + "\n" + text


def _training(figures: Figures) -> str:
    r, run = figures["recipe"], figures["run"]
    rows = [
        ("steps", f"{run['steps']:,}"),
        ("tokens seen", f"{run['tokens']:,} ({run['epochs']:.2f} epochs of {run['stream_tokens']:,})"),
        ("wall time", f"{run['wall_s'] / 60:.1f} minutes on {run['threads']} processor threads"),
        ("batch", f"{r['batch_size']} sequences of {r['sequence_length']} tokens"),
        ("optimiser", "Muon for attention and expert matrices, AdamW for embeddings, routers, norms"),
        ("peak learning rate, weight decay", f"{r['learning_rate']:g}, {r['weight_decay']:g}"),
        ("schedule", f"warm-up {r['warmup_share']:.0%}, linear decay to zero from {r['decay_from_share']:.0%} on"),
        ("balance loss, router z-loss", f"{r['balance_weight']:g}, {r['router_z_weight']:g} (of each layer, summed)"),
        ("gradient clip", f"{r['gradient_clip']:g}"),
        ("number format of matrix products", f"{r['number_format']} (weights, router, residual stream: float32)"),
        ("seed", f"{r['seed']}"),
        ("software", ", ".join(f"{name} {version}" for name, version in figures["software"].items())),
    ]
    command = f"Retrain with:\n\n```\n{figures['command']}\n```\n"
    return "## Training\n\n" + table(("property", "value"), rows) + "\n" + command


def _named(figures: Figures) -> list[tuple[str, Figures]]:
    evaluation = figures["evaluation"]
    return [*sorted(evaluation["domains"].items()), ("all", evaluation["overall"])]


def _rows(figures: Figures, *columns: Callable[[Figures], str]) -> list[tuple[str, ...]]:
    return [(name, *(column(entry) for column in columns)) for name, entry in _named(figures)]


def _losses(figures: Figures) -> str:
    head = ("domain", "tokens", "model", "trigram", "unigram", "bits per byte")
    rows = _rows(
        figures,
        lambda e: f"{e['tokens']:,}",
        lambda e: f"{e['loss']:.3f}",
        lambda e: f"{e['trigram_loss']:.3f}",
        lambda e: f"{e['unigram_loss']:.3f}",
        lambda e: f"{e['bits_per_byte']:.3f}",
    )
    text = (
        "Cross-entropy in nats per token, on the stored weights run in float32. The baselines are an add-one unigram\n"
        "and an interpolated Witten-Bell trigram, both estimated on the model's own training tokens. Each domain is\n"
        f"judged on its first held-out tokens, in windows of {figures['recipe']['sequence_length']} that do not "
        "overlap.\n"
    )
    return "## Held-out loss\n\n" + text + "\n" + table(head, rows)


def _routing(figures: Figures) -> str:
    head = ("domain", "max / mean load", "overlap", "chance", "LRU 25 %", "shuffled", "LRU 50 %", "shuffled")
    rows = _rows(
        figures,
        lambda e: f"{e['load_max_over_mean']:.2f}",
        lambda e: f"{e['neighbour_overlap']:.3f}",
        lambda e: f"{e['neighbour_overlap_chance']:.3f}",
        lambda e: f"{e['lru_25']:.3f}",
        lambda e: f"{e['lru_25_shuffled']:.3f}",
        lambda e: f"{e['lru_50']:.3f}",
        lambda e: f"{e['lru_50_shuffled']:.3f}",
    )
    text = (
        "Load is the most used expert's share over the mean share, in the worst layer. Overlap is the share of a\n"
        "token's experts that the token before it also chose. LRU is the hit ratio of a cache that holds that part of\n"
        "each layer's experts, one token at a time; all experts of a token are looked up before any is admitted.\n"
        "`shuffled` is the same cache on the same tokens in random order: what locality adds is the difference.\n"
        f"Cache figures use the first {figures['lru_tokens']:,} held-out tokens of each domain, joined for `all`.\n"
    )
    return "## Routing on held-out text\n\n" + text + "\n" + table(head, rows)


def render_card(figures: Figures) -> str:
    """Give the model card in Markdown for the figures of `training.json`."""
    r = figures["recipe"]
    limits = LIMITS.format(
        length=r["sequence_length"], positions=r["max_positions"], expert_bytes=6 * r["hidden"] * r["expert_width"]
    )
    parts = [HEADER, _architecture(figures), _data(figures), _training(figures), _losses(figures), _routing(figures)]
    return "\n".join([*parts, limits, LICENCE])

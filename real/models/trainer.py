"""One training run of the small model: its recipe, its losses, its steps and its saved state."""

from __future__ import annotations

import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from real.models.kernels import training_forward
from real.models.optimiser import make_optimisers
from real.models.tokens import SequenceSampler
from traces.paths import whole_file

STATE_NAME = "training-state.pt"
LOG_NAME = "training-log.jsonl"


@dataclass(frozen=True)
class Recipe:
    """All that shapes a run. Lengths are tokens; `minutes` is the wall-clock budget unless `steps` fixes the end."""

    minutes: float = 60.0
    steps: int = 0
    seed: int = 20
    layers: int = 8
    hidden: int = 192
    experts: int = 32
    top_k: int = 4
    expert_width: int = 64
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 4096
    max_positions: int = 2048
    sequence_length: int = 512
    batch_size: int = 16
    learning_rate: float = 6e-3
    weight_decay: float = 0.1
    warmup_share: float = 0.02
    decay_from_share: float = 0.3
    balance_weight: float = 0.01
    router_z_weight: float = 0.001
    gradient_clip: float = 1.0
    number_format: str = "bfloat16"

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the matrix products in training."""
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.number_format]


@dataclass
class Progressed:
    """How far a run has come: steps done, seconds trained (over all resumed parts) and the last logged figures."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan
    balance: float = math.nan


def make_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    """Build the untrained model, float32; layer outputs start small so that depth does not amplify them."""
    shape: dict[str, Any] = dict(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.expert_width,
        moe_intermediate_size=recipe.expert_width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.head_dim,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        router_aux_loss_coef=recipe.balance_weight,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = Qwen3MoeConfig(**shape)
    torch.manual_seed(recipe.seed)
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.mlp.gate.weight, std=0.02)
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.experts.down_proj):
                weight.mul_((2 * recipe.layers) ** -0.5)
    return model


def expert_loads(all_logits: list[Tensor], top_k: int) -> list[Tensor]:
    """Count each layer's assignments to each expert: float tensors [experts] from router logits [tokens, experts]."""
    chosen = (torch.topk(logits.detach(), top_k, dim=-1).indices.reshape(-1) for logits in all_logits)
    return [torch.bincount(c, minlength=logits.shape[1]).float() for c, logits in zip(chosen, all_logits, strict=True)]


def router_losses(all_logits: list[Tensor], loads: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Give the load-balancing loss (1 a layer when even) and the z-loss, each summed over losses of single layers.

    `loads` count the assignments of the whole batch, also when the logits [tokens, experts] are of a part of it: the
    balance is asked of the batch as a whole, so that one text's tokens may prefer some experts. Balance after Fedus
    et al., "Switch Transformers" (2021).
    """
    balance, z = torch.zeros(()), torch.zeros(())
    for logits, load in zip(all_logits, loads, strict=True):
        probs = torch.softmax(logits, -1).mean(0)
        balance = balance + len(load) * (load / load.sum() * probs).sum()
        z = z + torch.logsumexp(logits, -1).square().mean()
    return balance, z


class LoadExchange:
    """Let workers that each run a part of a batch add up their expert loads in the middle of a step."""

    def __init__(self, workers: int) -> None:
        self.barrier = threading.Barrier(workers)
        self._parts: list[list[Tensor]] = [[] for _ in range(workers)]

    def total(self, worker: int, loads: list[Tensor]) -> list[Tensor]:
        """Hand in the loads of `worker` and give the sums over all workers; waits for the others."""
        self._parts[worker] = loads
        self.barrier.wait()
        return [torch.stack(layer).sum(0) for layer in zip(*self._parts, strict=True)]


def rate_factor(share: float, recipe: Recipe) -> float:
    """Give the learning rate's factor at `share` (0 to 1) of the budget: warm-up, plateau, linear decay to zero."""
    if share < recipe.warmup_share:
        return max(share / recipe.warmup_share, 0.01)
    return max(0.0, min(1.0, (1.0 - share) / (1.0 - recipe.decay_from_share)))


class Trainer:
    """Model, optimisers and data of one run, with its saved state.

    With several `workers`, each runs a part of every batch in a thread of its own: they meet twice a step instead of
    in every operation, which matters on processors that other programs use as well. The gradients are added in the
    workers' order, so a run is repeatable with the same number of workers.
    """

    def __init__(self, recipe: Recipe, model: Qwen3MoeForCausalLM, sampler: SequenceSampler, workers: int = 1) -> None:
        if workers < 1 or recipe.batch_size % workers:
            raise ValueError(f"workers must divide batch_size {recipe.batch_size}, got {workers}")
        self.recipe, self.model, self.sampler, self.workers = recipe, model, sampler, workers
        self.parameters = list(model.parameters())
        self.optimisers = make_optimisers(model, recipe.learning_rate, recipe.weight_decay)
        self.progressed = Progressed()
        self._pool = ThreadPoolExecutor(workers)

    def share_done(self) -> float:
        """Give how much of the budget is used, 0 to 1."""
        if self.recipe.steps:
            return self.progressed.step / self.recipe.steps
        return self.progressed.elapsed_s / (60.0 * self.recipe.minutes)

    def step(self) -> None:
        """Train on one batch."""
        begin_s = time.perf_counter()
        rate = self.recipe.learning_rate * rate_factor(self.share_done(), self.recipe)
        batch = torch.from_numpy(self.sampler.batch(self.progressed.step))
        loss, balance = self._fill_gradients(batch)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.gradient_clip)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        list(self._pool.map(lambda optimiser: optimiser.step(), self.optimisers))
        self.progressed.step += 1
        self.progressed.loss, self.progressed.balance = loss, balance / self.recipe.layers
        self.progressed.elapsed_s += time.perf_counter() - begin_s

    def _fill_gradients(self, batch: Tensor) -> tuple[float, float]:
        """Set the parameters' gradients for token ids [batch, length + 1]; return cross-entropy and balance loss."""
        exchange = LoadExchange(self.workers)
        parts = batch.chunk(self.workers)
        results = list(self._pool.map(lambda job: self._run_part(job[0], job[1], exchange), enumerate(parts)))
        for parameter, *gradients in zip(self.parameters, *(gradients for _, _, gradients in results), strict=True):
            parameter.grad = gradients[0]
            for gradient in gradients[1:]:
                parameter.grad += gradient
        return sum(loss for loss, _, _ in results) / self.workers, sum(b for _, b, _ in results) / self.workers

    def _run_part(self, worker: int, part: Tensor, exchange: LoadExchange) -> tuple[float, float, tuple[Tensor, ...]]:
        """Give cross-entropy, balance loss and this part's share of the gradients."""
        try:
            loss, logits = training_forward(self.model, part[:, :-1], part[:, 1:], self.recipe.dtype)
            loads = exchange.total(worker, expert_loads(logits, self.recipe.top_k))
        except BaseException:
            exchange.barrier.abort()
            raise
        balance, z = router_losses(logits, loads)
        objective = loss + self.recipe.balance_weight * balance + self.recipe.router_z_weight * z
        gradients = torch.autograd.grad(objective / self.workers, self.parameters)
        return float(loss.detach()), float(balance.detach()), gradients

    def warm_up(self) -> None:
        """Run one part once, so that code is compiled before several threads want it."""
        part = torch.from_numpy(self.sampler.batch(0)).chunk(self.workers)[0]
        self._run_part(0, part, LoadExchange(1))

    def save_state(self, path: Path) -> None:
        """Write all that `load_state` needs to go on exactly; the file appears under its name only when complete."""
        state = {
            "recipe": asdict(self.recipe),
            "progressed": asdict(self.progressed),
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
        }
        with whole_file(path) as draft:
            torch.save(state, draft)

    def load_state(self, path: Path) -> None:
        """Go on from a saved state; raises ValueError when it was made with another recipe (budget apart)."""
        state = torch.load(path, weights_only=True)
        for name, value in asdict(self.recipe).items():
            if name not in ("minutes", "steps") and state["recipe"][name] != value:
                raise ValueError(f"{name} must equal the saved run's {state['recipe'][name]!r}, got {value!r}")
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.progressed = Progressed(**state["progressed"])


def run_training(trainer: Trainer, work: Path, save_every_s: float = 240.0, log_every: int = 20) -> None:
    """Train until the budget is used; keep a log and, every `save_every_s` seconds, a state to resume in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    saved_s = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress, (work / LOG_NAME).open("a", encoding="utf-8") as log:
        task = progress.add_task("training", total=1.0)
        while trainer.share_done() < 1.0:
            trainer.step()
            now = trainer.progressed
            text = f"step {now.step} loss {now.loss:.3f} balance {now.balance:.3f}"
            progress.update(task, completed=min(1.0, trainer.share_done()), description=text)
            if now.step % log_every == 0:
                log.write(json.dumps(asdict(now)) + "\n")
                log.flush()
            if time.perf_counter() - saved_s > save_every_s:
                trainer.save_state(work / STATE_NAME)
                saved_s = time.perf_counter()
    trainer.save_state(work / STATE_NAME)

"""Train the small Mixture-of-Experts language model that ships with the project.

One command rebuilds it: corpus, tokenizer, training within a wall-clock budget, evaluation and model card.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import PreTrainedTokenizerFast, Qwen3MoeForCausalLM

from real.models.card import render_card
from real.models.corpus import MANIFEST_NAME, Corpus, build_corpus, default_corpus_dir, load_corpus
from real.models.evaluate import evaluate
from real.models.kernels import compile_pieces, keep_heap_memory
from real.models.tokens import SequenceSampler, TokenArray, train_tokenizer, training_stream
from real.models.trainer import STATE_NAME, Recipe, Trainer, make_model, run_training
from sim.results import check_folder, write_folder
from traces.errors import InputError

LRU_TOKENS = 4096


def write_checkpoint(model: Qwen3MoeForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model (bfloat16 safetensors), its configuration and the tokenizer into `folder`."""
    stored = Qwen3MoeForCausalLM(model.config).bfloat16()
    stored.load_state_dict({name: value.to(torch.bfloat16) for name, value in model.state_dict().items()})
    stored.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _prepare_corpus(folder: Path) -> Corpus:
    """Load the corpus in `folder`; build it first when it is missing, in a folder without other files."""
    if not (folder / MANIFEST_NAME).exists():
        check_folder(folder, force=False)
        build_corpus(folder)
    return load_corpus(folder)


def _command(recipe: Recipe, compiled: bool) -> str:
    """Give the command line that repeats a run: every value that differs from the default."""
    parts = ["python -m real.models.train --out DIR"]
    parts += [f"--minutes {recipe.minutes:g}"] if not recipe.steps else [f"--steps {recipe.steps}"]
    parts += [f"--seed {recipe.seed}"] if recipe.seed != Recipe.seed else []
    return " ".join([*parts, *(["--compile"] if compiled else [])])


def collect_figures(trainer: Trainer, corpus: Corpus, stream_tokens: int, command: str) -> dict[str, Any]:
    """Give what `training.json` says about a run, without its evaluation."""
    recipe, config, done = trainer.recipe, trainer.model.config, trainer.progressed
    parameters = sum(weight.numel() for weight in trainer.model.parameters())
    expert = 3 * config.hidden_size * config.moe_intermediate_size * config.num_hidden_layers
    tokens = done.step * recipe.batch_size * recipe.sequence_length
    return {
        "format": 1,
        "command": command,
        "recipe": asdict(recipe),
        "parameters": parameters,
        "active_parameters": parameters - expert * (config.num_experts - config.num_experts_per_tok),
        "run": {
            "steps": done.step,
            "tokens": tokens,
            "stream_tokens": stream_tokens,
            "epochs": tokens / stream_tokens,
            "wall_s": done.elapsed_s,
            "tokens_per_s": tokens / done.elapsed_s,
            "threads": torch.get_num_threads() * trainer.workers,
            "workers": trainer.workers,
            "last_training_loss": done.loss,
        },
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        "corpus": corpus.manifest,
    }


def publish(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    stream: TokenArray,
    out: Path,
    command: str,
    *,
    force: bool = False,
) -> dict[str, Any]:
    """Write checkpoint, figures and card to `out`, evaluated on the stored weights; return the figures."""
    figures = collect_figures(trainer, corpus, len(stream), command)

    def fill(folder: Path) -> None:
        write_checkpoint(trainer.model, tokenizer, folder)
        stored = Qwen3MoeForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        recipe = trainer.recipe
        figures["weights_bytes"] = (folder / "model.safetensors").stat().st_size
        figures["lru_tokens"] = LRU_TOKENS
        sizes = {"length": recipe.sequence_length, "lru_tokens": LRU_TOKENS}
        figures["evaluation"] = evaluate(stored, tokenizer, corpus.heldout, stream, seed=recipe.seed, **sizes)
        (folder / "training.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(render_card(figures), encoding="utf-8")

    write_folder(out, fill, force=force)
    return figures


def train_model(
    recipe: Recipe,
    corpus: Corpus,
    out: Path,
    work: Path,
    *,
    workers: int = 1,
    resume: bool = False,
    command: str = "",
    force: bool = False,
) -> dict[str, Any]:
    """Train by `recipe` on `corpus` and write the finished model to `out`; `work` keeps the log and the saved state.

    With `resume`, goes on from the state in `work`; raises FileNotFoundError when there is none. With `force`, writes
    into a folder that holds files, and replaces those of the same name; without it, raises InputError for such an
    `out` before the training begins.
    """
    check_folder(out, force=force)
    domains = sorted(corpus.train)
    texts = (text for name in domains for text in corpus.train[name])
    tokenizer = train_tokenizer(texts, recipe.vocab_size, recipe.max_positions)
    stream = training_stream(tokenizer, corpus.train, recipe.seed)
    sampler = SequenceSampler(stream, recipe.sequence_length, recipe.batch_size, recipe.seed)
    trainer = Trainer(recipe, make_model(recipe, tokenizer), sampler, workers)
    if resume:
        trainer.load_state(work / STATE_NAME)
    if workers > 1:
        trainer.warm_up()
    run_training(trainer, work)
    repeat = command or _command(recipe, compiled=False)
    return publish(trainer, tokenizer, corpus, stream, out, repeat, force=force)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turns an InputError into one line on stderr and exit code 2."""
    try:
        yield
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Folder of the finished model; written only when all is done.")],
    minutes: Annotated[float, typer.Option(help="Wall-clock budget; the schedule ends with it.")] = 60.0,
    steps: Annotated[int, typer.Option(help="Fixed number of steps instead (0: use --minutes).")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights, document order and batches.")] = Recipe.seed,
    corpus: Annotated[Path | None, typer.Option(help="Corpus folder; built there when missing.")] = None,
    work: Annotated[Path | None, typer.Option(help="Folder of log and saved state (default: OUT-work).")] = None,
    workers: Annotated[int, typer.Option(help="Parts of a batch that run side by side, one thread each.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the saved state in the work folder.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile elementwise code (needs g++).")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that exists.")] = False,
) -> None:
    """Train the small model, evaluate it on held-out text and write checkpoint, figures and model card.

    Examples:

      python -m real.models.train --out small --minutes 60 --compile

      python -m real.models.train --out small --minutes 60 --compile --resume

      python -m real.models.train --out trial --steps 50 --corpus texts
    """
    if minutes <= 0:
        raise typer.BadParameter(f"minutes must be positive, got {minutes}")
    with _user_errors():
        check_folder(out, force=force)
    keep_heap_memory()
    if workers > 1:
        torch.set_num_threads(1)
    if compiled:
        compile_pieces()
    recipe = Recipe(minutes=minutes, steps=steps, seed=seed)
    folder = work or out.with_name(f"{out.name}-work")
    repeat = _command(recipe, compiled)
    with _user_errors():
        texts = _prepare_corpus(corpus or default_corpus_dir())
        train_model(recipe, texts, out, folder, workers=workers, resume=resume, command=repeat, force=force)
    typer.echo(f"model, figures and card are in {out}")


if __name__ == "__main__":
    app()

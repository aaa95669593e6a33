"""Options of the commands that run real models, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from real.checks import check_tokenizer
from real.cli import MOST_SEED, Domains, Prompts, choose
from real.jobs import Generation, Limits
from real.models.names import SMALL_NAME, check_model
from real.progress import status
from sim import options
from sim.spec import ModelSpec, catalogue
from sim.target import DTYPE_OF
from traces import prompts as prompt_files
from traces.errors import InputError, unknown_name
from traces.limits import MOST_BATCH
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import Trace

CpuThreads = Annotated[
    int | None,
    typer.Option(min=1, help="Cores of an expert on the CPU, beside a CUDA device.", show_default="torch's choice"),
]


@dataclass(frozen=True)
class ModelOptions:
    """The model that is run, and on what."""

    model: Annotated[
        str,
        typer.Option(
            help="moetwin-small, a checkpoint's folder, or with --random-weights a catalogue name or TOML file."
        ),
    ] = SMALL_NAME
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Build a model of these dimensions, with random weights.")
    ] = False
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")] = "auto"
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32"
    quant: Annotated[str | None, typer.Option(help="Keep the experts in int8 or int4.", show_default="as the rest")] = (
        None
    )
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of random weights, and of what is drawn at random.")
    ] = 0
    cpu_threads: CpuThreads = None

    def loading(self) -> dict[str, Any]:
        """How the model is loaded, as keywords."""
        names = ("random_weights", "device", "dtype", "quant", "seed", "cpu_threads")
        return {name: getattr(self, name) for name in names}

    def dimensions(self) -> ModelSpec:
        """What is known of the model before it is loaded; raises :class:`InputError` for one that cannot be."""
        if self.dtype not in DTYPE_OF.values():
            raise unknown_name("dtype", self.dtype, set(DTYPE_OF.values()))
        named = self.random_weights != (self.model == SMALL_NAME) and self.model in catalogue.model_names()
        if named and self.quant is None:
            return catalogue.model(self.model).in_dtype(self.dtype)  # at once: transformers takes seconds to import
        check_model(self.model, random_weights=self.random_weights)
        with status("loading"):
            from real.models.load import dimensions

            return dimensions(self.model, dtype=self.dtype, random_weights=self.random_weights, quant=self.quant)


@dataclass(frozen=True)
class Texts:
    """The prompts, or the routing in place of them, as they were asked for."""

    prompt: Annotated[str | None, typer.Option(help="A text to continue.")] = None
    prompts: Prompts = None
    domains: Domains = None
    routing: Annotated[
        str | None, typer.Option(help="Force the routing of this trace on the model, instead of prompts.")
    ] = None

    def recorded(self) -> Trace | None:
        """The trace whose routing is forced, if any; raises :class:`InputError` for options that contradict it."""
        if self.routing is None:
            return None
        if not (self.prompt is None and self.prompts is None and self.domains is None):
            raise InputError("routing must be given without prompts and domains, got both")
        return options.read_trace(self.routing, "routing")

    def read(self) -> list[Prompt]:
        """The prompts themselves; raises :class:`InputError` for options that contradict each other."""
        if self.prompt is None:
            return choose(load_prompts(self.prompts or SHIPPED_PROMPTS), self.domains)
        if self.prompts is not None or self.domains is not None:
            raise InputError("prompt must be given without prompts and domains, got both")
        if not self.prompt.strip():
            raise InputError("prompt must hold text, got an empty one")
        prompt_files.check_characters(self.prompt, "prompt")
        return [Prompt("prompt", self.prompt)]


@dataclass(frozen=True)
class LimitOptions:
    """The memory limit, and what policies are told beforehand."""

    cache: options.Cache = None
    gpu_memory: options.GpuMemory = None
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of KV cache to make room for; else the longest sequence.")
    ] = None
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Sequences decoded together, in lock-step.")] = 1
    calibration: options.Calibration = None
    profile: Annotated[
        Path | None,
        typer.Option(
            "--profile", help="Costs of `moetwin calibrate`, for policies that weigh them; else a catalogue's."
        ),
    ] = None

    def limits(self, recorded: Trace | None, *, together: bool, device: str) -> Limits:
        """The limit as the run takes it; the ``recorded`` trace is no calibration of its own run."""
        return Limits(
            self.batch,
            self.cache,
            self.gpu_memory,
            options.calibration_of(self.calibration, recorded, self.batch),
            together=together,
            profile=self.profile,
            context=self.context,
            device=device,
        )


@dataclass(frozen=True)
class Continuation:
    """How prompts are continued."""

    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to decode for each prompt.")] = 64
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is cut here.")] = 128
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A continuation ends with this text. Repeatable.")
    ] = None
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0

    def generation(self, of_model: ModelOptions, *, show: bool, full_trace: bool) -> Generation:
        """The same, as the run takes it; raises :class:`InputError` where the model cannot read prompts."""
        if of_model.random_weights:
            raise InputError("routing must be given with random-weights (they read no prompts), got none")
        check_tokenizer(of_model.model)
        return Generation(
            self.max_prompt_tokens,
            self.max_new_tokens,
            self.temperature,
            of_model.seed,
            show=show,
            full_trace=full_trace,
            stop=self.stop or (),
        )

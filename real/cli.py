"""Sub-commands that run a real model."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from real.checks import check_temperature
from real.models.names import SMALL_NAME, check_model
from traces import store
from traces.errors import InputError, unknown_name
from traces.limits import MOST_BATCH
from traces.prompts import SHIPPED_PROMPTS, Prompt, load_prompts
from traces.schema import Phase, Trace

if TYPE_CHECKING:  # torch and transformers are imported when a model is run, not to print a help text
    from real.record import Progress

RECORD_COMMAND = "moetwin trace record"

MOST_SEED = 2**63 - 1
"""The largest seed that every generator takes."""


@dataclass(frozen=True)
class RecordOptions:
    """What decides the content of a recording; written into the trace's ``made_by``, and read back from it."""

    model: str = "moetwin-small"
    prompts: str = ""
    domains: str = ""
    max_prompt_tokens: int = 128
    max_new_tokens: int = 128
    batch: int = 1
    lookahead: int = 3
    seed: int = 0
    temperature: float = 0.0
    lookahead_router: str = ""
    residual_prompts: str = ""

    def __post_init__(self) -> None:
        """Raises :class:`InputError` for a seed that is no seed, and for an unknown router of the look-ahead."""
        if not 0 <= self.seed <= MOST_SEED:
            raise InputError(f"seed must be from 0 to {MOST_SEED}, got {self.seed}")
        if self.lookahead_router not in ("", "residual"):
            raise unknown_name("lookahead-router", self.lookahead_router, {"plain", "residual"})
        if self.lookahead_router and not self.lookahead:
            raise InputError("lookahead must be at least 1 with lookahead-router residual, got 0")
        if self.residual_prompts and not self.lookahead_router:
            raise InputError("residual-prompts must be left out without lookahead-router residual, got both")

    def command(self) -> str:
        """The command line that records with these options; empty ones are left out."""
        given = [(field.name, getattr(self, field.name)) for field in fields(self)]
        words = [word for name, value in given if value != "" for word in (_flag(name), str(value))]
        return f"{RECORD_COMMAND} {shlex.join(words)}"

    @classmethod
    def parse(cls, command: str) -> RecordOptions:
        """The options of a :meth:`command`; raises :class:`InputError` when it is something else."""
        try:
            values = cls._values(command)
        except (ValueError, KeyError) as error:
            message = f"made_by must be a command {RECORD_COMMAND} with its options, got {command!r}"
            raise InputError(message) from error
        return cls(**values)

    @classmethod
    def _values(cls, command: str) -> dict[str, Any]:
        """The options by name; raises ValueError or KeyError for what cannot be one."""
        if not command.startswith(RECORD_COMMAND):
            raise ValueError(command)
        kinds = {_flag(field.name): (field.name, type(getattr(cls(), field.name))) for field in fields(cls)}
        words = shlex.split(command.removeprefix(RECORD_COMMAND))
        values: dict[str, Any] = {}
        for flag, word in zip(words[::2], words[1::2], strict=True):
            name, kind = kinds[flag]
            values[name] = kind(word)
        return values


Prompts = Annotated[
    Path | None,
    typer.Option(
        help='A .txt file, which is one prompt whatever its lines, or a .jsonl file with a prompt a line: {"domain": '
        '"mine", "text": "Once upon"}; else the project\'s own.'
    ),
]
Domains = Annotated[str | None, typer.Option(help="Only prompts of these domains, separated by commas.")]


def record(
    model: Annotated[str, typer.Option(help="moetwin-small, or the folder of a local checkpoint.")] = "moetwin-small",
    prompts: Prompts = None,
    domains: Domains = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=1, help="A longer prompt is cut here.")] = 128,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to decode for each prompt.")] = 128,
    batch: Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Prompts decoded together, in lock-step.")] = 1,
    lookahead: Annotated[int, typer.Option(help="Layers whose choice is predicted from each layer; 0 for none.")] = 3,
    seed: Annotated[
        int, typer.Option(min=0, max=MOST_SEED, help="Of the sampling, when the temperature is above 0.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="0 decodes greedily.")] = 0.0,
    lookahead_router: Annotated[
        str, typer.Option(help="plain, or residual: corrected by the mean change of the hidden state, as DALI does.")
    ] = "plain",
    residual_prompts: Annotated[
        Path | None,
        typer.Option(help="Where residual takes its means from, a file as for --prompts; else the project's others."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The trace file to write (.safetensors).")] = None,
    like: Annotated[Path | None, typer.Option(help="Record again as this trace was made, and compare.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file that --out names.")] = False,
) -> None:
    """Run a model on prompts, and write down what its routers chose.

    Examples:

      moetwin trace record --out code.safetensors --domains python_code

      moetwin trace record --model ./my-checkpoint --prompts mine.txt --batch 4 --out mine.safetensors

      moetwin trace record --domains essays --lookahead-router residual --out essays.safetensors

      moetwin trace record --like code.safetensors
    """
    if out is None and like is None:
        raise InputError("out must be given (or --like), got neither")
    if out is not None:
        store.check_trace_target(out, force=force)
    given = RecordOptions(
        model=model,
        prompts="" if prompts is None else str(prompts),
        domains=",".join(names_in(domains)),
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        batch=batch,
        lookahead=lookahead,
        seed=seed,
        temperature=temperature,
        lookahead_router="" if lookahead_router == "plain" else lookahead_router,
        residual_prompts="" if residual_prompts is None else str(residual_prompts),
    )
    original = None if like is None else store.load(like)
    trace = record_with(given if original is None else RecordOptions.parse(original.header.made_by))
    if out is not None:
        store.save(trace, out, force=force)
    Console().print(_summary(trace, out))
    if original is not None:
        _check_same(trace, original, like)


def record_with(options: RecordOptions) -> Trace:
    """Loads the model and the prompts that ``options`` name, and records; shows its progress on stderr.

    On one thread, so that the order of sums, and with it the trace's digest, does not depend on the number of cores.
    """
    check_temperature(options.temperature)
    file = Path(options.prompts) if options.prompts else SHIPPED_PROMPTS
    prompts = choose(load_prompts(file), options.domains or None)
    for note in unused_lanes(options.batch, len(prompts)):
        typer.echo(f"note: {note}", err=True)
    others = _others(options, prompts)
    check_model(options.model)
    import torch

    from real.generate import Sampler
    from real.models.load import dimensions, load
    from real.record import record as record_trace
    from real.record import router_means_of

    torch.set_num_threads(1)
    sampler = Sampler(options.temperature, seed=options.seed)
    _check_lookahead(options.lookahead, dimensions(options.model).moe_layers)
    loaded = load(options.model, with_experts=True)
    own = options.model == SMALL_NAME and not options.prompts
    tokens: dict[str, Any] = {"max_prompt_tokens": options.max_prompt_tokens, "max_new_tokens": options.max_new_tokens}
    with _progress(len(prompts)) as progress:
        means = router_means_of(loaded, others, **tokens) if others else ""
        return record_trace(
            loaded,
            prompts,
            batch=options.batch,
            **tokens,
            lookahead_depth=options.lookahead,
            router_means=means,
            sampler=sampler,
            made_by=options.command(),
            licence="Apache-2.0" if own else "",
            progress=progress,
        )


def _others(options: RecordOptions, prompts: list[Prompt]) -> list[Prompt]:
    """The prompts that the residual router is fitted to, none where it is not wanted; never one that is recorded.

    Raises :class:`InputError` when nothing is left.
    """
    if not options.lookahead_router:
        return []
    file, recorded = Path(options.residual_prompts or SHIPPED_PROMPTS), {prompt.text for prompt in prompts}
    others = [prompt for prompt in load_prompts(file) if prompt.text not in recorded]
    if not others:
        raise InputError(f"residual-prompts must hold others than those recorded, got none in {file.name}")
    return others


def _check_lookahead(depth: int, layers: int) -> None:
    """Raises :class:`InputError` for a depth beyond the layers; the default goes with every model.

    What it expects of layers beyond the last one is empty.
    """
    most, why = layers - 1, " for this model's layers"
    if most < RecordOptions.lookahead:
        most, why = RecordOptions.lookahead, ""
    if not 0 <= depth <= most:
        raise InputError(f"lookahead must be from 0 to {most}{why}, got {depth}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def names_in(domains: str | None) -> list[str]:
    """The names in a list with commas, none for None; raises :class:`InputError` for a list without a name."""
    names = [name.strip() for name in (domains or "").split(",") if name.strip()]
    if domains is not None and not names:
        raise InputError(f"domains must name at least one domain, got {domains!r}")
    return names


def choose(prompts: list[Prompt], domains: str | None) -> list[Prompt]:
    """The prompts of ``domains`` (comma-separated; all when None), in the order of the file."""
    wanted = names_in(domains)
    known = {prompt.domain for prompt in prompts}
    for name in wanted:
        if name not in known:
            raise unknown_name("domain", name, known)
    return [prompt for prompt in prompts if not wanted or prompt.domain in wanted]


def unused_lanes(batch: int, prompts: int) -> list[str]:
    """What has to be told where there are fewer prompts than the lanes that were asked for, or nothing."""
    if prompts >= batch:
        return []
    return [f"batch: {prompts} of {batch} lanes used, as many as there are prompts"]


@contextmanager
def _progress(prompts: int) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("recording", total=prompts)
        yield lambda done, steps: bar.update(task, completed=done, description=f"recording, step {steps}")


def _summary(trace: Trace, out: Path | None) -> Table:
    header = trace.header
    prefill = int((trace.phase == Phase.PREFILL).sum())
    table = Table(title="recorded trace", show_header=False)
    table.add_row("model", f"{header.model}, {header.layers} layers x {header.experts} experts, top-{header.top_k}")
    domains = len(set(header.domains))
    table.add_row(
        "sequences", f"{len(set(trace.sequence.tolist()))} over {domains} domain{'' if domains == 1 else 's'}"
    )
    table.add_row("tokens", f"{prefill} prefill, {len(trace) - prefill} decode, in {int(trace.step[-1]) + 1} steps")
    table.add_row("file", "not written" if out is None else f"{out} ({out.stat().st_size:,} bytes)")
    table.add_row("digest", trace.digest)
    return table


def _check_same(trace: Trace, original: Trace, path: Path | None) -> None:
    """Prints that the digests agree; raises :class:`InputError` when not, with the share of equal choices."""
    if trace.digest == original.digest:
        Console().print(f"identical to {path}")
        return
    same_shape = trace.expert_ids.shape == original.expert_ids.shape
    share = float((trace.expert_ids == original.expert_ids).mean()) if same_shape else 0.0
    raise InputError(
        f"digest must be {original.digest} as in {path}, got {trace.digest} ({share:.2%} of the expert ids are equal)"
    )

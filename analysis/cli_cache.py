"""``moetwin cache``: policies on a recorded trace without a clock, curves over capacities, and locality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from traces.errors import unknown_name
from traces.limits import MOST_BATCH
from traces.shipped import SHIPPED_TRACES

DEFAULT = "replay"
"""The sub-command that a trace right after ``cache`` belongs to."""

DEFAULT_POLICIES = "lru,lfu,lfru,belady"


class CacheGroup(TyperGroup):
    """A command whose first word may be a trace, which is then replayed."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            _check_word(args[0], self.commands)
            args = [DEFAULT, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """All of it: the sub-commands, and the options of the replay."""
        super().format_help(ctx, formatter)
        replay = self.commands[DEFAULT]
        replay.format_help(type(ctx)(replay, info_name=DEFAULT, parent=ctx), formatter)


def _check_word(word: str, commands: Any) -> None:
    """Raises :class:`InputError` for a word that is neither an option, nor a trace, nor a sub-command."""
    path = Path(word)
    if not (word.startswith("-") or path.suffix or path.exists() or word in SHIPPED_TRACES):
        raise unknown_name("trace or command", word, [*SHIPPED_TRACES, *commands])


app = typer.Typer(no_args_is_help=True)

TraceFile = Annotated[
    str, typer.Argument(metavar="TRACE", help="A trace file (.safetensors), or the name of one that ships.")
]
Policies = Annotated[
    str, typer.Option(help='Names with commas between them, or "all" that this trace can feed; see `cache policies`.')
]
CapacityShare = Annotated[
    str | None,
    typer.Option(help="Shares (25%) or slots a layer (8; of the pool when global), with commas.", show_default="25%"),
]
CapacityBytes = Annotated[
    str | None, typer.Option("--bytes", help="Sizes of the whole cache, as 4000MiB, instead of --capacity.")
]
Scope = Annotated[str, typer.Option(help="layer: each layer has its own slots; global: all share one pool.")]
Contract = Annotated[
    str,
    typer.Option(help="atomic: a layer's experts of a pass are judged at once; serial: one after the other."),
]
Order = Annotated[
    str | None,
    typer.Option(help="Of the serial contract: as-routed, ascending, or shuffled.", show_default="as-routed"),
]
Sequences = Annotated[str, typer.Option(help="carry: the cache lives on across sequences; fresh: empty at each.")]
Batch = Annotated[int, typer.Option(min=1, max=MOST_BATCH, help="Sequences that run together, in lock-step.")]
Warmup = Annotated[int, typer.Option(min=0, help="First passes that are replayed and not counted.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of all that is drawn at random.")]
CalibrationTrace = Annotated[
    str | None, typer.Option(help="Another trace, for policies that learn (static, belady-imitator).")
]
PolicyFile = Annotated[
    list[str] | None, typer.Option(help="A policy of your own, as my.py:MyPolicy; repeatable. See examples/.")
]
Option = Annotated[
    list[str] | None, typer.Option(help="A constant of a policy, as name=value or policy.name=value; repeatable.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse gates where a policy wants the router's scores.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON Lines, one object a row.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


@app.callback(cls=CacheGroup)
def _cache() -> None:
    """Replay a trace under cache policies, without a clock: what hits, what is loaded, how far from the optimum.

    A trace may follow right away: "moetwin cache TRACE" is "moetwin cache replay TRACE".

    Examples:

      moetwin cache mixed --policies lru,lfu,lfru,belady --capacity 12.5%,25%,50%

      moetwin cache mixed --policies all --contract serial --json

      moetwin cache curve mixed --policies lru,belady --out curve.png

      moetwin cache locality mixed
    """


@app.command(DEFAULT)
def replay_command(
    trace: TraceFile,
    policies: Policies = DEFAULT_POLICIES,
    capacity: CapacityShare = None,
    size: CapacityBytes = None,
    scope: Scope = "layer",
    contract: Contract = "atomic",
    order: Order = None,
    sequences: Sequences = "carry",
    phases: Annotated[str, typer.Option(help="all, prefill, decode; several with commas.")] = "all",
    batch: Batch = 1,
    warmup: Warmup = 0,
    seed: Seed = 0,
    calibration: CalibrationTrace = None,
    policy_file: PolicyFile = None,
    option: Option = None,
    strict: Strict = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write a table (.csv, .parquet) or a plot (.png, .svg).")
    ] = None,
    force: Force = False,
) -> None:
    """Replay a trace under several policies and capacities: hits with intervals, misses, bytes, share of the gap.

    Examples:

      moetwin cache replay mixed --policies lru,mrs,belady --capacity 25%,50% --phases prefill,decode

      moetwin cache replay trace.safetensors --policies lru --scope global --bytes 4000MiB

      moetwin cache replay mixed --policies lru --policy-file my.py:MyPolicy --out table.csv
    """
    from analysis import cache_commands as work

    request = work.Request(
        trace=trace,
        policies=policies,
        scope=scope,
        contract=contract,
        order=order,
        sequences=sequences,
        batch=batch,
        warmup=warmup,
        seed=seed,
        calibration=calibration,
        policy_file=policy_file or (),
        option=option or (),
        strict=strict,
    )
    work.replay_trace(request, capacity=capacity, size=size, phases=phases, as_json=as_json, out=out, force=force)


@app.command("curve")
def curve_command(
    trace: TraceFile,
    policies: Policies = "lru,belady",
    capacity: Annotated[
        str, typer.Option(help="Shares at which policies without a curve are replayed, and that the table shows.")
    ] = "12.5%,25%,50%,75%",
    unit: Annotated[str, typer.Option(help="What capacities are counted in: slots, or bytes.")] = "slots",
    scope: Scope = "layer",
    contract: Contract = "atomic",
    order: Order = None,
    sequences: Sequences = "carry",
    phase: Annotated[str, typer.Option(help="all, prefill, or decode.")] = "all",
    batch: Batch = 1,
    warmup: Warmup = 0,
    seed: Seed = 0,
    calibration: CalibrationTrace = None,
    policy_file: PolicyFile = None,
    option: Option = None,
    strict: Strict = False,
    as_json: AsJson = False,
    out: Annotated[
        Path | None, typer.Option(help="Also write a plot (.png, .svg) or a table (.csv, .parquet).")
    ] = None,
    force: Force = False,
) -> None:
    """Hits at every capacity at once for lru and belady, and at a few for other policies.

    Examples:

      moetwin cache curve mixed --policies lru,belady --out curve.png

      moetwin cache curve mixed --policies lru,lfu,belady --contract serial --phase decode --json
    """
    from analysis import cache_commands as work

    request = work.Request(
        trace=trace,
        policies=policies,
        scope=scope,
        contract=contract,
        order=order,
        sequences=sequences,
        batch=batch,
        warmup=warmup,
        seed=seed,
        calibration=calibration,
        policy_file=policy_file or (),
        option=option or (),
        strict=strict,
    )
    work.draw_curves(request, capacity=capacity, unit=unit, phase=phase, as_json=as_json, out=out, force=force)


@app.command("locality")
def locality_command(
    trace: TraceFile,
    contract: Contract = "atomic",
    seed: Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write a plot (.png, .svg).")] = None,
    force: Force = False,
) -> None:
    """Tell whether a model is worth caching: what popularity and order of its routing promise.

    Every number is defined in docs/metrics.md, but for the last table: LRU on the trace against LRU on the same tokens
    in a shuffled order. What the two differ in is what order gives, and not popularity.

    Examples:

      moetwin cache locality mixed

      moetwin cache locality trace.safetensors --json
    """
    from analysis import cache_commands as work

    work.tell_locality(trace, contract=contract, seed=seed, as_json=as_json, out=out, force=force)


@app.command("policies")
def policies_command(as_json: AsJson = False) -> None:
    """List the eviction policies: what each one does, needs, and comes from.

    Examples: moetwin cache policies
    """
    from analysis import cache_commands as work

    work.list_policies(as_json=as_json)

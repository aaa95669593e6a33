"""``moetwin sweep``: a grid of runs in one table, and its plots."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from traces.errors import unknown_name

DEFAULT = "run"
"""The sub-command that a file right after ``sweep`` belongs to."""


class SweepGroup(TyperGroup):
    """A command whose first word may be a grid, which is then run."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in {*self.commands, *ctx.help_option_names}:
            path = Path(args[0])
            if not (args[0].startswith("-") or path.suffix or path.exists()):
                raise unknown_name("grid or command", args[0], self.commands)
            args = [DEFAULT, *args]
        rest: list[str] = super().parse_args(ctx, args)
        return rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """All of it: the sub-commands, and the options of a run."""
        super().format_help(ctx, formatter)
        run = self.commands[DEFAULT]
        run.format_help(type(ctx)(run, info_name=DEFAULT, parent=ctx), formatter)


app = typer.Typer(no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON Lines instead, one object a row.")]


@app.callback(cls=SweepGroup)
def _sweep() -> None:
    """Run a grid of systems, machines, caches, batches or seeds in parallel, into one table; and plot it.

    A grid may follow right away: "moetwin sweep GRID" is "moetwin sweep run GRID".

    Examples:

      moetwin sweep examples/pcie.toml --jobs 2 --out sweep

      moetwin sweep examples/pcie.toml --out sweep --resume

      moetwin sweep plot sweep --out sweep.png
    """


@app.command(DEFAULT)
def run_command(
    grid: Annotated[Path, typer.Argument(help="A TOML file with the tables base and axes.", show_default=False)],
    out: Annotated[Path, typer.Option(help="Folder for the table, sweep.parquet, and for what is known of each run.")],
    jobs: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Processes that run points.", show_default="one a core")
    ] = None,
    backend: Annotated[str, typer.Option(help="processes, or dask (the extra moetwin\\[cluster]).")] = "processes",
    scheduler: Annotated[
        str | None,
        typer.Option(help="Address of a Dask scheduler, as tcp://HOST:8786.", show_default="one made for the sweep"),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on in a folder that exists: what it holds is not run again.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run every point of a grid, and keep each outcome as soon as it is there.

    The table base holds what all points share, the table axes a list of values
    for each field that differs, or a range such as {from = 4, to = 64,
    steps = 5, scale = "log"}. Fields are trace, system, model, hardware, cache,
    batch, seed and all others of `moetwin simulate`; dotted names go further:
    "system.evict", "system.options.prefetch.depth", "hardware.link_gb_per_s",
    "model.expert_bits". Files are sought beside the grid. A number as cache is
    slots a layer for every system, also for one with a single pool.

    A point that cannot run, such as one whose cache is too small, is a row with
    the status "refused" and the reason. With --resume the axes may have changed
    since: only new points are run. A run is known by its content (traces,
    files, settings, code): nothing that has changed is used again, and nothing
    is run twice.

    Examples:

      moetwin sweep examples/pcie.toml --jobs 2 --out sweep

      moetwin sweep examples/pcie.toml --out sweep --backend dask --scheduler tcp://10.0.0.1:8786 --resume
    """
    from analysis import sweep_commands as work

    count = jobs or len(os.sched_getaffinity(0))
    work.run(grid, out, jobs=count, backend=backend, scheduler=scheduler, resume=resume, as_json=as_json)


@app.command("plot")
def plot_command(
    sweep: Annotated[Path, typer.Argument(help="Folder that a sweep was written to.", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The plot, .png or .svg; else only words.")] = None,
    kind: Annotated[
        str | None,
        typer.Option(help="lines, heatmap, crossovers, or pareto.", show_default="lines; heatmap for two numbers"),
    ] = None,
    value: Annotated[
        str, typer.Option(help="The figure to show: tokens_per_s, stall_share... a column of the table.")
    ] = "tokens_per_s",
    x: Annotated[str | None, typer.Option(help="Axis (of pareto: column) from left to right.")] = None,
    y: Annotated[str | None, typer.Option(help="Axis from bottom to top, of a heatmap.")] = None,
    hue: Annotated[str | None, typer.Option(help="Axis that lines or points are told apart by.")] = None,
    where: Annotated[
        list[str] | None, typer.Option(metavar="AXIS=VALUE", help="Only the points with this value. Repeatable.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the crossovers, or the Pareto front, as JSON Lines.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Plot a sweep, and tell who is best where.

    Means over seeds are shown where the grid has several. Where two lines cross
    is interpolated between the points on either side, on the logarithm of the
    axis where its largest value is eight times the smallest or more. Points
    whose decode rate cannot be told from the best, over the same resamples of
    the sequences, are named. Bounds (who knows the future, or holds every
    expert) and points that compute something else than the model are shown
    apart and win nothing. GPU memory that is not equal is told.

    Examples:

      moetwin sweep plot sweep --out sweep.png

      moetwin sweep plot sweep --kind crossovers --x hardware.link_gb_per_s --hue system --json

      moetwin sweep plot sweep --kind pareto --x gpu_bytes --hue system --out front.svg
    """
    from analysis import sweep_commands as work

    view = work.View(kind=kind, value=value, x=x, y=y, hue=hue, where=tuple(where or ()))
    work.plot(sweep, view, out=out, as_json=as_json, force=force)

"""The look that all figures share: a palette that colour-blind readers can tell apart, light axes, readable text.

Colours after M. Okabe and K. Ito, "Color Universal Design" (2008). Every colour of a figure is one of these constants,
so that a page can replace each of them (light and dark) in the figure's SVG.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

INK = "#24292f"
MUTED = "#6a737d"
GRID = "#dfe3e8"
PAPER = "#fefefe"
MEASURED = "#0072b2"
SIMULATED = "#e69f00"

COMPONENT_COLOURS: dict[str, str] = {
    "dense_s": "#56b4e9",
    "gpu_experts_s": "#009e73",
    "stall_s": "#d55e00",
    "host_s": "#8c959f",
    "head_s": "#cc79a7",
    "other_s": "#b9c0c8",
}

CELL_COLOURS: dict[str, str] = {
    "resident, not used": "#0072b3",
    "used, was resident (hit)": "#0072b3",
    "copied in this step": "#d55e01",
    "run on the CPU": "#cc79a8",
}
"""What a cache did with an expert in a step. The keys are the legend, in the order of the codes 1 to 4."""

TEXT_PT = 9.0
WIDE = 8.6
HALF = 4.6


def axes(width: float, height: float, *, x: str, y: str = "") -> tuple[Figure, Axes]:
    """A figure of one set of axes, in inches, with its labels; units belong into the labels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0.0)
    ax = figure.add_subplot()
    clean(ax)
    ax.set_xlabel(x, color=INK, fontsize=TEXT_PT)
    ax.set_ylabel(y, color=INK, fontsize=TEXT_PT)
    return figure, ax


def clean(ax: Axes) -> None:
    """Leaves the left and bottom lines, a light grid behind the data, and text in ink."""
    ax.patch.set_alpha(0.0)
    ax.set_axisbelow(True)
    ax.grid(True, color=GRID, linewidth=0.7)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color(MUTED)
        ax.spines[side].set_linewidth(0.8)
    ax.tick_params(colors=INK, labelsize=TEXT_PT - 1, color=MUTED, width=0.8, length=3)


def legend(ax: Axes, *, columns: int) -> None:
    """One line of keys above the axes, without a frame."""
    ax.legend(
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        ncols=columns,
        frameon=False,
        fontsize=TEXT_PT - 1,
        labelcolor=INK,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        borderaxespad=0.3,
    )

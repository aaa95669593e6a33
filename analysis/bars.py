"""What the project asks of the simulator: bars of a validation's figures. Imports nothing, for the suite of the GPU."""

from __future__ import annotations

BARS: dict[str, dict[str, float]] = {
    "cpu": {"median": 0.10, "p90": 0.20, "skill": 0.7, "kendall_tau": 0.9},
    "gpu": {"median": 0.05, "p90": 0.15, "skill": 0.5, "kendall_tau": 0.95},
}
"""Bars by figure, on the CPU in the GPU's role and on a GPU."""

SHARES = ("median", "p90")
"""Figures that are shares, and shown in percent."""

MORE_IS_BETTER = ("kendall_tau",)


def holds(figure: str, value: float, bar: float) -> bool:
    """Whether a figure holds its bar; nan never does."""
    return value >= bar if figure in MORE_IS_BETTER else value <= bar


def asked(figure: str, bar: str) -> str:
    """A bar, given as it is shown, in words."""
    return f"at {'least' if figure in MORE_IS_BETTER else 'most'} {bar}"

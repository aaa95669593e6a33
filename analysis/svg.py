"""Figures as SVG that is part of an HTML page: its text is text, and its colours follow the page's theme."""

from __future__ import annotations

import io
import re

import matplotlib as mpl
from matplotlib.figure import Figure

from analysis import style

THEME: dict[str, str] = {
    style.INK: "var(--ink)",
    style.MUTED: "var(--muted)",
    style.GRID: "var(--grid)",
    style.PAPER: "var(--paper)",
    style.MEASURED: "var(--measured)",
    style.SIMULATED: "var(--simulated)",
}
"""Colours of the figures that the page defines for light and for dark."""

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as one ``<svg>`` element without any address in it; ``name`` keeps its ids apart from others'.

    ``label`` is read out by screen readers. The same figure gives the same text every time.
    """
    text = _draw(figure, name)
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"(font: [^;\"]*?px)[^;\"]*", rf"\1 {_FONT}", text)
    for colour, variable in THEME.items():
        text = text.replace(colour, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{_attribute(label)}"', 1).strip()


def _draw(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": style.TEXT_PT}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return buffer.getvalue()


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")

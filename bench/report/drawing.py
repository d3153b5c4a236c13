"""Figures by Matplotlib as SVG inside a page: they take the page's colours, light or dark, and need no other file.

A figure is drawn about as wide as a phone, so that its letters keep their size there; a page puts several in a row.
"""

import io
import re
from typing import Any

import matplotlib
from matplotlib.figure import Figure

WIDTH_INCHES = 4.1  # 394 CSS pixels; a phone has 360 to 430
# By the name of the CSS variable that replaces each in a page. As they stand they are readable on white.
COLOURS = {
    "ink": "#1b2027",
    "muted": "#5d6774",
    "grid": "#dde1e6",
    "paper": "#fffffe",
    "dense": "#6b7a90",
    "pruned": "#c2500b",
    "ideal": "#9fb4d0",
}
STYLE: Any = {
    "svg.fonttype": "none",  # letters stay letters: small, searchable, in the reader's font
    "svg.hashsalt": "report",  # the same figure gives the same file
    "text.parse_math": False,  # a name with $ in it is no formula
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
in_style = matplotlib.rc_context(STYLE)  # a decorator of what draws


def new_figure(height: float, rows: int = 1, **options: Any):
    """A figure of that height in inches with `rows` axes below each other; returns the figure and the list of axes."""
    figure = Figure(figsize=(WIDTH_INCHES, height), layout="constrained")
    axes = figure.subplots(rows, 1, squeeze=False, **options)
    return figure, list(axes[:, 0])


def to_svg(figure, name: str, label: str) -> str:
    """Markup for a page: an <svg> whose ids begin with `name`, read out as `label`."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    body = svg[svg.index(">") + 1 :]
    (box,) = re.findall(r'viewBox="([^"]+)"', svg)
    body = re.sub(r'(\bid=")', rf"\1{name}-", body)
    body = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    for variable, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{variable})")
    attributes = f'viewBox="{box}" role="img" aria-label="{_attribute(label)}"'
    return f'<svg {attributes} style="max-width: {WIDTH_INCHES * 96:.0f}px">{body.strip()}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace(">", "&gt;")

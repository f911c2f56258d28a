"""How a report's figures look, and how they become SVG to be set inline.

Inline figures take the page's colours, dark or light, on screen or on paper; their text can be searched and copied. Colours
are written as the page's variables, with the value they have on white as the fallback.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's, which colour-blind readers tell apart, then some for arms of more than six joints.
SERIES = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a5195", "#8c8c00", "#8a817c", "#a65628")
INK, GREY, GRID, SHADE = "#32373d", "#8b929a", "#e3e6ea", "#f0f2f4"
VARIABLES = {
    INK: "--ink",
    GREY: "--grey",
    GRID: "--grid",
    SHADE: "--shade",
    **{hue: f"--s{k}" for k, hue in enumerate(SERIES)},
}
_NAME = 30  # letters
_POINTS = 1200  # of a line: two for each pixel column, its lowest and its highest value
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names are names, dollar signs and all
    # Verdana is as wide as DejaVu, which lays the text out, and is where DejaVu is not.
    "font.family": ["DejaVu Sans"],
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.xmargin": 0.0,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "figure.facecolor": "none",
}


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an ``<svg>`` element; ``name`` keeps its ids apart from those of others on the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None}, bbox_inches="tight", pad_inches=0.03)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"|\s(width|height)="[\d.]+pt"', "", text)  # HTML knows; the page decides the width
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    text = re.sub(r'\bd="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for colour, variable in VARIABLES.items():
        text = text.replace(f": {colour}", f": var({variable}, {colour})")
    text = text.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    return text.strip()


def styled() -> AbstractContextManager:
    """Return the context all figures are drawn in."""
    return matplotlib.rc_context(_STYLE)


def thin(t: np.ndarray, y: np.ndarray, points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return few points that draw the same line: the lowest and the highest of each stretch, a break where samples miss."""
    gap = np.flatnonzero(np.diff(t) > 10 * np.median(np.diff(t))) + 1 if len(t) > 2 else []
    if len(t) <= points:
        return np.insert(t, gap, np.nan), np.insert(y, gap, np.nan)
    edges = np.unique(np.concatenate([np.linspace(0, len(t), points // 2 + 1).astype(int), gap])).astype(int)
    keep = [{a + int(y[a:b].argmin()), a + int(y[a:b].argmax())} for a, b in zip(edges, edges[1:])]
    index = np.array(sorted(set().union(*keep)))
    breaks = np.searchsorted(index, gap)
    return np.insert(t[index], breaks, np.nan), np.insert(y[index], breaks, np.nan)


def short(name: str) -> str:
    """Return a name that leaves room for the figure."""
    name = f" {name}" if name.startswith("_") else name  # legends leave out what begins with an underscore
    return name if len(name) <= _NAME else f"{name[: _NAME - 1]}…"


def legend(figure: Figure, axes: Sequence[Axes], loc: str = "outside upper left") -> None:
    """Write one legend for all axes above them."""
    found: dict[str, object] = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        found.update({label: handle for handle, label in zip(handles, labels) if label not in found})
    figure.legend(found.values(), found.keys(), loc=loc, ncols=len(found), columnspacing=1.6, markerscale=2)

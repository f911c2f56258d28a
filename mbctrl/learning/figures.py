"""The figures of an evaluation's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from mbctrl.calibrate.drawing import GREY, SERIES, SHADE, legend, styled, svg
from mbctrl.learning.evaluate import FEWEST, KINDS, Errors
from mbctrl.learning.expected import Expected

_SMALLEST = 1e-4  # [mm]: what is below is drawn there


def draw_compounding(errors: Sequence[Errors], dt: float, expected: Expected | None) -> str:
    """Draw the tool's error over time ahead, a panel a kind: medians, and up to the 95 % quantile shaded; dashed, the same of what
    the first model expects of itself."""
    with styled():
        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        panels = figure.subplots(1, len(KINDS), sharey=True)
        for k, (axes, kind) in enumerate(zip(panels, KINDS)):
            for one, colour in zip(errors, SERIES):
                steps = [step for step in range(1, len(one.tool) + 1) if (one.kind[step - 1] == k).sum() >= FEWEST]
                if not steps:
                    continue
                middle, high = np.array([one.summary(step, k)[0][-1] for step in steps]).T * 1e3
                time = dt * np.array(steps)
                axes.plot(time, np.maximum(middle, _SMALLEST), color=colour, label=one.name)
                axes.fill_between(time, np.maximum(middle, _SMALLEST), np.maximum(high, _SMALLEST), color=colour, alpha=0.15, lw=0)
                if expected is not None and one is errors[0]:
                    lines = np.array([expected.band(step, k) for step in steps]).T * 1e3
                    for line, label in zip(lines, (f"as {one.name} expects ({expected.way})", None)):
                        axes.plot(time, np.maximum(line, _SMALLEST), color=colour, lw=1, ls="--", label=label)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.set_title(kind)
            axes.set_xlabel("time ahead [s]")
        panels[0].set_ylabel("tool error [mm]")
        legend(figure, list(panels))
        return svg(figure, "compounding")


def draw_gate(position: np.ndarray, gate: np.ndarray, driven: np.ndarray) -> str:
    """Draw the gate over the workspace: tool positions (3, N) [m] of random configurations, and where the logs went (3, T)."""
    with styled():
        figure = Figure(figsize=(10.5, 4.0), layout="constrained")
        panels = figure.subplots(1, 3)
        colours = LinearSegmentedColormap.from_list("gate", [SHADE, SERIES[5], SERIES[0]])
        order = np.argsort(gate)  # open gates above closed ones
        for axes, (i, j) in zip(panels, ((0, 2), (1, 2), (0, 1))):
            dots = axes.scatter(
                position[i, order], position[j, order], c=gate[order], cmap=colours, vmin=0, vmax=1, s=4, rasterized=True
            )
            axes.scatter(driven[i], driven[j], color=SERIES[3], s=1.5, label="logs", rasterized=True)
            axes.set_xlabel(f"{'xyz'[i]} [m]")
            axes.set_ylabel(f"{'xyz'[j]} [m]")
            axes.set_aspect("equal", adjustable="datalim")
        figure.colorbar(dots, ax=panels, label="gate", shrink=0.8)
        legend(figure, [panels[0]])
        return svg(figure, "gate")


def draw_coverage(groups: Sequence[tuple[str, np.ndarray]], joints: Sequence[str]) -> str:
    """Draw the share of velocities in 90 % intervals, by joint; (name, (nv,)) a group."""
    if not groups:
        return ""
    with styled():
        figure = Figure(figsize=(10.5, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.axhspan(80, 97, color=SHADE, lw=0, zorder=0)
        axes.axhline(90, color=GREY, lw=1)
        width = 0.8 / len(groups)
        for k, (name, inside) in enumerate(groups):
            place = np.arange(len(joints)) + (k - (len(groups) - 1) / 2) * width
            axes.plot(place, 100 * inside, "o", color=SERIES[k], label=name)
        axes.set_xticks(range(len(joints)), joints)
        axes.margins(x=0.05)
        axes.set_ylim(min(70.0, 100 * min(inside.min() for _, inside in groups) - 3), 101)
        axes.set_ylabel("inside [%]")
        legend(figure, [axes])
        return svg(figure, "coverage")

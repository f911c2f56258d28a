"""One figure of an excitation trajectory: joints against their limits, and how well each parameter will be known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbctrl.base.logs import Log
from mbctrl.base.robot import Robot
from mbctrl.report.plots import ALARM, COLOURS, FAINT, INK, draw_joints, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_excitation(
    log: Log, robot: Robot, ramp: float, labels: Sequence[str], relative: np.ndarray, poor: float, path: Path, title: str
) -> None:
    """Draw a trajectory and save it as a PNG.

    Args:
        log: ``t`` [s], and ``q``, ``v`` and ``tau`` of each joint.
        robot: for its joints and limits.
        ramp: time of the way there, and of the way back [s].
        labels: of the parameters, b of them.
        relative: (b,) expected standard deviations as shares of the nominal values; nan where these are 0.
        poor: the share above which a parameter counts as poorly excited.
        path: the file to write; it appears only when it is complete.
        title: the figure's title.

    Errors:
        ExtraError: without matplotlib.
    """
    with sheet(path, title, (15.0, max(9.6, 2.0 + 0.145 * len(labels)))) as figure:
        left, right = figure.subfigures(1, 2, width_ratios=(1.6, 1), wspace=0.02)
        draw_joints(left, log, robot)
        for axes in left.axes:
            for span in ((log["t"][0], log["t"][0] + ramp), (log["t"][-1] - ramp, log["t"][-1])):
                axes.axvspan(*span, color=FAINT, alpha=0.15, lw=0)
        left.axes[0].set_title("grey: ramps from home and back", loc="right", fontsize=8, fontweight="normal")
        _draw_bars(right.subplots(), labels, relative, poor)


def _draw_bars(axes: Axes, labels: Sequence[str], relative: np.ndarray, poor: float) -> None:
    """Draw a bar a parameter, on a log axis; those whose nominal value is 0 are only named."""
    percent = 100 * relative
    known = percent[np.isfinite(percent)]
    low = min(known.min(initial=1.0) / 2, 1.0)
    high = max(known.max(initial=100.0) * 2, 200.0)
    place = np.arange(len(labels))[::-1]
    colours = [ALARM if share > 100 * poor else COLOURS[0] for share in percent]
    axes.barh(place, np.where(np.isfinite(percent), percent, low) - low, left=low, color=colours, height=0.7)
    for y, share in zip(place, percent):
        if not np.isfinite(share):
            axes.text(low * 1.1, y, "nominal value is 0", va="center", fontsize=6, color=INK)
    axes.axvline(100 * poor, color=INK, lw=0.9, ls=(0, (5, 3)))
    size = 8.0 if len(labels) <= 40 else 6.5
    axes.set_yticks(place, labels, fontsize=size)
    axes.set(
        xscale="log",
        xlim=(low, high),
        ylim=(-0.8, len(labels) - 0.2),
        xlabel=f"share of the nominal value [%]\nred: over {poor:.0%}; +: others are grouped in",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(False, axis="y")
    axes.set_title("expected standard deviation")

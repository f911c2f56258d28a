"""One figure of a deployed robot's log: what was measured, what was asked for, and in which mode."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbctrl.base.errors import ExtraError
from mbctrl.report import replacing
from mbctrl.report.plots import ALARM, COLOURS, STYLE
from mbctrl.runtime.logfile import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANELS = (
    ("q", "q_ref", "joint position [rad]"),
    ("v", "v_ref", "joint velocity [rad/s]"),
    ("tau", "torque", "joint torque [N·m]"),
)
_MOST = 5000  # points a line


def plot_recording(recording: Recording, path: Path, title: str) -> None:
    """Draw a log's joints, commands dashed, with its change of modes, and save it as a PNG.

    Errors:
        ExtraError: without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ExtraError('plots need matplotlib: pip install "mbctrl[sim]"') from None
    joints, actuated = recording.header.get("joints", []), recording.header.get("actuated", [])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11.0, 10.0), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(f"{title}   (solid: measured, dashed: sent)", x=0.012, ha="left", fontweight="bold")
        stack = figure.subplots(len(_PANELS) + 1, 1, sharex=True, height_ratios=(3, 3, 3, 1))
        for axes, (measured, asked, label) in zip(stack, _PANELS):
            names = joints if measured != "tau" else actuated
            _lines(axes, recording.topics.get("/state", {}), measured, names, joints, "-")
            sent = recording.topics.get("/command", {})
            if asked in sent and (asked == "q_ref" or np.any(sent[asked])):  # a law's velocity reference is 0 as a rule
                _lines(axes, sent, asked, actuated, joints, "--")
            axes.set_ylabel(label)
        handles, labels = stack[0].get_legend_handles_labels()
        if handles:
            stack[0].legend(handles[: len(joints)], labels[: len(joints)], loc="center left", bbox_to_anchor=(1.0, 0.5))
        _modes(stack[-1], recording)
        for event in recording.events:
            if event["level"] == "error":
                for axes in stack:
                    axes.axvline(event["t"], color=ALARM, lw=0.8)
                stack[-1].annotate(
                    event["text"],
                    (event["t"], 0),
                    (-3, 2),
                    textcoords="offset points",
                    ha="right",
                    va="bottom",
                    fontsize=6.5,
                    color=ALARM,
                    rotation=0,
                )
        with replacing(path) as temporary, open(temporary, "wb") as file:
            canvas.print_png(file)


def _lines(axes: Axes, columns: dict[str, np.ndarray], name: str, names: Sequence[str], joints: Sequence[str], style: str) -> None:
    if name not in columns or columns[name].ndim != 2:
        return
    every = max(1, len(columns["t"]) // _MOST)
    for j, joint in enumerate(names[: columns[name].shape[1]]):
        colour = COLOURS[joints.index(joint) % len(COLOURS)] if joint in joints else COLOURS[j % len(COLOURS)]
        axes.plot(columns["t"][::every], columns[name][::every, j], style, color=colour, label=joint, lw=1.0)


def _modes(axes: Axes, recording: Recording) -> None:
    columns, names = recording.topics.get("/command", {}), recording.header.get("modes", [])
    if "mode" in columns:
        axes.step(columns["t"], columns["mode"], where="post", color=COLOURS[0])
        axes.set_yticks(range(len(names)), names)
    axes.set_ylabel("mode")
    axes.set_xlabel("time [s]")

"""One figure of a run: joints against their limits, the tool's path, how well it tracked and how fast it was planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mbctrl.base.errors import ExtraError
from mbctrl.base.logs import Log
from mbctrl.base.robot import Robot
from mbctrl.report import replacing
from mbctrl.report.payload import payload_changes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Okabe and Ito's colours, told apart by colour-blind readers too, then some more for arms of many joints.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#7a5195", "#8c8c00", "#666666", "#a65628")
INK, FAINT, ALARM = "#333333", "#9aa0a6", "#c62828"
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8eaed",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "legend.title_fontsize": 8.0,
    "legend.handlelength": 1.4,
    "figure.facecolor": "white",
}


@contextmanager
def sheet(path: Path, title: str, size: tuple[float, float]) -> Iterator[Figure]:
    """Yield an empty figure of ``size`` [in] in the project's style, saved as a PNG afterwards, whole or not at all.

    Errors:
        ExtraError: without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ExtraError('plots need matplotlib: pip install "mbctrl[sim]"') from None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
        figure.suptitle(title, x=0.012, ha="left", fontsize=14, fontweight="bold", color=INK)
        yield figure
        with replacing(path) as temporary, open(temporary, "wb") as file:
            canvas.print_png(file)


def plot_run(log: Log, plans: Log, robot: Robot, path: Path, title: str) -> None:
    """Draw a run and save it as a PNG.

    Args:
        log: the run log, one row a control step.
        plans: the plan log, one row a plan; may be empty.
        robot: the arm, for its joints and limits.
        path: the file to write; it appears only when it is complete.
        title: the figure's title.

    Errors:
        ExtraError: without matplotlib.
    """
    rows = _side_panels(log, plans)
    with sheet(path, title, (15.0 if rows else 9.5, 9.6)) as figure:
        parts = figure.subfigures(1, 2, width_ratios=(1.25, 1), wspace=0.02) if rows else [figure]
        draw_joints(parts[0], log, robot)
        if rows:
            _draw_side(parts[1], rows)


def _finite(log: Log, name: str) -> bool:
    return name in log and bool(np.isfinite(log[name]).any())


def _time(log: Log) -> np.ndarray:
    t = log["t"]
    return t - t[0] if len(t) else t


def _time_axis(axes: Axes, t: np.ndarray, label: bool = True) -> None:
    end = float(t[-1]) * len(t) / (len(t) - 1) if len(t) > 1 else 1.0  # up to the end of the last sample
    axes.set_xlim(0.0, end)
    if label:
        axes.set_xlabel("time [s]")


# --- joints -----------------------------------------------------------------------------------------------------------


def draw_joints(figure: Figure | SubFigure, log: Log, robot: Robot) -> None:
    """Draw the log's ``q``, ``v`` and ``tau`` of every joint, one panel each, with their limits."""
    limits = robot.limits
    velocity, effort = np.asarray(limits.velocity), np.asarray(limits.effort)
    panels = (
        ("q", "joint position", np.asarray(limits.position_lower), np.asarray(limits.position_upper)),
        ("v", "joint velocity", -velocity, velocity),
        ("tau", "joint torque", -effort, effort),
    )
    t, stack = _time(log), figure.subplots(3, 1, sharex=True)
    for axes, (column, name, low, high) in zip(stack, panels):
        _joint_panel(axes, log, column, robot.joints, low, high)
        axes.set_title(name)
        axes.set_ylabel(f"{name.split()[1]} [{', '.join(_units(log, column, robot.joints))}]")
        _time_axis(axes, t, label=axes is stack[-1])
    if "gate.clamped" in log and (clamped := log["gate.clamped"] > 0).any():
        axes = stack[-1]
        axes.plot(t[clamped], np.zeros(clamped.sum()), "|", color=ALARM, ms=7, transform=axes.get_xaxis_transform(), clip_on=False)
        text = f"safety gate clamped {clamped.sum()} of {len(t)} samples"
        axes.set_title(text, loc="right", color=ALARM, fontsize=8, fontweight="normal")


def _units(log: Log, column: str, joints: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(log.units.get(f"{column}.{joint}", "1") for joint in joints))


def _joint_panel(axes: Axes, log: Log, column: str, joints: Sequence[str], low: np.ndarray, high: np.ndarray) -> None:
    """Draw one column group, a line a joint, with a legend that says how much of each limit was used."""
    t = _time(log)
    lowest, highest = np.inf, -np.inf
    for index, joint in enumerate(joints):
        name = f"{column}.{joint}"
        values = log[name] if name in log else np.full(len(t), np.nan)
        known = values[np.isfinite(values)]
        label = joint
        if len(known):
            lowest, highest = min(lowest, known.min()), max(highest, known.max())
            use = np.abs(known - (high[index] + low[index]) / 2).max() / ((high[index] - low[index]) / 2)
            label = f"{joint}  {use:.0%}" if use < 10 else joint  # an unlimited turn has no meaningful share
        axes.plot(t, values, color=COLOURS[index % len(COLOURS)], label=label, marker="." if len(t) < 3 else None)
    if lowest <= highest:
        margin = max(0.12 * (highest - lowest), 1e-3 * max(abs(lowest), abs(highest)), 1e-6)
        axes.set_ylim(lowest - margin, highest + margin)
        _limit_lines(axes, joints, low, high)
    size = 8.0 if len(joints) <= 8 else 6.5
    axes.legend(loc="center left", bbox_to_anchor=(1.005, 0.5), title="peak use of limit", fontsize=size, alignment="left")


def _limit_lines(axes: Axes, joints: Sequence[str], low: np.ndarray, high: np.ndarray) -> None:
    """Draw the limits within view: in the joint's colour, or in grey and with their names where joints share one."""
    bottom, top = axes.get_ylim()
    limits = np.concatenate([low, high])
    owners = np.tile(np.arange(len(low)), 2)
    for value in np.unique(limits[(limits > bottom) & (limits < top)]):
        owner = owners[limits == value]
        colour = COLOURS[owner[0] % len(COLOURS)] if len(owner) == 1 else INK
        axes.axhline(value, color=colour, ls=(0, (5, 3)), lw=0.9, alpha=0.8)
        if len(owner) > 1:
            text = "all" if len(owner) == len(joints) else ", ".join(joints[i] for i in owner)
            box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
            place = (0.995, value), (0, 2 if value > 0 else -2)
            axes.annotate(
                f"limit of {text}", place[0], place[1], xycoords=("axes fraction", "data"), textcoords="offset points",
                ha="right", va="bottom" if value > 0 else "top", fontsize=7, color=INK, bbox=box,
            )  # fmt: skip


# --- the side: path, errors, reward, clearance, latency -----------------------------------------------------------------

Panel = tuple[float, int, Callable[..., None]]  # relative height, number of axes, what draws them


def _side_panels(log: Log, plans: Log) -> list[Panel]:
    rows: list[Panel] = []
    if _finite(log, "tcp"):
        rows.append((1.6, 2, lambda axes: _draw_path(axes, log)))
    if _finite(log, "error.position") or _finite(log, "error.rotation"):
        rows.append((1.0, 1, lambda axes: _draw_error(axes[0], log)))
    if _finite(log, "reward"):
        rows.append((1.0, 1, lambda axes: _draw_reward(axes[0], log)))
    if _finite(log, "clearance"):
        rows.append((1.0, 1, lambda axes: _draw_clearance(axes[0], log)))
    if _finite(log, "contact.force"):
        rows.append((1.0, 1, lambda axes: _draw_force(axes[0], log)))
    if _finite(log, "payload"):
        rows.append((1.0, 1, lambda axes: _draw_payload(axes[0], log)))
    if _finite(plans, "latency"):
        rows.append((1.0, 1, lambda axes: _draw_latency(axes[0], plans)))
    return rows


def _draw_side(figure: SubFigure, rows: list[Panel]) -> None:
    grid = figure.add_gridspec(len(rows), 2, height_ratios=[row[0] for row in rows])
    for row, (_, number, draw) in enumerate(rows):
        cells = [grid[row, :]] if number == 1 else [grid[row, 0], grid[row, 1]]
        draw(np.array([figure.add_subplot(cell) for cell in cells]))


def _draw_path(axes: np.ndarray, log: Log) -> None:
    """Draw the tool's path from above and from the side on which it moves most, with its targets."""
    tool = log["tcp"]
    target = log["target"] if "target.x" in log else np.full_like(tool, np.nan)
    points = np.concatenate([tool, target])
    spread = np.nanmax(points, axis=0) - np.nanmin(points, axis=0)
    side = (1, 2) if spread[1] > spread[0] else (0, 2)
    for panel, (i, j), name in zip(axes, ((0, 1), side), ("tool path, from above and from the side", "")):
        _draw_target(panel, target, i, j)
        panel.plot(tool[:, i], tool[:, j], color=COLOURS[0], label="tool", zorder=3)
        panel.plot(tool[0, i], tool[0, j], "o", color=COLOURS[0], ms=5, mfc="white", label="start", zorder=4)
        panel.set(xlabel=f"{'xyz'[i]} [m]", ylabel=f"{'xyz'[j]} [m]", title=name)
        panel.margins(0.12)
        panel.set_aspect("equal", adjustable="datalim")
        panel.locator_params(nbins=6)
    handles, labels = axes[0].get_legend_handles_labels()
    axes[1].legend(handles, labels, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3, columnspacing=1.0, borderaxespad=0.1)


def _draw_target(axes: Axes, target: np.ndarray, i: int, j: int) -> None:
    known = target[np.isfinite(target).all(axis=1)]
    if not len(known):
        return
    stops = known[np.r_[True, np.any(np.abs(np.diff(known, axis=0)) > 1e-9, axis=1)]]
    if len(stops) > 30:  # a moving target: a line; else poses to visit in turn, numbered
        axes.plot(stops[:, i], stops[:, j], color=COLOURS[1], lw=3.0, alpha=0.45, label="target", zorder=2)
        return
    axes.plot(stops[:, i], stops[:, j], "X", color=COLOURS[1], ms=8, mec="white", mew=0.8, label="target", zorder=5)
    names: dict[tuple[float, float], list[str]] = {}
    for number, stop in enumerate(stops, 1):  # targets that coincide in this view share a label
        names.setdefault((round(stop[i], 3), round(stop[j], 3)), []).append(str(number))
    for place, numbers in names.items() if len(stops) > 1 else ():
        text = ", ".join(numbers[:3]) + ("…" if len(numbers) > 3 else "")
        axes.annotate(text, place, (5, 4), textcoords="offset points", fontsize=8, color=INK, zorder=6)


def _draw_error(axes: Axes, log: Log) -> None:
    t, used = _time(log), False
    joints = log.units.get("error.position") == "rad"  # the goal is a configuration
    position = (1.0, "joint error [rad]") if joints else (1e3, "position error [mm]")
    shown = (
        ("error.position", *position, COLOURS[0]),
        ("error.rotation", 180 / np.pi, "rotation error [deg]", COLOURS[3]),
    )
    for column, scale, label, colour in shown:
        if not _finite(log, column):
            continue
        panel = axes.twinx() if used else axes
        # Below a micrometre or a millidegree is noise, and zero has no place on a log axis.
        values = np.maximum(log[column] * scale, 1e-3)
        panel.semilogy(t, values, color=colour, alpha=0.85)
        low, high = np.nanmin(values), np.nanmax(values)
        panel.set_ylim(low / 1.5, max(high * 1.5, low * 12))
        panel.set_ylabel(label, color=colour)
        panel.tick_params(axis="y", which="both", colors=colour)
        if used:
            panel.grid(False)
            panel.spines["right"].set_visible(True)
        used = True
    axes.set_title("tracking error")
    _mark_changes(axes, log)
    _time_axis(axes, t)


def _draw_reward(axes: Axes, log: Log) -> None:
    reward, t = log["reward"], _time(log)
    known = reward[np.isfinite(reward)]
    axes.fill_between(t, reward, 0.0, color=COLOURS[2], alpha=0.18, lw=0)
    axes.plot(t, reward, color=COLOURS[2])
    axes.set(title=f"reward, mean {known.mean():.3f}", ylabel="reward [1]")
    if known.min() >= 0 and known.max() <= 1:
        axes.set_ylim(0, 1.05)
    _time_axis(axes, t)


def _draw_clearance(axes: Axes, log: Log) -> None:
    clearance, t = log["clearance"] * 1e3, _time(log)
    lowest, highest = np.nanmin(clearance), np.nanmax(clearance)
    reach = max(highest, -lowest, 1.0)
    axes.plot(t, clearance, color=COLOURS[2])
    axes.set_ylim(min(lowest, 0) - 0.08 * reach, max(highest, 0) + 0.1 * reach)
    axes.axhspan(axes.get_ylim()[0], 0, color=ALARM, alpha=0.12, lw=0)  # in contact
    axes.axhline(0, color=ALARM, lw=0.9, ls=(0, (5, 3)))
    axes.set(title=f"clearance, lowest {lowest:.1f} mm", ylabel="clearance [mm]")
    _time_axis(axes, t)


def _draw_force(axes: Axes, log: Log) -> None:
    force, t = log["contact.force"], _time(log)
    axes.plot(t, force, color=COLOURS[4])
    axes.set(title=f"contact force, highest {np.nanmax(force):.1f} N", ylabel="normal force [N]")
    _time_axis(axes, t)


def _draw_payload(axes: Axes, log: Log) -> None:
    """Draw what the tool carries, what is estimated, with twice its standard error, and what is planned with."""
    t, title = _time(log), "payload"
    if "payload.carried" in log:
        axes.plot(t, log["payload.carried"], color=INK, lw=1.0, ls=(0, (5, 3)), label="carried", zorder=3)
    if "payload.estimate" in log:
        estimate, error = log["payload.estimate"], 2 * log["payload.error"]
        axes.fill_between(t, estimate - error, estimate + error, color=COLOURS[0], alpha=0.18, lw=0)
        axes.plot(t, estimate, color=COLOURS[0], label="estimated")
        axes.plot(t, log["payload.planned"], color=COLOURS[1], label="planned with")
        title += f", {log['payload.planned'][-1]:.2f} kg planned with at the end"
        known = log["payload.carried"] if "payload.carried" in log else log["payload.planned"]
        high = max(1.4 * max(estimate.max(), known.max()), 0.1)
        axes.set_ylim(-0.2 * high, high)  # before anything has moved nothing is known, which would dwarf the rest
    axes.set(title=title, ylabel="mass [kg]")
    axes.legend(loc="upper left", ncols=3)
    _mark_changes(axes, log)
    _time_axis(axes, t)


def _mark_changes(axes: Axes, log: Log) -> None:
    """Draw a line where the tool picks something up or puts it down."""
    for change in payload_changes(log):
        axes.axvline(change.t - log["t"][0], color=ALARM, lw=0.9, ls=(0, (2, 2)))


def _draw_latency(axes: Axes, plans: Log) -> None:
    latency = plans["latency"][np.isfinite(plans["latency"])] * 1e3
    p50, p99 = np.percentile(latency, (50, 99))
    low, end = latency.min(), min(latency.max(), 1.6 * p99)  # a single straggler must not flatten all the others
    pad = max(0.02 * (end - low), 0.01 * end, 1e-3)
    bins = np.linspace(max(low - pad, 0.0), end + pad, 61)
    axes.hist(np.minimum(latency, bins[-1]), bins=bins, color=COLOURS[5], edgecolor="white", linewidth=0.4)
    axes.axvline(p50, color=INK, lw=1.3, label=f"p50  {p50:.1f} ms")
    axes.axvline(p99, color=ALARM, lw=1.3, ls=(0, (5, 3)), label=f"p99  {p99:.1f} ms")
    axes.plot([], [], " ", label=f"max  {latency.max():.1f} ms")
    late = int((plans["late"] > 0).sum()) if "late" in plans else 0
    title = f"planning latency, {len(latency)} plans" + (f", {late} late" if late else "")
    axes.set(title=title, xlabel="latency [ms]", ylabel="plans [1]")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(loc="best")

"""The figures of a calibration's report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from scipy.stats import norm

from mbctrl.calibrate.drawing import GREY, INK, SERIES, SHADE, legend, short, styled, svg, thin
from mbctrl.calibrate.friction import TERMS
from mbctrl.calibrate.identify import Estimates, Fit
from mbctrl.calibrate.recipe import FilterSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.report_tables import autocorrelation
from mbctrl.calibrate.signals import prepare
from mbctrl.calibrate.validate import Torques
from mbctrl.dynamics.reference import ReferenceDynamics

_BLUE, _ORANGE = SERIES[0], SERIES[3]
_ZOOM, _EDGE = 5.0, 0.3  # [s]: what is shown; how far from standstill, where filters smear the jump of friction
_DOTS = 300  # samples of measured friction


def _torque_axes(upper: Axes, lower: Axes, seen: Torques, j: int, unit: str, rows: slice = slice(None)) -> None:
    """Draw one joint's torque above and what the fit leaves of it below."""
    t = seen.t - seen.t[0]
    for axes in (upper, lower):
        for first, last in _stills(t, seen.moving):
            axes.axvspan(first, last, color=SHADE, lw=0, zorder=0)
    t, measured, filtered, predicted = (x[rows] for x in (t, seen.measured[:, j], seen.filtered[:, j], seen.predicted[:, j]))
    upper.plot(*thin(t, measured), color=GREY, lw=0.8, label="measured")
    upper.plot(*thin(t, predicted), color=_BLUE, label="predicted by the fit")
    lower.axhline(0, color=GREY, lw=0.7)
    lower.plot(*thin(t, measured - predicted), color=GREY, lw=0.6, alpha=0.7)
    lower.plot(*thin(t, filtered - predicted), color=_ORANGE, lw=1.0, label="residual (grey: unfiltered)")
    counts = seen.moving[rows] if seen.moving[rows].any() else np.ones(len(t), bool)
    left = np.abs(np.stack([filtered - predicted, measured - predicted]))[:, counts]
    reach = 1.15 * max(left[0].max(), np.percentile(left[1], 99.5), 1e-9)
    lower.set_ylim(-reach, reach)
    upper.set_ylabel(f"torque [{unit}]")
    lower.locator_params(axis="y", nbins=3)
    upper.locator_params(axis="y", nbins=6)
    upper.tick_params(labelbottom=False)
    upper.set_xlim(t[0], t[-1])
    lower.set_xlim(t[0], t[-1])


def _stills(t: np.ndarray, moving: np.ndarray) -> list[tuple[float, float]]:
    """Return the longest stretches that do not count, (first, last) [s]."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], ~moving, [False]]).astype(int)))
    runs = [(float(t[a]), float(t[b - 1])) for a, b in zip(edges[::2], edges[1::2])]
    return sorted(runs, key=lambda run: run[0] - run[1])[:25]


def draw_torques(seen: Torques, joints: Sequence[str], units: Sequence[str]) -> str:
    """Draw measured and predicted torques of a recording, a panel a joint, with the residuals under them."""
    with styled():
        across = min(2, len(joints))
        down = -(-len(joints) // across)
        tall = 2.75 * down + 0.5
        figure = Figure(figsize=(11.0, tall))
        sides = {"left": 0.062, "right": 0.995, "top": 1 - 0.6 / tall, "bottom": 0.5 / tall}
        cells = figure.add_gridspec(down, across, wspace=0.15, hspace=0.26, **sides)
        for j, joint in enumerate(joints):
            inner = cells[j // across, j % across].subgridspec(2, 1, height_ratios=(2.5, 1), hspace=0.1)
            upper, lower = figure.add_subplot(inner[0]), figure.add_subplot(inner[1])
            _torque_axes(upper, lower, seen, j, units[j])
            upper.set_title(short(joint))
            if j + across >= len(joints):
                lower.set_xlabel("time [s]")
            upper.yaxis.set_label_coords(-0.055 * across, 0.5)
        legend(figure, [upper, lower], loc="upper left")
        return svg(figure, "torques")


def worst_moment(seen: Torques) -> tuple[int, int]:
    """Return joint and sample of the largest filtered residual, beside the joint's torque."""
    edge = int(_EDGE / np.median(np.diff(seen.t)))
    inside = np.convolve(seen.moving, np.ones(2 * edge + 1), "same") > 2 * edge + 0.5
    counts = inside if inside.any() else seen.moving
    left = np.where(counts[:, None], np.abs(seen.filtered - seen.predicted), 0.0)
    size = np.sqrt((seen.measured**2).mean(0))
    sample, joint = np.unravel_index(int(np.argmax(left / np.maximum(size, 1e-12))), left.shape)
    return int(joint), int(sample)


def draw_worst(seen: Torques, joints: Sequence[str], units: Sequence[str]) -> str:
    """Draw five seconds around the largest residual; empty for a recording hardly longer."""
    if seen.t[-1] - seen.t[0] < 1.5 * _ZOOM:
        return ""
    joint, sample = worst_moment(seen)
    first = np.clip(seen.t[sample] - _ZOOM / 2, seen.t[0], seen.t[-1] - _ZOOM)
    rows = slice(*np.searchsorted(seen.t, (first, first + _ZOOM)))
    if rows.stop - rows.start < 4:
        return ""
    with styled():
        figure = Figure(figsize=(11.0, 3.0), layout="constrained")
        upper, lower = figure.subplots(2, 1, height_ratios=(2.4, 1))
        _torque_axes(upper, lower, seen, joint, units[joint], rows)
        moment = seen.t[sample] - seen.t[0]
        for axes in (upper, lower):
            axes.axvline(moment, color=INK, lw=0.8, ls=(0, (4, 3)))
        upper.set_title(f"{short(joints[joint])}, around {moment:.1f} s")
        lower.set_xlabel("time [s]")
        legend(figure, [upper, lower])
        return svg(figure, "worst")


def measured_friction(fit: Fit, trained: Sequence[Recording]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return speeds, friction against them and what the joint transmits, some samples (K, n) of the training log in motion."""
    reference, found = ReferenceDynamics(fit.tree), []
    for one in (prepare(recording, FilterSpec()) for recording in trained):
        rows = np.flatnonzero(one.moving)
        rows = rows[:: max(1, len(rows) * len(trained) // _DOTS)]
        rigid = reference.inverse_dynamics(one.q[rows], one.v[rows], one.a[rows])
        against = np.sign(one.v[rows]) * (one.effort[rows] - rigid - fit.offset)
        found.append((np.abs(one.v[rows]), against, np.abs(rigid - fit.tree.armature * one.a[rows])))
    return tuple(np.concatenate(parts) for parts in zip(*found)) if found else (np.zeros((0, fit.tree.n)),) * 3


def draw_friction(fit: Fit, trained: Sequence[Recording]) -> str:
    """Draw each joint's friction over speed: the family, what the planner uses of it, and the model file's."""
    n, family = fit.tree.n, fit.friction
    speed, against, load = measured_friction(fit, trained)
    top = np.where(speed.max(0, initial=0.0) > 1e-3, speed.max(0, initial=0.0), 1.0)
    with styled():
        across = min(3, n)
        down = -(-n // across)
        figure = Figure(figsize=(11.0 if across > 1 else 7.0, 2.5 * down + 0.45), layout="constrained")
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for j, axes in enumerate(panels[:n]):
            v, own = top[j] * np.linspace(0, 1, 121) ** 2, fit.x[fit.columns.friction_of(j)]
            low, usual, high = np.percentile(load[:, j], (5, 50, 95)) if len(load) else (0.0, 0.0, 0.0)
            axes.plot(speed[:, j], against[:, j], ".", color=GREY, ms=4, alpha=0.75, mew=0, label="measured")
            if "load" in family.terms:
                light, heavy = (family.opposing(v, one) @ own for one in (low, high))
                axes.fill_between(v, light, heavy, color=_BLUE, alpha=0.18, lw=0, label="family, light to heavy load")
            axes.plot(v, family.opposing(v, usual) @ own, color=_BLUE, lw=1.8, label="fitted family")
            axes.plot(v, fit.tree.friction[j] + fit.tree.damping[j] * v, color=_ORANGE, ls=(0, (5, 2)), label="planner's model")
            axes.plot(v, fit.prior.friction[j] + fit.prior.damping[j] * v, color=GREY, ls=(0, (1, 1.5)), lw=1.6, label="model file")
            axes.set_title(short(fit.tree.joints[j]))
            curve = family.opposing(v, high) @ own
            axes.set_ylim(
                min(0.0, curve.min()), 1.3 * max(curve.max(), fit.prior.friction[j] + fit.prior.damping[j] * top[j], 1e-9)
            )
            axes.set_xlabel("speed [rad/s]" if fit.tree.revolute[j] else "speed [m/s]")
            axes.set_ylabel(f"friction [{'N·m' if fit.tree.revolute[j] else 'N'}]")
        for axes in panels[n:]:
            axes.remove()
        legend(figure, panels[:1])
        return svg(figure, "friction")


def draw_correlation(estimates: Estimates) -> str:
    """Draw the correlations of the estimates; empty for a single one."""
    if len(estimates.names) < 2:
        return ""
    hues = [(*_rgb(_ORANGE), 1.0), (*_rgb(_ORANGE), 0.0), (*_rgb(_BLUE), 0.0), (*_rgb(_BLUE), 1.0)]
    shades = LinearSegmentedColormap.from_list("signed", list(zip((0.0, 0.5, 0.5, 1.0), hues)), N=40)
    groups = _groups(estimates.names)
    with styled():
        figure = Figure(figsize=(6.2, 5.3), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(np.clip(estimates.correlation, -1, 1), cmap=shades, vmin=-1, vmax=1, interpolation="none")
        edges = [last + 0.5 for _, _, last in groups[:-1]]
        for line in (axes.axhline, axes.axvline):
            for edge in edges:
                line(edge, color=GREY, lw=0.5)
        middle, names = [(a + b) / 2 for _, a, b in groups], [short(name) for name, _, _ in groups]
        axes.set_yticks(middle, names, fontsize=9.0)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(True)
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=40, label="correlation [1]")
        bar.outline.set_edgecolor(GREY)
        return svg(figure, "correlation")


def _rgb(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))


def _groups(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (title, first, last) of neighbours that belong together: a joint's link, its friction, or all rotors."""
    found: list[tuple[str, int, int]] = []
    for k, name in enumerate(names):
        joint, _, kind = name.rpartition(".")
        title = "rotors" if kind == "armature" else f"{joint} friction" if kind in TERMS else joint
        if found and found[-1][0] == title and found[-1][2] == k - 1:
            found[-1] = (title, found[-1][1], k)
        else:
            found.append((title, k, k))
    return found


def draw_residuals(seen: Torques, joints: Sequence[str]) -> str:
    """Draw how a recording's filtered residuals spread, and for how long they remember."""
    left = (seen.filtered - seen.predicted)[seen.moving]
    lags, correlation = autocorrelation(seen)
    bins = np.linspace(-4.5, 4.5, 46)
    with styled():
        figure = Figure(figsize=(11.0, 3.3), layout="constrained")
        spread, memory = figure.subplots(1, 2)
        for j, joint in enumerate(joints):
            own, hue = (left[:, j] - left[:, j].mean()) / max(left[:, j].std(), 1e-12), SERIES[j % len(SERIES)]
            height, _ = np.histogram(np.clip(own, bins[0], bins[-1]), bins, density=True)
            spread.stairs(height, bins, color=hue, lw=1.2, label=short(joint))
            memory.plot(*thin(lags, correlation[:, j], 400), color=hue)
        spread.plot(bins, norm.pdf(bins), color=INK, lw=1.0, ls=(0, (4, 3)), label="normal")
        spread.set(title="spread", xlabel="residual over its standard deviation [1]", ylabel="density [1]")
        memory.axhline(0.2, color=INK, lw=0.9, ls=(0, (4, 3)))
        memory.set(title="autocorrelation (dashed: 0.2)", xlabel="lag [s]", ylabel="correlation [1]")
        figure.legend(loc="outside right upper")
        return svg(figure, "residuals")

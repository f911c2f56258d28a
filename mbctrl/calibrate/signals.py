"""From a recording to what a fit looks at: filtered positions, velocities, accelerations and efforts.

Which bandwidth: an arm's own motion ends at a few hertz, its joints and links swing from about 10 Hz on, and a rigid model
knows nothing of that. The default takes motion up to 7 Hz (or 0.15 of the Nyquist frequency, whichever is less) and efforts
a third further. The regressor's columns go through the effort's filter as well: what a filter takes from one side it takes
from the other, so that the choice biases nothing, friction's jumps included.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.signal import butter, sosfiltfilt

from mbctrl.base.errors import MbctrlError
from mbctrl.calibrate.recipe import FilterSpec
from mbctrl.calibrate.recording import Recording

_MOTION, _SHARE, _WIDER = 7.0, 0.15, 4.0 / 3.0  # [Hz], of Nyquist, effort's cutoff over motion's
_EVEN = 0.25  # stamps this far from the median period, as a share of it, are resampled
_STILL, _PAUSE = 5e-3, 0.2  # [rad/s], [s]: slower than this for longer than that is standstill


class CalibrationError(MbctrlError):
    """A calibration that cannot be done, naming what stands in the way."""


@dataclass(frozen=True)
class Signals:
    """Filtered signals of one recording, (T, n) each, SI units.

    ``effort`` is filtered, ``measured`` is not; ``moving`` (T,) is False where the whole arm stands still (friction can then
    be anything below its limit) and at samples the checks call outliers; ``sliding`` (T, n) is that of each joint, which may
    stand still while others move; ``parts`` are stretches without a gap.
    """

    joints: tuple[str, ...]
    t: np.ndarray
    q: np.ndarray
    v: np.ndarray
    a: np.ndarray
    effort: np.ndarray
    measured: np.ndarray
    moving: np.ndarray
    sliding: np.ndarray
    parts: tuple[tuple[int, int], ...]
    order: int
    motion: float  # [Hz]
    cutoff: float  # [Hz], of efforts
    rate: float  # [Hz]
    file: str = ""

    def smooth(self, columns: np.ndarray) -> np.ndarray:
        """Return ``columns`` (T, ...) through the effort's filter, part by part."""
        return _filtered(columns, self.parts, self.order, self.cutoff, self.rate)


def prepare(recording: Recording, spec: FilterSpec, outliers: np.ndarray | None = None) -> Signals:
    """Return a recording's signals.

    Zero-phase Butterworth filters; velocity as logged where the log has it, else the derivative of the filtered position;
    derivatives are central differences on the true stamps. Recordings with uneven stamps are resampled by cubic splines to
    their mean period first.

    Args:
        recording: what was logged.
        spec: the filter.
        outliers: (T,) samples to leave out of fits.

    Errors:
        CalibrationError: for a recording too short for its filter.
    """
    recording, keep = _even(recording, np.zeros(len(recording.t), bool) if outliers is None else outliers)
    nyquist = recording.rate / 2
    motion = spec.motion or min(_MOTION, _SHARE * nyquist)
    cutoff = spec.effort or min(_WIDER * motion, 0.8 * nyquist)
    for name, hertz in (("filter.motion", motion), ("filter.effort", cutoff)):
        if not hertz < nyquist:
            raise CalibrationError(
                f"{hertz:g} Hz is not below half the sampling rate, {nyquist:.3g} Hz", file=recording.file, key=name
            )
    least = 3 * (2 * spec.order + 1)
    parts = tuple(part for part in recording.parts or ((0, len(recording.t)),) if part[1] - part[0] > least)
    if not parts:
        raise CalibrationError(f"too short: no stretch of more than {least} samples without a gap", file=recording.file)
    inside = np.zeros(len(recording.t), bool)
    for first, past in parts:
        inside[first:past] = True
    q = _filtered(recording.q, parts, spec.order, motion, recording.rate)
    v = _derivative(recording.t, q, parts) if recording.v is None else recording.v
    v = v if recording.v is None else _filtered(v, parts, spec.order, motion, recording.rate)
    a = _filtered(_derivative(recording.t, v, parts), parts, spec.order, motion, recording.rate)
    effort = _filtered(recording.effort, parts, spec.order, cutoff, recording.rate)
    moving = _moving(recording.t, np.abs(v).max(1)) & inside & keep
    sliding = np.stack([_moving(recording.t, np.abs(speed)) for speed in v.T], 1) & moving[:, None]
    return Signals(
        recording.joints,
        recording.t,
        q,
        v,
        a,
        effort,
        recording.effort,
        moving,
        sliding,
        parts,
        spec.order,
        motion,
        cutoff,
        recording.rate,
        recording.file,
    )


def _filtered(x: np.ndarray, parts: tuple[tuple[int, int], ...], order: int, cutoff: float, rate: float) -> np.ndarray:
    sections = butter(order, cutoff, output="sos", fs=rate)
    out = np.array(x, float)
    for first, past in parts:
        out[first:past] = sosfiltfilt(sections, x[first:past], axis=0)
    return out


def _derivative(t: np.ndarray, x: np.ndarray, parts: tuple[tuple[int, int], ...]) -> np.ndarray:
    out = np.zeros_like(x)
    for first, past in parts:
        out[first:past] = np.gradient(x[first:past], t[first:past], axis=0)
    return out


def _even(recording: Recording, outliers: np.ndarray) -> tuple[Recording, np.ndarray]:
    """Return the recording on even stamps, and which of its samples may be fitted."""
    parts = recording.parts or ((0, len(recording.t)),)
    period = 1.0 / recording.rate
    uneven = [np.percentile(abs(np.diff(recording.t[a:b]) / period - 1), 95) > _EVEN for a, b in parts if b - a > 2]
    if not any(uneven):
        return recording, ~outliers
    pieces: dict[str, list[np.ndarray]] = {}
    cuts, total = [], 0
    for a, b in parts:
        if b - a < 4:
            continue
        t = np.arange(recording.t[a], recording.t[b - 1], period)
        near = a + np.abs(recording.t[a:b, None] - t).argmin(0)
        for name in ("q", "effort", "v", "command"):
            x = getattr(recording, name)
            if x is not None:
                pieces.setdefault(name, []).append(CubicSpline(recording.t[a:b], x[a:b])(t))
        pieces.setdefault("t", []).append(t)
        pieces.setdefault("near", []).append(near)
        cuts.append((total, total + len(t)))
        total += len(t)
    joined = {name: np.concatenate(rows) for name, rows in pieces.items()}
    near = joined.pop("near")
    lines = recording.lines[near] if len(recording.lines) else recording.lines
    return replace(recording, **joined, lines=lines, parts=tuple(cuts)), ~outliers[near]


def _moving(t: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Return (T,): False where ``speed`` (T,) is next to nothing for longer than a pause."""
    moves = np.flatnonzero(speed > _STILL)
    out = np.zeros(len(t), bool)
    if len(moves):
        breaks = np.flatnonzero(np.diff(t[moves]) > _PAUSE)
        for first, last in zip(np.r_[moves[0], moves[breaks + 1]], np.r_[moves[breaks], moves[-1]]):
            out[first : last + 1] = True
    return out

"""What a payload did to a run: how far the tool went off when it came or went, and how soon it was back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbctrl.base.logs import Log

WINDOW = 0.2  # [s] over which an error is taken
SPAN = 2.0  # [s] before a change and after it
BACK = 1.5  # times the error before is as good as before


@dataclass(frozen=True)
class Change:
    """A payload that came or went; errors are the tool's, RMS [m], nan where the log does not reach that far.

    Args:
        t: when [s].
        mass: what the tool has carried since [kg].
        before: over the 2 s before.
        peak: the largest over 0.2 s within 2 s after.
        after: from 2 s after on, up to the next change.
        recovery: until the error over 0.2 s was below 1.5 times ``before`` again [s]; nan: never, up to the next change.
    """

    t: float
    mass: float
    before: float
    peak: float
    after: float
    recovery: float


def payload_changes(log: Log) -> list[Change]:
    """Return every change of what the tool carried, in order; none where nothing was to come."""
    if "payload.carried" not in log or not len(log["t"]):
        return []
    t, carried, error = log["t"], log["payload.carried"], log["error.position"]
    starts = np.flatnonzero(np.diff(carried)) + 1
    ends = np.r_[starts[1:], len(t)].astype(int)
    return [_change(t, error, float(carried[start]), start, end) for start, end in zip(starts, ends)]


def _change(t: np.ndarray, error: np.ndarray, mass: float, start: int, end: int) -> Change:
    at = float(t[start])
    before = _rms(error[(t >= at - SPAN) & (t < at)])
    since, squares = t[start:end] - at, np.cumsum(np.r_[0.0, error[start:end] ** 2])
    first = np.searchsorted(since, since - WINDOW + 1e-9)
    recent = np.sqrt((squares[1:] - squares[first]) / (np.arange(len(since)) + 1 - first))
    full = since >= WINDOW - 1e-9
    off = full & (recent > BACK * before)
    soon = full & (since <= SPAN)
    recovery = 0.0
    if off.any():
        back = full & (recent <= BACK * before) & (np.arange(len(since)) > np.argmax(off))
        recovery = float(since[np.argmax(back)]) if back.any() else np.nan
    peak = float(recent[soon].max()) if soon.any() else np.nan
    return Change(at, mass, before, peak, _rms(error[start:end][since >= SPAN]), recovery)


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2))) if len(values) else np.nan

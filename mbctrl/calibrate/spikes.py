"""Isolated spikes in a recording, and stretches in which a column stands still."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbctrl.calibrate.recording import Recording

SPIKE = 8.0
"""A spike is this many robust standard deviations of the second difference high."""
BLOCK = 50
"""The standard deviation is that of this many samples, or of those before or after or of all if it is larger there."""

Parts = Sequence[tuple[int, int]]


def outliers(recording: Recording) -> np.ndarray:
    """Return (T,), true at samples where the position, velocity or effort of any joint is an isolated spike."""
    found = np.zeros(len(recording.t), bool)
    for x in (recording.q, recording.v, recording.effort):
        if x is not None:
            found |= spikes(recording.t, x, recording.parts).any(axis=1)
    return found


def spikes(t: np.ndarray, x: np.ndarray, parts: Parts) -> np.ndarray:
    """Return (T, n), true where a single sample of x (T, n) leaves the line between its neighbours by more than ``SPIKE``
    standard deviations, and they lie on the other side of theirs, as next to a spike and not as at a step or a bend.

    ``t`` (T,) [s] may be uneven; the ends of ``parts`` are never spikes. Source: after Hampel, "The influence curve and its
    role in robust estimation" (1974).
    """
    off = _off_the_line(t, x)
    for first, past in parts:
        off[[first, past - 1]] = 0
    high = np.abs(off) > SPIKE * np.maximum(_sigma(off), _quantum(x) / 2)
    beside = np.zeros(x.shape, bool)
    beside[1:-1] = (off[:-2] * off[1:-1] <= -0.25 * off[1:-1] ** 2) & (off[2:] * off[1:-1] <= -0.25 * off[1:-1] ** 2)
    return high & beside


def _off_the_line(t: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return how far each sample is off the line between its neighbours (T, n); zero at the ends."""
    off = np.zeros(x.shape)
    if len(t) > 2:
        share = ((t[1:-1] - t[:-2]) / (t[2:] - t[:-2]))[:, None]
        off[1:-1] = x[1:-1] - (1 - share) * x[:-2] - share * x[2:]
    return off


def late_stamps(t: np.ndarray, q: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Return (T,): of the samples with spikes ``found`` (T, n) in q (T, n), those in which all joints that move, at least
    two, are off by the same time: the stamp is wrong, not the positions."""
    late = np.zeros(len(t), bool)
    off = _off_the_line(t, q)
    for k in np.flatnonzero(found.any(axis=1)):
        speed = (q[k + 1] - q[k - 1]) / (t[k + 1] - t[k - 1])
        fast = np.abs(speed) > 0.2 * np.abs(speed).max()
        lag = off[k, fast] / speed[fast]
        late[k] = fast.sum() > 1 and np.ptp(lag) < 0.5 * np.abs(np.median(lag))
    return late


def _sigma(off: np.ndarray) -> np.ndarray:
    """Return the robust standard deviation at each sample (T, n): noise may grow with speed, so it is a local one."""
    length, n = off.shape
    blocks = -(-length // BLOCK)
    padded = np.full((blocks * BLOCK, n), np.nan)
    padded[:length] = np.abs(off)
    local = np.nanmedian(padded.reshape(blocks, BLOCK, n), axis=1)
    around = np.pad(local, ((1, 1), (0, 0)), mode="edge")
    local = np.maximum(np.maximum(around[:-2], around[1:-1]), np.maximum(around[2:], np.median(np.abs(off), axis=0)))
    return 1.4826 * np.repeat(local, BLOCK, axis=0)[:length]


def _quantum(x: np.ndarray) -> np.ndarray:
    """Return the smallest step of each column (n,): of a quantised one its resolution."""
    steps = np.abs(np.diff(x, axis=0))
    steps[steps <= 1e-9 * np.abs(x).max(axis=0)] = np.inf  # what conversion to SI left of equal values
    smallest = steps.min(axis=0)
    return np.where(np.isfinite(smallest), smallest, 0.0)


def mended(t: np.ndarray, x: np.ndarray, parts: Parts) -> tuple[np.ndarray, np.ndarray]:
    """Return x (T, n) with its spikes replaced by the line between their neighbours, and the spikes (T, n)."""
    found = spikes(t, x, parts)
    out = x.copy()
    for j in np.flatnonzero(found.any(axis=0)):
        good = ~found[:, j]
        out[~good, j] = np.interp(t[~good], t[good], x[good, j])
    return out, found


def still(t: np.ndarray, x: np.ndarray, parts: Parts, shortest: float) -> list[tuple[int, int]]:
    """Return (first, last) samples of the stretches in which x (T,) repeats one value for more than ``shortest`` [s]."""
    moves = np.diff(x) != 0
    moves[[past - 1 for _, past in parts if past < len(x)]] = True
    edges = np.r_[-1, np.flatnonzero(moves), len(x) - 1]
    first, last = edges[:-1] + 1, edges[1:]
    return [(int(a), int(b)) for a, b in zip(first, last) if t[b] - t[a] > shortest]

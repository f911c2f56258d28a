"""Columns that stand still though they should not: frozen encoders, dead columns, values cut off at their extreme."""

from __future__ import annotations

import numpy as np

from mbctrl.calibrate.evidence import EXCITED, Evidence
from mbctrl.calibrate.spikes import still

FROZEN = 0.25
"""Positions that repeat for longer are looked at [s]."""
CLIPPED = 0.01
"""An extreme value that more than this part of the samples repeats is a saturation."""


def check_alive(log: Evidence) -> None:
    """Refuse columns that stand still throughout while another one of their joint moves."""
    for j, moved in enumerate(log.motion):
        _check_velocity_alive(log, j)
        if log.command is not None and moved < EXCITED and np.ptp(log.command[:, j]) > 5 * EXCITED:
            log.fail(f"the position stays within {moved:.2g} rad while the command moves: frozen encoder", j)
        effort = float(np.ptp(log.effort[:, j]))
        if j in log.driven and moved > EXCITED and effort == 0:
            log.fail(f"the effort is {log.effort[0, j]:g} N·m throughout while the joint moves {moved:.2g} rad: dead column", j)
        if moved == 0 and effort > 0.02 * log.effort_limit(j):
            log.warn(f"the position never changes while the effort does by {effort:.2g} N·m: held, or a dead encoder", j)
        elif moved < EXCITED:
            log.warn(f"not excited, moves only {moved:.2g} rad", j)


def _check_velocity_alive(log: Evidence, j: int) -> None:
    if log.v is None or log.path is None:
        return
    fast = float(np.quantile(np.abs(log.v[:, j]), 0.95))
    said = max(float(np.ptp(log.path[first:past, j])) for first, past in log.parts)
    if log.motion[j] < EXCITED and said > 5 * EXCITED and fast > 2 * EXCITED:
        log.fail(f"the position stays within {log.motion[j]:.2g} rad while the velocity says {said:.2g} rad: frozen encoder", j)
    if log.motion[j] > EXCITED and np.ptp(log.v[:, j]) == 0:
        text = f"the velocity is {log.v[0, j]:g} rad/s throughout while the joint moves {log.motion[j]:.2g} rad"
        log.fail(f"{text}: dead column", j)


def check_frozen(log: Evidence) -> None:
    """Refuse positions that repeat for longer than ``FROZEN`` while the joint moves; twice at an extreme, they are clipped."""
    for j in range(log.recording.n):
        q = log.recording.q[:, j]
        frozen = [(a, b, why) for a, b in still(log.t, q, log.parts, FROZEN) if (why := _says_moving(log, j, a, b))]
        extreme = [part for part in frozen if q[part[0]] in (q.min(), q.max())]
        clipped = extreme if len(extreme) > 1 else []
        for a, b, why in frozen:
            if (a, b, why) not in clipped:
                text = f"the position stays at {q[a]:.6g} rad for {log.t[b] - log.t[a]:.2g} s while {why}: frozen encoder"
                log.fail(text, j, lines=(a, b))
        if clipped:
            number = sum(b - a + 1 for a, b, _ in clipped)
            log.warn(f"the position is clipped at its extreme for {number} samples, from line {log.line(clipped[0][0])}", j)


def _says_moving(log: Evidence, j: int, a: int, b: int) -> str:
    """Return what contradicts that joint ``j`` stands still from sample a to b, or nothing.

    Its effort does not: stiction holds a joint against any effort within its band.
    """
    q, t = log.recording.q[:, j], log.t
    if log.v is not None and log.path is not None:
        said, mean = float(np.ptp(log.path[a : b + 1, j])), float(np.mean(np.abs(log.v[a : b + 1, j])))
        return f"the velocity says {said:.2g} rad" if said > EXCITED and mean > EXCITED else ""
    if log.command is not None and np.ptp(log.command[a : b + 1, j]) > 2 * EXCITED:
        return "its command moves"
    # Without either: a joint comes to rest and leaves smoothly, an encoder that wakes up jumps to where the joint is.
    steps = np.abs(np.diff(q))
    usual = float(np.quantile(steps, 0.99))
    jump = next((k for k in (b, a - 1) if 0 <= k < len(steps) and steps[k] > max(4 * usual, EXCITED)), None)
    if jump is not None:
        return f"it jumps by {steps[jump]:.2g} rad at line {log.line(jump + 1)}"
    back = max(0, a - 5)
    entry = abs(q[a] - q[back]) / (t[a] - t[back]) if a > back else 0.0
    fast = float(np.quantile(steps / np.diff(t), 0.95))
    return f"it moved at {entry:.2g} rad/s right before" if entry > max(0.5 * fast, 5 * EXCITED) else ""


def warn_of_saturation(log: Evidence) -> None:
    """Note efforts that repeat their largest or smallest value, several samples on end."""
    for j in log.driven:
        x = log.recording.effort[:, j]
        for extreme in (float(x.min()), float(x.max())) if np.ptp(x) > 0 else ():
            at = x == extreme
            runs = int((np.diff(at.astype(int)) == 1).sum() + at[0])
            if at.mean() > CLIPPED and at.sum() >= 3 * runs:
                where = f"for {at.mean():.1%} of the samples, from line {log.line(int(np.argmax(at)))}"
                log.warn(f"the effort is saturated at {extreme:.4g} N·m {where}", j)

"""A log as the rest of the package sees it: SI units, the robot's joint order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Recording:
    """One log, or an excerpt of one.

    Args:
        joints: names, n of them.
        t: (T,) [s], strictly increasing.
        q: (T, n) [rad].
        effort: (T, n) motor torque at the joint [N·m]: current times gain where currents were logged.
        v: (T, n) [rad/s] as logged, or None.
        command: (T, n) [rad] reference as logged, or None.
        gains: (n,) [N·m/A] that turned currents into ``effort``, or None.
        file: where it was read.
        sha256: of the file.
        lines: (T,) line of each sample in the file, counted from 1.
        parts: (first, past) samples of each stretch without a gap, in order.
        warnings: what the checks noticed and let pass, one line each.
    """

    joints: tuple[str, ...]
    t: np.ndarray
    q: np.ndarray
    effort: np.ndarray
    v: np.ndarray | None = None
    command: np.ndarray | None = None
    gains: np.ndarray | None = None
    file: str = ""
    sha256: str = ""
    lines: np.ndarray = field(default_factory=lambda: np.empty(0, int))
    parts: tuple[tuple[int, int], ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        """Number of joints."""
        return len(self.joints)

    @property
    def rate(self) -> float:
        """Mean sampling rate [Hz], gaps left out: stamps may alternate between two steps, of which a median sees one."""
        steps = np.diff(self.t)
        return float(1.0 / steps[steps <= 5 * np.median(steps)].mean())

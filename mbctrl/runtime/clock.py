"""Time as the control loop knows it: the machine's, or a count of ticks. The only difference between the two modes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """A monotonic clock [s] that starts at 0 and can wait."""

    @abstractmethod
    def restart(self) -> None:
        """Make now 0."""

    @abstractmethod
    def now(self) -> float:
        """Return the time [s]."""

    @abstractmethod
    def wait_until(self, t: float) -> float:
        """Wait until ``t`` [s]; return how late the wake-up was [s], at least 0."""


class RealClock(Clock):
    """The machine's monotonic clock."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Make now 0."""
        self._start = time.monotonic()

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def wait_until(self, t: float) -> float:
        """Sleep until ``t``."""
        left = t - self.now()
        if left > 0:
            time.sleep(left)
        return max(self.now() - t, 0.0)


class LockstepClock(Clock):
    """Time that passes only by waiting: deterministic runs, as fast as the machine computes."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Make now 0."""
        self._now = 0.0

    def now(self) -> float:
        """Return the simulated time."""
        return self._now

    def wait_until(self, t: float) -> float:
        """Jump to ``t``."""
        self._now = max(self._now, t)
        return 0.0

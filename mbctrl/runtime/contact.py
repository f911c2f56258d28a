"""Feeling contacts without a sensor for them: the generalised-momentum observer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.numbers import all_finite, some

Function = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ContactSettings:
    """How fast and how sure.

    Args:
        gain: of the observer [1/s]; external torques are seen through a low-pass filter with time constant 1 / gain.
        settle: for how long a joint's residual must be over its threshold [s].
    """

    gain: float = 50.0
    settle: float = 0.01


@dataclass(frozen=True)
class Contact:
    """``torque`` (n,) is the estimated external torque [N·m], ``joints`` the indices whose estimate is over its threshold."""

    torque: np.ndarray
    joints: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.joints)


class ContactObserver:
    """Estimates external joint torques from momentum, needing no acceleration.

    With momentum ``p = M(q) v`` the equation of motion is ``dp/dt = tau + beta(q, v) + tau_ext`` where ``beta = C^T v - g -
    friction``. The residual ``r = gain (p - p(0) - integral of (tau + beta + r))`` then follows ``dr/dt = gain (tau_ext -
    r)``. In discrete time, with backward Euler for r (stable at any gain) and the trapezoid for beta,
    ``r' = (r + gain (p' - p - dt (tau + (beta + beta') / 2))) / (1 + gain dt)``: the same sum, and no integral to drift.
    With ``tau + beta = dp/dt - tau_model + tau`` this also is the filtered difference of inverse dynamics and torque.

    Source: De Luca, Albu-Schäffer, Haddadin and Hirzinger, "Collision detection and safe reaction with the DLR-III
    lightweight manipulator arm" (2006), equations 7 to 11.

    Args:
        thresholds: (n,) external torque from which on it is a contact [N·m]: above the model's error in free motion.
        momentum: ``(q, v) -> M(q) v`` (n,) [kg·m²/s], rotors included.
        beta: ``(q, v) -> C(q, v)^T v - g(q) - friction(v)`` (n,) [N·m].
    """

    def __init__(
        self, thresholds: Sequence[float], momentum: Function, beta: Function, settings: ContactSettings | None = None
    ) -> None:
        self.settings = settings or ContactSettings()
        self._thresholds = np.array(thresholds, float)
        if not (self._thresholds > 0).all():
            raise DriverError(f"expected thresholds above 0 N·m, found {list(thresholds)}", key="contact.thresholds")
        self._momentum, self._beta = momentum, beta
        self.reset()

    def reset(self) -> None:
        """Forget the past: the estimate begins at zero with the next measurement."""
        n = len(self._thresholds)
        self._last: tuple[float, np.ndarray, np.ndarray] | None = None
        self.torque, self._over = np.zeros(n), np.zeros(n)

    def __call__(self, stamp: float, q: np.ndarray, v: np.ndarray, tau: np.ndarray) -> Contact:
        """Take a measurement: all joints (n,), ``tau`` the total actuator torque since the one before; finite.

        One with a stamp that is no later than the last changes nothing.
        """
        if self._last is not None and stamp <= self._last[0]:
            return self._contact()
        p, beta = self._momentum(q, v), self._beta(q, v)
        if not all_finite(p, beta, tau):
            raise DriverError("found a momentum, model torque or measured torque that is not finite", key="contact")
        if self._last is not None:
            then, p_before, beta_before = self._last
            dt, gain = stamp - then, self.settings.gain
            change = p - p_before - dt * (tau + 0.5 * (beta + beta_before))
            self.torque = (self.torque + gain * change) / (1 + gain * dt)
            self._over = (self._over + dt) * (np.abs(self.torque) > self._thresholds)
        self._last = stamp, p, beta
        return self._contact()

    def _contact(self) -> Contact:
        if not some(self._over):
            return Contact(self.torque, ())
        over = np.flatnonzero((self._over > 0) & (self._over >= self.settings.settle - 1e-9))
        return Contact(self.torque, tuple(int(joint) for joint in over))

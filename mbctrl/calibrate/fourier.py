"""Finite Fourier series as joint trajectories, and the ramps that lead to them and back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.linalg import block_diag, null_space


@dataclass(frozen=True)
class FourierSeries:
    """A periodic trajectory of n joints, a sum of H harmonics of one base frequency.

    ``v(t) = sum_k a_k cos(k w t) + b_k sin(k w t)`` with ``w = 2 pi / duration``, and positions that swing about
    ``offset``. Source: Swevers et al., "Optimal robot excitation and identification" (1997), equation 11.

    Args:
        duration: period [s].
        offset: (n,) [rad].
        a: (n, H) [rad/s].
        b: (n, H) [rad/s].
    """

    duration: float
    offset: np.ndarray
    a: np.ndarray
    b: np.ndarray

    def derivative(self, t: np.ndarray, order: int) -> np.ndarray:
        """Return positions (order 0), velocities (1), accelerations (2) or jerks (3) at times t (T,) [s], as (T, n)."""
        value = design(t, self.duration, self.a.shape[1], order) @ np.concatenate([self.a, self.b], axis=1).T
        return value + self.offset if order == 0 else value


def design(t: np.ndarray, duration: float, harmonics: int, order: int) -> np.ndarray:
    """Return (T, 2 H): what a derivative of the series at times t (T,) [s] is linear in, for coefficients ``[a, b]``."""
    w = 2 * np.pi / duration * np.arange(1, harmonics + 1)
    phase = np.outer(np.remainder(t, duration), w)
    # The velocity is a cos + b sin; each derivative multiplies by k w and turns by a quarter, each integral the reverse.
    turn = (order - 1) * np.pi / 2
    return np.concatenate([np.cos(phase + turn), np.sin(phase + turn)], axis=1) * np.tile(w ** (order - 1.0), 2)


def at_rest(harmonics: int) -> np.ndarray:
    """Return (2 H, 2 H - 2): an orthonormal basis of the coefficients ``[a, b]`` at rest and unaccelerated at t = 0."""
    k = np.arange(1.0, harmonics + 1)
    return block_diag(null_space(np.ones((1, harmonics))), null_space(k[None] / k.max()))  # sum a = 0, sum k b = 0


def ramp(start: np.ndarray, goal: np.ndarray, duration: float, t: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return q, v, a and jerk, each (T, n), on the way from ``start`` to ``goal`` (n,) [rad] at times t (T,) [s].

    At rest and unaccelerated at both ends. Source: Flash and Hogan (1985), minimum jerk.
    """
    s = np.clip(t / duration, 0.0, 1.0)
    shapes = (
        s**3 * (10 - 15 * s + 6 * s**2),
        30 * s**2 * (1 - s) ** 2,
        60 * s * (1 - 3 * s + 2 * s**2),
        60 * (1 - 6 * s + 6 * s**2),
    )
    q, *rest = (np.outer(shape / duration**order, goal - start) for order, shape in enumerate(shapes))
    return start + q, *rest


def ramp_time(distance: np.ndarray, limits: list[tuple[int, np.ndarray]], least: float) -> float:
    """Return the shortest ramp [s], at least ``least``, over ``distance`` (n,) [rad] within (order, (n,)) ``limits``."""
    peak = {1: 1.875, 2: 10 / np.sqrt(3), 3: 60.0}  # of the shapes above
    return max([least, *(float(np.max(peak[order] * np.abs(distance) / limit)) ** (1 / order) for order, limit in limits)])


def there_and_back(series: FourierSeries, time: float, length: float, home: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
    """Return q, v, a and jerk (T, n) at times t (T,) [s] of the way there, ``length`` [s] of periods, and the way back."""
    start = series.derivative(np.zeros(1), 0)[0]
    there, back = ramp(home, start, time, t), ramp(start, home, time, t - time - length)
    first, last = (t < time)[:, None], (t > time + length)[:, None]
    middle = (series.derivative(t - time, order) for order in range(4))
    return [np.where(first, x, np.where(last, z, y)) for x, y, z in zip(there, middle, back)]

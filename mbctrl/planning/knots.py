"""Action parametrisation: a few knots in time, spread over the horizon by a constant matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from mbctrl.planning.arrays import Array, like

INTERPOLATIONS = ("zero", "linear", "cubic")


class Knots:
    """``count`` knots over a horizon of ``steps`` steps of ``dt`` seconds.

    Zero order holds each knot for an equal share of the horizon; linear and cubic (natural spline) place the first knot
    at its start and the last at its end. Commands past the horizon hold the last value.

    Args:
        count: knots K, at least 1 (2 for linear, 3 for cubic).
        steps: horizon steps H.
        dt: [s].
        interpolation: one of INTERPOLATIONS.
        at: where in its step a command is taken, 0 to 1. The middle for a torque, which the model holds; the end for a
            servo's reference, which the implicit servo compares with the state at the step's end (the middle would add
            half a step of lag to the model).

    Attributes:
        basis: (H, K) from knots to commands.
    """

    def __init__(
        self,
        count: int,
        steps: int,
        dt: float,
        interpolation: str = "cubic",
        at: float = 0.5,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f"unknown interpolation {interpolation!r}; known: {', '.join(INTERPOLATIONS)}")
        least = 1 + INTERPOLATIONS.index(interpolation)
        if count < least:
            raise ValueError(f"{interpolation} interpolation needs at least {least} knots, found {count}")
        self.count, self.steps, self.dt, self.interpolation = count, steps, dt, interpolation
        self.duration = steps * dt
        self.times = np.arange(count) * self.duration / count if interpolation == "zero" else np.linspace(0, self.duration, count)
        self._spacing = self.duration / (count if interpolation == "zero" else count - 1)
        self._pieces = self._piecewise()
        self.at, self.basis = at, self.weights((np.arange(steps) + at) * dt)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, the curve's coefficients among it."""
        names = ("count", "steps", "dt", "interpolation", "at")
        return {**{name: getattr(self, name) for name in names}, "pieces": self._pieces.tolist()}

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Knots:
        """Return the knots ``to_dict`` described, without scipy.

        Errors:
            ValueError: where the coefficients do not fit.
        """
        made = Knots(**{**{key: data[key] for key in ("count", "steps", "dt", "at")}, "interpolation": "zero"})
        cubic, pieces = data["interpolation"] == "cubic", np.asarray(data["pieces"], float)
        if data["interpolation"] not in INTERPOLATIONS or pieces.shape != (4 if cubic else 2, made.count + 1, made.count):
            raise ValueError(f"pieces: {pieces.shape} do not fit {made.count} knots, {data['interpolation']}")
        made.interpolation, made._pieces = data["interpolation"], pieces
        if made.interpolation != "zero":
            made.times = np.linspace(0, made.duration, made.count)
            made._spacing = made.duration / (made.count - 1)
        made.basis = made.weights((np.arange(made.steps) + made.at) * made.dt)
        return made

    def weights(self, t: np.ndarray) -> np.ndarray:
        """Return the (T, K) matrix from knots to the command at times ``t`` [s] after the horizon's start, (T,)."""
        t = np.clip(t, 0.0, self.duration)
        if self.interpolation == "zero":
            index = np.minimum((t / self.duration * self.count + 1e-9).astype(int), self.count - 1)
            return np.eye(self.count)[index]
        index = np.minimum((t / self._spacing).astype(int), self.count - 2)
        return self._evaluated(index + 1, (t - index * self._spacing)[:, None])

    def _evaluated(self, piece: np.ndarray, since: Any) -> np.ndarray:
        """Return rows of weights (T, K): pieces ``piece`` (T,), ``since`` their knots [s]."""
        rows = self._pieces[:, piece]
        moved = rows[0]
        for coefficients in rows[1:]:
            moved = moved * since + coefficients
        return moved

    def _piecewise(self) -> np.ndarray:
        """Return the curve's polynomials (D+1, K+1, K), highest power first, over the time since their knot.

        The first piece comes before the first knot, the last one after the last knot; both hold.
        """
        knots = np.eye(self.count)
        if self.interpolation == "cubic":
            from scipy.interpolate import CubicSpline  # a planner restored from a file does without

            pieces = CubicSpline(self.times, knots, bc_type="natural").c
        else:
            pieces = np.stack([np.diff(knots, axis=0) / self._spacing, knots[:-1]])
        ends = np.zeros((2, len(pieces), 1, self.count))
        ends[0, -1, 0, 0] = ends[1, -1, 0, -1] = 1.0
        return np.concatenate([ends[0], pieces, ends[1]], 1)

    def commands(self, knots: Array) -> Array:
        """Return commands (H, nu, N) from ``knots`` (K, nu, N)."""
        return (like(self.basis, knots) @ knots.reshape(self.count, -1)).reshape(self.steps, *knots.shape[1:])

    def shift(self, elapsed: float) -> np.ndarray:
        """Return the (K, K) matrix that moves knots ``elapsed`` seconds on: the same curve seen from a later start.

        Zero-order knots take the mean of the curve over the time they hold: its value at their own time would stand
        still under shifts shorter than that.
        """
        whole, part = divmod(elapsed, self._spacing)
        return self._evaluated(np.clip(np.arange(1, self.count + 1) + int(min(whole, self.count)), 0, self.count), part)

"""The search for an excitation trajectory: a smooth nonlinear programme, solved by SciPy's SLSQP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from mbctrl.calibrate.clearance import Clearance
from mbctrl.calibrate.fourier import FourierSeries, at_rest, design
from mbctrl.calibrate.information import Information

_SAMPLES = 24  # a period of the highest harmonic; results are checked on a finer grid
_FINE = 120  # the same, for clearance: a fast arm moves far between two samples
_RAMP = 16  # points on the straight way from home to the start
_SHARPNESS = (60.0, 250.0)  # of the soft maximum, at first and at last: it errs by at most log(samples) / sharpness
_BOX, _ROUND = 0.2, 20  # shares of a joint's range that unknowns may move in a round, iterations of one
_SPARE, _SPARE_NEAR = 0.01, 0.001  # share of each limit and [m] of clearance that the search keeps and its results may use
_NEAR = 0.012  # [m] of clearance that count like reaching a limit in full


@dataclass(frozen=True)
class Bounds:
    """What the arm may use: limits times margin.

    Args:
        lower, upper: (n,) positions [rad].
        rates: (order, (n,)) magnitudes of velocity (1), acceleration (2), jerk (3) [rad/s^order]; those that are known.
        effort: (n,) [N·m].
        clearance: [m].
    """

    lower: np.ndarray
    upper: np.ndarray
    rates: tuple[tuple[int, np.ndarray], ...]
    effort: np.ndarray
    clearance: float


class Problem:
    """Fourier coefficients in, log-determinant and constraints out; all with gradients.

    The unknowns ``x`` (n (2 H - 1),) measure each joint's offset from home and its coefficients, within the null space
    of being at rest at the start, in shares of the joint's range: ``x = 0`` is staying at home, and scaling ``x`` scales
    the whole motion, its ramp included, towards home.

    Args:
        information: of the joint torques.
        clearance: distances of the links.
        bounds: what the arm may use.
        home: (n,) [rad].
        duration: period [s].
        harmonics: H.
    """

    def __init__(
        self, information: Information, clearance: Clearance, bounds: Bounds, home: np.ndarray, duration: float, harmonics: int
    ) -> None:
        self.information, self.clearance, self.bounds, self.home = information, clearance, bounds, home
        self.duration, self.harmonics, self.n = duration, harmonics, len(home)
        # Beyond half a turn each way a wider swing tells little more: the start of the search stays within.
        self._reach = np.minimum((bounds.upper - bounds.lower) / 2, np.pi)
        self._free = at_rest(harmonics) * (2 * np.pi / duration)
        self.size = self.n * (2 * harmonics - 1)
        self._counted = _SAMPLES * harmonics
        t = np.arange(self._counted) * duration / self._counted
        self._bases = np.stack([self._basis(t, order, ramp=True) for order in range(4)])  # (4, T + ramp, 2 H - 1)
        self._sparse = np.r_[0 : self._counted : 2, self._counted : self._counted + _RAMP]  # where clearance is looked at
        self._fine = np.arange(_FINE * harmonics) * duration / (_FINE * harmonics)
        self._fine_basis = self._basis(self._fine, 0)
        self._sharpness = _SHARPNESS[0]
        self._seen: dict[bytes, tuple] = {}

    def _basis(self, t: np.ndarray, order: int, ramp: bool = False) -> np.ndarray:
        """Return what a derivative at times t (T,) is linear in, per joint, with the way from home behind it: at rest."""
        columns = np.concatenate(
            [np.full((len(t), 1), float(order == 0)), design(t, self.duration, self.harmonics, order) @ self._free], axis=1
        )
        way = np.outer(np.linspace(0, 1, _RAMP + 1)[:-1], columns[0]) * (order == 0)
        return np.concatenate([columns, way]) if ramp else columns

    def series(self, x: np.ndarray) -> FourierSeries:
        """Return the trajectory of the unknowns x."""
        x = x.reshape(self.n, -1) * self._reach[:, None]
        ab = x[:, 1:] @ self._free.T
        return FourierSeries(self.duration, self.home + x[:, 0], ab[:, : self.harmonics], ab[:, self.harmonics :])

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random motion that is within all constraints."""
        x = rng.normal(size=(self.n, 2 * self.harmonics - 1))
        middle = (self.bounds.upper + self.bounds.lower) / 2
        x[:, 0] = (middle - self.home) / self._reach + rng.uniform(-0.7, 0.7, self.n)
        x = 3.0 * x.ravel()
        for _ in range(40):
            if self._allowed(x):
                return x
            x = 0.8 * x
        return 0 * x

    def improve(self, x: np.ndarray, iterations: int, tick: Callable[[float], None]) -> tuple[np.ndarray, int]:
        """Return the best motion within the constraints that SLSQP finds from x, which is within them.

        SLSQP's steps are unbounded and these constraints bend: it runs in rounds, each within a box about the best motion
        so far, which grows while that helps and shrinks when it does not. Returns the motion and how many of ``iterations``
        are left; ``tick`` is given the log-determinant after each.
        """
        best, radius, left = x, _BOX, iterations

        def after(_: np.ndarray) -> None:
            nonlocal left
            left -= 1
            tick(reached)

        while left > 0 and radius > 0.02 * _BOX:
            if left < 0.3 * iterations:
                self._sharpen(_SHARPNESS[1])
            reached, before, rows = self.value(best), left, self._bases.shape[1]
            found = self._solve(best, radius, min(_ROUND, left), after)
            left -= left == before  # a round without a step counts too
            part, moved = self._settle(best, found)
            good = part > 0 and self.value(moved) > reached + 0.005 * self.information.base.count
            best = moved if good else best
            if good or self._bases.shape[1] == rows:  # else: once more, with the times that were in the way
                radius *= (1.5 if part == 1 else 0.8) if good else 0.5
        self._sharpen(_SHARPNESS[0])
        return best, left

    def _solve(self, center: np.ndarray, radius: float, iterations: int, after: Callable[[np.ndarray], None]) -> np.ndarray:
        count = self.information.base.count
        return minimize(
            lambda x: -self._at(x)[0] / count,
            center,
            jac=lambda x: -self._gradients(x)[0] / count,
            bounds=np.stack([center - radius, center + radius], axis=1),
            constraints={"type": "ineq", "fun": self.constraints, "jac": lambda x: self._gradients(x)[1]},
            method="SLSQP",
            callback=after,
            options={"maxiter": iterations, "ftol": 1e-5},
        ).x

    def _settle(self, center: np.ndarray, x: np.ndarray) -> tuple[float, np.ndarray]:
        """Return how far one may go from ``center`` towards x, as a share, and that motion: SLSQP may stop a little outside."""
        for part in (1.0, 0.98, 0.93, 0.85, 0.7, 0.5, 0.3, 0.1) if np.isfinite(x).all() else ():
            moved = center + part * (x - center)
            if self._allowed(moved):
                return part, moved
        return 0.0, center

    def _sharpen(self, sharpness: float) -> None:
        self._sharpness = sharpness
        self._seen.clear()

    def _allowed(self, x: np.ndarray) -> bool:
        """Return whether x is within all constraints, clearance on a fine grid; times at which that fails join the grid.

        Source: the exchange method of semi-infinite programming, Hettich and Kortanek (1993).
        """
        if self.constraints(x).min() < -_SPARE:
            return False
        q = self.home + self._fine_basis @ (x.reshape(self.n, -1) * self._reach[:, None]).T
        least = self.clearance.distances(q)[0].min(axis=1, initial=np.inf)
        dips = np.flatnonzero((least < self.bounds.clearance) & (least <= np.roll(least, 1)) & (least < np.roll(least, -1)))
        if len(dips):
            rows = np.stack([self._basis(self._fine[dips], order) for order in range(4)])
            self._sparse = np.r_[self._sparse, self._bases.shape[1] + np.arange(len(dips))]
            self._bases = np.concatenate([self._bases, rows], axis=1)
            self._seen.clear()
        return not len(dips)

    def value(self, x: np.ndarray) -> float:
        """Return the log-determinant at x on the search's grid."""
        return self._at(x)[0]

    def constraints(self, x: np.ndarray) -> np.ndarray:
        """Return (C,): what is left of each limit of each joint and of each clearance, as a share; negative: exceeded."""
        return self._at(x)[1]

    def _samples(self, x: np.ndarray) -> list[np.ndarray]:
        shares = x.reshape(self.n, -1) * self._reach[:, None]
        q, v, a, jerk = self._bases @ shares.T
        return [self.home + q, v, a, jerk]

    def _at(self, x: np.ndarray) -> tuple:
        """Return (log-determinant, constraints, and what their gradients need), remembering the last few x."""
        key = x.tobytes()
        if key not in self._seen:
            if len(self._seen) > 4:
                self._seen.pop(next(iter(self._seen)))
            samples = self._samples(x)
            logdet, tau = self.information.value(*samples[:3], self._counted)
            b = self.bounds
            shares = [(0, (2 * samples[0] - b.lower - b.upper) / (b.upper - b.lower))]
            shares += [(order, samples[order] / limit) for order, limit in b.rates] + [(-1, tau / b.effort)]
            used = [(order, *self._soft(share)) for order, share in shares]
            distance, slope = self.clearance.distances(samples[0][self._sparse])
            near = (b.clearance + _SPARE_NEAR - distance) / _NEAR
            worst = logsumexp(self._sharpness * near, axis=0) / self._sharpness
            rest = np.concatenate([*(1 - _SPARE - value for _, value, _ in used), -worst])
            self._seen[key] = (logdet, rest, samples, used, softmax(self._sharpness * near, axis=0), slope)
        return self._seen[key]

    def _soft(self, share: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the soft maximum (n,) of |share| over time, never too small, and its derivative (T, n).

        Source: Kreisselmeier and Steinhauser, "Systematic control design by optimizing a vector performance index" (1979).
        """
        both = self._sharpness * np.concatenate([share, -share])
        weight = softmax(both, axis=0)
        return logsumexp(both, axis=0) / self._sharpness, weight[: len(share)] - weight[len(share) :]

    def _gradients(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of the log-determinant (X,) and of the constraints (C, X)."""
        _, _, samples, used, weight, slope = self._at(x)
        grad, dtau = self.information.slopes(*samples[:3], self._counted)
        rows = []
        b, each = self.bounds, np.eye(self.n)
        for order, _, pull in used:
            if order < 0:
                rows.append(self._chain(np.einsum("ti,otji->iotj", pull / b.effort, dtau)))
                continue
            limit = (b.upper - b.lower) / 2 if order == 0 else dict(b.rates)[order]
            rows.append(np.einsum("tj,tk,ij->ijk", pull / limit * self._reach, self._bases[order], each).reshape(self.n, -1))
        closer = np.zeros((weight.shape[1], 1, self._bases.shape[1], self.n))
        closer[:, 0, self._sparse] = np.einsum("tp,tpj->ptj", weight, slope) / -_NEAR
        rows.append(self._chain(closer))
        return self._chain(grad[None])[0], -np.concatenate(rows)

    def _chain(self, slopes: np.ndarray) -> np.ndarray:
        """Return (R, X) from R functions' derivatives (R, orders, T, n) with respect to q, v, a of each sample."""
        return np.einsum("rotj,otk,j->rjk", slopes, self._bases[: slopes.shape[1]], self._reach, optimize=True).reshape(
            len(slopes), -1
        )

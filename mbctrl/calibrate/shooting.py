"""The descent of an output-error fit: normal equations gathered window by window, Levenberg-Marquardt steps within bounds.

Every window's initial state may be a nuisance of its own, eliminated by its Schur complement (Bock, "Recent advances in
parameter identification techniques for O.D.E.", 1983), so that the cost stays linear in the log's length. Jacobians are finite
differences, one call of a compiled rollout each; so are the trials of several damping factors at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.signals import CalibrationError
from mbctrl.calibrate.simulate import Twin
from mbctrl.calibrate.unknowns import Arm, Unknown

_DIFFERENCE = 1e-5  # of a parameter's own size: truncation and rounding are both below 1e-5 of the slope
_INFLUENCE = 1e-4  # a parameter's own size that moves residuals by less, of their noise, moves nothing
_ALIKE = 1e-8  # least eigenvalue of the scaled normal equations: errors are 10,000 times those of each alone
_HUBER = 1.345  # 95 % efficient for normal residuals (Huber, "Robust Statistics", 1981)
_DAMPINGS = np.array([0.1, 1.0, 10.0, 100.0])  # tried at once, times the last one that was best
CONVERGED, ROUGHLY = 1e-2, 1e-1  # gains below these shares of what sampling errors cost are none, at last and on the way
_NO_STEP, _STUCK = 1e-6, 1e12
_STAGES, _LEAST = 2, 5  # windows are halved so often at first, down to so many samples
_LOOSE = 3.0  # sds of measurement noise a window's start may be off


@dataclass
class Normal:
    """Normal equations at a point, per window: A (W, P, P), g (W, P), B (W, P, m), C (W, m, m) and h (W, m).

    ``prior`` (P,) is the priors' gradient, ``information`` (P,) their share of A's diagonal; ``squares`` (C,) and ``count`` of
    the residuals, unweighted.
    """

    A: np.ndarray
    g: np.ndarray
    B: np.ndarray
    C: np.ndarray
    h: np.ndarray
    prior: np.ndarray
    information: np.ndarray
    squares: np.ndarray
    count: int

    def reduced(self) -> tuple[np.ndarray, np.ndarray]:
        """Return per-window A and g with the initial states eliminated, priors not included."""
        ours, cross = self.solved(0.0)
        return self.A - self.B @ cross, self.g - (self.B @ ours[..., None])[..., 0]

    def uncertain(self) -> float:
        """Return by how much the cost would rise, were each parameter off by its sampling error: the trace of A⁻¹ cov(g)."""
        A, g = self.reduced()
        return float(np.trace(_solved(A.sum(0) + np.diag(self.information), g.T @ g)))

    def solved(self, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what gives the states' step: C⁻¹ h (W, m) and C⁻¹ B' (W, m, P), C's diagonal made larger by ``damping``."""
        right = np.concatenate([self.h[..., None], self.B.swapaxes(1, 2)], 2)
        solved = np.linalg.solve(self.C * (1 + damping * np.eye(self.C.shape[1])), right) if right.size else right
        return solved[..., 0], solved[..., 1:]


Point = tuple[np.ndarray, np.ndarray, Normal, list[float]]


class Search:
    """The objective over z: logarithms of positive parameters, the others over their size; and its descent."""

    def __init__(self, twin: Twin, free_start: bool, huber: bool, iterations: int, advance: Callable[[str], None]) -> None:
        self.twin, self.huber, self.iterations, self.advance = twin, huber, iterations, advance
        self.arm: Arm = twin.arm
        self.free = [k for k, one in enumerate(self.arm.unknowns) if one.free]
        self.unknowns: list[Unknown] = [self.arm.unknowns[k] for k in self.free]
        self.positive = np.array([one.kind.positive for one in self.unknowns], bool)
        self.size = np.array([one.kind.size for one in self.unknowns])
        self.low = self.scaled(np.array([one.low for one in self.unknowns]))
        self.high = self.scaled(np.array([one.high for one in self.unknowns]))
        self.sd = twin.windows.floor.copy()
        n = twin.n
        fast = self.sd[n:] if twin.velocities else self.sd[:n] * 2 * np.pi * 10.0  # of a motion of 10 Hz
        self.start_sd = _LOOSE * np.concatenate([self.sd[:n], fast])
        self.nuisances = 2 * n if free_start else 0
        self.target = twin.windows.target
        self.rollouts, self.refined = 0, False
        self.samples: int | None = None  # of each window that count; None: all

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Return z of values (..., P)."""
        return np.where(self.positive, np.log(np.where(self.positive, values, 1.0)), values / self.size)

    def values(self, z: np.ndarray) -> np.ndarray:
        """Return the values of the free unknowns at ``z`` (..., P)."""
        return np.where(self.positive, np.exp(np.where(self.positive, z, 0.0)), z * self.size)

    def slopes(self, z: np.ndarray) -> np.ndarray:
        """Return the derivative of ``values`` (..., P)."""
        return np.where(self.positive, self.values(z), self.size)

    def everything(self, z: np.ndarray) -> np.ndarray:
        """Return all unknowns (L, all) at ``z`` (L, P)."""
        out = np.tile([one.start for one in self.arm.unknowns], (len(z), 1))
        out[:, self.free] = self.values(z)
        return out

    def first(self) -> np.ndarray:
        """Return where the search begins."""
        return self.scaled(np.array([one.start for one in self.unknowns]))

    def still(self) -> np.ndarray:
        """Return no shift of the windows' starts, (W, m)."""
        return np.zeros((self.twin.count, self.nuisances))

    def costs(self, z: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Return the costs (L,) at points ``z`` (L, P) with starts shifted by (L, W, m) sds; infinite where one diverges."""
        total = (self._prior_residual(z) ** 2).sum(1) + (shifts**2).sum((1, 2))
        for part, seen in self.twin.roll(self.everything(z), self._moved(shifts), self.samples):
            with np.errstate(over="ignore", invalid="ignore"):  # an arm that flies off costs infinitely much
                total += self._rho(self._residual(seen, part)).sum((0, 1, 3))
        self.rollouts += len(z) * self.twin.count
        return np.where(np.isfinite(total), total, np.inf)

    def normal(self, z: np.ndarray, shift: np.ndarray) -> Normal:
        """Return the normal equations at ``z`` (P,) with starts shifted by (W, m) sds."""
        P, m, W = len(z), self.nuisances, self.twin.count
        points = np.tile(z, (1 + P + m, 1))
        reach = _DIFFERENCE * np.concatenate([np.where(self.positive, 1.0, np.maximum(1.0, np.abs(z))), np.ones(m)])
        points[1 : 1 + P] += np.diag(reach[:P])
        shifts = np.tile(shift, (1 + P + m, 1, 1))
        shifts[1 + P :] += _DIFFERENCE * np.eye(m)[:, None]
        residual = self._prior_residual(z)
        slope = np.array([0.0 if one.prior is None else 1.0 / one.prior[1] for one in self.unknowns]) * self.slopes(z)
        scale = 1 / (self.sd[:, None, None] * reach[:, None])
        shapes = ((P, P), (P,), (P, m), (m, m), (m,))
        out = Normal(*(np.zeros((W, *shape)) for shape in shapes), slope * residual, slope**2, np.zeros(len(self.sd)), 0)
        for part, seen in self.twin.roll(self.everything(points), self._moved(shifts), self.samples):
            with np.errstate(over="ignore", invalid="ignore"):
                r = self._residual(seen[:, :, :1], part)[:, :, 0]  # (S, C, w)
                J = (seen[:, :, 1:] - seen[:, :, :1]) * scale
            out.squares = out.squares + ((r * self.sd[:, None]) ** 2).sum((0, 2))
            out.count += r.size
            if self.huber:
                weight = np.minimum(1.0, np.sqrt(_HUBER / np.maximum(np.abs(r), 1e-12)))
                J, r = J * weight[:, :, None], r * weight
            J = np.ascontiguousarray(J.reshape(-1, *J.shape[2:]).transpose(2, 1, 0))  # (w, L - 1, R)
            r = r.reshape(-1, r.shape[2]).T
            JJ, Jr = J @ J.swapaxes(1, 2), (J @ r[..., None])[..., 0]
            out.A[part], out.B[part], out.C[part] = JJ[:, :P, :P], JJ[:, :P, P:], JJ[:, P:, P:] + np.eye(m)
            out.g[part], out.h[part] = Jr[:, :P], Jr[:, P:] + shift[part]
        self.rollouts += len(points) * W
        if not np.isfinite(out.A).all():
            raise CalibrationError("the simulation diverges: start nearer, or take shorter windows", key="start")
        return out

    def _moved(self, shifts: np.ndarray) -> np.ndarray | None:
        return (shifts * self.start_sd).swapaxes(1, 2) if self.nuisances else None

    def _residual(self, seen: np.ndarray, part: slice) -> np.ndarray:
        """Return (S, C, L, w), in units of noise."""
        return (seen - self.target[: self.samples, :, None, part]) / self.sd[:, None, None]

    def _rho(self, r: np.ndarray) -> np.ndarray:
        size = np.abs(r)
        return np.where(size > _HUBER, 2 * _HUBER * size - _HUBER**2, r * r) if self.huber else r * r

    def _prior_residual(self, z: np.ndarray) -> np.ndarray:
        mean, sd = np.array([one.prior or (0.0, np.inf) for one in self.unknowns]).T
        return (self.values(z) - mean) / sd

    def check(self, z: np.ndarray, normal: Normal) -> None:
        """Refuse a simulation that has come nowhere near the log, and what the data say nothing about."""
        n, target = self.twin.n, self.twin.windows.target
        error, motion = np.linalg.norm(self.rms(normal)[:n]), target[:, :n] - self.twin.windows.start[:n]
        if error > np.sqrt((motion**2).mean((0, 2)).sum()):
            raise CalibrationError(
                f"the simulation is {error:.2g} rad off, which is more than the arm moves: start nearer, give priors, or take "
                "shorter windows",
                key="start",
            )
        influence = np.sqrt(np.einsum("wpp->p", normal.A) / normal.count) * np.where(self.positive, 1.0, np.maximum(1.0, np.abs(z)))
        for k, one in enumerate(self.unknowns):
            if influence[k] < _INFLUENCE and one.prior is None:
                change = "a factor e" if one.kind.positive else f"{one.kind.size:.2g} {one.kind.unit}"
                raise CalibrationError(
                    f"moves nothing in this log: {change} changes the residual by {influence[k]:.1e} of its noise; fix it or "
                    "give it a prior",
                    key=one.name,
                )
        A = normal.reduced()[0].sum(0) + np.diag(normal.information)
        scale = np.sqrt(np.maximum(np.diag(A), 1e-300))
        eigenvalues, vectors = np.linalg.eigh(A / np.outer(scale, scale))
        for share in np.abs(vectors[:, eigenvalues < _ALIKE]).T:
            alike = [self.unknowns[k] for k in np.argsort(-share) if share[k] > 0.1 * share.max()]
            if all(one.prior is None for one in alike):  # else what is known beforehand decides
                names = [one.name for one in alike]
                raise CalibrationError(f"this log cannot tell apart {', '.join(names)}: fix one or give it a prior", key=names[0])

    def approach(self, z: np.ndarray) -> Point:
        """Return where the descent from ``z`` ends, windows made longer from stage to stage.

        Far from the truth the end of a long window says nothing of use: an arm without rotors or friction has long flown off.
        """
        whole = len(self.twin.windows.target)
        for part in range(_STAGES, 0, -1):
            if whole >> part >= _LEAST:
                self.samples = whole >> part
                z = self.descend(z, tolerance=ROUGHLY)[0]
        self.samples = None
        return self.descend(z, tolerance=ROUGHLY if self.refined else CONVERGED)

    def descend(self, z: np.ndarray, shift: np.ndarray | None = None, tolerance: float = CONVERGED) -> Point:
        """Return where the descent from ``z`` ends: z, shifts, normal equations there, costs on the way."""
        shift = self.still() if shift is None else shift
        damping, costs = 1e-3, [float(self.costs(z[None], shift[None])[0])]
        normal = self.normal(z, shift)
        for k in range(self.iterations):
            steps = [self._step(z, shift, normal, damping * factor) for factor in _DAMPINGS]
            points, shifts = (np.stack(rows) for rows in zip(*steps))
            found = self.costs(points, shifts)
            best = int(np.argmin(found))
            if not found[best] < costs[-1]:
                damping *= 1e3
                if damping > _STUCK or np.abs(points - z).max() < _NO_STEP:
                    break
                continue
            moved = np.abs(points[best] - z).max()
            z, shift, damping = points[best], shifts[best], max(damping * _DAMPINGS[best], 1e-12)
            costs.append(float(found[best]))
            normal = self.normal(z, shift)
            self.advance(f"iteration {k + 1}, residual {np.sqrt(costs[-1] / normal.count):.4g} of its noise")
            gain = costs[-2] - costs[-1]
            if moved < _NO_STEP or gain < 1e-8 * costs[-1] or gain < tolerance * normal.uncertain():
                break
        return z, shift, normal, costs

    def _step(self, z: np.ndarray, shift: np.ndarray, normal: Normal, damping: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the next z, within its bounds, and the windows' shifts that go with it."""
        ours, cross = normal.solved(damping)
        A = normal.A.sum(0) + np.diag(normal.information)
        A += damping * np.diag(np.diag(A)) - np.einsum("wpm,wmq->pq", normal.B, cross)
        slope = normal.g.sum(0) + normal.prior - np.einsum("wpm,wm->p", normal.B, ours)
        open_ = ~(((z <= self.low) & (slope > 0)) | ((z >= self.high) & (slope < 0)))
        step = np.zeros_like(z)
        for _ in range(3):  # what would leave its bounds stops there, and the others are solved for again
            rest = slope + A @ np.where(open_, 0.0, step)
            step[open_] = -_solved(A[np.ix_(open_, open_)], rest[open_])
            inside = np.clip(z + step, self.low, self.high) - z
            if np.array_equal(inside, step) or not open_.any():
                break
            open_, step = open_ & (inside == step), inside
        after = np.clip(z + step, self.low, self.high)
        return after, shift - ours - cross @ (after - z) if self.nuisances else shift

    def others(self, count: int, rng: np.random.Generator) -> list[np.ndarray]:
        """Return the best of random points, ``count`` of them: looking is cheap, one call for all."""
        if count < 1:
            return []
        first, points = self.first(), []
        for _ in range(16 * count):
            drawn = first + rng.normal(size=len(first))
            for k, one in enumerate(self.unknowns):
                if one.prior is not None:
                    value = np.clip(rng.normal(*one.prior), one.low, one.high)
                    drawn[k] = np.log(value) if one.kind.positive else value / one.kind.size
            points.append(np.clip(drawn, self.low, self.high))
        costs = self.costs(np.stack(points), np.tile(self.still(), (len(points), 1, 1)))
        return [points[k] for k in np.argsort(costs)[:count] if np.isfinite(costs[k])]

    def correct(self, point: Point) -> None:
        """Take the simulation's own error at ``point``, as steps half as long show it, out of what is compared.

        Semi-implicit Euler is of first order: twice the difference remains to the limit (Richardson). What is taken out hardly
        depends on the point, so that it is computed between descents, not in them (defect correction, Stetter, 1978).
        """
        z, shift = self.everything(point[0][None]), self._moved(point[1][None])
        target = self.twin.windows.target.copy()
        for (part, coarse), (_, fine) in zip(*(list(self.twin.roll(z, shift, finer=k)) for k in (1, 2))):
            target[:, :, part] -= 2.0 * (fine - coarse)[:, :, 0]
        self.target = target if np.isfinite(target).all() else self.twin.windows.target

    def rms(self, normal: Normal) -> np.ndarray:
        """Return the residuals' rms (C,), in their units."""
        return np.sqrt(normal.squares * len(self.sd) / normal.count)


def _solved(A: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return A⁻¹ ``right``, of least norm where A is singular; parameters' units do not matter."""
    scale = 1 / np.sqrt(np.maximum(np.diag(A), 1e-300))
    found = np.linalg.lstsq(A * np.outer(scale, scale), (scale * right.T).T, rcond=1e-14)[0]
    return (scale * found.T).T

"""Physically consistent full parameters: the least-squares fit among the arms that could exist, nearest to a prior.

The objective is the residual per sample in units of its noise, plus ``weight`` times each link's entropic divergence from the
prior. The data decide what they can, the prior the rest. ``fit_feasible`` is a semidefinite programme (cvxpy, Clarabel);
``descend`` reaches the same optimum over log-Cholesky parameters, which are feasible by construction.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import minimize

from mbctrl.base.extras import need
from mbctrl.calibrate.inertia import (
    CHOLESKY,
    basis,
    cholesky_jacobian,
    divergence,
    from_cholesky,
    pseudo_inertia,
    to_cholesky,
)
from mbctrl.calibrate.regression import Columns, Grams
from mbctrl.calibrate.signals import CalibrationError


@dataclass(frozen=True)
class Restrictions:
    """What holds beside physics; indices are those of ``Columns``.

    ``fixed``: index to value. ``priors``: index to (mean, sd). ``bounds``: index to (low, high), None: open.
    """

    fixed: dict[int, float] = field(default_factory=dict)
    priors: dict[int, tuple[float, float]] = field(default_factory=dict)
    bounds: dict[int, tuple[float | None, float | None]] = field(default_factory=dict)


def compressed(data: Grams, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return R (r, p), y (r,) and c with ``|R x - y|² + c`` the mean squared residual of x in units of ``sd``."""
    count = float(data.count.sum())
    A = np.einsum("bnpq,n->pq", data.G, 1 / sd**2, optimize=True) / count
    b = np.einsum("bnp,n->p", data.g, 1 / sd**2, optimize=True) / count
    c = float((data.s / sd**2).sum() / count)
    scale = np.sqrt(np.diag(A))
    scale[scale == 0] = 1.0
    values, vectors = np.linalg.eigh(A / np.outer(scale, scale))
    good = values > 1e-12 * values[-1]
    root = np.sqrt(values[good])
    R = root[:, None] * vectors[:, good].T * scale
    y = (vectors[:, good].T @ (b / scale)) / root
    return R, y, c - float(y @ y)


def fit_feasible(
    data: Grams,
    columns: Columns,
    sd: np.ndarray,
    prior: np.ndarray,
    speeds: np.ndarray,
    load: np.ndarray,
    restrictions: Restrictions | None = None,
    weight: float = 1e-3,
) -> np.ndarray:
    """Return the parameters (p,) of the best arm that could exist.

    Every link's pseudo-inertia is positive definite, no rotor's inertia negative, and no joint's friction helps it along at
    any of ``speeds`` (S,) [rad/s], unloaded or under ``load`` (n,) [N·m]. ``prior`` (n, 10) are the links it stays near.

    Errors:
        CalibrationError: where the solver finds none, as when the restrictions contradict each other.
    """
    cp = need("cvxpy", "calibrate", "a physically consistent fit")
    need("clarabel", "calibrate", "a physically consistent fit")
    R, y, _ = compressed(data, sd)
    n, matrices = columns.n, basis().reshape(10, 16)
    x = cp.Variable(columns.count)
    cost, limits = cp.sum_squares(R @ x - y), [x[columns.armature] >= 0]
    for j in range(n):
        pseudo = cp.Variable((4, 4), PSD=True)
        limits.append(cp.vec(pseudo, order="C") == matrices.T @ x[10 * j : 10 * j + 10])
        inverse = np.linalg.inv(pseudo_inertia(prior[j]))
        cost += weight * (cp.trace(inverse @ pseudo) - cp.log_det(pseudo))
        own = columns.friction_of(j)
        for carried in {0.0, float(load[j])}:
            limits.append(columns.friction.opposing(speeds, carried) @ x[own] >= 0)
        if "viscous" in columns.friction.terms:
            limits.append(x[own.start + columns.friction.terms.index("viscous")] >= 0)
    for index, value in (restrictions.fixed if restrictions else {}).items():
        limits.append(x[index] == value)
    for index, (low, high) in (restrictions.bounds if restrictions else {}).items():
        limits += [x[index] >= low] if low is not None else []
        limits += [x[index] <= high] if high is not None else []
    count = float(data.count.sum())
    for index, (mean, spread) in (restrictions.priors if restrictions else {}).items():
        cost += cp.square((x[index] - mean) / spread) / count
    problem = cp.Problem(cp.Minimize(cost), limits)
    try:
        problem.solve(solver="CLARABEL")
    except cp.error.SolverError as error:
        raise CalibrationError(f"no physically consistent fit: {error}", key="fit") from None
    if problem.status not in ("optimal", "optimal_inaccurate") or x.value is None:
        raise CalibrationError(f"no physically consistent fit: the solver says {problem.status}", key="fit")
    return x.value


def objective(x: np.ndarray, R: np.ndarray, y: np.ndarray, n: int, prior: np.ndarray, weight: float) -> float:
    """Return what both routes minimise, up to the same constant."""
    links = x[: 10 * n].reshape(n, 10)
    return float(((R @ x - y) ** 2).sum() + weight * sum(divergence(a, b) for a, b in zip(links, prior)))


def descend(
    data: Grams, columns: Columns, sd: np.ndarray, prior: np.ndarray, start: np.ndarray | None = None, weight: float = 1e-3
) -> np.ndarray:
    """Return the parameters (p,) reached over log-Cholesky parameters from ``start`` (or the prior), rotors and friction free.

    Rotors' inertias and friction coefficients, in which the objective is quadratic, are solved for at every step; their
    signs are not restricted.
    """
    R, y, _ = compressed(data, sd)
    n = columns.n
    links = prior if start is None else start[: 10 * n].reshape(n, 10)
    inner, rest = R[:, : 10 * n], R[:, 10 * n :]
    # What the other columns cannot explain.
    left, size, _ = np.linalg.svd(rest, full_matrices=False)
    q = left[:, size > 1e-12 * size.max(initial=0.0)]
    inner_left, y_left = inner - q @ (q.T @ inner), y - q @ (q.T @ y)
    climb = _Climb(inner_left, y_left, [np.linalg.inv(pseudo_inertia(link)) for link in prior], weight)
    theta = np.concatenate([to_cholesky(link) for link in links])
    found = minimize(
        climb.value, theta, jac=True, hess=climb.curvature, method="trust-exact", options={"maxiter": 500, "gtol": 1e-9}
    )
    pi = np.concatenate([from_cholesky(row) for row in found.x.reshape(n, CHOLESKY)])
    others = np.linalg.lstsq(rest, y - inner @ pi, rcond=1e-12)[0]
    return np.concatenate([pi, others])


class _Climb:
    """The objective over log-Cholesky parameters, its gradient and its Gauss-Newton curvature."""

    def __init__(self, R: np.ndarray, y: np.ndarray, inverses: list[np.ndarray], weight: float) -> None:
        self.R, self.y, self.inverses, self.weight = R, y, inverses, weight
        self.matrices = basis()

    def value(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        split = theta.reshape(-1, CHOLESKY)
        pi = np.stack([from_cholesky(row) for row in split])
        left = self.R @ pi.ravel() - self.y
        total, slope = float(left @ left), (2 * self.R.T @ left).reshape(-1, 10)
        for j, inverse in enumerate(self.inverses):
            pseudo = pseudo_inertia(pi[j])
            total += self.weight * (np.trace(inverse @ pseudo) - np.linalg.slogdet(pseudo)[1])
            slope[j] += self.weight * np.einsum("kij,ij->k", self.matrices, inverse - np.linalg.inv(pseudo))
        return total, np.concatenate([cholesky_jacobian(row).T @ own for row, own in zip(split, slope)])

    def curvature(self, theta: np.ndarray) -> np.ndarray:
        split = theta.reshape(-1, CHOLESKY)
        H, J = 2 * self.R.T @ self.R, np.zeros((len(theta), len(theta)))
        for j, row in enumerate(split):
            own = slice(10 * j, 10 * j + 10)
            turned = np.linalg.inv(pseudo_inertia(from_cholesky(row))) @ self.matrices
            H[own, own] += self.weight * np.einsum("kij,lji->kl", turned, turned)
            J[own, own] = cholesky_jacobian(row)
        return J.T @ H @ J

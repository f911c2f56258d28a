"""Inertial parameters as pseudo-inertia matrices, which are positive definite exactly where a body could exist.

A link's ten parameters (mass, mass times centre of mass, inertia about the frame's origin in the order xx, xy, yy, xz, yz,
zz) and its pseudo-inertia P = [[S, h], [h', m]], S the second moment, say the same. Source: Wensing, Kim and Slotine, "Linear
matrix inequalities for physically consistent inertial parameter identification" (2018).
"""

from __future__ import annotations

import numpy as np

_INERTIA = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2))
CHOLESKY = 10
"""How many log-Cholesky parameters a link has."""


def pseudo_inertia(link: np.ndarray) -> np.ndarray:
    """Return the (..., 4, 4) pseudo-inertia of parameters (..., 10)."""
    out = np.zeros((*link.shape[:-1], 4, 4))
    full = np.zeros((*link.shape[:-1], 3, 3))
    for k, (i, j) in enumerate(_INERTIA):
        full[..., i, j] = full[..., j, i] = link[..., 4 + k]
    trace = np.trace(full, axis1=-2, axis2=-1)[..., None, None]
    out[..., :3, :3] = 0.5 * trace * np.eye(3) - full
    out[..., :3, 3] = out[..., 3, :3] = link[..., 1:4]
    out[..., 3, 3] = link[..., 0]
    return out


def basis() -> np.ndarray:
    """Return the (10, 4, 4) matrices whose sum, weighted by a link's parameters, is its pseudo-inertia."""
    return pseudo_inertia(np.eye(10))


def parameters(pseudo: np.ndarray) -> np.ndarray:
    """Return the parameters (..., 10) of pseudo-inertias (..., 4, 4)."""
    second = pseudo[..., :3, :3]
    full = np.trace(second, axis1=-2, axis2=-1)[..., None, None] * np.eye(3) - second
    parts = [pseudo[..., 3, 3], *(pseudo[..., i, 3] for i in range(3)), *(full[..., i, j] for i, j in _INERTIA)]
    return np.stack(parts, -1)


def feasible(link: np.ndarray, tolerance: float = 0.0) -> np.ndarray:
    """Return for each link (..., 10) whether a body could have its parameters: the least eigenvalue exceeds ``tolerance``."""
    return np.linalg.eigvalsh(pseudo_inertia(link))[..., 0] > tolerance


def from_cholesky(theta: np.ndarray) -> np.ndarray:
    """Return parameters (10,) from log-Cholesky ones: a mass, a density and a stretch that no value makes impossible.

    Args:
        theta: (10,) logarithms of scale and of the stretches (4), shears (3), centre of mass times scale (3).

    Source: Rucker and Wensing, "Smooth parameterization of rigid-body inertia" (2022).
    """
    upper = _upper(theta)
    return parameters(upper @ upper.T)


def cholesky_jacobian(theta: np.ndarray) -> np.ndarray:
    """Return the derivative (10, 10) of ``from_cholesky``: row by parameter, column by log-Cholesky parameter."""
    upper = _upper(theta)
    slopes = np.zeros((CHOLESKY, 4, 4))
    slopes[0] = upper
    for k in range(3):
        slopes[1 + k, k, k] = upper[k, k]
    for k, (i, j) in enumerate(((0, 1), (1, 2), (0, 2), (0, 3), (1, 3), (2, 3))):
        slopes[4 + k, i, j] = np.exp(theta[0])
    moved = slopes @ upper.T
    return parameters(moved + moved.swapaxes(1, 2)).T


def _upper(theta: np.ndarray) -> np.ndarray:
    alpha, d1, d2, d3, s12, s23, s13, t1, t2, t3 = theta
    rows = [[np.exp(d1), s12, s13, t1], [0, np.exp(d2), s23, t2], [0, 0, np.exp(d3), t3], [0, 0, 0, 1.0]]
    return np.array(rows) * np.exp(alpha)


def to_cholesky(link: np.ndarray) -> np.ndarray:
    """Return the log-Cholesky parameters (10,) of a feasible link (10,); the inverse of ``from_cholesky``."""
    flip = np.eye(4)[::-1]
    upper = flip @ np.linalg.cholesky(flip @ pseudo_inertia(link) @ flip) @ flip
    alpha = np.log(upper[3, 3])
    u = upper / upper[3, 3]
    return np.array([alpha, *np.log(np.diag(u)[:3]), u[0, 1], u[1, 2], u[0, 2], *u[:3, 3]])


def divergence(link: np.ndarray, prior: np.ndarray) -> float:
    """Return the entropic (log-det Bregman) divergence [1] of a link from a prior one: 0 where they are equal.

    Source: Lee, Wensing and Park, "Geometric robot dynamic identification: a convex programming approach" (2019).
    """
    ratio = np.linalg.solve(pseudo_inertia(prior), pseudo_inertia(link))
    return float(np.trace(ratio) - np.linalg.slogdet(ratio)[1] - 4.0)


def proper(links: np.ndarray) -> np.ndarray:
    """Return links (n, 10) fit to be priors: bodies that models give no size or no mass get a little of both."""
    out = links.copy()
    least = 1e-3 * max(float(links[:, 0].max()), 1e-3)  # [kg]
    for k, link in enumerate(out):
        if link[0] < least:
            out[k, 0] = least
        pseudo = pseudo_inertia(out[k])
        second = pseudo[:3, :3] - np.outer(pseudo[:3, 3], pseudo[:3, 3]) / pseudo[3, 3]
        values, vectors = np.linalg.eigh(second)
        # A centimetre is a small radius of gyration for anything that carries a motor.
        values = np.maximum(values, pseudo[3, 3] * 1e-4)
        pseudo[:3, :3] = vectors @ np.diag(values) @ vectors.T + np.outer(pseudo[:3, 3], pseudo[:3, 3]) / pseudo[3, 3]
        out[k] = parameters(pseudo)
    return out

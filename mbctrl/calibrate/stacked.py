"""Equations of bare and loaded recordings together, and what of them is left for some of the unknowns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.regression import Columns, Grams, Motion, Regression, regress
from mbctrl.calibrate.signals import CalibrationError, Signals
from mbctrl.dynamics.reference import ReferenceDynamics

TEN = 10
_BLIND = 1e-9  # curvature below this share of a column's own is no information
_VAST = 10.0  # [kg], [kg·m] or [kg·m²]: standard deviation along what no log decides


def stack(
    unloaded: Sequence[Signals],
    loaded: Sequence[Signals],
    reference: ReferenceDynamics,
    friction: Friction,
    link: int,
    solution: np.ndarray | None,
    seconds: float = 1.0,
) -> Regression:
    """Return the equations of both kinds: the arm's columns in all, ten of a body on ``link`` behind them in loaded ones.

    ``solution`` (p + 10,) is what the transmitted load of load-dependent friction is computed from: its links, and in loaded
    recordings its body.

    Errors:
        CalibrationError: naming a recording in which nothing moves.
    """
    parts, n, number = [], reference.tree.n, 0
    for carrying, recordings in ((False, unloaded), (True, loaded)):
        for one in recordings:
            if not one.moving.any():
                raise CalibrationError("nothing moves in it", file=one.file or None, key="loaded" if carrying else "unloaded")
            links = None if solution is None or "load" not in friction.terms else solution[: 10 * n].copy()
            if links is not None and carrying:
                links[10 * link : 10 * link + 10] += solution[-TEN:]
            single = regress([Motion(one, reference)], friction, links, seconds)
            body = single.W[:, :, 10 * link : 10 * link + 10] * float(carrying)
            parts.append((np.concatenate([single.W, body], 2), single.tau, single.keep, single.block + number))
            number += int(single.block.max()) + 1
    if not parts:
        raise CalibrationError("no recording", key="loaded")
    return Regression(Columns(n, friction), *(np.concatenate(pieces) for pieces in zip(*parts)))


def summed(data: Grams, sd: np.ndarray) -> Grams:
    """Return the joints' Gram matrices weighted and added up, as if of one joint: draws then cost a sixth."""
    G = np.einsum("bnpq,n->bpq", data.G, 1 / sd**2, optimize=True)[:, None]
    g = np.einsum("bnp,n->bp", data.g, 1 / sd**2, optimize=True)[:, None]
    return Grams(G, g, (data.s / sd**2).sum(1)[:, None], data.count.sum(1)[:, None])


def reduced(data: Grams, own: slice) -> Grams:
    """Return what is left for some columns once all others are solved for (Schur complement), as one block."""
    A, b = data.G.sum((0, 1)), data.g.sum((0, 1))
    rest = np.ones(len(b), bool)
    rest[own] = False
    S, y = A[own, own], b[own]
    if rest.any():
        cross = A[own][:, rest] @ inverse(A[rest][:, rest])
        S, y = S - cross @ A[rest][:, own], y - cross @ b[rest]
    return Grams(((S + S.T) / 2)[None, None], y[None, None], data.s.sum(0)[None], data.count.sum(0)[None])


def blind(curvature: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Return the covariance (p, p) of directions the equations say nothing about; added to a bootstrap's, which sees none.

    Args:
        curvature: (p, p) left for the columns once all others are solved for.
        whole: (p,) the columns' own squares.
    """
    scale = np.sqrt(np.where(whole > 0, whole, 1.0))
    values, vectors = np.linalg.eigh(curvature / np.outer(scale, scale))
    directions = (vectors / scale[:, None])[:, values < _BLIND]
    directions = directions / np.maximum(np.abs(directions).max(0), 1e-300)
    return _VAST**2 * directions @ directions.T


def inverse(A: np.ndarray) -> np.ndarray:
    """Return the pseudo-inverse (p, p) of a Gram matrix whose columns may have very different sizes."""
    scale = np.sqrt(np.diag(A))
    scale[scale == 0] = 1.0
    return np.linalg.pinv(A / np.outer(scale, scale), rcond=1e-10, hermitian=True) / np.outer(scale, scale)

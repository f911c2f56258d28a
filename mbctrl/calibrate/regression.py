"""Linear regression of joint torques: columns, blocks of time, weighted, robust and instrumental estimates, intervals.

All estimates but the robust and the instrumental one are functions of each block's Gram matrices, so that folds, weighting
rounds and bootstrap draws cost a solve of a hundred unknowns and never a pass over the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.signals import Signals
from mbctrl.dynamics.reference import ReferenceDynamics

_HUBER = 1.345  # 95 % efficient for normal residuals (Huber, "Robust Statistics", 1981)
_RANK = 1e-10  # eigenvalues of the scaled Gram matrix below this, relative to the largest, are no information


@dataclass(frozen=True)
class Columns:
    """What the unknowns are: 10 n inertial parameters, n rotor inertias, n times F friction coefficients, joint by joint."""

    n: int
    friction: Friction

    @property
    def inertial(self) -> slice:
        """The links' parameters."""
        return slice(0, 10 * self.n)

    @property
    def armature(self) -> slice:
        """The rotors' inertias."""
        return slice(10 * self.n, 11 * self.n)

    @property
    def count(self) -> int:
        """How many there are."""
        return (11 + len(self.friction.terms)) * self.n

    def friction_of(self, joint: int) -> slice:
        """The friction coefficients of a joint."""
        width = len(self.friction.terms)
        return slice(11 * self.n + joint * width, 11 * self.n + (joint + 1) * width)


@dataclass(frozen=True)
class Regression:
    """Stacked equations of one or several recordings.

    ``W`` (T, n, p) and ``tau`` (T, n) [N·m], both through the effort's filter; ``keep`` (T, n) the
    equations to fit: a joint that stands still has a friction that can be anything; ``block`` (T,) number of the stretch of
    time a sample belongs to.
    """

    columns: Columns
    W: np.ndarray
    tau: np.ndarray
    keep: np.ndarray
    block: np.ndarray


class Motion:
    """A recording's columns that no choice of friction changes, computed once.

    Args:
        one: the recording.
        reference: the arm's kinematics; its inertias do not matter.

    Attributes:
        inertial: (T, n, 10 n) the links' columns, unfiltered.
        rigid: (T, n, 11 n) links' and rotors' columns, filtered.
    """

    def __init__(self, one: Signals, reference: ReferenceDynamics) -> None:
        steps, n = one.q.shape
        self.one, self.inertial = one, reference.regressor(one.q, one.v, one.a)
        self.rigid = np.zeros((steps, n, 11 * n))
        self.rigid[:, :, : 10 * n] = one.smooth(self.inertial)
        joint = np.arange(n)
        self.rigid[:, joint, 10 * n + joint] = one.smooth(one.a)

    def terms(self, friction: Friction, links: np.ndarray | None) -> np.ndarray:
        """Return friction's columns (T, n, F), unfiltered; ``links`` (10 n,) say what the joints transmit."""
        one = self.one
        load = None if links is None else self.inertial @ links
        return friction.columns(one.v, friction.direction(one.t, one.v, one.parts), load)

    def equations(self, terms: np.ndarray) -> np.ndarray:
        """Return all columns (T, n, p), filtered, friction's of each joint beside the joint's others."""
        steps, n, width = terms.shape
        W = np.zeros((steps, n, (11 + width) * n))
        W[:, :, : 11 * n] = self.rigid
        smooth = self.one.smooth(terms)
        for j in range(n):
            W[:, j, 11 * n + j * width : 11 * n + (j + 1) * width] = smooth[:, j]
        return W


def regress(motions: Sequence[Motion], friction: Friction, links: np.ndarray | None = None, seconds: float = 1.0) -> Regression:
    """Return the equations of recordings.

    Args:
        motions: the recordings.
        friction: the family.
        links: (10 n,) parameters the transmitted load is computed from, where the family has a term for it.
        seconds: length of a block.
    """
    W = [motion.equations(motion.terms(friction, links)) for motion in motions]
    return stacked(motions, W, Columns(motions[0].one.effort.shape[1], friction), seconds)


def stacked(motions: Sequence[Motion], W: Sequence[np.ndarray], columns: Columns, seconds: float) -> Regression:
    """Return equations with columns ``W``, one (T, n, p) a recording."""
    block, number = [], 0
    for motion in motions:
        part = blocks_of(motion.one, seconds)
        block.append(part + number)
        number += int(part.max()) + 1
    tau = np.concatenate([motion.one.effort for motion in motions])
    keep = np.concatenate([motion.one.sliding for motion in motions])
    return Regression(columns, np.concatenate(W), tau, keep, np.concatenate(block))


def blocks_of(one: Signals, seconds: float) -> np.ndarray:
    """Return (T,): number of the block of ``seconds`` a sample lies in; blocks do not reach across gaps."""
    out, number = np.zeros(len(one.t), int), 0
    for first, past in one.parts:
        local = ((one.t[first:past] - one.t[first]) / seconds).astype(int)
        out[first:past] = number + local
        number += int(local[-1]) + 1
    return out


@dataclass(frozen=True)
class Grams:
    """Per block and joint: ``G`` (B, n, p, p) = W'W, ``g`` (B, n, p) = W'tau, ``s`` (B, n) = tau'tau, ``count`` (B, n) samples."""

    G: np.ndarray
    g: np.ndarray
    s: np.ndarray
    count: np.ndarray

    def __getitem__(self, blocks: np.ndarray) -> Grams:
        """Return some of the blocks."""
        return Grams(self.G[blocks], self.g[blocks], self.s[blocks], self.count[blocks])

    def only(self, columns: np.ndarray) -> Grams:
        """Return the same with some of the columns."""
        return Grams(self.G[:, :, columns[:, None], columns], self.g[:, :, columns], self.s, self.count)

    def merged(self, group: np.ndarray) -> Grams:
        """Return sums over the blocks that share a number in ``group`` (B,), 0 upward."""
        rows = [group == number for number in range(group.max() + 1)]
        return Grams(*(np.stack([part[row].sum(0) for row in rows]) for part in (self.G, self.g, self.s, self.count)))

    def __len__(self) -> int:
        return len(self.count)


def grams(regression: Regression) -> Grams:
    """Return the Gram matrices of the samples kept, blocks without any left out."""
    found = []
    for b in np.unique(regression.block[regression.keep.any(1)]):
        rows = regression.block == b
        keep = regression.keep[rows].T  # (n, t)
        w, y = regression.W[rows].transpose(1, 0, 2) * keep[:, :, None], regression.tau[rows].T * keep
        found.append((w.transpose(0, 2, 1) @ w, (w.transpose(0, 2, 1) @ y[:, :, None])[..., 0], (y**2).sum(1), keep.sum(1)))
    return Grams(*(np.stack(parts) for parts in zip(*found)))


def solve(data: Grams, sd: np.ndarray) -> np.ndarray:
    """Return the weighted least-squares estimate (p,), of least norm where the data do not decide.

    Args:
        data: Gram matrices.
        sd: (n,) noise of each joint [N·m].
    """
    A, b = _weighed(data, sd)
    return _solved(A.sum(0), b.sum(0))


def _weighed(data: Grams, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return W'W (B, p, p) and W'tau (B, p) of each block in units of the noise."""
    return np.einsum("bnpq,n->bpq", data.G, 1 / sd**2), np.einsum("bnp,n->bp", data.g, 1 / sd**2)


def _solved(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.diag(A))
    scale[scale == 0] = 1.0
    values, vectors = np.linalg.eigh(A / np.outer(scale, scale))
    good = values > _RANK * values[-1]
    return vectors[:, good] @ ((vectors[:, good].T @ (b / scale)) / values[good]) / scale


def squares(data: Grams, x: np.ndarray) -> np.ndarray:
    """Return the sum of squared residuals (B, n) [(N·m)²] of an estimate."""
    return np.maximum(data.s - 2 * data.g @ x + (data.G @ x) @ x, 0.0)


def weighted(data: Grams, rounds: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Return the estimate (p,) and each joint's residual sd (n,) [N·m], weights and estimate refined in turn."""
    count = np.maximum(data.count.sum(0), 1)
    sd = np.sqrt(np.maximum(data.s.sum(0) / count, 1e-12))
    whole = data.merged(np.zeros(len(data), int))
    for _ in range(rounds):
        x = solve(whole, sd)
        sd = np.sqrt(np.maximum(squares(whole, x).sum(0) / count, 1e-12))
    return x, sd


def huber(regression: Regression, columns: np.ndarray, rounds: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Return the estimate and joint sds with residuals beyond 1.345 sd weighing less; for logs with outliers."""
    keep, W, tau = regression.keep, regression.W[:, :, columns], regression.tau
    weight = keep.astype(float)
    for _ in range(rounds):
        A = np.einsum("tnp,tnq,tn->pq", W, W, weight, optimize=True)
        b = np.einsum("tnp,tn->p", W, weight * tau)
        x = np.linalg.lstsq(A, b, rcond=_RANK)[0]
        left = tau - W @ x
        sd = 1.4826 * np.nanmedian(np.where(keep, np.abs(left), np.nan), axis=0)  # of a normal distribution
        weight = keep * np.minimum(1.0, _HUBER * sd / np.maximum(np.abs(left), 1e-12)) / sd**2
    return x, sd


def instrumental(regression: Regression, instruments: np.ndarray, columns: np.ndarray, sd: np.ndarray) -> np.ndarray:
    """Return the instrumental-variables estimate (p,): unbiased where columns carry measurement noise.

    Args:
        regression: the equations.
        instruments: (T, n, p) the same columns along motions without that noise, as the reference the arm followed.
        columns: which columns are fitted.
        sd: (n,) noise of each joint [N·m].

    Source: Janot, Vandanjon and Gautier, "A generic instrumental variable approach for industrial robot
    identification" (2014).
    """
    weight = regression.keep / sd**2
    W, Z = regression.W[:, :, columns], instruments[:, :, columns]
    A = np.einsum("tnp,tnq,tn->pq", Z, W, weight, optimize=True)
    b = np.einsum("tnp,tn->p", Z, regression.tau * weight, optimize=True)
    return np.linalg.lstsq(A, b, rcond=_RANK)[0]


def bootstrap(data: Grams, sd: np.ndarray, draws: int = 200, seed: int = 0) -> np.ndarray:
    """Return the covariance (p, p) of the estimate by drawing whole blocks with replacement.

    Residuals of a rigid model are far from independent: standard errors that take them so are several times too small.
    Source: Künsch, "The jackknife and the bootstrap for general stationary observations" (1989).
    """
    rng, blocks = np.random.default_rng(seed), len(data)
    shares = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws)
    A, b = _weighed(data, sd)
    found = np.stack([_solved(np.tensordot(share, A, 1), share @ b) for share in shares.astype(float)])
    return np.cov(found.T)


def delay(motions: Sequence[Motion], regression: Regression, columns: np.ndarray, sd: np.ndarray, reach: float = 0.03) -> float:
    """Return by how much efforts come later than the motion they go with [s], within ``reach``.

    Efforts are moved against the columns, everything is fitted anew at each shift, and a parabola through the least residual
    and its neighbours gives the answer. Friction that turns more slowly than the model's looks like a delay: it means
    something only with a family that has memory where the joints do.
    """
    A, _ = _weighed(grams(replace(regression, tau=np.zeros_like(regression.tau))).only(columns), sd)
    A = A.sum(0)
    scale = regression.keep / sd
    W = regression.W[:, :, columns] * scale[:, :, None]
    step = 1.0 / motions[0].one.rate / 2
    shifts = np.arange(-np.ceil(reach / step), np.ceil(reach / step) + 1) * step
    left = []
    for shift in shifts:
        tau = np.concatenate([moved_efforts(motion.one, shift).effort for motion in motions]) * scale
        b = np.einsum("tnp,tn->p", W, tau)
        left.append((tau**2).sum() - b @ _solved(A, b))
    best = int(np.clip(np.argmin(left), 1, len(left) - 2))
    before, here, after = left[best - 1 : best + 2]
    return float(shifts[best] + 0.5 * step * (before - after) / (before - 2 * here + after))


def moved_efforts(one: Signals, shift: float) -> Signals:
    """Return a recording with the efforts of ``shift`` seconds later."""
    later = [np.stack([np.interp(one.t + shift, one.t, x) for x in efforts.T], 1) for efforts in (one.effort, one.measured)]
    return replace(one, effort=later[0], measured=later[1])

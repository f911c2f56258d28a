"""Which mistake in a log, if any, makes the nominal model explain the measured torques.

Each joint's effort is fitted with what a drive can do to a rigid body: model torque, viscous and Coulomb friction, all
with coefficients that cannot be negative, and a constant. A reversed sign or a swapped column leaves next to nothing of
that fit, whether inertia, gravity or friction dominates, and undoing the mistake brings it back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.tree import RigidTree

WINDOW = 0.2
"""Length of the smoothing that makes velocities and accelerations of positions [s]."""
STATES = 400
"""The model is evaluated at this many states of a log, evenly spread."""
POOR = 0.1
"""Mistakes are looked for where a larger part of the efforts' variance, summed over the joints, is unexplained (1 - R²)."""
CLEAR = 0.5
"""A mistake is named where undoing it leaves at most this part of what was unexplained before,"""
ALIKE = 1.3
"""and an other one as well where it leaves at most this many times as much."""
SCALE = (0.25, 4.0)
"""No nominal model is so wrong that its torques have to be multiplied by less or more."""
DOMINANT, HEAVY = 0.5, 0.2
"""The size of an effort is judged where the model torque alone explains more than this part of its variance, the first of
one joint, the second of all joints alike."""


@dataclass(frozen=True)
class States:
    """Smoothed states along a log, each (M, n): ``q`` [rad], ``v`` [rad/s], ``a`` [rad/s²], ``effort`` [N·m]."""

    q: np.ndarray
    v: np.ndarray
    a: np.ndarray
    effort: np.ndarray


@dataclass(frozen=True)
class Mistake:
    """What a log may look like: ``text`` in words, ``joints`` concerned, what undoing it leaves unexplained of all joints
    (``left``), and whether that is clearly less than before."""

    text: str
    joints: tuple[int, ...]
    left: float
    clear: bool


def smoothed(t: np.ndarray, q: np.ndarray, effort: np.ndarray, parts: tuple[tuple[int, int], ...]) -> States:
    """Return states of each stretch ``parts``, all from positions; t (T,) [s] may be uneven, q and effort are (T, n)."""
    from scipy.signal import savgol_filter

    dt = float(np.median(np.diff(t)))
    size = max(5, 2 * round(WINDOW / 2 / dt) + 1)
    pieces = []
    for first, past in parts:
        grid = np.arange(t[first], t[past - 1], dt)
        if len(grid) > size:
            x, tau = (np.stack([np.interp(grid, t[first:past], c) for c in y[first:past].T], axis=1) for y in (q, effort))
            inner = slice(size // 2, len(grid) - size // 2)
            motion = [savgol_filter(x, size, 3, deriv=d, delta=dt, axis=0)[inner] for d in range(3)]
            pieces.append((*motion, savgol_filter(tau, size, 3, axis=0)[inner]))
    if not pieces:
        return States(*(np.empty((0, q.shape[1])) for _ in range(4)))
    whole = [np.concatenate(piece) for piece in zip(*pieces)]
    step = -(-len(whole[0]) // STATES)
    return States(*(x[::step] for x in whole))


@dataclass(frozen=True)
class Fit:
    """``explained`` (n,): R² of each joint's effort, the model torque scaled within ``SCALE``; ``scale`` (n,): the scale that
    would be best, and ``share`` (n,) its part of the variance. NaN for efforts that never change."""

    explained: np.ndarray
    scale: np.ndarray
    share: np.ndarray


def fit(model: np.ndarray, v: np.ndarray, effort: np.ndarray) -> Fit:
    """Fit effort (M, n) with model torque, friction at ``v`` and a constant, joint by joint."""
    found = [_fit_joint(*columns) for columns in zip(model.T, v.T, effort.T)]
    return Fit(*(np.array(column) for column in zip(*found)))


def _fit_joint(model: np.ndarray, v: np.ndarray, effort: np.ndarray) -> tuple[float, float, float]:
    slow = max(0.01, 0.05 * float(np.sqrt(np.mean(v**2))))  # [rad/s] the sign of slower motion is noise
    columns = np.stack([model, v, np.tanh(v / slow)], axis=1)
    columns, target = columns - columns.mean(axis=0), effort - effort.mean()
    total = float(target @ target)
    if total <= 0:
        return np.nan, np.nan, np.nan
    factor, rest = _positive(columns, target)
    scale = factor[0]
    within = min(max(scale, SCALE[0]), SCALE[1])
    if within != scale:  # the best within the bounds lies on the one that is violated
        rest = _positive(columns[:, 1:], target - within * columns[:, 0])[1]
    return max(0.0, 1 - rest**2 / total), scale, float(scale**2 * (columns[:, 0] @ columns[:, 0]) / total)


def _positive(columns: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the factors >= 0 that fit ``target`` best, and the norm of what they leave."""
    from scipy.optimize import nnls

    size = np.maximum(np.linalg.norm(columns, axis=0), 1e-12)
    factor, rest = nnls(columns / size, target)
    return factor / size, rest


class Explainer:
    """Tries a log's possible mistakes against the nominal model.

    Args:
        tree: the nominal model.
        states: of the log, in its joint order.
        judged: the joints whose effort counts: driven, and moving or loaded.
    """

    def __init__(self, tree: RigidTree, states: States, judged: list[int]) -> None:
        self.tree, self.states, self.judged = tree, states, judged
        self.reference = ReferenceDynamics(tree)
        self.model = self._torque(states.q, states.v, states.a)
        self.now = fit(self.model, states.v, states.effort)

    def _torque(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        return self.reference.inverse_dynamics(q, v, a)

    def mistakes(self) -> list[Mistake]:
        """Return the mistakes that, undone, leave clearly less unexplained than the log as it is, best first."""
        if not self._left(self.now, self.judged) > POOR:
            return []
        tried = (*self._of_effort(), *self._of_position(), *self._of_everything())
        clear = sorted((mistake for mistake in tried if mistake.clear), key=lambda mistake: mistake.left)
        return [mistake for mistake in clear if mistake.left <= max(ALIKE * clear[0].left, clear[0].left + 0.02)]

    def _left(self, found: Fit, joints: Sequence[int]) -> float:
        """Return the sum of the joints' unexplained parts of the variance."""
        return float(np.nansum(1 - found.explained[list(joints)]))

    def _mistake(self, text: str, joints: tuple[int, ...], found: Fit, own: Sequence[int]) -> Mistake:
        """Return a mistake that is clear if it explains the joints ``own`` better, and all together not worse."""
        left, now = self._left(found, own), self._left(self.now, own)
        whole = self._left(found, self.judged)
        clear = POOR < now and left <= CLEAR * now and whole < self._left(self.now, self.judged)
        return Mistake(text, joints, whole, clear)

    def _of_effort(self) -> Iterator[Mistake]:
        s = self.states
        for j in self.judged:
            effort = np.where(np.arange(self.tree.n) == j, -1, 1) * s.effort
            yield self._mistake("the sign of its effort is reversed", (j,), fit(self.model, s.v, effort), (j,))
        for i, j in combinations(self.judged, 2):
            found = fit(self.model, s.v, _swap(s.effort, i, j))
            yield self._mistake("their effort columns are swapped", (i, j), found, (i, j))

    def _of_position(self) -> Iterator[Mistake]:
        s, n = self.states, self.tree.n
        for j in range(n):
            here = np.arange(n) == j
            yield self._moved("the sign of its position is reversed", (j,), factor=np.where(here, -1.0, 1.0))
            for turn in (90, 180, -90) if self.tree.revolute[j] else ():
                yield self._moved(f"its zero is {turn} degrees off the model's", (j,), offset=np.radians(turn) * here)
        for i, j in combinations(range(n), 2):
            q, v, a, effort = (_swap(x, i, j) for x in (s.q, s.v, s.a, s.effort))
            model = self._torque(q, v, a)
            yield self._mistake("their position columns are swapped", (i, j), fit(model, v, s.effort), self.judged)
            yield self._mistake("all their columns are swapped", (i, j), fit(model, v, effort), self.judged)

    def _of_everything(self) -> Iterator[Mistake]:
        s, every, degree = self.states, tuple(range(self.tree.n)), np.pi / 180
        still = np.zeros_like(s.q)
        floating = fit(self.model - self._torque(s.q, still, still), s.v, s.effort)
        yield self._mistake("the efforts look free of gravity, as before an arm's own compensation", every, floating, self.judged)
        if np.abs(s.q).max() > 2 * np.pi:
            yield self._moved("positions look like degrees given as radians", every, factor=degree)
        if np.ptp(s.q, axis=0).max() < 2 * np.pi * degree:
            yield self._moved("positions look like radians given as degrees", every, factor=1 / degree)

    def _moved(
        self, text: str, joints: tuple[int, ...], *, factor: np.ndarray | float = 1.0, offset: np.ndarray | float = 0.0
    ) -> Mistake:
        s = self.states
        model = self._torque(factor * s.q + offset, factor * s.v, factor * s.a)
        return self._mistake(text, joints, fit(model, factor * s.v, s.effort), self.judged)


def _swap(x: np.ndarray, i: int, j: int) -> np.ndarray:
    order = np.arange(x.shape[1])
    order[[i, j]] = j, i
    return x[:, order]

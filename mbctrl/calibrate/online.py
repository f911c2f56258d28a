"""Payload and friction estimated while the arm moves, for a controller that adapts its model.

The seam (``mbctrl.calibrate.adapt`` is its use in a run): whoever reads the robot calls ``update`` with every sample, outside
the control loop's hot path, and hands ``estimate.tree(tree)`` to whatever plans, when ``estimate.fresh`` and the mass has moved
by more than a few ``mass_error``:

    adapter = OnlineEstimator(tree)
    estimate = adapter.update(t, q, v, effort)         # every sample, well under a millisecond
    if estimate.fresh and abs(estimate.mass - used) > 3 * estimate.mass_error:
        plan_with(RigidBodyDynamics(estimate.tree(tree)))

Positions, velocities and efforts pass one causal second-order filter, whose state is the filtered signal's derivative, so
accelerations come with the same delay as everything else. Regressor columns and what the known arm leaves of the torque then
pass a second, equal one. Delays are thus the same on both sides and bias nothing.

The update is recursive least squares in information form, L <- F L F + (1 - F²) L0 + W' R^-1 W, forgetting F per parameter
(payload fast, friction slow; Parkum, Poulsen and Holst, "Recursive forgetting algorithms", 1992) towards the prior's
information L0 (Salgado, Goodwin and Middleton, "Modified least squares algorithm incorporating exponential resetting and
forgetting", 1988), centred on the present estimate: the covariance never exceeds the prior's, whatever is or is not excited.
A joint that hardly moves says nothing, a brake may hold it, and where no joint moves nothing is forgotten; unless ``still``
says that there are no brakes: its friction may then be anything up to its own size.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

import numpy as np

from mbctrl.calibrate.body import carrier
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.body import compose, weld
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.tree import RigidTree

_FRICTION = ("coulomb", "viscous", "offset")


@dataclass(frozen=True)
class OnlineSettings:
    """How fast, how far and how sure; spreads are standard deviations of what is not known, the largest there will ever be."""

    cutoff: float = 8.0  # [Hz] of each of the two filters
    payload_memory: float = 1.5  # [s] time constant of forgetting
    friction_memory: float = 20.0  # [s]
    noise: float | tuple[float, ...] = 0.3  # [N·m] least torque noise after filtering, of all joints or each
    noise_memory: float = 5.0  # [s] in which more noise than that is noticed
    mass_spread: float = 3.0  # [kg]
    reach: float = 0.2  # [m] spread of the centre of mass
    friction_spread: tuple[float, float, float] = (2.0, 2.0, 0.5)  # Coulomb [N·m], viscous [N·m·s/rad], offset [N·m]
    mass_limit: float = 50.0  # [kg] estimates stay within 0 and this
    reach_limit: float = 1.0  # [m] half the box the centre of mass lies in
    friction_limit: tuple[float, float, float] = (100.0, 200.0, 50.0)  # as spreads
    slowest: float = 0.05  # [rad/s] a joint slower stands still
    still: bool = False  # joints that stand still count, friction unknown up to its size: where no brake may hold them
    smooth: float = 0.01  # [rad/s] over which friction turns
    fastest: float | tuple[float, ...] = 20.0  # [rad/s] samples beyond are not real
    strongest: float | tuple[float, ...] = 1000.0  # [N·m] likewise
    gap: float = 0.1  # [s] longer silences start the filters anew
    surprise: float = 12.0  # mean squared innovation, in variances, that means another payload
    window: float = 0.1  # [s] over which that mean is taken


@dataclass(frozen=True)
class Estimate:
    """What is known after a sample.

    Args:
        t: [s] of the sample.
        joint: moves the link that carries.
        mass: [kg].
        com: (3,) [m] in the carrying link's frame; zeros while there is no mass.
        mass_error: [kg] standard error, for noise alone: what a model lacks (joint elasticity, friction's own ways) is not in it.
        payload_covariance: (4, 4) of mass [kg] and mass times centre of mass [kg·m], likewise.
        friction: (n, 3) Coulomb [N·m], viscous [N·m·s/rad] and offset [N·m].
        friction_error: (n, 3) their standard errors.
        fresh: whether this sample changed the estimate.
        rejected: what was refused: ``sample: ...``, or parameters held at a physical limit, as ``mass``, ``com x``,
            ``JOINT coulomb``.
    """

    t: float
    joint: str
    mass: float
    com: np.ndarray
    mass_error: float
    payload_covariance: np.ndarray
    friction: np.ndarray
    friction_error: np.ndarray
    fresh: bool
    rejected: tuple[str, ...]

    def tree(self, tree: RigidTree) -> RigidTree:
        """Return the bare arm's tree with the payload, as a point mass, and with the joints' friction; offsets have no place."""
        body = compose(self.mass, self.com, np.zeros((3, 3)))
        found = replace(tree, friction=self.friction[:, 0].copy(), damping=self.friction[:, 1].copy())
        return weld(found, tree.joints.index(self.joint), body)


class OnlineEstimator:
    """Recursive estimator of a point-like payload (mass, mass times centre of mass) and of each joint's friction.

    Args:
        tree: the bare arm, as fitted: links, rotors, Coulomb and viscous friction.
        settings: see there.
        joint: moves the link that carries; None: the last.
        offset: (n,) [N·m] friction offsets to begin with.

    Errors:
        CalibrationError: for a joint there is not.
    """

    def __init__(
        self,
        tree: RigidTree,
        settings: OnlineSettings = OnlineSettings(),
        *,
        joint: str | None = None,
        offset: np.ndarray | None = None,
    ) -> None:
        s, n = settings, tree.n
        self.tree, self.settings, self.reference = tree, settings, ReferenceDynamics(tree)
        self.link = carrier(tree, joint, None)[0]
        self._links = link_parameters(tree).ravel()
        self._theta = np.zeros(4 + 3 * n)
        start = np.stack([tree.friction, tree.damping, np.zeros(n) if offset is None else offset], 1)
        self._theta[4:] = start.ravel()
        spread = np.r_[s.mass_spread, np.full(3, s.mass_spread * s.reach), np.tile(s.friction_spread, n)]
        if not (spread > 0).all() or not np.isfinite(self._theta).all():
            raise CalibrationError("expected finite friction and positive spreads", key="settings")
        self._least = np.diag(1 / spread**2)
        self._information, self._slack = self._least.copy(), spread
        self._shown = self._theta.copy()
        self._memory = np.r_[np.full(4, s.payload_memory), np.full(3 * n, s.friction_memory)]
        self._top = np.r_[s.mass_limit, np.full(3, np.inf), np.tile(s.friction_limit, n)]
        self._bottom = np.r_[0.0, np.full(3, -np.inf), np.tile((0.0, 0.0, -s.friction_limit[2]), n)]
        self._variance = np.broadcast_to(np.asarray(s.noise, float) ** 2, (n,)).copy()
        self._quiet = self._variance.copy()
        self._names = ("mass", "com x", "com y", "com z", *(f"{name} {what}" for name in tree.joints for what in _FRICTION))
        self._first, self._second = _Filter(s.cutoff), _Filter(s.cutoff)
        self._surprise: deque[tuple[float, float]] = deque()
        self._t, self._since = -np.inf, 0.0

    def update(self, t: float, q: np.ndarray, v: np.ndarray, effort: np.ndarray) -> Estimate:
        """Take a sample and return the estimate.

        Args:
            t: [s], increasing.
            q, v, effort: (n,) [rad], [rad/s] and motor torque at the joint [N·m].
        """
        if why := self._unreal(t, q, v, effort):
            return self._estimate(t, False, (f"sample: {why}",))
        dt = t - self._t
        restart = not dt <= self.settings.gap
        self._t = t
        # Friction turns within a sample or two: its columns take the way of the torque, through both filters.
        turned, turning = np.tanh(v / self.settings.smooth), 1 - np.abs(np.tanh(v / self.settings.slowest))
        smooth, slope = self._first.step(np.stack([q, v, effort, turned, turning]), dt, restart)
        columns, left = self._equations(smooth[0], smooth[1], slope[1], smooth[2], smooth[3])
        rows, _ = self._second.step(np.column_stack([columns, left, smooth[4]]), dt, restart)
        self._since = 0.0 if restart else self._since + dt
        # Brakes stop an arm faster than the filters: a joint moves where it did and still does.
        moves = self.settings.still | (np.minimum(np.abs(smooth[1]), np.abs(v)) > self.settings.slowest)
        # Three time constants of two filters of second order: what they began with is forgotten.
        if self._since < 2.0 / self.settings.cutoff or not moves.any():
            return self._estimate(t, False, ())
        # Around a reversal friction is not what its model says, by as much as it is itself.
        variance = self._variance + (self._theta[4::3] * np.maximum(rows[:, -1], 0.0)) ** 2
        self._listen(rows[:, -2] - rows[:, :-2] @ self._theta, variance, moves, dt)
        return self._estimate(t, True, self._learn(rows[moves, :-2], rows[moves, -2], variance[moves], dt))

    def _unreal(self, t: float, q: np.ndarray, v: np.ndarray, effort: np.ndarray) -> str:
        """Return what is wrong with a sample, or nothing."""
        s = self.settings
        if not all(np.shape(x) == (self.tree.n,) and np.isfinite(x).all() for x in (q, v, effort)) or not np.isfinite(t):
            return "not finite, or not one value a joint"
        if not t > self._t:
            return "time does not advance"
        if (np.abs(v) > s.fastest).any():
            return "too fast"
        if (np.abs(effort) > s.strongest).any():
            return "too strong"
        return ""

    def _equations(
        self, q: np.ndarray, v: np.ndarray, a: np.ndarray, effort: np.ndarray, turned: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns (n, p) of the unknowns and what the known arm leaves of the torques (n,)."""
        n, own = self.tree.n, 10 * self.link
        W = self.reference.regressor(q[None], v[None], a[None])[0]
        columns = np.zeros((n, len(self._theta)))
        columns[:, :4] = W[:, own : own + 4]
        joint = np.arange(n)
        columns[joint, 4 + 3 * joint] = turned
        columns[joint, 5 + 3 * joint] = v
        columns[joint, 6 + 3 * joint] = 1.0
        left = effort - W @ self._links - self.tree.armature * a
        # A point mass's inertia about the link's origin is not linear in the unknowns: the last estimate's is good enough.
        point = compose(self._shown[0], self._com(), np.zeros((3, 3)))
        return columns, left - W[:, own + 4 : own + 10] @ point[4:]

    def _learn(self, W: np.ndarray, y: np.ndarray, variance: np.ndarray, dt: float) -> tuple[str, ...]:
        error = y - W @ self._theta
        keep = np.exp(-dt / self._memory)
        if self._surprised(float((error**2 / variance).mean())):
            keep[:4] = 0.0
        self._information = self._information * np.outer(keep, keep) + np.diag((1 - keep**2) * np.diag(self._least))
        # A step as large as the whole prior allows is the most one sample may ask for.
        spread = np.einsum("ij,j,ij->i", W, 1 / np.diag(self._least), W) + variance
        error = np.clip(error, -3 * np.sqrt(spread), 3 * np.sqrt(spread))
        # Filtered noise stays the same for about half a period of the cutoff: samples in between are no further witnesses.
        scaled = W / variance[:, None] * min(1.0, 2 * self.settings.cutoff * dt)
        self._information += scaled.T @ W
        self._theta = self._theta + np.linalg.solve(self._information, scaled.T @ error)
        # Truncated at every sample, noise around zero would have a mean, which friction would learn to balance: the state may
        # be as unphysical as the prior is wide, what is shown may not.
        self._theta, _ = self._project(self._theta, self._slack)
        self._shown, held = self._project(self._theta, np.zeros_like(self._slack))
        return held

    def _listen(self, error: np.ndarray, variance: np.ndarray, moves: np.ndarray, dt: float) -> None:
        """Raise or lower the noise towards what is left unexplained; a single innovation counts nine variances at most."""
        share = moves * (1 - np.exp(-dt / self.settings.noise_memory)) * self._variance / variance
        self._variance += share * (np.minimum(error**2, 9 * variance) - self._variance)
        self._variance = np.maximum(self._variance, self._quiet)

    def _surprised(self, size: float) -> bool:
        """Return whether the innovations have been too large for noise for a whole window, and begin a new one if so."""
        s, recent = self.settings, self._surprise
        recent.append((self._t, size))
        while self._t - recent[0][0] > s.window:
            recent.popleft()
        whole = self._t - recent[0][0] > 0.8 * s.window
        if not whole or sum(value for _, value in recent) < s.surprise * len(recent):
            return False
        recent.clear()
        return True

    def _project(self, theta: np.ndarray, slack: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the nearest physical parameters, up to ``slack`` (p,), and the names of what had to move.

        Nearest in the information's metric: what is correlated with a parameter that is held back moves along.
        """
        theta, held = theta.copy(), np.zeros(len(theta), bool)
        for _ in range(4):
            shift = self._clipped(theta, slack) - theta
            new = (np.abs(shift) > 1e-9) & ~held
            if not new.any():
                break
            held |= new
            free = ~held
            theta[held] += shift[held]
            pull = self._information[np.ix_(free, held)] @ shift[held]
            theta[free] -= np.linalg.solve(self._information[np.ix_(free, free)], pull)
        return self._clipped(theta, slack), tuple(self._names[k] for k in np.flatnonzero(held))

    def _clipped(self, theta: np.ndarray, slack: np.ndarray) -> np.ndarray:
        inside = np.clip(theta, self._bottom - slack, self._top + slack)
        half = max(inside[0], 0.0) * self.settings.reach_limit + slack[1:4]
        inside[1:4] = np.clip(inside[1:4], -half, half)
        return inside

    def _com(self) -> np.ndarray:
        return self._shown[1:4] / self._shown[0] if self._shown[0] > 1e-6 else np.zeros(3)

    def _estimate(self, t: float, fresh: bool, rejected: tuple[str, ...]) -> Estimate:
        covariance = np.linalg.inv(self._information)
        error, own = np.sqrt(np.diag(covariance)), covariance[:4, :4].copy()
        friction, mass = self._shown[4:].reshape(-1, 3).copy(), float(self._shown[0])
        joint = self.tree.joints[self.link]
        return Estimate(t, joint, mass, self._com(), float(error[0]), own, friction, error[4:].reshape(-1, 3), fresh, rejected)


class _Filter:
    """A causal second-order Butterworth filter of arrays at uneven stamps (trapezoidal rule), with its derivative."""

    def __init__(self, cutoff: float) -> None:
        self._w = 2 * np.pi * cutoff
        self._x = self._slope = self._input = np.zeros(0)

    def step(self, u: np.ndarray, dt: float, restart: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return the filtered ``u`` and its time derivative ``dt`` [s] after the last; ``restart`` as if it had always been."""
        if restart:
            self._x, self._slope, self._input = u.copy(), np.zeros_like(u), u.copy()
            return self._x, self._slope
        w, h, damping = self._w, dt / 2, np.sqrt(2.0) * self._w
        # x' = s, s' = w² (u - x) - sqrt(2) w s, both ends of the step weighing the same.
        pull = w * w * (self._input + u - 2 * self._x - h * self._slope) - damping * self._slope
        slope = (self._slope + h * pull) / (1 + h * damping + h * h * w * w)
        x = self._x + h * (self._slope + slope)
        self._x, self._slope, self._input = x, slope, u.copy()
        return x, slope

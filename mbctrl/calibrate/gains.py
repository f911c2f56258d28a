"""Drive gains out of a known payload: how many newton metres a joint gives per ampere.

A bare arm's currents fix its gains and parameters up to one common factor, for links' parameters, which several joints feel,
tie the joints together; a payload of known mass sets that factor (Gautier and Briot, "Global identification of
joint drive gains and dynamic parameters of robots", 2014). Gain times current is the regressor there, and the payload's
known part what is regressed on. Where the model leaves something unexplained, that is errors in variables: least squares
then shrinks every gain, the more the less of a joint's torque the payload is. Total least squares mends it where noise is
white and of known proportions. Here currents are what is predicted, which is where the noise is:

    i_j = (W_j x + P_j y) / K_j + noise,  y's known part given,

by Gauss-Newton over links, friction, unknown part of the payload and gains at once, from Gram matrices alone. Standard errors
are those of noise: where the centre of mass is not given, wrist gains and it are found together, and what the model lacks in
the large joints shows in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.body import carrier, seen_from
from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.payload import PLAIN, RICH
from mbctrl.calibrate.regression import Grams, grams
from mbctrl.calibrate.signals import CalibrationError, Signals
from mbctrl.calibrate.stacked import TEN, inverse, stack
from mbctrl.dynamics.body import decompose
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.tree import RigidTree

_VAGUE = 1.0  # prior on a gain's logarithm, that blind directions stay put: a factor e, one standard deviation
_INFLATION = 4.0  # what independent residuals understate standard errors by, before the bootstrap says it exactly
_SHOWS = 0.15  # relative standard error from which a gain counts as not shown
_ROUNDS, _DONE = 60, 1e-8


@dataclass(frozen=True)
class DriveGains:
    """Gains of joints (n,).

    Args:
        joints: names.
        gains: (n,) [N·m/A]; the start gain where ``kept``.
        errors: (n,) [N·m/A] standard errors by a bootstrap over blocks of time, infinite where ``kept``.
        kept: joints in whose currents the known payload does not show.
        com: (3,) [m] centre of mass of the payload in the frame asked for, as given or as found.
        body: (10,) the payload's parameters in the link's frame as found, not made physically consistent.
        residual: (n,) rms of what is left of each joint's current [A].
    """

    joints: tuple[str, ...]
    gains: np.ndarray
    errors: np.ndarray
    kept: tuple[str, ...]
    com: np.ndarray
    body: np.ndarray
    residual: np.ndarray


def drive_gains(
    unloaded: Sequence[Signals],
    loaded: Sequence[Signals],
    tree: RigidTree,
    mass: float,
    com: np.ndarray | None = None,
    *,
    start_gains: np.ndarray,
    joint: str | None = None,
    frame: str | None = None,
    friction: Friction = RICH,
    seconds: float = 1.0,
    draws: int = 100,
    seed: int = 0,
) -> DriveGains:
    """Return the gains that make the payload weigh what it weighs.

    Args:
        unloaded, loaded: recordings of the bare arm and with the payload, whose efforts are ``start_gains`` times currents.
        tree: the arm's kinematics.
        mass: of the payload [kg].
        com: (3,) [m] its centre of mass in ``frame``, where known; it sharpens the wrist's gains most.
        start_gains: (n,) [N·m/A] what turned currents into efforts; 1 where efforts are currents.
        joint, frame, friction, seconds, draws, seed: as in ``identify_payload``.

    Errors:
        CalibrationError: for gains or a mass that are not positive, a recording without motion or no bare one.
    """
    start = _checked(unloaded, tree, mass, start_gains)
    link, rotation, position = carrier(tree, joint, frame)
    first = None if com is None else rotation @ np.asarray(com) + position
    given = {0: float(mass)} | ({} if first is None else {1 + k: float(mass * value) for k, value in enumerate(first)})
    reference, fit = ReferenceDynamics(tree), None
    for _ in range(3 if "load" in friction.terms else 1):
        family = friction if "load" not in friction.terms or fit is not None else PLAIN
        found = stack(unloaded, loaded, reference, family, link, None if fit is None else fit.x, seconds)
        data, known = grams(found), {found.columns.count + k: value for k, value in given.items()}
        fit = _Fit(data, known).run(None if fit is None else fit.log_ratio)
    spread = _spread(data, known, fit, draws, seed)
    shows = (fit.blindness() < _SHOWS) & (spread < _SHOWS)
    gains, body = start * np.exp(fit.log_ratio), fit.x[-TEN:]
    return DriveGains(
        tree.joints,
        np.where(shows, gains, start),
        np.where(shows, gains * spread, np.inf),
        tuple(name for name, known in zip(tree.joints, shows) if not known),
        decompose(seen_from(body, rotation, position))[1],
        body,
        fit.sd / start,
    )


def _checked(unloaded: Sequence[Signals], tree: RigidTree, mass: float, start_gains: np.ndarray) -> np.ndarray:
    start = np.asarray(start_gains, float)
    if start.shape != (tree.n,) or not (start > 0).all():
        raise CalibrationError(f"expected {tree.n} positive gains, found {start.tolist()}", key="start_gains")
    if not mass > 0:
        raise CalibrationError(f"expected a positive mass, found {mass:g} kg", key="mass")
    if not unloaded:
        raise CalibrationError("no recording of the bare arm", key="unloaded")
    return start


class _Fit:
    """One estimate: ``x`` (p,) parameters in N·m and ``log_ratio`` (n,) of gains over start gains."""

    def __init__(self, data: Grams, given: dict[int, float], share: np.ndarray | None = None) -> None:
        share = np.ones(len(data)) if share is None else share
        self.G, self.g = np.tensordot(share, data.G, 1), np.tensordot(share, data.g, 1)
        self.s, self.count = share @ data.s, share @ data.count
        self.given = given
        self.free = np.setdiff1d(np.arange(self.g.shape[1]), list(given))
        self.x = np.zeros(self.g.shape[1])
        self.x[list(given)] = list(given.values())
        self.log_ratio = np.zeros(len(self.s))
        self.sd = np.sqrt(self.s / self.count)

    def run(self, start: np.ndarray | None, x: np.ndarray | None = None, rounds: int = _ROUNDS) -> _Fit:
        """Iterate from a guess of the gains until they stand still."""
        self.log_ratio = np.zeros(len(self.s)) if start is None else start.copy()
        self.x = self._linear() if x is None else x.copy()
        for _ in range(rounds):
            self.sd = self._residual()
            step = self._step()
            self.x[self.free] += step[: len(self.free)]
            change = np.clip(step[len(self.free) :], -0.5, 0.5)
            self.log_ratio = np.clip(self.log_ratio + change, -3.0, 3.0)
            if np.abs(change).max() < _DONE:
                break
        return self

    def blindness(self) -> np.ndarray:
        """Return (n,) the standard error of each gain's logarithm that noise alone allows, blocks' correlation allowed for."""
        H, _ = self._system()
        k = len(self.free)
        cross = H[k:, :k] @ inverse(H[:k, :k])
        return _INFLATION * np.sqrt(np.diag(np.linalg.inv(H[k:, k:] - cross @ H[:k, k:])))

    def _linear(self) -> np.ndarray:
        """Return the parameters for the gains as they are."""
        weight = np.exp(-2 * self.log_ratio) / self.sd**2
        A, b = np.tensordot(weight, self.G, 1), (weight * np.exp(self.log_ratio)) @ self.g
        x = self.x.copy()
        known = list(self.given)
        x[self.free] = inverse(A[np.ix_(self.free, self.free)]) @ (b - A[:, known] @ x[known])[self.free]
        return x

    def _residual(self) -> np.ndarray:
        ratio = np.exp(self.log_ratio)
        left = self.s - 2 * self.g @ self.x / ratio + np.einsum("p,npq,q->n", self.x, self.G, self.x, optimize=True) / ratio**2
        return np.sqrt(np.maximum(left, 1e-12 * self.s + 1e-300) / self.count)

    def _system(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the Gauss-Newton matrix and right-hand side over free parameters and logarithms of gains."""
        k, n = len(self.free), len(self.s)
        scale = np.exp(-self.log_ratio) / self.sd
        Gx = self.G @ self.x
        H, b = np.zeros((k + n, k + n)), np.zeros(k + n)
        H[:k, :k] = np.tensordot(scale**2, self.G, 1)[np.ix_(self.free, self.free)]
        H[:k, k:] = -(scale[:, None] ** 2 * Gx).T[self.free]
        H[k:, :k] = H[:k, k:].T
        size = scale**2 * (Gx @ self.x)
        H[k:, k:] = np.diag(size + 1 / _VAGUE**2)
        b[:k] = ((scale / self.sd) @ self.g - scale**2 @ Gx)[self.free]
        b[k:] = size - scale / self.sd * (self.g @ self.x) - self.log_ratio / _VAGUE**2
        return H, b

    def _step(self) -> np.ndarray:
        H, b = self._system()
        return inverse(H) @ b


def _spread(data: Grams, given: dict[int, float], fit: _Fit, draws: int, seed: int) -> np.ndarray:
    """Return the relative standard errors (n,) of the gains by drawing whole blocks with replacement."""
    rng, blocks = np.random.default_rng(seed), len(data)
    shares = rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=draws).astype(float)
    found = [_Fit(data, given, share).run(fit.log_ratio, fit.x, rounds=4).log_ratio for share in shares]
    return np.std(found, axis=0)

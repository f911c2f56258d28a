"""What a motion tells about an arm's parameters: log-determinant, condition number, expected standard deviations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.base_parameters import BaseParameters
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.tree import RigidTree

_STEP = 1e-6  # of the regressor's finite differences; in rad, rad/s and rad/s², and the regressor is smooth over all three


@dataclass(frozen=True)
class Quality:
    """How informative a recording is.

    Args:
        logdet: of the information matrix of the scaled base parameters.
        condition: of the noise-weighted regressor with scaled columns.
        sd: (b,) expected standard deviations of the base parameters, in their own units.
    """

    logdet: float
    condition: float
    sd: np.ndarray


class Information:
    """The information matrix of least squares on joint torques with white noise, ``sum_t W' R^-1 W``.

    Columns are scaled to a root mean square of one at random states within the limits: the log-determinant then compares
    trajectories of one robot, and the condition number does not hang on units.

    Args:
        base: the parameters.
        noise: (n,) standard deviation of each joint's torque [N·m].
        span: lower and upper position (2, n) [rad], velocity (n,) [rad/s], acceleration (n,) [rad/s²] of those states.
        smooth: (n,) velocity over which the sign of Coulomb friction is smoothed for gradients [rad/s].
    """

    def __init__(
        self, base: BaseParameters, noise: np.ndarray, span: tuple[np.ndarray, np.ndarray, np.ndarray], smooth: np.ndarray
    ) -> None:
        self.base, self.noise, self.smooth = base, noise, smooth
        tree = base.tree
        self._links = link_parameters(tree).ravel()
        self._own = base.columns[base.columns < 10 * tree.n]  # columns of the links' regressor
        rng = np.random.default_rng(0)
        q = rng.uniform(*span[0], (500, tree.n))
        v, a = (rng.uniform(-top, top, (500, tree.n)) for top in span[1:])
        self.scale = np.ones(base.count)
        self.scale = 1 / np.sqrt((self._weighted(base.regressor(q, v, a)) ** 2).mean(axis=0))

    def quality(self, q: np.ndarray, v: np.ndarray, a: np.ndarray, samples: int) -> Quality:
        """Return the quality of ``samples`` torque samples spread over the motion q, v, a (T, n)."""
        stacked = self._weighted(self.base.regressor(q, v, a))
        size, axes = np.linalg.eigh(stacked.T @ stacked * (samples / len(q)))
        size = np.maximum(size, 1e-15 * size[-1])  # what the motion does not excite at all
        sd = np.sqrt((axes**2 / size).sum(axis=1)) * self.scale
        return Quality(float(np.log(size).sum()), float(np.sqrt(size[-1] / size[0])), sd)

    def value(self, q: np.ndarray, v: np.ndarray, a: np.ndarray, counted: int) -> tuple[float, np.ndarray]:
        """Return the log-determinant over the first ``counted`` samples and all torques (T, n), with smooth friction."""
        links = self.base.reference.regressor(q, v, a)
        sign = np.tanh(v / self.smooth)
        logdet = np.linalg.slogdet(_matrix(self._counted(links, v, a, sign, counted)))[1]
        return float(logdet), links @ self._links + self.base.tree.armature * a + _passive(self.base.tree, q, v, sign)

    def slopes(self, q: np.ndarray, v: np.ndarray, a: np.ndarray, counted: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradients of ``value`` with respect to q, v and a of each sample.

        Returns:
            (3, T, n) of the log-determinant and (3, T, n, n) of the torques: ``[order, t, joint, torque]``.
        """
        n, columns = self.base.tree.n, self.base.columns
        links, sign = self.base.reference.regressor(q, v, a), np.tanh(v / self.smooth)
        stacked = self._counted(links, v, a, sign, counted)
        # d logdet(A' A) = 2 <A (A' A)^-1, dA>, and A is the regressor's columns over noise and times scale.
        pull = 2 * (stacked @ np.linalg.inv(_matrix(stacked))).reshape(counted, n, -1) * self.scale / self.noise[:, None]
        kind = np.zeros((counted, n, columns.max() + 1))
        kind[:, :, columns] = pull
        pull = pull[:, :, : len(self._own)]
        grad, dtau = np.zeros((3, *q.shape)), np.zeros((3, *q.shape, n))
        for order in range(3):
            for j in range(n):
                moved = [x.copy() for x in (q, v, a)]
                moved[order][:, j] += _STEP
                change = (self.base.reference.regressor(*moved) - links) / _STEP
                dtau[order, :, j] = change @ self._links
                grad[order, :counted, j] = np.einsum("tib,tib->t", pull, change[:counted][:, :, self._own])
        self._add_extras(grad, dtau, kind, (1 - sign**2) / self.smooth)
        return grad, dtau

    def _add_extras(self, grad: np.ndarray, dtau: np.ndarray, pull: np.ndarray, bend: np.ndarray) -> None:
        """Add what rotors, friction and springs contribute: each acts on its own joint."""
        tree, counted = self.base.tree, pull.shape[0]
        for i in range(tree.n):
            for block, extra in enumerate(self.base.extras):
                column = (10 + block) * tree.n + i
                if column in self.base.columns:
                    factor = bend[:counted, i] if extra == "coulomb" else 1.0
                    grad[2 if extra == "armature" else 1, :counted, i] += pull[:, i, column] * factor
            dtau[0, :, i, i] += tree.stiffness[i]
            dtau[1, :, i, i] += tree.damping[i] + tree.friction[i] * bend[:, i]
            dtau[2, :, i, i] += tree.armature[i]

    def _counted(self, links: np.ndarray, v: np.ndarray, a: np.ndarray, sign: np.ndarray, counted: int) -> np.ndarray:
        return self._weighted(self.base.extend(links[:counted], v[:counted], a[:counted], sign[:counted]))

    def _weighted(self, regressor: np.ndarray) -> np.ndarray:
        """Return the base columns, over the noise and scaled, as (T n, b)."""
        return (self.base.reduce(regressor) / self.noise[:, None] * self.scale).reshape(-1, self.base.count)


def model_torque(reference: ReferenceDynamics, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return the torques (T, n) [N·m] that move the model along q, v, a (T, n), friction and springs included."""
    return reference.inverse_dynamics(q, v, a) + _passive(reference.tree, q, v, np.sign(v))


def _passive(tree: RigidTree, q: np.ndarray, v: np.ndarray, sign: np.ndarray) -> np.ndarray:
    return tree.damping * v + tree.friction * sign + tree.stiffness * (q - tree.spring_reference)


def _matrix(stacked: np.ndarray) -> np.ndarray:
    """Return the information matrix, with as much added as keeps one that is singular invertible.

    By products and a triangular factorisation alone: on few cores an eigenvalue decomposition this small is a hundred times
    slower, for the threads it starts.
    """
    matrix = stacked.T @ stacked
    return matrix + 1e-14 * np.trace(matrix) * np.eye(len(matrix))

"""Fits a contact from a log of touching: its own stiffness, damping and friction, and the spring and damper beneath it.

The measured states start short windows, which the compiled model rolls out under the log's commands; parameters are searched by
their logarithm, so that they stay positive, with every perturbed set of a Jacobian in one call. Windows overlap in blocks of
time whose residuals count as independent.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import least_squares

from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.contact import PARAMETERS, Contact, mount_of
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import RigidTree
from mbctrl.kernels.native import shared_pool
from mbctrl.kernels.trace import CONTACT, trace_dynamics
from mbctrl.planning.compiled import drive_of
from mbctrl.planning.engines import CpuEngine

MOUNT = ("mount_stiffness", "mount_damping")
_STEP = 1e-3  # of a logarithm, for differences
_ROUNDS = 3  # of weights from residuals
_NEAR = 0.01  # [m] windows that stay further away tell nothing
_BLOCKS = 10


@dataclass(frozen=True)
class ContactFit:
    """What a log says of a contact.

    ``values`` and standard ``errors`` (P,) are in the order of ``names``: CONTACT's, then MOUNT's where the surface rests on a
    spring; [N/m], [N·s/m], [1]. ``contact`` and ``tree`` have the values. ``before`` and ``after`` are the residuals' RMS of
    each position (nq,) [rad] or [m] over ``windows`` windows.
    """

    names: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    contact: Contact
    tree: RigidTree
    before: np.ndarray
    after: np.ndarray
    windows: int

    def __getitem__(self, name: str) -> float:
        """Return a value by name."""
        return float(self.values[self.names.index(name)])


def fit_contact(
    dynamics: RigidBodyDynamics,
    x: np.ndarray,
    u: np.ndarray,
    episode: np.ndarray | None = None,
    *,
    steps: int = 5,
    threads: int = 1,
) -> ContactFit:
    """Return the contact under which the arm moves most like the log.

    Args:
        dynamics: the arm with a contact to start from; its time step is the log's.
        x: (T, nx) states, ``dynamics.dt`` apart.
        u: (T, nu) the command in force from each state to the next.
        episode: (T,) numbers of stretches that windows do not cross; None: one stretch.
        steps: length of a window.
        threads: of the kernel; 0: one a core.

    Errors:
        CalibrationError: for a log without contact, numbers that are not finite, and what the log does not tell, by name.
    """
    twin = _Twin(dynamics, x, u, np.zeros(len(x)) if episode is None else np.asarray(episode), steps, threads)
    first = twin.residuals(twin.start[None])[0]
    sd, z = _rms(first), twin.start
    for _ in range(_ROUNDS):
        found = least_squares(lambda z: twin.scaled(z, sd), z, lambda z: twin.jacobian(z, sd), method="lm", x_scale="jac")
        z, last = found.x, twin.residuals(found.x[None])[0]
        sd = _rms(last)
    covariance = _covariance(twin.jacobian(z, sd).reshape(*last.shape, len(z)), last / sd, twin.block)
    sigma = np.sqrt(np.diag(covariance))
    for name, error in zip(twin.names, sigma):
        if not error < 1.0:
            raise CalibrationError("the log does not tell it: it may be off by a factor of three or more", key=name)
    values, nq = np.exp(z), dynamics.nq
    contact, tree = twin.with_values(values)
    before, after = (np.sqrt((r[..., :nq] ** 2).mean((0, 1))) for r in (first, last))
    return ContactFit(twin.names, values, sigma * values, contact, tree, before, after, len(twin.block))


class _Twin:
    """Rollouts of windows under many parameter sets; ``start`` (P,) are the logarithms to start from, ``block`` (W,)."""

    def __init__(self, dynamics: RigidBodyDynamics, x: np.ndarray, u: np.ndarray, episode: np.ndarray, steps: int, threads: int):
        if dynamics.contact is None:
            raise CalibrationError("expected dynamics with a contact, found none", key="contact")
        if not (np.isfinite(x).all() and np.isfinite(u).all()):
            raise CalibrationError("expected finite states and commands", key="x, u")
        self.dynamics, self._contact = dynamics, dynamics.contact
        self._mount = mount_of(self._contact, dynamics.tree)
        self.names = tuple(CONTACT) + (MOUNT if self._mount else ())
        values = [getattr(self._contact, name) for name in PARAMETERS]
        values += [self._mount.stiffness, self._mount.damping] if self._mount else []
        if min(values) <= 0:
            raise CalibrationError(f"expected positive values to start from, found {values}", key="contact")
        self.start = np.log(values)
        begin = self._windows(x, episode, steps)
        self._x, self._u = x[begin].T, np.stack([u[begin + k].T for k in range(steps)])  # (nx, W), (steps, nu, W)
        self._target = np.stack([x[begin + k + 1] for k in range(steps)])  # (steps, W, nx)
        self.block = (np.arange(len(begin)) * _BLOCKS) // len(begin)
        self._engine = CpuEngine(shared_pool(threads), np.float64)
        inputs = tuple(CONTACT) + (("stiffness", "damping", "spring_reference") if self._mount else ())
        traced = trace_dynamics(dynamics.tree, drive_of(dynamics), inputs, each=True, contact=self._contact)
        self._code = self._engine.compile(traced.program, None)

    def _windows(self, x: np.ndarray, episode: np.ndarray, steps: int) -> np.ndarray:
        """Return the first index of each window that comes near the surface."""
        rows = torch.as_tensor(x[:, : self.dynamics.nq].T, dtype=self.dynamics.dtype)
        poses, contact = self.dynamics.poses(rows), self._contact
        tip = self.dynamics.point(poses, contact.tip.link, contact.tip.position)
        near = (contact.depth(tip, *self.dynamics.frame(poses, contact.surface)) > -_NEAR).cpu().numpy()
        begin = np.arange(len(x) - steps)
        begin = begin[near[begin] & (episode[begin] == episode[begin + steps])]
        if len(begin) < _BLOCKS:
            raise CalibrationError(f"expected a log with contact, found {len(begin)} windows near the surface", key="x")
        return begin

    def with_values(self, values: np.ndarray) -> tuple[Contact, RigidTree]:
        """Return contact and arm with ``values`` (P,)."""
        contact, tree = replace(self._contact, **dict(zip(PARAMETERS, map(float, values)))), self.dynamics.tree
        if self._mount is None:
            return contact, tree
        numbers = [np.array(field, float) for field in (tree.stiffness, tree.damping, tree.spring_reference)]
        for field, value in zip(numbers, (values[3], values[4], self._reference(values[3]))):
            field[self._mount.joint] = value
        return contact, replace(tree, **dict(zip(("stiffness", "damping", "spring_reference"), numbers)))

    def _reference(self, stiffness: float) -> float:
        """Return where a spring of that stiffness must be relaxed for the surface to stand where it does."""
        rest, own = self._mount.rest, float(self.dynamics.tree.spring_reference[self._mount.joint])
        return rest - (rest - own) * self._mount.stiffness / stiffness

    def residuals(self, z: np.ndarray) -> np.ndarray:
        """Return predicted minus measured states (S, steps, W, nx) of parameter sets ``z`` (S, P)."""
        sets, windows = len(z), self._x.shape[1]
        sample = np.repeat(np.stack([self._inputs(np.exp(one)) for one in z], 1), windows, 1)
        states = self._engine.empty(len(self._u) + 1, len(self._x), sets * windows)
        arrays = {"start": np.tile(self._x, sets), "commands": np.tile(self._u, sets), "sample": sample, "states": states}
        arrays = {name: self._engine.array(value) for name, value in arrays.items()}
        arrays["uniform"] = self._engine.array([self.dynamics.dt])
        arrays["states"] = states
        self._engine.run(self._code, arrays, samples=sets * windows, steps=len(self._u), fixed=0, seed=0, draw=0)
        found = states[1:].reshape(len(self._u), len(self._x), sets, windows).transpose(2, 0, 3, 1)
        return found - self._target

    def _inputs(self, values: np.ndarray) -> np.ndarray:
        tree = self.with_values(values)[1]
        more = [tree.stiffness, tree.damping, tree.spring_reference] if self._mount else []
        return np.concatenate([values[:3], *more])

    def scaled(self, z: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """Return the residuals of ``z`` (P,) over their noise, flat."""
        return (self.residuals(z[None])[0] / sd).ravel()

    def jacobian(self, z: np.ndarray, sd: np.ndarray) -> np.ndarray:
        """Return the derivatives (residuals, P), central differences."""
        moved = _STEP * np.eye(len(z))
        found = self.residuals(np.concatenate((z + moved, z - moved))) / sd
        return ((found[: len(z)] - found[len(z) :]) / (2 * _STEP)).reshape(len(z), -1).T


def _rms(residuals: np.ndarray) -> np.ndarray:
    """Return the noise of each step and state, (steps, 1, nx)."""
    return np.sqrt((residuals**2).mean(1, keepdims=True)) + 1e-9


def _covariance(jacobian: np.ndarray, residuals: np.ndarray, block: np.ndarray) -> np.ndarray:
    """Return the covariance (P, P) of the logarithms: the larger of independent residuals' and of independent blocks'.

    ``jacobian`` (steps, W, nx, P) and ``residuals`` (steps, W, nx) are over their noise.
    """
    information = np.einsum("swip,swiq->pq", jacobian, jacobian)
    bread = np.linalg.pinv(information, hermitian=True)
    slopes = np.einsum("swip,swi->wp", jacobian, residuals)
    blocks = np.stack([slopes[block == b].sum(0) for b in range(_BLOCKS)])
    robust = bread @ (blocks.T @ blocks) @ bread * (_BLOCKS / (_BLOCKS - 1))
    wider = np.sqrt(np.maximum(np.diag(bread), np.diag(robust)) / np.diag(bread))
    return bread * np.outer(wider, wider)

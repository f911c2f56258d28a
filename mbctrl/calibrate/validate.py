"""How far to trust a calibrated arm: torques it predicts for other logs, and motions it predicts in open loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mbctrl.calibrate.identify import Fit
from mbctrl.calibrate.regression import Motion
from mbctrl.calibrate.signals import Signals
from mbctrl.dynamics.reference import link_parameters
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import RigidTree
from mbctrl.kernels.native import shared_pool
from mbctrl.planning.compiled import kernel_dynamics
from mbctrl.planning.engines import CpuEngine

HORIZONS = (0.1, 0.53, 1.0)
"""[s] of open-loop prediction."""
_STEP, _EVERY = 0.002, 40  # [s]; samples between the starts of two windows
_WHITE = 0.2  # autocorrelation below which residuals count as independent


@dataclass(frozen=True)
class Torques:
    """Measured and predicted torques of one recording.

    Args:
        file: the recording.
        t: (T,) [s].
        measured, filtered, predicted: (T, n) [N·m].
        moving: (T,) the samples errors are taken over, where the joint in question slides.
        rms: (n,) residual [N·m] against what was measured, unfiltered.
        relative: (n,) residual over torque [1], unfiltered; the lower ``floor`` is what filtering alone leaves.
        whiteness: (n,) [s] beyond which the residual's autocorrelation stays below 0.2 (two seconds are looked at); the
            sampling period where it is white.
    """

    file: str
    t: np.ndarray
    measured: np.ndarray
    filtered: np.ndarray
    predicted: np.ndarray
    moving: np.ndarray
    rms: np.ndarray
    relative: np.ndarray
    floor: np.ndarray
    whiteness: np.ndarray


def torques(motion: Motion, predicted: np.ndarray, still: bool = False) -> Torques:
    """Return how well torques (T, n) [N·m] explain a recording while its joints move; ``still``: standstill counts too.

    A joint that never moves is judged while the others do.
    """
    one = motion.one
    counts = np.ones_like(one.sliding) if still else one.sliding | (one.moving[:, None] & ~one.sliding.any(0))
    left, torque, noise = (x * counts for x in (one.measured - predicted, one.measured, one.measured - one.effort))
    size = np.linalg.norm(torque, axis=0)
    moving = counts.any(1)
    return Torques(
        one.file,
        one.t,
        one.measured,
        one.effort,
        predicted,
        moving,
        np.sqrt((left**2).sum(0) / counts.sum(0)),
        np.linalg.norm(left, axis=0) / size,
        np.linalg.norm(noise, axis=0) / size,
        _memory((one.effort - predicted)[moving], one.rate),
    )


def _memory(left: np.ndarray, rate: float) -> np.ndarray:
    """Return for each column the last lag [s], of two seconds at most, at which its autocorrelation is not small yet."""
    left = left - left.mean(0)
    size = 2 ** int(np.ceil(np.log2(2 * len(left))))
    power = np.abs(np.fft.rfft(left, size, axis=0)) ** 2
    correlation = np.fft.irfft(power, size, axis=0)[: int(min(2.0 * rate, len(left) - 1)) + 1]
    large = np.abs(correlation) >= _WHITE * np.maximum(correlation[:1], 1e-30)
    return (len(large) - 1 - large[::-1].argmax(0) + 1) / rate


@dataclass(frozen=True)
class OpenLoop:
    """Free-running prediction: the measured torques go in, nothing else after the start.

    ``horizons`` (K,) [s]; ``error`` (K, n) rms position error [rad] at their ends over ``windows`` starts; ``total`` (K,) over all
    joints; ``still`` (K,) of the prediction that every joint keeps its speed.
    """

    horizons: tuple[float, ...]
    error: np.ndarray
    total: np.ndarray
    still: np.ndarray
    windows: int


def open_loop(
    one: Signals, tree: RigidTree, offset: np.ndarray | None = None, horizons: Sequence[float] = HORIZONS, every: int = _EVERY
) -> OpenLoop | None:
    """Return open-loop errors of an arm over windows that start every so many samples; None where no window fits.

    The arm is ``tree`` as a planner's model has it, Coulomb friction and all, in steps of 2 ms; ``offset`` (n,) [N·m] is taken
    off the torques.
    """
    steps = [max(1, round(horizon / _STEP)) for horizon in horizons]
    reach = int(np.ceil(max(horizons) * one.rate)) + 2
    starts = np.array([k for a, b in one.parts for k in range(a, b - reach, every) if one.moving[k : k + reach].all()], int)
    if not len(starts):
        return None
    torque = one.effort - (0.0 if offset is None else offset)
    t = one.t[starts][:, None] + (np.arange(max(steps)) + 0.5) * _STEP
    joints = range(tree.n)
    u = np.stack([np.interp(t, one.t, torque[:, j]) for j in joints], 1)  # (windows, n, H)
    x = np.concatenate([one.q[starts], one.v[starts]], 1).T
    arm = RigidBodyDynamics(tree, _STEP, dtype=torch.float64)
    states = kernel_dynamics(arm, CpuEngine(shared_pool(0), np.float64)).rollout(x, u.transpose(2, 1, 0))
    error, still = [], []
    for count in steps:
        end = one.t[starts] + count * _STEP
        measured = np.stack([np.interp(end, one.t, one.q[:, j]) for j in joints])
        error.append(np.sqrt(((states[count, : tree.n] - measured) ** 2).mean(1)))
        coasted = x[: tree.n] + x[tree.n :] * count * _STEP
        still.append(np.sqrt(((coasted - measured) ** 2).mean()))
    rms = np.stack(error)
    return OpenLoop(tuple(horizons), rms, np.sqrt((rms**2).mean(1)), np.array(still), len(starts))


@dataclass(frozen=True)
class Validation:
    """A recording seen by the model file's arm, by unconstrained least squares and by the fit."""

    prior: Torques
    unconstrained: Torques
    fit: Torques
    before: OpenLoop | None
    after: OpenLoop | None
    extrapolation: float


def validate_on(fit: Fit, motion: Motion, trained: Sequence[Motion], still: bool = False) -> Validation:
    """Return what a recording says of a fit.

    ``extrapolation`` is how much larger the fit's leverage is here than on the training logs: 1 for motions of the same
    kind; at 5 and more the recording moves in ways the training logs hardly did, and its errors say little of the model.
    """
    one = motion.one
    W = motion.equations(motion.terms(fit.friction, fit.x[fit.columns.inertial]))
    prior = motion.inertial @ link_parameters(fit.prior).ravel() + one.a * fit.prior.armature
    prior = one.smooth(prior + fit.prior.damping * one.v + fit.prior.friction * np.tanh(one.v / 0.01))
    return Validation(
        torques(motion, prior, still),
        torques(motion, W @ fit.unconstrained, still),
        torques(motion, W @ fit.x, still),
        open_loop(one, fit.prior),
        open_loop(one, fit.tree, fit.offset),
        _extrapolation(motion.rigid[:, :, fit.base], [other.rigid[:, :, fit.base] for other in trained]),
    )


def _extrapolation(W: np.ndarray, trained: Sequence[np.ndarray]) -> float:
    seen = sum(np.einsum("tnp,tnq->pq", one, one, optimize=True) for one in trained)
    count = sum(len(one) for one in trained)
    here = np.einsum("tnp,tnq->pq", W, W, optimize=True)
    return float(np.trace(np.linalg.pinv(seen, rcond=1e-12, hermitian=True) @ here) / len(W) / (W.shape[2] / count))

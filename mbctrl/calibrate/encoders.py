"""Where encoders have their zeros: offsets of the measured from the true joint positions, beside everything else.

Torques change with an offset as with the position itself, so a linear column a joint, the slope of the fitted arm's torque
along that joint's position, tells its offset; a few rounds about the corrected positions make up for the linearisation. Links'
parameters turn with the frames they are in: only what their free choice cannot imitate is left for an offset, and the
standard errors say how much that is. A first joint about the vertical has no offset that any torque could show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.regression import Columns, Grams, Motion, bootstrap, grams, stacked, weighted
from mbctrl.dynamics.reference import ReferenceDynamics

_ROUNDS, _DONE, _STEP = 40, 1e-6, 1e-5  # , [rad], [rad]
_VAST = 0.01  # [rad], a standard error above this is knowing nothing
_SILENT = 1e-6  # a column this small beside the largest says nothing


@dataclass(frozen=True)
class EncoderOffsets:
    """Offsets (n,) [rad] of measured from true positions, their standard errors, NaN where no torque shows them."""

    joints: tuple[str, ...]
    value: np.ndarray
    se: np.ndarray


def encoder_offsets(
    motions: Sequence[Motion],
    reference: ReferenceDynamics,
    friction: Friction,
    base: np.ndarray,
    *,
    seconds: float = 1.0,
    draws: int = 100,
    seed: int = 0,
) -> EncoderOffsets:
    """Return the offsets that recordings show.

    Args:
        motions: the recordings.
        reference: the arm's kinematics.
        friction: the family.
        base: indices of the independent parameters of links and rotors.
        seconds, draws, seed: of the bootstrap.
    """
    n = reference.tree.n
    shift, known = np.zeros(n), np.ones(n, bool)
    for _ in range(_ROUNDS):
        moved = [Motion(replace(motion.one, q=motion.one.q - shift), reference) for motion in motions]
        data, columns = _augmented(moved, reference, friction, base, seconds)
        size = np.sqrt(np.einsum("bnpp->p", data.G))[-n:]
        known &= size > _SILENT * size.max()
        joints = np.flatnonzero(known)
        kept = np.concatenate([columns, data.G.shape[2] - n + joints])
        one = data.only(kept)
        x, sd = weighted(one)
        se = np.sqrt(np.diag(bootstrap(one, sd, draws, seed)))[-len(joints) :]
        if (se > _VAST).any():
            known[joints[se > _VAST]], shift = False, np.zeros(n)
            continue
        # A column is the torque's slope along the true position, which lies that much below the measured one.
        step = x[-len(joints) :]
        shift[joints] -= step
        if np.abs(step).max(initial=0.0) < _DONE:
            break
    errors = np.full(n, np.nan)
    errors[joints] = se
    return EncoderOffsets(reference.tree.joints, np.where(known, shift, np.nan), np.where(known, errors, np.nan))


def _augmented(
    motions: Sequence[Motion], reference: ReferenceDynamics, friction: Friction, base: np.ndarray, seconds: float
) -> tuple[Grams, np.ndarray]:
    """Return Gram matrices with a column a joint behind the others, and the columns of links, rotors and friction to fit."""
    n = reference.tree.n
    W = [motion.equations(motion.terms(friction, None)) for motion in motions]
    columns = Columns(n, friction)
    fitted = np.concatenate([base, np.arange(11 * n, columns.count)])
    plain = grams(stacked(motions, W, columns, seconds))
    links = np.zeros(columns.count)
    links[fitted] = weighted(plain.only(fitted))[0]
    wider = [np.concatenate([w, _slopes(motion, reference, links[: 10 * n])], 2) for w, motion in zip(W, motions)]
    return grams(stacked(motions, wider, columns, seconds)), fitted


def _slopes(motion: Motion, reference: ReferenceDynamics, links: np.ndarray) -> np.ndarray:
    """Return (T, n, n): slopes of the torques along each joint's position, through the effort's filter."""
    one = motion.one
    out = []
    for step in np.diag(np.full(one.q.shape[1], _STEP)):
        ahead, behind = (reference.regressor(one.q + sign * step, one.v, one.a) @ links for sign in (1, -1))
        out.append((ahead - behind) / (2 * _STEP))
    return one.smooth(np.stack(out, 2))

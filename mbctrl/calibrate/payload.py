"""What an arm carries: mass, centre of mass and inertia of a body welded to a link, with standard errors.

Torques are linear in the body's ten parameters, whose columns are those of the link that carries it (Atkeson, An and
Hollerbach, "Estimation of inertial parameters of manipulator loads and links", 1986). With a log of the bare arm beside the
loaded one, links, rotors and friction are fitted to both at once: what is not known of the arm is in the payload's standard
errors, and what the model lacks is in both logs and mostly cancels. Torques must be torques: a drive gain that is 10 % off
is a mass that is 10 % off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.body import carrier, seen_from
from mbctrl.calibrate.feasible import descend
from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.regression import Columns, Grams, Regression, bootstrap, grams, weighted
from mbctrl.calibrate.signals import CalibrationError, Signals
from mbctrl.calibrate.stacked import TEN, blind, reduced, stack, summed
from mbctrl.dynamics.body import compose, decompose, weld
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.tree import RigidTree

RICH = Friction(("coulomb", "viscous", "offset", "root", "stribeck", "load"), "dahl")
"""The widest family: a friction that is too simple moves the error into the payload, one too many coefficients do not."""
PLAIN = Friction()
_GYRATION = 0.05  # [m], of the prior; its weight is next to nothing
_FARTHEST = 0.5  # [m], of the prior's centre of mass
_WEIGHT = 1e-5  # of the prior, per sample in units of its noise
_COM_KNOWN = 0.05  # [m], a standard error above this is not knowing where the centre of mass is
_ENTRIES = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2), (2, 2))


@dataclass(frozen=True)
class Payload:
    """A body, in the axes of ``frame`` (the carrying link's own frame where it is empty).

    Args:
        joint: the joint that moves the link which carries it.
        frame: name of the frame, or "".
        mass: [kg].
        com: (3,) [m] centre of mass from the frame's origin.
        inertia: (3, 3) [kg·m²] about the centre of mass; entries named in ``unknown`` are the prior's.
        mass_error, com_error, inertia_error: their standard errors, (), (3,), (3, 3), by a bootstrap over blocks of time.
        unknown: what the logs do not decide, as ``mass``, ``com x``, ``inertia xy``.
        body: (10,) the parameters in the link's frame.
        covariance: (10, 10) of ``body``.
        residual: (n,) rms of what is left of each joint's torque [N·m].
        arm: (p,) the arm's parameters in the order of ``Columns``, least norm where logs do not decide; as given, if given.
    """

    joint: str
    frame: str
    mass: float
    com: np.ndarray
    inertia: np.ndarray
    mass_error: float
    com_error: np.ndarray
    inertia_error: np.ndarray
    unknown: tuple[str, ...]
    body: np.ndarray
    covariance: np.ndarray
    residual: np.ndarray
    arm: np.ndarray

    def tree(self, tree: RigidTree) -> RigidTree:
        """Return the bare arm's tree with the payload welded on."""
        return weld(tree, tree.joints.index(self.joint), self.body)


def identify_payload(
    unloaded: Sequence[Signals],
    loaded: Sequence[Signals],
    tree: RigidTree,
    *,
    joint: str | None = None,
    frame: str | None = None,
    friction: Friction = RICH,
    seconds: float = 1.0,
    draws: int = 100,
    seed: int = 0,
) -> Payload:
    """Return the payload that tells ``loaded`` recordings from ``unloaded`` ones; motions may be the same or different.

    Args:
        unloaded: of the bare arm.
        loaded: of the arm with one and the same payload.
        tree: the arm's kinematics; its inertias do not matter.
        joint: moves the link that carries; None: that of ``frame``, or the last.
        frame: of ``tree.frames``, what the result is described in; None: the link's own.
        friction: family, the same coefficients in both.
        seconds: length of the blocks that are drawn.
        draws: of the bootstrap.
        seed: of the draws.

    Errors:
        CalibrationError: for logs without motion, or a payload whose mass is less than nothing.
    """
    link, rotation, position = carrier(tree, joint, frame)
    if not unloaded:
        raise CalibrationError("no recording of the bare arm; give its parameters instead", key="unloaded")
    reference, arm = ReferenceDynamics(tree), None
    for _ in range(3 if "load" in friction.terms else 1):
        family = friction if "load" not in friction.terms or arm is not None else PLAIN
        found = stack(unloaded, loaded, reference, family, link, arm, seconds)
        arm, sd = weighted(data := grams(found))
    own = slice(found.columns.count, found.columns.count + TEN)
    fit, covariance = _consistent(summed(data, sd), own, arm[own], draws, seed, loaded)
    return _described(tree, link, frame, (rotation, position), fit, covariance, sd, arm[: own.start])


def payload_on(
    loaded: Sequence[Signals],
    tree: RigidTree,
    known: np.ndarray | None = None,
    *,
    joint: str | None = None,
    frame: str | None = None,
    friction: Friction = PLAIN,
    seconds: float = 1.0,
    draws: int = 100,
    seed: int = 0,
) -> Payload:
    """Return the payload of recordings of an arm whose parameters are known, without a recording of the bare arm.

    Args:
        loaded: of the arm with the payload.
        tree: the arm as fitted.
        known: (p,) its parameters in the order of ``Columns(n, friction)``; None: the tree's, which needs the plain family.
        joint, frame, friction, seconds, draws, seed: as in ``identify_payload``; standard errors take the arm as exact.

    Errors:
        CalibrationError: as there, and for parameters of another number than the family has.
    """
    link, rotation, position = carrier(tree, joint, frame)
    known = arm_parameters(tree, friction) if known is None else known
    columns = Columns(tree.n, friction)
    if known.shape != (columns.count,):
        raise CalibrationError(f"expected {columns.count} parameters of the arm, found {known.shape}", key="known")
    reference, body = ReferenceDynamics(tree), np.zeros(TEN)
    for _ in range(3 if "load" in friction.terms else 1):
        both = stack((), loaded, reference, friction, link, np.concatenate([known, body]), seconds)
        left = both.tau - both.W[:, :, : columns.count] @ known
        data = grams(Regression(columns, both.W[:, :, columns.count :], left, both.keep, both.block))
        body, sd = weighted(data)
    fit, covariance = _consistent(summed(data, sd), slice(0, TEN), body, draws, seed, loaded)
    return _described(tree, link, frame, (rotation, position), fit, covariance, sd, known)


def arm_parameters(tree: RigidTree, friction: Friction = PLAIN) -> np.ndarray:
    """Return a tree's parameters (p,) in the order of ``Columns``: links, rotors, Coulomb and viscous friction, no other."""
    own = np.zeros((tree.n, len(friction.terms)))
    for name, values in (("coulomb", tree.friction), ("viscous", tree.damping)):
        if name in friction.terms:
            own[:, friction.terms.index(name)] = values
    return np.concatenate([link_parameters(tree).ravel(), tree.armature, own.ravel()])


def _consistent(
    data: Grams, own: slice, free: np.ndarray, draws: int, seed: int, loaded: Sequence[Signals]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the ten parameters of the best body that could exist, the prior deciding what logs do not, and their covariance."""
    left = reduced(data, own)
    covariance = bootstrap(data, np.ones(1), draws, seed)[own, own]
    covariance = covariance + blind(left.G[0, 0], np.diag(data.G.sum((0, 1)))[own])
    mass, error = float(free[0]), float(np.sqrt(covariance[0, 0]))
    if mass < -4 * error:
        raise CalibrationError(
            f"the payload would weigh {mass:.3g} kg: are the loaded and the bare log swapped?", file=loaded[0].file or None
        )
    mass = max(mass, 1e-3)
    com = np.clip(free[1:4] / mass, -_FARTHEST, _FARTHEST)
    prior = compose(mass, com, mass * _GYRATION**2 * np.eye(3))
    return descend(left, Columns(1, PLAIN), np.ones(1), prior[None], weight=_WEIGHT)[:TEN], covariance


def _described(
    tree: RigidTree,
    link: int,
    frame: str | None,
    place: tuple[np.ndarray, np.ndarray],
    body: np.ndarray,
    covariance: np.ndarray,
    sd: np.ndarray,
    arm: np.ndarray,
) -> Payload:
    """Return the result in its frame, errors carried over to first order."""

    def flat(ten: np.ndarray) -> np.ndarray:
        mass, com, inertia = decompose(seen_from(ten, *place))
        return np.array([mass, *com, *(inertia[entry] for entry in _ENTRIES)])

    value, step = flat(body), 1e-6 * np.maximum(np.abs(body), 1e-3)
    slope = np.stack([(flat(body + h) - flat(body - h)) / (2 * h.sum()) for h in np.diag(step)], 1)
    error = np.sqrt(np.diag(slope @ covariance @ slope.T))
    inertia, spread = np.zeros((3, 3)), np.zeros((3, 3))
    for k, (i, j) in enumerate(_ENTRIES):
        inertia[i, j] = inertia[j, i] = value[4 + k]
        spread[i, j] = spread[j, i] = error[4 + k]
    return Payload(
        tree.joints[link],
        frame or "",
        float(value[0]),
        value[1:4],
        inertia,
        float(error[0]),
        error[1:4],
        spread,
        _unknown(value, error, inertia),
        body,
        covariance,
        sd,
        arm,
    )


def _unknown(value: np.ndarray, error: np.ndarray, inertia: np.ndarray) -> tuple[str, ...]:
    names = ["mass"] if 2 * error[0] > value[0] else []
    names += [f"com {axis}" for axis, e in zip("xyz", error[1:4]) if e > _COM_KNOWN]
    for (i, j), e in zip(_ENTRIES, error[4:]):
        if 2 * e > np.sqrt(inertia[i, i] * inertia[j, j]):
            names.append(f"inertia {'xyz'[i]}{'xyz'[j]}")
    return tuple(names)

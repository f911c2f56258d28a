"""An arm's time step over scalars: the same mathematics as ``mbctrl.dynamics.rigid_body``, actuation and friction included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mbctrl.dynamics.contact import Contact
from mbctrl.kernels.graph import maximum, minimum, where
from mbctrl.kernels.rigid_body import Array, Motion, TracedArm
from mbctrl.kernels.touch import TracedTouch

# tanh(z) / z as a ratio of polynomials in z², a least-squares fit with weights driven to equal extremes on |z| <= 8:
# largest relative error 7e-9 there, 3e-7 in float32; beyond, 1 / z is as near.
_TANHC_END = 8.0
_TANHC_OVER = (0.99999999364, 0.134443991919, 0.00357147778998, 2.18925330395e-05, 1.52270831628e-08)
_TANHC_UNDER = (1.0, 0.467777265315, 0.0261639933539, 0.000341108942228, 8.5211697633e-07)


@dataclass(frozen=True)
class Drive:
    """How an arm is actuated and stepped.

    Args:
        commanded: for each command the index of its joint.
        stiffness, damping: gains of a joint impedance, one a command [N·m/rad], [N·m·s/rad]; None: commands are torques.
            They may be Scalars (parameters that change at run time).
        effort_limit: bounds of the total actuator torque [N·m]; None: unbounded.
        gravity_compensation: the arm adds its own gravity torque.
        integrator: ``euler`` or ``leapfrog``.
        friction_speed: speed over which Coulomb friction changes sign [rad/s].
    """

    commanded: Sequence[int]
    stiffness: Sequence[Any] | None
    damping: Sequence[Any] | None
    effort_limit: Sequence[float] | None
    gravity_compensation: bool
    integrator: str
    friction_speed: float


class Stepped(NamedTuple):
    """A step: ``q``, ``v`` and ``acceleration`` (n,) after it, and as ``mbctrl.dynamics.rigid_body.Moved`` the ``matrix`` (n, n) an
    impulse on the joints is divided by in it, and the ``turns`` of the arm where forces were taken."""

    q: Array
    v: Array
    acceleration: Array
    matrix: Array
    turns: tuple[list[Array], list[Array]]


class TracedStep:
    """Steps states of Scalars.

    Args:
        arm, drive: what moves and how.
        h: time step [s], a number or a Scalar.
        contact: what may touch; None: nothing does.
    """

    def __init__(self, arm: TracedArm, drive: Drive, h: Any, contact: Contact | None = None) -> None:
        self.arm, self.drive, self.h, self.contact = arm, drive, h, contact
        self.reference = np.asarray(arm.tree.reference, float).tolist()

    def angles(self, q: Array) -> tuple[Array, Array, Array]:
        """Return joint values from their reference, and sine and cosine of the revolute ones (0 and 1 of others), (n,)."""
        angle = np.array([value - r for value, r in zip(q, self.reference)], dtype=object)
        turning = self.arm.tree.revolute
        sine = np.array([a.sin() if turns else 0.0 for a, turns in zip(angle, turning)], dtype=object)
        cosine = np.array([a.cos() if turns else 1.0 for a, turns in zip(angle, turning)], dtype=object)
        return angle, sine, cosine

    def __call__(self, q: Array, v: Array, u: Array, where_q: tuple[Array, Array, Array]) -> Stepped:
        """Return the step.

        ``where_q`` are the angles of ``q`` (euler) or of q + h v / 2 (leapfrog).
        """
        tree, h, middle = self.arm.tree, self.h, self.middle(q, v)
        turns = self.arm.turns(*where_q)
        motion = self.arm.motion(*turns, v, *where_q[1:])
        load = -motion.bias - motion.gravity - tree.damping * v
        for i in range(tree.n):
            if _present(tree.stiffness[i]):
                load[i] = load[i] - tree.stiffness[i] * (middle[i] - tree.spring_reference[i])
        drag = np.diagonal(motion.mass_matrix) + h * tree.damping
        load, drag = self._actuated(q, v, u, motion, load, drag)
        touch, felt = None, load
        if self.contact is not None and self.contact.pushes:
            touch = TracedTouch(self.arm, self.contact, turns, h, self.lead)
            felt = load + touch.pushed(v, load, drag)
        for i in range(tree.n):
            if _present(tree.friction[i]):
                rate = self._friction_rate(tree.friction[i], v[i], felt[i], drag[i])
                load[i], drag[i] = load[i] - rate * v[i], drag[i] + h * rate
        matrix = motion.mass_matrix.copy()
        np.fill_diagonal(matrix, drag)
        acceleration = self.arm.solve(matrix, load) if touch is None else touch.solve(matrix, load, v)
        after = v + h * acceleration
        q = middle + (0.5 * h) * after if self.drive.integrator == "leapfrog" else q + h * after
        return Stepped(q, after, acceleration, matrix, turns)

    @property
    def lead(self) -> Any:
        """How long before a step's end its forces are taken, and how long its new speed moves q [s]."""
        return 0.5 * self.h if self.drive.integrator == "leapfrog" else self.h

    def middle(self, q: Array, v: Array) -> Array:
        """Return where the dynamics are taken."""
        return q + (0.5 * self.h) * v if self.drive.integrator == "leapfrog" else q

    def _actuated(self, q: Array, v: Array, u: Array, motion: Motion, load: Array, drag: Array) -> tuple[Array, Array]:
        """Return load and diagonal with the actuators' torque, within its limits, and their implicit part."""
        drive, h = self.drive, self.h
        load, drag = load.copy(), drag.copy()
        for k, i in enumerate(drive.commanded):
            own = motion.known[i] if drive.gravity_compensation else 0.0
            bound = None if drive.effort_limit is None else float(drive.effort_limit[k])
            if drive.stiffness is None or drive.damping is None:
                total = u[k] + own
                load[i] = load[i] + (total if bound is None else minimum(bound, maximum(-bound, total)))
                continue
            stiffness, damping = _plain(drive.stiffness[k]), _plain(drive.damping[k])
            total = stiffness * (u[k] - q[i] - h * v[i]) - damping * v[i] + own
            servo = h * (damping + h * stiffness)
            if bound is not None:
                # The torque at the step's end is (total drag - servo load) / (drag + servo); compared without dividing.
                end = total * drag[i] - servo * load[i]
                beyond = (drag[i] + servo) * bound < abs(end)
                total = where(beyond, where(end > 0.0, bound, -bound), total)
                servo = where(beyond, 0.0, servo)
            load[i], drag[i] = load[i] + total, drag[i] + servo
        return load, drag

    def _friction_rate(self, friction: Any, v: Any, load: Any, drag: Any) -> Any:
        """Return Coulomb friction over speed at the speed the joint is about to have, as the torch dynamics take it."""
        h, speed = self.h, self.drive.friction_speed
        free, taken = abs(v * drag + h * load), h * friction  # both times drag
        slides = free - taken
        sticks = drag + taken * (1.0 / speed)
        first = free * drag < slides * sticks  # which of slides / drag and free / sticks is the larger
        z = where(first, slides, free) / (where(first, drag, sticks) * speed)
        square = z * z
        far = z > _TANHC_END
        over, under = _polynomial(square, _TANHC_OVER), _polynomial(square, _TANHC_UNDER)
        return (friction * (1.0 / speed)) * (where(far, 1.0, over) / where(far, z, under))


def _polynomial(x: Any, coefficients: Sequence[float]) -> Any:
    total: Any = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = total * x + c
    return total


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, (int, np.generic)) else value


def _present(value: Any) -> bool:
    return not isinstance(value, (float, np.floating)) or value != 0.0

"""The built-in cost terms.

Every term is dimensionless before its ``weight``, which is cost per second; ``terminal`` adds that many seconds' worth
of the same cost at the end of the horizon. A user's own term is any subclass of ``Term``, named in YAML as
``kind: "package.module:Name"``.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar

from pydantic import Field

from mbctrl.base.robot import Positive, Vector
from mbctrl.base.spec import Number, Spec
from mbctrl.tasks.algebra import absolute, clip01, cos, dot, exp, positive, pseudo_huber
from mbctrl.tasks.features import Features, RobotScales

NonNegative = Annotated[Number, Field(ge=0)]


class Term(Spec):
    """A named cost: ``weight`` [1/s] and ``terminal`` [s]."""

    weight: NonNegative
    terminal: NonNegative = 0.0
    needs: ClassVar[str | None] = None  # the feature without which the term means nothing

    @abstractmethod
    def cost(self, f: Features, robot: RobotScales) -> Any:
        """Return the cost rate of one step, dimensionless, a row of samples."""


def _position_error(f: Features, p: Any, scale: float, axes: tuple[float, float, float] | None = None) -> Any:
    error = [p[i] - f.p_world_target[i] for i in range(3)]
    if axes is None:
        return dot(error, error) * (1.0 / scale**2)
    return sum(axis * (error[i] * error[i]) for i, axis in enumerate(axes) if axis) * (1.0 / scale**2)


def _rotation_error(f: Features, r: Any, scale: float) -> Any:
    """Return the squared rotation error over ``scale`` squared; 2 (1 - cos angle), the angle squared near zero."""
    trace = 0.0
    for i in range(3):
        for j in range(3):
            trace = trace + r[i][j] * f.R_world_target[i][j]
    return positive(3.0 - trace) * (1.0 / scale**2)


class Reach(Term):
    """Tool pose at the target, robust far away: pseudo-Huber of the distance over its scale, and of the angle."""

    needs: ClassVar[str | None] = "p_world_target"
    position_scale: Positive = 0.05  # [m]
    rotation_scale: Positive = 0.2  # [rad]
    rotation_weight: NonNegative = 1.0

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = pseudo_huber(_position_error(f, f.p_world_tcp, self.position_scale))
        if f.R_world_target is None or self.rotation_weight == 0:
            return total
        return total + self.rotation_weight * pseudo_huber(_rotation_error(f, f.R_world_tcp, self.rotation_scale))


class Proximity(Term):
    """Tool position near the target: 1 - exp(-squared distance over ``scale`` squared), which hardly changes far away.

    Source: Chua et al., "Deep reinforcement learning in a handful of trials using probabilistic dynamics models" (2018), whose
    reward is what is left of 1.
    """

    needs: ClassVar[str | None] = "p_world_target"
    scale: Positive = 0.1  # [m]

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return 1.0 - exp(-_position_error(f, f.p_world_tcp, self.scale))


class Track(Term):
    """Tool pose on a moving reference: squared distance and angle, each over its scale.

    ``axis_weights`` count the error along the world's x, y and z; null: all alike.
    """

    needs: ClassVar[str | None] = "p_world_target"
    position_scale: Positive = 0.01  # [m]
    rotation_scale: Positive = 0.1  # [rad]
    rotation_weight: NonNegative = 1.0
    axis_weights: tuple[NonNegative, NonNegative, NonNegative] | None = None

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = _position_error(f, f.p_world_tcp, self.position_scale, self.axis_weights)
        if f.R_world_target is None or self.rotation_weight == 0:
            return total
        return total + self.rotation_weight * _rotation_error(f, f.R_world_tcp, self.rotation_scale)


class Posture(Term):
    """Joints near a configuration: the goal's, the one given here, or home. ``wrap`` counts angles modulo a turn."""

    reference: Vector | None = None  # [rad]
    scale: Positive = 1.0  # [rad]
    wrap: bool = False
    joint_weights: tuple[NonNegative, ...] | None = None

    def cost(self, f: Features, robot: RobotScales) -> Any:
        reference = f.q_target if self.reference is None and f.q_target is not None else self.reference or robot.home
        total = 0.0
        for i, weight in enumerate(self.joint_weights or (1.0,) * len(robot.home)):
            if weight:
                error = f.q[i] - reference[i]
                square = 2.0 * (1.0 - cos(error)) if self.wrap else error * error
                total = total + (weight / self.scale**2) * square
        return total


class Velocity(Term):
    """Joint speeds over their limits, squared and summed; ``scale`` [rad/s] replaces the limits."""

    scale: Positive | None = None
    joint_weights: tuple[NonNegative, ...] | None = None

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for i, weight in enumerate(self.joint_weights or (1.0,) * len(robot.velocity)):
            if weight:
                total = total + (weight / (self.scale or robot.velocity[i]) ** 2) * (f.v[i] * f.v[i])
        return total


class Effort(Term):
    """Commanded joint torques over their limits, squared and summed."""

    def cost(self, f: Features, robot: RobotScales) -> Any:
        return sum((1.0 / limit**2) * (f.effort[i] * f.effort[i]) for i, limit in enumerate(robot.effort))


class Smoothness(Term):
    """Change of the command from step to step over ``scale`` ([rad] or [N·m]), squared and summed."""

    scale: Positive

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for i in range(len(f.u)):
            change = f.u[i] - f.u_before[i]
            total = total + change * change
        return total * (1.0 / self.scale**2)


class JointLimits(Term):
    """Barrier inside each joint's range: zero outside ``margin`` [rad], [m] of a limit, 1 at it, growing as the square.

    The margin is a tenth of a joint's range at most, so that it does not reach the middle of a short slide.
    """

    margin: Positive = 0.1

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for i, (low, high) in enumerate(zip(robot.position_lower, robot.position_upper)):
            margin = min(self.margin, 0.1 * (high - low))
            over = positive(f.q[i] - (high - margin)) + positive(low + margin - f.q[i])
            total = total + over * over * (1.0 / margin**2)
        return total


class VelocityLimits(Term):
    """Barrier at the joints' speed limits: zero below ``1 - margin`` of a limit, 1 at it, growing as the square."""

    margin: Annotated[Number, Field(gt=0, lt=1)] = 0.2

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for i, limit in enumerate(robot.velocity):
            over = positive(absolute(f.v[i] * (1.0 / limit)) - (1 - self.margin))
            total = total + over * over
        return total * (1.0 / self.margin**2)


class AccelerationLimits(Term):
    """Barrier at the joints' acceleration limits: zero below ``1 - margin`` of a limit, 1 at it, growing as the square.

    The mean over a time step is what is held against the limit; shorter peaks are what the margin is for.
    """

    needs: ClassVar[str | None] = "acceleration"
    margin: Annotated[Number, Field(gt=0, lt=1)] = 0.4

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for i, limit in enumerate(robot.acceleration or ()):
            over = positive(absolute(f.a[i] * (1.0 / limit)) - (1 - self.margin))
            total = total + over * over
        return total * (1.0 / self.margin**2)


class Avoid(Term):
    """Keep every capsule of the arm ``margin`` [m] clear of every obstacle.

    Zero beyond ``margin + buffer``, 1 at the margin, growing as the square; ``margin`` is also what the run's clearance
    is judged by.
    """

    margin: NonNegative = 0.03
    buffer: Positive = 0.05

    def cost(self, f: Features, robot: RobotScales) -> Any:
        total = 0.0
        for distances in f.clearances:
            over = positive(self.margin + self.buffer - distances)
            total = total + (over * over).sum(0)
        return total * (1.0 / self.buffer**2)


class Height(Term):
    """Tool ``target`` [m] over the world's origin: squared error over ``scale`` [m]."""

    needs: ClassVar[str | None] = "p_world_tcp"
    target: Number
    scale: Positive = 0.01  # [m]

    def cost(self, f: Features, robot: RobotScales) -> Any:
        error = f.p_world_tcp[2] - self.target
        return error * error * (1.0 / self.scale**2)


class ObjectPose(Term):
    """The goal's object at its target: pseudo-Huber of the distance over its scale, and of the angle.

    Alone it says nothing of how to get there: a tool that does not touch yet needs a term that leads it to the object,
    such as ``contact_gap``.
    """

    needs: ClassVar[str | None] = "p_world_object"
    position_scale: Positive = 0.05  # [m]
    rotation_scale: Positive = 0.2  # [rad]
    rotation_weight: NonNegative = 1.0

    def cost(self, f: Features, robot: RobotScales) -> Any:
        position = pseudo_huber(_position_error(f, f.p_world_object, self.position_scale))
        return position + self.rotation_weight * pseudo_huber(_rotation_error(f, f.R_world_object, self.rotation_scale))


class ContactForce(Term):
    """Force on the declared contact's surface at ``target``: squared error over ``scale`` [N].

    The force is what the surface's own spring and damper bear, so it is known with any model and on a robot. Without a
    target it is the goal's.
    """

    needs: ClassVar[str | None] = "contact_force"
    target: Positive | None = None  # [N]
    scale: Positive = 5.0  # [N]

    def cost(self, f: Features, robot: RobotScales) -> Any:
        error = f.contact_force - (self.target or 0.0)
        return error * error * (1.0 / self.scale**2)


class ContactGap(Term):
    """Tip of the declared contact down on its surface: pseudo-Huber of the gap over ``scale`` [m], nothing in contact.

    What leads to a surface from afar, where its force says nothing yet.
    """

    needs: ClassVar[str | None] = "contact_gap"
    scale: Positive = 0.05  # [m]

    def cost(self, f: Features, robot: RobotScales) -> Any:
        gap = positive(f.contact_gap) * (1.0 / self.scale)
        return pseudo_huber(gap * gap)


class ContactApproach(Term):
    """Tip of the declared contact no faster than ``speed`` [m/s] towards its surface: zero below, growing as the square.

    Counts fully at the surface and no more from ``reach`` [m] on, so that touching is gentle and the way there is not slow.
    """

    needs: ClassVar[str | None] = "contact_rate"
    speed: Positive = 0.05  # [m/s]
    reach: Positive = 0.03  # [m]

    def cost(self, f: Features, robot: RobotScales) -> Any:
        over = positive(f.contact_rate * (-1.0 / self.speed) - 1.0)
        return clip01(1.0 - f.contact_gap * (1.0 / self.reach)) * (over * over)


TERMS = {
    "reach": "mbctrl.tasks.terms:Reach",
    "proximity": "mbctrl.tasks.terms:Proximity",
    "track": "mbctrl.tasks.terms:Track",
    "posture": "mbctrl.tasks.terms:Posture",
    "velocity": "mbctrl.tasks.terms:Velocity",
    "effort": "mbctrl.tasks.terms:Effort",
    "smoothness": "mbctrl.tasks.terms:Smoothness",
    "joint_limits": "mbctrl.tasks.terms:JointLimits",
    "velocity_limits": "mbctrl.tasks.terms:VelocityLimits",
    "acceleration_limits": "mbctrl.tasks.terms:AccelerationLimits",
    "avoid": "mbctrl.tasks.terms:Avoid",
    "height": "mbctrl.tasks.terms:Height",
    "object_pose": "mbctrl.tasks.terms:ObjectPose",
    "contact_force": "mbctrl.tasks.terms:ContactForce",
    "contact_approach": "mbctrl.tasks.terms:ContactApproach",
    "contact_gap": "mbctrl.tasks.terms:ContactGap",
}

"""What a scenario asks of the tool and what stands in its way: goals and obstacles, as functions of time."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationInfo, field_validator, model_validator

from mbctrl.base.poses import rotation_from_rpy
from mbctrl.base.robot import Positive, Vector
from mbctrl.base.spec import Number, Spec

Point = tuple[Number, Number, Number]


class Target(Spec):
    """A tool pose in the world: ``position`` [m], ``rpy`` [rad] (null: any orientation)."""

    position: Point
    rpy: Point | None = None

    @cached_property
    def rotation(self) -> np.ndarray | None:
        """The orientation, (3, 3), or None."""
        return None if self.rpy is None else rotation_from_rpy(np.asarray(self.rpy))


class RegionSpec(Spec):
    """A box in the world, between two corners, from which a target is drawn."""

    low: Point  # [m]
    high: Point  # [m]

    @model_validator(mode="after")
    def _order(self) -> RegionSpec:
        if any(low > high for low, high in zip(self.low, self.high)):
            raise ValueError(f"low: expected none above high, found {list(self.low)} and {list(self.high)}")
        return self

    def drawn(self, seed: int) -> Target:
        """Return a target of any orientation, uniform in the box."""
        position = np.random.default_rng((seed, 2)).uniform(self.low, self.high)
        return Target(position=tuple(map(float, position)))


class PoseGoal(Spec):
    """Tool poses to reach one after the other; one counts when held within both tolerances for ``hold`` seconds.

    In place of ``targets`` there may be a box that a run draws one from, by its seed: ``within``.
    """

    kind: Literal["poses"] = "poses"
    within: RegionSpec | None = None
    targets: tuple[Target, ...] = Field((), validate_default=True)
    tolerance_position: Positive = 0.005  # [m]
    tolerance_rotation: Positive = 0.0349  # [rad]
    hold: Positive = 0.3  # [s]

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[Target, ...], info: ValidationInfo) -> tuple[Target, ...]:
        if bool(targets) == (info.data.get("within") is not None):
            raise ValueError(f"expected some, or else within, found {'both' if targets else 'neither'}")
        return targets

    def sample(self, index: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return target ``index`` at times ``t`` [s], (T,): positions (T, 3) [m] and rotations (T, 3, 3) or None."""
        target = self.targets[min(index, len(self.targets) - 1)]
        position = np.broadcast_to(np.asarray(target.position, float), (len(t), 3))
        if target.rotation is None:
            return position, None
        return position, np.broadcast_to(target.rotation, (len(t), 3, 3))


class FigureEightGoal(Spec):
    """A figure eight (lemniscate of Gerono) traced at constant speed with a fixed tool orientation.

    The point is ``center + width/2 sin(s) e1 + height/2 sin(2 s) e2``, reparametrised by arc length.
    """

    kind: Literal["figure_eight"]
    center: Point  # [m]
    width: Positive  # [m], along e1
    height: Positive  # [m], along e2
    axes: tuple[Point, Point] = ((0, 1, 0), (0, 0, 1))  # e1, e2: orthonormal
    speed: Positive  # [m/s]
    rpy: Point | None = None  # [rad]

    @model_validator(mode="after")
    def _orthonormal(self) -> FigureEightGoal:
        _check_axes(self.axes)
        return self

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        phase = np.linspace(0, 2 * np.pi, 4001)
        x, y = self.width / 2 * np.sin(phase), self.height / 2 * np.sin(2 * phase)
        return phase, np.concatenate([[0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])

    @property
    def lap(self) -> float:
        """Time of one lap [s]."""
        return float(self._table[1][-1] / self.speed)

    def sample(self, index: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the moving target at times ``t`` [s], (T,): positions (T, 3) [m] and rotations (T, 3, 3) or None."""
        phase, length = self._table
        s = np.interp(np.maximum(t, 0) * self.speed % length[-1], length, phase)
        e1, e2 = np.asarray(self.axes, float)
        position = (
            np.asarray(self.center) + np.outer(self.width / 2 * np.sin(s), e1) + np.outer(self.height / 2 * np.sin(2 * s), e2)
        )
        return position, _held(self.rpy, len(t))


class CircleGoal(Spec):
    """A circle traced at constant speed with a fixed tool orientation, after ``delay`` seconds at where it begins.

    The point is ``center + radius (cos(s) e1 + sin(s) e2)``. ``force`` is what the tool shall press with meanwhile.
    """

    kind: Literal["circle"]
    center: Point  # [m]
    radius: Positive  # [m]
    period: Positive  # [s] of one turn
    delay: Annotated[Number, Field(ge=0)] = 0.0  # [s]
    axes: tuple[Point, Point] = ((1, 0, 0), (0, 1, 0))  # e1, e2: orthonormal
    rpy: Point | None = None  # [rad]
    force: Positive | None = None  # [N]

    @model_validator(mode="after")
    def _axes(self) -> CircleGoal:
        _check_axes(self.axes)
        return self

    @property
    def lap(self) -> float:
        """Time until the first turn is done [s]."""
        return self.delay + self.period

    def sample(self, index: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the moving target at times ``t`` [s], (T,): positions (T, 3) [m] and rotations (T, 3, 3) or None."""
        phase = 2 * np.pi / self.period * np.maximum(t - self.delay, 0.0)
        e1, e2 = np.asarray(self.axes, float)
        position = np.asarray(self.center) + self.radius * (np.outer(np.cos(phase), e1) + np.outer(np.sin(phase), e2))
        return position, _held(self.rpy, len(t))


def _check_axes(axes: tuple[Point, Point]) -> None:
    if not np.allclose(np.asarray(axes) @ np.transpose(axes), np.eye(2), atol=1e-6):
        raise ValueError(f"axes: expected two orthonormal vectors, found {axes}")


def _held(rpy: Point | None, count: int) -> np.ndarray | None:
    """Return one orientation ``count`` times, (T, 3, 3), or None."""
    return None if rpy is None else np.broadcast_to(rotation_from_rpy(np.asarray(rpy)), (count, 3, 3))


class ObjectPoseGoal(Spec):
    """A pose for an object to be brought to: where ``frame``, a site or body of the robot's model, shall stand, turned by yaw.

    It counts when held within both tolerances for ``hold`` seconds.
    """

    kind: Literal["object_pose"]
    frame: str
    position: Point  # [m], of the frame's origin
    yaw: Number  # [rad], about the world's z
    tolerance_position: Positive = 0.01  # [m]
    tolerance_rotation: Positive = 0.1745  # [rad]
    hold: Positive = 0.3  # [s]

    def sample(self, index: int, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the object's target at times ``t`` [s], (T,): positions (T, 3) [m] and rotations (T, 3, 3)."""
        position = np.broadcast_to(np.asarray(self.position, float), (len(t), 3))
        return position, np.broadcast_to(rotation_from_rpy(np.array([0.0, 0.0, self.yaw])), (len(t), 3, 3))


class JointGoal(Spec):
    """A joint configuration to reach and hold, modulo whole turns where ``wrap`` is set."""

    kind: Literal["joints"]
    position: Vector  # [rad]
    wrap: bool = False
    tolerance: Positive = 0.1  # [rad], of every joint
    hold: Positive = 1.0  # [s]


class BackendGoal(Spec):
    """The goal comes with the backend's own task (a dm_control task: its target and its reward)."""

    kind: Literal["backend"]


MOVING = (FigureEightGoal, CircleGoal)
"""Goals whose target moves: ``sample`` gives it, ``lap`` is the time until it has been everywhere."""

Goal = Annotated[PoseGoal | FigureEightGoal | CircleGoal | ObjectPoseGoal | JointGoal | BackendGoal, Field(discriminator="kind")]


class Obstacle(Spec):
    """Something to keep clear of: a sphere (``size`` = radius), a box (three half lengths) or a plane (``normal``).

    It swings smoothly between ``position`` and ``to`` with the given ``period``, starting after ``delay``; without
    ``to`` it stands still. Lengths in metres, times in seconds.
    """

    name: str
    shape: Literal["sphere", "box", "plane"]
    position: Point  # [m]
    size: tuple[Positive, ...] = ()  # [m]
    normal: Point = (0, 0, 1)  # of a plane, unit length
    to: Point | None = None  # [m]
    period: Positive = 4.0  # [s], there and back
    delay: Number = 0.0  # [s]

    @model_validator(mode="after")
    def _sizes(self) -> Obstacle:
        number = {"sphere": 1, "box": 3, "plane": 0}[self.shape]
        if len(self.size) != number:
            raise ValueError(f"size: expected {number} values for a {self.shape}, found {len(self.size)}")
        if abs(np.linalg.norm(self.normal) - 1) > 1e-6:
            raise ValueError(f"normal: expected a unit vector, found {self.normal}")
        return self

    def at(self, t: float) -> tuple[np.ndarray, np.ndarray]:
        """Return position [m] and velocity [m/s], each (3,), at time ``t`` [s]."""
        start = np.asarray(self.position, float)
        if self.to is None:
            return start, np.zeros(3)
        span, rate = np.asarray(self.to) - start, 2 * np.pi / self.period
        phase = rate * max(t - self.delay, 0.0)
        return start + span * (1 - np.cos(phase)) / 2, span * rate * np.sin(phase) / 2

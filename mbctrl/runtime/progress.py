"""How far a run is towards its goal."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mbctrl.base.poses import angle_between
from mbctrl.base.scene import MOVING, CircleGoal, JointGoal, ObjectPoseGoal, PoseGoal


@dataclass
class Progress:
    """Follows a goal: which target is due, the present errors, and when each target was held.

    ``reached`` holds the times [s] targets were completed at, ``errors`` the (position [m], rotation [rad]) errors then.
    """

    goal: object
    index: int = 0
    position_error: float = float("nan")  # [m], or [rad] of the worst joint for a joint goal
    rotation_error: float = float("nan")  # [rad]
    reached: list[float] = field(default_factory=list)
    errors: list[tuple[float, float]] = field(default_factory=list)
    _inside_since: float | None = None

    @property
    def count(self) -> int:
        """How many targets the goal has; 0 for one that is never completed."""
        return (
            len(self.goal.targets) if isinstance(self.goal, PoseGoal) else int(isinstance(self.goal, (JointGoal, ObjectPoseGoal)))
        )

    @property
    def done(self) -> bool:
        """Whether every target was reached."""
        return 0 < self.count <= len(self.reached)

    def target(self, t: float) -> tuple[np.ndarray, np.ndarray | None] | None:
        """Return the target due for the tool, or for the goal's object, at ``t`` [s]; None without one.

        That is the position (3,) [m] and the rotation (3, 3) or None.
        """
        if not isinstance(self.goal, (PoseGoal, ObjectPoseGoal, *MOVING)):
            return None
        position, rotation = self.goal.sample(self.index, np.array([t]))
        return position[0], None if rotation is None else rotation[0]

    def update(self, t: float, q: np.ndarray, pose: tuple[np.ndarray, np.ndarray], override=None) -> None:
        """Take note of joint positions ``q`` and the pose of the tool, or of the goal's object, at ``t`` [s].

        ``override`` replaces the goal's target.
        """
        if isinstance(self.goal, JointGoal):
            error = q - np.asarray(self.goal.position)
            if self.goal.wrap:
                error = (error + np.pi) % (2 * np.pi) - np.pi
            self.position_error = float(np.abs(error).max())
            self._advance(t, self.position_error <= self.goal.tolerance, self.goal.hold)
            return
        target = override or self.target(t)
        if target is None:
            return
        off = pose[0] - target[0]
        if isinstance(self.goal, CircleGoal) and self.goal.force is not None:
            off = np.asarray(self.goal.axes) @ off  # the rest is what the force decides
        self.position_error = float(np.linalg.norm(off))
        self.rotation_error = 0.0 if target[1] is None else angle_between(pose[1], target[1])
        if isinstance(self.goal, (PoseGoal, ObjectPoseGoal)) and override is None:
            inside = self.position_error <= self.goal.tolerance_position and self.rotation_error <= self.goal.tolerance_rotation
            self._advance(t, inside, self.goal.hold)

    def _advance(self, t: float, inside: bool, hold: float) -> None:
        if not inside or self.done:
            self._inside_since = None
            return
        if self._inside_since is None:
            self._inside_since = t
        if t - self._inside_since >= hold - 1e-9:
            self.reached.append(t)
            self.errors.append((self.position_error, self.rotation_error))
            self.index = min(self.index + 1, self.count - 1)
            self._inside_since = None

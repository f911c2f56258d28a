"""What a cost term may look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Features:
    """Named features of one step; a vector is indexed by component, each component a row of samples (or a traced scalar).

    States are those after the step, commands those of the step. Absent features are None.
    """

    q: Any  # (nq) [rad]
    v: Any  # (nv) [rad/s]
    a: Any  # (nv) mean acceleration over the step [rad/s²]
    u: Any  # (nu) commands: references [rad] or torques [N·m]
    u_before: Any  # (nu) the commands one step earlier
    effort: Any  # (nu) commanded joint torque without gravity compensation [N·m]
    p_world_tcp: Any  # (3) [m]
    R_world_tcp: Any  # (3)(3)
    p_world_target: Any  # (3) [m], or None
    R_world_target: Any  # (3)(3), or None: any orientation
    q_target: Any  # (nq) [rad], or None
    clearances: tuple[Any, ...]  # for each obstacle the distances of the arm's capsules from it [m], first index: capsule
    contact_gap: Any = None  # of the declared contact [m], negative in it, or None
    contact_rate: Any = None  # of the gap, mean over the step [m/s], or None
    p_world_object: Any = None  # (3) [m] of what the goal is for where that is not the tool, or None
    R_world_object: Any = None  # (3)(3), or None
    contact_force: Any = None  # what presses the declared contact's surface on its spring [N], or None


@dataclass(frozen=True)
class RobotScales:
    """The robot's limits, by which terms make their errors dimensionless."""

    home: tuple[float, ...]  # [rad]
    position_lower: tuple[float, ...]  # [rad]
    position_upper: tuple[float, ...]  # [rad]
    velocity: tuple[float, ...]  # [rad/s]
    effort: tuple[float, ...]  # [N·m]
    acceleration: tuple[float, ...] | None = None  # [rad/s²]

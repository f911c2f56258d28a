"""How a command becomes joint torque, in the implicit form a large time step needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mbctrl.base.robot import Robot


class Effort(NamedTuple):
    """Actuator torque at the end of a step of length h, linear in the joint acceleration: ``torque - drag * a``.

    Both are (nu, N): ``torque`` [N·m] at zero acceleration, ``drag`` [N·m·s²/rad].
    """

    torque: Tensor
    drag: Tensor | None


@dataclass(frozen=True)
class Torque:
    """The command is the joint torque [N·m]."""

    def effort(self, q: Tensor, v: Tensor, u: Tensor, h: float) -> Effort:
        """Return the effort for commands ``u`` (nu, N); ``q`` and ``v`` (nu, N) are the actuated joints' state."""
        return Effort(u, None)


@dataclass(frozen=True)
class Impedance:
    """The command is a joint reference [rad]: torque = K (u - q') - D v', with q', v' at the end of the step.

    Taking the state at the end of the step (backward Euler on the servo) keeps gains stable that are far stiffer than
    the step could follow explicitly. ``stiffness`` [N·m/rad] and ``damping`` [N·m·s/rad] have one value a command.
    """

    stiffness: Sequence[float]
    damping: Sequence[float]

    def effort(self, q: Tensor, v: Tensor, u: Tensor, h: float) -> Effort:
        """Return the effort for references ``u`` (nu, N); ``q`` and ``v`` (nu, N) are the actuated joints' state."""
        k, d = q.new_tensor(self.stiffness)[:, None], q.new_tensor(self.damping)[:, None]
        return Effort(k * (u - q - h * v) - d * v, h * (d + h * k))


def actuation_of(robot: Robot) -> Torque | Impedance:
    """Return the actuation ``robot.yaml`` names."""
    if robot.control.mode == "torque":
        return Torque()
    return Impedance(robot.control.stiffness, robot.control.damping)


def drive_settings(robot: Robot) -> dict[str, Any]:
    """Return how ``robot.yaml`` says the robot is actuated, as ``RigidBodyDynamics`` and ``SimulatorDynamics`` take it."""
    return {
        "actuation": actuation_of(robot),
        "commanded": robot.command_index,
        "effort_limit": robot.limits.effort,
        "gravity_compensation": robot.control.gravity_compensation,
    }

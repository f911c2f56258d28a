"""The contract between the control loop and whatever moves: a simulator or an arm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import Literal

import numpy as np

from mbctrl.base.numbers import all_finite


class Status(Enum):
    """What the robot says of itself."""

    OK = "ok"
    PROTECTIVE_STOP = "protective stop"  # the robot's own safety stopped it: a reflex, a limit, a collision
    EMERGENCY_STOP = "emergency stop"
    FAULT = "fault"  # anything else that keeps it from taking commands

    @property
    def usable(self) -> bool:
        """Whether commands are taken."""
        return self is Status.OK


@dataclass(frozen=True)
class RobotState:
    """A measurement; ``stamp`` is the robot's own time brought to the loop's clock [s], ``seq`` counts measurements.

    ``q`` (nq,) [rad], ``v`` (nq,) [rad/s], ``tau`` (nu,) total actuator torque [N·m], ``gravity`` (nu,) the part of it
    the robot adds by itself [N·m] (zeros where it compensates nothing), ``status`` what the robot says of itself.

    Reading twice without news gives the same measurement, stamp and ``seq`` again: its age is how health is judged.
    """

    stamp: float
    seq: int
    q: np.ndarray
    v: np.ndarray
    tau: np.ndarray
    gravity: np.ndarray
    status: Status = Status.OK


@dataclass(frozen=True)
class JointCommand:
    """The torque law the robot applies until the next one: ``torque + K (q_ref - q) + D (v_ref - v)``, (nu,) each.

    K = D = 0 is plain torque control. Units: [rad], [rad/s], [N·m/rad], [N·m·s/rad], [N·m].
    """

    q_ref: np.ndarray
    v_ref: np.ndarray
    stiffness: np.ndarray
    damping: np.ndarray
    torque: np.ndarray

    def at(self, q: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the commanded torque (nu,) [N·m] at the actuated joints' state."""
        return self.torque + self.stiffness * (self.q_ref - q) + self.damping * (self.v_ref - v)

    def finite(self) -> bool:
        """Return whether every number is finite."""
        return all_finite(self.q_ref, self.v_ref, self.stiffness, self.damping, self.torque)


class Driver(ABC):
    """A robot. ``open`` before the first ``read``; ``stop`` may be called at any time and more than once.

    ``senses_torque``: whether ``tau`` is measured; else it is the driver's best guess and nothing is concluded from it.
    ``follows``: whether a command's torque law is applied, or its ``q_ref`` is followed as closely as the robot's own servo can:
    then ``q_ref`` is where the joints should be, not the reference of a spring.
    """

    senses_torque: bool = True
    follows: Literal["law", "position"] = "law"

    @abstractmethod
    def open(self) -> None:
        """Connect and make ready; DriverError if that fails."""

    @abstractmethod
    def read(self) -> RobotState:
        """Return the newest measurement; never waits."""

    @abstractmethod
    def write(self, command: JointCommand) -> None:
        """Put a gated command in force; what is not finite is refused with DriverError before any vendor's call."""

    @abstractmethod
    def stop(self) -> None:
        """Bring the robot to its defined safe state and let go."""

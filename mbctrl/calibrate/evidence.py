"""A recording as the checks look at it: without its spikes, with what position and velocity say of each other."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from mbctrl.base.logs import LogError
from mbctrl.base.robot import Robot
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.spikes import mended

EXCITED = 0.01
"""A joint that moves less is not excited [rad]."""
LAG = 0.1
"""Positions and integrated velocities are compared over this time [s]."""


class Evidence:
    """What the checks work on, and the warnings they leave; see ``Recording`` for shapes and units.

    Attributes: ``motion`` (n,) [rad] is how far each joint goes, ``driven`` the joints with a drive, ``path`` (T, n) [rad]
    the integral of the logged velocity, None where there is none.
    """

    def __init__(self, recording: Recording, robot: Robot) -> None:
        self.recording, self.robot = recording, robot
        self.t, self.parts, self.joints = recording.t, recording.parts or ((0, len(recording.t)),), recording.joints
        self.q, self.q_spikes = mended(self.t, recording.q, self.parts)
        self.effort, self.effort_spikes = mended(self.t, recording.effort, self.parts)
        self.v, self.v_spikes = (None, None) if recording.v is None else mended(self.t, recording.v, self.parts)
        self.command = recording.command
        self.motion = np.ptp(self.q, axis=0)
        self.driven = [recording.joints.index(joint) for joint in robot.driven]
        self.warnings: list[str] = []

    @cached_property
    def path(self) -> np.ndarray | None:
        if self.v is None:
            return None
        steps = (self.v[1:] + self.v[:-1]) / 2 * np.diff(self.t)[:, None]
        return np.concatenate([np.zeros((1, self.v.shape[1])), np.cumsum(steps, axis=0)])

    @cached_property
    def related(self) -> tuple[np.ndarray, np.ndarray] | None:
        """How positions (rows) and integrated velocities (columns) move together over ``LAG``.

        Correlation (n, n), and (n,) how many times as far each position moves as its velocity says; None without velocities.
        """
        lag = max(1, round(LAG * self.recording.rate))
        pairs = np.concatenate([np.arange(first, past - lag) for first, past in self.parts])
        if self.path is None or len(pairs) < 3:
            return None
        moved, said = self.q[pairs + lag] - self.q[pairs], self.path[pairs + lag] - self.path[pairs]
        products, squares = moved.T @ said, np.einsum("ki,ki->i", said, said)
        size = np.linalg.norm(moved, axis=0)[:, None] * np.sqrt(squares)
        return products / np.maximum(size, 1e-12), np.diagonal(products) / np.maximum(squares, 1e-12)

    def effort_limit(self, joint: int) -> float:
        """Return the effort limit of a joint [N·m], infinite where it has no drive."""
        return self.robot.limits.effort[self.driven.index(joint)] if joint in self.driven else np.inf

    def line(self, sample: int) -> int:
        """Return the line of a sample in the log."""
        return int(self.recording.lines[sample]) if len(self.recording.lines) else sample + 1

    def fail(self, message: str, *joints: int, lines: tuple[int, int] | None = None) -> None:
        """Raise a LogError that names the joints, and the lines from the first to the last sample of ``lines``."""
        key = [" and ".join(self.joints[j] for j in joints)] if joints else []
        key += [f"lines {self.line(lines[0])} to {self.line(lines[1])}"] if lines else []
        raise LogError(message, file=self.recording.file or None, key=", ".join(key) or None)

    def warn(self, message: str, joint: int) -> None:
        """Note what may pass."""
        self.warnings.append(f"{self.joints[joint]}: {message}")

"""Commands to learn from before there is anything to plan with."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.robot import Robot
from mbctrl.calibrate.fourier import FourierSeries
from mbctrl.learning.fence import AHEAD, Fence, changes, stepwise

_DRAWS = 14  # what is drawn anew at once where a fence refuses a command
_ROW = 3  # refusals in a row after which an arm that takes torques is servoed home for a while
_HARMONICS = 10


class Exploration(ABC):
    """Answers requests with commands that do not look at the state, but for a fence they must not lead the tool across.

    Commands change no faster than ``changes`` says, for one that the safety gate has to change teaches nothing.

    Args:
        robot: torques are about 0, references about home.
        share: of the way to the bounds, (0, 1].
        rows: of a plan.
        dt: spacing of a plan's rows [s].
        rng: of the draws.
        fence: None: anywhere.
    """

    def __init__(
        self, robot: Robot, share: float, rows: int, dt: float, rng: np.random.Generator, fence: Fence | None = None
    ) -> None:
        limits, pick = robot.limits, robot.command_index
        self._torque = robot.control.mode == "torque"
        if self._torque:
            high = np.asarray(limits.effort)
            self.middle, low = np.zeros(robot.nu), -high
        else:
            low, high = (np.asarray(side)[pick] for side in (limits.position_lower, limits.position_upper))
            self.middle = np.asarray(robot.home)[pick]
        self.low, self.high = self.middle + share * (low - self.middle), self.middle + share * (high - self.middle)
        self.rng, self._rows, self._dt, self._fence = rng, max(2, rows), dt, fence
        self._most, self._stepwise, self._pick = changes(robot, dt), stepwise(robot, dt), pick
        self.refused = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew from wherever the robot is, at time 0."""
        self._last: np.ndarray | None = None
        self._row, self._until = 0, -np.inf

    @abstractmethod
    def wanted(self, t: float) -> np.ndarray:
        """Return the command (nu,) at time ``t`` [s]."""

    @abstractmethod
    def others(self, t: float, count: int) -> np.ndarray:
        """Return what to command in its place, (count, nu), the one most wanted first."""

    def adopt(self, command: np.ndarray) -> None:
        """Go on with one of the others, (nu,)."""

    def plan(self, request: PlanRequest) -> Plan:
        """Return a plan; it is numbered 0, which no planner's is."""
        t0, x = request.stamp + request.latency, np.asarray(request.x, float)
        if self._last is None:
            self._last = np.zeros_like(self.middle) if self._torque else x[: len(x) // 2][self._pick]
        first, t = self._last, t0 if self._stepwise else t0 + self._dt
        command = self._near(self.wanted(t))
        if self._fence is not None:
            command = self._within(command, t, x)
        self._last = command
        u = np.tile(command, (self._rows, 1))
        if not self._stepwise:
            u[0] = first
        info = {"cpu": 0.0, "best": 0.0, "ess": 0.0, "nonfinite": 0}
        return Plan(0, request.stamp, t0, self._dt, u, info=info)

    def _near(self, command: np.ndarray) -> np.ndarray:
        """Return commands (..., nu) as far from the last one as a step allows."""
        return np.clip(command, self._last - self._most, self._last + self._most)

    def _within(self, wanted: np.ndarray, t: float, x: np.ndarray) -> np.ndarray:
        """Return the first of what is wanted, of others and of a step home that keeps the tool within the fence; else a stop."""
        if t < self._until:
            return self._fence.stop(x, self._last)
        if self._fence.safe(x, self._last, wanted[None])[0]:
            self._row = 0
            return wanted
        self.refused, self._row = self.refused + 1, self._row + 1
        if self._torque and self._row > _ROW:  # at the edge of what the arm can come back from, where gravity keeps it: go home
            self._until, self._row = t + AHEAD, 0
        others = self.others(t, _DRAWS)
        near = self._near(np.concatenate([others, self.middle[None]]))
        safe = self._fence.safe(x, self._last, near)
        if not safe.any():
            return self._fence.stop(x, self._last)
        first = int(safe.argmax())
        if first < _DRAWS:
            self.adopt(others[first])
        return near[first]


class RandomCommands(Exploration):
    """Uniform commands, each held for ``held`` seconds.

    Args:
        robot, share, dt, rng, fence: as ``Exploration``.
        held: for how long [s].
    """

    def __init__(
        self, robot: Robot, share: float, held: float, dt: float, rng: np.random.Generator, fence: Fence | None = None
    ) -> None:
        super().__init__(robot, share, 1 + int(np.ceil(held / dt - 1e-6)), dt, rng, fence)
        self._held, self._command = held, self.middle

    def reset(self) -> None:
        """Begin anew, with a draw of its own."""
        super().reset()
        self._piece = -1

    def wanted(self, t: float) -> np.ndarray:
        """Return the command in force, of its own draw a piece."""
        piece = int(t / self._held + 1e-6)
        if piece != self._piece:
            self._piece, self._command = piece, self.rng.uniform(self.low, self.high)
        return self._command

    def others(self, t: float, count: int) -> np.ndarray:
        """Return commands drawn anew."""
        return self.rng.uniform(self.low, self.high, (count, len(self.low)))

    def adopt(self, command: np.ndarray) -> None:
        """Hold it until the piece is over."""
        self._command = command


class Excitation(Exploration):
    """Sums of sines up to ``band`` [Hz], of random phases, as much speed in each: smooth where random commands are not.

    They begin at the middle, swing about it as far as ``share`` of the nearer bound, and repeat after 10 / ``band`` seconds.
    """

    def __init__(
        self, robot: Robot, share: float, band: float, dt: float, rng: np.random.Generator, fence: Fence | None = None
    ) -> None:
        super().__init__(robot, share, 2, dt, rng, fence)
        half = np.minimum(self.high - self.middle, self.middle - self.low)
        a, b = rng.normal(size=(2, len(half), _HARMONICS))
        unit = FourierSeries(_HARMONICS / band, np.zeros(len(half)), a, b)
        peak = np.abs(unit.derivative(np.linspace(0, unit.duration, 40 * _HARMONICS, endpoint=False), 0)).max(0)
        scale = (half / peak)[:, None]
        self._series, self._ramp = FourierSeries(unit.duration, np.zeros(len(half)), scale * a, scale * b), 1 / band

    def wanted(self, t: float) -> np.ndarray:
        """Return the series, grown to its size in the period of its fastest sine."""
        return self.middle + min(t / self._ramp, 1.0) * self._series.derivative(np.array([t]), 0)[0]

    def others(self, t: float, count: int) -> np.ndarray:
        """Return the same, nearer and nearer to the middle."""
        less = np.linspace(1.0, 0.0, count + 1)[1:, None]
        return self.middle + less * (self.wanted(t) - self.middle)

"""Commands to learn from before there is anything to plan with."""

from __future__ import annotations

import numpy as np

from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.robot import Robot


class RandomCommands:
    """Answers requests with uniform commands, each held for a while.

    Args:
        robot: torques are drawn around 0, references around home.
        share: of the way to the bounds, (0, 1].
        held: for how long [s].
        dt: spacing of a plan's samples [s].
        rng: of the draws.
    """

    def __init__(self, robot: Robot, share: float, held: float, dt: float, rng: np.random.Generator) -> None:
        limits, pick = robot.limits, robot.command_index
        if robot.control.mode == "torque":
            high = np.asarray(limits.effort)
            middle, low = np.zeros(robot.nu), -high
        else:
            low, high = (np.asarray(side)[pick] for side in (limits.position_lower, limits.position_upper))
            middle = np.asarray(robot.home)[pick]
        self._low, self._high = middle + share * (low - middle), middle + share * (high - middle)
        self._held, self._dt, self._rng = held, dt, rng
        self._piece, self._command = -1, middle

    def plan(self, request: PlanRequest) -> Plan:
        """Return a plan of one command; it is numbered 0, which no planner's is."""
        t0 = request.stamp + request.latency
        piece = int(t0 / self._held + 1e-6)
        if piece != self._piece:
            self._piece, self._command = piece, self._rng.uniform(self._low, self._high)
        rows = max(2, 1 + int(np.ceil(self._held / self._dt - 1e-6)))
        info = {"cpu": 0.0, "best": 0.0, "ess": 0.0, "nonfinite": 0}
        return Plan(0, request.stamp, t0, self._dt, np.tile(self._command, (rows, 1)), info=info)

"""A simulated robot as its own controller runs it: physics, the law in force, and the stops it makes by itself."""

from __future__ import annotations

from dataclasses import replace

import mujoco
import numpy as np

from mbctrl.base.robot import Robot
from mbctrl.runtime.clock import LockstepClock
from mbctrl.runtime.driver import JointCommand, RobotState, Status
from mbctrl.sim.driver import SimDriver

_DECELERATION = 10.0  # [rad/s²], of a robot without a limit of its own
_RATE_SHARE = 0.9  # of the torque's rate limit, for the brake: gravity changes meanwhile


class Plant:
    """One robot behind a wire protocol: ``tick`` is one of its control periods.

    Without a command it holds where it is. ``halt`` brakes it as an arm's own controller does, at its acceleration limits
    and within its torque rate, and keeps it there until ``reset``; commands are refused meanwhile.

    Args:
        mj: the compiled model.
        robot: order, limits, gains, control rate.
        start: (nq,) initial positions [rad]; None: home.
    """

    def __init__(self, mj: mujoco.MjModel, robot: Robot, start: np.ndarray | None = None) -> None:
        self.mj, self.robot, self.period = mj, robot, 1 / robot.control.rate
        self._clock = LockstepClock()
        self._driver = SimDriver(mj, robot, self._clock, start)
        self._driver.open()
        self._pick, self._tool = robot.command_index, _body(mj, robot.tool)
        limit = robot.limits.acceleration
        self._deceleration = np.full(robot.nu, _DECELERATION) if limit is None else np.asarray(limit)[self._pick]
        self._gains = np.asarray(robot.control.stiffness), np.asarray(robot.control.damping)
        rate = robot.limits.effort_rate
        self._step = np.full(robot.nu, np.inf) if rate is None else _RATE_SHARE * self.period * np.asarray(rate)
        self.status, self.reason = Status.OK, ""
        self.ticks = 0
        self.state: RobotState = self._driver.read()
        self._braking: tuple[np.ndarray, np.ndarray] | None = None
        self.law: JointCommand  # in force, a client's or the plant's own
        self.release()

    def stiffen(self, times: float) -> None:
        """Make the arm one with a position servo of its own: ``times`` as stiff as robot.yaml's impedance and as well damped.

        Its torques are its own affair: how fast they change is not bounded.
        """
        stiffness, damping = self._gains
        self._gains, self._step = (times * stiffness, np.sqrt(times) * damping), np.full(self.robot.nu, np.inf)
        self._braking = None
        self.release()

    @property
    def gains(self) -> tuple[np.ndarray, np.ndarray]:
        """Stiffness [N·m/rad] and damping [N·m·s/rad] (nu,) it holds itself with."""
        return self._gains

    @property
    def commanded(self) -> bool:
        """Whether a client's command is in force."""
        return self._braking is None

    def tick(self) -> RobotState:
        """Advance one control period; return the state, stamped with the robot's own time [s] from 0."""
        if self._braking is not None:
            self._brake()
        self.ticks += 1
        self._clock.wait_until(self.ticks * self.period)
        self.state = replace(self._driver.read(), status=self.status)
        return self.state

    def command(self, law: JointCommand) -> bool:
        """Put a torque law in force; False where the robot takes no commands."""
        if not self.status.usable:
            return False
        self._braking = None
        self._apply(law)
        return True

    def release(self) -> None:
        """Take the law away: brake, then hold."""
        if self._braking is None:
            self._braking = self.state.q[self._pick].copy(), self.state.v[self._pick].copy()
            self._brake()

    def halt(self, reason: str, status: Status = Status.PROTECTIVE_STOP) -> None:
        """Stop by itself, and take no commands until ``reset``."""
        if self.status.usable:
            self.status, self.reason = status, reason
        self.release()

    def reset(self) -> None:
        """Take commands again."""
        self.status, self.reason = Status.OK, ""

    def push(self, force: float) -> None:
        """Have a force [N] along the world's x axis act on the tool's body from now on; 0 ends it."""
        self._driver.data.xfrc_applied[self._tool, 0] = force

    def _brake(self) -> None:
        position, speed = self._braking
        slower = np.sign(speed) * np.maximum(np.abs(speed) - self._deceleration * self.period, 0.0)
        self._braking = position + 0.5 * (speed + slower) * self.period, slower
        stiffness, damping = self._gains
        if np.isinf(self._step).all():
            self._apply(JointCommand(*self._braking, stiffness, damping, np.zeros(len(stiffness))))
            return
        last = self.state.tau - self.state.gravity
        wanted = stiffness * (self._braking[0] - self.state.q[self._pick]) + damping * (slower - self.state.v[self._pick])
        zero = np.zeros(len(wanted))
        self._apply(JointCommand(*self._braking, zero, zero, wanted.clip(last - self._step, last + self._step)))

    def _apply(self, law: JointCommand) -> None:
        self.law = law
        self._driver.write(law)


def _body(mj: mujoco.MjModel, name: str) -> int:
    """Return the body of that name, or that a site of that name is on."""
    site = mujoco.mj_name2id(mj, mujoco.mjtObj.mjOBJ_SITE, name)
    return int(mj.site_bodyid[site]) if site >= 0 else mujoco.mj_name2id(mj, mujoco.mjtObj.mjOBJ_BODY, name)

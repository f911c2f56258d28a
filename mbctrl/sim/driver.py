"""A MuJoCo model as a robot."""

from __future__ import annotations

import copy

import mujoco
import numpy as np

from mbctrl.base.config import PayloadSpec
from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot
from mbctrl.runtime.clock import Clock
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.sim.payload import Grip


class SimDriver(Driver):
    """Simulates a robot on the loop's clock: ``read`` first lets the physics catch up with the time.

    The last command's torque law is applied at every physics step, the arm adds its own gravity torque where robot.yaml
    says so, and the total is bounded by the effort limits, as an arm's own controller does. Torques enter as
    ``qfrc_applied``, so any MJCF or URDF serves, with or without actuators.

    Args:
        mj: the compiled model (not modified).
        robot: order, limits and control mode.
        clock: the loop's clock.
        start: (nq,) initial positions [rad]; None: home.
        believed: the model whose gravity torque the arm adds, where it was told other parameters than it has; None: ``mj``.
        payload: what the tool picks up, and when.

    Errors:
        ModelError: where the tool's body cannot carry a payload.
    """

    def __init__(
        self,
        mj: mujoco.MjModel,
        robot: Robot,
        clock: Clock,
        start: np.ndarray | None = None,
        believed: mujoco.MjModel | None = None,
        payload: PayloadSpec | None = None,
    ) -> None:
        self.model = copy.copy(mj)
        self.model.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
        self._believed = mj if believed is None else believed
        self._grip = None if payload is None else Grip(self.model, robot.tool, payload)
        self.data, self._static = mujoco.MjData(self.model), mujoco.MjData(self._believed)
        self._clock, self._compensated = clock, robot.control.gravity_compensation
        self._pick = robot.command_index
        self._dof = self.model.jnt_dofadr[self._pick]
        self._limit = np.asarray(robot.limits.effort)
        self._start = np.asarray(robot.home if start is None else start, float)
        self._command: JointCommand | None = None
        self._tau, self._own, self._seq = np.zeros(robot.nu), np.zeros(robot.nu), 0

    def open(self) -> None:
        """Put the arm at its start, at rest, held up by its own gravity torque."""
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self._start
        mujoco.mj_forward(self.model, self.data)
        self._own = self._gravity()
        self._tau = self._own.copy()

    def read(self) -> RobotState:
        """Advance the physics to the clock's time and measure."""
        target = self._clock.now()
        while self.data.time + self.model.opt.timestep <= target + 1e-6:  # the physics never runs ahead of the clock
            self._step()
        self._seq += 1
        data = self.data
        return RobotState(float(data.time), self._seq, data.qpos.copy(), data.qvel.copy(), self._tau.copy(), self._own.copy())

    def write(self, command: JointCommand) -> None:
        """Put a command in force."""
        self._command = command

    def stop(self) -> None:
        """Take the command away; the arm's own gravity torque remains."""
        self._command = None

    def pressed(self) -> float:
        """Return the sum of the normal forces of every contact in the last physics step [N]."""
        force, total = np.zeros(6), 0.0
        for index in range(self.data.ncon):
            mujoco.mj_contactForce(self.model, self.data, index, force)
            total += force[0]
        return float(total)

    @property
    def payload(self) -> float:
        """What the tool carries [kg]."""
        return 0.0 if self._grip is None else self._grip.carried

    def _gravity(self) -> np.ndarray:
        """Return the torque the arm adds by itself at the present position, (nu,) [N·m]."""
        if not self._compensated:
            return np.zeros(len(self._pick))
        self._static.qpos[:] = self.data.qpos
        mujoco.mj_fwdPosition(self._believed, self._static)
        force = np.zeros(self.model.nv)
        mujoco.mj_rne(self._believed, self._static, 0, force)
        return force[self._dof]

    def _step(self) -> None:
        data = self.data
        if self._grip is not None:
            self._grip.update(data.time)
        total = self._own
        if self._command is not None:
            total = total + self._command.at(data.qpos[self._pick], data.qvel[self._pick])
        self._tau = total.clip(-self._limit, self._limit)
        data.qfrc_applied[self._dof] = self._tau
        mujoco.mj_step(self.model, data)
        if data.warning[mujoco.mjtWarning.mjWARN_BADQACC].number:
            raise DriverError("the simulation became unstable", key=f"t = {data.time:.3f} s")
        self._own = self._gravity()

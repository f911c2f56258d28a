"""A dm_control suite task as a robot: its own physics, its own reward."""

from __future__ import annotations

import mujoco
import numpy as np

from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.robot import Robot
from mbctrl.dynamics.dm_control import import_dm_control
from mbctrl.runtime.clock import Clock
from mbctrl.runtime.driver import Driver, JointCommand, RobotState


class SuiteDriver(Driver):
    """Runs an episode of a suite task on the loop's clock; the torque in force becomes the task's control.

    ``total_reward`` is the return so far, ``reward`` the last step's; ``target`` (3,) the task's target position [m],
    or None.
    """

    def __init__(self, name: str, robot: Robot, clock: Clock, seed: int) -> None:
        suite = import_dm_control("suite", name)
        domain, _, task = name.partition("-")
        if (domain, task) not in suite.ALL_TASKS:
            raise SpecError(f"unknown task{suggest(name, ('-'.join(pair) for pair in suite.ALL_TASKS))}", key="backend.task")
        self.environment = suite.load(domain, task, task_kwargs={"random": seed, "time_limit": np.inf})  # the loop ends it
        self.physics = self.environment.physics
        self.period = self.environment.control_timestep()
        self._robot, self._clock, self._pick = robot, clock, robot.command_index
        model = self.physics.model
        self._gear = np.asarray(model.actuator_gear[:, 0])
        self._range = np.asarray(model.actuator_ctrlrange).T
        self._torque, self._seq, self._time = np.zeros(robot.nu), 0, 0.0
        self.reward = self.total_reward = 0.0
        self.steps = 0

    @property
    def target(self) -> np.ndarray | None:
        """The position of the task's geom or site named target that is fixed in the world [m], (3,)."""
        model, data = self.physics.model, self.physics.data
        kinds = (
            (mujoco.mjtObj.mjOBJ_GEOM, model.geom_bodyid, data.geom_xpos),
            (mujoco.mjtObj.mjOBJ_SITE, model.site_bodyid, data.site_xpos),
        )
        for kind, bodies, places in kinds:
            index = mujoco.mj_name2id(model.ptr, kind, "target")
            if index >= 0 and model.body_weldid[bodies[index]] == 0:
                return places[index].copy()
        return None

    def open(self) -> None:
        """Start the episode."""
        self.environment.reset()

    def read(self) -> RobotState:
        """Advance the episode to the clock's time and measure."""
        while self._time + self.period <= self._clock.now() + 1e-6:
            control = (self._torque / self._gear).clip(*self._range)
            step = self.environment.step(control)
            self.reward = float(step.reward or 0.0)
            self.total_reward += self.reward
            self.steps += 1
            self._time += self.period
        self._seq += 1
        data = self.physics.data
        return RobotState(self._time, self._seq, data.qpos.copy(), data.qvel.copy(), self._torque.copy(), np.zeros(self._robot.nu))

    def write(self, command: JointCommand) -> None:
        """Put a command in force; its torque law is evaluated at the present state."""
        data = self.physics.data
        self._torque = command.at(data.qpos[self._pick], data.qvel[self._pick])

    def stop(self) -> None:
        """Take the torque away."""
        self._torque = np.zeros(self._robot.nu)

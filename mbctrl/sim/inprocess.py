"""The simulated robot as a driver like any other, on the machine's own clock: ``mbctrl deploy BUNDLE --driver sim``."""

from __future__ import annotations

import time

from mbctrl.base.robot import Robot
from mbctrl.dynamics.load import load_model
from mbctrl.runtime.clock import RealClock
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.sim.driver import SimDriver


class InProcessRobot(Driver):
    """Simulates the robot of that name in the driver's process; between periods it is where the last one left it.

    Args:
        robot: its name finds the model.
        host: not used; there for the drivers' common signature.
        epoch: the loop's time 0 on time.monotonic() [s].
    """

    def __init__(self, robot: Robot, host: str = "", *, epoch: float = 0.0) -> None:
        self._robot, self._epoch = robot, epoch

    def open(self) -> None:
        """Load the model and put the arm at home."""
        model = load_model(self._robot.name)
        self._clock = RealClock()
        self._sim = SimDriver(model.mj, self._robot, self._clock)
        self._sim.open()
        self._clock.restart()
        self._zero = time.monotonic() - self._epoch

    def read(self) -> RobotState:
        """Advance the physics to now and measure."""
        state = self._sim.read()
        number = int(state.stamp * self._robot.control.rate + 1e-6)  # one a control period, however often it is looked at
        return RobotState(state.stamp + self._zero, number, state.q, state.v, state.tau, state.gravity)

    def write(self, command: JointCommand) -> None:
        """Put a command in force."""
        self._sim.write(command)

    def stop(self) -> None:
        """Take the command away."""
        if hasattr(self, "_sim"):
            self._sim.stop()

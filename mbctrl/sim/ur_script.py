"""The program ur-rtde uploads to a controller, as far as joint motion goes, over a simulated plant.

The client writes a command's number and its arguments into RTDE input registers and waits for output register 0 to say
"ready" or "done"; commands of a stream (speedJ, servoJ, direct torque) are taken every cycle and are ready at once, the
others run once and are done until the client clears the command. Source: the program's text in librtde 1.6.5 and trials
with that client; Universal Robots, "The URScript Programming Language" for what servoj, speedj, direct_torque do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np

from mbctrl.runtime.driver import JointCommand, Status
from mbctrl.sim.plant import Plant
from mbctrl.sim.rtde import NUMBER_OF_REGISTERS

_log = logging.getLogger(__name__)
READY, DONE = 1, 2  # what output register 0 says
STATE, RESULT, PROGRESS = 0, 1, 2  # output integer registers
_SPEED, _SERVO, _TORQUE = 9, 11, 66
_SPEED_STOP, _SERVO_STOP, _STOP = 15, 16, 34
_WATCHDOG, _END = 35, 255
_AT_REST = 1e-2  # [rad/s]
_LOOKAHEAD, _GAIN = (0.03, 0.2), (100.0, 2000.0)  # [s], [1], what servoj takes

_STIFFER = 16.0  # times robot.yaml's impedance, critically damped as it is


class ControlScript:
    """The uploaded program: ``start`` when its text has come, ``cycle`` in every control period.

    - servoj: the plant's own joint impedance law at the target. The speed reference is the difference of targets,
      smoothed over the lookahead time, so that packages which bunch up in one period change nothing on average. ``gain``
      is checked and otherwise not modelled: the law's gains are robot.yaml's.
    - speedj: the same law at a position that runs on at a speed which nears the target at the given acceleration.
    - direct_torque: plain torque; what friction compensation it is told is not modelled, the plant's friction stays.
    - The program by itself holds the last target for ever. What stops the arm when the client is gone is
      ``rtde_set_watchdog``, where the client asked for it (``setWatchdog``): without a package that sets integer register
      0 for 1/frequency seconds the program ends and the plant is halted as one that takes no commands (Status.FAULT), as
      the real one does without calling it a protective stop.
    - A target that is not finite, or arguments out of range, end the program with a protective stop.

    Args:
        plant: what moves.
        now: a monotonic clock [s], for the watchdog.
    """

    def __init__(self, plant: Plant, now: Callable[[], float] = time.monotonic) -> None:
        self._plant, self._now = plant, now
        limits = plant.robot.limits
        # A position servo is many times stiffer than the spring an MPC plans with: these arms repeat to 0.05 mm.
        plant.stiffen(_STIFFER)
        self._gains = plant.gains
        self._fastest = np.asarray(limits.velocity)
        self._zero = np.zeros(plant.robot.nu)
        self.integers, self.doubles = [0] * NUMBER_OF_REGISTERS, [0.0] * NUMBER_OF_REGISTERS  # inputs
        self.states, self.results = [0] * NUMBER_OF_REGISTERS, [0.0] * NUMBER_OF_REGISTERS  # outputs
        self.running = False
        self.tripped = False  # the watchdog ended it
        self.target, self.speed = plant.state.q.copy(), self._zero  # what the arm is to do: target_q, target_qd
        self._stream = self._done = self._stopping = 0  # the command in progress
        self._silence, self._fed = 0.0, 0.0  # [s], 0: no watchdog
        self._fresh = False
        self._arguments: list[float] = []
        self._aim = self.target

    def start(self) -> None:
        """Begin to run; a plant whose program the watchdog ended takes commands again."""
        if self.tripped:
            self.tripped = False
            self._plant.reset()
        if self._plant.status.usable:
            self.running, self._silence = True, 0.0
            self._stream = self._done = self._stopping = 0
            self.states[STATE], self.states[PROGRESS] = READY, 0

    def end(self) -> None:
        """Stop running; the arm brakes."""
        if self.running:
            self.running, self._stream, self.states[STATE] = False, 0, 0
            self._plant.release()

    def feed(self) -> None:
        """Note that integer register 0 was set."""
        self._fed, self._fresh = self._now(), True

    def cycle(self) -> bool:
        """Run one control period; return whether a motion command came since the last."""
        fresh, self._fresh = self._fresh, False
        if not self._plant.status.usable:
            self.end()
        if not self.running:
            self.target, self.speed = self._plant.state.q.copy(), self._zero
            return False
        if self._silence and self._now() - self._fed > self._silence:
            self.end()
            self.tripped = True
            self._plant.halt(f"RTDE watchdog: no input for {self._silence * 1e3:.0f} ms", Status.FAULT)
            return False
        command = self.integers[0]
        if command in (_SPEED, _SERVO, _TORQUE):
            self.states[STATE] = READY
            self._arguments = list(self.doubles)  # a stream goes on with these: other commands use the same registers
            self._follow(command)
        elif command == 0:
            self._done = 0
            self.states[STATE] = READY
            if self._stream:
                self._follow(self._stream)
        else:
            self._once(command)
        return fresh and self._stream != 0

    def _once(self, command: int) -> None:
        """Run a command that is not of a stream, until it is done."""
        if self._done == command:
            return
        if command in (_SPEED_STOP, _SERVO_STOP, _STOP):
            if self._stopping != command:
                self._stopping, self._stream = command, 0
                self._plant.release()
            if np.abs(self._plant.state.v).max() > _AT_REST:
                return
            self._stopping = 0
        elif command == _WATCHDOG:
            frequency = self.doubles[0]
            self._silence = 1 / frequency if frequency > 0 else 0.0
        elif command == _END:
            self.end()
            return
        else:
            _log.warning("the control program: command %d is not simulated", command)
            self.end()
            return
        self._done, self.states[STATE] = command, DONE

    def _follow(self, command: int) -> None:
        """Put a stream's command in force."""
        if self._stream != command:
            self._stream, self._stopping = command, 0
            self.target, self.speed = self._plant.state.q.copy(), self._plant.state.v.copy()
            if command == _SERVO:
                self.target = np.array(self._arguments[:6])
            self._aim = self._plant.state.q.copy()
        law = {_SERVO: self._servo, _SPEED: self._speed, _TORQUE: self._torque}[command]()
        if law is None or not law.finite():
            self.end()
            self._plant.halt(f"command {command}: an argument out of range", Status.PROTECTIVE_STOP)
            return
        self._plant.command(law)

    def _servo(self) -> JointCommand | None:
        given = self._arguments
        target, lookahead, gain = np.array(given[:6]), given[9], given[10]
        if not (_LOOKAHEAD[0] <= lookahead <= _LOOKAHEAD[1] and _GAIN[0] <= gain <= _GAIN[1] and np.isfinite(target).all()):
            return None
        period = self._plant.period
        change = (target - self.target) / period
        share = min(period / lookahead, 1.0)
        self.speed = (self.speed + (change - self.speed) * share).clip(-self._fastest, self._fastest)
        self.target = target
        # Smoothed as lookahead says, and without lag at constant speed: a target that comes late or twice is no step.
        step = self.speed * period + (target - self._aim) * share
        self._aim = self._aim + step.clip(-self._fastest * period, self._fastest * period)
        return JointCommand(self._aim, self.speed, *self._gains, self._zero)

    def _speed(self) -> JointCommand | None:
        wanted, step = np.array(self._arguments[:6]), self._arguments[6] * self._plant.period
        if not (step > 0 and np.isfinite(wanted).all()):
            return None
        wanted = wanted.clip(-self._fastest, self._fastest)
        before, self.speed = self.speed, self.speed + (wanted - self.speed).clip(-step, step)
        self.target = self.target + 0.5 * (before + self.speed) * self._plant.period
        return JointCommand(self.target, self.speed, *self._gains, self._zero)

    def _torque(self) -> JointCommand | None:
        self.target = self._plant.state.q.copy()
        return JointCommand(self._zero, self._zero, self._zero, self._zero, np.array(self._arguments[:6]))

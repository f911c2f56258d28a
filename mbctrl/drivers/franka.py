"""A Franka arm (FR3) through franky: its C++ loop evaluates the torque law at 1 kHz, this process only changes it."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status

log = logging.getLogger(__name__)
_JOINTS = 7
_PORT = 1337
_OPENING = 3.0  # [s] for the connection: the vendor's client waits without end for a robot that accepts and says nothing
_PARTING = 0.05  # [s] for the robot to see that a client is gone: it takes one at a time
_STARTING = 1.0  # [s] for a motion to start
_POLL = 0.0005  # [s] between two looks at the state while a motion runs
_SETTLING = 20  # states before the first motion, to learn the clocks' offset
_DRIFT = 1e-4  # [s/s], by which two clocks may drift apart: beyond any quartz, below any delay that matters
_UNFILTERED = 1000.0  # [Hz], the cutoff at which libfranka filters nothing
_INSTANTLY = 1e-9  # [s]
_PRIORITY = 60  # of the vendor's control loop, SCHED_FIFO
_STATUS = {
    "Idle": Status.OK,
    "Move": Status.OK,
    "Reflex": Status.PROTECTIVE_STOP,
    "UserStopped": Status.EMERGENCY_STOP,
}


class FrankaDriver(Driver):
    """Feeds JointCommands to franky's joint impedance tracking motion, a C++ loop at the robot's 1 kHz.

    Stiffness, damping, references and feed-forward torque of the law are those of the last command; franky bounds the
    change of torque to 1 N·m a period, and a position error to 0.5 rad. Neither Coriolis nor friction torques are added.
    A pause of this process is survived: the last law stays in force, until no command has come for ``timeout``; then the
    motion is ended as ``stop`` does. A killed process is stopped by the robot, after 20 periods without a command.

    ``tau`` is the measured joint torque and includes gravity; ``gravity`` is that of the model the robot sends, for the
    measured positions. ``seq`` is the robot's time in milliseconds. A motion that ended stays so, and commands are dropped,
    until the driver is opened again; where it was not ``stop`` that ended it, the status is not OK. ``reason`` says why.

    Args:
        robot: seven joints.
        host: the robot's address.
        epoch: subtracted from every stamp [s], of time.monotonic().
        timeout: how long the last command stays in force [s].
        recover: let ``open`` clear a reflex; else it refuses.
        torque_threshold, force_threshold: external torque [N·m] and force [N] at which the arm stops itself.
        realtime: insist on a real-time kernel.
    """

    def __init__(
        self,
        robot: Robot,
        host: str = "127.0.0.1",
        *,
        epoch: float = 0.0,
        timeout: float = 0.1,
        recover: bool = False,
        torque_threshold: float = 20.0,
        force_threshold: float = 30.0,
        realtime: bool = False,
    ) -> None:
        if robot.nu != _JOINTS or robot.nq != _JOINTS:
            raise DriverError(f"expected {_JOINTS} driven joints, found {robot.nu} of {robot.nq}", file=robot.path, key="joints")
        self.host, self.epoch, self.timeout, self.recover = host, epoch, timeout, recover
        self.reason = ""  # why the motion ended, in the vendor's words
        self._thresholds, self._realtime = (torque_threshold, force_threshold), realtime
        self._holding = np.asarray(robot.control.stiffness), np.asarray(robot.control.damping)
        self._franky: Any = None
        self._robot: Any = None
        self._motion: Any = None
        self._reader: threading.Thread | None = None
        self._state: RobotState | None = None
        self._leave, self._moving, self._stopped, self._clock = threading.Event(), False, False, _Clock()
        self._written: float | None = None

    def open(self) -> None:
        """Connect, and hold the arm where it is.

        Errors:
            DriverError: nothing listens, another client is connected, the robot is not ready.
            ExtraError: franky is not installed.
        """
        self.close()
        self._franky = need("franky", "franka", "driver 'franka'")
        self._leave.clear()
        self._clock, self._state, self._written, self.reason = _Clock(), None, None, ""
        self._robot = self._connect()
        atexit.register(self.close)  # the vendor's threads must not outlive the interpreter
        try:
            self._prepare()
            self._start()
        except Exception as error:
            self.close()
            raise error if isinstance(error, DriverError) else self._error(error) from None
        self._reader = threading.Thread(target=self._read_on, name="franka", daemon=True)
        self._reader.start()

    def read(self) -> RobotState:
        """Return the newest measurement, taken by another thread: never waits."""
        if self._state is None:
            raise self._error("not open")
        return self._state

    def write(self, command: JointCommand) -> None:
        """Put a law in force; dropped while the robot takes no commands, which the status says."""
        if not command.finite():
            raise self._error("a command is not finite; refused")
        if self._state is None:
            raise self._error("not open")
        if not self._moving:
            return
        gains = command.stiffness, command.damping
        try:
            if not all(np.array_equal(new, old) for new, old in zip(gains, self._gains)):
                # Between the two calls the loop may run: a joint without stiffness has no reference that means anything.
                between = np.where(command.stiffness == 0, self._reference, command.q_ref)
                self._refer(between, command)
                self._motion.set_gains(self._franky.JointImpedanceGains(*gains))
                self._gains = tuple(part.copy() for part in gains)
            self._refer(command.q_ref, command)
        except ValueError as error:  # a negative gain
            raise self._error(error) from None
        self._written = time.monotonic()

    def stop(self) -> None:
        """End the motion by damping the arm to rest; the robot's own controller holds it then. Reading goes on."""
        if self._robot is None or not self._moving:
            return
        self._moving, self._stopped = False, True
        try:
            self._damp()
            if not self._robot.join_motion(timeout=1.5):
                log.warning("%s", self._error("the arm did not come to rest within 1.5 s"))
        except Exception as error:  # whatever the vendor's loop died of: the motion has ended
            log.warning("%s", self._error(error))

    def close(self) -> None:
        """Stop, and disconnect; the last measurement stays."""
        self.stop()
        self._leave.set()
        if self._reader is not None:
            self._reader.join(3.0)
        if self._robot is not None:
            atexit.unregister(self.close)
            self._reader = self._motion = self._robot = None
            time.sleep(_PARTING)

    def _refer(self, q: np.ndarray, command: JointCommand) -> None:
        self._motion.set_reference(self._franky.JointReference(q=q, dq=command.v_ref, tau_ff=command.torque))
        self._reference = q

    def _connect(self) -> Any:
        """Return the vendor's robot, made in a thread, as its constructor may never return."""
        result: list[Any] = []
        config = self._franky.RealtimeConfig
        torque, force = self._thresholds

        def connect() -> None:
            kernel = config.Enforce if self._realtime else config.Ignore
            try:
                result.append(self._franky.Robot(self.host, 1.0, torque, force, realtime_config=kernel))
            except Exception as error:  # handed to the opening thread, whatever it is
                result.append(error)

        thread = threading.Thread(target=connect, name="franka-open", daemon=True)
        thread.start()
        thread.join(_OPENING)
        if not result:
            raise self._error(f"no answer within {_OPENING:g} s")
        if isinstance(result[0], Exception):
            raise self._error(result[0])
        return result[0]

    def _prepare(self) -> None:
        """Check that the robot is ready, and learn how its clock stands to ours."""
        state = self._robot.state
        if state.robot_mode.name == "Reflex" and self.recover:
            log.warning("%s", self._error(f"recovering from {state.last_motion_errors}"))
            self._robot.recover_from_errors()
            state = self._robot.state
        if state.robot_mode.name != "Idle":
            raise self._error(f"robot mode {state.robot_mode.name} {state.current_errors}; expected Idle")
        for _ in range(_SETTLING):
            self._keep(self._robot.state, time.monotonic())
        if not (np.isfinite(self._state.q).all() and np.isfinite(self._state.v).all()):
            raise self._error("the measured state is not finite")

    def _start(self) -> None:
        """Start the motion at the measured position, and wait until the robot says that it moves."""
        franky = self._franky
        self._gains = self._holding
        self._motion = franky.JointImpedanceTrackingMotion(
            stiffness=self._gains[0], damping=self._gains[1], compensate_coriolis=False, gains_time_constant=_INSTANTLY
        )
        self._motion.set_reference(franky.JointReference(q=self._state.q))
        self._reference = self._state.q
        with _urgent():  # the control loop's thread is made here and inherits the priority; franky sets none without an RT kernel
            self._robot.move(self._motion, asynchronous=True, cutoff_frequency=_UNFILTERED)
        deadline = time.monotonic() + _STARTING
        while self._robot.state.robot_mode.name != "Move":
            self._robot.poll_motion()  # raises what the robot refused it for
            if time.monotonic() > deadline:
                raise self._error(f"the motion did not start within {_STARTING:g} s")
            time.sleep(_POLL)
        self._moving, self._stopped = True, False

    def _read_on(self) -> None:
        """Keep the newest state, and end a motion nobody commands: the reader's thread."""
        running = True
        try:
            while not self._leave.is_set():
                if running and not self._robot.is_in_control:
                    running = self._moving = False
                    self._say_why()
                self._keep(self._robot.state, time.monotonic())
                if running:
                    self._watch()
                    time.sleep(_POLL)  # without a motion the vendor's call itself waits for a packet
        except Exception as error:  # whatever it is, nothing comes any more: the last stamp grows old
            self.reason = self.reason or " ".join(str(error).split())
            log.warning("%s", self._error(error))

    def _say_why(self) -> None:
        """Log what ended the motion, unless its end was wanted."""
        try:
            self._robot.poll_motion()
        except Exception as error:  # whatever the vendor's loop died of, also of our numbers
            self.reason = " ".join(str(error).split())
            log.warning("%s", self._error(error))

    def _watch(self) -> None:
        written = self._written
        if self._moving and written is not None and time.monotonic() - written > self.timeout:
            self._moving = False
            self.reason = f"no command for {self.timeout:g} s"
            log.warning("%s", self._error(f"{self.reason}: motion ended"))
            self._damp()

    def _damp(self) -> None:
        motion = self._franky.TorqueStopMotion(self._holding[1], ramp_duration=0.05, max_duration=1.0, compensate_coriolis=False)
        self._robot.move(motion, asynchronous=True, cutoff_frequency=_UNFILTERED)

    def _keep(self, state: Any, arrival: float) -> None:
        """Make a vendor's state the newest measurement."""
        number, last = state.time.to_msec(), self._state
        status = _STATUS.get(state.robot_mode.name, Status.FAULT)
        if self._motion is not None and not (self._moving or self._stopped) and status.usable:
            status = Status.FAULT  # the robot is well, but follows no command
        if last is not None and (last.seq, last.status) == (number, status):
            return
        stamp = self._clock.stamp(1e-3 * number, arrival) - self.epoch
        gravity = self._robot.model.gravity(state)
        self._state = RobotState(stamp, number, state.q, state.dq, state.tau_J, gravity, status)

    def _error(self, what: object) -> DriverError:
        return DriverError(f"{what}", key=f"franka {self.host}:{_PORT}")


class _Clock:
    """Brings the robot's time to ours: what arrived with the least delay so far tells how the two clocks stand."""

    def __init__(self) -> None:
        self._offset, self._time, self._stamp = np.inf, 0.0, -np.inf

    def stamp(self, time: float, arrival: float) -> float:
        """Return the robot's ``time`` [s], of what arrived at ``arrival`` [s], on the clock of the arrivals; never decreases."""
        if time != self._time:
            self._offset = min(self._offset + _DRIFT * (time - self._time), arrival - time)
            self._time, self._stamp = time, max(time + self._offset, self._stamp)
        return self._stamp


@contextmanager
def _urgent() -> Iterator[None]:
    """Run this thread, and the threads it makes, in real time where that is allowed."""
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except OSError as error:
        log.warning("the 1 kHz loop runs without real-time priority (%s): a busy machine will lose the robot", error.strerror)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)

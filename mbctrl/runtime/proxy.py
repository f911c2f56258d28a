"""A driver in a process of its own: a vendor's client that hangs, crashes or holds the interpreter does so there."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status
from mbctrl.runtime.process import answer, quiet_start, steady
from mbctrl.runtime.realtime import AbsoluteClock, RealTime, name_process
from mbctrl.runtime.shared import Mailbox, private_folder

logger = logging.getLogger(__name__)

_STATUSES = tuple(Status)
_POLLS = 4  # looks a control period: what waits in a mailbox waits a quarter of a period, or
_LOOK = 5e-4  # [s]: more looks would cost a core's third in waking up alone
_PATIENCE = 5  # [periods] without a sign of life after which the other side is given up
_LEAST_PATIENCE = 0.02  # [s], what ordinary scheduling takes at worst: five periods of a 1 kHz arm are less
_STOP_LIMIT = 10  # [s] a driver's stop may take before its process is ended
_BEAT = np.dtype([("beat", "f8"), ("stop", "u1")])
_PARTS = ("q_ref", "v_ref", "stiffness", "damping", "torque")


def _state_type(robot: Robot) -> np.dtype:
    nq, nu = (robot.nq,), (robot.nu,)
    vectors = [("q", "f8", nq), ("v", "f8", nq), ("tau", "f8", nu), ("gravity", "f8", nu)]
    return np.dtype([("beat", "f8"), ("stamp", "f8"), ("seq", "i8"), *vectors, ("status", "u1"), ("ended", "u1")])


def _command_type(robot: Robot) -> np.dtype:
    return np.dtype((np.float64, (len(_PARTS), robot.nu)))


@dataclass(frozen=True)
class _Job:
    """What the child is told; everything in it can be pickled."""

    robot: Robot
    make: Callable[..., Driver]
    args: tuple[Any, ...]
    options: dict[str, Any]
    realtime: RealTime
    silence: float  # [s]
    folder: Path
    parent: int = field(default_factory=os.getpid)


class _Boxes:
    """Both sides' view of the three mailboxes: states up, commands and signs of life down."""

    def __init__(self, folder: Path, robot: Robot) -> None:
        self.states = Mailbox(folder / "state", _state_type(robot))
        self.commands = Mailbox(folder / "command", _command_type(robot))
        self.beats = Mailbox(folder / "beat", _BEAT)
        self._state, self._beat = np.zeros((), self.states.dtype), np.zeros((), self.beats.dtype)
        self._command = np.zeros((len(_PARTS), robot.nu))

    def beat(self, stop: bool = False) -> None:
        self._beat["beat"], self._beat["stop"] = time.monotonic(), stop
        self.beats.write(self._beat)

    def command(self, command: JointCommand) -> bool:
        if not command.finite():
            return False
        for row, part in enumerate(_PARTS):
            self._command[row] = getattr(command, part)
        self.commands.write(self._command)
        return True

    def publish(self, state: RobotState | None, ended: bool = False) -> None:
        record = self._state
        if state is not None:
            for name in ("stamp", "seq", "q", "v", "tau", "gravity"):
                record[name] = getattr(state, name)
            record["status"] = _STATUSES.index(state.status)
        record["beat"], record["ended"] = time.monotonic(), ended
        self.states.write(record)

    def close(self) -> None:
        for box in (self.states, self.commands, self.beats):
            box.close()


class DriverProcess(Driver):
    """Runs another driver in a process of its own and is a driver itself; ``read`` and ``write`` never wait.

    The child writes and reads its driver up to four times a control period. It stops its driver by itself when this process is
    gone, or when after the first command neither ``read`` nor ``write`` was called for ``silence``; that is an error, and
    final. A child that fails or dies makes ``read`` and ``write`` raise DriverError with what it said.

    Must not be opened in a daemonic process of ``multiprocessing``: those may not have children.

    Args:
        robot: sizes and control rate.
        make: what makes the driver in the child, called as ``make(*args, **options)``; all three must be picklable.
        realtime: the child's settings; ``notes`` says what was not permitted.
        silence: [s]; None: five control periods, and 20 ms at least.
        patience: how long ``open`` may take [s].
    """

    def __init__(
        self,
        robot: Robot,
        make: Callable[..., Driver],
        args: tuple[Any, ...] = (),
        options: dict[str, Any] | None = None,
        *,
        realtime: RealTime = RealTime(),
        silence: float | None = None,
        patience: float = 60.0,
    ) -> None:
        self._silence = max(_PATIENCE / robot.control.rate, _LEAST_PATIENCE) if silence is None else silence
        self._robot, self._patience = robot, patience
        self._what = (robot, make, args, options or {}, realtime, self._silence)
        self.notes: list[str] = []
        self._boxes: _Boxes | None = None
        self._process: Any = None
        self._failed: DriverError | None = None

    @property
    def alive(self) -> bool:
        """Whether the driver's process runs."""
        return self._process is not None and self._process.is_alive()

    def open(self) -> None:
        """Start the process and wait until its driver is open; raises what that raised."""
        self.stop()
        self._failed, self._number = None, 0
        self._folder = private_folder()
        self._clear = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # at exit too
        try:
            self._boxes = _Boxes(self._folder, self._robot)
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            job = _Job(*self._what, self._folder)
            self._process = context.Process(target=_serve, args=(theirs, job), daemon=True, name="mbctrl driver")
            quiet_start(self._process)
            theirs.close()
            if not self._pipe.poll(self._patience):
                raise DriverError(f"did not open within {self._patience:g} s", key="driver")
            self.senses_torque, self.follows, self.notes = self._receive()
        except BaseException:
            self.stop()
            raise

    def read(self) -> RobotState:
        """Return the newest measurement; never waits."""
        boxes = self._usable()
        boxes.beat()
        if boxes.states.number != self._number and (got := boxes.states.read()) is not None:
            self._number, record = got
            self._beat, ended = float(record["beat"]), bool(record["ended"])
            vectors = (record[name] for name in ("q", "v", "tau", "gravity"))
            self._state = RobotState(float(record["stamp"]), int(record["seq"]), *vectors, _STATUSES[record["status"]])
            if ended:
                self._look()
        if time.monotonic() - self._beat > self._silence:
            self._look()
        return self._state

    def write(self, command: JointCommand) -> None:
        """Hand a command over; DriverError where it is not finite or the driver's process has failed."""
        boxes = self._usable()
        if not boxes.command(command):
            raise DriverError("a command that is not finite", key="driver")
        boxes.beat()

    def stop(self) -> None:
        """Have the driver stopped and end its process: asked, then terminated, then killed."""
        if self._boxes is None:
            return
        self._boxes.beat(stop=True)
        if self._process is not None and self._process.pid is not None:
            self._end()
        self._boxes.close()
        self._boxes = None
        self._clear()

    def _end(self) -> None:
        process = self._process
        process.join(_STOP_LIMIT / 2)
        for end in (process.terminate, process.kill):
            if process.is_alive():
                logger.warning("the driver's process does not stop: ending it")
                end()
                process.join(_STOP_LIMIT / 2)
        try:
            while self._pipe.poll():
                if isinstance(said := self._pipe.recv(), DriverError) and self._failed is None:
                    logger.error("the driver on its way out: %s", said)
        except (EOFError, OSError):
            pass
        self._pipe.close()

    def _usable(self) -> _Boxes:
        if self._failed is not None:
            raise self._failed.with_traceback(None)  # raised again and again, it would grow by every one
        if self._boxes is None:
            raise DriverError("is not open", key="driver")
        return self._boxes

    def _look(self) -> None:
        """Raise if the child has said that it failed, or has died; a child that is merely late shows in the stamps' age."""
        if self._pipe.poll() or not self._process.is_alive():
            self._receive()

    def _receive(self) -> Any:
        try:
            said = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(1)
            self._failed = DriverError(f"its process died ({_cause(self._process.exitcode)})", key="driver")
            raise self._failed from None
        if isinstance(said, DriverError):
            self._failed = said
        if isinstance(said, BaseException):
            raise said
        return said


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(pipe: Connection, job: _Job) -> None:
    """Run the child: open the driver, pass states and commands on, and stop it however this ends."""
    name_process("mbctrl driver")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    code = 1
    try:
        boxes = _Boxes(job.folder, job.robot)
        answer(pipe, "driver", lambda: _drive(pipe, job, boxes))
        boxes.publish(None, ended=True)
        code = 0
    except SystemExit:
        code = 0
    finally:
        if os.getppid() != job.parent:  # nobody else is left to clear up
            shutil.rmtree(job.folder, ignore_errors=True)
        pipe.close()
        logging.shutdown()
        sys.stdout.flush()
        # The driver is stopped and all is said. What is left are vendors' threads and destructors, and those may wait for a
        # robot that will never answer.
        os._exit(code)


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the stop under way must not be cut off
    raise SystemExit(0)


def _drive(pipe: Connection, job: _Job, boxes: _Boxes) -> None:
    notes = job.realtime.apply()
    driver = job.make(*job.args, **job.options)
    try:
        driver.open()
        boxes.publish(driver.read())
        pipe.send((driver.senses_torque, driver.follows, notes))
        with steady():
            _exchange(driver, job, boxes)
    finally:
        signal.alarm(_STOP_LIMIT)  # a stop that hangs ends the process: the robot's own watchdog is left to act
        driver.stop()
        signal.alarm(0)


def _exchange(driver: Driver, job: _Job, boxes: _Boxes) -> None:
    """Pass on until told to stop; DriverError when the control side has gone or fallen silent."""
    period = 1 / job.robot.control.rate
    clock, step = AbsoluteClock(), max(period / _POLLS, min(_LOOK, period))
    tick, taken, looked, told = 0, 0, 0.0, None
    while True:
        clock.wait_until(tick * step)
        tick = max(tick, int(clock.now() / step)) + 1
        if boxes.commands.number != taken and (got := boxes.commands.read()) is not None:
            taken, record = got
            driver.write(JointCommand(*record))
        state = driver.read()
        due = (now := clock.now()) - looked >= period  # once a period; what is new is passed on at once
        if due or state is not told:
            boxes.publish(state)
            told = state
        if due:
            looked = now
            if os.getppid() != job.parent:
                raise DriverError("the control process is gone", key="driver")
            beat = boxes.beats.read()
            if beat is not None and beat[1]["stop"]:
                return
            if taken and beat is not None and (silence := time.monotonic() - beat[1]["beat"]) > job.silence:
                raise DriverError(f"the control process was silent for {silence * 1e3:.0f} ms: stopped by itself", key="driver")

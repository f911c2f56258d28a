"""A driver without a robot: it does what it is told, tells a file what was done to it, and fails on request."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status


class FakeDriver(Driver):
    """Its position is the last commanded one; ``fault`` says what goes wrong, and when."""

    senses_torque = False

    def __init__(self, nq: int, diary: Path, fault: str = "", *, epoch: float = 0.0) -> None:
        self._nq, self._diary, self._fault, self._epoch = nq, diary, fault, epoch
        self._command: JointCommand | None = None
        self._seq = 0

    def open(self) -> None:
        self._note("open")
        if self._fault == "open":
            raise DriverError("refused the connection", key="port 30004")
        if self._fault == "bug":
            raise KeyError("a vendor's bug")
        if self._fault == "never":
            time.sleep(60)

    def read(self) -> RobotState:
        if self._command is not None and self._fault == "read":
            raise DriverError("lost the connection", key="port 30004")
        if self._command is not None and self._fault == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        self._seq += 1
        zero, q = np.zeros(self._nq), np.zeros(self._nq) if self._command is None else self._command.q_ref
        status = Status.PROTECTIVE_STOP if self._fault == "status" else Status.OK
        return RobotState(time.monotonic() - self._epoch, self._seq, q, zero + 1, zero + 2, zero + 3, status)

    def write(self, command: JointCommand) -> None:
        if self._command is None:
            self._note("command")
        self._command = command

    def stop(self) -> None:
        self._note("stop")
        if self._fault == "stop":
            time.sleep(60)

    def _note(self, what: str) -> None:
        with open(self._diary, "a", encoding="utf-8") as file:
            file.write(what + "\n")

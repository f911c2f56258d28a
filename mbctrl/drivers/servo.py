"""Arms of Dynamixel X-series servos on one serial bus: position commands, protocol 2.0.

Addresses and units: ROBOTIS e-Manual, XM430-W350, control table; the same for the X series. The bus is asked and answers,
so a measurement is as old as its request and is stamped with that. On a USB adapter of FTDI the kernel's latency timer of
16 ms limits the rate: ``echo 1 > /sys/bus/usb-serial/devices/ttyUSB0/latency_timer``.
"""

from __future__ import annotations

import fcntl
import logging
import struct
import termios
import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status

logger = logging.getLogger(__name__)

_MODE, _HIGHEST, _LOWEST, _TORQUE, _ERRORS = 11, 48, 52, 64, 70  # addresses
_GAIN_D, _GAIN_P, _WATCHDOG, _GOAL = 80, 84, 98, 116
_PRESENT = 126  # current (2 bytes), velocity (4), position (4)
_STATE = struct.Struct("<hii")
_VELOCITY = 0.229 * 2 * np.pi / 60  # [rad/s] a tick
_WATCHDOG_UNIT = 0.02  # [s]
_POSITION_MODES = {3: "position", 4: "extended position", 5: "current-based position"}
_ALERT = 0x80  # bit of a status packet's error byte
_FAILURES = {1: "input voltage", 4: "overheating", 8: "motor encoder", 16: "electrical shock", 32: "overload"}
_GONE = (OSError, termios.error)  # the serial package lets the second through, which is not of the first's kind
_TRIES = 3  # failed readings in a row that end it: a byte lost now and then is in the nature of the bus
_WAIT = 0.002  # [s] a read of the port sleeps at most; the vendor's client would spin


class ServoDriver(Driver):
    """Dynamixel X-series servos, one a joint, in position mode; gains are the servos' own.

    A command's ``q_ref`` is sent; its torque, speed and gains are not. ``read`` asks the bus when the last answer is older
    than a period and takes the milliseconds the bus takes: run it in a process of its own. A servo in alarm is
    ``Status.FAULT``; one that does not answer three times in a row, or a bus that is gone, is a DriverError that names it.

    Args:
        robot: joints in order, limits, rate; every joint is a servo.
        host: unused: the bus is on this machine.
        epoch: ``time.monotonic()`` at the loop's time 0.
        port: the serial device.
        baudrate: of the bus [bit/s].
        ids: one a joint; None: 1, 2, ….
        zeros: (nq,) ticks at 0 rad; None: half a turn, the middle of a servo's range.
        signs: (nq,) +1 or -1; None: +1.
        ticks_per_turn: of the encoder.
        gains: the registers (position P, position D) of every servo; None leaves them.
        torque_constants: (nq,) [N·m/A] for ``tau``, after the servo's own gear; None: ``tau`` is 0.
        ampere_per_tick: [A]; 2.69 mA on XM and XH servos, 1 mA on XL330.
        reply: how long to wait for a servo's answer [s]; None: the vendor's client's 34 ms and the time on the wire.
        watchdog: after this long without a word from here the servos stop by themselves [s]; None: never.
        at_stop: what ``stop`` leaves: "hold" where they are, or "off": without torque, an arm falls.
    """

    senses_torque = False
    follows = "position"

    def __init__(
        self,
        robot: Robot,
        host: str = "127.0.0.1",
        *,
        epoch: float = 0.0,
        port: str = "/dev/ttyUSB0",
        baudrate: int = 1_000_000,
        ids: Sequence[int] | None = None,
        zeros: Sequence[float] | None = None,
        signs: Sequence[int] | None = None,
        ticks_per_turn: int = 4096,
        gains: tuple[int, int] | None = None,
        torque_constants: Sequence[float] | None = None,
        ampere_per_tick: float = 2.69e-3,
        reply: float | None = None,
        watchdog: float | None = 0.1,
        at_stop: Literal["hold", "off"] = "hold",
    ) -> None:
        n = robot.nq
        if robot.nu != n:
            raise DriverError(f"every joint must be a servo: {robot.nu} of {n} joints take commands", key="servo")
        self._robot, self._epoch, self._device, self._baudrate = robot, epoch, port, baudrate
        self._ids = tuple(range(1, n + 1)) if ids is None else tuple(ids)
        self._zeros = np.full(n, ticks_per_turn / 2) if zeros is None else np.asarray(zeros, float)
        self._signs = np.ones(n) if signs is None else np.asarray(signs, float)
        constants = np.zeros(n) if torque_constants is None else np.asarray(torque_constants, float)
        for key, found in (("ids", self._ids), ("zeros", self._zeros), ("signs", self._signs), ("torque_constants", constants)):
            if len(found) != n:
                raise DriverError(f"expected {n} values, one a joint, found {len(found)}", key=f"servo.{key}")
        if not (np.abs(self._signs) == 1).all() or len(set(self._ids)) != n:
            raise DriverError(f"expected signs of +1 or -1 and {n} different ids, found {signs} and {ids}", key="servo")
        if at_stop not in ("hold", "off"):
            raise DriverError(f"expected hold or off, found {at_stop}", key="servo.at_stop")
        self._scale = self._signs * 2 * np.pi / ticks_per_turn  # [rad] a tick
        self._torque = self._signs * constants * ampere_per_tick  # [N·m] a tick
        self._gains, self._at_stop, self._reply = gains, at_stop, reply
        self._watchdog = 0 if watchdog is None else min(max(round(watchdog / _WATCHDOG_UNIT), 1), 127)
        self._period = 0.9 / robot.control.rate  # asked a little early rather than a period late
        self._port: Any = None

    def open(self) -> None:
        """Find every servo, check it, and switch its torque on where it stands.

        Errors:
            ExtraError: without dynamixel-sdk.
            DriverError: naming the port, or the servo and its joint.
        """
        self._sdk = need("dynamixel_sdk", "servo", "a Dynamixel bus")
        self._packets = self._sdk.PacketHandler(2.0)
        self._connect()
        try:
            self._seq, self._failed, self._due = 0, 0, 0.0
            for joint in range(len(self._ids)):
                self._check(joint)
            self._reading = self._sdk.GroupSyncRead(self._port, self._packets, _PRESENT, _STATE.size)
            self._goals = self._sdk.GroupSyncWrite(self._port, self._packets, _GOAL, 4)
            for number in self._ids:
                self._reading.addParam(number)
                self._goals.addParam(number, [0] * 4)
            self._state = self._measure()
            for joint in range(len(self._ids)):
                self._prepare(joint)
        except BaseException:
            self.stop()
            raise

    def read(self) -> RobotState:
        """Return the newest measurement, asked for when the last one is a period old."""
        now = time.monotonic()
        if self._port is None:
            raise DriverError("is not open", key=self._device)
        if now < self._due:
            return self._state
        self._due = now + self._period
        try:
            self._state = self._measure()
            self._failed = 0
        except DriverError:
            self._failed += 1
            if self._failed >= _TRIES or not self._plugged:
                raise
        return self._state

    def write(self, command: JointCommand) -> None:
        """Send ``q_ref``; what is not finite is refused."""
        if not command.finite():
            raise DriverError("a command that is not finite", key=self._device)
        if self._port is None:
            raise DriverError("is not open", key=self._device)
        self._send(command.q_ref)

    def stop(self) -> None:
        """Leave the servos as ``at_stop`` says and close the port; what fails is logged."""
        port, self._port = self._port, None
        if port is None:
            return
        port.is_using = False  # a transaction that a signal broke off leaves it set
        for number, joint in zip(self._ids, self._robot.joints):
            try:
                goal, result, _ = self._packets.read4ByteTxRx(port, number, _PRESENT + 6)
                if self._at_stop == "off":
                    result, _ = self._packets.write1ByteTxRx(port, number, _TORQUE, 0)
                elif result == 0:
                    self._packets.write1ByteTxRx(port, number, _WATCHDOG, 0)
                    result, _ = self._packets.write4ByteTxRx(port, number, _GOAL, goal)
                if result != 0:
                    logger.error("servo %d (%s) did not take the stop: %s", number, joint, self._said(result))
            except _GONE as error:
                logger.error("%s: the servos were not told to stop: %s", self._device, _reason(error))
                break
        port.closePort()

    def _connect(self) -> None:
        port = self._sdk.PortHandler(self._device)
        port.getCurrentTime = lambda: time.monotonic() * 1e3  # its time-outs would follow the wall clock
        try:
            if not port.setBaudRate(self._baudrate):
                raise DriverError(f"a baud rate of {self._baudrate} is not known", key=self._device)
            fcntl.flock(port.ser.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            port.closePort()
            raise DriverError("is in use by another process", key=self._device) from None
        except _GONE as error:
            raise DriverError(f"cannot be opened: {_reason(error)}", key=self._device) from None
        port.ser.timeout = _WAIT
        if self._reply is not None:
            port.setPacketTimeout = lambda length: port.setPacketTimeoutMillis(self._reply * 1e3)
        self._port, self._plugged = port, True

    def _check(self, joint: int) -> None:
        """Refuse a servo that is missing, in alarm, in another mode, or narrower than the robot's limits."""
        mode = self._get(joint, _MODE, 1)
        if mode not in _POSITION_MODES:
            known = ", ".join(f"{number} ({name})" for number, name in _POSITION_MODES.items())
            raise DriverError(f"operating mode {mode}, expected {known}; set it with Dynamixel Wizard", key=self._name(joint))
        if errors := self._get(joint, _ERRORS, 1):
            raise DriverError(f"in alarm: {_alarm(errors)}; reboot it", key=self._name(joint))
        if mode == 3:
            low, high = sorted(self._ticks(joint, limit) for limit in (self._low(joint), self._high(joint)))
            lowest, highest = self._get(joint, _LOWEST, 4), self._get(joint, _HIGHEST, 4)
            if low < lowest or high > highest:
                found = f"the joint's limits are {low} to {high} ticks, the servo's own {lowest} to {highest}"
                raise DriverError(f"{found}: check zeros and signs", key=self._name(joint))

    def _prepare(self, joint: int) -> None:
        self._set(joint, _WATCHDOG, 1, 0)  # one that has gone off refuses goals until it is cleared
        self._set(joint, _GOAL, 4, self._get(joint, _PRESENT + 6, 4))  # where it stands is the first command
        for address, value in zip((_GAIN_P, _GAIN_D), self._gains or ()):
            self._set(joint, address, 2, value)
        self._set(joint, _TORQUE, 1, 1)
        self._set(joint, _WATCHDOG, 1, self._watchdog)

    def _measure(self) -> RobotState:
        stamp = time.monotonic() - self._epoch
        rows, status = np.zeros((len(self._ids), 3)), Status.OK
        try:
            self._ensure(self._reading.txPacket(), None)
            for joint, number in enumerate(self._ids):  # not the group's own: it drops the alarms, and whose answer failed
                data, result, error = self._packets.readRx(self._port, number, _STATE.size)
                self._ensure(result, joint)
                rows[joint] = _STATE.unpack(bytes(data))
                if error & _ALERT:
                    status = Status.FAULT
        except _GONE as error:
            raise self._gone(error) from None
        current, velocity, position = rows.T
        self._seq += 1
        q, v = (position - self._zeros) * self._scale, velocity * _VELOCITY * self._signs
        return RobotState(stamp, self._seq, q, v, current * self._torque, np.zeros(len(q)), status)

    def _send(self, q: np.ndarray) -> None:
        ticks = np.rint(q / self._scale + self._zeros).astype(np.int64)
        for number, tick in zip(self._ids, ticks):
            self._goals.changeParam(number, list(struct.pack("<i", tick)))
        try:
            self._ensure(self._goals.txPacket(), None)
        except _GONE as error:
            raise self._gone(error) from None

    def _get(self, joint: int, address: int, size: int) -> int:
        try:
            data, result, _ = self._packets.readTxRx(self._port, self._ids[joint], address, size)
        except _GONE as error:
            raise self._gone(error) from None
        self._ensure(result, joint)
        return int.from_bytes(bytes(data), "little", signed=size == 4)

    def _set(self, joint: int, address: int, size: int, value: int) -> None:
        try:
            result, error = self._packets.writeTxRx(
                self._port, self._ids[joint], address, size, list(value.to_bytes(size, "little", signed=size == 4))
            )
        except _GONE as problem:
            raise self._gone(problem) from None
        self._ensure(result, joint)
        if error & ~_ALERT:
            said = self._packets.getRxPacketError(error).partition("] ")[2]
            raise DriverError(f"refused {value} at address {address}: {said}", key=self._name(joint))

    def _ensure(self, result: int, joint: int | None) -> None:
        if result != 0:
            self._port.is_using = False
            raise DriverError(self._said(result), key=self._device if joint is None else self._name(joint))

    def _said(self, result: int) -> str:
        known = {-3001: "does not answer: power, cable, id, baud rate?", -3002: "answers with a damaged packet"}
        return f"{known.get(result) or self._packets.getTxRxResult(result).partition('] ')[2]} ({result})"

    def _gone(self, error: Exception) -> DriverError:
        self._plugged, self._port.is_using = False, False
        return DriverError(f"the bus is gone: {_reason(error)}", key=self._device)

    def _name(self, joint: int) -> str:
        return f"{self._device}: servo {self._ids[joint]} ({self._robot.joints[joint]})"

    def _ticks(self, joint: int, angle: float) -> int:
        return round(angle / self._scale[joint] + self._zeros[joint])

    def _low(self, joint: int) -> float:
        return self._robot.limits.position_lower[joint]

    def _high(self, joint: int) -> float:
        return self._robot.limits.position_upper[joint]


def _alarm(errors: int) -> str:
    return ", ".join(name for bit, name in _FAILURES.items() if errors & bit) or f"error {errors}"


def _reason(error: Exception) -> str:
    """Return an error's text without its number."""
    return getattr(error, "strerror", None) or str(error.args[-1] if error.args else error)

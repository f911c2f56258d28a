"""A Universal Robots arm through ur-rtde (SDU Robotics), e-Series and later."""

from __future__ import annotations

import logging
import re
import socket
import struct
import threading
import time
from typing import Any, Literal

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status

_log = logging.getLogger(__name__)
DASHBOARD_PORT, SCRIPT_PORT, RTDE_PORT = 29999, 30003, 30004  # hard-coded in the client
# [N·m/A] The vendor publishes no torque constants: a round figure of the right order, for display and nothing else.
TORQUE_PER_AMPERE = 10.0
# Read as one package, which the client takes over at once.
_VARIABLES = (
    "timestamp actual_q actual_qd actual_current target_moment robot_mode safety_status_bits runtime_state robot_status_bits"
)
_PATIENCE = 0.7  # [s] for each answer of the controller before the client is let loose on it
_DRIFT = 1e-4  # of the robot's clock against the host's: the smallest delay seen is believed less as time goes by
_STOP_WAIT = 1.0  # [s]
_STALE, _LOST = 0.1, 0.5  # [s] of silence: the client's blocking calls would block; the link is given up
_DECELERATION = 10.0  # [rad/s²] of servoStop
_PLAYING, _RUNNING = 2, 7  # runtime_state, robot_mode
_PROTECTIVE, _EMERGENCY, _NORMAL = 0b10100, 0b11100000, 0b11  # safety_status_bits: 2 and 4; 5, 6, 7; 0 and 1 (reduced)


class UrDriver(Driver):
    """An arm under ur-rtde's servoJ or direct torque.

    ``servoj`` takes position references. A torque beside the reference, the gate's doing, becomes a shift of the reference
    by torque/stiffness, which is the same law for an arm of that stiffness; speed references are the arm's own business.
    ``torque`` computes the command's law at the newest measurement and sends the torque (PolyScope 5.26 or later).

    The client is not to be trusted with: numbers that are not finite, which it sends; answers about the link, which are
    yes while it is dead; a controller that accepts and says nothing, for which its constructor waits for ever with the
    interpreter's lock in its hand. So numbers are checked here, health is the age of the robot's stamp, and ``open`` asks
    the controller for a data package itself before it lets the client try.

    After 2.5 s of silence the client reconnects by itself, uploads its program anew, without a watchdog, and more often
    than not brings the process down; nothing here can keep it from that. So after half a second of silence nothing more is
    sent: ``write`` raises, and measurements that come again are FAULT, until ``open``. Whoever runs the driver had better
    end its process then and start another.

    Args:
        robot: six joints.
        host: the controller.
        epoch: the loop's time 0 on time.monotonic() [s].
        mode: how commands are sent.
        lookahead: of servoJ, 0.03 to 0.2 [s]; smooths.
        gain: of servoJ, 100 to 2000; stiffens.
        watchdog: [Hz]; 100 is five periods of 500 Hz.
    """

    senses_torque = False

    def __init__(
        self,
        robot: Robot,
        host: str = "127.0.0.1",
        *,
        epoch: float = 0.0,
        mode: Literal["servoj", "torque"] = "servoj",
        lookahead: float = 0.03,
        gain: float = 600.0,
        watchdog: float = 100.0,
    ) -> None:
        if (robot.nq, robot.nu) != (6, 6):
            raise DriverError(f"expected a robot of six actuated joints, '{robot.name}' has {robot.nu} of {robot.nq}", key="ur")
        if mode not in ("servoj", "torque"):
            raise DriverError(f"expected servoj or torque, found '{mode}'", key="mode")
        for key, value, low, high in (
            ("lookahead", lookahead, 0.03, 0.2),
            ("gain", gain, 100, 2000),
            ("watchdog", watchdog, 1, 500),
        ):
            if not low <= value <= high:
                raise DriverError(f"expected {low} to {high}, found {value}", key=key)
        self._host, self._epoch, self._mode, self._robot = host, epoch, mode, robot.name
        self.follows = "position" if mode == "servoj" else "law"
        self._servo = (0.0, 0.0, 1 / robot.control.rate, lookahead, gain)  # speed, acceleration (not used), time, ...
        self._watchdog, self._guarded = watchdog, False
        self._low, self._high = np.asarray(robot.limits.position_lower), np.asarray(robot.limits.position_upper)
        self._control: Any = None
        self._receive: Any = None
        self._state: RobotState | None = None
        self._stamp, self._offset, self._heard = -np.inf, np.inf, 0.0  # the robot's; host minus robot, least; the host's
        self._refused = self._lost = False

    def open(self) -> None:
        """Connect, upload the client's program and wait for the first measurement; again after ``stop`` to go on.

        Errors:
            ExtraError: ur_rtde is not installed.
            DriverError: nobody answers, the arm is stopped or of another size, another client commands it.
        """
        receive = need("rtde_receive", "ur", "the ur driver")
        control = need("rtde_control", "ur", "the ur driver")
        self._disconnect()
        self._prove()
        try:
            self._receive = receive.RTDEReceiveInterface(self._host, -1.0, _VARIABLES.split())
            self._control = control.RTDEControlInterface(self._host)
        except Exception as error:  # the client throws what its C++ throws
            self._disconnect()
            raise DriverError(f"ur-rtde could not connect: {error}", key=self._host) from None
        self._state, self._stamp, self._offset = None, -np.inf, np.inf
        self._refused = self._guarded = self._lost = False
        self.read()

    def read(self) -> RobotState:
        """Return the newest measurement; before the first one DriverError."""
        arm = self._receive
        if arm is None:
            raise DriverError("not open", key=self._host)
        for _ in range(3):  # until no package came in between
            stamp = arm.getTimestamp()
            parts = [
                np.array(part) for part in (arm.getActualQ(), arm.getActualQd(), arm.getActualCurrent(), arm.getTargetMoment())
            ]
            status = _status(arm.getSafetyStatusBits(), arm.getRobotMode(), arm.getRuntimeState())
            if arm.getTimestamp() == stamp:
                break
        now = time.monotonic()
        if stamp > self._stamp:  # an older package is not news
            if now - self._heard > _LOST:  # nobody read, and the client may have uploaded its program again
                self._guarded = False
            self._offset = min(self._offset + _DRIFT * (now - self._heard), now - stamp)
            self._stamp, self._heard = stamp, now
            if (self._refused or self._lost) and status is Status.OK:
                status = Status.FAULT
            q, v, current, gravity = parts
            seq = 1 if self._state is None else self._state.seq + 1
            self._state = RobotState(stamp + self._offset - self._epoch, seq, q, v, current * TORQUE_PER_AMPERE, gravity, status)
        self._lost |= self._silence() > _LOST
        if self._state is None:
            raise DriverError(f"the robot's stamp is {stamp}, expected a time", key=self._host)
        return self._state

    def write(self, command: JointCommand) -> None:
        """Send a command; DriverError for one that is not finite or not of the mode."""
        if not command.finite():
            raise DriverError("a command that is not finite is not sent", key=self._host)
        if self._lost:
            raise DriverError("the robot was silent: nothing is sent until it is opened again", key=self._host)
        if self._control is None:
            raise DriverError("not open", key=self._host)
        if self._mode == "servoj":
            if not (command.stiffness > 0).all():
                raise DriverError("servoj takes position references: expected a stiffness above 0 for every joint", key="mode")
            target = (command.q_ref + command.torque / command.stiffness).clip(self._low, self._high)
        else:
            state = self.read()
            target = command.at(state.q, state.v)
        if not np.isfinite(target).all():
            raise DriverError("a command that is not finite is not sent", key=self._host)
        try:
            self._refused = not self._send(target.tolist())
        except Exception as error:  # the client throws what its C++ throws
            self._lost = True
            raise DriverError(f"ur-rtde could not send: {error}", key=self._host) from None

    def _silence(self) -> float:
        """Return the age of the newest measurement [s]."""
        return time.monotonic() - self._stamp - self._offset if self._state is not None else 0.0

    def _send(self, target: list[float]) -> bool:
        if not self._guarded:
            if self._silence() > _STALE:  # the client would wait for the answer
                return False
            self._guarded = bool(self._control.setWatchdog(self._watchdog))
        if self._mode == "servoj":
            return self._guarded and self._control.servoJ(target, *self._servo)
        return self._guarded and self._control.directTorque(target)

    def stop(self) -> None:
        """Brake the arm and end its program; waits at most about a second, whatever the client does. Measurements go on.

        An arm that says nothing is left to its own watchdog: nothing more is sent to it.
        """
        if self._control is None:
            return
        self.read()
        if self._lost or self._silence() > _STALE:
            self._lost = True
            _log.warning("%s: silent; its own watchdog brakes the arm", self._host)
            return
        worker = threading.Thread(target=_end, args=(self._control,), name="ur-stop", daemon=True)
        worker.start()
        worker.join(_STOP_WAIT)
        if worker.is_alive():
            self._lost = True
            _log.warning("%s: no answer to stop; its own watchdog brakes the arm", self._host)

    def close(self) -> None:
        """Stop and disconnect; takes about a second."""
        self.stop()
        self._disconnect()

    def _disconnect(self) -> None:
        self._control = self._receive = None  # their destructors disconnect, half a second each

    def _prove(self) -> None:
        """Ask the controller for a data package and whether the arm can be commanded, without the client."""
        with _Probe(self._host, DASHBOARD_PORT) as dashboard:
            if not dashboard.line().startswith("Connected"):
                raise dashboard.error("no dashboard server answers")
            with _Probe(self._host, SCRIPT_PORT), _Probe(self._host, RTDE_PORT) as rtde:
                rtde.request(b"V", struct.pack(">H", 2))
                if b"IN_USE" in rtde.request(b"I", b"input_int_register_0"):
                    raise rtde.error("another client commands this arm")
                rtde.request(b"O", struct.pack(">d", 125.0) + b"safety_status_bits,robot_mode")
                rtde.request(b"S")
                bits, mode = struct.unpack(">xIi", rtde.answer(b"U"))
            if (status := _status(bits, mode, _PLAYING)) is not Status.OK:
                raise DriverError(f"the arm takes no commands: {status.value} (robot mode {mode})", key=self._host)
            dashboard.send(b"get robot model\n")
            found, expected = _model(dashboard.line()), _model(self._robot)
            if found and expected and found != expected:  # their joints have the same names
                raise DriverError(f"the arm is a {found}, expected a {expected}", key=self._host)
            dashboard.send(b"stop\n")  # a program that waits for something would keep the client's constructor waiting
            dashboard.line()


def _end(control: Any) -> None:
    """Run in a thread of its own: with a stream that stands still the client waits for minutes."""
    try:
        if control.isProgramRunning():
            control.setWatchdog(1.0)  # braking takes longer than a period of the stream's watchdog
            control.servoStop(_DECELERATION)
            control.stopScript()
    except Exception as error:  # the client throws what its C++ throws
        _log.warning("stop: %s", error)


def _model(text: str) -> str:
    """Return "UR10" of "UR10" or "ur10e": a controller does not say of which series it is; "" of anything else."""
    found = re.match(r"ur\d+", text, re.IGNORECASE)
    return found.group().upper() if found else ""


def _status(bits: int, mode: int, runtime: int) -> Status:
    """Return what safety_status_bits, robot_mode and runtime_state say."""
    if bits & _EMERGENCY:
        return Status.EMERGENCY_STOP
    if bits & _PROTECTIVE:
        return Status.PROTECTIVE_STOP
    return Status.OK if bits & _NORMAL and mode == _RUNNING and runtime == _PLAYING else Status.FAULT


class _Probe:
    """A connection that waits for nothing longer than ``_PATIENCE``; every failure is a DriverError naming host and port."""

    def __init__(self, host: str, port: int) -> None:
        self._key, self._rest = f"{host}:{port}", b""
        try:
            self._link = socket.create_connection((host, port), timeout=_PATIENCE)
        except OSError as error:
            raise self.error(f"no Universal Robots controller listens ({error.strerror or error})") from None

    def __enter__(self) -> _Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self._link.close()

    def error(self, message: str) -> DriverError:
        """Return an error about this port."""
        return DriverError(message, key=self._key)

    def send(self, data: bytes) -> None:
        """Send."""
        try:
            self._link.sendall(data)
        except OSError as error:
            raise self.error(f"the link broke ({error.strerror or error})") from None

    def line(self) -> str:
        """Return a line."""
        while b"\n" not in self._rest:
            self._more("a line")
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode("ascii", "replace")

    def request(self, kind: bytes, payload: bytes = b"") -> bytes:
        """Send an RTDE message; return the payload of the answer, which is of the same kind."""
        self.send(struct.pack(">H", 3 + len(payload)) + kind + payload)
        return self.answer(kind)

    def answer(self, kind: bytes) -> bytes:
        """Return the payload of the next RTDE message, which is of this kind."""
        self._until(3)
        length = max(struct.unpack(">H", self._rest[:2])[0], 3)
        self._until(length)
        found, payload, self._rest = self._rest[2:3], self._rest[3:length], self._rest[length:]
        if found != kind or not payload:
            raise self.error(f"expected an RTDE message {kind!r}, found {found!r}: no RTDE here")
        return payload

    def _until(self, length: int) -> None:
        while len(self._rest) < length:
            self._more("RTDE")

    def _more(self, what: str) -> None:
        try:
            part = self._link.recv(4096)
        except OSError as error:
            raise self.error(f"expected {what}, found silence ({error})") from None
        if not part:
            raise self.error(f"expected {what}, found the connection closed")
        self._rest += part

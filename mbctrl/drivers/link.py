"""A robot behind the ``link`` protocol: one UDP datagram a sample and a command, the newest wins."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot
from mbctrl.drivers.link_protocol import (
    MAX_FRAME,
    Frame,
    FrameError,
    Kind,
    Sequence,
    about,
    decode,
    difference,
    encode,
    endpoint,
    load_key,
    pack,
    parse_about,
    unpack,
)
from mbctrl.drivers.stamps import StampMap
from mbctrl.runtime.driver import Driver, JointCommand, RobotState, Status

_STATUS = tuple(Status)
_ALIVE = 0.1  # [s] without a command after which the lease is renewed
_STOPS = 5  # copies; the robot's watchdog is behind them
_POLL = 1e-3  # [s], while opening
_DRAIN = 256  # datagrams a read takes at most, so that a flood cannot hold it


class LinkDriver(Driver):
    """Talks to a robot that speaks ``link``, such as ``mbctrl sim --protocol link``.

    Args:
        robot: order of the joints; the other side's must be the same.
        host: HOST or HOST:PORT.
        epoch: time.monotonic() [s] of the loop's zero.
        key_file: the key both sides authenticate every frame with; needed unless the robot is on this machine.
        recover: take a robot out of a protective stop when opening; an emergency stop stays.
        timeout: [s] to wait for an answer and for the first measurement.

    ``counts``: frames ``lost``, ``reordered``, ``duplicated``, ``malformed``, ``unauthenticated``, ``foreign`` (of another
    session or kind) and ``unsent``. ``round_trip`` [s] is the newest from a frame of ours to the first sample that
    tells of it, nan before.
    """

    def __init__(
        self,
        robot: Robot,
        host: str = "127.0.0.1",
        *,
        epoch: float = 0.0,
        key_file: str | Path | None = None,
        recover: bool = False,
        timeout: float = 2.0,
    ) -> None:
        self.robot, self.host = robot, host
        self.counts: Counter[str] = Counter()
        self.round_trip = float("nan")
        self._epoch, self._key_file, self._recover, self._timeout = epoch, key_file, recover, timeout
        self._sizes = (robot.nq, robot.nq, robot.nu, robot.nu)
        self._socket: socket.socket | None = None
        self._key: bytes | None = None
        self._session = self._sent = 0
        self._last_sent = self._echo = 0.0
        self._state: RobotState | None = None

    def open(self) -> None:
        """Take the robot's lease and wait for a measurement.

        Errors:
            DriverError: without a key where one is needed, without an answer, and with the robot's reason where it refuses.
        """
        self._close()
        address, self._state = endpoint(self.host), None
        self._key = load_key(self._key_file, address[0])
        where, deadline = "{}:{}".format(*address), time.monotonic() + self._timeout
        try:
            self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.connect(address)
            self._greet(where, deadline)
            while self._state is None:
                if time.monotonic() > deadline:
                    raise DriverError(f"no measurement within {self._timeout:g} s", key=where)
                time.sleep(_POLL)
                self._drain()
        except OSError as error:
            self._close()
            raise DriverError(f"cannot be reached: {error.strerror}", key=where) from None
        except BaseException:
            self.stop()
            raise

    def read(self) -> RobotState:
        """Return the newest measurement; keeps the lease.

        Errors:
            DriverError: before ``open``.
        """
        if self._state is None:
            raise DriverError("read before open", key=self.host)
        if self._socket is not None:
            self._drain()
            if time.monotonic() - self._last_sent > _ALIVE:
                self._send(Kind.ALIVE)
        return self._state

    def write(self, command: JointCommand) -> None:
        """Send a command.

        Errors:
            DriverError: before ``open``, and for what is not finite, which is not sent.
        """
        if self._session == 0:
            raise DriverError("write before open", key=self.host)
        if not command.finite():
            raise DriverError("a command that is not finite was not sent", key=self.host)
        parts = (command.q_ref, command.v_ref, command.stiffness, command.damping, command.torque)
        self._send(Kind.COMMAND, pack(*parts))

    def stop(self) -> None:
        """Tell the robot to brake and hold, and give the lease back."""
        if self._session:
            for _ in range(_STOPS):
                self._send(Kind.STOP)
        self._close()

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket, self._session, self._sent = None, 0, 0

    def _greet(self, where: str, deadline: float) -> None:
        """Say hello until the robot welcomes or refuses."""
        nonce, again = secrets.randbits(63), 0.0
        hello = json.dumps({**about(self.robot), "recover": self._recover}).encode()
        while (now := time.monotonic()) < deadline:
            if now >= again:
                self._transmit(Frame(Kind.HELLO, nonce, 0, 0.0, now, body=hello))
                again = now + 0.05
            for frame in self._frames():
                if frame.seq == nonce and frame.kind is Kind.REFUSED:
                    raise DriverError(f"refused: {frame.body.decode(errors='replace')}", key=where)
                if frame.seq == nonce and frame.kind is Kind.WELCOME:
                    return self._welcome(frame, where)
            time.sleep(_POLL)
        missing = "is a robot listening there, with the same key_file?"
        raise DriverError(f"no answer within {self._timeout:g} s; {missing}", key=where)

    def _welcome(self, frame: Frame, where: str) -> None:
        try:
            wrong = difference(self.robot, parse_about(frame.body))
        except FrameError:
            wrong = "expected a robot's joints, found none"
        self._session, self._last_sent = frame.session, time.monotonic()
        if wrong:
            raise DriverError(wrong, key=where)
        self._news, self._stamps = Sequence(self.counts), StampMap(self._epoch)

    def _frames(self) -> Iterator[Frame]:
        """Take what has come."""
        for _ in range(_DRAIN):
            try:
                yield decode(self._socket.recv(MAX_FRAME), self._key)
            except FrameError as error:
                self.counts[str(error)] += 1
            except OSError:  # nothing more, or the robot's end has gone: the age of its last measurement tells
                return

    def _drain(self) -> None:
        for frame in self._frames():
            try:
                self._take(frame)
            except FrameError as error:
                self.counts[str(error)] += 1

    def _take(self, frame: Frame) -> None:
        """Make a frame the newest measurement, if it is."""
        if frame.kind is not Kind.STATE or frame.session != self._session or frame.status >= len(_STATUS):
            self.counts["foreign"] += 1
            return
        parts = unpack(frame.body, *self._sizes)
        if not self._news.news(frame.seq):
            return
        arrival = time.monotonic()
        if frame.host_stamp > self._echo:
            self._echo, self.round_trip = frame.host_stamp, arrival - frame.host_stamp
        self._state = RobotState(self._stamps(frame.robot_stamp, arrival), frame.seq, *parts, _STATUS[frame.status])

    def _send(self, kind: Kind, body: bytes = b"") -> None:
        self._sent += 1
        self._last_sent = time.monotonic()
        self._transmit(Frame(kind, self._session, self._sent, 0.0, self._last_sent, body=body))

    def _transmit(self, frame: Frame) -> None:
        try:
            self._socket.send(encode(frame, self._key))
        except OSError:  # full, or nobody there: as a lost datagram; the age of the measurements tells
            self.counts["unsent"] += 1

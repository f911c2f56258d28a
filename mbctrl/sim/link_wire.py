"""The robot's side of the ``link`` protocol: handshake, lease, watchdog."""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbctrl.base.errors import DriverError
from mbctrl.drivers.link_protocol import (
    LEASE,
    MAX_FRAME,
    WATCHDOG,
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
from mbctrl.runtime.driver import JointCommand, RobotState, Status
from mbctrl.sim.plant import Plant
from mbctrl.sim.wire import Wire

_DRAIN = 64  # datagrams a period takes at most, so that a flood cannot hold up the robot
_STATUS = {status: i for i, status in enumerate(Status)}


@dataclass
class _Owner:
    """The client that holds the lease."""

    address: tuple[str, int]
    nonce: int
    session: int
    news: Sequence
    heard: float  # [s] host time of its last frame
    stamp: float = 0.0  # [s] its own, of its newest frame

    def left(self, now: float) -> float:
        """Return the rest of the lease [s]."""
        return self.heard + LEASE - now


class LinkWire(Wire):
    """Serves one client at a time over UDP.

    A client that has the robot's joints right gets a lease, which every frame of its session renews and which lapses 0.5 s
    after the last. Its newest command counts. While a command is in force and none has come for 50 ms the plant is halted.
    What is malformed, unauthenticated, not finite or of another session is dropped and counted in ``counts``.

    Args:
        plant: the robot.
        host: HOST or HOST:PORT to listen at; port 0 takes a free one, ``address`` says which.
        key_file: the key both sides authenticate every frame with; needed unless HOST is loopback.
        now: the host's monotonic clock [s].
    """

    def __init__(
        self,
        plant: Plant,
        host: str = "127.0.0.1",
        *,
        key_file: str | Path | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(plant, host)
        self.counts: Counter[str] = Counter()
        self.address = endpoint(host)
        self._key = load_key(key_file, self.address[0])
        self._now = now
        self._socket: socket.socket | None = None
        self._owner: _Owner | None = None
        self._newest: JointCommand | None = None  # of this period
        self._commanded = 0.0  # [s] host time of the newest command
        self._sizes = (plant.robot.nu,) * 5

    def open(self) -> None:
        """Listen; DriverError naming the port that is taken."""
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        try:
            self._socket.bind(self.address)
        except OSError as error:
            self.close()
            raise DriverError(f"cannot listen: {error.strerror}", key="UDP {}:{}".format(*self.address)) from None
        self.address = self._socket.getsockname()

    def receive(self) -> bool:
        """Take what has come; True when a command came into force."""
        now, self._newest = self._now(), None
        for _ in range(_DRAIN):
            try:
                data, sender = self._socket.recvfrom(MAX_FRAME)
            except BlockingIOError:
                break
            except OSError:  # a client that has gone
                continue
            try:
                self._take(decode(data, self._key), sender, now)
            except FrameError as error:
                self.counts[str(error)] += 1
        moving = self._newest is not None and self.plant.command(self._newest)
        if moving:
            self._commanded = now
        if self.plant.commanded and now - self._commanded > WATCHDOG:
            self.plant.halt(f"no command for {WATCHDOG * 1e3:.0f} ms")
        if self._owner is not None and self._owner.left(now) < 0:
            self._owner = None
        return moving

    def publish(self, sample: RobotState) -> None:
        """Send a sample to the owner of the lease, under the sample's own number."""
        owner = self._owner
        if owner is not None:
            body = pack(sample.q, sample.v, sample.tau, sample.gravity)
            status = _STATUS[sample.status]
            self._send(Frame(Kind.STATE, owner.session, sample.seq, sample.stamp, owner.stamp, status, body), owner.address)

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _take(self, frame: Frame, sender: tuple[str, int], now: float) -> None:
        """Do what a frame asks; commands are kept until all has come, as only the newest counts."""
        if frame.kind is Kind.HELLO:
            self._hello(frame, sender, now)
            return
        owner = self._owner
        if owner is None or (frame.session, sender) != (owner.session, owner.address) or owner.left(now) < 0:
            self.counts["foreign"] += 1
        elif frame.kind is Kind.STOP:  # whatever its number: stopping is never out of date
            self.plant.release()
            self._owner = self._newest = None
        elif owner.news.news(frame.seq):
            owner.heard, owner.stamp = now, frame.host_stamp
            if frame.kind is Kind.COMMAND:
                self._command(JointCommand(*unpack(frame.body, *self._sizes)))

    def _command(self, command: JointCommand) -> None:
        if command.finite():
            self._newest = command
        else:
            self.counts["not finite"] += 1

    def _hello(self, frame: Frame, sender: tuple[str, int], now: float) -> None:
        told, owner = parse_about(frame.body), self._owner
        if owner is not None and owner.left(now) >= 0 and (owner.address, owner.nonce) != (sender, frame.session):
            self._refuse(frame, sender, "owned by {}:{} for another {:.2f} s".format(*owner.address, owner.left(now)))
            return
        if wrong := difference(self.plant.robot, told):
            self._refuse(frame, sender, wrong)
            return
        if owner is None or owner.nonce != frame.session:  # else our answer was lost: give it again
            owner = _Owner(sender, frame.session, secrets.randbits(63) | 1, Sequence(self.counts), now, frame.host_stamp)
            self._owner = owner
            if told.get("recover") is True and self.plant.status is Status.PROTECTIVE_STOP:
                self.plant.reset()
        answer = json.dumps(about(self.plant.robot)).encode()
        self._send(Frame(Kind.WELCOME, owner.session, frame.session, self.plant.state.stamp, body=answer), sender)

    def _refuse(self, frame: Frame, sender: tuple[str, int], reason: str) -> None:
        self.counts["refused"] += 1
        self._send(Frame(Kind.REFUSED, 0, frame.session, body=reason.encode(errors="replace")), sender)

    def _send(self, frame: Frame, address: tuple[str, int]) -> None:
        try:
            self._socket.sendto(encode(frame, self._key), address)
        except OSError:  # a full buffer, or nobody there: as a lost datagram
            self.counts["unsent"] += 1

"""The TCP side of the Franka Control Interface: one client at a time, requests in, answers out, never waiting."""

from __future__ import annotations

import contextlib
import logging
import socket
import struct

from mbctrl.base.errors import DriverError
from mbctrl.sim import fci

log = logging.getLogger(__name__)
_PATIENCE = 1000  # [polls] a client has for its first request: whoever says nothing must not keep others out
_CHUNKS = 4  # read in a poll: a client that floods must not hold up the robot
_RESET = struct.pack("ii", 1, 0)  # linger for 0 s: the peer sees a reset, which the vendor's client notices at once
_BACKLOG_BYTES = 1 << 20


class Channel:
    """Listens while it has no client; a second client is refused by the system, as nobody listens then."""

    def __init__(self, host: str) -> None:
        self.host = host
        self._listener: socket.socket | None = None
        self._client: socket.socket | None = None
        self._in, self._out, self._silent = bytearray(), bytearray(), 0

    def open(self) -> None:
        """Listen; DriverError naming the port that is taken."""
        try:
            self._listener = socket.create_server((self.host, fci.PORT), backlog=1)
        except OSError as error:
            reason = f"cannot listen: {error.strerror}; expected a free TCP port"
            raise DriverError(reason, key=f"{self.host}:{fci.PORT}") from None
        self._listener.setblocking(False)

    @property
    def peer(self) -> str | None:
        """The client's address; None without one."""
        return None if self._client is None else self._address

    def poll(self) -> list[fci.Request]:
        """Return what came since the last poll; ``peer`` becomes None where the client is gone."""
        if self._client is None and not self._accept():
            return []
        requests = []
        try:
            for _ in range(_CHUNKS):
                chunk = self._client.recv(fci.MAX_REQUEST)
                if not chunk:
                    self.drop()
                    break
                self._in += chunk
                while request := fci.take_request(self._in):
                    requests.append(request)
        except BlockingIOError:
            pass
        except (OSError, DriverError) as error:
            log.warning("client %s dropped: %s", self.peer, error)
            self.drop()
        self._silent = 0 if requests else self._silent + 1
        if not self._greeted and self._silent > _PATIENCE:
            self.drop()
        self._greeted = self._greeted or bool(requests)
        self._flush()
        return requests

    def send(self, data: bytes) -> None:
        """Send as soon as the client takes it."""
        self._out += data
        self._flush()

    def drop(self) -> None:
        """Let the client go, and listen again."""
        if self._client is not None:
            self._client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._client.close()
            self._client = None
            self._listen()

    def close(self) -> None:
        """Close everything."""
        self.drop()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    def _accept(self) -> bool:
        if self._listener is None and not self._listen():
            return False
        try:
            self._client, (self._address, _) = self._listener.accept()
        except OSError:
            return False
        self._client.setblocking(False)
        self._client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in, self._out, self._silent, self._greeted = bytearray(), bytearray(), 0, False
        self._listener.close()
        self._listener = None
        return True

    def _listen(self) -> bool:
        """Listen again; somebody else may have taken the port meanwhile."""
        try:
            self.open()
        except DriverError as error:
            log.warning("%s", error)
        return self._listener is not None

    def _flush(self) -> None:
        if self._client is None or not self._out:
            return
        try:
            del self._out[: self._client.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # the next poll finds the client gone, the only place where it may go
            self._out.clear()
        if len(self._out) > _BACKLOG_BYTES:
            with contextlib.suppress(OSError):
                self._client.shutdown(socket.SHUT_RDWR)
            self._out.clear()

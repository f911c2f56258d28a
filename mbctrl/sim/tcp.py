"""TCP for a simulated controller: a port and its connections, none of which ever waits."""

from __future__ import annotations

import logging
import socket

from mbctrl.base.errors import DriverError

_log = logging.getLogger(__name__)
_CHUNK = 65536
_LONGEST = 4 * 1024 * 1024  # of what a client may leave unfinished [bytes]


class Connection:
    """One client; ``stream`` is what it sent and nobody has taken yet, ``open`` whether it is still there."""

    def __init__(self, link: socket.socket) -> None:
        link.setblocking(False)
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._link, self._unsent = link, b""
        self.stream, self.open = b"", True

    def receive(self) -> bool:
        """Append what has arrived to ``stream``; return whether anything has."""
        parts = []
        try:
            while self.open:
                part = self._link.recv(_CHUNK)
                self.open = bool(part)
                parts.append(part)
                if len(part) < _CHUNK:
                    break
        except BlockingIOError:
            pass
        except OSError:
            self.open = False
        self.stream += b"".join(parts)
        if len(self.stream) > _LONGEST:
            self.close()
        return any(parts)

    def send(self, data: bytes) -> bool:
        """Send all of it, or none where the client's buffer is still full of what came before; return which."""
        self._flush()
        if self._unsent or not self.open:
            return False
        self._unsent = data
        self._flush()
        return True

    def _flush(self) -> None:
        try:
            while self._unsent and self.open:
                self._unsent = self._unsent[self._link.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self.open = False

    def close(self) -> None:
        """Close it."""
        self.open = False
        self._link.close()


class Port:
    """A listening port; ``number`` 0 takes any free one."""

    def __init__(self, host: str, number: int) -> None:
        self.connections: list[Connection] = []
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((host, number))
        except OSError as error:
            self._socket.close()
            raise DriverError(f"cannot listen: {error.strerror}; expected a free port", key=f"{host}:{number}") from None
        self._socket.listen()
        self._socket.setblocking(False)
        self.number: int = self._socket.getsockname()[1]

    def accept(self) -> list[Connection]:
        """Forget who has gone; return who has come."""
        for gone in [each for each in self.connections if not each.open]:
            gone.close()
            self.connections.remove(gone)
        new = []
        try:
            while True:
                link, address = self._socket.accept()
                new.append(Connection(link))
                _log.debug("port %d: a client from %s:%d", self.number, *address)
        except BlockingIOError:
            pass
        self.connections += new
        return new

    def close(self) -> None:
        """Close the port and every connection."""
        for connection in self.connections:
            connection.close()
        self._socket.close()

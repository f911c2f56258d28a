"""The ``link`` protocol's frames: little-endian, versioned, checksummed and, with a key, authenticated.

A frame is a header, a body and a CRC-32 of both; with a key follows HMAC-SHA256 of all that, cut to 16 bytes (RFC 2104,
section 5). One datagram is one frame. State and command bodies are float64 arrays, the others JSON or text.
"""

from __future__ import annotations

import hmac
import ipaddress
import json
import math
import socket
import struct
import zlib
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import Robot

PORT = 47470
LEASE = 0.5  # [s] after the owner's last frame
WATCHDOG = 0.05  # [s] without a command while one is in force
MAX_FRAME = 16384  # [bytes]; a datagram that is longer is cut and so fails its checksum
VERSION = 1
_MAGIC = b"MBLK"
_HEADER = struct.Struct("<4sBBBxIQQdd")  # magic, version, kind, status, length of the body, session, seq, robot and host stamp
_CHECK = struct.Struct("<I")
_TAG = 16  # [bytes]
_WINDOW = 512  # sequence numbers remembered


class Kind(IntEnum):
    """What a frame is."""

    HELLO = 1  # client: JSON of ``about``, and a nonce as the session
    WELCOME = 2  # robot: JSON of ``about``; the session is the lease's, the sequence number the nonce
    REFUSED = 3  # robot: text; the sequence number is the nonce
    STATE = 4  # robot: q, v, tau, gravity
    COMMAND = 5  # client: q_ref, v_ref, stiffness, damping, torque
    ALIVE = 6  # client: keeps the lease
    STOP = 7  # client: takes its command away and gives the lease back


_KINDS = frozenset(int(kind) for kind in Kind)


class FrameError(ValueError):
    """A datagram that is not a frame of ours; the text is the key it is counted under."""


@dataclass(frozen=True)
class Frame:
    """One frame; stamps are monotonic [s], the robot's and the client's (in a STATE: of the newest client's frame)."""

    kind: Kind
    session: int = 0
    seq: int = 0
    robot_stamp: float = 0.0
    host_stamp: float = 0.0
    status: int = 0
    body: bytes = b""


def encode(frame: Frame, key: bytes | None = None) -> bytes:
    """Return the datagram; with a key, authenticated."""
    head = (_MAGIC, VERSION, frame.kind, frame.status, len(frame.body), frame.session, frame.seq)
    data = _HEADER.pack(*head, frame.robot_stamp, frame.host_stamp) + frame.body
    data += _CHECK.pack(zlib.crc32(data))
    return data if key is None else data + hmac.digest(key, data, "sha256")[:_TAG]


def decode(data: bytes, key: bytes | None = None) -> Frame:
    """Return the frame of a datagram.

    Errors:
        FrameError: "unauthenticated" where a key is given and the tag is not by it, else "malformed".
    """
    if key is not None:
        data, tag = data[:-_TAG], data[-_TAG:]
        if not hmac.compare_digest(tag, hmac.digest(key, data, "sha256")[:_TAG]):
            raise FrameError("unauthenticated")
    if len(data) < _HEADER.size + _CHECK.size:
        raise FrameError("malformed")
    body = data[_HEADER.size : -_CHECK.size]
    magic, version, kind, status, length, session, seq, robot_stamp, host_stamp = _HEADER.unpack_from(data)
    whole = _CHECK.unpack(data[-_CHECK.size :])[0] == zlib.crc32(data[: -_CHECK.size])
    known = magic == _MAGIC and version == VERSION and kind in _KINDS
    if not (whole and known and length == len(body) and math.isfinite(robot_stamp) and math.isfinite(host_stamp)):
        raise FrameError("malformed")
    return Frame(Kind(kind), session, seq, robot_stamp, host_stamp, status, body)


def pack(*arrays: np.ndarray) -> bytes:
    """Return arrays as a body."""
    return np.concatenate(arrays).astype("<f8").tobytes()


def unpack(body: bytes, *sizes: int) -> list[np.ndarray]:
    """Return a body as arrays of these sizes, new ones that may be kept.

    Errors:
        FrameError: "malformed" where the body is longer or shorter.
    """
    if len(body) != 8 * sum(sizes):
        raise FrameError("malformed")
    whole, parts, start = np.frombuffer(body, "<f8").astype(float), [], 0
    for size in sizes:
        parts.append(whole[start : start + size])
        start += size
    return parts


def about(robot: Robot) -> dict[str, Any]:
    """Return what both sides tell each other of the robot they mean."""
    return {"robot": robot.name, "joints": list(robot.joints), "actuated": list(robot.driven)}


def parse_about(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a HELLO or WELCOME.

    Errors:
        FrameError: "malformed" where it is none.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: json on thousands of nested brackets
        found = None
    if not isinstance(found, dict):
        raise FrameError("malformed")
    return found


def difference(robot: Robot, told: dict[str, Any]) -> str:
    """Return in one line how the other side's robot differs from ``robot``; "" where it does not."""
    for key in ("joints", "actuated"):
        mine, theirs = about(robot)[key], told.get(key)
        if mine != theirs:
            return f"expected {key} {mine}, found {theirs if isinstance(theirs, list) else 'none'}"[:400]
    return ""


class Sequence:
    """Which of the numbered frames is news; counts ``lost``, ``reordered`` and ``duplicated`` in ``counts``."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts
        self._newest: int | None = None
        self._seen = 0  # bit i: frame ``newest - i`` has come

    def news(self, seq: int) -> bool:
        """Take the number of a frame; return whether it is the newest so far."""
        ahead = 1 if self._newest is None else seq - self._newest
        if ahead > 0:
            self.counts["lost"] += ahead - 1
            self._seen = (self._seen << ahead | 1) & ((1 << _WINDOW) - 1) if ahead < _WINDOW else 1
            self._newest = seq
            return True
        bit = 1 << min(-ahead, _WINDOW)
        if self._seen & bit:
            self.counts["duplicated"] += 1
        else:  # it was counted as lost when a newer one came
            self._seen |= bit
            self.counts["reordered"] += 1
            self.counts["lost"] -= 1 if self.counts["lost"] > 0 else 0
        return False


def endpoint(host: str) -> tuple[str, int]:
    """Return address and port of ``HOST`` or ``HOST:PORT``, an IPv4 address or a name.

    Errors:
        DriverError: naming what is wrong.
    """
    name, colon, port = host.partition(":")
    if colon and not (port.isdecimal() and int(port) < 65536):
        raise DriverError(f"expected HOST or HOST:PORT, found '{host}'", key="host")
    try:
        return socket.gethostbyname(name), int(port) if colon else PORT
    except (OSError, UnicodeError):
        raise DriverError(f"no such host: '{name}'", key="host") from None


def load_key(path: str | Path | None, address: str) -> bytes | None:
    """Return the key in a file, None where there is none and ``address`` is this machine's own.

    Errors:
        DriverError: for another machine without a key, and for a file that is missing, short or readable by others.
    """
    if path is None:
        if ipaddress.ip_address(address).is_loopback:
            return None
        make = "head -c 32 /dev/urandom | base64 > link.key; chmod 600 link.key"
        raise DriverError(
            f"{address} is not a loopback address: both sides need the same key_file (--key-file); make one with: {make}"
        )
    try:
        mode, key = Path(path).stat().st_mode, Path(path).read_bytes().strip()
    except OSError as error:
        raise DriverError(f"cannot be read: {error.strerror}", file=path, key="key_file") from None
    if mode & 0o077:
        raise DriverError("can be read by others; chmod 600", file=path, key="key_file")
    if len(key) < 16:
        raise DriverError(f"expected at least 16 bytes, found {len(key)}", file=path, key="key_file")
    return key

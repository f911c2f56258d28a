"""Memory two processes share without ever waiting for each other: newest-wins mailboxes and bounded rings.

Both lie in an mmap'ed file in a private folder, not in ``multiprocessing.shared_memory``: before Python 3.13 a killed
peer's resource tracker takes that away from the survivor. Either side may be killed at any instruction; the other goes on,
and a new one takes its place by opening the same file.

Every record carries a CRC-32 seeded with its number, so that what a weakly ordered processor shows too early, what is being
overwritten and what a killed writer left half done all look the same: not that record.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from mbctrl.base.errors import DriverError

_HEAD = 64  # bytes before the first record: counters, each in a cache line's own word
_RETRIES = 50  # a record is copied in well under a microsecond; a writer meets one reader that often by no accident


def private_folder() -> Path:
    """Make a folder only this user may enter, in memory where the system has one such place; the caller removes it."""
    memory = "/dev/shm"
    return Path(tempfile.mkdtemp(prefix="mbctrl-", dir=memory if os.access(memory, os.W_OK) else None))


class _Mapped:
    """A file of ``count`` slots for records of one type, with eight 64-bit counters before them."""

    def __init__(self, path: str | Path, dtype: np.dtype, count: int) -> None:
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self._size = self.dtype.itemsize
        self._stride = 8 + -(-self._size // 8) * 8  # CRC, padding, record
        total = _HEAD + count * self._stride
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DriverError(f"cannot be opened: {error.strerror}", file=path) from None
        try:
            self._map = mmap.mmap(descriptor, _reserve(descriptor, total, self.path))
        finally:
            os.close(descriptor)
        whole = memoryview(self._map)
        self._counters, self._bytes = whole[:_HEAD].cast("Q"), whole
        self._crcs = whole[_HEAD:].cast("I")

    def close(self) -> None:
        """Let go of the memory; the file stays."""
        for view in (self._counters, self._crcs, self._bytes):
            view.release()
        self._map.close()

    def _put(self, slot: int, number: int, record: np.ndarray | np.void | bytes) -> bytes:
        raw = record if isinstance(record, bytes) else record.tobytes()
        if len(raw) != self._size:
            raise ValueError(f"{self.path.name}: expected a record of {self._size} bytes, found {len(raw)}")
        start = slot * self._stride
        self._bytes[_HEAD + start + 8 : _HEAD + start + 8 + self._size] = raw
        self._crcs[start // 4] = zlib.crc32(raw, number & 0xFFFFFFFF)
        return raw

    def _get(self, slot: int, number: int) -> bytearray | None:
        """Return the record if it is whole and has this number."""
        start = slot * self._stride
        crc = self._crcs[start // 4]
        raw = bytearray(self._bytes[_HEAD + start + 8 : _HEAD + start + 8 + self._size])
        return raw if zlib.crc32(raw, number & 0xFFFFFFFF) == crc else None


def _reserve(descriptor: int, total: int, path: Path) -> int:
    """Give the file its size, with the space behind it: a full disk found by a write to a map would kill the process."""
    found = os.fstat(descriptor).st_size
    if found not in (0, total):
        raise DriverError(f"has {found} bytes, expected {total}: made for another record", file=path)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, total)
        else:
            os.ftruncate(descriptor, total)
    except OSError as error:
        raise DriverError(f"no room for {total} bytes: {error.strerror}", file=path) from None
    return total


class Mailbox(_Mapped):
    """The newest record, from one writer to any number of readers; nobody waits.

    Two slots are written in turn and the number of the newest is published last: a writer killed half-way leaves the record
    before whole. About a microsecond each way for a robot's state.

    Args:
        path: the file, made where it is missing.
        dtype: of a record: structured, or ``np.dtype((float, n))`` for n numbers.

    Errors:
        DriverError: naming the file, where it cannot be made or was made for another record.
    """

    def __init__(self, path: str | Path, dtype: np.dtype) -> None:
        super().__init__(path, dtype, 2)

    def write(self, record: np.ndarray | np.void | bytes) -> int:
        """Put a record in the place of the newest; return its number, from 1."""
        number = self._counters[0] + 1
        self._put(number & 1, number, record)
        self._counters[0] = number
        return number

    def read(self) -> tuple[int, np.ndarray | np.void] | None:
        """Return (number, copy) of the newest whole record; None before the first, or where none stays whole long enough."""
        for attempt in range(_RETRIES):
            newest = self._counters[0]
            # On a second look the one before serves as well: the newest may not have reached this core yet.
            for number in (newest,) if attempt == 0 else (newest, newest - 1):
                if number > 0 and (raw := self._get(number & 1, number)) is not None:
                    return number, np.frombuffer(raw, self.dtype)[0]
            if newest == 0:
                return None
            time.sleep(0)  # the writer may need this core to finish
        return None

    @property
    def number(self) -> int:
        """The number of the newest record, 0 before the first: whether reading is worth it."""
        return self._counters[0]


class Ring(_Mapped):
    """A queue of records from one writer to one reader; what does not fit is counted in ``lost``, the writer never waits.

    Args:
        path: the file, made where it is missing.
        records: how many fit.
        dtype: of a record.

    Errors:
        DriverError: naming the file, where it cannot be made or was made for other records.
    """

    def __init__(self, path: str | Path, records: int, dtype: np.dtype) -> None:
        if records < 1:
            raise ValueError(f"expected room for at least 1 record, found {records}")
        self._records = records
        super().__init__(path, dtype, records)

    def put(self, record: np.ndarray | np.void | bytes) -> bool:
        """Append a record; False, and counted, where the ring is full."""
        head = self._counters[0]
        if head - self._counters[1] >= self._records:
            self._counters[2] += 1
            return False
        self._put(head % self._records, head, record)
        self._counters[0] = head + 1
        return True

    def drain(self, most: int | None = None) -> np.ndarray:
        """Take up to ``most`` records out, oldest first, (m,) of the ring's type."""
        tail, head = self._counters[1], self._counters[0]
        end = head if most is None else min(head, tail + most)
        taken = bytearray()
        while tail < end:
            raw = self._whole(tail)
            tail += 1
            if raw is None:
                self._counters[3] += 1
                continue
            taken += raw
        self._counters[1] = tail
        return np.frombuffer(taken, self.dtype) if taken else np.zeros(0, self.dtype)

    @property
    def lost(self) -> int:
        """How many records did not fit."""
        return self._counters[2]

    @property
    def torn(self) -> int:
        """How many records the reader found damaged and left out; 0 unless memory itself is at fault."""
        return self._counters[3]

    def __len__(self) -> int:
        return self._counters[0] - self._counters[1]

    def _whole(self, number: int) -> bytearray | None:
        for _ in range(_RETRIES):
            if (raw := self._get(number % self._records, number)) is not None:
                return raw
            time.sleep(0)
        return None

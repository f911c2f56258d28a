"""Writes a deployed robot's log from a process of its own; the control side only fills a ring, whatever the disk does."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import numpy as np

from mbctrl.base.errors import DriverError, SpecError
from mbctrl.base.extras import need
from mbctrl.runtime.logfile import LogWriter
from mbctrl.runtime.process import answer, quiet_start
from mbctrl.runtime.realtime import name_process
from mbctrl.runtime.shared import Mailbox, Ring, private_folder

_TEXT = 240  # bytes of an event
_EVENT = np.dtype([("t", "f8"), ("level", "S8"), ("text", f"S{_TEXT}")])
_STATUS = np.dtype([("beat", "f8"), ("written", "u8"), ("failed", "u1"), ("why", f"S{_TEXT}")])
_EVENTS = 1000  # room for events
_PAUSE = 0.02  # [s] between two looks into the ring
_SILENCE = 1.0  # [s] after which the log process counts as hung


@dataclass(frozen=True)
class _Job:
    """What the log process is told."""

    path: Path
    folder: Path
    dtype: np.dtype
    room: int
    header: dict[str, Any]
    parent: int = field(default_factory=os.getpid)


class Recorder:
    """A log of records and events, and a black box of the last seconds in this process's own memory.

    A full disk or a dead log process ends the log and nothing else: ``healthy`` turns False, ``trouble`` says why, ``put``
    goes on filling the black box and ``lost`` counts what the log lacks.

    Args:
        path: the MCAP file to write.
        dtype: of a record, structured, with a field ``t`` [s]: ``logfile.record_dtype`` or any other.
        header: ``logfile.log_header``.
        rate: records a second at most [Hz].
        seconds: how far back the black box reaches [s].
        backlog: how long the log process may be behind [s].
    """

    def __init__(
        self, path: str | Path, dtype: np.dtype, header: dict[str, Any], *, rate: float, seconds: float = 5.0, backlog: float = 2.0
    ) -> None:
        self.path, self.dtype, self.header = Path(path), np.dtype(dtype), header
        self._size, self._room = self.dtype.itemsize, max(1, round(seconds * rate))
        self._box, self._count = bytearray(self._size * self._room), 0
        self._recent: deque[tuple[float, str, str]] = deque(maxlen=_EVENTS)
        self._backlog = max(1, round(backlog * rate))
        self._process: Any = None
        self._lost = 0

    def open(self, patience: float = 30.0) -> None:
        """Start the log process.

        Errors:
            SpecError: where the file cannot be made.
            DriverError: where the process does not come up within ``patience`` [s].
        """
        need("mcap.writer", "deploy", "a log")
        folder = private_folder()
        self._clear = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        job = _Job(self.path, folder, self.dtype, self._backlog, self.header)
        self._records, self._events, self._status = _shared(job)
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, job), daemon=True, name="mbctrl log")
        quiet_start(self._process)
        theirs.close()
        try:
            said = self._pipe.recv() if self._pipe.poll(patience) else DriverError("did not come up", key="log process")
        except (EOFError, OSError):
            said = DriverError("died while starting", key="log process")
        if isinstance(said, BaseException):
            self.close()
            raise said

    def put(self, record: np.ndarray | np.void) -> None:
        """Take a record; never waits, never raises for the log's sake."""
        raw = record.tobytes()
        if self._process is not None:
            self._records.put(raw)
        start = self._count % self._room * self._size
        self._box[start : start + self._size] = raw
        self._count += 1

    def event(self, t: float, level: str, text: str) -> None:
        """Take an event at the loop's time ``t`` [s]; ``level`` is debug, info, warning or error; ``text`` is cut at 240 bytes."""
        short = text.encode(errors="replace")[:_TEXT].decode(errors="ignore")
        self._recent.append((t, level, short))
        if self._process is not None:
            self._events.put(np.array((t, level.encode(), short.encode()), _EVENT))

    @property
    def healthy(self) -> bool:
        """Whether everything so far is logged or about to be."""
        return self._process is not None and not self.trouble and self.lost == 0

    @property
    def trouble(self) -> str:
        """Why the log has ended, "" while it has not."""
        if self._process is None or (got := self._status.read()) is None:
            return ""
        if got[1]["failed"]:
            return got[1]["why"].decode(errors="replace")
        if (age := time.monotonic() - got[1]["beat"]) > _SILENCE:
            return f"the log process has not answered for {age:.0f} s" if self._process.is_alive() else "the log process died"
        return ""

    @property
    def lost(self) -> int:
        """How many records the log lacks because the ring was full."""
        return self._lost if self._process is None else self._records.lost

    def last(self) -> np.ndarray:
        """Return the black box: the last records, oldest first, (m,)."""
        records = np.frombuffer(bytes(self._box), self.dtype)
        return records[: self._count] if self._count <= self._room else np.roll(records, -(self._count % self._room))

    def dump(self, path: str | Path) -> None:
        """Write the black box and the recent events as a log of their own, in one move; with the robot at rest: it takes a while.

        Errors:
            SpecError: where the file cannot be written; nothing is left of it.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with open(temporary, "wb") as stream:
                writer = LogWriter(stream, self.header, self.dtype)
                writer.add(self.last())
                for t, level, text in self._recent:
                    writer.event(t, level, text)
                writer.finish()
                os.fsync(stream.fileno())  # the rename must not reach the disk before what it names
            os.replace(temporary, path)
        except OSError as error:
            raise SpecError(f"cannot be written: {error.strerror or error}", file=path) from None
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Have what is left written and end the log process; safe to call twice."""
        if self._process is None:
            return
        self._pipe.close()  # the log process takes that as the end
        for end in (lambda: None, self._process.terminate, self._process.kill):
            end()
            self._process.join(5)
            if not self._process.is_alive():
                break
        self._lost, self._process = self._records.lost, None
        for shared in (self._records, self._events, self._status):
            shared.close()
        self._clear()


def _shared(job: _Job) -> tuple[Ring, Ring, Mailbox]:
    records, events = Ring(job.folder / "records", job.room, job.dtype), Ring(job.folder / "events", _EVENTS, _EVENT)
    return records, events, Mailbox(job.folder / "status", _STATUS)


def _serve(pipe: Connection, job: _Job) -> None:
    """Run the log process until the control side closes its end of the pipe or is gone."""
    name_process("mbctrl log")
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))  # what is in the ring is still to be written
    answer(pipe, "log process", lambda: _log(pipe, job, asked))
    if os.getppid() != job.parent:
        shutil.rmtree(job.folder, ignore_errors=True)


def _log(pipe: Connection, job: _Job, asked: Sequence[int]) -> None:
    records, events, status = _shared(job)
    written = 0

    def say(why: str = "") -> None:
        status.write(np.array((time.monotonic(), written, bool(why), why.encode()[:_TEXT]), _STATUS))

    stream = None
    try:
        stream = open(job.path, "wb")  # closing it on a full disk raises: done by hand
        writer = LogWriter(stream, job.header, job.dtype)
        writer.flush()
    except OSError as error:
        _abandon(stream)
        raise SpecError(f"cannot be written: {error.strerror}", file=job.path) from None
    try:
        say()
        pipe.send(None)
        over = False
        while True:
            over = over or pipe.poll(_PAUSE) or bool(asked)
            batch, said = records.drain(500), events.drain()
            writer.add(batch)
            for event in said:
                writer.event(float(event["t"]), event["level"].decode(), event["text"].decode())
            writer.flush()
            written += len(batch)
            say()
            if over and not len(records):
                break
        writer.finish()
        stream.close()
    except OSError as error:
        say(f"{job.path}: {error.strerror or error}")
        _abandon(stream)


def _abandon(stream: IO[bytes] | None) -> None:
    try:
        if stream is not None:
            stream.close()
    except OSError:
        pass  # what could not be written before cannot be now

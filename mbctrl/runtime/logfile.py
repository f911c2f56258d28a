"""Logs of a deployed robot: MCAP files of JSON messages with schemas, as Foxglove and PlotJuggler read them.

Format: mcap.dev/spec. A record of the servo loop becomes a message on each of ``TOPICS``; what the robot is, its limits and
the versions at work are a metadata record at the file's start. Chunks are 32 KiB, so a file cut off in the middle lacks
only the last of them, and one is read like any other.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

import mbctrl
from mbctrl.base.errors import SpecError
from mbctrl.base.extras import need
from mbctrl.base.robot import Robot

logger = logging.getLogger(__name__)

TOPICS = {
    "/state": ("stamp", "seq", "q", "v", "tau"),
    "/command": ("q_ref", "v_ref", "torque", "mode", "clamped"),
    "/plan": ("plan_seq", "latency"),
    "/servo": (),  # whatever else a record has
}
_CHANGES = {"/plan": "plan_seq"}  # a topic written only when this field changes
_CHUNK = 32 * 1024
_UNITS = {"t": "s", "stamp": "s", "latency": "s", "q": "rad", "q_ref": "rad", "v": "rad/s", "v_ref": "rad/s"}
_UNITS |= {"tau": "N·m", "torque": "N·m"}
_METADATA = "mbctrl"
_MAGIC = b"\x89MCAP0\r\n"


def record_dtype(robot: Robot) -> np.dtype:
    """Return a servo record's type: ``t`` the loop's time, ``stamp`` the measurement's [s], ``clamped`` one bit a reason."""
    nq, nu = (robot.nq,), (robot.nu,)
    measured = [("t", "f8"), ("stamp", "f8"), ("seq", "i8"), ("q", "f8", nq), ("v", "f8", nq), ("tau", "f8", nu)]
    commanded = [("q_ref", "f8", nu), ("v_ref", "f8", nu), ("torque", "f8", nu), ("mode", "u1"), ("clamped", "u4")]
    return np.dtype([*measured, *commanded, ("plan_seq", "i8"), ("latency", "f8")])


def log_header(robot: Robot, *, epoch: float, **more: Any) -> dict[str, Any]:
    """Return what a log says of itself: robot, joints, limits, versions and ``more`` (bundle's hash, names of modes).

    ``epoch`` is what ``time.monotonic()`` says at the loop's time 0; the wall clock is read here, once.
    """
    limits = {name: value for name, value in robot.limits.model_dump().items() if value is not None}
    return {
        "robot": robot.name,
        "joints": list(robot.joints),
        "actuated": list(robot.driven),
        "limits": limits,
        "rate": robot.control.rate,
        "started_ns": time.time_ns() - round((time.monotonic() - epoch) * 1e9),
        "versions": {"mbctrl": mbctrl.__version__, "numpy": np.__version__},
        **more,
    }


class LogWriter:
    """Writes a log to a binary stream; OSError where that is full.

    Args:
        stream: opened for writing.
        header: what ``log_header`` returns; JSON values. ``joints``, ``actuated`` and ``started_ns`` are used here.
        dtype: of the records: a structured type with a field ``t`` [s].
    """

    def __init__(self, stream: IO[bytes], header: dict[str, Any], dtype: np.dtype) -> None:
        self._stream = stream
        self._writer = need("mcap.writer", "deploy", "a log").Writer(stream, chunk_size=_CHUNK)
        self._start = int(header["started_ns"])
        self._writer.start(profile="", library=f"mbctrl {mbctrl.__version__}")
        self._writer.add_metadata(_METADATA, {key: json.dumps(value) for key, value in header.items()})
        named = {name for names in TOPICS.values() for name in names} | {"t"}
        rest = tuple(name for name in dtype.names if name not in named)
        self._topics = []
        for topic, names in TOPICS.items():
            fields = ("t", *(name for name in names or rest if name in dtype.names))
            if len(fields) > 1:
                self._topics.append((self._channel(topic, _schema(dtype, fields, header)), fields, _CHANGES.get(topic)))
        event = {"t": {"type": "number"}, "level": {"type": "string"}, "text": {"type": "string"}}
        self._events = self._channel("/events", {"type": "object", "properties": event})
        self._last: dict[int, Any] = {}

    def add(self, records: np.ndarray) -> None:
        """Append records (m,)."""
        columns = {name: records[name].tolist() for name in records.dtype.names}
        for i, t in enumerate(columns["t"]):
            for channel, fields, change in self._topics:
                if change is not None:
                    if self._last.get(channel) == columns[change][i]:
                        continue
                    self._last[channel] = columns[change][i]
                self._message(channel, t, {name: columns[name][i] for name in fields})

    def event(self, t: float, level: str, text: str) -> None:
        """Append an event at the loop's time ``t`` [s]."""
        self._message(self._events, t, {"t": t, "level": level, "text": text})

    def flush(self) -> None:
        """Hand every full chunk to the system."""
        self._stream.flush()

    def finish(self) -> None:
        """Write the last chunk and the index; the stream stays open."""
        self._writer.finish()
        self._stream.flush()

    def _channel(self, topic: str, schema: dict[str, Any]) -> int:
        text = json.dumps(schema).encode()
        number = self._writer.register_schema(f"mbctrl{topic.replace('/', '.')}", "jsonschema", text)
        return self._writer.register_channel(topic, "json", number)

    def _message(self, channel: int, t: float, fields: dict[str, Any]) -> None:
        try:
            text = json.dumps(fields, allow_nan=False)
        except ValueError:
            text = json.dumps({name: _finite(value) for name, value in fields.items()})
        at = max(self._start + round(t * 1e9), 0) if math.isfinite(t) else self._start
        self._writer.add_message(channel, at, text.encode(), at)


def _finite(value: Any) -> Any:
    """Return a value with None for every number JSON has no word for."""
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _schema(dtype: np.dtype, fields: tuple[str, ...], header: dict[str, Any]) -> dict[str, Any]:
    names = {len(header["actuated"]): header["actuated"], len(header["joints"]): header["joints"]}
    properties: dict[str, Any] = {}
    for name in fields:
        number = {"type": "integer" if dtype[name].base.kind in "iu" else "number"}
        shape, unit = dtype[name].shape, f" [{_UNITS[name]}]" if name in _UNITS else ""
        if shape:
            said = ", ".join(names.get(shape[0], ())) + unit
            properties[name] = {"type": "array", "items": number, "description": said}
        else:
            properties[name] = {**number, "description": name + unit}
    return {"type": "object", "properties": properties}


@dataclass(frozen=True)
class Recording:
    """A log in memory: ``header``; ``topics`` by name, each field (T,) or (T, n) under its own; ``events`` in order.

    ``whole`` is False for a file that was cut off or damaged: what came before is here.
    """

    header: dict[str, Any]
    topics: dict[str, dict[str, np.ndarray]]
    events: list[dict[str, Any]] = field(default_factory=list)
    whole: bool = True


def read_recording(path: str | Path) -> Recording:
    """Read a log, also one cut off in the middle.

    Errors:
        SpecError: naming the file, where it cannot be read or is not a log of this package.
        ExtraError: without the package mcap.
    """
    header: dict[str, Any] | None = None
    channels: dict[int, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    whole = False
    for record in _records(Path(path)):
        kind = type(record).__name__
        if kind == "Metadata" and record.name == _METADATA:
            header = {key: json.loads(value) for key, value in record.metadata.items()}
        elif kind == "Channel":
            channels[record.id] = record.topic
        elif kind == "Message" and header is not None:
            rows.setdefault(channels[record.channel_id], []).append(json.loads(record.data))
        elif kind == "Footer":
            whole = True
    if header is None:
        raise SpecError("is no log of mbctrl: its metadata record is missing", file=path)
    events = rows.pop("/events", [])
    topics = {topic: {name: _column(messages, name) for name in messages[0]} for topic, messages in rows.items()}
    return Recording(header, topics, events, whole)


def _records(path: Path) -> Iterator[Any]:
    """Yield the file's records as far as it can be read."""
    reader = need("mcap.stream_reader", "deploy", "reading a log").StreamReader
    try:
        with open(path, "rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise SpecError("is not an MCAP file", file=path)
            yield from reader(stream, skip_magic=True, validate_crcs=True, record_size_limit=1 << 28).records
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", file=path) from None
    except SpecError:
        raise
    except Exception as error:  # noqa: BLE001 -- the reader and three decompressors, each with errors of its own
        logger.info("%s: cut off or damaged: %s", path, error)


def _column(messages: list[dict[str, Any]], name: str) -> np.ndarray:
    values = [message[name] for message in messages]
    return np.array(values) if isinstance(values[0], int) else np.array(values, float)  # None reads as NaN

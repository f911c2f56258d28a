"""Logs in NPZ, Parquet and MCAP files; see ``tables`` for text."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import suggest
from mbctrl.base.extras import need
from mbctrl.base.logs import LogError
from mbctrl.calibrate.recipe import LogSpec
from mbctrl.calibrate.tables import Rows, Table, Want, excerpt

_JOINT_STATE = ("sensor_msgs/msg/JointState", "sensor_msgs/JointState")
_FIELDS = {"position": "position", "velocity": "velocity", "effort": "effort"}  # of a signal in JointState


def read_npz(path: Path, spec: LogSpec, wants: Sequence[Want], rows: Rows | None, joints: Sequence[str]) -> Table:
    """Read arrays by name: (T,) arrays as they are called, those of (T, k) as ``q[0]`` to ``q[k-1]``, from zero as in numpy.

    Where k is the number of ``joints``, ``q.JOINT`` names the same columns.

    Errors:
        LogError: naming the array.
    """
    columns: dict[str, np.ndarray] = {}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            for name in archive.files:
                columns |= _array_columns(name, archive[name], joints)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise LogError(f"cannot be read: {error}", file=path) from None
    return _pick(path, columns, wants, rows)


def _array_columns(name: str, array: np.ndarray, joints: Sequence[str]) -> dict[str, np.ndarray]:
    if array.ndim == 1:
        return {name: array}
    if array.ndim != 2:
        return {}
    columns = {f"{name}[{i}]": array[:, i] for i in range(array.shape[1])}
    if array.shape[1] == len(joints):
        columns |= {f"{name}.{joint}": array[:, i] for i, joint in enumerate(joints)}
    return columns


def read_parquet(path: Path, spec: LogSpec, wants: Sequence[Want], rows: Rows | None, joints: Sequence[str]) -> Table:
    """Read columns by name, or by number in the file's own order.

    Errors:
        LogError: naming the column.
    """
    parquet = need("pyarrow.parquet", "calibrate", "reading Parquet")
    arrow = need("pyarrow", "calibrate", "reading Parquet")
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        numbers = [want.column - 1 for want in wants if isinstance(want.column, int) and want.column <= len(names)]
        chosen = {name for want in wants for name in (want.column, str(want.column).partition("[")[0]) if name in names}
        table = file.read(sorted(chosen | {names[i] for i in numbers}))
    except (OSError, arrow.ArrowException) as error:
        raise LogError(f"cannot be read: {error}", file=path) from None
    columns: dict[str | int, np.ndarray] = {name: np.empty(0, "U1") for name in names}  # those not read: for suggestions
    for name in table.column_names:
        column = table.column(name)
        columns[name] = columns[names.index(name) + 1] = column.to_numpy()
    return _pick(path, columns, wants, rows)


def _pick(path: Path, columns: dict[Any, np.ndarray], wants: Sequence[Want], rows: Rows | None) -> Table:
    picked = []
    for want in wants:
        if want.column not in columns:
            named = [name for name in columns if isinstance(name, str)]
            raise LogError(f"no such column{suggest(str(want.column), named)}", file=path, key=want.place)
        column = columns[want.column]
        if column.dtype.kind not in "iuf":
            raise LogError(f"expected numbers, found {column.dtype}", file=path, key=want.place)
        if want.signal == "time" and column.dtype.kind in "iu" and len(column):
            column = column - column[0]  # nanoseconds since 1970 do not fit a float
        if picked and len(column) != len(picked[0]):
            raise LogError(
                f"expected {len(picked[0])} values, as in {wants[0].place}, found {len(column)}", file=path, key=want.place
            )
        picked.append(np.asarray(column, np.float64))
    chosen = excerpt(rows, len(picked[0]), path)
    data = np.stack([column[chosen] for column in picked], axis=1)
    return Table(data, (None,) * len(wants), np.arange(chosen.start + 1, chosen.start + len(data) + 1))


# --- MCAP -------------------------------------------------------------------------------------------------------------


def read_mcap(path: Path, spec: LogSpec, wants: Sequence[Want], rows: Rows | None, joints: Sequence[str]) -> Table:
    """Read the JointState messages of ``spec.topic``; joints are found by name in every message.

    Messages that hold none of the wanted joints, such as those of a gripper on the same topic, are passed over. Stamps
    count from the first message; lines count the messages of the topic.

    Errors:
        LogError: for a file that is cut, a topic that is not there, a message without one of the joints or its value.
    """
    for want in wants:
        if want.signal == "time" and want.column not in ("stamp", "log_time"):
            raise LogError("expected 'stamp' or 'log_time' as the time of messages", file=path, key=want.place)
        if want.signal == "command" or isinstance(want.column, int):
            what = "a JointState message has no command" if want.signal == "command" else "expected a joint's name"
            raise LogError(what, file=path, key=want.place)
    data, lines, start = [], [], None
    for number, stamps, message in _messages(path, spec.topic):
        places = {name: i for i, name in enumerate(message.name)}
        if any(want.column in places for want in wants if want.signal == "position"):
            start = start or stamps
            times = {key: (stamps[key] - start[key]) * 1e-9 for key in stamps}
            data.append([times[w.column] if w.signal == "time" else _value(path, w, message, places, number) for w in wants])
            lines.append(number)
    if not data:
        joints = [want.column for want in wants if want.signal == "position"]
        raise LogError(f"no message holds any of the joints {', '.join(map(str, joints))}", file=path, key=spec.topic)
    chosen = excerpt(rows, len(data), path)
    return Table(
        np.array(data, np.float64)[chosen], tuple("s" if w.signal == "time" else None for w in wants), np.array(lines)[chosen]
    )


def _value(path: Path, want: Want, message: Any, places: dict[str, int], number: int) -> float:
    values, place = getattr(message, _FIELDS[want.signal]), places.get(want.column)
    if place is None:
        raise LogError(f"no such joint{suggest(str(want.column), places)}", file=path, key=f"line {number}, {want.place}")
    if place >= len(values):
        found = f"expected {len(places)} values of {want.signal}, found {len(values)}"
        raise LogError(found, file=path, key=f"line {number}, {want.place}")
    return values[place]


def _messages(path: Path, topic: str | None) -> Iterator[tuple[int, dict[str, int], Any]]:
    """Yield (number, stamps [ns], message) of each message of a topic, in the recorder's order."""
    make_reader = need("mcap.reader", "calibrate", "reading MCAP").make_reader
    factory = need("mcap_ros2.decoder", "calibrate", "reading MCAP").DecoderFactory
    errors = need("mcap.exceptions", "calibrate", "reading MCAP")
    try:
        with path.open("rb") as file:
            reader = make_reader(file, decoder_factories=[factory()])
            chosen = _topic(path, reader.get_summary(), topic)
            for number, (_, _, record, message) in enumerate(reader.iter_decoded_messages(topics=[chosen]), 1):
                stamp = message.header.stamp
                yield number, {"stamp": stamp.sec * 10**9 + stamp.nanosec, "log_time": record.log_time}, message
    except (OSError, EOFError, ValueError, struct.error, errors.McapError) as error:
        found = str(error) or "it ends too early"
        raise LogError(f"cut or damaged: {found}; 'mcap recover' may help", file=path) from None


def _topic(path: Path, summary: Any, topic: str | None) -> str:
    if summary is None:
        raise LogError("cut or damaged: no summary; 'mcap recover' may help", file=path)
    kinds = {channel.topic: getattr(summary.schemas.get(channel.schema_id), "name", "?") for channel in summary.channels.values()}
    states = sorted(name for name, kind in kinds.items() if kind in _JOINT_STATE)
    if topic is None and len(states) == 1:
        return states[0]
    if topic is None:
        raise LogError(f"expected one topic of JointState messages, found {', '.join(states) or 'none'}", file=path, key="topic")
    if topic not in kinds:
        raise LogError(f"no such topic{suggest(topic, kinds)}", file=path, key=topic)
    if topic not in states:
        raise LogError(f"expected {_JOINT_STATE[0]} messages, found {kinds[topic]}", file=path, key=topic)
    return topic

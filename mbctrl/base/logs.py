"""Run logs: a CSV that describes itself.

Layout: comment lines ``# key: value`` (YAML, when stripped of ``# ``), one header line whose columns read
``name [unit]``, then one row of numbers a sample. A vector's columns share a prefix: ``q.joint1 [rad]``. Any tool
reads it (pandas: ``read_csv(path, comment="#")``), and a file cut off in the middle is still readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from mbctrl.base.errors import MbctrlError
from mbctrl.base.spec import dump_yaml, parse_yaml


class LogError(MbctrlError):
    """A log that cannot be read, with file, line or column."""


class LogWriter:
    """Writes a log, buffered in memory until ``flush`` so that the control side never waits for the disk.

    Args:
        path: the file to create.
        columns: (name, unit) pairs.
        header: what the file says of itself; plain YAML values.
    """

    def __init__(self, path: Path, columns: Sequence[tuple[str, str]], header: dict[str, Any]) -> None:
        self.columns = list(columns)
        self._rows: list[Sequence[float]] = []
        self._file: TextIO = open(path, "w", encoding="utf-8")
        self._file.write("".join(f"# {line}\n" for line in dump_yaml(header).splitlines()))
        self._file.write(",".join(f"{name} [{unit}]" for name, unit in self.columns) + "\n")

    def add(self, row: Sequence[float]) -> None:
        """Append one row, one number a column."""
        if len(row) != len(self.columns):
            raise ValueError(f"expected {len(self.columns)} values, found {len(row)}")
        self._rows.append(row)

    def flush(self) -> None:
        """Write the rows gathered so far."""
        rows, self._rows = self._rows, []
        self._file.writelines(",".join(f"{value:.9g}" for value in row) + "\n" for row in rows)
        self._file.flush()

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        if not self._file.closed:
            self.flush()
            self._file.close()


@dataclass(frozen=True)
class Log:
    """A log in memory: ``header``, ``units`` by column name, ``data`` (T, columns)."""

    header: dict[str, Any]
    units: dict[str, str]
    data: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        """Return column ``name`` as (T,), or all columns ``name.*`` as (T, n)."""
        names = list(self.units)
        if name in self.units:
            return self.data[:, names.index(name)]
        group = [i for i, column in enumerate(names) if column.startswith(name + ".")]
        if not group:
            raise LogError(f"no such column; the log has {', '.join(names)}", key=name)
        return self.data[:, group]

    def __contains__(self, name: str) -> bool:
        return any(column == name or column.startswith(name + ".") for column in self.units)


def read_log(path: str | Path) -> Log:
    """Read a log; a last line without its end is taken as cut and left out.

    Errors:
        LogError: for a file that is missing or no such log, naming the line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LogError(f"cannot be read: {error}", file=path) from None
    lines = text.splitlines()
    head = next((i for i, line in enumerate(lines) if not line.startswith("#")), None)
    if head is None:
        raise LogError("no header line", file=path)
    header = parse_yaml("\n".join(line[2:] for line in lines[:head]), path) or {}
    units = dict(_column(cell, path) for cell in lines[head].split(","))
    rows = lines if text.endswith("\n") else lines[:-1]  # half a number still reads as a number
    return Log(header, units, np.array(list(_rows(rows, head + 1, len(units), path))).reshape(-1, len(units)))


def _column(cell: str, path: str | Path) -> tuple[str, str]:
    name, bracket, unit = cell.partition(" [")
    if not bracket or not unit.endswith("]"):
        raise LogError("expected 'name [unit]'", file=path, key=f"column '{cell}'")
    return name, unit[:-1]


def _rows(lines: Sequence[str], start: int, width: int, path: str | Path) -> Iterable[list[float]]:
    for number, line in enumerate(lines[start:], start + 1):
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            row = []
        if len(row) == width:
            yield row
        else:
            raise LogError(f"expected {width} numbers, found '{line[:40]}'", file=path, key=f"line {number}")

"""The columns a recipe asks for as plain numbers, each row with the line it came from; from text files."""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mbctrl.base.errors import suggest
from mbctrl.base.extras import need
from mbctrl.base.logs import LogError
from mbctrl.calibrate.recipe import ColumnName, LogSpec

Rows = tuple[int, int]


@dataclass(frozen=True)
class Want:
    """One column a recipe asks for: ``signal`` is ``time``, ``position``, ``velocity``, ``effort`` or ``command``."""

    signal: str
    column: ColumnName

    @property
    def place(self) -> str:
        """What errors call it."""
        return f"column {self.column}" if isinstance(self.column, int) else f"column '{self.column}'"


@dataclass(frozen=True)
class Table:
    """``data`` (T, W) as logged, one column a ``Want``; ``units`` (W) as the file's header gives them, None where it does not.

    ``lines`` (T,): line of each row in a text file; in other files its row or message; counted from 1.
    """

    data: np.ndarray
    units: tuple[str | None, ...]
    lines: np.ndarray
    warnings: tuple[str, ...] = ()


def excerpt(rows: Rows | None, count: int, path: Path) -> slice:
    """Return the slice of ``count`` rows that ``rows`` (first and last, counted from 1) stands for.

    Errors:
        LogError: where there are no such rows.
    """
    first, last = rows or (1, count)
    if not count or not 1 <= first <= last <= count:
        raise LogError(f"expected rows within 1 to {count}, found {first} to {last}" if count else "no data", file=path, key="rows")
    return slice(first - 1, last)


def read_text(path: Path, spec: LogSpec, wants: Sequence[Want], rows: Rows | None, joints: Sequence[str]) -> Table:
    """Read delimited text, with or without a header, run logs with their ``# `` lines and ``name [unit]`` columns included.

    Errors:
        LogError: naming the first line that is cut, too long, too short or not a number, or the column that is not there.
    """
    lines, ended = _lines(path)
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if start == len(lines):
        raise LogError("no data", file=path)
    names = _header(path, spec, lines, start) if spec.header else None
    start += names is not None
    width = spec.width or len(names or split(lines[start], spec.delimiter))
    index, units = _find(path, spec, wants, names, width, start)
    body, warnings = lines[start:], []
    if body and not (ended and len(split(body[-1], spec.delimiter)) >= width):
        # Half a number still reads as a number: without its end the last line is not to be trusted.
        warnings.append(f"line {len(lines)}: the last line has no end; taken as cut and left out")
        rows = rows and (rows[0], min(rows[1], len(body) - 1) if rows[1] == len(body) else rows[1])
        body = body[:-1]
    chosen = excerpt(rows, len(body), path)
    start, body = start + chosen.start, body[chosen]
    _equal_widths(path, spec, body, width, start, "the header" if names else f"line {start + 1}")
    return Table(_numbers(path, spec, body, index, start), units, np.arange(start + 1, start + len(body) + 1), tuple(warnings))


def split(line: str, delimiter: str) -> list[str]:
    """Return the cells of a line."""
    if '"' in line:
        return next(csv.reader([line], delimiter=delimiter))
    return line.split() if delimiter == " " else line.split(delimiter)


def _lines(path: Path) -> tuple[list[str], bool]:
    """Return the lines up to the last that is not empty, and whether that one has its end."""
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix.lower() == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise LogError(f"cannot be read: {error}", file=path) from None
    text = text.rstrip("\0 \t")  # a file system's padding after a power cut
    lines = text.rstrip("\n\r \t").split("\n") if text.strip() else []
    return [line.rstrip("\r") for line in lines], text.endswith(("\n", "\r"))


def _header(path: Path, spec: LogSpec, lines: Sequence[str], start: int) -> list[str]:
    names = [cell.strip() for cell in split(lines[start], spec.delimiter)]
    if all(_is_number(name) for name in names):
        raise LogError("expected a header, found numbers; header: false?", file=path, key=f"line {start + 1}")
    if spec.width and len(names) != spec.width:
        raise LogError(f"expected {spec.width} columns, found {len(names)}", file=path, key=f"line {start + 1}")
    return names


def _find(
    path: Path, spec: LogSpec, wants: Sequence[Want], names: list[str] | None, width: int, start: int
) -> tuple[list[int], tuple[str | None, ...]]:
    """Return where each wanted column lies, and its unit, if the header has one."""
    bare = [name.partition(" [")[0] if name.endswith("]") else name for name in names or ()]
    units = [name.partition(" [")[2][:-1] if name.endswith("]") and " [" in name else None for name in names or [""] * width]
    index = []
    for want in wants:
        if isinstance(want.column, int):
            if want.column > width:
                found = f"expected at least {want.column} columns, found {width}"
                raise LogError(f"{found}{_other_delimiter(spec, width)}", file=path, key=f"line {max(start, 1)}")
            index.append(want.column - 1)
        elif names is None:
            raise LogError("a column by name needs a header; header: true?", file=path, key=want.place)
        else:
            within = names if want.column in names else bare
            if within.count(want.column) != 1:
                what = "appears more than once" if want.column in within else f"no such column{suggest(want.column, bare)}"
                raise LogError(f"{what}{_other_delimiter(spec, width)}", file=path, key=want.place)
            index.append(within.index(want.column))
    return index, tuple(units[i] for i in index)


def _other_delimiter(spec: LogSpec, width: int) -> str:
    return f"; is '{spec.delimiter}' the delimiter?" if width == 1 else ""


def _equal_widths(path: Path, spec: LogSpec, body: Sequence[str], width: int, start: int, whose: str) -> None:
    for number, line in enumerate(body, start + 1):
        plain = '"' not in line and spec.delimiter != " "
        found = line.count(spec.delimiter) + 1 if plain else len(split(line, spec.delimiter))
        if found != width:
            reason = "" if spec.width else f", as in {whose}"
            raise LogError(f"expected {width} columns{reason}, found {found}", file=path, key=f"line {number}")


def _numbers(path: Path, spec: LogSpec, body: Sequence[str], index: Sequence[int], start: int) -> np.ndarray:
    pandas = need("pandas", "calibrate", "reading a log")
    used = sorted(set(index))
    options = {"sep": r"\s+" if spec.delimiter == " " else spec.delimiter, "header": None, "usecols": used}
    try:
        frame = pandas.read_csv(io.StringIO("\n".join(body)), dtype=np.float64, **options)
        data = frame.to_numpy()
    except ValueError:  # the parser's own message names neither line nor column
        data = np.empty(0)
    if len(data) != len(body) or not np.isfinite(data).all():
        data = np.array(
            [[_number(path, n, i, split(line, spec.delimiter)[i]) for i in used] for n, line in enumerate(body, start + 1)]
        )
    return data[:, [used.index(i) for i in index]]


def _number(path: Path, line: int, index: int, cell: str) -> float:
    if not _is_number(cell):
        raise LogError(f"expected a number, found '{cell.strip()[:40]}'", file=path, key=f"line {line}, column {index + 1}")
    return float(cell)


def _is_number(cell: str) -> bool:
    try:
        return "_" not in cell and float(cell) is not None
    except ValueError:
        return False

"""Reads a log as a recipe describes it: SI units, the robot's joint order, every fault named with its line and column."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mbctrl.base.errors import SpecError
from mbctrl.base.logs import LogError
from mbctrl.base.robot import Robot
from mbctrl.calibrate.containers import read_mcap, read_npz, read_parquet
from mbctrl.calibrate.recipe import UNITS, LogSpec, Signal
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.tables import Rows, Table, Want, read_text

SAMPLES = 20
"""Fewer samples are no log."""
ABSURD = 1e6
"""No position, velocity, torque or current of an arm is larger, in SI units."""
LATEST = 1e11
"""No stamp is later [s]."""
GAP = 5.0
"""Longer silences than this many median periods split a log whose recipe does not say."""
JITTER = 0.05
"""Stamps whose 95th percentile is further than this part of the median period from it are reported as uneven."""
REPEATED = 0.01
"""Part of the samples that may repeat the one before."""
_SIGNALS = ("position", "velocity", "effort", "command")
_READERS = {".csv": read_text, ".txt": read_text, ".npz": read_npz, ".parquet": read_parquet, ".mcap": read_mcap}


def read_recording(path: str | Path, spec: LogSpec, robot: Robot, rows: Rows | None = None) -> Recording:
    """Read a log.

    By suffix: ``.csv`` and ``.txt``, also ``.gz``, run logs among them (where the header gives units, they must be the
    recipe's); ``.npz``, whose (T, k) array ``q`` has columns ``q[0]`` to ``q[k-1]`` and, where k is the number of joints,
    ``q.JOINT``; ``.parquet``; ``.mcap`` with JointState messages.

    Args:
        path: the file.
        spec: which columns, in which units.
        robot: whose joints the columns are.
        rows: first and last row of data to take, counted from 1; whatever is wrong outside of them does not matter.

    Errors:
        SpecError: where the recipe does not fit the robot, naming the key.
        LogError: naming the file, and the line and column at fault.
    """
    path = Path(path)
    wants = columns_wanted(spec, robot)
    if not path.is_file():
        raise LogError("no such file", file=path)
    table = _read(path, spec, wants, rows, robot)
    _check_units(path, table, wants, spec)
    _check_numbers(path, table, wants, spec)
    table = _without_repeats(table, spec)
    t = _stamps(path, table, spec)
    if len(t) < SAMPLES:
        raise LogError(f"expected at least {SAMPLES} samples, found {len(t)}", file=path)
    parts, warnings = _parts(path, t, table.lines, spec)
    values = {name: _values(getattr(spec, name), table.data[:, _block(wants, name)]) for name in _SIGNALS if getattr(spec, name)}
    gains = np.array(spec.gains) if UNITS[spec.effort.unit][0] == "current" else None
    return Recording(
        robot.joints, t, values["position"], values["effort"] * (1 if gains is None else gains),
        v=values.get("velocity"), command=values.get("command"), gains=gains, file=str(path), sha256=_sha256(path),
        lines=table.lines, parts=parts, warnings=(*table.warnings, *warnings),
    )  # fmt: skip


def columns_wanted(spec: LogSpec, robot: Robot) -> list[Want]:
    """Return the columns a recipe asks for; SpecError names the key where it does not fit the robot."""
    wants = [Want("time", spec.time.column)] if spec.time else []
    for name in _SIGNALS:
        signal = getattr(spec, name)
        if signal is not None and len(signal.columns) != robot.nq:
            found = f"expected {robot.nq} columns, one for each joint of {robot.name}, found {len(signal.columns)}"
            raise SpecError(found, key=f"{name}.columns")
        wants += [Want(name, column) for column in signal.columns] if signal else []
    if spec.gains is not None and len(spec.gains) != robot.nq:
        raise SpecError(f"expected {robot.nq} values, one for each joint of {robot.name}, found {len(spec.gains)}", key="gains")
    return wants


def _read(path: Path, spec: LogSpec, wants: Sequence[Want], rows: Rows | None, robot: Robot) -> Table:
    packed = path.suffix.lower() == ".gz"
    suffix = Path(path.stem if packed else path.name).suffix.lower()
    reader: Callable[..., Table] | None = _READERS.get(suffix)
    if reader is None or packed and reader is not read_text:
        raise LogError("expected a log in .csv, .txt, .csv.gz, .txt.gz, .npz, .parquet or .mcap", file=path)
    return reader(path, spec, wants, rows, robot.joints)


def _unit(want: Want, spec: LogSpec) -> str:
    return spec.time.unit if want.signal == "time" else getattr(spec, want.signal).unit


def _check_units(path: Path, table: Table, wants: Sequence[Want], spec: LogSpec) -> None:
    for want, found in zip(wants, table.units):
        expected = _unit(want, spec)
        if found is not None and found.replace("Nm", "N·m") != expected.replace("Nm", "N·m"):
            raise LogError(f"expected [{expected}] as in the recipe, found [{found}] in the log", file=path, key=want.place)


def _check_numbers(path: Path, table: Table, wants: Sequence[Want], spec: LogSpec) -> None:
    """Refuse what is not a finite number of a possible size, the first one in the file first."""
    factor = np.array([UNITS[_unit(want, spec)][1] for want in wants])
    largest = np.array([LATEST if want.signal == "time" else ABSURD for want in wants])
    wrong = ~(np.abs(table.data) * factor <= largest)  # NaN compares false
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        value, unit = table.data[row, column], _unit(wants[column], spec)
        expected = "a finite number" if not np.isfinite(value) else f"at most {largest[column] / factor[column]:.0e} {unit}"
        key = f"line {table.lines[row]}, {wants[column].place}"
        raise LogError(f"expected {expected}, found {value:.4g}", file=path, key=key)


def _without_repeats(table: Table, spec: LogSpec) -> Table:
    """Drop rows that repeat the one before, stamp and all; say so where only the values repeat."""
    same = np.r_[False, (np.diff(table.data, axis=0) == 0).all(axis=1)]
    keep = ~same if spec.time else np.ones(len(same), bool)
    said = list(table.warnings)
    if not keep.all():
        said.append(f"line {table.lines[same][0]}: {same.sum()} rows repeat the one before, the first one here; left out")
    data, lines = table.data[keep], table.lines[keep]
    still = np.r_[False, (np.diff(data[:, 1 if spec.time else 0 :], axis=0) == 0).all(axis=1)]
    if still.sum() > REPEATED * len(still):
        said.append(
            f"line {lines[still][0]}: {still.sum()} of {len(still)} samples have the values of the one before, the first one"
            " here; logged faster than the robot reports?"
        )
    return Table(data, table.units, lines, tuple(said))


def _stamps(path: Path, table: Table, spec: LogSpec) -> np.ndarray:
    """Return t (T,) [s], strictly increasing."""
    if spec.time is None:
        return np.arange(len(table.data)) / spec.rate
    t = table.data[:, 0] * UNITS[spec.time.unit][1]
    step = np.diff(t)
    if (step <= 0).any():
        k = int(np.argmax(step <= 0))
        what = "stands still" if step[k] == 0 else "goes backwards"
        was, now = table.data[k : k + 2, 0]
        key = f"line {table.lines[k + 1]}, {Want('time', spec.time.column).place}"
        raise LogError(f"time {what}: expected more than {was:.10g} {spec.time.unit}, found {now:.10g}", file=path, key=key)
    return t


def _parts(path: Path, t: np.ndarray, lines: np.ndarray, spec: LogSpec) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    step, said = np.diff(t), []
    median = float(np.median(step))
    if spec.rate is not None and not 0.5 < spec.rate * median < 2:
        found = f"expected about {spec.rate:g} samples a second, found {1 / median:.4g}; is {spec.time.unit} the unit of time?"
        raise LogError(found, file=path, key=Want("time", spec.time.column).place)
    gap = step > (spec.largest_gap or GAP * median)
    if gap.any():
        worst = int(np.argmax(step))
        said.append(f"line {lines[worst + 1]}: {gap.sum()} gaps, the longest of {step[worst]:.3g} s here; the log is split there")
    off = float(np.quantile(np.abs(step[~gap] - median), 0.95)) if not gap.all() else 0.0
    if off > JITTER * median:
        said.append(f"uneven stamps: 5 % of the periods are more than {off * 1e3:.2g} ms off the median of {median * 1e3:.4g} ms")
    edges = [0, *(np.flatnonzero(gap) + 1), len(t)]
    return tuple((int(first), int(past)) for first, past in zip(edges, edges[1:])), said


def _block(wants: Sequence[Want], signal: str) -> list[int]:
    return [i for i, want in enumerate(wants) if want.signal == signal]


def _values(signal: Signal, columns: np.ndarray) -> np.ndarray:
    """Return (T, n) in SI units out of the columns as logged."""
    values = columns * UNITS[signal.unit][1] * np.array(signal.sign or 1)
    if signal.matrix is not None:
        values = values @ np.array(signal.matrix).T
    return values if signal.offset is None else values + np.array(signal.offset)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

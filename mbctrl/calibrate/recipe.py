"""``calibration/NAME.yaml``, what a log's columns are: names or numbers, units, signs, couplings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mbctrl.base.robot import Positive
from mbctrl.base.spec import Number, Spec

ColumnName = str | Annotated[int, Field(ge=1, strict=True)]
"""A column by the name in its header, or by its number, counted from 1."""

UNITS: dict[str, tuple[str, float]] = {
    "rad": ("angle", 1.0),
    "deg": ("angle", 0.017453292519943295),
    "m": ("angle", 1.0),
    "mm": ("angle", 1e-3),
    "rad/s": ("rate", 1.0),
    "deg/s": ("rate", 0.017453292519943295),
    "m/s": ("rate", 1.0),
    "mm/s": ("rate", 1e-3),
    "N·m": ("torque", 1.0),
    "Nm": ("torque", 1.0),
    "N": ("torque", 1.0),
    "A": ("current", 1.0),
    "mA": ("current", 1e-3),
    "s": ("time", 1.0),
    "ms": ("time", 1e-3),
    "us": ("time", 1e-6),
    "ns": ("time", 1e-9),
}
"""Unit to what it measures and its factor to SI."""


class TimeColumn(Spec):
    """The stamps."""

    column: ColumnName
    unit: Literal["s", "ms", "us", "ns"] = "s"


class Signal(Spec):
    """One value a joint, in the robot's joint order: ``matrix @ (factor of unit * sign * column) + offset``.

    ``matrix`` (n, n) undoes couplings and gear ratios, for logs taken on the motors' side; ``offset`` (n,) is in SI units.
    Of an effort logged as a current all of this is done in amperes, and the gains are applied to the result.
    """

    columns: tuple[ColumnName, ...]
    unit: str
    sign: tuple[Literal[-1, 1], ...] | None = None
    matrix: tuple[tuple[Number, ...], ...] | None = None
    offset: tuple[Number, ...] | None = None

    @model_validator(mode="after")
    def _known(self) -> Signal:
        if self.unit not in UNITS:
            raise ValueError(f"unit: expected one of {', '.join(UNITS)}, found {self.unit!r}")
        twice = next((column for i, column in enumerate(self.columns) if column in self.columns[:i]), None)
        if twice is not None:
            raise ValueError(f"columns: {twice!r} appears twice")
        lengths = {"sign": self.sign, "matrix": self.matrix, "offset": self.offset}
        lengths |= {f"matrix[{i}]": row for i, row in enumerate(self.matrix or ())}
        for key, value in lengths.items():
            if value is not None and len(value) != len(self.columns):
                raise ValueError(f"{key}: expected {len(self.columns)} values, one a column, found {len(value)}")
        return self


class LogSpec(Spec):
    """How a log is read.

    ``header``: the first line names the columns (CSV). ``width``: how many columns a line has (CSV); absent, as many as the
    first one. ``delimiter``: one character; a space stands for any blanks. ``topic``: of JointState messages (MCAP), whose
    columns are joint names and whose time is ``stamp`` (the message's own) or ``log_time`` (the recorder's). ``rate`` [Hz]
    is the nominal one; it stands for the stamps where ``time`` is absent. ``gains`` [N·m/A] turn currents into torques, one
    a joint. ``largest_gap`` [s]: longer silences split the log; absent, five sampling periods.
    """

    header: bool = True
    width: Annotated[int, Field(ge=1, strict=True)] | None = None
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    topic: str | None = None
    time: TimeColumn | None = None
    rate: Positive | None = None  # [Hz]
    position: Signal
    velocity: Signal | None = None
    effort: Signal
    command: Signal | None = None
    gains: tuple[Positive, ...] | None = None  # [N·m/A]
    largest_gap: Positive | None = None  # [s]

    @model_validator(mode="after")
    def _complete(self) -> LogSpec:
        if self.time is None and self.rate is None:
            raise ValueError("expected time or rate, found neither")
        wanted = {"position": {"angle"}, "velocity": {"rate"}, "command": {"angle"}, "effort": {"torque", "current"}}
        for name, kinds in wanted.items():
            signal = getattr(self, name)
            if signal is not None and UNITS[signal.unit][0] not in kinds:
                raise ValueError(f"{name}.unit: expected a unit of {' or '.join(sorted(kinds))}, found {signal.unit!r}")
        if UNITS[self.effort.unit][0] == "current" and self.gains is None:
            raise ValueError("gains: needed where effort is a current")
        return self

"""``calibration/NAME.yaml``, what a log's columns are: names or numbers, units, signs, couplings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mbctrl.base.find import find
from mbctrl.base.robot import Positive
from mbctrl.base.spec import Number, Spec, load_yaml, validate

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


class FilterSpec(Spec):
    """Zero-phase Butterworth filters; null cutoffs are chosen by the rule in ``mbctrl.calibrate.signals``."""

    order: Annotated[int, Field(ge=1, le=8, strict=True)] = 5
    motion: Positive | None = None  # [Hz], of positions, velocities and accelerations
    effort: Positive | None = None  # [Hz]


class FrictionSpec(Spec):
    """A friction family; see ``mbctrl.calibrate.friction``."""

    memory: Literal["sign", "tanh", "dahl"] = "sign"
    length: Positive = 2e-4  # [rad]
    speed: Positive = 0.05  # [rad/s]
    terms: tuple[Literal["coulomb", "viscous", "offset", "root", "stribeck", "load", "asymmetric"], ...] = (
        "coulomb",
        "viscous",
        "offset",
    )

    @model_validator(mode="after")
    def _once(self) -> FrictionSpec:
        if len(set(self.terms)) != len(self.terms) or not self.terms:
            raise ValueError(f"terms: expected at least one, each once, found {list(self.terms)}")
        return self


class ParameterSpec(Spec):
    """What a recipe says of a parameter: ``fixed`` at a value, or free with a ``prior`` (mean, sd) and ``bounds``.

    ``free``: it is to be fitted; refused by name where the log says nothing of it.
    """

    fixed: Number | None = None
    prior: tuple[Number, Positive] | None = None
    bounds: tuple[Number | None, Number | None] | None = None
    free: bool = False

    @model_validator(mode="after")
    def _one(self) -> ParameterSpec:
        if self.fixed is not None and (self.free or self.prior or self.bounds):
            raise ValueError("fixed stands alone: not with free, prior or bounds")
        low, high = self.bounds or (None, None)
        if low is not None and high is not None and not low < high:
            raise ValueError(f"bounds: {low} is not below {high}")
        return self


class FitSpec(Spec):
    """What is fitted, and how.

    ``estimator``: ``weighted`` least squares; ``huber``, for logs with outliers; ``instrumental``, for noisy positions,
    with the logged command as the instrument. ``links``, ``rotors``: fit the links' parameters, the rotors' inertias; else
    they are the model's. ``friction``: a family, or ``auto``: chosen by cross-validation inside the training log.
    ``prior_weight``: of the links' divergence from the model, against a mean squared residual in units of the noise.
    ``encoders``: ``free`` finds the encoders' zeros too, corrects positions by them and fits anew. ``delay``: ``remove``
    moves efforts by the delay a first fit finds and fits anew; ``report`` only says what it is. ``block`` [s]: stretch of
    time drawn as one by the bootstrap. ``parameters``: by name (``elbow_joint.armature``) or pattern (``*.coulomb``).
    """

    estimator: Literal["weighted", "huber", "instrumental"] = "weighted"
    links: bool = True
    rotors: bool = True
    friction: Literal["auto"] | FrictionSpec = "auto"
    prior_weight: Positive = 1e-3
    encoders: Literal["fixed", "free"] = "fixed"
    delay: Literal["report", "remove"] = "report"
    block: Positive = 1.0  # [s]
    draws: Annotated[int, Field(ge=20, le=10000, strict=True)] = 200
    confidence: Annotated[Number, Field(gt=0.5, lt=1.0)] = 0.95
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    parameters: Mapping[str, ParameterSpec] = Field(default_factory=dict)


class SimulatedParameter(Spec):
    """What a recipe says of a parameter of the simulation route; see ``mbctrl.calibrate.unknowns``."""

    start: Number | None = None
    bounds: tuple[Number, Number] | None = None
    prior: tuple[Number, Positive] | None = None
    free: bool = True


class SimulateSpec(Spec):
    """What the simulation route fits after the regression, for what the regression cannot see.

    ``parameters``: by name or pattern, such as ``delay``, ``*.stiffness``, ``payload.mass``. ``mode``: what drove the arm in
    the log, ``torque`` (its efforts) or ``impedance`` (its commands, through the robot's joint impedance). ``window`` [s] of
    each piece of the log that is simulated; ``starts``: descents from different points; ``huber``: for logs with outliers.
    """

    parameters: Mapping[str, SimulatedParameter] = Field(min_length=1)
    mode: Literal["torque", "impedance"] = "torque"
    window: Positive = 0.4  # [s]
    starts: Annotated[int, Field(ge=1, le=50, strict=True)] = 1
    huber: bool = False


class Recipe(Spec):
    """``calibration/NAME.yaml``: whose logs, how they are read, what is fitted."""

    robot: str
    log: LogSpec
    filter: FilterSpec = FilterSpec()
    fit: FitSpec = FitSpec()
    simulate: SimulateSpec | None = None


def load_recipe(name: str) -> tuple[Recipe, Path]:
    """Load a recipe by name or path; SpecError names file and key."""
    path = find("calibration", name)
    return validate(Recipe, load_yaml(path), path), path

"""``robots/NAME/robot.yaml``: joints in order, limits, rates, control mode and gains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mbctrl.base.errors import SpecError
from mbctrl.base.find import find
from mbctrl.base.spec import Number, Spec, load_yaml, validate

Vector = tuple[Number, ...]
Positive = Annotated[Number, Field(gt=0)]


class Limits(Spec):
    """Joint limits, each (nu,) in the robot's joint order; SI units, a slide joint's in metres and newtons."""

    position_lower: Vector  # [rad]
    position_upper: Vector  # [rad]
    velocity: tuple[Positive, ...]  # [rad/s]
    acceleration: tuple[Positive, ...] | None = None  # [rad/s^2]
    jerk: tuple[Positive, ...] | None = None  # [rad/s^3]
    effort: tuple[Positive, ...]  # [N·m]
    effort_rate: tuple[Positive, ...] | None = None  # [N·m/s]

    @model_validator(mode="after")
    def _order(self) -> Limits:
        for joint, (low, high) in enumerate(zip(self.position_lower, self.position_upper)):
            if not low < high:
                raise ValueError(f"position_lower[{joint}] = {low} is not below position_upper[{joint}] = {high}")
        return self


class Control(Spec):
    """How the arm takes commands.

    ``gravity_compensation`` says that the arm adds its gravity torque to whatever is commanded, as libfranka and UR's
    direct torque mode do. ``stiffness`` [N·m/rad] and ``damping`` [N·m·s/rad] are the joint impedance gains, (nu,).
    """

    mode: Literal["impedance", "torque"]
    rate: Positive  # [Hz]
    gravity_compensation: bool = False
    stiffness: Vector
    damping: Vector


class Robot(Spec):
    """A robot as its ``robot.yaml`` describes it; ``path`` is where that file lies."""

    name: str
    description: str
    model: str
    joints: tuple[str, ...] = Field(min_length=1)
    home: Vector  # [rad]
    tool: str
    limits: Limits
    control: Control
    path: Path

    @model_validator(mode="after")
    def _lengths(self) -> Robot:
        number = len(self.joints)
        if len(set(self.joints)) != number:
            raise ValueError("joints: a name appears twice")
        vectors = {"home": self.home}
        for group in ("limits", "control"):
            part = getattr(self, group)
            vectors |= {f"{group}.{key}": value for key in type(part).model_fields if isinstance(value := getattr(part, key), tuple)}
        for key, value in vectors.items():
            if len(value) != number:
                raise ValueError(f"{key}: expected {number} values, one for each joint, found {len(value)}")
        return self

    @property
    def nu(self) -> int:
        """Number of joints and commands."""
        return len(self.joints)

    @property
    def model_path(self) -> str:
        """The model's file, or a ``dm_control:`` name."""
        return self.model if ":" in self.model else str(self.path.parent / self.model)


def load_robot(name: str, *, file: str | Path | None = None, key: str | None = None) -> Robot:
    """Load a robot by name or path.

    Errors:
        SpecError: naming file and key.
    """
    path = find("robots", name, file=file, key=key)
    if path.suffix not in (".yaml", ".yml"):
        raise SpecError("expected a robot.yaml; 'mbctrl check MODEL' inspects a bare MJCF or URDF", file=path)
    data = load_yaml(path)
    if "path" in data:
        raise SpecError("unknown key", file=path, key="path")
    return validate(Robot, {**data, "path": path}, path)

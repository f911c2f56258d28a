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
    """Joint limits in the robot's joint order; SI units, a slide joint's in metres and newtons.

    Position, velocity, acceleration and jerk have one value a joint, effort and its rate one an actuated joint.
    """

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
    direct torque mode do. ``stiffness`` [N·m/rad] and ``damping`` [N·m·s/rad] are the joint impedance gains, (nu,), one
    an actuated joint.
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
    actuated: tuple[str, ...] | None = None  # the joints that take commands; null: all of them
    home: Vector  # [rad]
    tool: str
    limits: Limits
    control: Control
    path: Path

    @model_validator(mode="after")
    def _lengths(self) -> Robot:
        for key, group in (("joints", self.joints), ("actuated", self.driven)):
            if len(set(group)) != len(group):
                raise ValueError(f"{key}: a name appears twice")
        unknown = set(self.driven) - set(self.joints)
        if unknown:
            raise ValueError(f"actuated: '{min(unknown)}' is not among joints")
        per_joint = {"home": self.home}
        per_command = {f"control.{key}": getattr(self.control, key) for key in ("stiffness", "damping")}
        for key in type(self.limits).model_fields:
            (per_command if key.startswith("effort") else per_joint)[f"limits.{key}"] = getattr(self.limits, key)
        for vectors, number, what in ((per_joint, self.nq, "joint"), (per_command, self.nu, "actuated joint")):
            for key, value in vectors.items():
                if value is not None and len(value) != number:
                    raise ValueError(f"{key}: expected {number} values, one for each {what}, found {len(value)}")
        return self

    @property
    def driven(self) -> tuple[str, ...]:
        """The actuated joints, in order."""
        return self.joints if self.actuated is None else self.actuated

    @property
    def nq(self) -> int:
        """Number of joints."""
        return len(self.joints)

    @property
    def nu(self) -> int:
        """Number of commands: actuated joints."""
        return len(self.driven)

    @property
    def command_index(self) -> list[int]:
        """For each command the index of its joint."""
        return [self.joints.index(joint) for joint in self.driven]

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

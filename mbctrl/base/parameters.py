"""``calibration/NAME_fitted.yaml``: a robot's calibrated parameters, with their uncertainties and where they come from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field, field_validator, model_validator

from mbctrl.base.errors import SpecError
from mbctrl.base.files import write_whole
from mbctrl.base.find import find
from mbctrl.base.robot import Positive
from mbctrl.base.scene import Point
from mbctrl.base.spec import Number, Spec, dump_yaml, load_yaml, validate

NonNegative = Annotated[Number, Field(ge=0)]
Inertia = tuple[Number, Number, Number, Number, Number, Number]

_FLAT = 1e-9  # a flat body is the limit of what is possible: rounding may put it this share of the largest moment beyond
_HEADER = """\
# Calibrated parameters of {robot}; what is left out is as in the robot's model.
# A joint's mass [kg], com [m] and inertia [kg·m²] (xx, yy, zz, xy, xz, yz about the centre of mass) are of the whole
# rigid link it carries, in the frame of the body that has the joint. armature [kg·m²], damping [N·m·s/rad] and Coulomb
# friction [N·m] are the joint's own; a slide joint's are in [kg], [N·s/m] and [N].
"""


def inertia_matrix(values: Inertia) -> np.ndarray:
    """Return the symmetric (3, 3) of xx, yy, zz, xy, xz, yz."""
    xx, yy, zz, xy, xz, yz = values
    return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])


def inertia_values(matrix: np.ndarray) -> Inertia:
    """Return xx, yy, zz, xy, xz, yz of a symmetric (3, 3)."""
    pairs = ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2))
    return tuple(float(matrix[i, j] + matrix[j, i]) / 2 for i, j in pairs)


class JointParameters(Spec):
    """A joint and the link it carries: every body that moves with the joint and with no later one.

    ``mass`` [kg], ``com`` [m] and ``inertia`` [kg·m²] (xx, yy, zz, xy, xz, yz about the centre of mass) are in the frame
    of the body that has the joint; ``armature`` [kg·m²], ``damping`` [N·m·s/rad], ``friction`` (Coulomb) [N·m].
    None: as in the model.
    """

    mass: Positive | None = None
    com: Point | None = None
    inertia: Inertia | None = None
    armature: NonNegative | None = None
    damping: NonNegative | None = None
    friction: NonNegative | None = None

    @field_validator("inertia")
    @classmethod
    def _possible(cls, value: Inertia | None) -> Inertia | None:
        """Refuse what no distribution of mass has: the pseudo-inertia has to be positive definite.

        With the mass positive that is tr(I)/2 - I, the second moments about the centre of mass, being so, which is the
        triangle inequality of the principal moments. Source: Wensing, Kim, Slotine, "Linear Matrix Inequalities for
        Physically Consistent Inertial Parameter Identification" (2018).
        """
        if value is None:
            return None
        low, middle, high = np.linalg.eigvalsh(inertia_matrix(value))
        moments = f"principal moments {low:.4g}, {middle:.4g}, {high:.4g}"
        if not low > 0:
            raise ValueError(f"expected a positive definite inertia, found {moments}")
        if not high <= low + middle + _FLAT * high:
            raise ValueError(f"expected no principal moment above the sum of the other two, found {moments}")
        return value


class Estimate(Spec):
    """One fitted number; ``standard_error``, the interval ``low`` … ``high`` and ``prior`` are in ``unit`` too.

    ``status``: ``free`` was fitted, ``fixed`` was not to be, ``unidentified`` could not be told from the data.
    """

    name: str
    unit: str
    value: Number
    standard_error: NonNegative | None = None
    low: Number | None = None
    high: Number | None = None
    prior: Number | None = None
    status: Literal["free", "fixed", "unidentified"]

    @model_validator(mode="after")
    def _order(self) -> Estimate:
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"expected low <= high, found {self.low} and {self.high}")
        return self


class FittedParameters(Spec):
    """A robot's calibrated parameters; ``path`` is where they were read, not part of the file."""

    model_config = ConfigDict(ser_json_inf_nan="constants")  # provenance may hold such numbers; they are not to become null

    robot: str
    joints: Mapping[str, JointParameters]
    friction_model: Mapping[str, Any] = Field(default_factory=dict)  # a richer friction law than a model file can hold
    estimates: tuple[Estimate, ...] = ()
    provenance: Mapping[str, Any] = Field(default_factory=dict)  # logs and their hashes, recipe, versions, date
    path: Path | None = Field(default=None, exclude=True)


def load_parameters(name: str | Path, *, file: str | Path | None = None, key: str | None = None) -> FittedParameters:
    """Load calibrated parameters by name (``ur10e_fitted``) or path.

    Args:
        file, key: where the name was written, for the error.

    Errors:
        SpecError: naming file, joint and what was found.
    """
    path = find("parameters", str(name), file=file, key=key)
    data = load_yaml(path)
    if "path" in data:
        raise SpecError("unknown key", file=path, key="path")
    return validate(FittedParameters, {**data, "path": path}, path)


def write_parameters(path: str | Path, parameters: FittedParameters) -> None:
    """Write a file that ``load_parameters`` reads back the same, to the last digit; never half of one.

    Errors:
        SpecError: where it cannot be written.
    """
    data = parameters.model_dump(mode="json")
    data["joints"] = {name: _given(joint) for name, joint in data["joints"].items()}
    data["estimates"] = [_given(estimate) for estimate in data["estimates"]]
    data = {key: value for key, value in data.items() if value or key == "joints"}
    write_whole(path, _HEADER.format(robot=parameters.robot) + dump_yaml(data, flow=True))


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}

"""The simulation route after the regression: what moves the arm that the regression cannot see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mbctrl.base.parameters import Estimate
from mbctrl.calibrate.identify import Fit as RegressionFit
from mbctrl.calibrate.output_error import Fit, fit
from mbctrl.calibrate.recipe import FilterSpec, SimulateSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.calibrate.simulate import Twin
from mbctrl.calibrate.unknowns import Arm, unknowns
from mbctrl.dynamics.actuation import Torque, actuation_of
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import RigidTree

_STEP = 0.002  # [s]


@dataclass(frozen=True)
class Refined:
    """The arm as refined, and the fit that did it."""

    tree: RigidTree
    fit: Fit

    def estimates(self) -> list[Estimate]:
        """Return what was fitted, as a parameter file has it."""
        own = self.fit
        rows = zip(own.names, own.units, own.values, own.errors, own.interval())
        return [
            Estimate(
                name=f"{name} (simulated)",
                unit=unit,
                value=float(value),
                standard_error=None if error != error else float(error),
                low=None if error != error else float(low),
                high=None if error != error else float(high),
                status="unidentified" if name in own.uninformed else "free",
            )
            for name, unit, value, error, (low, high) in rows
        ]


def refine(
    model: Model,
    first: RegressionFit,
    spec: SimulateSpec,
    recordings: Sequence[Recording],
    filters: FilterSpec,
    advance: Callable[[str], None] = lambda text: None,
) -> Refined:
    """Return the arm of ``first`` with the parameters ``spec`` names fitted by simulation, beginning where it is.

    Errors:
        CalibrationError: naming the parameter.
    """
    robot = model.robot
    served = spec.mode == "impedance"
    if served and robot.control.mode != "impedance":
        raise CalibrationError(f"{robot.name} takes torques, not references", key="simulate.mode")
    dynamics = RigidBodyDynamics(
        first.tree,
        _STEP,
        actuation=actuation_of(robot) if served else Torque(),
        commanded=robot.command_index,
        effort_limit=robot.limits.effort if served else None,
        gravity_compensation=served and robot.control.gravity_compensation,
        dtype=torch.float64,
    )
    wanted = {name: says.model_dump(exclude_none=True) for name, says in spec.parameters.items()}
    if "delay" in wanted and not served:
        wanted["delay"].setdefault("start", -first.delay)
    arm = Arm(dynamics, unknowns(dynamics, wanted), robot.tool)
    twin = Twin(arm, recordings, window=spec.window, spec=filters)
    found = fit(twin, starts=spec.starts, huber=spec.huber, advance=lambda text: advance(f"simulating: {text}"))
    return Refined(arm.tree(found.everything), found)

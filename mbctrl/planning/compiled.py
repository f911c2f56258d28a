"""From the arm in torch and its task to compiled rollouts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.gate import gate_capsules
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.rigid_body import FRICTION_SPEED, RigidBodyDynamics
from mbctrl.dynamics.tree import Frame
from mbctrl.kernels.residual import TracedResidual, member_weights
from mbctrl.kernels.step import Drive
from mbctrl.kernels.trace import Goal, Traced, trace_dynamics, trace_objective
from mbctrl.planning.engines import CpuEngine, Engine
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.risk import Risk
from mbctrl.planning.search import Drawing, KernelDynamics, KernelSearch
from mbctrl.tasks.task import Task


def drive_of(dynamics: RigidBodyDynamics) -> Drive:
    """Return how the torch dynamics are actuated, in the form kernels are traced from."""
    servo = dynamics.actuation if isinstance(dynamics.actuation, Impedance) else None
    return Drive(
        commanded=tuple(dynamics.commanded),
        stiffness=None if servo is None else tuple(servo.stiffness),
        damping=None if servo is None else tuple(servo.damping),
        effort_limit=dynamics.effort_limit,
        gravity_compensation=dynamics.compensated,
        integrator=dynamics.integrator,
        friction_speed=FRICTION_SPEED,
    )


def traced_residual(hybrid: HybridDynamics) -> TracedResidual:
    """Return the residual of ``hybrid`` as kernels take it."""
    return TracedResidual(hybrid.residual, gate_capsules(hybrid.base.tree, hybrid.tool), hybrid.tool)


def kernel_dynamics(dynamics: RigidBodyDynamics, engine: CpuEngine, residual: TracedResidual | None = None) -> KernelDynamics:
    """Return the arm's compiled rollouts; the engine's precision is theirs."""
    what = {"residual": residual, "contact": dynamics.contact, "payload": dynamics.carrier}
    traced = trace_dynamics(dynamics.tree, drive_of(dynamics), **what)
    return KernelDynamics(traced, dynamics.dt, engine, None if residual is None else residual.weights)


def term_factors(task: Task, steps: int, dt: float, discount: float = 1.0) -> np.ndarray:
    """Return (H, terms) what each term with a weight counts in each step: weight, discount and ``dt`` [s] multiplied."""
    when = dt * discount ** np.arange(steps)
    terms = [term for term in task.terms.values() if term.weight > 0]
    factors = np.stack([term.weight * when for term in terms], 1)
    factors[-1] += [term.weight * term.terminal * discount**steps for term in terms]
    return factors


def kernel_search(
    dynamics: RigidBodyDynamics,
    tool: Frame,
    task: Task,
    knots: Knots,
    noise: Noise,
    *,
    samples: int,
    lower: np.ndarray,
    upper: np.ndarray,
    engine: Engine,
    discount: float = 1.0,
    obstacles: Sequence[Obstacle] = (),
    residual: TracedResidual | None = None,
    risk: Risk | None = None,
    thing: Frame | None = None,
) -> KernelSearch:
    """Return the compiled search of the arm and task.

    Args:
        dynamics: the arm in torch, what kernels are traced from.
        tool: the tool's frame.
        task, discount, obstacles: the objective.
        knots, noise: the action parametrisation and its noise.
        samples, lower, upper, engine: as ``KernelSearch``.
        residual: what is learnt on top of the arm.
        risk: makes one cost of those of its members, which roll out one by one; None: they are averaged in every step.
        thing: the goal's object, where that is not the tool.

    Errors:
        TypeError: where a term cannot be traced, when the search is first used.
    """
    rolled, weights = residual, None if residual is None else residual.weights
    if residual is not None and risk is not None:
        rolled, weights = residual.member(0), member_weights(residual.residual)
    colour = None if noise.colour is None else tuple(tuple(row) for row in noise.colour.tolist())

    def traced(goal: Goal) -> Traced:
        arm = (dynamics.tree, drive_of(dynamics), dynamics.dt)
        return trace_objective(*arm, tool, task, goal, obstacles, rolled, dynamics.contact, dynamics.carrier, thing)

    return KernelSearch(
        traced,
        term_factors(task, knots.steps, dynamics.dt, discount),
        knots,
        Drawing(colour, None if noise.counted else noise.draw),
        samples=samples,
        lower=lower,
        upper=upper,
        engine=engine,
        weights=weights,
        risk=risk,
    )

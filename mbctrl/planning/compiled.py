"""Compiled rollouts as the planner's model and objective: the work in one call to a kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.rigid_body import FRICTION_SPEED, RigidBodyDynamics
from mbctrl.dynamics.tree import Frame
from mbctrl.kernels.llvm import Sampling
from mbctrl.kernels.program import Program
from mbctrl.kernels.step import Drive
from mbctrl.kernels.trace import Goal, Traced, trace_dynamics, trace_objective
from mbctrl.planning.arrays import Array, host, like, namespace
from mbctrl.planning.engines import CpuEngine, Engine
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.objective import Parameters
from mbctrl.planning.planner import Search
from mbctrl.planning.rules.base import Distribution
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


class KernelDynamics:
    """Rollouts of an arm by a compiled kernel behind the contract of ``RigidBodyDynamics`` (without gradients).

    Takes and returns numpy arrays or torch tensors in the processor's memory.

    Args:
        dynamics: the same arm in torch; its precision is the kernel's.
        engine: this processor.
    """

    def __init__(self, dynamics: RigidBodyDynamics, engine: CpuEngine) -> None:
        self.dt, self.nq, self.nx, self.nu = dynamics.dt, dynamics.nq, dynamics.nx, dynamics.nu
        self.traced = trace_dynamics(dynamics.tree, drive_of(dynamics))
        self._engine, self._code = engine, engine.compile(self.traced.program, None)

    def with_dt(self, dt: float) -> KernelDynamics:
        """Return the same arm with another time step [s]; the code is shared."""
        other = object.__new__(KernelDynamics)
        other.__dict__ = {**self.__dict__, "dt": dt}
        return other

    def step(self, x: Array, u: Array) -> Array:
        """Return the state (nx, N) one step after ``x`` under commands ``u`` (nu, N)."""
        return self.rollout(x, u[None])[1]

    def rollout(self, x0: Array, u: Array) -> Array:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""
        horizon, samples = u.shape[0], u.shape[2]
        width = max(samples, self._engine.least)
        start, commands = self._wide(x0, width), self._wide(u, width)
        states = self._engine.empty(horizon + 1, self.nx, width)
        if horizon == 0:
            states[0] = start
        else:
            given = {"start": start, "commands": commands, "uniform": self._engine.array([self.dt]), "states": states}
            self._engine.run(self._code, given, samples=width, steps=horizon, fixed=0, seed=0, draw=0)
        found = states[:, :, :samples]
        return found if isinstance(x0, np.ndarray) else like(found, x0)

    def _wide(self, rows: Array, samples: int) -> np.ndarray:
        """Return rows (..., N) as a contiguous array of at least ``samples`` samples, the last one repeated."""
        rows = host(rows)
        if rows.shape[-1] == samples:
            return self._engine.array(rows)
        wide = self._engine.empty(*rows.shape[:-1], samples)
        wide[..., : rows.shape[-1]] = rows
        wide[..., rows.shape[-1] :] = rows[..., -1:]
        return wide


@dataclass(frozen=True)
class _Kernel:
    traced: Traced
    code: Any


class KernelSearch(Search):
    """Draws, rolls out and costs candidates in one call; the counterpart of ``TorchSearch``.

    Args:
        dynamics: the arm in torch, what the kernel is traced from.
        tool: the tool's frame.
        task, discount, obstacles: the objective.
        knots, noise: the action parametrisation and its noise.
        samples: N.
        lower, upper: (nu,) command bounds, numpy's.
        engine: where it runs; every array is of its kind.

    Errors:
        TypeError: where a term cannot be traced.
    """

    def __init__(
        self,
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
    ) -> None:
        self._dynamics, self._tool, self._task, self._obstacles = dynamics, tool, task, tuple(obstacles)
        self._knots, self._noise, self._samples, self._engine = knots, noise, samples, engine
        self._drive, self._kernels = drive_of(dynamics), {}
        self._colour = None if noise.colour is None else tuple(tuple(row) for row in noise.colour.tolist())
        self._basis, self._lower, self._upper = (engine.array(values) for values in (knots.basis, lower, upper))
        self._low, self._high = self._lower[None, :, None], self._upper[None, :, None]
        when = dynamics.dt * discount ** np.arange(knots.steps)
        terms = [term for term in task.terms.values() if term.weight > 0]
        factors = np.stack([term.weight * when for term in terms], 1)
        factors[-1] += [term.weight * term.terminal * discount**knots.steps for term in terms]
        self._factors = engine.array(factors)
        self._last: tuple[tuple[Any, ...], Array] = ((), self._factors)

    def programs(self) -> list[Program]:
        """Return the programs compiled so far."""
        return [kernel.traced.program for kernel in self._kernels.values()]

    def kernel(self, goal: Goal) -> _Kernel:
        """Return the kernel for a kind of goal, compiled at its first use."""
        if goal not in self._kernels:
            d = self._dynamics
            traced = trace_objective(d.tree, self._drive, d.dt, self._tool, self._task, goal, self._obstacles)
            sampling = Sampling(self._knots.count, self._colour, self._noise.counted)
            self._kernels[goal] = _Kernel(traced, self._engine.compile(traced.program, sampling))
        return self._kernels[goal]

    def __call__(
        self, belief: Distribution, fixed: Array, seed: int, draw: int, x: Array, parameters: Parameters
    ) -> tuple[Array, Array]:
        """Return candidates (K, nu, N) around ``belief``, the first ones ``fixed`` (K, nu, F), and their costs (N,)."""
        goal = Goal(parameters.p_target is not None, parameters.r_target is not None, parameters.q_target is not None)
        kernel, array, samples = self.kernel(goal), self._engine.array, self._samples
        count, given = max(samples, self._engine.least), fixed.shape[-1]
        candidates = self._engine.empty(self._knots.count, len(self._lower), count)
        if not self._noise.counted:
            drawn = belief.mean[..., None] + belief.spread[..., None] * array(self._noise.draw(seed, draw))
            candidates[:, :, :samples] = drawn.clip(self._low, self._high)
            candidates[:, :, samples:] = candidates[:, :, samples - 1 : samples]
        if given:
            candidates[:, :, :given] = fixed.clip(self._low, self._high)
        costs = self._engine.empty(count)
        arrays = {
            "start": array(x),
            "table": self._table(kernel.traced, parameters),
            "uniform": self._uniform(kernel.traced, parameters),
            "cost": costs,
            "basis": self._basis,
            "knots": candidates,
            "mean": array(belief.mean),
            "spread": array(belief.spread),
            "lower": self._lower,
            "upper": self._upper,
        }
        self._engine.run(kernel.code, arrays, samples=count, steps=self._knots.steps, fixed=given, seed=seed, draw=draw)
        return candidates[..., :samples], costs[:samples]

    def _table(self, traced: Traced, parameters: Parameters) -> Array:
        """Return the table (H, columns); the last one again where it was made of the same arrays."""
        of = (traced, parameters.p_target, parameters.r_target, *parameters.obstacles)
        if len(of) == len(self._last[0]) and all(a is b for a, b in zip(of, self._last[0])):
            return self._last[1]
        steps = self._knots.steps
        table = self._engine.empty(steps, traced.program.sizes["table"])
        given = {f"obstacle.{k}": at for k, at in enumerate(parameters.obstacles)}
        given |= {"p_target": parameters.p_target, "r_target": parameters.r_target}
        for name, columns in traced.table.items():
            table[:, columns] = self._factors if name == "terms" else given[name].reshape(-1, steps).T
        self._last = (of, table)
        return table

    def _uniform(self, traced: Traced, parameters: Parameters) -> Array:
        parts = [getattr(parameters, name) for name in traced.uniform]
        return self._engine.array(parts[0] if len(parts) == 1 else namespace(parts[0]).concatenate(parts))

"""Compiled rollouts as the planner's model and objective: the work in one call to a kernel. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.kernels.llvm import Sampling
from mbctrl.kernels.program import Program
from mbctrl.kernels.trace import Goal, Traced
from mbctrl.planning.arrays import Array, host, like, namespace
from mbctrl.planning.engines import CpuEngine, Engine
from mbctrl.planning.knots import Knots
from mbctrl.planning.planner import Parameters, Search
from mbctrl.planning.risk import Risk
from mbctrl.planning.rules.base import Distribution


class KernelDynamics:
    """Rollouts of an arm by a compiled kernel behind the contract of ``RigidBodyDynamics`` (without gradients).

    Takes and returns numpy arrays or torch tensors in the processor's memory.

    Args:
        traced: the arm's step, of ``trace_dynamics``.
        dt: time step [s].
        engine: this processor.
        weights: of the program's networks, None: it has none.
    """

    def __init__(self, traced: Traced, dt: float, engine: CpuEngine, weights: np.ndarray | None = None) -> None:
        self.traced, self.dt = traced, dt
        self.nx, self.nu = traced.program.states, traced.program.commands
        self.nq = self.nx // 2
        self._engine, self._code = engine, engine.compile(traced.program, None)
        self._weights = {} if weights is None else {"weights": engine.array(weights)}
        self._payload = np.zeros(10 if "payload" in traced.uniform else 0)

    def with_dt(self, dt: float) -> KernelDynamics:
        """Return the same arm with another time step [s]; the code is shared."""
        other = object.__new__(KernelDynamics)
        other.__dict__ = {**self.__dict__, "dt": dt}
        return other

    def weigh(self, weights: np.ndarray) -> None:
        """Go on with other weights of the program's networks."""
        self._weights = {"weights": self._engine.array(weights)}

    def carrying(self, body: np.ndarray) -> KernelDynamics:
        """Return the same arm with a payload of ten parameters; see ``RigidBodyDynamics.carrying``."""
        other = object.__new__(KernelDynamics)
        other.__dict__ = {**self.__dict__, "_payload": body}
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
            uniform = self._engine.array([self.dt, *self._payload])
            given = {"start": start, "commands": commands, "uniform": uniform, "states": states}
            given |= self._weights
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
class Drawing:
    """Noise as kernels take it: white by counter, drawn inside, coloured by the rows ``colour`` (K, K) if given; or
    ``draw(seed, draw) -> (K, nu, N)`` from outside."""

    colour: tuple[tuple[float, ...], ...] | None = None
    draw: Callable[[int, int], Array] | None = None


@dataclass(frozen=True)
class _Kernel:
    traced: Traced
    code: Any


class KernelSearch(Search):
    """Draws, rolls out and costs candidates in one call; the counterpart of ``TorchSearch``.

    Args:
        traced: returns the rollout with the task's cost for a kind of goal, of ``trace_objective``.
        factors: (H, terms) what each term's cost rate counts in each step: weight, discount and dt multiplied, terminal
            seconds added in the last.
        knots: the action parametrisation.
        noise: what is drawn.
        samples: N.
        lower, upper: (nu,) command bounds, numpy's.
        engine: where it runs; every array is of its kind.
        weights: of the programs' networks, None: they have none; (E, weights) with ``risk``.
        risk: makes one cost of those by each row of weights, which rolls every candidate out by itself; None: there is one.
    """

    def __init__(
        self,
        traced: Callable[[Goal], Traced],
        factors: np.ndarray,
        knots: Knots,
        noise: Drawing,
        *,
        samples: int,
        lower: np.ndarray,
        upper: np.ndarray,
        engine: Engine,
        weights: np.ndarray | None = None,
        risk: Risk | None = None,
    ) -> None:
        self._risk = risk
        self._traced, self._knots, self._noise = traced, knots, noise
        self._samples, self._engine = samples, engine
        self._members: list[dict[str, Array]] = [{}]
        if weights is not None:
            self.weigh(weights)
        self._kernels: dict[Goal, _Kernel] = {}
        self._basis, self._lower, self._upper = (engine.array(values) for values in (knots.basis, lower, upper))
        self._low, self._high = self._lower[None, :, None], self._upper[None, :, None]
        self._factors = engine.array(factors)
        self._last: tuple[tuple[Any, ...], Array] = ((), self._factors)

    def weigh(self, weights: np.ndarray) -> None:
        """Plan with other weights of the programs' networks from now on; as at first."""
        rows = [weights] if self._risk is None else weights
        self._members = [{"weights": self._engine.array(row)} for row in rows]

    def programs(self) -> list[Program]:
        """Return the programs compiled so far."""
        return [kernel.traced.program for kernel in self._kernels.values()]

    def kernel(self, goal: Goal) -> _Kernel:
        """Return the kernel for a kind of goal, compiled at its first use."""
        if goal not in self._kernels:
            traced, noise = self._traced(goal), self._noise
            sampling = Sampling(self._knots.count, noise.colour, noise.draw is None)
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
        if self._noise.draw is not None:
            drawn = belief.mean[..., None] + belief.spread[..., None] * array(self._noise.draw(seed, draw))
            candidates[:, :, :samples] = drawn.clip(self._low, self._high)
            candidates[:, :, samples:] = candidates[:, :, samples - 1 : samples]
        if given:
            candidates[:, :, :given] = fixed.clip(self._low, self._high)
        costs = self._engine.empty(len(self._members), count)
        arrays = {
            "start": array(x),
            "table": self._table(kernel.traced, parameters),
            "uniform": self._uniform(kernel.traced, parameters),
            "basis": self._basis,
            "knots": candidates,
            "mean": array(belief.mean),
            "spread": array(belief.spread),
            "lower": self._lower,
            "upper": self._upper,
        }
        sizes = {"samples": count, "steps": self._knots.steps, "seed": seed, "draw": draw}
        for row, weights in zip(costs, self._members):  # all but the first find their candidates drawn
            self._engine.run(kernel.code, {**arrays, **weights, "cost": row}, fixed=given, **sizes)
            given = count
        return candidates[..., :samples], costs[0, :samples] if self._risk is None else self._risk(costs[:, :samples])

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

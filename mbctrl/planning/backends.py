"""What a planner plans with: the compiled kernel, torch or MuJoCo, chosen by ``dynamics.backend``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.scene import MOVING, JointGoal, ObjectPoseGoal, PoseGoal
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual, load_residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.kernels.trace import Goal
from mbctrl.planning.arrays import Array, host, tensor
from mbctrl.planning.knots import Knots
from mbctrl.planning.noise import Noise
from mbctrl.planning.objective import FeatureMap, MemberwiseObjective, Objective, RolloutObjective, TorchSearch
from mbctrl.planning.planner import Search
from mbctrl.planning.risk import Risk
from mbctrl.tasks.distance import capsule_obstacle
from mbctrl.tasks.task import Task

if TYPE_CHECKING:
    from mbctrl.planning.engines import CpuEngine, Engine

_log = logging.getLogger(__name__)
# What a term may raise that does more than arithmetic.
_UNTRACEABLE = (TypeError, AttributeError, ValueError, LookupError, ArithmeticError, NotImplementedError)


@dataclass(frozen=True)
class Parts:
    """What is searched over, and with what noise."""

    features: FeatureMap
    task: Task
    knots: Knots
    noise: Noise
    lower: np.ndarray
    upper: np.ndarray
    hybrid: HybridDynamics | None = None  # the arm with what is learnt on top
    risk: Risk | None = None  # over rollouts of its members one by one


@dataclass(frozen=True)
class Backend:
    """What a planner is built of.

    ``name`` of what plans; its ``search``; ``array``, which brings numpy's numbers into the search's kind; and the arm's own
    dynamics for everything besides (``with_dt``, ``rollout``). ``weigh`` goes on with other weights of the learned model, None
    where they are no inputs.
    """

    name: str
    search: Search
    array: Callable[[Any], Array]
    dynamics: Any
    weigh: Callable[[Residual], None] | None = None

    def rollout(self, x: np.ndarray, commands: np.ndarray, dt: float, payload: np.ndarray | None = None) -> np.ndarray:
        """Return states (H+1, nx, N) from ``x`` (nx,) under ``commands`` (H, nu, N), ``dt`` seconds apart, ``payload`` carried."""
        start = np.repeat(x[:, None], commands.shape[2], 1)
        dynamics = self.dynamics.with_dt(dt)
        if payload is not None:
            dynamics = dynamics.carrying(payload)
        if isinstance(dynamics, (RigidBodyDynamics, HybridDynamics)):
            return host(dynamics.rollout(self.array(start), self.array(commands)))
        return dynamics.rollout(start, commands)


def build_backend(config: RunConfig, model: Model, analytic: RigidBodyDynamics, parts: Parts, file: str | Path | None) -> Backend:
    """Return the backend a run asks for; ``auto`` is the kernel where it can be, else torch, with a warning.

    Errors:
        SpecError: naming why the kernel that was asked for cannot be.
    """
    wanted = config.dynamics.backend
    if wanted in ("auto", "kernel"):
        try:
            return _kernel(config, analytic, parts)
        except (ImportError, MbctrlError, *_UNTRACEABLE) as error:
            reason = f"no compiled rollouts: {error}"
            if wanted == "kernel":
                raise SpecError(reason, file=file, key="dynamics.backend") from None
            _log.warning("%s; planning with torch, many times slower", reason)
    array = partial(tensor, dtype=analytic.dtype, device=analytic.device)
    arm = parts.hybrid or analytic
    rolled: Any = arm if wanted != "mujoco" else simulator_of(config, model)

    def costs_by(dynamics: Any) -> RolloutObjective:
        return RolloutObjective(dynamics, parts.features, parts.task, config.planner.discount)

    objective: Objective = costs_by(rolled)
    if parts.hybrid is not None and parts.risk is not None:
        objective = MemberwiseObjective([costs_by(member) for member in parts.hybrid.each()], parts.risk)
    search = TorchSearch(objective, parts.knots, parts.noise, array(parts.lower), array(parts.upper))
    return Backend("mujoco" if wanted == "mujoco" else "torch", search, array, arm)


def _kernel(config: RunConfig, analytic: RigidBodyDynamics, parts: Parts) -> Backend:
    from mbctrl.kernels.native import shared_pool  # llvmlite is only needed here
    from mbctrl.kernels.residual import member_weights, weights_of
    from mbctrl.planning.compiled import kernel_dynamics, kernel_search, traced_residual
    from mbctrl.planning.engines import CpuEngine

    here = CpuEngine(shared_pool(config.dynamics.threads))
    engine = _engine_of(analytic.device, here)
    traced = None if parts.hybrid is None else traced_residual(parts.hybrid)
    search = kernel_search(
        analytic,
        parts.features.tool,
        parts.task,
        parts.knots,
        parts.noise,
        samples=config.planner.samples,
        lower=parts.lower,
        upper=parts.upper,
        engine=engine,
        discount=config.planner.discount,
        obstacles=config.obstacles,
        residual=traced,
        risk=parts.risk,
        thing=parts.features.thing,
    )
    for given in goals_of(config):
        search.kernel(given)  # compiled now, not in the middle of the run
    arm = kernel_dynamics(analytic, here, traced)  # one rollout alone is the processor's work

    def weigh(residual: Residual) -> None:
        arm.weigh(weights_of(residual))
        search.weigh(member_weights(residual) if parts.risk is not None else weights_of(residual))

    return Backend("kernel", search, engine.array, arm, None if traced is None else weigh)


def faster(arm: RigidBodyDynamics) -> Any:
    """Return the arm with rollouts compiled for this processor, on one thread; itself where that is not possible."""
    try:
        from mbctrl.kernels.native import shared_pool
        from mbctrl.planning.compiled import kernel_dynamics
        from mbctrl.planning.engines import CpuEngine

        return kernel_dynamics(arm, CpuEngine(shared_pool(1)))
    except ImportError:
        return arm


def _engine_of(device: torch.device, here: CpuEngine) -> Engine:
    """Return the engine that plans on ``device``; ``here`` is this processor's."""
    from mbctrl.planning.engines import GpuEngine

    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"expected dynamics.device cpu or cuda, found {device}")
    return here if device.type == "cpu" else GpuEngine(device)


def goals_of(config: RunConfig) -> set[Goal]:
    """Return which targets the run's goal gives, all its kinds."""
    goal = config.goal
    if isinstance(goal, PoseGoal):
        turned = {target.rpy is not None for target in goal.targets} or {False}
        return {Goal(position=True, rotation=rotation) for rotation in turned}
    if isinstance(goal, ObjectPoseGoal):
        return {Goal(position=True, rotation=True)}
    if isinstance(goal, MOVING):
        return {Goal(position=True, rotation=goal.rpy is not None)}
    return {Goal(joints=True) if isinstance(goal, JointGoal) else Goal(position=True)}


def analytic_of(
    config: RunConfig, model: Model, file: str | Path | None = None, dtype: torch.dtype = torch.float32
) -> RigidBodyDynamics:
    """Return the run's analytic model in torch.

    Errors:
        SpecError: for a device torch does not have.
    """
    dynamics = config.dynamics
    try:
        torch.empty(0, device=dynamics.device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
        reason = str(error).split("\n", 1)[0]
        raise SpecError(f"torch cannot use {dynamics.device!r}: {reason}", file=file, key="dynamics.device") from None
    more: dict[str, Any] = {"integrator": dynamics.integrator, "device": dynamics.device, "dtype": dtype}
    if config.weighs:
        more["carrier"] = model.tree.frames[model.robot.tool].link
    return RigidBodyDynamics(
        model.tree, dynamics.dt, **drive_settings(model.robot), contact=declared(dynamics.contact, model.tree, file), **more
    )


def named_file(name: str, file: str | Path | None, key: str) -> Path:
    """Return the path of a file that ``file`` names under ``key``: beside it, or from where the program runs.

    Errors:
        SpecError: where there is none.
    """
    beside = Path(file).parent / name if file is not None else Path(name)
    path = beside if beside.is_file() else Path(name)
    if not path.is_file():
        raise SpecError("no such file", file=file, key=f"{key}: {name}")
    return path


def hybrid_of(
    config: RunConfig, model: Model, analytic: RigidBodyDynamics, file: str | Path | None = None
) -> HybridDynamics | None:
    """Return the run's model with its learned residual on top, None where the run names none.

    Errors:
        SpecError: as ``learned_of``, and for MuJoCo as the model.
    """
    if config.dynamics.residual is None:
        return None
    if config.dynamics.backend == "mujoco":
        raise SpecError(
            "MuJoCo as the model has no place for what was learned; expected auto, kernel or torch",
            file=file,
            key="dynamics.backend",
        )
    return learned_of(config.dynamics.residual, config, model, analytic, file, "dynamics.residual")


def learned_of(
    name: str, config: RunConfig, model: Model, analytic: RigidBodyDynamics, file: str | Path | None, key: str
) -> HybridDynamics:
    """Return the learned model of a file ``name`` on top of the run's physics.

    Errors:
        SpecError: for a file that is none, of another arm, or learnt on top of other physics; ``key`` names it.
    """
    path = named_file(name, file, key)
    residual = load_residual(path, model.robot, model.tree, analytic.dt, analytic.integrator, config.dynamics.contact)
    return HybridDynamics(analytic, residual, model.tree.frames[model.robot.tool], capsule_obstacle)


def risk_of(config: RunConfig, hybrid: HybridDynamics | None, file: str | Path | None = None) -> Risk | None:
    """Return how costs by an ensemble's members become one, None where members are averaged in every step.

    Errors:
        SpecError: where there are not several members to roll out.
    """
    spec = config.planner.risk
    if spec.kind == "expectation":
        return None
    members = 0 if hybrid is None or config.dynamics.backend == "mujoco" else hybrid.residual.members
    if members < 2:
        found = f"{members} networks" if members else "no dynamics.residual that is planned with"
        raise SpecError(
            f"'{spec.kind}' needs an ensemble of at least 2 networks, found {found}", file=file, key="planner.risk.kind"
        )
    return Risk(spec, members)


def simulator_of(config: RunConfig, model: Model) -> SimulatorDynamics:
    """Return MuJoCo as the run's model."""
    return SimulatorDynamics(model.mj, config.dynamics.dt, **drive_settings(model.robot), threads=config.dynamics.threads)

"""What an episode was worth: a run's log held against its task."""

from __future__ import annotations

import numpy as np
import torch

from mbctrl.base.config import RunConfig
from mbctrl.base.logs import Log
from mbctrl.base.poses import rotation_from_quaternion
from mbctrl.base.scene import JointGoal
from mbctrl.dynamics.load import Model
from mbctrl.planning.backends import analytic_of
from mbctrl.planning.controller import scales_of, thing_of, with_force
from mbctrl.planning.objective import FeatureMap
from mbctrl.planning.planner import Parameters
from mbctrl.tasks.task import build_task


def rewards(config: RunConfig, model: Model, log: Log, best: float) -> np.ndarray:
    """Return the reward of each model step of a run, (T,): ``best`` less the task's cost rate at the state it leads to.

    Args:
        config, model: the run and its robot.
        log: of ``mbctrl run``; control periods that were missed count as steps of their length.
        best: reward of a step that costs nothing.
    """
    every = round(config.dynamics.dt * float(log.header["control_rate_hz"]))
    at = np.arange(0, len(log["t"]), every)
    u = np.stack([log["u"][a:b].mean(0) for a, b in zip(at, at[1:])]) if len(at) > 1 else log["u"][:0]
    states = np.hstack([log["q"], log["v"]])[at][:, :, None]
    after = at[1:]
    with torch.inference_mode():
        arm = analytic_of(config, model)

        def rows(values: np.ndarray) -> torch.Tensor:
            return torch.as_tensor(np.ascontiguousarray(values), dtype=arm.dtype, device=arm.device)

        position, turned = log["target"][after], log["target_quaternion"][after]
        rotations = np.stack([rotation_from_quaternion(one) for one in turned], -1) if np.isfinite(turned).all() else None
        goal = config.goal
        parameters = Parameters(
            u_before=rows(u[0]),
            p_target=rows(position.T[:, :, None]) if np.isfinite(position).all() else None,
            r_target=None if rotations is None else rows(rotations[..., None]),
            q_target=rows(np.asarray(goal.position)) if isinstance(goal, JointGoal) else None,
            obstacles=tuple(
                rows(np.stack([obstacle.at(t)[0] for t in log["t"][after]], 1)[:, :, None]) for obstacle in config.obstacles
            ),
        )
        task = with_force(build_task(config.task, scales_of(model.robot)), config, None)
        features = FeatureMap(model.robot, arm, config.obstacles, thing_of(config, model))(
            rows(states), rows(u[:, :, None]), parameters
        )
        total = torch.full((len(u),), best, dtype=arm.dtype, device=arm.device)
        for cost in task.costs(features).values():
            total = total - torch.as_tensor(cost, dtype=arm.dtype, device=arm.device).expand(len(u), 1)[:, 0]
        return total.cpu().numpy().astype(float)

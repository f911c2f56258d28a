"""The box a tool stays in while exploring, and what explores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mbctrl.base.config import load_run
from mbctrl.base.errors import SpecError
from mbctrl.base.logs import read_log
from mbctrl.base.plan import PlanRequest
from mbctrl.base.spec import validate
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.learning.explore import Excitation, Exploration, RandomCommands
from mbctrl.learning.fence import BoxSpec, Fence, changes
from mbctrl.planning.backends import faster
from test_loops import loop_of, scenario

pytestmark = pytest.mark.usefixtures("one_thread")

BOXES: dict[str, dict[str, Any]] = {
    "panda": {"low": [0.1, -0.5, 0.1], "high": [0.7, 0.5, 0.9]},
    "arm2": {"low": [-0.7, -0.7, -0.2], "high": [0.7, 0.7, 1.3]},
    "reacher": {"low": [-0.05, -0.14, -0.1], "high": [0.3, 0.14, 0.1]},
}


def explorer(name: str, dt: float, kind: str, share: float, seed: int = 0, box: dict[str, Any] | None = None) -> tuple[Any, ...]:
    """Return a model, its fence, and what explores it within; of torques each is held for 5 steps, of references for a second."""
    model = load_model(name)
    integrator = "leapfrog" if model.robot.control.mode == "torque" else "euler"
    arm = RigidBodyDynamics(model.tree, dt, **drive_settings(model.robot), integrator=integrator)
    fence = Fence(model, arm, BoxSpec(**(box or BOXES[name])), None, faster)
    rng = np.random.default_rng(seed)
    held = 5 * dt if model.robot.control.mode == "torque" else 1.0
    made: Exploration = Excitation(model.robot, share, 0.5, dt, rng, fence)
    if kind == "random":
        made = RandomCommands(model.robot, share, held, dt, rng, fence)
    return model, fence, made


def farthest(model: Any, fence: Fence, explore: Exploration, dt: float, steps: int) -> float:
    """Return how far MuJoCo's tool came out of the box [m]; it is looked at each 10 ms."""
    parts = 1 if model.mj.opt.timestep > 0.01 else round(dt / 0.01)
    arm = SimulatorDynamics(model.mj, dt / parts, **drive_settings(model.robot), threads=1)
    x, q = np.concatenate([model.robot.home, np.zeros(model.robot.nq)]), []
    for k in range(steps):
        plan = explore.plan(PlanRequest(k * dt, x))
        u = np.stack([plan.command(plan.t0 + (part + 0.5) * dt / parts) for part in range(parts)])
        states = arm.rollout(torch.as_tensor(x[:, None]), torch.as_tensor(u[:, :, None])).numpy()[1:, :, 0]
        x = states[-1]
        q.append(states[:, : model.robot.nq])
    return float(fence.outside(np.concatenate(q).T).max())


@pytest.mark.parametrize(
    ("name", "dt", "kind", "share", "steps"),
    [
        ("panda", 0.04, "random", 0.6, 10000),
        ("panda", 0.04, "excitation", 0.6, 1000),
        ("arm2", 0.05, "random", 1.0, 3000),
        ("reacher", 0.02, "random", 1.0, 1000),
    ],
)
def test_a_tool_stays_in_its_box_and_leaves_it_where_there_is_none(
    name: str, dt: float, kind: str, share: float, steps: int
) -> None:
    model, fence, explore = explorer(name, dt, kind, share)
    out = farthest(model, fence, explore, dt, steps)
    _, _, free = explorer(name, dt, kind, share)
    free._fence = None
    without = farthest(model, fence, free, dt, 400)
    print(f"{name}, {kind}: {1e3 * out:.1f} mm, without {1e3 * without:.1f} mm; {explore.refused} refused")
    assert out < 0 < 0.05 < without and explore.refused > 5

"""The box a tool stays in while exploring, and what explores."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loops import loop_of, scenario

from mbctrl.base.errors import SpecError
from mbctrl.base.logs import read_log
from mbctrl.base.plan import PlanRequest
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.learning.explore import Excitation, Exploration, RandomCommands
from mbctrl.learning.fence import Fence
from mbctrl.learning.loops import BoxSpec
from mbctrl.planning.backends import faster

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
        ("panda", 0.04, "random", 0.6, 2500),
        ("panda", 0.04, "excitation", 0.6, 500),
        ("arm2", 0.05, "random", 1.0, 800),
        ("reacher", 0.02, "random", 1.0, 300),
    ],
)
def test_a_tool_stays_in_its_box_and_leaves_it_where_there_is_none(
    name: str, dt: float, kind: str, share: float, steps: int
) -> None:
    """With MBCTRL_SLOW: for 10,000 steps each."""
    steps = 10000 if os.environ.get("MBCTRL_SLOW") else steps
    model, fence, explore = explorer(name, dt, kind, share)
    out = farthest(model, fence, explore, dt, steps)
    _, _, free = explorer(name, dt, kind, share)
    free._fence = None
    without = farthest(model, fence, free, dt, 400)
    print(f"{name}, {kind}: {1e3 * out:.1f} mm, without {1e3 * without:.1f} mm; {explore.refused} refused")
    assert out < 0 < 0.05 < without and explore.refused > 5


def test_a_tool_in_the_margin_goes_no_further() -> None:
    """A start nearer to a wall than the margin is no error: from there it may only come back."""
    model, fence, _ = explorer("panda", 0.04, "random", 0.6, box={"low": [-1.0] * 3, "high": [1.0, 0.2, 1.0]})
    q = np.array(model.robot.home) + [0.3, 0, 0, 0, 0, 0, 0]
    wall = 0.2 + fence.outside(q[:, None])[0] + 0.01
    _, fence, _ = explorer("panda", 0.04, "random", 0.6, box={"low": [-1.0] * 3, "high": [1.0, wall, 1.0]})
    x, step = np.concatenate([q, np.zeros(7)]), np.array([0.02, 0, 0, 0, 0, 0, 0])
    assert fence.outside(q[:, None])[0] == pytest.approx(-0.01, abs=1e-6)
    assert fence.safe(x, q, np.stack([q + step, q - step])).tolist() == [False, True]


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        (
            {"box": {"low": [-0.5] * 3, "high": [0.5] * 3}},
            r"learn.box: expected the tool at home inside, 0.02 m .* outside",
        ),
        ({"box": {"low": [-2.0] * 3, "high": [0.0, 2.0, 2.0]}}, r"learn.box: expected the tool at home inside"),
        ({"box": {"low": [1.0, -2.0, -2.0], "high": [-1.0, 2.0, 2.0]}}, r"learn.box: nothing is left along x between 1 and -1 m"),
        ({"box": {"low": [-2.0] * 3, "high": [2.0] * 3, "margn": 0.1}}, r"learn.box.margn: unknown key"),
        ({"band": 0.5, "hold": 2}, "learn: hold: is of uniform commands, found band"),
    ],
)
def test_boxes_and_bands_that_make_no_sense_are_refused_by_key(tmp_path: Path, learn: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        loop_of(scenario(tmp_path, **learn), tmp_path / "out")
    assert str(tmp_path / "small.yaml") in str(caught.value) and "\n" not in str(caught.value)


def test_a_start_outside_and_late_plans_are_refused(tmp_path: Path) -> None:
    box = {"low": [-0.1, -1.0, -1.1], "high": [0.1, 1.0, 0.1]}
    file = scenario(tmp_path, loop="aggregate", every=None, box=box)
    text = file.read_text()
    file.write_text(text.replace("start_noise: 0.1", "start_noise: 1.5"))
    seed = next(k for k in range(9) if abs(np.random.default_rng(k).uniform(-1.5, 1.5)) > 0.3)
    with pytest.raises(SpecError, match="small.yaml: learn.box: expected the tool at the start inside.*outside"):
        loop_of(file, tmp_path / "out", seed).run()
    file.write_text(text + "loop: {latency: 0.01}\n")
    with pytest.raises(SpecError, match="loop.latency: a box needs plans at once"):
        loop_of(file, tmp_path / "again")


def test_a_pendulum_learns_within_its_box(tmp_path: Path) -> None:
    """The loop's random episode keeps the tip within 35 cm of the middle; without a box it does not."""
    for box, name in ((None, "free"), ({"low": [-0.35, -1.0, -1.1], "high": [0.35, 1.0, 0.1]}, "boxed")):
        file = scenario(tmp_path, loop="aggregate", every=None, trials=1, random=200, hold=6, box=box)
        loop_of(file, tmp_path / name, seed=3)._episode(0)
    free, boxed = (np.abs(read_log(tmp_path / name / "trial-00" / "log.csv")["tcp"][:, 0]).max() for name in ("free", "boxed"))
    print("farthest [m]", free, boxed)
    assert 0.2 < boxed < 0.35 < 0.4 < free


@pytest.mark.parametrize(("name", "dt"), [("panda", 0.04), ("arm2", 0.05)])
def test_compiled_rollouts_and_torch_allow_the_same(name: str, dt: float) -> None:
    """Commands on both sides of what is allowed, from states that move."""
    model, fast, _ = explorer(name, dt, "random", 1.0)
    slow = Fence(model, fast._arm, BoxSpec(**BOXES[name]))
    rng, n = np.random.default_rng(0), model.robot.nq
    told: list[list[bool]] = [[], []]
    for _ in range(3):
        x = np.concatenate([np.asarray(model.robot.home) + rng.uniform(-0.1, 0.1, n), rng.uniform(-2.0, 2.0, n)])
        last = x[:n] if name == "panda" else np.zeros(n)
        commands = rng.uniform(-1.5, 1.5, (40, n)) + (x[:n] if name == "panda" else 0.0)
        for known, fence in zip(told, (fast, slow)):
            known += fence.safe(x, last, commands).tolist()
    print(name, "allowed", np.mean(told, 1), "the same", np.mean(np.equal(*told)))
    assert np.mean(np.equal(*told)) >= 0.98 and 0.05 < np.mean(told[0]) < 0.95


def test_excitation_is_smooth_and_keeps_its_share() -> None:
    robot = load_model("panda").robot
    made = Excitation(robot, 0.5, 0.4, 0.04, np.random.default_rng(0))
    home, limits = np.asarray(robot.home), robot.limits
    half = 0.5 * np.minimum(np.asarray(limits.position_upper) - home, home - np.asarray(limits.position_lower))
    t = np.arange(0, 50.0, 0.04)  # two periods of 10 / band
    u = np.array([made.wanted(one) for one in t]) - home
    assert np.abs(u[0]).max() == 0 and (np.abs(u) <= 1.001 * half).all() and (np.abs(u).max(0) > 0.99 * half).all()
    late = u[625:]  # one whole period, after the ramp
    power = np.abs(np.fft.rfft(late, axis=0)) ** 2
    band = np.fft.rfftfreq(len(late), 0.04) <= 0.4 + 1e-9
    assert power[~band].sum() < 1e-9 * power.sum() and (power[1:11] > 0).all()


def test_commands_change_no_faster_than_an_arm_follows() -> None:
    robot = load_model("panda").robot
    made = RandomCommands(robot, 1.0, 0.04, 0.04, np.random.default_rng(1))
    x = np.concatenate([robot.home, np.zeros(7)])
    plans = [made.plan(PlanRequest(0.04 * k, x)) for k in range(200)]
    far = np.array([plan.u[-1] for plan in plans]) - robot.home
    assert (np.ptp(far, 0) > 0.2).all()
    most = 0.3 * 0.04 * np.asarray(robot.limits.velocity)
    assert np.array_equal(plans[0].command(0.0), robot.home)
    for k, (plan, after) in enumerate(zip(plans, plans[1:])):
        assert np.allclose(plan.command(0.04 * (k + 1)), after.command(after.t0))  # no jump from plan to plan
        assert (np.abs(after.u[1] - after.u[0]) <= most + 1e-12).all()
    free = RandomCommands(load_model("cartpole_pets").robot, 1.0, 0.04, 0.04, np.random.default_rng(1))
    jumps = np.diff([free.plan(PlanRequest(0.04 * k, np.zeros(4))).u[0, 0] for k in range(200)])
    assert np.abs(jumps).max() > 400  # [N] at once, for one command is one step

"""The controller as the loop sees it: plans in bounds and on time, prediction, reproducibility, features MuJoCo confirms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import SpecError
from mbctrl.base.plan import Following, PlanFollower, PlanRequest
from mbctrl.base.scene import Obstacle
from mbctrl.base.spec import validate
from mbctrl.dynamics.actuation import actuation_of
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.planning.controller import MpcController
from mbctrl.planning.mpc import command_bounds
from mbctrl.planning.objective import FeatureMap
from mbctrl.planning.planner import Parameters
from mbctrl.sim.monitor import Monitor

PLANNER = {"samples": 24, "iterations": 2, "horizon": 0.4, "knots": 4}
SPEC: dict[str, dict[str, Any]] = {
    "arm2": {
        "robot": "arm2",
        "rule": "cem",
        "settings": {"elites": 6},
        "planner": {**PLANNER, "sigma": [3.0, 1.0]},
        "dynamics": {"dt": 0.04},
        "task": {"posture": {"weight": 1.0, "wrap": True}, "velocity": {"weight": 0.1}, "effort": {"weight": 0.01}},
        "goal": {"kind": "joints", "position": [3.14159265, 0.0], "wrap": True},
        "duration": 1.0,
    },
    "panda": {
        "robot": "panda",
        "rule": "mppi",
        "settings": {"ess": 0.1},
        "planner": {**PLANNER, "sigma": 0.2},
        "dynamics": {"dt": 0.04},
        "task": {"reach": {"weight": 10.0}, "velocity": {"weight": 0.5}, "smoothness": {"weight": 0.2, "scale": 0.05}},
        "goal": {
            "kind": "poses",
            "targets": [{"position": [0.5, 0.25, 0.4], "rpy": [3.14159265, 0, 0]}, {"position": [0.4, 0, 0.6]}],
        },
        "duration": 1.0,
    },
}
BALL = {"name": "ball", "shape": "sphere", "position": [0.5, 0.1, 0.6], "size": [0.05]}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {name: load_model(name) for name in SPEC}


def config(name: str, **changes: Any) -> RunConfig:
    """Return a run; ``planner`` and ``settings`` are laid over the base, the rest replaces it."""
    data = {**SPEC[name], **changes}
    for key in ("planner", "settings"):
        if key in changes:
            data[key] = {**SPEC[name][key], **changes[key]}
    return validate(RunConfig, data)


def moving(model: Model, seed: int = 0) -> np.ndarray:
    """Return a state near home, on the move, (2 nq,)."""
    rng = np.random.default_rng(seed)
    return np.concatenate([model.robot.home + rng.uniform(-0.2, 0.2, model.robot.nq), rng.uniform(-0.5, 0.5, model.robot.nq)])


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPEC)
def test_a_plan_has_its_shapes_and_times(name: str, models: dict[str, Model]) -> None:
    robot = models[name].robot
    controller = MpcController(config(name), models[name])
    for seq in (1, 2, 3):
        plan = controller.plan(PlanRequest(0.1 * seq, moving(models[name]), latency=0.03))
        assert (plan.seq, plan.stamp, plan.dt) == (seq, 0.1 * seq, 0.04)
        assert plan.t0 == pytest.approx(0.1 * seq + 0.03) and plan.end == pytest.approx(plan.t0 + 0.4)
        assert plan.u.shape == (11, robot.nu) and plan.x.shape == (11, 2 * robot.nq) and plan.fan is None


@pytest.mark.parametrize("name", SPEC)
@pytest.mark.parametrize("interpolation", ["zero", "linear", "cubic"])
def test_commands_are_finite_and_within_bounds(name: str, interpolation: str, models: dict[str, Model]) -> None:
    low, high = command_bounds(models[name].robot)
    controller = MpcController(config(name, planner={"sigma": 30.0, "interpolation": interpolation}), models[name])
    plans = [controller.plan(PlanRequest(0.04 * k, moving(models[name]))) for k in range(3)]
    u = np.concatenate([plan.u for plan in plans])
    assert np.isfinite(u).all() and (u >= low).all() and (u <= high).all()
    assert np.isfinite(np.concatenate([plan.x for plan in plans])).all()


@pytest.mark.parametrize("name", SPEC)
def test_the_planned_states_follow_from_the_planned_commands(name: str, models: dict[str, Model]) -> None:
    on_samples = {"interpolation": "linear", "knots": 6}  # a knot each second sample
    controller = MpcController(config(name, planner=on_samples), models[name])
    plan = controller.plan(PlanRequest(0.0, moving(models[name])))
    at = 0.5 if name == "arm2" else 1.0  # a torque is held, a servo's reference counts at the step's end
    taken = np.stack([plan.command((k + at) * 0.04) for k in range(10)])
    start, commands = (torch.tensor(part[..., None], dtype=torch.float32) for part in (plan.x[0], taken))
    states = controller.analytic.rollout(start, commands)
    np.testing.assert_allclose(states[..., 0], plan.x, atol=2e-4)


def test_a_plan_lowers_its_cost(models: dict[str, Model]) -> None:
    controller = MpcController(config("panda"), models["panda"])
    x = np.concatenate([models["panda"].robot.home, np.zeros(7)])
    best = [controller.plan(PlanRequest(0.0, x)).info["best"] for _ in range(8)]
    assert best[-1] < 0.9 * best[0]


def test_a_fan_starts_at_the_tool(models: dict[str, Model]) -> None:
    model, monitor = models["panda"], Monitor(models["panda"].mj, models["panda"].robot)
    x = moving(model)
    fan = MpcController(config("panda"), model).plan(PlanRequest(0.0, x, fan=5)).fan
    monitor.update(x[:7], 0.0)
    assert fan.shape == (5, 11, 3)
    np.testing.assert_allclose(fan[:, 0], np.tile(monitor.tool()[0], (5, 1)), atol=1e-5)


def test_a_dragged_target_overrides_the_goals(models: dict[str, Model]) -> None:
    controller, position = MpcController(config("panda"), models["panda"]), np.array([0.1, 0.2, 0.3])
    found = controller.parameters(PlanRequest(0.0, moving(models["panda"]), target=(position, None)), np.zeros(7))
    np.testing.assert_allclose(found.p_target[:, :, 0], np.tile(position[:, None], (1, 10)), atol=1e-7)
    assert found.r_target is None


@pytest.mark.parametrize(("goal", "position"), [(0, [0.5, 0.25, 0.4]), (1, [0.4, 0.0, 0.6])])
def test_the_request_says_which_target_is_due(goal: int, position: list[float], models: dict[str, Model]) -> None:
    controller = MpcController(config("panda"), models["panda"])
    found = controller.parameters(PlanRequest(0.0, moving(models["panda"]), goal=goal), np.zeros(7))
    np.testing.assert_allclose(found.p_target[:, 0, 0], position, atol=1e-7)
    assert (found.r_target is None) == (goal == 1)


def test_obstacles_move_on_along_the_horizon(models: dict[str, Model]) -> None:
    controller = MpcController(config("panda", obstacles=[BALL]), models["panda"])
    at, rate = np.array([0.5, 0.1, 0.6]), np.array([0.0, -1.0, 2.0])
    request = PlanRequest(3.0, moving(models["panda"]), latency=0.05, obstacles=((at, rate),))
    (found,) = controller.parameters(request, np.zeros(7)).obstacles
    ends = 0.05 + 0.04 * np.arange(1, 11)
    np.testing.assert_allclose(found[..., 0], at[:, None] + rate[:, None] * ends, atol=1e-6)


def test_avoiding_nothing_costs_nothing(models: dict[str, Model]) -> None:
    plain = MpcController(config("panda"), models["panda"])
    task = {**SPEC["panda"]["task"], "avoid": {"weight": 9.0, "terminal": 1.0}}
    wary = MpcController(config("panda", task=task), models["panda"])
    request = PlanRequest(0.0, moving(models["panda"]))
    assert wary.plan(request).info["best"] == pytest.approx(plain.plan(request).info["best"])


def test_avoid_pushes_the_arm_away(models: dict[str, Model]) -> None:
    task = {**SPEC["panda"]["task"], "avoid": {"weight": 9.0, "margin": 0.3}}
    x, costs = moving(models["panda"]), []
    for position in ([0.5, 0.1, 0.6], [3.0, 0.0, 0.6]):
        controller = MpcController(config("panda", task=task, obstacles=[{**BALL, "position": position}]), models["panda"])
        costs.append(controller.plan(PlanRequest(0.0, x, obstacles=((np.array(position), np.zeros(3)),))).info["best"])
    assert costs[0] > costs[1] + 0.1


# --- the same and not the same --------------------------------------------------------------------------------------


def plans(name: str, models: dict[str, Model], seed: int, warm: bool = False) -> np.ndarray:
    """Return the commands of three plans in a row."""
    controller = MpcController(config(name, seed=seed), models[name])
    if warm:
        controller.warm()
    return np.stack([controller.plan(PlanRequest(0.04 * k, moving(models[name], k), latency=0.02)).u for k in range(3)])


@pytest.mark.parametrize("name", SPEC)
def test_a_seed_reproduces_every_plan_bit_for_bit(name: str, models: dict[str, Model]) -> None:
    np.testing.assert_array_equal(plans(name, models, 7), plans(name, models, 7))


@pytest.mark.parametrize("name", SPEC)
def test_another_seed_plans_otherwise(name: str, models: dict[str, Model]) -> None:
    assert not (plans(name, models, 7)[0] == plans(name, models, 8)[0]).all()


@pytest.mark.parametrize("name", SPEC)
def test_warming_up_leaves_no_trace(name: str, models: dict[str, Model]) -> None:
    np.testing.assert_array_equal(plans(name, models, 7, warm=True), plans(name, models, 7))


# --- prediction -----------------------------------------------------------------------------------------------------


def rolled(model: Model, x: np.ndarray, command: Any, t: float, latency: float) -> np.ndarray:
    """Return the state ``latency`` seconds after ``x`` at ``t``, by the analytic model in float64 at 0.5 ms steps."""
    robot, h = model.robot, 0.0005
    fine = RigidBodyDynamics(
        model.tree,
        h,
        actuation_of(robot),
        commanded=robot.command_index,
        effort_limit=robot.limits.effort,
        gravity_compensation=robot.control.gravity_compensation,
        dtype=torch.float64,
    )
    state = torch.tensor(x)[:, None]
    for k in range(round(latency / h)):
        state = fine.step(state, torch.tensor(command(t + (k + 0.5) * h))[:, None])
    return state[:, 0].numpy()


@pytest.mark.parametrize("name", SPEC)
@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_plan_starts_from_the_state_its_latency_ahead(name: str, offset: float, models: dict[str, Model]) -> None:
    model, latency = models[name], 0.06
    controller = MpcController(config(name), model)
    first = controller.plan(PlanRequest(0.0, moving(model), latency=0.02))
    following = Following(first.seq, 0.09, np.full(model.robot.nu, offset) if offset else None)
    x = moving(model, 3)
    request = PlanRequest(0.1, x, latency=latency, following=following)
    second = controller.plan(request)
    follower = PlanFollower(controller.config.loop.blend)
    follower.resume(first, following)
    expected = rolled(model, x, follower.command, 0.1, latency)
    moved = np.abs(expected - x).reshape(2, -1).max(1)
    error = np.abs(second.x[0] - expected).reshape(2, -1).max(1)
    # The controller's steps of 10 ms are semi-implicit, so first order: a position is off by half a step of the change of
    # speed, and a speed by a tenth of it where the servo is stiff.
    assert moved[0] > 0.015 and moved[1] > 0.5
    assert error[0] < 0.005 * moved[1] and error[1] < 0.1 * moved[1], f"error {error}, moved {moved}"
    np.testing.assert_allclose(controller._predict(request)[1], follower.command(0.16))


@pytest.mark.parametrize("name", SPEC)
def test_without_latency_a_plan_starts_from_the_measured_state(name: str, models: dict[str, Model]) -> None:
    controller, x = MpcController(config(name), models[name]), moving(models[name])
    first = controller.plan(PlanRequest(0.0, x))
    second = controller.plan(PlanRequest(0.1, x, following=Following(first.seq, 0.0, None)))
    np.testing.assert_allclose(second.x[0], x, atol=1e-6)
    assert second.t0 == 0.1


@pytest.mark.parametrize("name", SPEC)
def test_the_first_plan_continues_from_where_the_arm_is(name: str, models: dict[str, Model]) -> None:
    model, x = models[name], moving(models[name])
    controller = MpcController(config(name, planner={"sigma": 1e-9}), model)
    expected = np.zeros(2) if name == "arm2" else x[:7]
    np.testing.assert_allclose(controller.plan(PlanRequest(0.0, x)).u, np.tile(expected, (11, 1)), atol=1e-6)


# --- bad settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "key", "words"),
    [
        ("arm2", {"rule": "cme"}, "rule", "did you mean 'cem'"),
        ("arm2", {"rule": "mbctrl.planning.rules.cem:Nothing"}, "rule", "Nothing"),
        ("arm2", {"rule": "mbctrl.planning.knots:Knots"}, "rule", "Rule"),
        ("arm2", {"settings": {"elite": 3}}, "settings.elite", "did you mean 'elites'"),
        ("arm2", {"settings": {"elites": "many"}}, "settings.elites", "integer"),
        ("arm2", {"settings": {"elites": 0}}, "settings.elites", "greater"),
        ("arm2", {"settings": {"smoothing": 1.0}}, "settings.smoothing", "less than 1"),
        ("arm2", {"settings": {"floor": -0.1}}, "settings.floor", "greater"),
        ("panda", {"settings": {"temperature": float("nan")}}, "settings.temperature", "finite"),
        ("panda", {"settings": {"temperature": 0.0}}, "settings.temperature", "greater than 0"),
        ("panda", {"settings": {"temperature": "1.0"}}, "settings.temperature", "number"),
        ("panda", {"settings": {"ess": 1.0}}, "settings.ess", "less than 1"),
        ("panda", {"settings": {"adapt": 1.5}}, "settings.adapt", "less than 1"),
        ("arm2", {"planner": {"sigma": [1.0, 1.0, 1.0]}}, "planner.sigma", "expected 1 or 2 values, found 3"),
        ("arm2", {"planner": {"knots": 2}}, "planner.knots", "at least 3"),
        ("arm2", {"planner": {"knots": 1, "interpolation": "linear"}}, "planner.knots", "at least 2"),
        ("arm2", {"task": {"reach": {"weight": 1.0}}}, "task.reach", "goal.kind: joints"),
        ("arm2", {"task": {"here": {"kind": "track", "weight": 1.0}}}, "task.here", "goal.kind: joints"),
        ("arm2", {"task": {"postur": {"weight": 1.0}}}, "task.postur", "did you mean 'posture'"),
        ("arm2", {"task": {"posture": {"weight": 1.0, "reference": [0.0]}}}, "task.posture.reference", "expected 2 values"),
    ],
)
def test_a_bad_setting_is_refused(name: str, changes: dict[str, Any], key: str, words: str, models: dict[str, Model]) -> None:
    with pytest.raises(SpecError) as caught:
        MpcController(config(name, **changes), models[name], "run.yaml")
    assert caught.value.key == key and caught.value.file == "run.yaml" and words in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"planner": {"samples": 0}}, "planner.samples"),
        ({"planner": {"sigma": -1.0}}, "planner.sigma"),
        ({"planner": {"horizon": float("nan")}}, "planner.horizon"),
        ({"planner": {"interpolation": "quintic"}}, "planner.interpolation"),
        ({"planner": {"growth": 0.5}}, "planner.growth"),
        ({"seed": -1}, "seed"),
        ({"dynamics": {"dt": 0.0}}, "dynamics.dt"),
    ],
)
def test_a_bad_number_is_refused_before_the_controller(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(SpecError) as caught:
        config("arm2", **changes)
    assert caught.value.key.startswith(key)


# --- features against MuJoCo ----------------------------------------------------------------------------------------

OBSTACLES = {
    "sphere": Obstacle(name="ball", shape="sphere", position=(0.45, 0.1, 0.55), size=(0.08,)),
    "box": Obstacle(name="crate", shape="box", position=(0.5, -0.2, 0.3), size=(0.1, 0.15, 0.2)),
    "floor": Obstacle(name="floor", shape="plane", position=(0.0, 0.0, -0.2)),
    "wall": Obstacle(name="wall", shape="plane", position=(-0.9, 0.0, 0.0), normal=(0.8, 0.0, 0.6)),
}


def seen(model: Model, q: np.ndarray, obstacles: tuple[Obstacle, ...]) -> Any:
    """Return the planner's features at configurations ``q`` (N, nq)."""
    robot = model.robot
    kinematics = RigidBodyDynamics(model.tree, 0.01, actuation_of(robot), commanded=robot.command_index)
    states = torch.tensor(np.concatenate([q.T, 0 * q.T])[None], dtype=torch.float32).expand(2, -1, -1)
    commands = torch.zeros(1, robot.nu, len(q))
    at = tuple(torch.tensor(obstacle.position, dtype=torch.float32)[:, None, None] for obstacle in obstacles)
    parameters = Parameters(torch.zeros(robot.nu), p_target=torch.zeros(3, 1, 1), obstacles=at)
    return FeatureMap(robot, kinematics, obstacles)(states, commands, parameters)


def configurations(model: Model, count: int) -> np.ndarray:
    """Return random configurations within the limits, at most two radians from zero, (N, nq)."""
    limits = model.robot.limits
    low, high = np.maximum(limits.position_lower, -2), np.minimum(limits.position_upper, 2)
    return np.random.default_rng(5).uniform(np.minimum(low, high), np.maximum(low, high), (count, model.robot.nq))


@pytest.mark.parametrize("name", SPEC)
def test_the_tool_pose_is_mujocos(name: str, models: dict[str, Model]) -> None:
    model, q = models[name], configurations(models[name], 20)
    features, monitor = seen(model, q, ()), Monitor(model.mj, model.robot)
    for i, row in enumerate(q):
        monitor.update(row, 0.0)
        position, rotation = monitor.tool()
        np.testing.assert_allclose(features.p_world_tcp[:, 0, i], position, atol=2e-6)
        np.testing.assert_allclose(features.R_world_tcp[:, :, 0, i], rotation, atol=2e-6)


@pytest.mark.parametrize("shape", OBSTACLES)
@pytest.mark.parametrize("name", SPEC)
def test_clearances_are_mujocos(name: str, shape: str, models: dict[str, Model]) -> None:
    model, obstacle = models[name], OBSTACLES[shape]
    q = configurations(model, 60)
    ours = seen(model, q, (obstacle,)).clearances[0][:, 0].min(0).values
    monitor = Monitor(model.mj, model.robot, (obstacle,))
    slacks = [np.hypot(c.radius, np.linalg.norm(c.b - c.a) / 8) - c.radius for c in model.tree.capsules]
    slack = max(slacks) if shape == "box" else 0.0
    compared = 0
    for i, row in enumerate(q):
        monitor.update(row, 0.0)
        truth = monitor.clearance()
        if 0 < truth < 1.9:  # MuJoCo stops looking at 2 m, and has its own idea of depth
            compared += 1
            assert truth - slack - 1e-5 < float(ours[i]) < truth + 1e-5
    assert compared >= 10


def test_several_obstacles_keep_their_order(models: dict[str, Model]) -> None:
    model, q = models["panda"], configurations(models["panda"], 5)
    alone = [seen(model, q, (obstacle,)).clearances[0] for obstacle in OBSTACLES.values()]
    for one, among in zip(alone, seen(model, q, tuple(OBSTACLES.values())).clearances):
        torch.testing.assert_close(one, among)


def test_effort_is_the_servo_without_gravity(models: dict[str, Model]) -> None:
    model = models["panda"]
    controller, robot = MpcController(config("panda"), model), model.robot
    rng = np.random.default_rng(2)
    q, v, u = rng.uniform(-1, 1, (3, 7))
    states = torch.tensor(np.concatenate([q, v])[None, :, None], dtype=torch.float32).expand(2, -1, -1)
    before = torch.tensor(rng.uniform(-1, 1, 7), dtype=torch.float32)
    features = controller.features(states, torch.tensor(u[None, :, None], dtype=torch.float32), Parameters(before))
    expected = np.asarray(robot.control.stiffness) * (u - q) - np.asarray(robot.control.damping) * v
    np.testing.assert_allclose(features.effort[:, 0, 0], expected, rtol=1e-5, atol=1e-3)
    assert torch.equal(features.u_before[:, 0, 0], before) and features.p_world_tcp is None


@pytest.mark.parametrize("device", ["gpu7", "meta:x"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_device_torch_does_not_have_is_refused_by_name(device: str, backend: str, models: dict[str, Model]) -> None:
    with pytest.raises(SpecError, match="dynamics.device: torch cannot use") as caught:
        MpcController(config("panda", dynamics={"device": device, "backend": backend}), models["panda"])
    assert "\n" not in str(caught.value)

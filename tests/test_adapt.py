"""A payload picked up in the middle of a run: simulated as it is, known to every carrier of the model, found while it moves."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from sample_models import FREE, model_of
from simulated_logs import BODY, arm, motion, torque
from test_hybrid import residual_of, states

from mbctrl.base.config import AdaptSpec, PayloadSpec, RunConfig, load_run, merged
from mbctrl.base.errors import ModelError, SpecError
from mbctrl.base.logs import Log, read_log
from mbctrl.base.plan import PlanRequest
from mbctrl.base.scene import PoseGoal, Target
from mbctrl.base.spec import validate
from mbctrl.calibrate.adapt import SPACING, Adapter
from mbctrl.calibrate.online import OnlineEstimator, OnlineSettings
from mbctrl.cli.build import check_goal, load_run_model
from mbctrl.cli.session import Session
from mbctrl.dynamics.body import compose, weld
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import load_model, parse_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.export.planner import refuse
from mbctrl.kernels.native import shared_pool
from mbctrl.planning.compiled import kernel_dynamics, traced_residual
from mbctrl.planning.controller import MpcController
from mbctrl.planning.engines import CpuEngine
from mbctrl.planning.rules.base import Distribution
from mbctrl.report.payload import Change, payload_changes
from mbctrl.runtime.clock import LockstepClock
from mbctrl.runtime.driver import JointCommand
from mbctrl.sim.driver import SimDriver
from mbctrl.sim.payload import Grip
from mbctrl.tasks.distance import capsule_obstacle

F64 = torch.float64
BALL = PayloadSpec(mass=2.0, com=(0.03, -0.02, 0.06), radius=0.05, at=(0.5, 1.0))
SCENARIO = "panda_reach_payload_sim"


# --- the simulated arm ------------------------------------------------------------------------------------------------


def with_ball(name: str) -> mujoco.MjModel:
    """Return the robot's model compiled with the ball as a geom of a body of its own on the tool."""
    robot = load_model(name).robot
    spec = parse_model(robot.model_path)
    site = next(site for site in spec.sites if site.name == robot.tool)
    hand = site.parent.add_body(name="ball", pos=site.pos, quat=site.quat)
    size = [BALL.radius, 0, 0]
    hand.add_geom(type=mujoco.mjtGeom.mjGEOM_SPHERE, pos=BALL.com, size=size, mass=BALL.mass, contype=0, conaffinity=0)
    hand.mass, hand.ipos, hand.explicitinertial = BALL.mass, BALL.com, True
    hand.inertia = np.full(3, 0.4 * BALL.mass * BALL.radius**2)
    return spec.compile()


def accelerations(mj: mujoco.MjModel, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return acceleration and the tool's sites at a random moving state, actuators and contacts off."""
    rng, data = np.random.default_rng(seed), mujoco.MjData(mj)
    flags = mj.opt.disableflags
    mj.opt.disableflags = int(flags | FREE)
    data.qpos[:], data.qvel[:] = rng.uniform(-1.5, 1.5, mj.nq), rng.uniform(-2, 2, mj.nv)
    data.qfrc_applied[:] = rng.normal(size=mj.nv)
    mujoco.mj_forward(mj, data)
    mj.opt.disableflags = flags
    return data.qacc.copy(), np.concatenate([data.site_xpos.ravel(), data.geom_xpos[: mj.ngeom].ravel()])


@pytest.mark.parametrize("name", ["panda", "ur10e", "arm2"])
def test_a_ball_in_the_grip_is_the_model_compiled_with_it(name: str) -> None:
    model = load_model(name)
    bare, held, reference = model.mj, copy.copy(model.mj), with_ball(name)
    grip, worst, change = Grip(held, model.robot.tool, BALL), 0.0, np.inf
    for seed in range(5):
        expected = accelerations(bare, seed)
        grip.update(0.0)
        np.testing.assert_allclose(accelerations(held, seed)[0], expected[0], rtol=1e-9, atol=1e-9)
        grip.update(0.5)
        assert grip.carried == 2.0
        found, loaded = accelerations(held, seed), accelerations(reference, seed)
        worst = max(worst, float((np.abs(found[0] - loaded[0]) / (1 + np.abs(loaded[0]))).max()))
        change = min(change, float(np.abs(found[0] - expected[0]).max()))
        np.testing.assert_allclose(found[1], expected[1], atol=1e-12)  # what is drawn and judged by stays where it is
        grip.update(1.0)
        assert grip.carried == 0.0
        np.testing.assert_allclose(accelerations(held, seed)[0], expected[0], rtol=1e-9, atol=1e-9)
    print(f"{name}: acceleration with the ball off by {worst:.1e}, the ball's own effect at least {change:.1e} rad/s²")
    assert worst < 1e-9 and change > 1e-3


def test_the_arm_sags_for_its_own_gravity_torque_knows_nothing_of_the_ball() -> None:
    model = load_model("panda")
    robot, clock = model.robot, LockstepClock()
    driver = SimDriver(model.mj, robot, clock, payload=BALL)
    driver.open()
    home, k = np.asarray(robot.home), np.asarray(robot.control.stiffness)
    driver.write(JointCommand(home, np.zeros(7), k, np.asarray(robot.control.damping), np.zeros(7)))
    carried, states = [], []
    for tick in range(1, 3001):
        clock.wait_until(1e-3 * tick)
        states.append(driver.read())
        carried.append(driver.payload)
    assert set(carried[:500]) == {0.0} and set(carried[500:999]) == {2.0} and set(carried[1000:]) == {0.0}
    before, during = states[499], states[998]
    np.testing.assert_allclose(before.q, home, atol=1e-5)
    link = model.tree.frames[robot.tool].link
    place = model.tree.frames[robot.tool]
    body = compose(2.0, place.position + place.rotation @ np.array(BALL.com), np.zeros((3, 3)))
    loaded, bare = ReferenceDynamics(weld(model.tree, link, body)), ReferenceDynamics(model.tree)
    np.testing.assert_allclose(during.gravity, bare.gravity(during.q), atol=1e-3)
    sag = k * (home - during.q)  # all that holds the ball, but for what friction holds
    assert np.abs(sag - (loaded.gravity(during.q) - bare.gravity(during.q))).max() < 0.4
    assert np.abs(sag).max() > 5.0
    assert np.abs(states[-1].q - home).max() < 2e-3


def test_a_body_mujoco_keeps_too_simply_is_refused() -> None:
    xml = '<mujoco><worldbody><body name="b"><joint type="slide"/><geom size="0.1"/></body></worldbody></mujoco>'
    with pytest.raises(ModelError, match="cannot carry"):
        Grip(mujoco.MjModel.from_xml_string(xml), "b", BALL)


# --- the models that plan ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["panda", "ur10e", "random0", "random1", "crowded"])
def test_torch_carries_the_payload_and_compensates_its_own_weight_only(name: str) -> None:
    tree = model_of(name)[1]
    rng, link = np.random.default_rng(3), tree.n - 1
    model = RigidBodyDynamics(tree, 0.01, gravity_compensation=True, carrier=link, dtype=F64).carrying(BODY)
    loaded, bare = ReferenceDynamics(weld(tree, link, BODY)), ReferenceDynamics(tree)
    q, v = rng.uniform(-1.5, 1.5, (2, tree.n, 6))
    terms, worst = model.terms(torch.tensor(q), torch.tensor(v)), 0.0
    for i in range(6):
        pairs = (
            (terms.mass_matrix[..., i], loaded.mass_matrix(q[:, i])),
            (terms.bias[:, i] + terms.gravity[:, i], loaded.bias(q[:, i], v[:, i])),
            (terms.known[:, i], bare.gravity(q[:, i])),
        )
        worst = max(worst, *(float(np.abs(a.numpy() - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs))
    print(f"{name}: {worst:.1e}")
    assert worst < 1e-11


@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
@pytest.mark.parametrize("name", ["panda", "ur10e", "random0", "random1", "crowded"])
def test_compiled_rollouts_carry_it_as_torch_does(name: str, integrator: str) -> None:
    tree = model_of(name)[1]
    rng = np.random.default_rng(1)
    settings: dict[str, Any] = {"integrator": integrator, "gravity_compensation": True, "carrier": tree.n - 1, "dtype": F64}
    model = RigidBodyDynamics(tree, 0.01, effort_limit=(60.0,) * tree.n, **settings)
    kernel = kernel_dynamics(model, CpuEngine(shared_pool(1), np.float64))
    x, u = torch.tensor(rng.uniform(-1, 1, (2 * tree.n, 16))), torch.tensor(rng.uniform(-9, 9, (8, tree.n, 16)))
    bare = RigidBodyDynamics(tree, 0.01, effort_limit=(60.0,) * tree.n, **{**settings, "carrier": None})
    expected, nothing = model.carrying(BODY).rollout(x, u), bare.rollout(x, u)
    pairs = {
        "carrying": (kernel.carrying(BODY).rollout(x, u), expected),
        "carrying nothing": (kernel.rollout(x, u), nothing),
        "torch carrying nothing": (model.carrying(np.zeros(10)).rollout(x, u), nothing),
    }
    errors = {what: float((a - b).abs().max() / (1 + b.abs().max())) for what, (a, b) in pairs.items()}
    print(name, integrator, {what: f"{error:.1e}" for what, error in errors.items()})
    assert max(errors.values()) < 1e-9 and (expected - nothing).abs().max() > 1e-3


def test_physics_under_a_residual_carry_it_too() -> None:
    model = load_model("panda")
    tool, settings = model.tree.frames[model.robot.tool], {"gravity_compensation": True, "dtype": F64}
    base = RigidBodyDynamics(model.tree, 0.02, carrier=tool.link, **settings)
    hybrid = HybridDynamics(base, residual_of(model), tool, capsule_obstacle)
    kernel = kernel_dynamics(base, CpuEngine(shared_pool(1), np.float64), traced_residual(hybrid))
    x, u = states(model, 32), torch.tensor(np.random.default_rng(0).uniform(-9, 9, (6, 7, 32)))
    expected = hybrid.carrying(BODY).rollout(x, u)
    error = float((kernel.carrying(BODY).rollout(x, u) - expected).abs().max())
    print(f"{error:.1e}")
    assert error < 1e-7 < 1e-3 < (hybrid.rollout(x, u) - expected).abs().max()
    assert (base.carrying(BODY).rollout(x, u) - expected).abs().max() > 1e-4  # and the residual is there


def changed(**changes: Any) -> tuple[RunConfig, Path]:
    config, file = load_run(SCENARIO)
    return validate(RunConfig, merged(config.model_dump(), merged({"dynamics": {"threads": 1}}, changes))), file


def costs(planner: MpcController, payload: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the costs of some candidates around home and the next plan's states, carrying ``payload``."""
    robot, array, rng = planner.model.robot, planner.backend.array, np.random.default_rng(0)
    x = np.concatenate([robot.home, rng.uniform(-0.3, 0.3, 7)])
    request = PlanRequest(0.3, x, goal_time=0.3, payload=payload)
    mean = np.asarray(robot.home) + 0.05 * rng.normal(size=(planner.knots.count, 7))
    fixed = mean[..., None] + 0.1 * rng.normal(size=(planner.knots.count, 7, 24))
    belief = Distribution(*map(array, (mean, np.full_like(mean, 0.05), mean, fixed)))
    with torch.inference_mode():
        found = planner.planner.search(belief, array(fixed), 0, 0, array(x), planner.parameters(request, mean[0]))
    states = planner.backend.rollout(x, fixed[[0, 1, 2, 0]], 0.02, *planner._carried(request))
    return np.asarray(found[1], float), np.asarray(states, float)


def test_every_backend_plans_with_the_payload() -> None:
    config, file = changed(planner={"samples": 32})
    model = load_run_model(config, file)
    found = {}
    for backend in ("kernel", "torch"):
        planner = MpcController(
            config.model_copy(update={"dynamics": config.dynamics.model_copy(update={"backend": backend})}), model, file
        )
        found[backend] = [costs(planner, body) for body in (None, np.zeros(10), BODY)]
    for kind in found.values():
        assert all(np.array_equal(a, b) for a, b in zip(kind[0], kind[1]))
    for (cost, path), (other, rolled) in zip(found["kernel"], found["torch"]):
        assert np.abs(cost / other - 1).max() < 2e-3, np.abs(cost / other - 1).max()
        assert np.abs(path - rolled).max() < 1e-4
    assert np.abs(found["kernel"][2][0] / found["kernel"][0][0] - 1).max() > 0.05


def test_runs_that_do_not_adapt_have_no_such_input() -> None:
    config, file = changed(adapt=None)
    planner = MpcController(config, load_run_model(config, file), file)
    assert planner.backend.dynamics.traced.program.sizes["uniform"] == 1
    assert all(program.sizes["uniform"] == 7 for program in planner.planner.search.programs())


# --- adaptation -------------------------------------------------------------------------------------------------------


def test_the_model_changes_when_the_payload_does_and_hardly_else() -> None:
    rng, tree = np.random.default_rng(0), arm("panda")
    t, q, v, a = motion("panda", 12.0, 500.0, 0)
    carried = (t >= 6.0) & (t < 9.0)
    tau = np.where(carried[:, None], torque(weld(tree, 6, BODY), q, v, a), torque(tree, q, v, a))
    tau = tau + 0.1 * rng.normal(size=tau.shape)
    adapter = Adapter(tree, 6, AdaptSpec())
    changes = [float(t[k]) for k in range(len(t)) if adapter.update(float(t[k]), q[k], v[k], tau[k])]
    at = np.array(changes)
    print(len(at), "changes, the first", at[:3], "after 9 s", at[at >= 9.0][:3])
    assert not (at < 6.0).any() and len(at) < 60
    assert at[0] < 6.35 and (at >= 9.0).any() and at[at >= 9.0][0] < 9.35
    assert adapter.payload[0] < 0.1


def test_what_it_changes_to_is_the_payload() -> None:
    tree = arm("panda")
    t, q, v, a = motion("panda", 6.0, 200.0, 1)
    tau = torque(weld(tree, 6, BODY), q, v, a)
    adapter = Adapter(tree, 6, AdaptSpec())
    for k in range(len(t)):
        adapter.update(float(t[k]), q[k], v[k], tau[k])
    assert abs(adapter.payload[0] - 2.0) < 0.05
    np.testing.assert_allclose(adapter.payload[1:4] / 2, BODY[1:4] / 2, atol=0.015)


def test_samples_that_come_faster_are_left() -> None:
    tree = arm("panda")
    t, q, v, a = motion("panda", 2.0, 1000.0, 1)
    tau = torque(tree, q, v, a)
    every, some = Adapter(tree, 6, AdaptSpec()), Adapter(tree, 6, AdaptSpec())
    kept = round(1000 * SPACING)
    for k in range(len(t)):
        every.update(float(t[k]), q[k], v[k], tau[k])
        if k % kept == 0:
            some.update(float(t[k]), q[k], v[k], tau[k])
    assert every.estimate.mass == some.estimate.mass and every.estimate.mass_error == some.estimate.mass_error < 3.0


def test_no_more_is_believed_than_could_be() -> None:
    """Something pulls the tool down with 400 N."""
    tree = arm("panda")
    t, q, v, a = motion("panda", 2.0, 200.0, 1)
    tau = torque(weld(tree, 6, compose(40.0, BODY[1:4] / 2, np.zeros((3, 3)))), q, v, a)
    most = []
    for heaviest in (3.0, 50.0):
        adapter = Adapter(tree, 6, AdaptSpec(heaviest=heaviest))
        most.append(max(adapter.payload[0] for k in range(len(t)) if adapter.update(float(t[k]), q[k], v[k], tau[k])))
    assert most[0] <= 3.0 and most[1] > 30.0, most


@pytest.mark.parametrize("still", [True, False])
def test_an_arm_at_rest_tells_what_it_holds_where_no_brake_does(still: bool) -> None:
    """Friction holds up to its own size; what it is in truth is drawn anew for every pose."""
    tree, rng = arm("panda"), np.random.default_rng(2)
    loaded, worst = ReferenceDynamics(weld(tree, 6, BODY)), 0.0
    for seed in range(5):
        q = motion("panda", 0.1, 100.0, seed)[1][0]
        tau = loaded.gravity(q) + rng.uniform(-1, 1, 7) * tree.friction
        estimator = OnlineEstimator(tree, OnlineSettings(still=still))
        found = [estimator.update(0.005 * k, q, np.zeros(7), tau) for k in range(400)]
        assert found[-1].fresh is still
        worst = max(worst, abs(found[-1].mass - 2.0))
    print(f"mass off by at most {worst:.2f} kg")
    assert worst < 0.6 if still else worst == 2.0


# --- what is said of a run --------------------------------------------------------------------------------------------


def told(carried: np.ndarray, error: np.ndarray) -> list[Change]:
    """Return the changes of a log at 100 Hz."""
    t = np.arange(len(carried)) / 100
    return payload_changes(Log({}, {"t": "s", "payload.carried": "kg", "error.position": "m"}, np.stack([t, carried, error], 1)))


def test_what_a_payload_did_is_read_off_the_log() -> None:
    t = np.arange(1200) / 100
    carried = np.where((t >= 3) & (t < 8), 2.0, 0.0)
    error = np.full(1200, 1e-3)
    error[(t >= 3) & (t < 3.7)] = 10e-3
    error[(t >= 5) & (t < 8)] = 1.2e-3
    error[t >= 8] = 5e-3
    up, down = told(carried, error)
    assert (up.t, up.mass, down.t, down.mass) == (3.0, 2.0, 8.0, 0.0)
    np.testing.assert_allclose([up.before, up.peak, up.after], [1e-3, 10e-3, 1.2e-3], rtol=1e-9)
    np.testing.assert_allclose([down.before, down.peak, down.after], [1.2e-3, 5e-3, 5e-3], rtol=1e-9)
    assert 3.7 - 3.0 < up.recovery < 3.7 - 3.0 + 0.2 + 1e-9 and np.isnan(down.recovery)
    small = told(carried, np.full(1200, 1e-3))
    assert [change.recovery for change in small] == [0.0, 0.0]  # it never went off
    assert told(np.zeros(1200), error) == [] and told(np.zeros(0), np.zeros(0)) == []
    cut = told(carried[:310], error[:310])[0]  # ends in the middle of it
    assert np.isnan(cut.after) and np.isnan(cut.peak)


# --- a run ------------------------------------------------------------------------------------------------------------


HELD = PoseGoal(targets=(Target(position=(0.5, 0.25, 0.4), rpy=(3.14159265, 0.0, 0.0)),), hold=100.0)


def errors(folder: Path, **changes: Any) -> dict[str, float]:
    """Return the tool's RMS error [mm] before the pick-up, and from 0.7 s after it on."""
    goal = changes.pop("goal", None)
    config, file = changed(duration=5.0, seed=3, backend={"start_noise": 0.0, "payload": {"at": [3.0]}}, **changes)
    config = config if goal is None else config.model_copy(update={"goal": goal})
    summary = Session(config, file, lockstep=True).run(folder)
    assert len(summary.payload) == 1 and (summary.payload[0].recovery < 1.0) == (config.adapt is not None)
    log = read_log(folder / "log.csv")
    t, error = log["t"], 1e3 * log["error.position"]
    assert ((log["payload.carried"] > 0) == (t >= 3.0)).mean() > 0.999
    windows = {"before": (t > 1.0) & (t < 3.0), "after": t > 3.7}
    found = {name: float(np.sqrt(np.mean(error[window] ** 2))) for name, window in windows.items()}
    if "payload.planned" in log:
        found["mass"] = float(log["payload.planned"][-1])
        assert np.abs(log["payload.planned"][t < 3.0]).max() == 0.0
    return found


def test_an_arm_that_holds_a_pose_finds_out_too(tmp_path: Path) -> None:
    found = errors(tmp_path / "a", goal=HELD)
    print(found)
    assert found["after"] < 2.0 * found["before"] < 4.0 and abs(found["mass"] - 2.0) < 0.2


def test_the_tool_is_back_where_it_should_be_within_a_second(tmp_path: Path) -> None:
    found, blind = errors(tmp_path / "a"), errors(tmp_path / "b", adapt=None)
    print("adapting", found, "not", blind)
    assert found["after"] < 1.5 * found["before"] and blind["after"] > 2.5 * blind["before"]
    assert abs(found["before"] / blind["before"] - 1) < 0.01 and abs(found["mass"] - 2.0) < 0.3


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"backend": {"payload": {"at": [2.0, 1.0]}}}, "increasing times"),
        ({"backend": {"payload": {"at": []}}}, "at least 1"),
        ({"backend": {"payload": {"mass": 0.0}}}, "greater than 0"),
        ({"adapt": {"errors": -1.0}}, "greater than 0"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(SpecError, match=match):
        changed(**changes)


def test_models_that_carry_nothing_are_refused() -> None:
    config, file = changed(dynamics={"backend": "mujoco"})
    model = load_run_model(config, file)
    with pytest.raises(SpecError, match="dynamics.backend: MuJoCo as the model carries no payload"):
        MpcController(config, model, file)
    config, file = changed()
    half = replace(model, robot=model.robot.model_copy(update={"actuated": model.robot.joints[:6]}))
    with pytest.raises(SpecError, match="7 joints are all driven, found 6"):
        MpcController(config, half, file)
    with pytest.raises(SpecError, match="adapt: a model that adapts is not exported"):
        refuse(MpcController(config, model, file))


def test_a_suite_task_takes_no_payload() -> None:
    config, file = load_run("reacher_hard_sim")
    config = validate(RunConfig, merged(config.model_dump(), {"backend": {"payload": {"mass": 1.0, "at": [1.0]}}}))
    with pytest.raises(SpecError, match="backend.payload: a dm_control task"):
        check_goal(config, load_run_model(config, file), file)

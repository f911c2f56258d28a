"""A contact in the physics: closed forms, MuJoCo, torch against kernels, and nothing at all where nothing touches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import pytest
import torch

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import ModelError, SpecError
from mbctrl.base.logs import read_log
from mbctrl.base.plan import PlanRequest
from mbctrl.base.scene import CircleGoal
from mbctrl.base.spec import validate
from mbctrl.calibrate.contact import fit_contact
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.cli.build import load_run_model
from mbctrl.cli.session import Session
from mbctrl.dynamics.actuation import actuation_of
from mbctrl.dynamics.contact import Contact, contact_force, mount_of
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics
from mbctrl.dynamics.tree import Frame, RigidTree
from mbctrl.export.planner import refuse
from mbctrl.kernels.native import shared_pool
from mbctrl.kernels.trace import CONTACT, trace_dynamics
from mbctrl.planning.compiled import drive_of, kernel_dynamics
from mbctrl.planning.controller import MpcController
from mbctrl.planning.engines import CpuEngine
from mbctrl.planning.rules.base import Distribution
from mbctrl.runtime.clock import LockstepClock
from mbctrl.runtime.driver import JointCommand
from mbctrl.sim.driver import SimDriver

F64 = torch.float64
G = 9.81
BALL = """<mujoco><option gravity="0 0 {g}"/><worldbody>
  <body name="sled"><joint name="x" type="slide" axis="1 0 0"/><inertial pos="0 0 0" mass="1e-6" diaginertia="1e-9 1e-9 1e-9"/>
    <body name="ball"><joint name="z" type="slide" axis="0 0 1"/><inertial pos="0 0 0" mass="2" diaginertia="0.01 0.01 0.01"/>
      <site name="tip"/></body></body>
  {more}<site name="ground"/></worldbody></mujoco>"""
PLATE = """<body name="plate"><joint name="up" type="slide" axis="0 0 1"/>
  <inertial pos="0 0 0" mass="3" diaginertia="0.01 0.01 0.01"/><site name="top"/></body>"""
RADIUS = 0.05


def ball(
    tmp_path: Path, h: float, gravity: float = -G, more: str = "", surface: str = "ground", **change: Any
) -> RigidBodyDynamics:
    path = tmp_path / "ball.xml"
    path.write_text(BALL.format(g=gravity, more=more))
    tree = load_model(str(path)).tree
    integrator = change.pop("integrator", "euler")
    given = {"stiffness": 5e3, "damping": 40.0, "friction": 0.0, **change}
    contact = Contact(tree.frames["tip"], RADIUS, tree.frames[surface], **given)
    return RigidBodyDynamics(tree, h, contact=contact, integrator=integrator, dtype=F64)


def roll(model: RigidBodyDynamics, x: list[float], steps: int, u: list[float] | None = None) -> np.ndarray:
    """Return states (T, nx)."""
    command = torch.tensor(u or [0.0] * model.nu, dtype=F64)[None, :, None].expand(steps, -1, 1)
    return model.rollout(torch.tensor(x, dtype=F64)[:, None], command)[:, :, 0].numpy()


def damped(t: np.ndarray, v: float, k: float, d: float, m: float = 2.0) -> np.ndarray:
    """Return the depth [m] of a mass that enters a spring and damper at speed ``v`` under gravity, in closed form."""
    rest, rate = m * G / k, d / (2 * m)
    w = np.sqrt(k / m - rate**2)
    return rest + np.exp(-rate * t) * (-rest * np.cos(w * t) + (v - rate * rest) / w * np.sin(w * t))


@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
def test_a_mass_on_a_spring_and_damper_follows_the_closed_form(integrator: str, tmp_path: Path) -> None:
    errors = []
    for h in (4e-4, 2e-4, 1e-4):
        steps = round(0.06 / h)
        found = RADIUS - roll(ball(tmp_path, h, integrator=integrator), [0, RADIUS, 0, -0.3], steps)[:, 1]
        errors.append(np.abs(found - damped(h * np.arange(steps + 1), 0.3, 5e3, 40.0)).max())
    print("errors", errors)
    assert errors[-1] < 1e-4 and errors[0] / errors[2] > 3.0  # first order


@pytest.mark.parametrize("stiffness", [1e3, 1e4, 1e5, 1e7])
def test_a_large_step_comes_to_rest_where_the_spring_bears_the_weight(stiffness: float, tmp_path: Path) -> None:
    states = roll(ball(tmp_path, 0.02, stiffness=stiffness, damping=100.0), [0, RADIUS + 0.1, 0, 0], 400)
    depth = RADIUS - states[:, 1]
    assert np.abs(depth[-1] - 2 * G / stiffness) < 1e-9 and np.abs(states[-1, 2:]).max() < 1e-9
    assert depth.max() < 0.06 and states[:, 1].max() <= RADIUS + 0.1


@pytest.mark.parametrize("damping", [0.0, 30.0, 3000.0])
@pytest.mark.parametrize("stiffness", [3e3, 1e6])
@pytest.mark.parametrize("h", [2e-3, 2e-2])
def test_no_energy_is_created(h: float, stiffness: float, damping: float, tmp_path: Path) -> None:
    model = ball(tmp_path, h, gravity=0.0, stiffness=stiffness, damping=damping, friction=0.7)
    states = roll(model, [0, RADIUS + 0.003, 0.4, -0.7], 100)
    energy = (states[:, 2:] ** 2 * [2.0, 2.0]).sum(1) / 2 + stiffness * np.maximum(RADIUS - states[:, 1], 0) ** 2 / 2
    assert np.diff(energy).max() <= 1e-9 * energy[0] and energy[-1] < energy[0]


def test_friction_slows_a_slider_as_coulomb_says(tmp_path: Path) -> None:
    h, mu, model = 1e-3, 0.4, ball(tmp_path, 1e-3, friction=0.4, damping=200.0)
    states = roll(model, [0, RADIUS - 2 * G / 5e3, 1.0, 0.0], 400)
    t = h * np.arange(1, 401)
    sliding = t < 0.24
    assert np.abs(states[1:, 2] - (1.0 - mu * G * t))[sliding].max() < 2e-3
    assert abs(states[-1, 2]) < 1e-3  # and stays: slower than the slip speed it is a damper


@pytest.mark.parametrize("pull", [3.0, 7.0, 20.0])
def test_friction_holds_up_to_its_cone(pull: float, tmp_path: Path) -> None:
    model = ball(tmp_path, 0.02, friction=0.5, slip=1e-3, damping=200.0)
    states = roll(model, [0, RADIUS - 2 * G / 5e3, 0.0, 0.0], 200, [pull, 0.0])
    grip = 0.5 * 2 * G
    if pull < grip:
        assert np.abs(states[-1, 2] - 1e-3 * pull / grip) < 1e-8  # creeps at that share of the slip speed
    else:
        assert np.abs((states[-1, 2] - states[-51, 2]) / (50 * 0.02) - (pull - grip) / 2.000001) < 1e-9


def test_a_moving_surface_takes_the_momentum(tmp_path: Path) -> None:
    model = ball(tmp_path, 0.005, gravity=0.0, more=PLATE, surface="top", damping=0.0)
    states = roll(model, [0, RADIUS + 0.01, 0, 0, -1.0, 0.5], 200)
    momentum = 2 * states[:, 4] + 3 * states[:, 5]
    assert np.abs(momentum - momentum[0]).max() < 1e-12
    assert states[-1, 4] > states[-1, 5] and states[-1, 4] - states[-1, 5] <= 1.5  # they part, no faster than they met


def test_beside_the_surface_there_is_none(tmp_path: Path) -> None:
    model = ball(tmp_path, 0.01, half=(0.2, 0.3))
    free = RigidBodyDynamics(model.tree, 0.01, dtype=F64)
    x = [0.25, 0.0, 0.0, -1.0]
    assert np.array_equal(roll(model, x, 20), roll(free, x, 20))
    assert not np.array_equal(roll(model, [0.1, *x[1:]], 20), roll(free, [0.1, *x[1:]], 20))


def test_the_force_stays_in_the_cone_and_pushes() -> None:
    rng = np.random.default_rng(0)
    contact = Contact(frame(), 0.01, replace(frame(), link=1), stiffness=2e4, damping=150.0, friction=0.6)
    root = torch.tensor(rng.normal(0, 0.1, (3, 3, 4000))) + torch.eye(3)[:, :, None]
    mobility = torch.einsum("ikn,jkn->ijn", root, root)
    depth, free = torch.tensor(rng.normal(0, 0.01, 4000)), torch.tensor(rng.normal(0, 0.5, (3, 4000)))
    x, y, z = contact_force(contact, depth, free, mobility, 0.02, 0.02)
    after = free + 0.02 * torch.einsum("ijn,jn->in", mobility, torch.stack((x, y, z)))
    power, over = x * after[0] + y * after[1], torch.hypot(x, y) / (0.6 * z).clip(min=1e-9)
    touches = z > 0
    print("touches", int(touches.sum()), "power", float(power.max()), "cone", over[touches].quantile(0.99), over[touches].max())
    assert 1000 < touches.sum() < 3000 and z.min() == 0
    assert power.max() <= 1e-12  # friction never drives
    assert (
        over[touches].quantile(0.95) < 1.05 and over[touches].max() < 1.3 and (x[~touches] == 0).all() and (y[~touches] == 0).all()
    )
    assert (z[depth - 0.02 * free[2] <= 0] == 0).all()  # nothing before the surface is reached


def frame() -> Frame:
    return Frame(0, np.eye(3), np.zeros(3))


# --- the arm at its table ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wipe() -> Model:
    return load_model("panda_wipe")


def contact_of(tree: RigidTree, **change: Any) -> Contact:
    given = {"half": (0.2, 0.25), "stiffness": 3e4, "damping": 200.0, "friction": 0.5, **change}
    return Contact(tree.frames["panda_fingertip"], 0.0065, tree.frames["table_top"], **given)


def arm(model: Model, dt: float = 0.02, contact: Contact | None = None, rough: bool = True, **change: Any) -> RigidBodyDynamics:
    robot, tree = model.robot, model.tree
    tree = tree if rough else replace(tree, friction=0 * tree.friction)
    given = {"commanded": robot.command_index, "effort_limit": robot.limits.effort, "gravity_compensation": True, **change}
    return RigidBodyDynamics(tree, dt, actuation_of(robot), contact=contact, dtype=F64, **given)


def near(model: Model, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Contact]:
    """Return random states and commands with the tip within a few millimetres of a raised table, and the contact there."""
    rng, n = np.random.default_rng(seed), model.robot.nq
    q = np.asarray(model.robot.home)[:, None] + np.vstack(
        [rng.uniform(-0.02, 0.02, (7, count)), rng.uniform(-4e-3, 4e-3, (1, count))]
    )
    v = rng.uniform(-0.2, 0.2, (n, count))
    contact = contact_of(model.tree, half=None)
    free = arm(model)
    tip = free.point(free.poses(torch.tensor(q)), contact.tip.link, contact.tip.position)
    lifted = replace(contact.surface, position=contact.surface.position + [0, 0, float(tip[2].mean()) - 0.25 - 0.0065])
    u = q[:7] + rng.uniform(-0.05, 0.05, (7, count))
    return torch.tensor(np.vstack((q, v))), torch.tensor(u), replace(contact, surface=lifted)


@pytest.mark.parametrize("integrator", ["euler", "leapfrog"])
@pytest.mark.parametrize("stiffness", [2e3, 1e5])
def test_kernel_and_torch_agree(stiffness: float, integrator: str, wipe: Model) -> None:
    x, u, contact = near(wipe, 2000)
    model = arm(wipe, contact=replace(contact, stiffness=stiffness), rough=False, integrator=integrator)
    kernel = kernel_dynamics(model, CpuEngine(shared_pool(1), np.float64))
    a, b = model.rollout(x, u[None].expand(10, -1, -1)), kernel.rollout(x, u[None].expand(10, -1, -1))
    error = float((a - b).abs().max())
    touched = (model.step(x, u) != arm(wipe, rough=False, integrator=integrator).step(x, u)).any(0)
    print("error", error, "touched", int(touched.sum()))
    assert error <= 1e-9 and 500 < touched.sum() < 1900


@pytest.mark.parametrize("carrier", ["torch", "kernel"])
def test_what_touches_nothing_is_the_free_arm(carrier: str, wipe: Model) -> None:
    x, u, contact = near(wipe, 2000)
    pair = [arm(wipe, contact=contact), arm(wipe)]
    base = pair[0]
    if carrier == "kernel":
        engine = CpuEngine(shared_pool(1), np.float64)
        pair = [kernel_dynamics(model, engine) for model in pair]  # type: ignore[misc]
    a, b = (model.step(x, u) for model in pair)
    tip = base.point(base.poses(x[:8]), contact.tip.link, contact.tip.position)
    gap = -contact.depth(tip, *base.frame(base.poses(x[:8]), contact.surface))
    far = gap > 0.02  # more than a step's way
    lifted = x.clone()
    lifted[7] -= 0.1
    assert torch.equal(pair[0].step(lifted, u), pair[1].step(lifted, u)) and not torch.equal(a, b)
    assert torch.equal(a[:, far], b[:, far])


def test_a_contacts_parameters_may_be_inputs(wipe: Model) -> None:
    x, u, contact = near(wipe, 64)
    engine = CpuEngine(shared_pool(1), np.float64)
    model = arm(wipe, contact=contact)
    traced = trace_dynamics(model.tree, drive_of(model), tuple(CONTACT), each=True, contact=contact)
    values = np.random.default_rng(1).uniform([1e3, 10, 0.1], [1e5, 500, 1.0], (64, 3))
    assert {name: traced.sample[name].start for name in CONTACT} == dict(zip(CONTACT, range(3)))
    states = engine.empty(2, 16, 64)
    arrays = {"start": x.numpy(), "commands": u[None].numpy(), "uniform": engine.array([0.02]), "states": states}
    arrays["sample"] = engine.array(values.T)
    engine.run(engine.compile(traced.program, None), arrays, samples=64, steps=1, fixed=0, seed=0, draw=0)
    for i in range(0, 64, 7):
        k, d, mu = values[i]
        own = kernel_dynamics(arm(wipe, contact=replace(contact, stiffness=k, damping=d, friction=mu)), engine)
        assert np.abs(states[1][:, i] - own.step(x[:, i : i + 1], u[:, i : i + 1]).numpy()[:, 0]).max() < 1e-12


def pressed(model: Model, lower: float, drift: float, seconds: float) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Press MuJoCo's arm: references from above the table, ``lower`` deeper; return x (T, nx), u (T, nu) and contact forces.

    Forces are (3,) [N] on the surface's axes, what acts on the tip.
    """
    robot, clock = model.robot, LockstepClock()
    start = solve_pose(model, np.array([0.45, 0.0, 0.25 + 0.001]))
    deep = solve_pose(model, np.array([0.45, 0.0, 0.25 - lower]))
    aside = solve_pose(model, np.array([0.45, drift, 0.25 - lower]))
    driver = SimDriver(model.mj, robot, clock, np.append(start, 0.0))
    driver.open()
    gains = np.asarray(robot.control.stiffness), np.asarray(robot.control.damping)
    states, commands, forces, wrench = [], [], [], np.zeros(6)
    for k in range(round(seconds / 0.02)):
        state = driver.read()
        part = np.clip((0.02 * k - seconds / 2) / 0.5, 0, 1)
        u = deep + part * (aside - deep)
        driver.write(JointCommand(u, np.zeros(7), *gains, np.zeros(7)))
        states.append(np.concatenate((state.q, state.v)))
        commands.append(u)
        total = np.zeros(3)
        for c in range(driver.data.ncon):
            mujoco.mj_contactForce(driver.model, driver.data, c, wrench)
            turn, first = driver.data.contact[c].frame.reshape(3, 3), driver.data.contact[c].geom[0]
            sign = 1.0 if driver.model.geom(first).name == "plate" else -1.0  # the frame points from the first geom
            total += sign * turn.T @ wrench[:3]
        forces.append(total)
        clock.wait_until(0.02 * (k + 1))
    return np.array(states), np.array(commands), forces


def solve_pose(model: Model, tip: np.ndarray) -> np.ndarray:
    """Return joint positions (7,) with the tool point at ``tip`` (3,) [m], pointing down as at home, by Newton's method."""
    data, q = mujoco.MjData(model.mj), np.array(model.robot.home)
    site = model.mj.site("panda_tcp").id
    goal = None
    for _ in range(50):
        data.qpos[:] = q
        mujoco.mj_fwdPosition(model.mj, data)
        goal = data.site_xmat[site].reshape(3, 3).copy() if goal is None else goal
        jacobian = np.zeros((6, model.mj.nv))
        mujoco.mj_jacSite(model.mj, data, jacobian[:3], jacobian[3:], site)
        turn = data.site_xmat[site].reshape(3, 3)
        off = np.concatenate((tip - data.site_xpos[site], sum(np.cross(turn[:, i], goal[:, i]) for i in range(3)) / 2))
        q[:7] += np.linalg.lstsq(jacobian[:, :7], off, rcond=None)[0]
    assert np.abs(off).max() < 1e-9
    return q[:7]


@pytest.fixture(scope="module")
def press(wipe: Model) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    return pressed(wipe, 0.04, 0.05, 3.0)


def test_at_rest_the_table_bears_what_mujoco_says(press: Any, wipe: Model) -> None:
    x, u, forces = press
    at = round(1.4 / 0.02)
    mount = mount_of(contact_of(wipe.tree), wipe.tree)
    assert mount is not None
    force = mount.force(x[at, :8], x[at, 8:])
    assert 5 < force < 40 and abs(force - forces[at][2]) < 0.02 * force
    model = arm(wipe, contact=contact_of(wipe.tree))
    rolled = roll(model, list(x[0]), at, list(u[0]))
    own = mount.force(rolled[at, :8], rolled[at, 8:])
    print("rest force: spring", force, "MuJoCo", forces[at][2], "model", own, "deflection", x[at, 7], rolled[at, 7])
    assert abs(own - force) < 0.1 * force  # both arms' joint friction holds back as it likes
    assert abs(rolled[at, 7] - x[at, 7]) < 0.1 * abs(x[at, 7])


def test_friction_pulls_where_mujocos_does(press: Any, wipe: Model) -> None:
    x, u, forces = press
    at = round(1.9 / 0.02)  # sliding along y
    model = arm(wipe, contact=contact_of(wipe.tree))
    rolled = model.rollout(torch.tensor(x[0])[:, None], torch.tensor(u[:at])[:, :, None])[:, :, 0].numpy()
    slick = arm(wipe, contact=contact_of(wipe.tree, friction=0.0))
    slid = slick.rollout(torch.tensor(x[0])[:, None], torch.tensor(u[:at])[:, :, None])[:, :, 0].numpy()
    tips = [tool(wipe, state[:8]) for state in (x[at], rolled[at], slid[at])]
    speed = (tool(wipe, x[at, :8])[1] - tool(wipe, x[at - 1, :8])[1]) / 0.02
    print("speed", speed, "force", forces[at], "tips", tips)
    assert speed > 0.02 and abs(-forces[at][1] / forces[at][2] - 0.5) < 0.05 and abs(forces[at][0]) < 0.2 * forces[at][2]
    assert np.abs(tips[0] - tips[1]).max() < 3e-3 < np.abs(tips[0] - tips[2]).max() / 2


def tool(model: Model, q: np.ndarray) -> np.ndarray:
    data = mujoco.MjData(model.mj)
    data.qpos[:] = q
    mujoco.mj_kinematics(model.mj, data)
    return data.site("panda_tcp").xpos.copy()


def test_steps_in_contact_are_mujocos(press: Any, wipe: Model) -> None:
    x, u, forces = press
    touching = np.flatnonzero(np.array([force[2] for force in forces[:-1]]) > 1)
    touching = touching[touching > 20]
    start, command = torch.tensor(x[touching].T), torch.tensor(u[touching].T)
    truth = x[touching + 1].T
    tips = [
        np.stack([tool(wipe, q) for q in rows[:8].T])
        for rows in (
            arm(wipe, contact=contact_of(wipe.tree)).step(start, command).numpy(),
            arm(wipe).step(start, command).numpy(),
            truth,
        )
    ]
    with_contact, without = (np.linalg.norm(tip - tips[2], axis=1) for tip in tips[:2])
    print("one step, tip error [mm]: with contact", 1e3 * np.median(with_contact), "without", 1e3 * np.median(without))
    assert np.median(with_contact) < 0.1e-3 and np.median(without) > 10 * np.median(with_contact)


def test_the_simulator_as_model_has_the_plates_weight(wipe: Model) -> None:
    robot = wipe.robot
    given = {"commanded": robot.command_index, "effort_limit": robot.limits.effort, "gravity_compensation": True}
    model = SimulatorDynamics(wipe.mj, 0.02, actuation_of(robot), threads=1, **given)
    home = np.concatenate([robot.home, np.zeros(8)])
    states = model.rollout(torch.tensor(home)[:, None], torch.tensor(robot.home[:7])[None, :, None].expand(50, -1, 1))
    moved = (states - states[:1]).abs().amax((0, 2))
    assert moved[[7, 15]].max() < 1e-12 and moved.max() < 1e-6  # without its weight the plate would rise by 2.5 mm


def test_gravity_that_changes_with_the_pose_is_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "swing.xml"
    path.write_text(
        '<mujoco><worldbody><body><joint name="a" type="slide" axis="1 0 0"/><geom size="0.1"/>'
        '<body><joint name="b" axis="0 1 0"/><geom size="0.1" pos="0 0 0.3"/></body></body></worldbody></mujoco>'
    )
    with pytest.raises(ModelError, match="found b"):
        SimulatorDynamics(mujoco.MjModel.from_xml_path(str(path)), 0.002, commanded=[0], gravity_compensation=True)


def test_a_fit_finds_the_contact_and_the_spring_beneath_it(press: Any, wipe: Model) -> None:
    x, u, _ = press
    truth = arm(wipe, contact=contact_of(wipe.tree))
    rolled = truth.rollout(torch.tensor(x[0])[:, None], torch.tensor(u)[:, :, None])[:, :, 0].numpy()[:-1]
    wrong = replace(wipe.tree, stiffness=2 * wipe.tree.stiffness, spring_reference=wipe.tree.spring_reference / 2)
    start = arm(replace(wipe, tree=wrong), contact=contact_of(wipe.tree, stiffness=6e4, damping=100.0, friction=1.0))
    fit = fit_contact(start, rolled, u)
    print(dict(zip(fit.names, fit.values)), fit.errors)
    expected = {"contact_stiffness": 3e4, "contact_damping": 200.0, "contact_friction": 0.5}
    for name, value in {**expected, "mount_stiffness": 2000.0, "mount_damping": 150.0}.items():
        assert abs(fit[name] / value - 1) < 0.01, (name, fit[name])
    assert fit.after.max() < 0.01 * fit.before.max() and fit.contact.friction == fit["contact_friction"]
    with pytest.raises(CalibrationError, match="log with contact"):
        far = rolled.copy()
        far[:, 7] -= 0.1
        fit_contact(start, far, u)


# --- the task ------------------------------------------------------------------------------------------------------------


def scenario(**change: Any) -> tuple[RunConfig, Path]:
    config, file = load_run("panda_wipe_sim")
    return validate(RunConfig, merged(config.model_dump(), change), file), file


def test_the_kernels_costs_are_torchs(wipe: Model) -> None:
    costs = []
    x, _, _ = near(wipe, 1)
    x = x[:, 0]
    q = solve_pose(wipe, np.array([0.5, 0.02, 0.2505]))
    x[:7], x[7], x[15] = torch.tensor(q), -0.004, -0.02
    for backend in ("torch", "kernel"):
        config, file = scenario(dynamics={"backend": backend}, planner={"samples": 256, "noise": "halton"})
        controller = MpcController(config, wipe, file)
        search = controller.backend.search
        request = PlanRequest(3.0, x.numpy(), goal_time=3.0)
        parameters = controller.parameters(request, q)
        array = controller.backend.array
        mean = array(np.tile(q, (config.planner.knots, 1)))
        none = array(np.zeros((config.planner.knots, 7, 0)))
        found = search(
            Distribution(mean, array(np.full((config.planner.knots, 7), 0.03)), mean, none),
            none, 0, 0, array(x.numpy()), parameters,
        )  # fmt: skip
        costs.append(np.asarray(found[1], float))
    error = np.abs(costs[0] - costs[1]) / np.abs(costs[0])
    print("largest relative difference", error.max())
    assert error.max() < 2e-3 and np.ptp(costs[0]) > 0.1


@pytest.mark.parametrize(
    ("change", "key", "found"),
    [
        ({"dynamics": {"contact": {"tip": "panda_fingertop"}}}, "dynamics.contact.tip", "did you mean 'panda_fingertip'"),
        ({"dynamics": {"contact": {"surface": "panda_hand"}}}, "dynamics.contact", "same link"),
        ({"dynamics": {"contact": None}}, "task.contact_force", "found none"),
        ({"goal": {"force": None}}, "task.contact_force.target", "found none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change: Any, key: str, found: str, wipe: Model) -> None:
    config, file = scenario(**change)
    with pytest.raises(SpecError, match=found) as error:
        MpcController(config, wipe, file)
    assert error.value.key == key


def test_a_force_needs_a_surface_on_a_spring(wipe: Model) -> None:
    rigid = replace(wipe, tree=replace(wipe.tree, stiffness=0 * wipe.tree.stiffness))
    with pytest.raises(SpecError, match="spring along its normal"):
        MpcController(*[scenario()[0], rigid, None])


def test_a_contact_is_not_exported(wipe: Model) -> None:
    config, file = scenario(dynamics={"backend": "torch"})
    with pytest.raises(SpecError, match="not exported") as error:
        refuse(MpcController(config, wipe, file))
    assert error.value.key == "dynamics.contact"


def test_a_circle_waits_and_turns() -> None:
    goal = CircleGoal(kind="circle", center=(0.5, 0.1, 0.2), radius=0.06, period=4.0, delay=2.0)
    t = np.linspace(0, 10, 5001)
    p, r = goal.sample(0, t)
    assert r is None and goal.lap == 6.0 and np.allclose(p[t <= 2.0], [0.56, 0.1, 0.2], atol=1e-12)
    assert np.allclose(np.linalg.norm(p - goal.center, axis=1), 0.06, atol=1e-12)
    speed = np.linalg.norm(np.diff(p[t > 2.0], axis=0), axis=1) / np.diff(t)[0]
    assert np.abs(speed / (2 * np.pi * 0.06 / 4.0) - 1).max() < 1e-5 and np.allclose(goal.sample(0, np.array([6.0]))[0], p[0])


def test_the_scenario_presses_gently_and_at_its_force(tmp_path: Path) -> None:
    config, file = scenario(duration=4.5, seed=3)
    summary = Session(config, file, lockstep=True, model=load_run_model(config, file)).run(tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.csv")
    late = log["t"] > 3.0  # the circle has begun
    force = log["contact.force"][late]
    spring = -2000 * log["q.table"][late] - 150 * log["v.table"][late]
    print("force", force.mean(), force.std(), "peak", summary.force_peak, "path", log["error.position"][late].max())
    assert summary.force_peak <= 20 and np.sqrt(np.mean((force - 15) ** 2)) <= 1.0
    assert np.sqrt(np.mean((spring - force) ** 2)) < 0.2 and log["error.position"][late].max() < 5e-3
    assert not summary.violations

"""Rigid-body dynamics against MuJoCo, Pinocchio, closed forms and conservation laws; MuJoCo as a model against itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pytest
import torch
from sample_models import CROWDED, ROBOTS, TREES, model_of, random_states, relative, rows

from mbctrl.base.errors import ModelError, SpecError
from mbctrl.dynamics.actuation import Impedance, Torque, actuation_of
from mbctrl.dynamics.load import compile_model, load_model, tree_from_mujoco
from mbctrl.dynamics.reference import ReferenceDynamics, mujoco_mass_matrix, self_check
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import Batch, SimulatorDynamics
from mbctrl.dynamics.tree import RigidTree

ALL = (*ROBOTS, *TREES)
ARMS = ("panda", "ur10e", "arm2")
N = 60
F64 = torch.float64


def exact(tree: RigidTree, dt: float = 0.01, **options: object) -> RigidBodyDynamics:
    return RigidBodyDynamics(tree, dt, **{"dtype": F64, **options})


def mujoco_forward(mj: mujoco.MjModel, q: np.ndarray, v: np.ndarray, tau: np.ndarray) -> mujoco.MjData:
    data = mujoco.MjData(mj)
    data.qpos[:], data.qvel[:], data.qfrc_applied[:] = q, v, tau
    mujoco.mj_forward(mj, data)
    return data


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- equations of motion against both engines -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_mass_matrix_bias_and_gravity_are_both_engines(name: str) -> None:
    mj, tree = model_of(name)
    q, v, _ = random_states(tree, N)
    terms, reference, data = exact(tree).terms(rows(q), rows(v)), ReferenceDynamics(tree), mujoco.MjData(mj)
    rest = np.zeros(tree.n)
    found = {
        "M(q)": terms.mass_matrix.permute(2, 0, 1).numpy(),
        "bias": (terms.bias + terms.gravity).T.numpy(),
        "gravity": terms.gravity.T.numpy(),
    }
    engines = {
        "mujoco": {
            "M(q)": [mujoco_mass_matrix(mj, data, a) for a in q],
            "bias": [mujoco_forward(mj, a, b, rest).qfrc_bias for a, b in zip(q, v)],
            "gravity": [mujoco_forward(mj, a, rest, rest).qfrc_bias for a in q],
        },
        "pinocchio": {
            "M(q)": [reference.mass_matrix(a) for a in q],
            "bias": [reference.bias(a, b) for a, b in zip(q, v)],
            "gravity": [reference.gravity(a) for a in q],
        },
    }
    for engine, expected in engines.items():
        for what in found:
            if what == "gravity" and np.abs(expected[what]).max() < 1e-9:  # moves in a horizontal plane
                assert np.abs(found[what]).max() <= 1e-12
                continue
            error = relative(found[what], np.array(expected[what]))
            print(f"{engine} {what}", error)
            assert error <= 1e-9, (engine, what, error)


@pytest.mark.parametrize("name", ALL)
def test_accelerations_without_friction_are_both_engines(name: str) -> None:
    mj, tree = model_of(name)
    q, v, tau = random_states(tree, N)
    found = exact(tree).forward_dynamics(rows(q), rows(v), rows(tau)).T.numpy()
    reference = ReferenceDynamics(tree)
    for engine, expected in (
        ("mujoco", [mujoco_forward(mj, *state).qacc for state in zip(q, v, tau)]),
        ("pinocchio", [reference.forward_dynamics(*state) for state in zip(q, v, tau)]),
    ):
        error = relative(found, np.array(expected))
        print(engine, error)
        assert error <= 1e-9, (engine, error)


@pytest.mark.parametrize("name", ALL)
def test_accelerations_with_sliding_friction_are_both_engines(name: str) -> None:
    mj, tree = model_of(name, friction=True)
    mj.opt.tolerance, mj.opt.iterations = 0.0, 100
    assert tree.friction.any()
    q, v, tau = random_states(tree, 8 * N, seed=1)
    tau = tau * np.minimum(1, 10 * mj.dof_M0)  # else light links outrun MuJoCo's soft friction
    found = exact(tree).forward_dynamics(rows(q), rows(v), rows(tau)).T.numpy()
    reference = ReferenceDynamics(tree)
    error = relative(found, np.array([reference.forward_dynamics(*state) for state in zip(q, v, tau)]))
    print("pinocchio", error)
    assert error <= 1e-9, ("pinocchio", error)
    sliding, expected = [], []
    for i, state in enumerate(zip(q, v, tau)):
        data = mujoco_forward(mj, *state)
        assert data.nefc == np.count_nonzero(tree.friction), "only friction may act"
        joints = data.efc_id[: data.nefc]
        against = -np.sign(v[i, joints]) * tree.friction[joints]
        if np.array_equal(data.efc_force[: data.nefc], against):  # MuJoCo's soft friction is at its bound in every joint
            sliding.append(i)
            expected.append(data.qacc.copy())
    assert len(sliding) >= 50, f"MuJoCo's friction is saturated in {len(sliding)} states only"
    error = relative(found[sliding], np.array(expected))
    print("mujoco", error)
    assert error <= 1e-9, ("mujoco", error)


@pytest.mark.parametrize("field", ["armature", "damping", "friction", "stiffness", "gravity", "mass", "com", "inertia"])
def test_every_parameter_matters_to_the_accelerations(field: str) -> None:
    _, tree = model_of("random0", friction=True)
    q, v, tau = random_states(tree, 3)
    changed = replace(tree, **{field: getattr(tree, field) * 1.01})
    before, after = (exact(t).forward_dynamics(rows(q), rows(v), rows(tau)) for t in (tree, changed))
    assert (before - after).abs().max() > 1e-4, (before - after).abs().max()


@pytest.mark.parametrize("name", ALL)
def test_one_second_of_steps_is_mujocos(name: str) -> None:
    mj, tree = model_of(name)
    h = mj.opt.timestep
    q, v, tau = random_states(tree, 3, seed=2)
    v, tau = v / 3, tau / 5
    if np.ptp(mj.jnt_range) > 0:
        q = np.clip(q, -1, 1)
    model, x = exact(tree, h), torch.cat((rows(q), rows(v)))
    data = [mujoco_forward(mj, *state) for state in zip(q, v, tau)]
    for _ in range(round(1 / h)):
        x = model.step(x, rows(tau))
        for d in data:
            mujoco.mj_step(mj, d)
    expected = np.array([np.concatenate((d.qpos, d.qvel)) for d in data])
    worst = np.abs(x.T.numpy() - expected).max()
    print("error", worst)
    assert worst <= 1e-8, worst


@pytest.mark.parametrize("name", ALL)
def test_frames_are_where_mujoco_has_them(name: str) -> None:
    mj, tree = model_of(name)
    q, _, _ = random_states(tree, 5)
    model = exact(tree)
    poses = model.poses(rows(q))
    for k, sample in enumerate(q):
        data = mujoco_forward(mj, sample, np.zeros(tree.n), np.zeros(tree.n))
        for frame_name, frame in tree.frames.items():
            rotation, position = model.frame(poses, frame)
            is_site = mujoco.mj_name2id(mj, mujoco.mjtObj.mjOBJ_SITE, frame_name) >= 0
            there = data.site(frame_name) if is_site else data.body(frame_name)
            expected = there.xpos, there.xmat.reshape(3, 3)
            errors = [np.abs(a[..., min(k, a.shape[-1] - 1)].numpy() - b).max() for a, b in zip((position, rotation), expected)]
            assert max(errors) <= 1e-12, (frame_name, errors)


@pytest.mark.parametrize("name", ALL)
def test_collision_capsules_contain_their_geoms(name: str) -> None:
    mj, tree = model_of(name)
    q, _, _ = random_states(tree, 1)
    model, data = exact(tree), mujoco_forward(mj, q[0], np.zeros(tree.n), np.zeros(tree.n))
    poses = model.poses(rows(q))
    compared = 0
    for capsule in tree.capsules:
        g = mujoco.mj_name2id(mj, mujoco.mjtObj.mjOBJ_GEOM, capsule.name)
        g = int(capsule.name.removeprefix("geom")) if g < 0 else g
        a, b = (model.point(poses, capsule.link, end)[:, 0].numpy() for end in (capsule.a, capsule.b))
        if mj.geom_type[g] in (mujoco.mjtGeom.mjGEOM_CAPSULE, mujoco.mjtGeom.mjGEOM_SPHERE):
            half = mj.geom_size[g, 1] if mj.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0
            axis = data.geom_xmat[g].reshape(3, 3)[:, 2] * half
            error = max(np.abs(a - data.geom_xpos[g] + axis).max(), np.abs(b - data.geom_xpos[g] - axis).max())
            assert error <= 1e-12 and capsule.radius == mj.geom_size[g, 0], (capsule.name, error)
        points = surface(mj, g) @ data.geom_xmat[g].reshape(3, 3).T + data.geom_xpos[g]
        along = np.clip((points - a) @ (b - a) / max((b - a) @ (b - a), 1e-30), 0, 1)
        outside = np.linalg.norm(points - a - along[:, None] * (b - a), axis=1).max() - capsule.radius
        assert outside <= 1e-6 * capsule.radius + 1e-9, (capsule.name, outside)
        compared += 1
    assert compared == len(tree.capsules)
    assert compared > 0 or not mj.ngeom


def surface(mj: mujoco.MjModel, g: int) -> np.ndarray:
    """Return points of geom ``g`` that reach furthest out, in its own frame."""
    kind, size = mj.geom_type[g], mj.geom_size[g]
    if kind == mujoco.mjtGeom.mjGEOM_MESH:
        first, number = mj.mesh_vertadr[mj.geom_dataid[g]], mj.mesh_vertnum[mj.geom_dataid[g]]
        return mj.mesh_vert[first : first + number]
    ball = np.random.default_rng(0).normal(size=(200, 3))
    ball /= np.linalg.norm(ball, axis=1)[:, None]
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return np.array(np.meshgrid((-1, 1), (-1, 1), (-1, 1))).reshape(3, -1).T * size
    if kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return ball * size
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        flat = ball[:, :2] / np.linalg.norm(ball[:, :2], axis=1)[:, None]
        return np.column_stack((flat * size[0], np.sign(ball[:, 2]) * size[1]))
    half = size[1] if kind == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0
    return ball * size[0] + np.sign(ball[:, 2:]) * np.array([0, 0, half])


# --- closed forms and invariants --------------------------------------------------------------------------------------


def test_arm2_is_the_textbook_double_pendulum() -> None:
    _, tree = model_of("arm2")
    q, v, tau = random_states(tree, N)
    (q1, q2), (w1, w2), (t1, t2) = q.T, v.T, tau.T
    i1, i2 = 2 * 0.5**2 / 12, 1.2 * 0.4**2 / 12
    alpha, beta, delta = i1 + 2 * 0.25**2 + i2 + 1.2 * (0.5**2 + 0.2**2), 1.2 * 0.5 * 0.2, i2 + 1.2 * 0.2**2
    m11, m12, m22 = alpha + 2 * beta * np.cos(q2) + 0.01, delta + beta * np.cos(q2), delta + 0.01
    wrist = 1.2 * 0.2 * 9.81 * np.sin(q1 + q2)
    r1 = t1 + beta * np.sin(q2) * (2 * w1 * w2 + w2**2) - (2 * 0.25 + 1.2 * 0.5) * 9.81 * np.sin(q1) - wrist - 0.02 * w1
    r2 = t2 - beta * np.sin(q2) * w1**2 - wrist - 0.02 * w2
    determinant = m11 * m22 - m12**2
    expected = np.stack(((m22 * r1 - m12 * r2) / determinant, (m11 * r2 - m12 * r1) / determinant), 1)
    model = exact(tree)
    error = relative(model.forward_dynamics(rows(q), rows(v), rows(tau)).T.numpy(), expected)
    assert error <= 1e-12, error
    tip = model.frame(model.poses(rows(q)), tree.frames["tcp"])[1].T.numpy()
    x, z = -0.5 * np.sin(q1) - 0.4 * np.sin(q1 + q2), 1.2 - 0.5 * np.cos(q1) - 0.4 * np.cos(q1 + q2)
    assert np.abs(tip - np.stack((x, 0 * x, z), 1)).max() <= 1e-14


def energy(model: RigidBodyDynamics, x: torch.Tensor) -> torch.Tensor:
    """Return kinetic plus potential energy [J] of states (nx, N), (N,)."""
    n, tree = model.nq, model.tree
    terms, poses = model.terms(x[:n], x[n:]), model.poses(x[:n])
    kinetic = torch.einsum("in,ijn,jn->n", x[n:], terms.mass_matrix, x[n:]) / 2
    gravity = torch.from_numpy(tree.gravity)
    return kinetic - sum(tree.mass[i] * (gravity @ model.point(poses, i, tree.com[i])) for i in range(n))


def test_energy_of_a_free_double_pendulum_drifts_with_the_first_order_of_the_step() -> None:
    _, tree = model_of("arm2")
    tree = replace(tree, damping=np.zeros(2))
    drift = []
    for h in (2e-3, 1e-3, 5e-4):
        model, x = exact(tree, h), torch.tensor([[1.5], [-0.7], [0.0], [2.0]], dtype=F64)
        path = energy(model, model.rollout(x, torch.zeros(round(0.6 / h), 2, 1, dtype=F64))[:, :, 0].T)
        drift.append((path - path[0]).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(drift, drift[1:])]
    assert all(abs(order - 1) < 0.1 for order in orders), (orders, drift)


def test_leapfrog_is_of_second_order_in_gravity() -> None:
    body = '<joint axis="0 1 0"/><inertial pos="0 0 -0.3" mass="1" diaginertia="0.01 0.01 0.01"/>'
    xml = f"<mujoco><worldbody><body>{body}</body></worldbody></mujoco>"
    tree, x = tree_from_mujoco(mujoco.MjModel.from_xml_string(xml)), torch.tensor([[1.5], [0.5]], dtype=F64)
    for integrator, order in (("euler", 1), ("leapfrog", 2)):
        drift = []
        for h in (8e-3, 4e-3, 2e-3):
            model = exact(tree, h, integrator=integrator)
            path = energy(model, model.rollout(x, torch.zeros(round(0.64 / h), 1, 1, dtype=F64))[:, :, 0].T)
            drift.append((path - path[0]).abs().max().item())
        orders = [math.log2(a / b) for a, b in zip(drift, drift[1:])]
        assert all(abs(found - order) < 0.1 for found in orders), (integrator, orders, drift)


def test_an_unknown_integrator_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown integrator 'rk4'; known: euler, leapfrog"):
        exact(model_of("arm2")[1], integrator="rk4")


@pytest.mark.parametrize("name", ["random0", "panda", "crowded"])
def test_power_into_a_frictionless_tree_is_the_change_of_its_energy(name: str) -> None:
    _, tree = model_of(name)
    tree = replace(tree, damping=np.zeros(tree.n), stiffness=np.zeros(tree.n))
    q, v, tau = random_states(tree, 1)
    model, h = exact(tree), 1e-5
    acceleration = model.forward_dynamics(rows(q), rows(v), rows(tau))
    bent = rows(q) + h * h / 2 * acceleration
    after, before = (torch.cat((bent + s * h * rows(v), rows(v) + s * h * acceleration)) for s in (1, -1))
    (high, low), power = (energy(model, state).item() for state in (after, before)), float(tau[0] @ v[0])
    rate = (high - low) / (2 * h)
    assert abs(rate - power) <= 1e-6 * max(abs(power), abs(high)), (rate, power)


@pytest.mark.parametrize("name", ["panda", "random1"])
def test_a_batch_is_its_samples(name: str) -> None:
    _, tree = model_of(name, friction=True)
    q, v, tau = random_states(tree, 9)
    model, x = exact(tree), torch.cat((rows(q), rows(v)))
    together = model.rollout(x, rows(tau).expand(4, -1, -1))
    alone = torch.cat([model.rollout(x[:, i : i + 1], rows(tau[i : i + 1]).expand(4, -1, -1)) for i in range(9)], 2)
    error = ((together - alone).abs() / alone.abs().clamp(min=1)).max()
    assert together.shape == (5, 2 * tree.n, 9) and error <= 1e-11, error


def test_another_step_shares_the_arm() -> None:
    _, tree = model_of("panda", friction=True)
    q, v, tau = random_states(tree, 2)
    x = torch.cat((rows(q), rows(v)))
    first = exact(tree, 0.01)
    assert torch.equal(first.with_dt(0.002).step(x, rows(tau)), exact(tree, 0.002).step(x, rows(tau)))
    assert first.dt == 0.01


# --- gradients --------------------------------------------------------------------------------------------------------


def gradient_cases(tree: RigidTree) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    q, v, tau = (rows(a) for a in random_states(tree, 2 if tree.n < 5 else 1))
    return [(q, v, tau), (q, torch.zeros_like(v), tau), (q, v * 0.004, tau)]  # sliding, at rest, on the way


def with_friction(name: str) -> RigidTree:
    _, tree = model_of(name, friction=True)
    return tree


@pytest.mark.parametrize("name", ["arm2", "panda"])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_gradients_of_accelerations(name: str, case: int) -> None:
    tree = with_friction(name)
    inputs = tuple(t.clone().requires_grad_() for t in gradient_cases(tree)[case])
    assert torch.autograd.gradcheck(exact(tree).forward_dynamics, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["arm2", "panda"])
@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize("mode", ["torque", "impedance", "limited", "leapfrog"])
def test_gradients_of_steps(name: str, case: int, mode: str) -> None:
    tree = with_friction(name)
    q, v, tau = gradient_cases(tree)[case]
    servo = Impedance((200.0,) * tree.n, (20.0,) * tree.n)
    options = {"effort_limit": (3.0,) * tree.n, "gravity_compensation": True} if mode == "limited" else {}
    if mode == "leapfrog":
        options = {"integrator": mode}
    torque = mode in ("torque", "leapfrog")
    model = exact(tree, 0.02, actuation=Torque() if torque else servo, **options)
    u = tau if torque else q + 0.1 * tau
    inputs = tuple(t.clone().requires_grad_() for t in (torch.cat((q, v)), u))
    assert torch.autograd.gradcheck(model.step, inputs, eps=1e-6, atol=1e-5, rtol=1e-5)


# --- servos, limits, friction, gravity compensation -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["panda", "ur10e", "ur5e", "arm2"])
@pytest.mark.parametrize("stiffness", [1e3, 1e4, 1e5])
def test_a_stiff_servo_is_stable_at_20_ms(name: str, stiffness: float) -> None:
    _, tree = model_of(name, friction=name != "arm2")
    q, v, _ = random_states(tree, 16)
    v = v / 1.5  # up to 2 rad/s
    servo = Impedance((stiffness,) * tree.n, (2 * math.sqrt(stiffness),) * tree.n)
    model = exact(tree, 0.02, actuation=servo, gravity_compensation=True)
    goal = q + np.random.default_rng(1).uniform(-0.5, 0.5, q.shape)
    states = model.rollout(torch.cat((rows(q), rows(v))), rows(goal).expand(250, -1, -1))
    error = (states[:, : tree.n] - rows(goal)).abs().amax((1, 2))
    assert torch.isfinite(states).all()
    assert error.max() <= 1.0, error.max()  # never further out than it began, bar the initial speed
    assert states[:, tree.n :].abs().max() <= 50, states[:, tree.n :].abs().max()
    stuck = 1e-9 + tree.friction.max() / stiffness  # where friction holds against the spring
    assert error[-1] <= 2 * stuck, (error[-1], stuck)


@pytest.mark.parametrize("mode", ["torque", "impedance"])
@pytest.mark.parametrize("name", ["panda", "ur10e", "random0"])
@pytest.mark.parametrize("friction", [False, True])
def test_gravity_compensation_holds_the_arm(name: str, mode: str, friction: bool) -> None:
    _, tree = model_of(name, friction=friction)
    tree = replace(tree, stiffness=np.zeros(tree.n))
    q, _, _ = random_states(tree, 4)
    servo = Impedance((500.0,) * tree.n, (50.0,) * tree.n)
    x = torch.cat((rows(q), torch.zeros(tree.n, 4, dtype=F64)))
    u = (0 * rows(q) if mode == "torque" else rows(q)).expand(50, -1, -1)
    drift = {}
    for compensated in (True, False):
        model = exact(tree, 0.02, actuation=Torque() if mode == "torque" else servo, gravity_compensation=compensated)
        drift[compensated] = (model.rollout(x, u) - x).abs().max().item()
    assert drift[True] <= 1e-11 and drift[False] > 1e-3, drift


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["panda", "ur10e", "arm2"])
def test_a_saturated_servo_gives_the_limit_torque(name: str, sign: int, compensated: bool) -> None:
    _, tree = model_of(name, friction=True)
    limit = tuple(np.linspace(20.0, 5.0, tree.n))
    q, v, _ = random_states(tree, 8)
    x = torch.cat((rows(q), rows(v)))
    options = {"effort_limit": limit, "gravity_compensation": compensated}
    servo = exact(tree, 0.02, actuation=Impedance((1e5,) * tree.n, (10.0,) * tree.n), **options)
    steady = exact(tree, 0.02)  # a plain torque of exactly the limit, gravity compensation counted in
    found = servo.rollout(x, (x[: tree.n] + sign * 50).expand(3, -1, -1))
    expected = steady.rollout(x, (sign * torch.tensor(limit, dtype=F64)[:, None]).expand(3, tree.n, 8))
    error = (found - expected).abs().max()
    assert error <= 1e-12 * expected.abs().max(), error


def test_torque_commands_are_clipped_to_the_limit() -> None:
    _, tree = model_of("panda", friction=True)
    q, v, _ = random_states(tree, 4)
    x, limit = torch.cat((rows(q), rows(v))), (10.0,) * 7
    u = torch.linspace(-30, 30, 28, dtype=F64).view(7, 4)
    found = exact(tree, effort_limit=limit).step(x, u)
    assert torch.equal(found, exact(tree).step(x, u.clamp(-10, 10))) and not torch.equal(found, exact(tree).step(x, u))


def test_a_servo_within_its_limits_does_not_notice_them() -> None:
    _, tree = model_of("panda", friction=True)
    q, v, _ = random_states(tree, 4)
    x, servo = torch.cat((rows(q), rows(v))), Impedance((100.0,) * 7, (20.0,) * 7)
    found = exact(tree, 0.02, actuation=servo, effort_limit=(1e4,) * 7).step(x, x[:7])
    assert torch.equal(found, exact(tree, 0.02, actuation=servo).step(x, x[:7]))


@pytest.mark.parametrize("h", [0.001, 0.02, 0.05])
def test_friction_brings_a_joint_to_rest_and_holds_it(h: float) -> None:
    _, tree = model_of("arm2")
    tree = replace(tree, friction=np.array([3.0, 1.0]), damping=np.zeros(2), gravity=np.zeros(3))
    x = torch.tensor([[0.3], [-0.4], [1.0], [-1.0]], dtype=F64)
    states = exact(tree, h).rollout(x, torch.tensor([[1.0], [0.3]], dtype=F64).expand(round(1 / h), 2, 1))  # below friction
    speed = states[-1, 2:].abs().max()
    assert speed <= 0.01, speed  # the smooth friction creeps below its own width


def test_a_time_step_refined_agrees_with_itself() -> None:
    _, tree = model_of("panda")
    q, v, _ = random_states(tree, 4)
    x, servo = torch.cat((rows(q), rows(v) / 3)), Impedance((600.0,) * 7, (50.0,) * 7)
    ends = []
    for h in (4e-3, 2e-3, 1e-3):
        model = exact(tree, h, actuation=servo, gravity_compensation=True)
        ends.append(model.rollout(x, (x[:7] + 0.1).expand(round(0.2 / h), -1, -1))[-1])
    order = math.log2((ends[0] - ends[1]).abs().max() / (ends[1] - ends[2]).abs().max())
    assert abs(order - 1) < 0.2, order


@pytest.mark.parametrize("mode", ["torque", "impedance"])
@pytest.mark.parametrize(("name", "commanded"), [("dm_control:cartpole-swingup", [0]), ("panda", [5, 0, 3]), ("random0", [2, 7])])
def test_unactuated_joints_get_no_torque(name: str, commanded: list[int], mode: str) -> None:
    _, tree = model_of(name, friction=True)
    q, v, tau = random_states(tree, 4)
    x = torch.cat((rows(q), rows(v)))
    nu = len(commanded)
    full = np.zeros(tree.n)
    full[commanded] = 1.0
    if mode == "torque":
        found = exact(tree, commanded=commanded).step(x, rows(tau[:, :nu]))
        every = torch.zeros(tree.n, 4, dtype=F64)
        every[commanded] = rows(tau[:, :nu])
        expected = exact(tree).step(x, every)
    else:
        gains = np.arange(1, nu + 1) * 100.0
        found = exact(tree, commanded=commanded, actuation=Impedance(gains, gains / 10)).step(x, rows(q[:, commanded]) + 0.1)
        stiffness = np.zeros(tree.n)
        stiffness[commanded] = gains
        expected = exact(tree, actuation=Impedance(stiffness, stiffness / 10)).step(x, rows(q) + 0.1)
    error = (found - expected).abs().max()
    assert error <= 1e-12 * expected.abs().max(), error


@pytest.mark.parametrize("name", ROBOTS)
def test_single_precision_is_good_for_planning(name: str) -> None:
    _, tree = model_of(name, friction=True)
    q, v, tau = random_states(tree, 200)
    x, servo = torch.cat((rows(q), rows(v))), Impedance((100.0,) * tree.n, (20.0,) * tree.n)
    arguments = tree, 0.02, servo
    single, double = (RigidBodyDynamics(*arguments, dtype=dtype) for dtype in (torch.float32, F64))
    terms = single.terms(rows(q).float(), rows(v).float()), double.terms(rows(q), rows(v))
    mass_error = relative(*(t.mass_matrix.permute(2, 0, 1).double().numpy() for t in terms))
    step_error = ((single.step(x.float(), rows(q).float()).double() - double.step(x, rows(q))).abs() / (1 + x.abs())).max().item()
    print("mass matrix", mass_error)
    print("step", step_error)
    assert mass_error <= 1e-5 and step_error <= 1e-4, (mass_error, step_error)


# --- MuJoCo as the model ----------------------------------------------------------------------------------------------


def plain_steps(mj: mujoco.MjModel, x: torch.Tensor, u: torch.Tensor, substeps: int, commanded: list[int]) -> torch.Tensor:
    """Return the states a plain mj_step loop gives, (H+1, nx, N)."""
    mj = copy.copy(mj)
    mj.opt.disableflags |= mujoco.mjtDisableBit.mjDSBL_ACTUATION
    out = []
    for k in range(x.shape[1]):
        data = mujoco.MjData(mj)
        data.qpos[:], data.qvel[:] = x[: mj.nq, k].numpy(), x[mj.nq :, k].numpy()
        states = [x[:, k].numpy()]
        for command in u[:, :, k].numpy():
            data.qfrc_applied[commanded] = command
            mujoco.mj_step(mj, data, substeps)
            states.append(np.concatenate((data.qpos, data.qvel)))
        out.append(states)
    return torch.from_numpy(np.array(out)).permute(1, 2, 0)


def simulated(name: str, samples: int = 5) -> tuple[mujoco.MjModel, RigidTree, torch.Tensor, torch.Tensor]:
    """Return a model with limits, contacts and friction as it comes, states and torques over eight steps."""
    model = load_model(name)
    low, high = np.array(model.robot.limits.position_lower), np.array(model.robot.limits.position_upper)
    rng = np.random.default_rng(3)
    q = np.array(model.robot.home) + 0.1 * rng.uniform(-1, 1, (samples, model.tree.n)) * np.minimum(high - low, 2)
    x = torch.cat((rows(q), rows(rng.normal(size=q.shape))))
    u = torch.from_numpy(rng.normal(size=(8, model.robot.nu, samples)))
    return model.mj, model.tree, x, u


BATCHED = [False, pytest.param(True, marks=pytest.mark.skipif(Batch is None, reason="this MuJoCo has no mujoco.batch"))]


@pytest.mark.parametrize("name", ["panda", "ur5e", "arm2", "dm_control:cartpole-swingup", "dm_control:jaco_arm"])
@pytest.mark.parametrize("batched", BATCHED)
def test_the_simulator_is_a_plain_loop_of_steps(name: str, batched: bool) -> None:
    mj, tree, x, u = simulated(name)
    commanded = list(range(u.shape[1]))
    sim = SimulatorDynamics(mj, 4 * mj.opt.timestep, commanded=commanded, threads=2, batched=batched)
    found, expected = sim.rollout(x, u), plain_steps(mj, x, u, 4, commanded)
    error = (found - expected).abs().max()
    assert found.shape == (9, 2 * tree.n, 5) and error <= 1e-12 * expected.abs().max(), error
    assert torch.equal(sim.step(x, u[0]), found[1])
    again = sim.rollout(x, u)
    assert torch.equal(found, again), "a rollout leaves nothing behind"


def test_the_simulator_keeps_the_callers_model_and_type() -> None:
    mj, _, x, u = simulated("panda")
    before = mj.jnt_stiffness.copy(), mj.dof_damping.copy(), mj.opt.gravity.copy(), mj.opt.disableflags
    sim = SimulatorDynamics(mj, 0.01, Impedance((600.0,) * 7, (50.0,) * 7), gravity_compensation=True, threads=1)
    assert sim.rollout(x.float(), u.float()).dtype == torch.float32
    after = mj.jnt_stiffness, mj.dof_damping, mj.opt.gravity, mj.opt.disableflags
    assert all(np.array_equal(a, b) for a, b in zip(before, after))


@pytest.mark.skipif(Batch is None, reason="this MuJoCo has no mujoco.batch")
@pytest.mark.parametrize("field", ["body_mass", "dof_damping", "dof_frictionloss", "body_inertia", "opt.gravity"])
def test_fields_change_their_sample_only_and_exactly(field: str) -> None:
    mj, _, x, u = simulated("panda")
    x[7:] *= 0.1  # slow enough for friction to stick in some joints, whose softness the compiler derives
    value = mj.opt.gravity if field == "opt.gravity" else getattr(mj, field)
    values = np.repeat(value[None], 5, 0)
    values[2] *= 1.5
    options = {"threads": 1, "batched": True}
    plain = SimulatorDynamics(mj, 0.01, **options).rollout(x, u)
    found = SimulatorDynamics(mj, 0.01, fields={field: values}, **options).rollout(x, u)
    others = [0, 1, 3, 4]
    assert torch.equal(found[:, :, others], plain[:, :, others])
    changed = copy.copy(mj)
    (changed.opt.gravity if field == "opt.gravity" else getattr(changed, field))[:] = values[2]
    mujoco.mj_setConst(changed, mujoco.MjData(changed))  # what the compiler would have derived
    expected = plain_steps(changed, x[:, 2:3], u[:, :, 2:3], 10, list(range(7)))
    error, effect = (found[:, :, 2:3] - expected).abs().max(), (plain[:, :, 2:3] - expected).abs().max()
    assert error <= 1e-12 and effect > 1e-6, (error, effect)


@pytest.mark.parametrize("name", ["panda", "ur10e", "crowded"])
@pytest.mark.parametrize("compensated", [False, True])
def test_both_models_servo_alike_as_the_step_shrinks(name: str, compensated: bool) -> None:
    mj, tree = model_of(name)
    q, v, _ = random_states(tree, 3)
    x = torch.cat((rows(q) / 3, rows(v) / 3))
    servo = Impedance(tuple(np.linspace(200, 50, tree.n)), tuple(np.linspace(30, 10, tree.n)))
    errors = []
    for h in (2e-3, 1e-3, 5e-4):
        mj.opt.timestep = h
        u = (x[: tree.n] + 0.2).expand(round(0.1 / h), -1, -1)
        simulator = SimulatorDynamics(mj, h, servo, gravity_compensation=compensated, threads=1)
        analytic = exact(tree, h, actuation=servo, gravity_compensation=compensated)
        errors.append((simulator.rollout(x, u)[-1] - analytic.rollout(x, u)[-1]).abs().max().item())
    orders = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert errors[-1] <= 0.02 and all(abs(order - 1) < 0.25 for order in orders), (errors, orders)


def test_both_models_of_a_torque_arm_are_one() -> None:
    mj, tree = model_of("ur10e")
    q, v, _ = random_states(tree, 3)
    x, u = torch.cat((rows(q), rows(v))), 200 * torch.randn(20, 6, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    limit = (100.0,) * 6
    simulator = SimulatorDynamics(mj, 0.001, effort_limit=limit, threads=1)
    error = (simulator.rollout(x, u) - exact(tree, 0.001, effort_limit=limit).rollout(x, u)).abs().max()
    assert error <= 1e-11, error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dt": 0.0015}, r"dynamics\.dt: expected a multiple of the simulator's step 0\.001 s, found 0\.0015 s"),
        ({"dt": 1e-4}, r"dynamics\.dt: expected a multiple"),
        ({"fields": {"body_mass": np.ones((1, 3))}, "batched": False}, r"dynamics\.fields: fields for each sample need mujoco"),
        ({"commanded": [0], "gravity_compensation": True}, "gravity compensation needs every joint actuated"),
    ],
)
def test_the_simulator_refuses_what_it_cannot_do(options: dict, says: str) -> None:
    mj, _ = model_of("arm2")
    with pytest.raises(ModelError, match=says):
        SimulatorDynamics(mj, **{"dt": 0.01, **options})


# --- loading ----------------------------------------------------------------------------------------------------------


def test_actuation_comes_from_the_robot() -> None:
    panda, arm2 = (load_model(name).robot for name in ("panda", "arm2"))
    assert actuation_of(arm2) == Torque()
    assert actuation_of(panda) == Impedance(panda.control.stiffness, panda.control.damping)


@pytest.mark.parametrize("kind", ["free", "ball"])
def test_free_and_ball_joints_are_refused_by_name(kind: str) -> None:
    xml = f'<mujoco><worldbody><body><joint name="loose" type="{kind}"/><geom size="0.1"/></body></worldbody></mujoco>'
    mj = mujoco.MjModel.from_xml_string(xml)
    with pytest.raises(ModelError, match=r"m\.xml: loose: only hinge and slide joints"):
        tree_from_mujoco(mj, "m.xml")
    with pytest.raises(ModelError, match="free and ball joints"):
        SimulatorDynamics(mj, mj.opt.timestep)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('<joint name="elbow"', '<joint name="elbow" damping="0.1 0.2"', "polynomial damping"),
        ('<body name="arm"', '<body name="arm" gravcomp="1"', "gravcomp belongs in"),
    ],
)
def test_what_the_analytic_model_leaves_out_is_refused(old: str, new: str, says: str) -> None:
    text = CROWDED.replace(' ref="0.4" damping="0.1"', ' ref="0.4"') if "damping" in new else CROWDED
    mj = mujoco.MjModel.from_xml_string(text.replace(old, new))
    with pytest.raises(ModelError, match=says):
        tree_from_mujoco(mj, "m.xml")


def test_an_impossible_inertia_is_refused_by_joint() -> None:
    _, tree = model_of("panda")
    inertia = tree.inertia.copy()
    inertia[3] = np.diag([0.01, 0.01, 0.03])
    with pytest.raises(ModelError, match=r"joint4: inertia violates the triangle inequality"):
        exact(replace(tree, inertia=inertia))


FAULTS = {
    "mass": lambda tree, i: replace(tree, mass=tree.mass * np.where(np.arange(tree.n) == i, 1 + 1e-3, 1)),
    "com": lambda tree, i: replace(tree, com=tree.com + 1e-6 * (np.arange(tree.n) == i)[:, None]),
    "inertia": lambda tree, i: replace(tree, inertia=tree.inertia * np.where(np.arange(tree.n) == i, 1 + 1e-5, 1)[:, None, None]),
    "armature": lambda tree, i: replace(tree, armature=tree.armature + 1e-6 * (np.arange(tree.n) == i)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("i", range(7))
def test_the_self_check_finds_a_wrong_parameter_and_names_a_joint_that_feels_it(fault: str, i: int) -> None:
    mj, tree = model_of("panda")
    assert self_check(mj, tree, "panda.xml") <= 1e-9
    with pytest.raises(ModelError, match=r"panda\.xml: joint\d: MuJoCo and Pinocchio differ in (M\(q\)|bias|gravity) by") as caught:
        self_check(mj, FAULTS[fault](tree, i), "panda.xml")
    assert caught.value.key in tree.joints[: i + 1], caught.value.key


def test_the_self_check_finds_wrong_kinematics() -> None:
    mj, tree = model_of("panda")
    changes = {"fixed_position": 1e-7, "reference": 1e-6, "gravity": 1e-6}
    for field, change in changes.items():
        with pytest.raises(ModelError, match="MuJoCo and Pinocchio differ"):
            self_check(mj, replace(tree, **{field: getattr(tree, field) + change}), "panda.xml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("<mujoco><worldbody><body><joint/></body></worldbody></mujoco>", "does not compile"),
        ("<mujoco><worldbody>", "does not compile"),
        ("<mujoco><worldbody><bdy/></worldbody></mujoco>", "does not compile"),
        ("not xml", "does not compile"),
    ],
)
def test_a_model_that_does_not_compile_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "m.xml"
    path.write_text(content)
    with pytest.raises(ModelError) as caught:
        compile_model(str(path))
    assert str(caught.value).startswith(f"{path}: {says}") and "\n" not in str(caught.value), str(caught.value)


def test_a_missing_model_is_refused() -> None:
    with pytest.raises(SpecError, match=r"^nowhere/m\.xml: no such file$"):
        load_model("nowhere/m.xml")


@pytest.mark.parametrize("name", ["dm_control:cartpole-swingupp", "dm_control:nothing", "dm_control:"])
def test_an_unknown_dm_control_model_lists_the_known(name: str) -> None:
    with pytest.raises(SpecError, match=r"unknown dm_control model.*known: .*cartpole-swingup"):
        load_model(name)


def test_a_robot_whose_model_differs_is_refused(tmp_path: Path) -> None:
    source = Path(load_model("arm2").robot.path)
    (tmp_path / "arm2.xml").write_text((source.parent / "arm2.xml").read_text())
    for old, new, says in (
        ("joints: [shoulder, elbow]", "joints: [elbow, shoulder]", r"robot\.yaml: joints: expected the model's joints"),
        ("tool: tcp", "tool: tip", r"robot\.yaml: tool: the model has no site 'tip'; did you mean 'tcp'\?"),
    ):
        (tmp_path / "robot.yaml").write_text(source.read_text().replace(old, new))
        with pytest.raises(ModelError, match=says):
            load_model(str(tmp_path / "robot.yaml"))


def test_a_urdf_is_the_same_arm(tmp_path: Path) -> None:
    joint = (
        '<joint name="{0}" type="revolute"><parent link="{1}"/><child link="{2}"/><origin xyz="0 0 {3}"/><axis xyz="0 1 0"/>'
        '<limit lower="-3" upper="3" effort="{4}" velocity="9"/></joint>'
    )
    link = (
        '<link name="{0}"><inertial><origin xyz="0 0 {1}"/><mass value="{2}"/>'
        '<inertia ixx="{3}" iyy="{3}" izz="{4}" ixy="0" ixz="0" iyz="0"/></inertial></link>'
    )
    parts = [
        '<link name="base"/>',
        link.format("upper", -0.25, 2, 2 * 0.5**2 / 12, 0.0005),
        link.format("lower", -0.2, 1.2, 1.2 * 0.4**2 / 12, 0.0002),
        joint.format("shoulder", "base", "upper", 1.2, 7),
        joint.format("elbow", "upper", "lower", -0.5, 2),
    ]
    path = tmp_path / "arm.urdf"
    path.write_text(f'<robot name="arm">{"".join(parts)}</robot>')
    model = load_model(str(path))
    _, tree = model_of("arm2")
    tree = replace(tree, armature=np.zeros(2), damping=np.zeros(2))
    q, v, tau = random_states(tree, 10)
    found, expected = (exact(t).forward_dynamics(rows(q), rows(v), rows(tau)).T.numpy() for t in (model.tree, tree))
    error = relative(found, expected)
    assert model.robot.joints == ("shoulder", "elbow") and error <= 1e-12, error


def test_welded_bodies_become_part_of_their_link() -> None:
    mj, tree = model_of("crowded")
    moving = mj.body("foot").mass[0]
    assert tree.n == mj.njnt and abs(tree.mass.sum() - (mj.body_mass.sum() - moving)) <= 1e-12
    assert tree.frames["foot"].link == -1 and tree.frames["tail"].link == tree.joints.index("elbow")

"""Every robot of the catalogue: its numbers agree with its model, are physically possible and match what is published."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from functools import cache
from pathlib import Path

import mujoco
import numpy as np
import pytest

from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics

FOLDER = Path(__file__).parents[1] / "robots"
ALL = sorted(path.parent.name for path in FOLDER.glob("*/robot.yaml"))
CARRIED = {"cartpole_pets": 1}  # the tool's link, where nothing drives it
OWN = [name for name in ALL if list((FOLDER / name).glob("*.xml"))]  # with a model file in the catalogue


@cache
def robot(name: str) -> Model:
    return load_model(name)


def test_the_arms_are_there() -> None:
    assert {"arm2", "panda", "ur10e", "ur5e"} <= set(OWN), OWN


@pytest.mark.parametrize("name", ALL)
def test_the_name_is_the_folders(name: str) -> None:
    assert robot(name).robot.name == name and robot(name).robot.description


@pytest.mark.parametrize("name", ALL)
def test_engines_agree(name: str) -> None:
    print("error", robot(name).error)
    assert robot(name).error <= 1e-9, robot(name).error


@pytest.mark.parametrize("name", OWN)
def test_position_limits_are_the_models(name: str) -> None:
    model = robot(name)
    limits = np.column_stack((model.robot.limits.position_lower, model.robot.limits.position_upper))
    assert model.mj.jnt_limited.all()
    error = np.abs(model.mj.jnt_range - limits).max()
    assert error == 0, error


@pytest.mark.parametrize("name", OWN)
def test_effort_limits_are_the_models(name: str) -> None:
    model = robot(name)
    mj = model.mj
    assert mj.nu == model.robot.nu and mj.actuator_ctrllimited.all()
    assert [mj.joint(j).name for j in mj.actuator_trnid[:, 0]] == list(model.robot.driven)
    effort = np.array(model.robot.limits.effort)
    error = np.abs(mj.actuator_ctrlrange * mj.actuator_gear[:, :1] - np.column_stack((-effort, effort))).max()
    assert error == 0, error


@pytest.mark.parametrize("name", ALL)
def test_home_is_within_the_limits(name: str) -> None:
    limits, home = robot(name).robot.limits, np.array(robot(name).robot.home)
    margin = min((home - limits.position_lower).min(), (limits.position_upper - home).min())
    assert margin > 0.05, margin


@pytest.mark.parametrize("name", OWN)
def test_the_home_keyframe_is_home(name: str) -> None:
    model = robot(name)
    assert np.array_equal(model.mj.key("home").qpos, model.robot.home)


@pytest.mark.parametrize("name", ALL)
def test_the_arm_can_hold_itself_at_home(name: str) -> None:
    model = robot(name)
    gravity = ReferenceDynamics(model.tree).gravity(np.array(model.robot.home))[model.robot.command_index]
    load = (np.abs(gravity) / model.robot.limits.effort).max()
    assert load < 0.9, load


@pytest.mark.parametrize("name", ALL)
def test_links_are_possible_bodies(name: str) -> None:
    tree = robot(name).tree
    for link, (joint, mass, inertia) in enumerate(zip(tree.joints, tree.mass, tree.inertia)):
        if mass == 0 and not inertia.any() and link in tree.parent:  # of several joints of one body the last one carries it
            continue
        assert mass > 0, (joint, mass)
        assert np.abs(inertia - inertia.T).max() <= 1e-12, joint
        moments = np.linalg.eigvalsh(inertia)
        assert moments[0] > 0 and moments[2] <= (moments[0] + moments[1]) * (1 + 1e-9), (joint, moments)
    assert min(tree.armature.min(), tree.damping.min(), tree.friction.min(), tree.stiffness.min()) >= 0


@pytest.mark.parametrize("name", ALL)
def test_the_mass_matrix_is_positive_definite(name: str) -> None:
    model, rng = robot(name), np.random.default_rng(0)
    reference = ReferenceDynamics(model.tree)
    smallest = min(np.linalg.eigvalsh(reference.mass_matrix(rng.uniform(-3, 3, model.tree.n)))[0] for _ in range(20))
    assert smallest > 1e-6, smallest


@pytest.mark.parametrize("name", OWN)
def test_every_moving_body_has_its_own_inertial(name: str) -> None:
    (path,) = (FOLDER / name).glob("*.xml")
    root = ET.parse(path).getroot()
    compiler = root.find("compiler")
    assert compiler is not None and compiler.get("inertiafromgeom") == "false" and compiler.get("balanceinertia") == "false"
    mj = robot(name).mj
    for body in root.iter("body"):
        moving = mj.body_weldid[mj.body(body.get("name")).id] != 0
        assert not moving or body.find("inertial") is not None, body.get("name")
    assert all(float(geom.get("mass", "0")) == 0 for geom in root.iter("geom"))


@pytest.mark.parametrize("name", ALL)
def test_the_tool_is_a_frame_that_moves(name: str) -> None:
    model = robot(name)
    assert model.tree.frames[model.robot.tool].link >= 0


@pytest.mark.parametrize("name", OWN)
def test_the_tool_is_a_site_on_the_last_driven_link(name: str) -> None:
    model = robot(name)
    assert mujoco.mj_name2id(model.mj, mujoco.mjtObj.mjOBJ_SITE, model.robot.tool) >= 0
    assert model.tree.frames[model.robot.tool].link == CARRIED.get(name, max(model.robot.command_index))


@pytest.mark.parametrize("name", OWN)
def test_every_driven_link_has_a_collision_capsule(name: str) -> None:
    model = robot(name)
    assert {capsule.link for capsule in model.tree.capsules} == set(model.robot.command_index)


@pytest.mark.parametrize(
    ("name", "mass"),
    [
        ("panda", 4.970684 + 0.646926 + 3.228604 + 3.587895 + 1.225946 + 1.666555 + 0.735522 + 0.73),
        ("ur10e", 7.369 + 13.051 + 3.989 + 2.1 + 1.98 + 0.615),
        ("ur5e", 3.761 + 8.058 + 2.846 + 1.37 + 1.3 + 0.365),
        ("arm2", 2.0 + 1.2),
    ],
)
def test_moving_masses_are_the_published_ones(name: str, mass: float) -> None:
    error = abs(robot(name).tree.mass.sum() - mass)
    assert error <= 1e-12 * mass, error


PUBLISHED = {  # efforts [N·m], speeds [rad/s]
    "panda": ((87, 87, 87, 87, 12, 12, 12), (2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61)),
    "ur10e": ((330, 330, 150, 54, 54, 54), np.radians((120, 120, 180, 180, 180, 180))),
    "ur5e": ((150, 150, 150, 28, 28, 28), np.radians((180,) * 6)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_efforts_and_speeds_are_the_published_ones(name: str) -> None:
    efforts, speeds = PUBLISHED[name]
    limits = robot(name).robot.limits
    assert np.allclose(limits.effort, efforts, rtol=0, atol=1e-12) and np.allclose(limits.velocity, speeds, rtol=0, atol=1e-12)


def test_the_pandas_joint_ranges_are_the_published_ones() -> None:
    limits = robot("panda").robot.limits
    assert limits.position_lower == (-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973)
    assert limits.position_upper == (2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973)


# --- Denavit-Hartenberg -----------------------------------------------------------------------------------------------


def rotation(axis: str, angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    out = np.eye(4)
    i, j = {"x": (1, 2), "z": (0, 1)}[axis]
    out[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return out


def move(x: float = 0.0, z: float = 0.0) -> np.ndarray:
    out = np.eye(4)
    out[:3, 3] = x, 0, z
    return out


def panda_tool(q: np.ndarray) -> np.ndarray:
    """Craig's convention: Rot_x(alpha_i-1) Trans_x(a_i-1) Rot_z(q_i) Trans_z(d_i), then flange and hand."""
    a = (0, 0, 0, 0.0825, -0.0825, 0, 0.088)
    d = (0.333, 0, 0.316, 0, 0.384, 0, 0)
    alpha = np.array((0, -1, 1, 1, -1, 1, 1)) * np.pi / 2
    pose = np.eye(4)
    for i in range(7):
        pose = pose @ rotation("x", alpha[i]) @ move(x=a[i]) @ rotation("z", q[i]) @ move(z=d[i])
    return pose @ move(z=0.107) @ rotation("z", -np.pi / 4) @ move(z=0.1034)


def ur_tool(a: tuple, d: tuple, q: np.ndarray) -> np.ndarray:
    """The standard convention: Rot_z(q_i) Trans_z(d_i) Trans_x(a_i) Rot_x(alpha_i), in a world turned by pi about z."""
    alpha = np.array((1, 0, 0, 1, -1, 0)) * np.pi / 2
    pose = rotation("z", np.pi)
    for i in range(6):
        pose = pose @ rotation("z", q[i]) @ move(x=a[i], z=d[i]) @ rotation("x", alpha[i])
    return pose


TOOLS = {
    "panda": panda_tool,
    "ur10e": lambda q: ur_tool((0, -0.6127, -0.57155, 0, 0, 0), (0.1807, 0, 0, 0.17415, 0.11985, 0.11655), q),
    "ur5e": lambda q: ur_tool((0, -0.425, -0.3922, 0, 0, 0), (0.1625, 0, 0, 0.1333, 0.0997, 0.0996), q),
}


@pytest.mark.parametrize("name", TOOLS)
def test_the_tool_is_where_the_published_dh_parameters_put_it(name: str) -> None:
    model, rng = robot(name), np.random.default_rng(0)
    data, worst = mujoco.MjData(model.mj), 0.0
    for q in [np.zeros(model.tree.n), np.array(model.robot.home), *rng.uniform(-3, 3, (30, model.tree.n))]:
        data.qpos[:] = q
        mujoco.mj_kinematics(model.mj, data)
        pose, site = TOOLS[name](q), data.site(model.robot.tool)
        worst = max(worst, np.abs(pose[:3, 3] - site.xpos).max(), np.abs(pose[:3, :3] - site.xmat.reshape(3, 3)).max())
    print("error", worst)
    assert worst <= 1e-9, worst


@pytest.mark.parametrize(("name", "reach"), [("ur10e", 1.3), ("ur5e", 0.85)])
def test_the_reach_is_about_the_published_one(name: str, reach: float) -> None:
    """The vendor gives the reach of the wrist: upper arm, forearm and wrist 2 stretched out."""
    model, data = robot(name), mujoco.MjData(robot(name).mj)
    mujoco.mj_kinematics(model.mj, data)
    wrist, shoulder = data.body("wrist_2_link").xpos, data.body("shoulder_link").xpos
    assert abs(np.hypot(*(wrist - shoulder)[:2]) / reach - 1) < 0.08, np.hypot(*(wrist - shoulder)[:2])


def test_arm2_cannot_hold_itself_out() -> None:
    model = robot("arm2")
    gravity = ReferenceDynamics(model.tree).gravity(np.array([np.pi / 2, 0.0]))
    assert np.allclose(gravity, (13.1454, 2.3544), atol=1e-12), gravity
    assert gravity[0] > model.robot.limits.effort[0]

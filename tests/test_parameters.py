"""Calibrated parameters: what a file may hold, what it does to a model, a run, a simulation and an exported model."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path

import mujoco
import numpy as np
import pinocchio as pin
import pytest
import yaml

import mbctrl.base.files
from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import ModelError, SpecError
from mbctrl.base.find import find, names
from mbctrl.base.logs import read_log
from mbctrl.base.parameters import Estimate, FittedParameters, JointParameters, load_parameters, write_parameters
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model, load_truth
from mbctrl.cli.main import main
from mbctrl.cli.run import with_overrides
from mbctrl.dynamics.load import Model, compile_model, load_model
from mbctrl.dynamics.parameters import parameters_of
from mbctrl.dynamics.reference import ReferenceDynamics, mujoco_mass_matrix
from mbctrl.dynamics.write import export_mjcf, export_urdf
from mbctrl.runtime.clock import LockstepClock
from mbctrl.runtime.driver import JointCommand
from mbctrl.sim.driver import SimDriver

ALL = sorted(path.parent.name for path in (Path(__file__).parents[1] / "robots").glob("*/robot.yaml"))

# Welded bodies, frames, Euler angles, default classes, two joints in one body, an offset axis, a mesh, masses from geoms.
WELDED = """<mujoco model="welded">
<compiler angle="degree" eulerseq="xyz" inertiafromgeom="true" meshdir="parts"/>
<default><joint armature="0.123456789012" damping="0.3"/><default class="slow"><joint damping="1.23456789012"/></default></default>
<asset><mesh name="tetra" file="tetra.obj"/></asset>
<worldbody>
  <body name="post"><geom type="box" size="0.1 0.1 0.2"/>
    <frame pos="0.1 0 0.3333333333333" euler="10 20 33.33333333333">
      <body pos="0.01 0.02 0.123456789012" euler="5 0 0">
        <frame pos="0.01 0.02 0.0333333333333" euler="0 10 0"><joint name="a" axis="1 2 3" range="-100 100"/></frame>
        <joint name="b" axis="0 1 0" frictionloss="0.7" range="-100 100"/>
        <geom type="capsule" size="0.03" fromto="0 0 0 0.1 0.05 0.4"/>
        <body name="plate" pos="0 0.1 0.2" euler="0 45 0"><geom type="box" size="0.1 0.02 0.05"/>
          <body name="knob" pos="0.1 0 0"><geom type="sphere" size="0.03"/></body>
          <body name="fore" pos="0 0 0.3333333333333" quat="0.9 0.1 0.2 0.3">
            <joint name="c" class="slow" type="slide" axis="0 0.6 0.8" ref="0.1" stiffness="3" springref="2" range="-1 1"/>
            <geom type="mesh" mesh="tetra"/>
            <body name="tool" pos="0.1 0.1 0.1"><geom type="ellipsoid" size="0.02 0.03 0.04"/>
              <frame euler="0 33.33333333333 0"><site name="tcp" pos="0 0 0.1111111111111" euler="1 2 3"/></frame></body>
          </body>
        </body>
      </body>
    </frame>
  </body>
</worldbody>
<keyframe><key name="home" qpos="0.1111111111111 0.2 0.1"/></keyframe></mujoco>"""
TETRA = "v 0 0 0\nv 0.2 0 0\nv 0 0.15 0\nv 0 0 0.3\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"

URDF = """<robot name="two"><link name="base"/>
<link name="upper"><inertial><origin xyz="0 0.03 0.2" rpy="0.3 0.2 0.1"/><mass value="2"/>
<inertia ixx="0.1" iyy="0.12" izz="0.03" ixy="0.01" ixz="0" iyz="0"/></inertial></link>
<link name="fore"><inertial><origin xyz="0 0 0.1"/><mass value="1"/>
<inertia ixx="0.05" iyy="0.05" izz="0.01" ixy="0" ixz="0" iyz="0"/></inertial></link>
<link name="tool"><inertial><origin xyz="0.1 0 0.1" rpy="0 0.4 0"/><mass value="0.5"/>
<inertia ixx="0.005" iyy="0.005" izz="0.001" ixy="0" ixz="0" iyz="0"/></inertial></link>
<link name="tip"><inertial><mass value="0.1"/>
<inertia ixx="0.001" iyy="0.001" izz="0.001" ixy="0" ixz="0" iyz="0"/></inertial></link>
<link name="rod"><inertial><origin xyz="0.01 0.05 0"/><mass value="0.7"/>
<inertia ixx="0.005" iyy="0.005" izz="0.001" ixy="0" ixz="0" iyz="0"/></inertial>
<visual><geometry><mesh filename="rod.obj"/></geometry></visual></link>
<joint name="j1" type="revolute"><origin xyz="0.1 0.2 0.3" rpy="0.5 0.4 0.3"/><parent link="base"/><child link="upper"/>
<axis xyz="0 0.6 0.8"/><limit lower="-2" upper="2" effort="30" velocity="2"/><dynamics damping="0.5"/></joint>
<joint name="j2" type="revolute"><origin xyz="0 0 0.4"/><parent link="upper"/><child link="fore"/><axis xyz="0 1 0"/>
<limit lower="-2" upper="2" effort="10" velocity="2"/></joint>
<joint name="weld" type="fixed"><origin xyz="0 0.1 0.4" rpy="0 0.7 0"/><parent link="fore"/><child link="tool"/></joint>
<joint name="weld2" type="fixed"><origin xyz="0 0.1 0.4" rpy="0 0.7 0"/><parent link="tool"/><child link="tip"/></joint>
<joint name="j3" type="prismatic"><origin xyz="0 0 0.4"/><parent link="tool"/><child link="rod"/><axis xyz="1 0 0"/>
<limit lower="-2" upper="2" effort="10" velocity="2"/></joint></robot>"""


@pytest.fixture
def welded(tmp_path: Path) -> str:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "tetra.obj").write_text(TETRA)
    (tmp_path / "welded.xml").write_text(WELDED)
    return str(tmp_path / "welded.xml")


@pytest.fixture
def urdf(tmp_path: Path) -> str:
    (tmp_path / "rod.obj").write_text(TETRA)
    (tmp_path / "two.urdf").write_text(URDF)
    return str(tmp_path / "two.urdf")


@cache
def robot(name: str) -> Model:
    return load_model(name)


def own(model: Model) -> FittedParameters:
    return parameters_of(model.mj, model.tree, model.robot.name)


def changed(parameters: FittedParameters, seed: int = 0) -> FittedParameters:
    """Other numbers for everything, each link a random distribution of mass."""
    rng, joints = np.random.default_rng(seed), {}
    for name, joint in parameters.joints.items():
        values = {"armature": rng.uniform(0, 1), "damping": rng.uniform(0, 2), "friction": rng.uniform(0, 3)}
        if joint.mass is not None:
            points = rng.normal(size=(6, 3)) * 0.1
            second = np.trace(points.T @ points) * np.eye(3) - points.T @ points
            values |= {"mass": rng.uniform(0.5, 3), "com": tuple(rng.normal(size=3) * 0.1)}
            values["inertia"] = tuple(second[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]])
        joints[name] = JointParameters(**values)
    return FittedParameters(robot=parameters.robot, joints=joints)


def dynamics(model: Model, seed: int = 3) -> list[np.ndarray]:
    """M(q), bias and gravity of both engines at random states."""
    reference, data, rng, out = ReferenceDynamics(model.tree), mujoco.MjData(model.mj), np.random.default_rng(seed), []
    for _ in range(5):
        q, v = rng.uniform(-2, 2, (2, model.tree.n))
        out += [reference.mass_matrix(q), reference.bias(q, v), reference.gravity(q), mujoco_mass_matrix(model.mj, data, q)]
        data.qvel[:] = v
        mujoco.mj_forward(model.mj, data)
        out.append(data.qfrc_bias.copy())
    return out


def difference(a: Model, b: Model) -> float:
    """The largest relative difference of two models' dynamics, passive forces included."""
    pairs = [*zip(dynamics(a), dynamics(b)), *((getattr(a.tree, key), getattr(b.tree, key)) for key in ("damping", "friction"))]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-6)) for x, y in pairs)


def written(path: Path, parameters: FittedParameters) -> FittedParameters:
    write_parameters(path, parameters)
    return load_parameters(path)


# --- the file ---------------------------------------------------------------------------------------------------------

GOOD = """robot: arm2
joints:
  shoulder: {mass: 2.0, com: [0, 0, -0.25], inertia: [0.04, 0.04, 0.0005, 0, 0, 0], damping: 1e-2}
  elbow: {friction: 0}
friction_model: {stribeck: [0.1, 0.2]}
estimates:
  - {name: shoulder.mass, unit: kg, value: 2.0, standard_error: 0.1, low: 1.8, high: 2.2, prior: 1.9, status: free}
provenance: {date: 2025-01-31, logs: {a.csv: "12e4567"}, gap: .inf}
"""

BAD = {
    "unknown key": ("damping: 1e-2", "dampign: 1e-2", ["joints.shoulder.dampign", "did you mean 'damping'"]),
    "no robot": ("robot: arm2\n", "", ["robot", "missing"]),
    "no joints": ("joints:\n", "joint:\n", ["joints"]),
    "text": ("mass: 2.0", "mass: heavy", ["joints.shoulder.mass", "heavy"]),
    "nan": ("mass: 2.0", "mass: .nan", ["joints.shoulder.mass", "finite", "nan"]),
    "no mass": ("mass: 2.0", "mass: 0.0", ["joints.shoulder.mass", "greater than 0", "0.0"]),
    "negative mass": ("mass: 2.0", "mass: -2.0", ["joints.shoulder.mass", "-2.0"]),
    "negative damping": ("damping: 1e-2", "damping: -1e-2", ["joints.shoulder.damping", "-0.01"]),
    "negative friction": ("friction: 0", "friction: -1", ["joints.elbow.friction", "-1"]),
    "negative armature": ("friction: 0", "armature: -1", ["joints.elbow.armature", "-1"]),
    "short com": ("[0, 0, -0.25]", "[0, 0]", ["joints.shoulder.com"]),
    "not definite": ("0.0005, 0, 0, 0]", "0.0005, 0.05, 0, 0]", ["joints.shoulder.inertia", "positive definite", "-0.01"]),
    "triangle": ("0.04, 0.04, 0.0005", "0.04, 0.01, 0.0005", ["joints.shoulder.inertia", "above the sum", "0.04"]),
    "turned triangle": ("0.0005, 0, 0, 0]", "0.0005, 0.03, 0, 0]", ["joints.shoulder.inertia", "above the sum", "0.07"]),
    "status": ("status: free", "status: loose", ["estimates[0].status", "loose"]),
    "interval": ("low: 1.8", "low: 2.8", ["estimates[0]", "low <= high"]),
    "negative error": ("standard_error: 0.1", "standard_error: -0.1", ["estimates[0].standard_error", "-0.1"]),
    "path": ("robot: arm2\n", "robot: arm2\npath: x\n", ["path", "unknown key"]),
}


def test_a_good_file_loads(tmp_path: Path) -> None:
    path = tmp_path / "a_fitted.yaml"
    path.write_text(GOOD)
    found = load_parameters(path)
    assert found.joints["shoulder"].mass == 2.0 and found.joints["elbow"].mass is None and found.path == path
    again = written(tmp_path / "b_fitted.yaml", found)
    assert (again.joints, again.estimates, again.friction_model) == (found.joints, found.estimates, found.friction_model)
    assert again.provenance == {"date": "2025-01-31", "logs": {"a.csv": "12e4567"}, "gap": float("inf")}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    old, new, words = BAD[case]
    assert GOOD.count(old) == 1
    path = tmp_path / "bad_fitted.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(SpecError) as caught:
        load_parameters(path)
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in ["bad_fitted.yaml", *words]), text


def test_a_flat_body_is_possible() -> None:
    assert JointParameters(inertia=(0.01, 0.02, 0.03, 0, 0, 0)).inertia[2] == 0.03


def test_estimates_hold_what_a_fit_says(tmp_path: Path) -> None:
    entry = Estimate(name="elbow.friction", unit="N·m", value=1.5, standard_error=0.1, low=1.3, high=1.7, status="unidentified")
    made = FittedParameters(robot="arm2", joints={}, estimates=(entry,), provenance={"recipe": "arm2", "iterations": 3})
    found = written(tmp_path / "x_fitted.yaml", made)
    assert found.estimates == (entry,) and found.provenance == made.provenance and found.joints == {}
    text = (tmp_path / "x_fitted.yaml").read_text()
    assert "[N·m·s/rad]" in text and text.count("\n") < 12, text


def test_writing_is_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first, second = tmp_path / "x_fitted.yaml", own(robot("arm2")), changed(own(robot("arm2")))
    write_parameters(path, first)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for place in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(mbctrl.base.files.os, place, full)
            with pytest.raises(SpecError, match="x_fitted.yaml: cannot be written: No space left"):
                write_parameters(path, second)
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
    assert written(path, second).joints == second.joints
    with pytest.raises(SpecError, match="cannot be written"):
        write_parameters(tmp_path / "nowhere" / "x.yaml", first)


def test_files_are_found_by_name_and_told_from_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "calibration").mkdir()
    write_parameters(tmp_path / "calibration" / "mine_fitted.yaml", own(robot("arm2")))
    (tmp_path / "calibration" / "mine.yaml").write_text("robot: arm2\n")
    monkeypatch.setenv("MBCTRL_PATH", str(tmp_path))
    assert load_parameters("mine_fitted").robot == "arm2"
    assert "mine_fitted" in names("parameters") and "mine" not in names("parameters")
    assert "mine" in names("calibration") and "mine_fitted" not in names("calibration")
    assert find("calibration", "mine").name == "mine.yaml"
    with pytest.raises(SpecError, match="unknown parameter file 'mine'; did you mean 'mine_fitted'"):
        load_parameters("mine")


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_models_own_values_change_nothing(name: str, tmp_path: Path) -> None:
    model = robot(name)
    again = load_model(name, written(tmp_path / "x_fitted.yaml", own(model)))
    error = difference(model, again)
    assert error <= 1e-12, error
    assert again.parameters is not None and again.error <= 1e-9


@pytest.mark.parametrize("name", ALL)
def test_new_values_come_out_as_they_went_in(name: str, tmp_path: Path) -> None:
    wanted = written(tmp_path / "x_fitted.yaml", changed(own(robot(name))))
    found = own(load_model(name, wanted))
    for joint, values in wanted.joints.items():
        for key, value in values:
            again = getattr(found.joints[joint], key)
            same = again is None if value is None else np.allclose(again, value, rtol=1e-12, atol=1e-14)
            assert same, (joint, key)  # None: a joint whose link weighs nothing, another one's link does


def test_welded_bodies_are_part_of_the_link(welded: str, tmp_path: Path) -> None:
    model = load_model(welded)
    parameters = own(model)
    assert parameters.joints["a"].mass is None and parameters.joints["b"].mass == pytest.approx(model.tree.mass[1])
    assert model.mj.body("plate").mass > 0
    assert difference(model, load_model(welded, written(tmp_path / "w_fitted.yaml", parameters))) <= 1e-12
    heavier = changed(parameters)
    again = load_model(welded, heavier)
    assert again.mj.body("plate").mass == again.mj.body("tool").mass == 0
    assert own(again).joints["c"].com == pytest.approx(heavier.joints["c"].com, abs=1e-14)
    assert again.tree.stiffness[2] == 3


def test_what_is_left_out_is_as_in_the_model() -> None:
    model, mass = robot("ur10e"), 5.5
    partly = FittedParameters(robot="ur10e", joints={"elbow_joint": JointParameters(mass=mass)})
    tree = model.tree
    tree = replace(tree, mass=np.where(np.arange(6) == 2, mass, tree.mass))
    assert difference(replace(model, tree=tree, mj=load_model("ur10e", partly).mj), load_model("ur10e", partly)) <= 1e-12


def test_a_changed_tree_becomes_a_file() -> None:
    model = robot("panda")
    tree = replace(model.tree, mass=model.tree.mass * 1.2, inertia=model.tree.inertia * 1.3, damping=model.tree.damping + 1)
    again = load_model("panda", parameters_of(model.mj, tree, "panda"))
    assert difference(replace(model, tree=tree, mj=again.mj), again) <= 1e-12


def test_pinocchio_with_the_same_numbers_has_the_same_dynamics(urdf: str) -> None:
    parameters = changed(own(load_model(urdf)))
    model, other = load_model(urdf, parameters), pin.buildModelFromUrdf(urdf)
    for name, values in parameters.joints.items():  # its joint frames are the URDF's links
        j = other.getJointId(name)
        xx, yy, zz, xy, xz, yz = values.inertia
        other.inertias[j] = pin.Inertia(values.mass, np.array(values.com), np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]))
    other.armature = np.array([values.armature for values in parameters.joints.values()])
    assert error_of(other, model) <= 1e-12


def error_of(other: pin.Model, model: Model) -> float:
    """The largest relative difference of a Pinocchio model's M(q) and bias from MuJoCo's."""
    data, mine, rng, worst = other.createData(), mujoco.MjData(model.mj), np.random.default_rng(5), 0.0
    assert list(other.names)[1:] == list(model.tree.joints)
    for _ in range(10):
        q, v = rng.uniform(-2, 2, (2, model.tree.n))
        upper = np.triu(pin.crba(other, data, q))
        expected = mujoco_mass_matrix(model.mj, mine, q)
        worst = max(worst, np.abs(upper + np.triu(upper, 1).T - expected).max() / np.abs(expected).max())
        mine.qvel[:] = v
        mujoco.mj_forward(model.mj, mine)
        bias = pin.nonLinearEffects(other, data, q, v)
        worst = max(worst, np.abs(bias - mine.qfrc_bias).max() / np.abs(bias).max())
    return worst


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"robot": "ur10e", "joints": {"elbow": {"damping": 1.0}}}, ["f.yaml", "joints.elbow", "no such joint", "elbow_joint"]),
        ({"robot": "ur5e", "joints": {}}, ["f.yaml", "robot", "'ur10e'", "'ur5e'"]),
    ],
)
def test_parameters_that_do_not_fit_the_robot(data: dict, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        load_model("ur10e", validate(FittedParameters, {**data, "path": "f.yaml"}))
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_joint_without_a_link_takes_no_mass(welded: str) -> None:
    with pytest.raises(SpecError, match="joints.a: no mass expected"):
        load_model(welded, FittedParameters(robot="welded", joints={"a": JointParameters(mass=1.0)}))


# --- exported models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_an_exported_mjcf_is_the_same_model(name: str, tmp_path: Path) -> None:
    parameters = changed(own(robot(name)))
    export_mjcf(name, parameters, tmp_path / f"{name}.xml")
    model, again = load_model(name, parameters), load_model(str(tmp_path / f"{name}.xml"))
    assert difference(model, again) <= 1e-12
    assert again.tree.joints == model.tree.joints and again.tree.frames.keys() == model.tree.frames.keys()
    same_numbers(model, again)
    assert np.array_equal(model.mj.actuator_gear, again.mj.actuator_gear)


def same_numbers(model: Model, again: Model) -> None:
    for key in ("jnt_range", "jnt_axis", "jnt_pos", "body_pos", "body_quat", "site_pos", "site_quat", "key_qpos", "qpos_spring"):
        assert np.allclose(getattr(model.mj, key), getattr(again.mj, key), rtol=0, atol=1e-15), key


def test_an_exported_mjcf_keeps_meshes_frames_and_digits(welded: str, tmp_path: Path) -> None:
    parameters = changed(own(load_model(welded)))
    (tmp_path / "out").mkdir()
    export_mjcf(welded, parameters, tmp_path / "out" / "mine.xml")
    model, again = load_model(welded, parameters), load_model(str(tmp_path / "out" / "mine.xml"))
    assert again.mj.nmesh == 1
    assert difference(model, again) <= 1e-12
    same_numbers(model, again)
    assert "unnamed" not in (tmp_path / "out" / "mine.xml").read_text()


@pytest.mark.parametrize("kind", ["urdf", "mjcf"])
def test_a_urdf_is_exported(kind: str, urdf: str, tmp_path: Path) -> None:
    parameters = changed(own(load_model(urdf)))
    joints = {name: joint.model_copy(update={"armature": 0.0}) for name, joint in parameters.joints.items()}
    parameters = parameters.model_copy(update={"joints": joints})
    model, path = load_model(urdf, parameters), tmp_path / "out" / f"two.{'urdf' if kind == 'urdf' else 'xml'}"
    path.parent.mkdir()
    (export_urdf if kind == "urdf" else export_mjcf)(urdf, parameters, path)
    assert difference(model, load_model(str(path))) <= 1e-9
    if kind == "urdf":
        other = pin.buildModelFromUrdf(str(path))
        assert error_of(other, model) <= 1e-9
        assert np.array_equal(other.damping, model.tree.damping)
        assert str(tmp_path / "rod.obj") in path.read_text()


def test_a_urdf_says_that_it_holds_no_armature(urdf: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    export_urdf(urdf, changed(own(load_model(urdf))), tmp_path / "out.urdf")
    assert "armature of j1, j2, j3" in caplog.text


def test_no_urdf_comes_out_of_a_mjcf(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"ur10e\.xml: is no URDF"):
        export_urdf("ur10e", own(robot("ur10e")), tmp_path / "x.urdf")
    assert not list(tmp_path.iterdir())


def test_a_model_with_hidden_meshes_is_not_exported(tmp_path: Path) -> None:
    jaco = load_model("dm_control:jaco_arm")
    assert difference(jaco, load_model("dm_control:jaco_arm", own(jaco))) <= 1e-12
    with pytest.raises(ModelError, match="jaco_arm: its meshes are inside dm_control"):
        export_mjcf("dm_control:jaco_arm", own(jaco), tmp_path / "x.xml")


# --- runs -------------------------------------------------------------------------------------------------------------

RUN = {"rule": "m:Rule", "task": {}, "duration": 1.0}


def test_a_robot_is_a_name_or_a_mapping() -> None:
    plain = validate(RunConfig, {**RUN, "robot": "panda"})
    both = validate(RunConfig, {**RUN, "robot": {"name": "panda", "parameters": "panda_fitted"}})
    assert (plain.robot.name, plain.robot.parameters) == ("panda", None)
    assert (both.robot.name, both.robot.parameters) == ("panda", "panda_fitted")
    for config in (plain, both):
        assert validate(RunConfig, config.model_dump(mode="json")) == config
    assert validate(RunConfig, merged(both.model_dump(), {"robot": "ur10e"})).robot.parameters is None
    for wrong, words in (
        (3, "expected a robot's name, found 3"),
        ({"name": "panda", "parameter": "x"}, "did you mean 'parameters'"),
    ):
        with pytest.raises(SpecError, match=words):
            validate(RunConfig, {**RUN, "robot": wrong})


@pytest.mark.parametrize(
    ("arguments", "name", "parameters"),
    [
        (["--robot", "ur5e"], "ur5e", None),
        (["--robot=ur5e", "--seed", "3"], "ur5e", None),
        (["--robot.name", "ur5e"], "ur5e", "old_fitted"),
        (["--robot.parameters", "x_fitted"], "ur10e", "x_fitted"),
        (["--robot.parameters", "None"], "ur10e", None),
        (["--seed", "3", "--robot", "ur5e", "--robot.parameters", "x.yaml"], "ur5e", "x.yaml"),
    ],
)
def test_overrides(arguments: list[str], name: str, parameters: str | None) -> None:
    config, file = load_run("ur10e_reach_sim")
    config = validate(RunConfig, merged(config.model_dump(), {"robot": {"name": "ur10e", "parameters": "old_fitted"}}))
    found = with_overrides(config, arguments, "x", file)
    assert (found.robot.name, found.robot.parameters) == (name, parameters)
    assert found.seed == (3 if "--seed" in arguments else 0) and found.planner == config.planner


@pytest.mark.parametrize("arguments", [["--robot"], ["--robot", "--seed", "3"], ["--robot="]])
def test_a_robot_without_a_name(arguments: list[str]) -> None:
    config, file = load_run("ur10e_reach_sim")
    with pytest.raises(SpecError, match="--robot: expected a robot's name"):
        with_overrides(config, arguments, "x", file)


def test_a_run_with_other_parameters_than_the_truth(tmp_path: Path) -> None:
    nominal, heavy = own(robot("arm2")), changed(own(robot("arm2")))
    write_parameters(tmp_path / "nominal.yaml", nominal)
    write_parameters(tmp_path / "heavy.yaml", heavy)
    quick = ["--lockstep", "--duration", "0.2", "--planner.samples", "16", "--record.no-video", "--record.no-plots"]
    settings = {
        "plain": [],
        "told": ["--robot.parameters", str(tmp_path / "nominal.yaml")],
        "wrong": ["--backend.parameters", str(tmp_path / "heavy.yaml")],
        "right": ["--robot.parameters", str(tmp_path / "heavy.yaml"), "--backend.parameters", str(tmp_path / "heavy.yaml")],
        "also": ["--robot.parameters", str(tmp_path / "heavy.yaml")],
    }
    logs = {}
    for name, arguments in settings.items():
        assert main(["run", "arm2_swingup_sim", "--out", str(tmp_path / name), *quick, *arguments]) == 0
        logs[name] = read_log(tmp_path / name / "log.csv").data
    assert np.array_equal(logs["right"], logs["also"], equal_nan=True)
    assert np.nanmax(np.abs(logs["plain"] - logs["told"])) < 1e-3
    assert np.nanmax(np.abs(logs["plain"] - logs["wrong"])) > 0.05
    assert np.nanmax(np.abs(logs["wrong"] - logs["right"])) > 0.01
    saved = yaml.safe_load((tmp_path / "wrong" / "config.yaml").read_text())["config"]
    assert saved["backend"]["parameters"] == str(tmp_path / "heavy.yaml")
    assert validate(RunConfig, saved).robot.name == "arm2"
    assert load_parameters(tmp_path / "wrong" / "truth.yaml").joints == heavy.joints
    assert load_parameters(tmp_path / "right" / "parameters.yaml").joints == heavy.joints
    assert not (tmp_path / "wrong" / "parameters.yaml").exists() and not (tmp_path / "right" / "truth.yaml").exists()


def test_the_scenario_may_name_them_and_errors_say_where(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = yaml.safe_load(load_run("ur10e_reach_sim")[1].read_text())
    write_parameters(tmp_path / "x_fitted.yaml", changed(own(robot("ur10e"))))
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**data, "robot": {"name": "ur10e", "parameters": str(tmp_path / "x_fitted.yaml")}}))
    config, file = load_run(str(path))
    model = load_run_model(config, file)
    assert difference(model, load_model("ur10e", changed(own(robot("ur10e"))))) <= 1e-12
    assert load_truth(config, file, model) is model
    assert main(["check", str(path), str(tmp_path / "x_fitted.yaml")]) == 0
    assert capsys.readouterr().out.count("ok ") == 2
    assert main(["show", str(tmp_path / "x_fitted.yaml")]) == 0
    assert "wrist_3_joint" in capsys.readouterr().out
    for setting in ("--robot.parameters", "--backend.parameters"):
        assert main(["run", str(path), setting, "nothing_fitted", "--lockstep"]) == 2
        error = capsys.readouterr().err
        assert setting[2:] in error and "mine.yaml" in error and "nothing_fitted" in error and error.count("\n") == 1
    assert main(["run", "cartpole_swingup_sim", "--backend.parameters", str(tmp_path / "x_fitted.yaml"), "--lockstep"]) == 2
    assert "backend.parameters" in capsys.readouterr().err


# --- simulation -------------------------------------------------------------------------------------------------------


def driven(truth: mujoco.MjModel, believed: mujoco.MjModel | None, seconds: float) -> tuple[SimDriver, np.ndarray, np.ndarray]:
    """Let a UR10e hold home with its own gains; return the driver, its gravity torque and where it sags to."""
    arm, clock = robot("ur10e").robot, LockstepClock()
    driver = SimDriver(truth, arm, clock, believed=believed)
    driver.open()
    zero = np.zeros(arm.nu)
    driver.write(JointCommand(np.array(arm.home), zero, np.array(arm.control.stiffness), np.array(arm.control.damping), zero))
    clock.restart()
    clock.wait_until(seconds)
    state = driver.read()
    return driver, state.gravity, state.q - arm.home


def test_the_arm_holds_itself_by_what_it_was_told() -> None:
    nominal = robot("ur10e")
    joints = {
        name: JointParameters(mass=joint.mass * 1.3, damping=0.0, friction=0.0) for name, joint in own(nominal).joints.items()
    }
    heavy = load_model("ur10e", FittedParameters(robot="ur10e", joints=joints))
    driver, gravity, sag = driven(heavy.mj, nominal.mj, 3.0)
    q = driver.data.qpos.copy()
    assert np.allclose(gravity, ReferenceDynamics(nominal.tree).gravity(q), atol=1e-9)
    missing = ReferenceDynamics(heavy.tree).gravity(q) - gravity
    assert np.abs(missing).max() > 10
    assert np.allclose(-missing / nominal.robot.control.stiffness, sag, atol=2e-5), (missing, sag)
    _, gravity, sag = driven(heavy.mj, heavy.mj, 0.2)
    assert np.abs(sag).max() < 1e-9 and np.allclose(gravity, ReferenceDynamics(heavy.tree).gravity(q + sag), atol=5)


def test_believing_the_truth_changes_nothing() -> None:
    heavy = load_model("ur10e", changed(own(robot("ur10e"))))
    one, other = driven(heavy.mj, None, 0.3)[0], driven(heavy.mj, compile_again(heavy), 0.3)[0]
    assert np.array_equal(one.data.qpos, other.data.qpos) and np.array_equal(one.data.qvel, other.data.qvel)


def compile_again(model: Model) -> mujoco.MjModel:
    return load_model(model.robot.name, model.parameters).mj


def test_the_nominal_model_is_left_as_it_was() -> None:
    before = compile_model(robot("ur10e").robot.model_path)
    load_model("ur10e", changed(own(robot("ur10e"))))
    assert np.array_equal(before.body_mass, compile_model(robot("ur10e").robot.model_path).body_mass)

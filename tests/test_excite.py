"""Excitation: base parameters against the literature, every limit on a fine grid, expected against empirical deviations."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pinocchio as pin
import pytest
import yaml

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.logs import read_log
from mbctrl.calibrate.base_parameters import EXTRAS, INERTIAL, BaseParameters
from mbctrl.calibrate.clearance import Clearance
from mbctrl.calibrate.excite import Excitation, ExciteSettings, excite
from mbctrl.calibrate.excite_problem import Bounds, Problem
from mbctrl.calibrate.fourier import FourierSeries, at_rest, ramp, ramp_time
from mbctrl.calibrate.information import Information, model_torque
from mbctrl.cli.main import main
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters

QUICK = {"arm2": (3, 60), "panda": (3, 25), "ur10e": (4, 25)}  # random draws, iterations
ARMS = tuple(QUICK)
_found: dict[str, Excitation] = {}


def found(name: str) -> Excitation:
    """Return a short search's result, once a robot."""
    if name not in _found:
        draws, iterations = QUICK[name]
        _found[name] = excite(load_model(name), ExciteSettings(draws=draws, iterations=iterations, rate=50.0))
    return _found[name]


def full(tree, extras=()) -> np.ndarray:
    own = {"armature": tree.armature, "viscous": tree.damping, "coulomb": tree.friction}
    return np.concatenate([link_parameters(tree).ravel(), *(own[extra] for extra in extras)])


# --- base parameters ----------------------------------------------------------------------------------------------------


def test_the_order_is_pinocchios():
    inertia = np.array([[7.0, 0.1, 0.2], [0.1, 8.0, 0.3], [0.2, 0.3, 9.0]])
    mass, com = 2.0, np.array([0.4, 0.5, 0.6])
    origin = inertia + mass * (com @ com * np.eye(3) - np.outer(com, com))
    axis = dict(zip("xyz", range(3)))
    known = {"m": mass} | {f"m{c}": mass * com[i] for c, i in axis.items()}
    known |= {f"I{a}{b}": origin[i, j] for a, i in axis.items() for b, j in axis.items()}
    assert pin.Inertia(mass, com, inertia).toDynamicParameters() == pytest.approx([known[kind] for kind in INERTIAL])


@pytest.mark.parametrize(
    ("name", "links", "rotors"),
    [
        ("arm2", 6, 7),  # by hand: mx, my, Izz of either link; the elbow's rotor is seen alone, the shoulder's in Izz
        ("panda", 43, 48),  # Gaz et al. (2019): 43 coefficients without rotors
        ("ur10e", 36, 40),  # Mamedov and Mikhel (2020): 40 with rotors; 36 is the general six-joint arm's (Khalil)
        ("ur5e", 36, 40),
    ],
)
def test_known_numbers_of_base_parameters(name, links, rotors):
    tree = load_model(name).tree
    assert BaseParameters(tree, ()).count == links
    assert BaseParameters(tree).count == rotors
    assert BaseParameters(tree, EXTRAS).count == rotors + 2 * tree.n  # friction is always seen


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("extras", [(), ("armature",), EXTRAS])
def test_base_parameters_give_the_same_torques(name, extras):
    tree = load_model(name).tree
    base, rng = BaseParameters(tree, extras), np.random.default_rng(1)
    states = rng.uniform(-2, 2, (3, 40, tree.n))
    regressor = base.regressor(*states)
    for parameters in (full(tree, extras), rng.normal(size=len(base.names))):
        torque = regressor @ parameters
        assert np.abs(torque - base.reduce(regressor) @ base.from_full(parameters)).max() <= 1e-10 * max(1, np.abs(torque).max())
    assert base.nominal() == pytest.approx(base.from_full(full(tree, extras)))


def test_torque_is_the_models():
    tree = load_model("panda").tree
    base, states = BaseParameters(tree, EXTRAS), np.random.default_rng(2).uniform(-2, 2, (3, 20, 7))
    assert base.regressor(*states) @ full(tree, EXTRAS) == pytest.approx(model_torque(base.reference, *states), abs=1e-10)


def test_groupings_are_those_found_by_hand():
    base = BaseParameters(load_model("arm2").tree)
    assert base.groupings() == [
        "shoulder.mx - 0.5 elbow.m",  # x points up along the link: the elbow is at -l1
        "shoulder.my",
        "shoulder.Izz + 0.25 elbow.m + shoulder.armature",  # l1²
        "elbow.mx",
        "elbow.my",
        "elbow.Izz",
        "elbow.armature",
    ]
    assert base.labels()[:2] == ["shoulder.mx+", "shoulder.my"]
    last = BaseParameters(load_model("panda").tree, ()).groupings()[-7:]
    assert last == ["joint7.mx", "joint7.my", "joint7.Ixx - joint7.Iyy", *(f"joint7.{k}" for k in ("Ixy", "Ixz", "Iyz", "Izz"))]


@pytest.mark.parametrize("seed", [1, 2])
def test_the_choice_does_not_hang_on_the_draw(seed):
    tree = load_model("panda").tree
    one, other = BaseParameters(tree), BaseParameters(tree, seed=seed)
    assert (one.columns == other.columns).all() and one.map == pytest.approx(other.map, abs=1e-9)


# --- series and ramps ---------------------------------------------------------------------------------------------------


def test_derivatives_of_the_series_and_the_ramp_agree():
    rng, t = np.random.default_rng(0), np.linspace(0, 8, 16001)
    ab = rng.normal(size=(2, 6)) @ at_rest(4).T
    series = FourierSeries(8.0, rng.normal(size=2), ab[:, :4], ab[:, 4:])
    way = ramp(np.zeros(2), np.array([1.0, -2.0]), 8.0, t)
    for order in range(3):
        for low, high in ((series.derivative(t, order), series.derivative(t, order + 1)), way[order : order + 2]):
            assert np.gradient(low, t, axis=0)[2:-2] == pytest.approx(high[2:-2], abs=1e-4)
    assert np.abs(series.derivative(np.zeros(1), 1)).max() < 1e-12 and np.abs(series.derivative(np.zeros(1), 2)).max() < 1e-12
    time = ramp_time(np.array([1.0, -2.0]), [(1, np.full(2, 0.5)), (2, np.full(2, 0.3))], 1.0)
    way = ramp(np.zeros(2), np.array([1.0, -2.0]), time, np.linspace(0, time, 2001))
    assert max(np.abs(way[1]).max() / 0.5, np.abs(way[2]).max() / 0.3) == pytest.approx(1, abs=1e-4)


def test_gradients_of_the_search():
    model = load_model("ur10e")
    base, clearance = BaseParameters(model.tree, EXTRAS), Clearance(model, 0.02)
    limits, one = model.robot.limits, np.ones(6)
    low, high = np.array(limits.position_lower), np.array(limits.position_upper)
    information = Information(base, one, (np.stack([low, high]), one, one), 0.1 * one)
    bounds = Bounds(0.8 * low, 0.8 * high, ((1, one), (2, 2 * one)), 100 * one, 0.02)
    problem, rng = Problem(information, clearance, bounds, np.array(model.robot.home), 10.0, 3), np.random.default_rng(0)
    x = problem.draw(rng)
    gradient, rows = problem._gradients(x)
    for way in rng.normal(size=(4, len(x))):
        step = 1e-6 * way
        slope = (problem.value(x + step) - problem.value(x - step)) / 2e-6
        assert slope == pytest.approx(gradient @ way, rel=1e-3, abs=1e-3)
        assert (problem.constraints(x + step) - problem.constraints(x - step)) / 2e-6 == pytest.approx(
            rows @ way, rel=1e-3, abs=1e-3
        )


# --- the motion ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARMS)
def test_limits_are_kept_on_a_fine_grid(name):
    result, model = found(name), load_model(name)
    limits, margin = model.robot.limits, result.settings.margin + 1e-6
    t, q, v, a, phase = result.trajectory(400.0)
    low, high = np.array(limits.position_lower), np.array(limits.position_upper)
    assert (np.abs(2 * q - low - high) <= margin * (high - low)).all()
    assert (np.abs(v) <= margin * np.array(limits.velocity)).all()
    if limits.acceleration:
        assert (np.abs(a) <= margin * np.array(limits.acceleration)).all()
        assert (np.abs(np.diff(a, axis=0)) <= margin * np.diff(t)[:, None] * np.array(limits.jerk)).all()
    passive = model.tree.damping * v + model.tree.friction * np.sign(v)
    torque = ReferenceDynamics(model.tree).inverse_dynamics(q, v, a) + passive
    assert (np.abs(torque) <= 1.002 * margin * np.array(limits.effort)).all()  # peaks between the samples that were checked
    assert set(phase) == {0, 1, 2} and (np.diff(phase) >= 0).all()


@pytest.mark.parametrize("name", ARMS)
def test_clearance_is_kept(name):
    """Every pair of collision geoms by MuJoCo, without the bookkeeping under test but for what it leaves out."""
    result, model = found(name), load_model(name)
    mj, data, tree = model.mj, mujoco.MjData(model.mj), model.tree
    solid = [g for g in range(mj.ngeom) if mj.geom_group[g] == 3]
    link = {g: tree.joints.index(next(mj.joint(j).name for j in range(mj.njnt) if mj.jnt_bodyid[j] == body(mj, g))) for g in solid}
    skip = {frozenset(pair.split(" and ")) for pair in result.unavoidable}
    pairs = [(g, h) for g in solid for h in solid if link[g] > link[h] and tree.parent[link[g]] != link[h]]
    pairs = [(g, h) for g, h in pairs if {tree.joints[link[g]], tree.joints[link[h]]} not in skip]
    floor = [g for g in solid if {tree.joints[link[g]], "floor"} not in skip]
    least = np.inf
    for pose in result.trajectory(15.0)[1]:
        data.qpos[:] = pose
        mujoco.mj_kinematics(mj, data)
        heights = [data.geom_xpos[g, 2] - mj.geom_size[g, 0] - mj.geom_size[g, 1] * abs(data.geom_xmat[g, 8]) for g in floor]
        least = min([least, *heights, *(mujoco.mj_geomDistance(mj, data, g, h, 1.0, None) for g, h in pairs)])
    assert least >= result.settings.clearance - 1e-4
    assert result.usage.clearance >= result.settings.clearance


def body(mj: mujoco.MjModel, geom: int) -> int:
    """Return the body with a joint that carries a geom."""
    b = mj.geom_bodyid[geom]
    while not mj.body_jntnum[b]:
        b = mj.body_parentid[b]
    return b


@pytest.mark.parametrize("name", ARMS)
def test_it_starts_and_ends_at_home_at_rest_and_is_periodic(name):
    result = found(name)
    _, q, v, a, _ = result.trajectory()
    home = np.array(result.robot.home)
    for k in (0, -1):
        assert q[k] == pytest.approx(home, abs=0.01) and np.abs(v[k]).max() < 0.02
    assert np.abs(q[0] - home).max() == np.abs(v[0]).max() == np.abs(a[0]).max() == 0
    ends = np.array([0.0, result.settings.duration])
    for order in range(3):
        start, end = result.series.derivative(ends, order)
        assert start == pytest.approx(end, abs=1e-9)
        assert order == 0 or np.abs(start).max() < 1e-9
    assert np.abs(np.diff(q, axis=0) * result.settings.rate).max() < 1.1 * np.abs(v).max()  # no jump where phases meet


@pytest.mark.parametrize("name", ARMS)
def test_it_tells_more_than_the_best_random_motion(name):
    result = found(name)
    assert result.quality.logdet > result.before.logdet + 1
    assert result.quality.condition < result.before.condition


def test_it_is_reproducible():
    settings = ExciteSettings(draws=2, iterations=10, rate=50.0)
    one, other = (excite(load_model("arm2"), settings).series for _ in range(2))
    assert (one.a == other.a).all() and (one.b == other.b).all() and (one.offset == other.offset).all()
    third = excite(load_model("arm2"), settings.model_copy(update={"seed": 1})).series
    assert np.abs(one.a - third.a).max() > 1e-3


def test_repeats_and_noise_scale_the_deviations():
    base = ExciteSettings(draws=1, iterations=1, rate=50.0, torque_noise=(0.1,))
    one, four, loud = (
        excite(load_model("arm2"), base.model_copy(update=change)) for change in ({}, {"repeats": 4}, {"torque_noise": (0.3,)})
    )
    assert four.quality.sd == pytest.approx(one.quality.sd / 2) and loud.quality.sd == pytest.approx(3 * one.quality.sd)
    assert four.trajectory()[0][-1] == pytest.approx(80 + 2 * four.ramp, abs=0.03)


@pytest.mark.parametrize("name", ["arm2", "panda"])
def test_expected_deviations_are_those_of_least_squares(name):
    """400 recordings with white torque noise; the estimate of a deviation from as many is itself good to 4 %."""
    result, rng = found(name), np.random.default_rng(5)
    _, q, v, a, phase = result.trajectory()
    q, v, a = (x[phase == 1] for x in (q, v, a))
    noise = np.array(result.settings.torque_noise)
    weighted = (result.base.reduce(result.base.regressor(q, v, a)) / noise[:, None]).reshape(-1, result.base.count)
    torque = result.torque(q, v, a)
    measured = torque + noise * rng.normal(size=(400, *torque.shape))
    scale = np.linalg.norm(weighted, axis=0)
    beta = np.linalg.lstsq(weighted / scale, (measured / noise).reshape(400, -1).T, rcond=None)[0] / scale[:, None]
    assert beta.std(axis=1, ddof=1) == pytest.approx(result.quality.sd, rel=0.2)
    assert (np.abs(beta.mean(axis=1) - result.base.nominal()) <= 5 * result.quality.sd / 20).all()


def test_poorly_excited_parameters_are_named():
    result = found("panda")
    relative, labels = result.relative(), result.base.labels()
    assert {labels[i] for i in result.poor()} == {label for label, share in zip(labels, relative) if share > 0.3}
    assert "joint2.viscous" in {labels[i] for i in result.poor()}  # 0.003 N·m·s/rad, nothing beside a noise of 1.7 N·m


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_home_that_is_no_place_to_start_from_is_refused():
    with pytest.raises(SpecError, match="apart at home, less than the clearance 500 mm"):
        excite(load_model("panda"), ExciteSettings(clearance=0.5))
    with pytest.raises(SpecError, match="home uses 52% of the position limit of joint4, more than the margin 0.3 allows"):
        excite(load_model("panda"), ExciteSettings(margin=0.3))
    model = load_model("panda")
    weak = model.robot.limits.model_copy(update={"effort": (87.0, 87.0, 87.0, 20.0, 12.0, 12.0, 12.0)})
    with pytest.raises(SpecError, match="% of the torque limit of joint4, more than the margin 0.8"):
        excite(replace(model, robot=model.robot.model_copy(update={"limits": weak})))
    with pytest.raises(SpecError, match="every joint actuated"):
        excite(load_model("cartpole"))


WRONG = {
    "unknown robot": (["pander"], ["pander", "panda"]),
    "one harmonic": (["arm2", "--harmonics", "1"], ["--harmonics", "1"]),
    "negative duration": (["arm2", "--duration", "-1"], ["--duration", "-1"]),
    "not a number": (["arm2", "--duration", "nan"], ["--duration", "nan"]),
    "no repeats": (["arm2", "--repeats", "0"], ["--repeats", "0"]),
    "too much margin": (["arm2", "--margin", "1.2"], ["--margin", "1.2"]),
    "negative clearance": (["arm2", "--clearance", "-0.1"], ["--clearance", "-0.1"]),
    "too low a rate": (["arm2", "--rate", "1"], ["--rate", "2.5 Hz"]),
    "noise of too many joints": (["arm2", "--torque-noise", "1", "2", "3"], ["--torque-noise", "2", "3"]),
    "noise of zero": (["arm2", "--torque-noise", "0"], ["--torque-noise", "0"]),
    "unknown setting": (["arm2", "--harmoniks", "3"], ["--harmoniks"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_one_line_and_leave_nothing(case, tmp_path, capsys, monkeypatch):
    arguments, words = WRONG[case]
    monkeypatch.chdir(tmp_path)
    assert main(["excite", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and all(word in error for word in words), error
    assert not list(tmp_path.iterdir())


# --- the command --------------------------------------------------------------------------------------------------------

SHORT = ["--duration", "8", "--harmonics", "3", "--rate", "100", "--iterations", "10"]


def test_the_command_leaves_three_files(tmp_path, capsys):
    folder = tmp_path / "new" / "mine"
    assert main(["excite", "arm2", *SHORT, "--out", str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"trajectory.csv", "excitation.yaml", "plots.png"}
    assert list(folder.parent.iterdir()) == [folder]
    screen = capsys.readouterr().out
    for words in (
        "of 80% allowed",
        "no limit given, none kept: acceleration, jerk",
        "least clearance",
        "condition number",
        "viscous",
    ):
        assert words in screen
    log = read_log(folder / "trajectory.csv")
    assert log.units["a.elbow"] == "rad/s²" and log.header["robot"] == "arm2" and set(log["phase"]) == {0, 1, 2}
    about = yaml.safe_load((folder / "excitation.yaml").read_text())
    joints = about["series"]["joints"].values()
    series = FourierSeries(8.0, *(np.array([joint[key] for joint in joints]) for key in ("offset", "a", "b")))
    along = log["phase"] == 1
    assert series.derivative(log["t"][along] - about["series"]["ramp"], 0) == pytest.approx(log["q"][along], abs=1e-7)
    assert about["condition number"]["optimised"] < about["condition number"]["random"]
    assert len(about["parameters"]) == 11 and about["parameters"][0]["grouping"] == "shoulder.mx - 0.5 elbow.m"
    assert main(["excite", "arm2", *SHORT, "--out", str(folder)]) == 2 and "exists already" in capsys.readouterr().err


def test_a_failure_on_the_way_leaves_no_folder(tmp_path, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise MbctrlError("no ink")

    monkeypatch.setattr("mbctrl.report.excitation.plot_excitation", fail)
    assert main(["excite", "arm2", *SHORT, "--out", str(tmp_path / "mine")]) == 2
    assert "no ink" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_help_teaches_by_example(capsys):
    with pytest.raises(SystemExit):
        main(["excite", "--help"])
    text = capsys.readouterr().out
    assert "mbctrl excite panda" in text and all(flag in text for flag in ("--margin", "--no-floor", "--torque-noise"))
    for command in re.findall(r"mbctrl excite (\S+)", Path("README.md").read_text() if Path("README.md").is_file() else ""):
        load_model(command)

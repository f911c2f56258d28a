"""Payloads and drive gains: known truth recovered, honest errors, what cannot be known said so; a real pair of logs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from simulated_logs import BODY, arm, recording

from mbctrl.calibrate.body import seen_from
from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.gains import drive_gains
from mbctrl.calibrate.inertia import feasible
from mbctrl.calibrate.payload import PLAIN, arm_parameters, identify_payload, payload_on
from mbctrl.calibrate.recipe import FilterSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.signals import CalibrationError, Signals, prepare
from mbctrl.dynamics.body import compose, decompose, weld
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters

GAINS = np.array([11.0, 12.0, 9.8, 10.7, 10.6, 10.5])
DATA = Path(os.environ.get("MBCTRL_DATA", "")) / "ur10e"
PAIR = tuple(DATA / f"ur-20_02_19_14harm50sec{end}.csv" for end in ("", "Load"))
PUBLISHED = np.array([10.0, 10.6956, 8.4566, 9.0029, 9.48, 10.1232])
# What the controller itself divides target torque by to get target current, out of the log's columns 20 to 31 with friction
# a + b sqrt(v) + c v + d v^2 fitted; 4 logs agree within 0.5 %, joint 5 within 1 %.
MAKER = np.array([11.96, 11.98, 9.84, 10.75, 10.73, 10.70])
real = pytest.mark.skipif(not PAIR[1].is_file(), reason="MBCTRL_DATA does not hold the real pair")


def bare(seed: int = 1, **settings) -> Signals:
    return prepare(recording(arm("ur10e"), "ur10e", seed=seed, **settings), FilterSpec())


def loaded(seed: int = 2, body: np.ndarray = BODY, link: int = 5, **settings) -> Signals:
    return prepare(recording(weld(arm("ur10e"), link, body), "ur10e", seed=seed, **settings), FilterSpec())


def test_a_body_survives_other_frames_and_welding() -> None:
    mass, com, inertia = decompose(BODY)
    np.testing.assert_allclose(compose(mass, com, inertia), BODY, atol=1e-15)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    turn *= np.linalg.det(turn)
    offset = np.array([0.1, 0.2, -0.3])
    moved = decompose(seen_from(BODY, turn, offset))
    np.testing.assert_allclose(moved[1], turn.T @ (com - offset), atol=1e-12)
    np.testing.assert_allclose(moved[2], turn.T @ inertia @ turn, atol=1e-12)
    tree = arm("ur10e")
    both = link_parameters(weld(tree, 3, BODY))
    np.testing.assert_allclose(both[3], link_parameters(tree)[3] + BODY, atol=1e-12)
    np.testing.assert_allclose(np.delete(both, 3, 0), np.delete(link_parameters(tree), 3, 0), atol=1e-12)


def test_a_payload_is_recovered_from_a_pair() -> None:
    tree = arm("ur10e")
    found = identify_payload([bare()], [loaded()], tree, frame="tcp")
    assert abs(found.mass - 2.0) < 0.02
    place = tree.frames["tcp"]
    truth = decompose(seen_from(BODY, place.rotation, place.position))
    np.testing.assert_allclose(found.com, truth[1], atol=5e-3)
    assert 0 < found.mass_error < 0.02 and (found.com_error < 5e-3).all()
    assert feasible(found.body) and not {"mass", "com x", "com y", "com z"} & set(found.unknown)
    assert (np.abs(found.inertia - truth[2]) < 4 * found.inertia_error + 5e-3).all()
    carrying = found.tree(tree)
    q = np.random.default_rng(0).uniform(-2, 2, (5, 6))
    expected = np.stack([ReferenceDynamics(weld(tree, 5, BODY)).gravity(x) for x in q])
    np.testing.assert_allclose(np.stack([ReferenceDynamics(carrying).gravity(x) for x in q]), expected, atol=0.5)


def test_motions_may_differ_and_any_link_may_carry() -> None:
    tree = arm("ur10e")
    other = bare(3, reach=0.8)
    found = identify_payload([other], [loaded(link=2)], tree, joint="elbow_joint", friction=PLAIN)
    assert found.joint == "elbow_joint" and abs(found.mass - 2.0) < 0.04


def test_a_known_arm_needs_no_bare_log() -> None:
    tree = arm("ur10e")
    found = payload_on([loaded()], tree)
    assert abs(found.mass - 2.0) < 0.02
    np.testing.assert_allclose(found.com, BODY[1:4] / 2, atol=5e-3)
    again = payload_on([loaded()], tree, arm_parameters(tree))
    assert again.mass == found.mass
    with pytest.raises(CalibrationError, match="expected 84 parameters"):
        payload_on([loaded()], tree, np.zeros(7))


def test_standard_errors_cover_the_truth() -> None:
    scores = []
    for seed in range(20):
        a, b = (log(100 * k + seed, noise=0.03, seconds=12.0) for k, log in enumerate((bare, loaded), 1))
        found = identify_payload([a], [b], arm("ur10e"), friction=PLAIN, draws=40)
        error = np.r_[found.mass - 2.0, found.body[1:4] - BODY[1:4]]
        scores.append(error / np.sqrt(np.diag(found.covariance)[:4]))
    rms = np.sqrt(np.mean(np.square(scores), axis=0))
    assert (rms > 0.5).all() and (rms < 1.8).all(), rms


def test_nothing_carried_weighs_nothing_and_has_no_centre() -> None:
    found = identify_payload([bare()], [bare(9)], arm("ur10e"), friction=PLAIN)
    assert abs(found.mass) < 4 * found.mass_error + 0.02
    assert {"mass", "inertia xx"} <= set(found.unknown)


def test_swapped_logs_missing_logs_and_names_are_refused() -> None:
    tree, a, b = arm("ur10e"), bare(), loaded()
    still = replace(a, moving=np.zeros_like(a.moving), file="still.csv")
    for match, call in {
        "swapped": lambda: identify_payload([b], [a], tree, friction=PLAIN),
        "bare arm": lambda: identify_payload([], [b], tree),
        "still.csv: loaded: nothing moves": lambda: identify_payload([a], [still], tree),
        "no such joint": lambda: identify_payload([a], [b], tree, joint="wrist_9"),
        "no such frame": lambda: identify_payload([a], [b], tree, frame="tpc"),
        "the frame moves with": lambda: identify_payload([a], [b], tree, joint="elbow_joint", frame="tcp"),
        "positive mass": lambda: drive_gains([a], [b], tree, -1.0, start_gains=np.ones(6)),
        "positive gains": lambda: drive_gains([a], [b], tree, 2.0, start_gains=np.zeros(6)),
    }.items():
        with pytest.raises(CalibrationError, match=match):
            call()


def test_drive_gains_are_recovered_from_currents() -> None:
    com, start = BODY[1:4] / BODY[0], np.full(6, 10.0)
    a, b = bare(gains=GAINS / start), loaded(gains=GAINS / start)
    known = drive_gains([a], [b], arm("ur10e"), 2.0, com, start_gains=start, friction=PLAIN)
    assert not known.kept
    np.testing.assert_allclose(known.gains / GAINS, 1.0, atol=0.01)
    assert (known.errors < 0.02 * GAINS).all()
    free = drive_gains([a], [b], arm("ur10e"), 2.0, start_gains=start, friction=PLAIN)
    assert (np.abs(free.gains - GAINS) < 4 * free.errors + 0.01 * GAINS).all()
    np.testing.assert_allclose(free.com, com, atol=0.01)


def test_gains_do_not_shrink_where_the_model_lacks_something() -> None:
    """Regressing the known payload on gain times current shrinks gains by what is unexplained; predicting currents does not."""
    a, b = bare(gains=GAINS), loaded(gains=GAINS)
    rng = np.random.default_rng(0)
    rough = [replace(one, effort=one.effort + 0.1 * one.effort.std(0) * one.smooth(rng.normal(size=one.q.shape))) for one in (a, b)]
    found = drive_gains(rough[:1], rough[1:], arm("ur10e"), 2.0, BODY[1:4] / 2, start_gains=np.ones(6), friction=PLAIN)
    np.testing.assert_allclose(found.gains / GAINS, 1.0, atol=0.05)


def test_a_joint_in_whose_current_no_load_shows_keeps_its_gain() -> None:
    """The last joint turns a link and a payload that are balanced about its axis and have next to no inertia."""
    tree, start = arm("ur10e"), 1.1 * GAINS
    body = compose(2.0, np.array([0.0, 0.0, 0.05]), np.diag([1e-3, 1e-3, 1e-6]))
    last = np.arange(6) == 5
    light = replace(
        tree,
        com=np.where(last[:, None], [0.0, 0.0, 0.01], tree.com),
        inertia=np.where(last[:, None, None], 1e-6 * np.eye(3), tree.inertia),
        armature=np.where(last, 0.0, tree.armature),
    )
    logs = [prepare(recording(one, "ur10e", seed=4, gains=GAINS / start), FilterSpec()) for one in (light, weld(light, 5, body))]
    found = drive_gains(logs[:1], logs[1:], tree, 2.0, start_gains=start, friction=PLAIN)
    assert found.kept == ("wrist_3_joint",)
    assert found.gains[5] == start[5] and found.errors[5] == np.inf
    np.testing.assert_allclose(found.gains[:4] / GAINS[:4], 1.0, atol=0.03)


@pytest.fixture(scope="module")
def arm_of_the_pair():
    return load_model(str(DATA / "ur10e.urdf")).tree


def real_pair(tree, gains: np.ndarray) -> list[list[Signals]]:
    found = []
    for path in PAIR:
        rows = np.genfromtxt(path, delimiter=",")
        log = Recording(tree.joints, rows[:, 0], rows[:, 1:7], rows[:, 13:19] * gains, rows[:, 7:13], file=path.name)
        found.append([prepare(log, FilterSpec())])
    return found


@real
def test_the_real_payload_weighs_what_the_scales_say(arm_of_the_pair) -> None:
    found = identify_payload(*real_pair(arm_of_the_pair, MAKER), arm_of_the_pair)
    assert abs(found.mass / 2.805 - 1) < 0.03
    assert found.unknown and all(name.startswith("inertia") for name in found.unknown)
    # With the gains published along with the logs, which are smaller by a tenth, so is the mass.
    small = identify_payload(*real_pair(arm_of_the_pair, PUBLISHED), arm_of_the_pair)
    assert 0.85 < small.mass / 2.805 < 0.90


@real
def test_the_real_gains_are_the_controllers_own(arm_of_the_pair) -> None:
    logs, start = real_pair(arm_of_the_pair, np.full(6, 10.0)), np.full(6, 10.0)
    plain = Friction(("coulomb", "viscous", "offset", "root", "stribeck"), "dahl")
    found = drive_gains(*logs, arm_of_the_pair, 2.805, start_gains=start, friction=plain, draws=30)
    assert not found.kept
    np.testing.assert_allclose(found.gains / MAKER, 1.0, atol=0.05)
    # The widest family predicts better, yet leaves joint 5, which the unknown centre of mass blurs, 5.4 % short.
    wide = drive_gains(*logs, arm_of_the_pair, 2.805, start_gains=start, draws=30)
    assert (wide.residual <= found.residual * 1.01).all()
    np.testing.assert_allclose(wide.gains / MAKER, 1.0, atol=0.06)

"""The recursive estimator: steps found, standstill survived, nonsense refused, drift followed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from simulated_logs import BODY, QUANTUM, arm, motion, torque

from mbctrl.calibrate.online import Estimate, OnlineEstimator, OnlineSettings, _Filter
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.body import weld
from mbctrl.dynamics.reference import ReferenceDynamics

RATE = 200.0


def log(name: str, seconds: float, step: float | None, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Return t, q, v, tau as measured, with the payload from ``step`` [s] on."""
    tree = arm(name)
    t, q, v, a = motion(name, seconds, RATE, seed)
    tau, rng = torque(tree, q, v, a), np.random.default_rng(seed)
    if step is not None:
        tau = np.where(t[:, None] < step, tau, torque(weld(tree, tree.n - 1, BODY), q, v, a))
    tau = tau + 0.02 * tau.std(0) * rng.normal(size=tau.shape)
    return t, np.round(q / QUANTUM) * QUANTUM, v + 1e-3 * rng.normal(size=v.shape), tau


def run(estimator: OnlineEstimator, t, q, v, tau) -> list[Estimate]:
    return [estimator.update(float(t[k]), q[k], v[k], tau[k]) for k in range(len(t))]


@pytest.mark.parametrize("name", ["panda", "ur10e"])
def test_a_payload_picked_up_is_found_within_three_seconds(name: str) -> None:
    estimator = OnlineEstimator(arm(name))
    found = run(estimator, *log(name, 16.0, 8.0))
    mass = np.array([one.mass for one in found])
    assert (mass[int(5 * RATE) : int(8 * RATE)] < 0.06).all()
    assert np.abs(mass[int(11 * RATE) :] - 2.0).max() < 0.04
    assert found[-1].fresh and 0 < found[-1].mass_error < 0.05
    np.testing.assert_allclose(found[-1].com, BODY[1:4] / 2, atol=0.02)
    tree = arm(name)
    q = motion(name, 0.1, RATE, 3)[1][0]
    expected = ReferenceDynamics(weld(tree, tree.n - 1, BODY)).gravity(q)
    np.testing.assert_allclose(ReferenceDynamics(found[-1].tree(tree)).gravity(q), expected, atol=0.5)


def test_standstill_winds_nothing_up() -> None:
    t, q, v, tau = log("panda", 10.0, 2.0)
    estimator = OnlineEstimator(arm("panda"))
    before = run(estimator, t, q, v, tau)[-1]
    rng, pause = np.random.default_rng(1), 60.0
    still = t[-1] + 0.01 + np.arange(0, pause, 0.01)
    # Brakes stop it within a sample and hold it: the torque is off by whatever it likes.
    rest = [estimator.update(x, q[-1], 1e-3 * rng.normal(size=7), tau[-1] - 1.0 + 0.1 * rng.normal(size=7)) for x in still]
    assert not rest[-1].fresh and abs(rest[-1].mass - before.mass) < 0.03
    assert rest[-1].mass_error < 3.0 + 1e-9
    after = run(estimator, t + still[-1] + 0.2, q, v, tau)
    assert abs(after[-1].mass - 2.0) < 0.04


def test_what_is_not_excited_stays_within_the_prior() -> None:
    """A single joint moving for a long time says nothing of others, whose uncertainty grows to the prior's and no further."""
    tree, settings = arm("panda"), OnlineSettings(friction_memory=1.0)
    estimator = OnlineEstimator(tree, settings)
    t = np.arange(0, 40, 0.01)
    q, v, a = np.zeros((len(t), 7)), np.zeros((len(t), 7)), np.zeros((len(t), 7))
    q[:, 6], v[:, 6], a[:, 6] = 0.5 * np.sin(2 * t), np.cos(2 * t), -2 * np.sin(2 * t)
    still = estimator.update(0.0, q[0], v[0], np.zeros(7))
    found = run(estimator, t[1:], q[1:], v[1:], torque(tree, q, v, a)[1:])[-1]
    assert found.mass_error <= still.mass_error * (1 + 1e-9)
    assert (found.friction_error <= np.array(settings.friction_spread) * (1 + 1e-9)).all()
    np.testing.assert_allclose(found.friction[:6, :2], np.stack([tree.friction, tree.damping], 1)[:6], atol=1e-3)


def test_samples_that_are_no_numbers_never_enter() -> None:
    t, q, v, tau = log("panda", 6.0, 2.0)
    clean, dirty = OnlineEstimator(arm("panda")), OnlineEstimator(arm("panda"))
    expected = run(clean, t, q, v, tau)[-1]
    refused = 0
    for k in range(len(t)):
        if k % 50 == 7:
            for bad in (np.nan, np.inf, 1e9):
                wrong = tau[k].copy()
                wrong[k % 7] = bad
                one = dirty.update(t[k] - 1e-3, q[k], v[k], wrong)
                refused += bool(one.rejected and one.rejected[0].startswith("sample: ")) and not one.fresh
            dirty.update(t[k] - 1e-3, q[k] * np.nan, v[k], tau[k])
            dirty.update(np.nan, q[k], v[k], tau[k])
            dirty.update(t[k] - 1.0, q[k], v[k], tau[k])
            dirty.update(t[k] - 1e-3, q[k][:3], v[k], tau[k])
        found = dirty.update(t[k], q[k], v[k], tau[k])
    assert refused == 3 * len(range(7, len(t), 50))
    assert found.mass == expected.mass and (found.friction == expected.friction).all()


def test_friction_that_drifts_is_followed() -> None:
    tree = arm("ur10e")
    t, q, v, a = motion("ur10e", 60.0, 100.0, 2)
    warm = np.interp(t, [10.0, 40.0], [1.0, 1.5])[:, None]
    tau = ReferenceDynamics(tree).inverse_dynamics(q, v, a) + warm * (tree.friction * np.sign(v) + tree.damping * v)
    found = run(OnlineEstimator(tree, OnlineSettings(friction_memory=5.0)), t, q, v, tau)[-1]
    assert np.abs(found.friction[:, 0] / tree.friction / 1.5 - 1).max() < 0.05
    assert found.mass < 0.1


@pytest.mark.parametrize("kind", ["noise", "spikes", "constant"])
def test_nonsense_leaves_estimates_bounded_and_reports_what_it_held_back(kind: str) -> None:
    rng, settings = np.random.default_rng(0), OnlineSettings(mass_limit=5.0, reach_limit=0.3)
    estimator, held = OnlineEstimator(arm("panda"), settings), set()
    for k in range(2000):
        v = rng.uniform(-15, 15, 7) if kind == "noise" else np.sin(np.arange(7) + k / 20)
        size = {"noise": 900 * rng.uniform(-1, 1, 7), "spikes": 900 * (k % 17 == 0) * np.ones(7), "constant": -900 * np.ones(7)}[
            kind
        ]
        one = estimator.update(k / RATE, rng.uniform(-3, 3, 7) if kind == "noise" else v, v, size)
        held |= set(one.rejected)
        assert np.isfinite(one.friction).all() and np.isfinite(one.com).all() and 0 < one.mass_error <= 3.0
        assert 0 <= one.mass <= 5.0 and (np.abs(one.com) <= 0.3 + 1e-9).all()
        assert (one.friction[:, :2] >= 0).all() and (np.abs(one.friction) <= settings.friction_limit).all()
        assert np.isfinite(one.tree(arm("panda")).mass).all()
    assert held & {"mass", "com x", "com y", "com z"} and not any(name.startswith("sample") for name in held)


def test_the_filter_keeps_slopes_at_uneven_stamps() -> None:
    rng, filtered, t = np.random.default_rng(0), _Filter(8.0), 0.0
    for k in range(400):
        dt = rng.uniform(2e-3, 8e-3)
        t += dt
        x, slope = filtered.step(np.array([1.0 + 2.0 * t]), dt, k == 0)
    # A ramp comes out with the group delay, sqrt(2) / w.
    np.testing.assert_allclose(x, 1.0 + 2.0 * (t - np.sqrt(2) / (2 * np.pi * 8.0)), atol=1e-6)
    np.testing.assert_allclose(slope, 2.0, atol=1e-6)


def test_settings_that_cannot_be_and_joints_there_are_not() -> None:
    with pytest.raises(CalibrationError, match="positive spreads"):
        OnlineEstimator(arm("panda"), OnlineSettings(mass_spread=0.0))
    with pytest.raises(CalibrationError, match="finite friction"):
        OnlineEstimator(replace(arm("panda"), friction=np.full(7, np.nan)))
    with pytest.raises(CalibrationError, match="no such joint"):
        OnlineEstimator(arm("panda"), joint="joint99")

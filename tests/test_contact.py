"""The momentum observer on a simulated Panda: it feels what pushes the arm, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import mujoco
import numpy as np
import pinocchio as pin
import pytest

from mbctrl.base.errors import DriverError
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.runtime.clock import LockstepClock
from mbctrl.runtime.contact import Contact, ContactObserver, ContactSettings
from mbctrl.runtime.driver import JointCommand
from mbctrl.sim.driver import SimDriver

THRESHOLDS = [1.5, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0]  # [N·m] friction turning round is the largest error of the model
PUSH = np.array([6.0, 0.0, -8.0])  # [N], 10 N
START = 1.0  # [s]


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("panda")


def functions(model: Model) -> tuple[Callable, Callable]:
    """Return momentum M v and beta = C^T v - g - friction of the Panda, by Pinocchio."""
    reference, tree = ReferenceDynamics(model.tree), model.tree

    def momentum(q: np.ndarray, v: np.ndarray) -> np.ndarray:
        return reference.mass_matrix(q) @ v

    def beta(q: np.ndarray, v: np.ndarray) -> np.ndarray:
        coriolis = pin.computeCoriolisMatrix(reference.model, reference.data, q - tree.reference, v)
        friction = tree.damping * v + tree.friction * np.tanh(v / 5e-3)
        return coriolis.T @ v - reference.gravity(q) - friction

    return momentum, beta


def simulate(
    model: Model, observer: ContactObserver, seconds: float, push: np.ndarray, frequency: float
) -> tuple[list[Contact], np.ndarray]:
    """Swing the arm, push its tool from START on; return what was felt and the true external torque (T, 7)."""
    clock, robot = LockstepClock(), model.robot
    driver = SimDriver(model.mj, robot, clock)
    driver.open()
    data, site = driver.data, driver.model.site(robot.tool).id
    body, jacobian = driver.model.site_bodyid[site], np.zeros((3, 7))
    home, gains = np.array(robot.home), (np.array(robot.control.stiffness), np.array(robot.control.damping))
    way, w = np.array([1, 0.5, -1, 0.6, 1, 0.7, -1]) * 0.3, 2 * np.pi * frequency
    felt, true = [], []
    for k in range(int(seconds * robot.control.rate)):
        clock.wait_until(k / robot.control.rate)
        state = driver.read()
        felt.append(observer(state.stamp, state.q, state.v, state.tau))
        mujoco.mj_jacSite(driver.model, data, jacobian, None, site)
        force = push if state.stamp >= START else np.zeros(3)
        true.append(jacobian.T @ force)
        data.xfrc_applied[body] = [*force, *np.cross(data.site_xpos[site] - data.xipos[body], force)]
        t = state.stamp
        driver.write(JointCommand(home + way * (1 - np.cos(w * t)), way * w * np.sin(w * t), *gains, np.zeros(7)))
    return felt, np.array(true)


def test_free_motion_is_no_contact(model: Model) -> None:
    observer = ContactObserver(THRESHOLDS, *functions(model))
    felt, _ = simulate(model, observer, 20.0, np.zeros(3), 0.4)
    assert not any(felt)
    residual = np.abs([contact.torque for contact in felt])
    assert (residual.max(0) < 0.9 * np.array(THRESHOLDS)).all(), residual.max(0)


def test_a_push_is_felt_soon_and_measured_right(model: Model) -> None:
    observer = ContactObserver(THRESHOLDS, *functions(model))
    felt, true = simulate(model, observer, 2.0, PUSH, 0.1)
    first = next(k for k, contact in enumerate(felt) if contact) / model.robot.control.rate
    assert START < first < START + 0.03
    settled = slice(int(1.2 * model.robot.control.rate), None)
    error = np.linalg.norm(np.array([contact.torque for contact in felt])[settled] - true[settled], axis=1)
    assert (error <= 0.1 * np.linalg.norm(true[settled], axis=1)).all(), (error.max(), np.linalg.norm(true[settled], axis=1).min())


def test_a_push_below_the_thresholds_is_none(model: Model) -> None:
    observer = ContactObserver(THRESHOLDS, *functions(model))
    felt, _ = simulate(model, observer, 1.5, 0.05 * PUSH, 0.1)
    assert not any(felt)


def test_a_model_without_gravity_is_found_out(model: Model) -> None:
    momentum, beta = functions(model)
    gravity = ReferenceDynamics(model.tree).gravity
    observer = ContactObserver(THRESHOLDS, momentum, lambda q, v: beta(q, v) + gravity(q))
    felt, _ = simulate(model, observer, 0.5, np.zeros(3), 0.1)
    assert felt[-1]


# --- a single mass, by hand ---------------------------------------------------------------------------------------------


def mass(gain: float = 50.0, settle: float = 0.0, threshold: float = 1.0) -> ContactObserver:
    """An observer of 2 kg that slides without friction."""
    return ContactObserver([threshold], lambda q, v: 2 * v, lambda q, v: 0 * v, ContactSettings(gain, settle))


def slide(observer: ContactObserver, force: float, periods: int, dt: float = 0.001) -> list[Contact]:
    zero = np.zeros(1)
    return [observer(k * dt, zero, np.array([force / 2 * k * dt]), zero) for k in range(periods)]


@pytest.mark.parametrize("gain", [5.0, 50.0, 5000.0])
def test_the_estimate_is_the_force_through_a_low_pass_filter(gain: float) -> None:
    dt, felt = 0.001, slide(mass(gain), 3.0, 400)
    expected = 3.0 * (1 - (1 + gain * dt) ** -np.arange(400.0))
    np.testing.assert_allclose([contact.torque[0] for contact in felt], expected, rtol=0, atol=1e-9)


def test_it_is_the_momentum_observer_as_published() -> None:
    rng, dt, gain = np.random.default_rng(0), 0.001, 30.0
    v, tau, values = rng.normal(size=(3, 50))
    beta = iter(values)
    observer = ContactObserver([1.0], lambda q, v: 2 * v, lambda q, v: np.array([next(beta)]), ContactSettings(gain))
    residual, total = 0.0, 0.0
    for k in range(50):
        felt = observer(k * dt, np.zeros(1), v[k : k + 1], tau[k : k + 1])
        if k:  # r = gain (p - p(0) - sum of dt (tau + beta + r)), equation 11 of the paper, solved for the newest r
            total += dt * (tau[k] + (values[k] + values[k - 1]) / 2)
            residual = (gain * (2 * (v[k] - v[0]) - total)) / (1 + gain * dt)
            total += dt * residual
        np.testing.assert_allclose(felt.torque, [residual], rtol=0, atol=1e-9)


@pytest.mark.parametrize("force", [3.0, -3.0])
def test_a_push_counts_either_way(force: float) -> None:
    assert slide(mass(), force, 400)[-1].joints == (0,)


def test_a_contact_has_to_last() -> None:
    felt = slide(mass(gain=1e6, settle=0.01), 3.0, 20)
    assert [bool(contact) for contact in felt] == [False] * 10 + [True] * 10
    assert felt[-1].joints == (0,)


def test_a_measurement_seen_twice_is_counted_once() -> None:
    observer = mass(gain=1e6, settle=0.01)
    zero = np.zeros(1)
    for k in range(5):
        for _ in range(10):
            felt = observer(0.001 * k, zero, np.array([1.5e-3 * k]), zero)
    assert not felt and observer.torque[0] > 2.9


def test_after_a_reset_nothing_is_felt() -> None:
    observer = mass()
    assert slide(observer, 30.0, 400)[-1]
    observer.reset()
    assert not observer(7.0, np.zeros(1), np.zeros(1), np.zeros(1)) and not observer.torque.any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_torque_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(DriverError, match="finite"):
        mass()(0.0, np.zeros(1), np.zeros(1), np.array([value]))


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan])
def test_a_threshold_must_be_above_zero(threshold: float) -> None:
    with pytest.raises(DriverError, match="thresholds"):
        mass(threshold=threshold)

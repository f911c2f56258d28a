"""The regressor route: signals, friction, estimates, intervals and physically consistent fits, against known truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mbctrl.calibrate.choose import choose
from mbctrl.calibrate.feasible import Restrictions, compressed, descend, fit_feasible, objective
from mbctrl.calibrate.friction import Friction, families
from mbctrl.calibrate.identify import Fit, Identification
from mbctrl.calibrate.inertia import (
    cholesky_jacobian,
    divergence,
    feasible,
    from_cholesky,
    parameters,
    proper,
    pseudo_inertia,
    to_cholesky,
)
from mbctrl.calibrate.recipe import FilterSpec, FitSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.regression import (
    Columns,
    Grams,
    Motion,
    Regression,
    bootstrap,
    grams,
    huber,
    instrumental,
    regress,
    solve,
    squares,
    weighted,
)
from mbctrl.calibrate.signals import CalibrationError, prepare
from mbctrl.calibrate.validate import validate_on
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters, with_links
from mbctrl.dynamics.tree import RigidTree

MODELS: dict[str, Model] = {}
PLAIN = {"friction": {"memory": "tanh"}}


def model_of(name: str) -> Model:
    if name not in MODELS:
        MODELS[name] = load_model(name)
    return MODELS[name]


def heavier(tree: RigidTree, seed: int = 1) -> RigidTree:
    """Return an arm unlike the model file's, of bodies that could exist."""
    rng = np.random.default_rng(seed)
    theta = np.stack([to_cholesky(link) for link in proper(link_parameters(tree))])
    theta[:, 0] += rng.uniform(0.05, 0.15, tree.n)  # scale: masses 10 to 35 % up
    theta[:, 4:] *= rng.uniform(0.9, 1.1, (tree.n, 6))
    links = np.stack([from_cholesky(row) for row in theta])
    return replace(with_links(tree, links), armature=tree.armature * 1.3 + 0.05)


def motion_of(tree: RigidTree, seconds: float, rate: float, seed: int) -> tuple[np.ndarray, ...]:
    """Return t and q, v, a of sums of sines, every joint on the move."""
    rng, t = np.random.default_rng(seed), np.arange(0, seconds, 1 / rate)
    q = v = a = np.zeros((len(t), tree.n))
    for harmonic in range(1, 6):
        w = 2 * np.pi * 0.1 * harmonic * rng.uniform(0.9, 1.1, tree.n)
        size, phase = rng.uniform(0.15, 0.4, tree.n), rng.uniform(0, 2 * np.pi, tree.n)
        angle = t[:, None] * w + phase
        q, v, a = q + size * np.sin(angle), v + size * w * np.cos(angle), a - size * w**2 * np.sin(angle)
    return t, q, v, a


def log_of(
    tree: RigidTree,
    family: Friction,
    coefficients: np.ndarray,
    *,
    seconds: float = 20.0,
    rate: float = 200.0,
    seed: int = 0,
    noise: float = 0.01,
) -> Recording:
    """Return what an arm with that friction (n, F) logs; ``noise`` of a torque is a share of its rms."""
    t, q, v, a = motion_of(tree, seconds, rate, seed)
    reference = ReferenceDynamics(tree)
    rigid = reference.regressor(q, v, a) @ link_parameters(tree).ravel()
    terms = family.columns(v, family.direction(t, v), rigid)
    torque = rigid + a * tree.armature + np.einsum("tnf,nf->tn", terms, coefficients)
    rng = np.random.default_rng(seed + 1000)
    torque = torque + noise * np.sqrt((torque**2).mean(0)) * rng.normal(size=torque.shape)
    counts = 2 * np.pi / 2**19
    return Recording(tree.joints, t, np.round(q / counts) * counts, torque, v + 1e-4 * rng.normal(size=v.shape), file="made up")


def fitted(model: Model, *recordings: Recording, **spec: object) -> tuple[Fit, Identification, list[Motion]]:
    one = Identification(model, FitSpec.model_validate({**PLAIN, "draws": 60, **spec}))
    motions = [one.motion(prepare(recording, FilterSpec(motion=15.0))) for recording in recordings]
    return one.fit(motions), one, motions


def friction_of(tree: RigidTree, scale: float = 1.0) -> np.ndarray:
    """Return Coulomb, viscous and offset of each joint."""
    n = tree.n
    size = np.linspace(1.0, 0.3, n) * scale
    return np.stack([size, 0.8 * size, 0.1 * size], 1)


# --- signals ----------------------------------------------------------------------------------------------------------


def test_filters_keep_motion_and_take_vibration_away() -> None:
    t = np.arange(0, 10, 0.002)
    slow, fast = np.sin(2 * np.pi * 1.0 * t), 0.3 * np.sin(2 * np.pi * 60.0 * t)
    one = prepare(Recording(("a",), t, (slow + fast)[:, None], (slow + fast)[:, None]), FilterSpec())
    inside = slice(500, -500)
    np.testing.assert_allclose(one.q[inside, 0], slow[inside], atol=2e-3)
    np.testing.assert_allclose(one.v[inside, 0], 2 * np.pi * np.cos(2 * np.pi * t)[inside], atol=2e-2)
    np.testing.assert_allclose(one.a[inside, 0], -((2 * np.pi) ** 2) * slow[inside], atol=0.2)
    np.testing.assert_allclose(one.effort[inside, 0], slow[inside], atol=2e-3)
    assert (one.motion, round(one.cutoff, 3)) == (7.0, 9.333) and np.array_equal(one.measured[:, 0], slow + fast)


def test_uneven_stamps_are_resampled() -> None:
    rng = np.random.default_rng(0)
    t = np.cumsum(0.01 * rng.uniform(0.3, 1.7, 3000))
    one = prepare(Recording(("a",), t, np.sin(t)[:, None], np.cos(t)[:, None]), FilterSpec())
    assert np.ptp(np.diff(one.t)) < 1e-9
    inside = slice(200, -200)
    np.testing.assert_allclose(one.v[inside, 0], np.cos(one.t)[inside], atol=2e-3)


def test_standstill_and_gaps_are_not_fitted() -> None:
    t = np.arange(0, 12, 0.01)
    q = np.where(t < 4, np.sin(t), np.where(t < 8, np.sin(4.0), np.sin(t - 4)))
    one = prepare(Recording(("a",), t, q[:, None], q[:, None], parts=((0, 1000), (1005, 1010), (1010, 1200))), FilterSpec())
    assert one.parts == ((0, 1000), (1010, 1200)) and not one.moving[1001:1009].any()
    assert one.moving[50:380].all() and not one.moving[430:770].any() and one.moving[850:1000].all()


def test_a_recording_too_short_or_a_filter_too_wide_is_refused() -> None:
    t = np.arange(0, 0.2, 0.01)
    with pytest.raises(CalibrationError, match="too short"):
        prepare(Recording(("a",), t, t[:, None], t[:, None], file="x.csv"), FilterSpec())
    t = np.arange(0, 20, 0.01)
    with pytest.raises(CalibrationError, match=r"x\.csv: filter.motion: 60 Hz is not below half the sampling rate, 50 Hz"):
        prepare(Recording(("a",), t, t[:, None], t[:, None], file="x.csv"), FilterSpec(motion=60.0))


# --- friction ---------------------------------------------------------------------------------------------------------


def test_a_dahl_direction_turns_over_its_length() -> None:
    t, length = np.arange(0, 2, 1e-3), 1e-2
    v = np.where(t < 1, 0.1, -0.1)[:, None]
    z = Friction(memory="dahl", length=length).direction(t, v)
    back = 0.1 * (t[1100] - t[1000] + 1e-3)
    assert z[999, 0] == pytest.approx(1.0) and z[1100, 0] == pytest.approx(-1 + 2 * np.exp(-back / length), abs=2e-2)
    assert z[-1, 0] == pytest.approx(-1.0, abs=1e-3)
    held = Friction(memory="dahl", length=length).direction(t, np.where(t[:, None] < 1, v, 0.0))
    assert held[1000:] == pytest.approx(held[999, 0])  # no motion, no change


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_every_family_opposes_motion_where_it_says_so(family: Friction) -> None:
    rng = np.random.default_rng(0)
    v = np.array([0.0, 0.1, 1.0])
    own = np.abs(rng.normal(size=len(family.terms)))
    assert (family.opposing(v, 2.0) @ own >= 0).all()
    columns = family.columns(v[:, None], np.ones((3, 1)), np.full((3, 1), 2.0))[:, 0]
    backwards = family.columns(-v[:, None], -np.ones((3, 1)), np.full((3, 1), 2.0))[:, 0]
    odd = [k for k, term in enumerate(family.terms) if term not in ("offset", "asymmetric")]
    np.testing.assert_allclose(columns[:, odd], -backwards[:, odd])


@pytest.mark.parametrize(
    ("truth", "more"),
    [(Friction(memory="dahl", length=2e-4), []), (Friction(("coulomb", "viscous", "offset", "load"), "tanh"), [0.08])],
)
def test_cross_validation_finds_the_family(truth: Friction, more: list[float]) -> None:
    model = model_of("arm2")
    own = np.concatenate([friction_of(model.tree), np.full((2, len(more)), 0.0) + np.array(more)], 1)
    one = Identification(model, FitSpec())
    motion = one.motion(prepare(log_of(model.tree, truth, own, noise=0.002, rate=100.0), FilterSpec(motion=15.0)))
    best = choose([motion], families(), one.base.columns)[0].friction
    assert best.memory == truth.memory and set(truth.terms) <= set(best.terms)
    assert truth.memory != "dahl" or best.length == truth.length


# --- regression -------------------------------------------------------------------------------------------------------


def made_up(seed: int = 0, steps: int = 600, noise: float = 0.1) -> tuple[Regression, np.ndarray]:
    """Return random equations of two joints and the truth."""
    rng = np.random.default_rng(seed)
    columns = Columns(2, Friction())
    W, truth = rng.normal(size=(steps, 2, columns.count)), rng.normal(size=columns.count)
    tau = W @ truth + noise * np.array([1.0, 5.0]) * rng.normal(size=(steps, 2))
    return Regression(columns, W, tau, np.ones((steps, 2), bool), np.arange(steps) // 20), truth


def test_gram_matrices_give_the_weighted_least_squares_of_the_rows() -> None:
    one, _ = made_up()
    x, sd = weighted(grams(one))
    rows, tau = (one.W / sd[:, None]).reshape(-1, one.columns.count), (one.tau / sd).ravel()
    np.testing.assert_allclose(x, np.linalg.lstsq(rows, tau, rcond=None)[0], atol=1e-10)
    np.testing.assert_allclose(squares(grams(one), x).sum(0), ((one.tau - one.W @ x) ** 2).sum(0), rtol=1e-8)
    assert sd == pytest.approx([0.1, 0.5], rel=0.1)


def test_intervals_of_independent_noise_are_the_textbooks() -> None:
    one, _ = made_up(steps=4000)
    data = grams(one)
    _, sd = weighted(data)
    found = bootstrap(data, sd, 300)
    rows = (one.W / sd[:, None]).reshape(-1, one.columns.count)
    expected = np.sqrt(np.diag(np.linalg.inv(rows.T @ rows)))
    assert np.sqrt(np.diag(found)) / expected == pytest.approx(1.0, abs=0.25)


def test_intervals_of_coloured_noise_cover_the_truth() -> None:
    inside = []
    for seed in range(40):
        one, truth = made_up(seed, steps=1200, noise=0.0)
        rng = np.random.default_rng(seed + 99)
        W = np.repeat(one.W[::20], 20, 0)  # slow columns, slow noise: 60 independent stretches
        tau = W @ truth + np.repeat(rng.normal(size=(60, 2)), 20, 0)
        data = grams(replace(one, W=W, tau=tau))
        x, sd = weighted(data)
        inside.append(np.abs(x - truth) < 1.96 * np.sqrt(np.diag(bootstrap(data, sd, 100, seed))))
        plain = np.sqrt(np.diag(np.linalg.inv(np.einsum("bnpq,n->pq", data.G, 1 / sd**2))))
        assert (np.sqrt(np.diag(bootstrap(data, sd, 100, seed))) > 2 * plain).mean() > 0.9
    assert 0.85 <= np.mean(inside) <= 0.99, np.mean(inside)


def test_huber_shrugs_off_outliers() -> None:
    one, truth = made_up()
    one.tau[::15] += 50.0
    columns = np.arange(one.columns.count)
    robust, plain = huber(one, columns)[0], weighted(grams(one))[0]
    assert np.abs(robust - truth).max() < 0.15 < np.abs(plain - truth).max()


def test_instruments_take_away_the_bias_of_noisy_columns() -> None:
    one, truth = made_up(steps=20000, noise=0.01)
    noisy = replace(one, W=one.W + 0.5 * np.random.default_rng(1).normal(size=one.W.shape))
    columns, sd = np.arange(one.columns.count), np.array([1.0, 1.0])
    found, plain = instrumental(noisy, one.W, columns, sd), solve(grams(noisy), sd)
    assert np.abs(found - truth).max() < 0.06 and np.abs(plain - truth).max() > 0.2


def test_what_the_data_do_not_decide_stays_small() -> None:
    one, _ = made_up()
    W = one.W.copy()
    W[:, :, 1] = W[:, :, 0]
    x = solve(grams(replace(one, W=W)), np.ones(2))
    assert np.isfinite(x).all() and x[0] == pytest.approx(x[1])


# --- inertia ----------------------------------------------------------------------------------------------------------


def test_pseudo_inertia_of_a_box_is_its_second_moment() -> None:
    m, size, com = 3.0, np.array([0.2, 0.3, 0.4]), np.array([0.1, -0.2, 0.3])
    second = m / 12 * np.diag(size**2) + m * np.outer(com, com)
    inertia = np.trace(second) * np.eye(3) - second
    link = np.array([m, *(m * com), inertia[0, 0], inertia[0, 1], inertia[1, 1], inertia[0, 2], inertia[1, 2], inertia[2, 2]])
    np.testing.assert_allclose(pseudo_inertia(link), np.block([[second, m * com[:, None]], [m * com, m]]), atol=1e-15)
    np.testing.assert_allclose(parameters(pseudo_inertia(link)), link, atol=1e-15)
    assert feasible(link)
    impossible = link.copy()
    impossible[4] *= 3  # more about x than about y and z together
    assert not feasible(impossible) and not feasible(-link)


@pytest.mark.parametrize("seed", range(5))
def test_log_cholesky_parameters_are_feasible_and_invert(seed: int) -> None:
    theta = np.random.default_rng(seed).normal(size=10)
    link = from_cholesky(theta)
    assert feasible(link)
    np.testing.assert_allclose(to_cholesky(link), theta, atol=1e-9)
    steps = [(from_cholesky(theta + 1e-6 * e) - from_cholesky(theta - 1e-6 * e)) / 2e-6 for e in np.eye(10)]
    np.testing.assert_allclose(cholesky_jacobian(theta), np.stack(steps, 1), atol=1e-5 * np.abs(link).max())


def test_divergence_is_nought_for_equals_only() -> None:
    a, b = (from_cholesky(np.random.default_rng(seed).normal(size=10) * 0.3) for seed in (0, 1))
    assert divergence(a, a) == pytest.approx(0, abs=1e-12) and divergence(a, b) > 0.01


def test_priors_without_size_or_mass_become_bodies() -> None:
    links = np.zeros((3, 10))
    links[0, 0] = 2.0  # a point
    links[1] = from_cholesky(np.zeros(10))
    assert feasible(proper(links)).all()
    np.testing.assert_allclose(proper(links)[1], links[1], atol=1e-12)
    assert proper(links)[0, 0] == 2.0


# --- physically consistent fits ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> tuple[Grams, Columns, np.ndarray, np.ndarray, np.ndarray]:
    """Return a UR10e's Gram matrices, columns, joint sds, prior and the truth's links."""
    model = model_of("ur10e")
    truth = heavier(model.tree)
    one = prepare(log_of(truth, Friction(memory="tanh"), friction_of(truth, 5.0)), FilterSpec(motion=15.0))
    regression = regress([Motion(one, ReferenceDynamics(model.tree))], Friction(memory="tanh"))
    data = grams(regression)
    return data, regression.columns, weighted(data)[1], proper(link_parameters(model.tree)), link_parameters(truth)


SPEEDS = np.array([0.0, 0.1, 1.0])


def test_both_routes_reach_the_same_arm(problem: tuple) -> None:
    data, columns, sd, prior, _ = problem
    x = fit_feasible(data, columns, sd, prior, SPEEDS, np.ones(6))
    other = descend(data, columns, sd, prior)
    R, y, _ = compressed(data, sd)
    a, b = (objective(one, R, y, columns.n, prior, 1e-3) for one in (x, other))
    assert a == pytest.approx(b, rel=1e-3)
    np.testing.assert_allclose(other[:60], x[:60], atol=2e-3 * np.abs(x[:60]).max())
    assert feasible(x[:60].reshape(6, 10)).all() and feasible(other[:60].reshape(6, 10)).all()


def test_restrictions_hold(problem: tuple) -> None:
    data, columns, sd, prior, _ = problem
    limits = Restrictions(fixed={61: 0.7}, priors={10: (20.0, 1e-3)}, bounds={60: (2.0, None), 20: (None, 3.0)})
    x = fit_feasible(data, columns, sd, prior, SPEEDS, np.ones(6), limits)
    assert x[61] == pytest.approx(0.7, abs=1e-5) and x[10] == pytest.approx(20.0, abs=0.05)
    assert x[60] >= 2.0 - 1e-5 and x[20] <= 3.0 + 1e-5


def test_contradicting_restrictions_are_refused(problem: tuple) -> None:
    data, columns, sd, prior, _ = problem
    with pytest.raises(CalibrationError, match="no physically consistent fit"):
        fit_feasible(data, columns, sd, prior, SPEEDS, np.ones(6), Restrictions(fixed={0: -1.0}))


def test_an_arm_that_could_not_exist_is_never_returned() -> None:
    model = model_of("arm2")
    rng = np.random.default_rng(0)
    recording = log_of(model.tree, Friction(memory="tanh"), -friction_of(model.tree), seconds=6.0)  # friction that pushes
    recording = replace(recording, effort=recording.effort + 3 * rng.normal(size=recording.effort.shape))
    fit, _, _ = fitted(model, recording)
    assert feasible(fit.links).all() and (fit.tree.armature >= 0).all()
    assert (fit.tree.friction >= 0).all() and (fit.tree.damping >= 0).all()
    assert min(fit.unconstrained[fit.columns.friction_of(0)][:2]) < 0  # least squares alone would have pushed


# --- the whole route --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arm2", "panda", "ur10e"])
def test_a_known_arm_is_recovered(name: str) -> None:
    model = model_of(name)
    truth = heavier(model.tree)
    own = friction_of(truth, 3.0)
    fit, one, _ = fitted(model, log_of(truth, Friction(memory="tanh"), own, seconds=40.0))
    expected = one.base.from_full(np.concatenate([link_parameters(truth).ravel(), truth.armature]))
    e, b = fit.estimates, one.base.count
    off = np.abs(e.value[:b] - expected) / e.se[:b]
    assert np.mean(off < 3) >= 0.95 and off.max() < 6, off.max()
    found = fit.x[11 * truth.n :].reshape(truth.n, 3)
    assert found[:, :2] == pytest.approx(own[:, :2], rel=0.02)
    assert feasible(fit.links).all()
    np.testing.assert_allclose(fit.tree.friction, own[:, 0], rtol=0.03)


@pytest.mark.parametrize("late", [0.0, 0.004, -0.011])
def test_a_delay_is_found_to_the_millisecond(late: float) -> None:
    model = model_of("ur10e")
    truth, family = heavier(model.tree), Friction(memory="tanh")
    log = log_of(truth, family, friction_of(truth, 5.0), seconds=20.0, rate=125.0)
    shifted = np.stack([np.interp(log.t - late, log.t, column) for column in log.effort.T], 1)
    fit, _, _ = fitted(model, replace(log, effort=shifted))
    assert fit.delay == pytest.approx(late, abs=1e-3)


def test_encoder_offsets_are_found_or_not_claimed() -> None:
    model = model_of("ur10e")
    truth, off = heavier(model.tree), np.array([0.03, 0.02, -0.015, 0.01, 0.02, 0.0])
    log = log_of(truth, Friction(memory="tanh"), friction_of(truth, 3.0), seconds=40.0)
    fit, one, motions = fitted(model, replace(log, q=log.q + off))
    found = one.encoders(motions, fit)
    assert not np.isfinite(found.value[[0, 5]]).any()  # about the vertical, and a wrist that carries nothing
    assert (np.abs(found.value - off) < 4 * found.se)[[1, 2, 3]].all() and (found.se[[1, 2, 3]] < 3e-3).all()
    again = one.fit(one.rezeroed(motions, found))
    assert (again.sd < 1.001 * fit.sd).all()


def test_another_motion_is_predicted_where_the_model_file_is_not() -> None:
    model = model_of("ur10e")
    truth, family = heavier(model.tree), Friction(memory="tanh")
    fit, one, motions = fitted(model, log_of(truth, family, friction_of(truth, 5.0), seconds=40.0))
    other = one.motion(prepare(log_of(truth, family, friction_of(truth, 5.0), seed=7), FilterSpec(motion=15.0)))
    seen = validate_on(fit, other, motions)
    assert seen.fit.relative.max() < 1.3 * seen.fit.floor.max() < seen.prior.relative.min()
    assert seen.after.total[1] < 0.2 * seen.before.total[1] and seen.after.total[1] < 5e-3
    assert seen.extrapolation < 3
    still = log_of(truth, family, friction_of(truth, 5.0), seed=7)
    narrow = replace(still, q=0.02 * still.q, v=0.02 * still.v)
    assert validate_on(fit, one.motion(prepare(narrow, FilterSpec())), motions).extrapolation < 1
    trained_narrow = one.motion(prepare(narrow, FilterSpec(motion=15.0)))
    assert validate_on(fit, other, [trained_narrow]).extrapolation > 5


def test_parameters_can_be_held_and_must_be_known() -> None:
    model = model_of("ur10e")
    truth = heavier(model.tree)
    log = log_of(truth, Friction(memory="tanh"), friction_of(truth, 5.0))
    armature = {f"{joint}.armature": {"fixed": float(value)} for joint, value in zip(truth.joints, truth.armature)}
    fit, _, _ = fitted(model, log, parameters=armature)
    assert fit.tree.armature == pytest.approx(truth.armature, abs=1e-5)
    assert not any(name.endswith(".armature") for name in fit.estimates.names)
    fit, _, _ = fitted(model, log, links=False)
    np.testing.assert_allclose(fit.links, proper(link_parameters(model.tree)), atol=1e-5)
    with pytest.raises(CalibrationError, match=r"fit\.parameters\.elbow\.armature: no such parameter; did you mean 'elbow_joint"):
        fitted(model, log, parameters={"elbow.armature": {"fixed": 1.0}})


def test_a_free_parameter_without_influence_is_refused_by_name() -> None:
    model = model_of("ur10e")
    log = log_of(model.tree, Friction(memory="tanh"), friction_of(model.tree))
    with pytest.raises(CalibrationError, match=r"shoulder_pan_joint\.m: free, but without influence"):
        fitted(model, log, parameters={"shoulder_pan_joint.m": {"free": True}})


def test_what_the_log_does_not_say_stays_the_models() -> None:
    model = model_of("ur10e")
    truth = heavier(model.tree)
    fit, one, _ = fitted(model, log_of(truth, Friction(memory="tanh"), friction_of(truth, 5.0)))
    prior = proper(link_parameters(model.tree))
    assert (fit.known[:9] < 0.05).all()  # of the first link only Izz could ever show
    np.testing.assert_allclose(fit.links[0][:4], prior[0][:4], rtol=0.02, atol=1e-3)
    assert fit.warnings and "not identified" in fit.warnings[0]
    assert fit.known[fit.columns.armature].sum() >= 4

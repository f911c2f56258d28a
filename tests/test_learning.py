"""Training: a peg that touches a spring and damper, whose motion is known; noise whose size is known; and what must not happen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peg import DT, FLOOR, GRAVITY, MASS, RADIUS, TOUCH, peg, plays, truth

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.spec import validate
from mbctrl.cli.session import Session
from mbctrl.dynamics.contact import SEEN_OF_CONTACT
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual
from mbctrl.learning.ensemble import Ensemble
from mbctrl.learning.evaluate import HORIZONS, KINDS, coverage, open_loop, windows_of
from mbctrl.learning.fit import (
    LEAST,
    Fitted,
    LearningError,
    Normalisers,
    drawing,
    explained,
    fit,
    misses,
    unexplained,
)
from mbctrl.learning.recipe import LearningRecipe, load_learning_recipe
from mbctrl.learning.runs import from_run, source_of
from mbctrl.learning.samples import Samples, analytic_model, learned_model, samples_of
from mbctrl.learning.transitions import TransitionError, Transitions, concatenate, cut, made, split

SMALL = {"hidden": (32, 32), "members": 3}


pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of(**changes: Any) -> LearningRecipe:
    data: dict[str, Any] = {
        "robot": "peg",
        "dt": DT,
        "integrator": "leapfrog",
        "surfaces": (FLOOR,),
        "near": 0.005,
        "far": 0.02,
        "network": SMALL,
        "training": {"epochs": 60, "patience": 20, "batch": 128},
    }
    return LearningRecipe.model_validate({**data, **changes})


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return peg(tmp_path_factory.mktemp("peg"))


@pytest.fixture(scope="module")
def parts(arm: Model) -> list[Transitions]:
    return list(split(plays(arm, 14), (0.15, 0.2), seed=0))


@pytest.fixture(scope="module")
def gated(arm: Model, parts: list[Transitions]) -> tuple[Fitted, HybridDynamics]:
    recipe = recipe_of()
    fitted = fit(samples_of(parts[0], arm, recipe), samples_of(parts[1], arm, recipe), arm, recipe)
    return fitted, learned_model(arm, fitted.residual)


def test_the_truth_is_the_equation_of_motion() -> None:
    """By ten thousand small explicit steps."""
    z, v = 0.0125, -0.4
    for _ in range(10_000):
        depth = RADIUS - z
        a = 3.0 / MASS - GRAVITY + (2000.0 * depth - 30.0 * v if depth > 0 else 0.0)
        z, v = z + v * 2e-6, v + a * 2e-6
    found = truth(0.0125, -0.4, 3.0)
    # Contact begins within 0.1 ms of when it should, at 0.4 m/s: that is worth 40 µm at most.
    assert found[2] and abs(found[0] - z) < 2e-5 and abs(found[1] - v) < 2e-3


def test_beyond_the_gate_the_physics_is_exact_and_through_impacts_errors_stay_bounded(
    arm: Model, parts: list[Transitions], gated: tuple[Fitted, HybridDynamics]
) -> None:
    hybrid, physics = gated[1], analytic_model(arm, DT, "leapfrog")
    x = torch.tensor(np.stack([np.linspace(-0.02, 0.3, 400), np.linspace(-1, 1, 400)]))
    u = torch.linspace(-20, 20, 400, dtype=torch.float64)[None]
    far = (x[0] - RADIUS > 0.02) & (physics.step(x, u)[0] - RADIUS > 0.02)
    assert 100 < far.sum() < 400
    assert torch.equal(hybrid.step(x, u)[:, far], physics.step(x, u)[:, far])
    assert not torch.equal(hybrid.step(x, u)[:, ~far], physics.step(x, u)[:, ~far])
    windows = windows_of(parts[2])
    learned, nominal = (open_loop(name, model, windows, arm) for name, model in (("gated", hybrid), ("analytic", physics)))
    for step in (5, 10, 25):
        own, other = learned.summary(step, 1)[0][-1], nominal.summary(step, 1)[0][-1]
        print("impact", step, 1e3 * own, 1e3 * other)
        assert own[0] < 1e-3 and own[1] < 8e-3 and other[1] > 15e-3  # [m]
    assert nominal.summary(25, 0)[0][-1, 1] < 1e-9  # the nominal model is exact where nothing is touched
    assert learned.summary(10, 2)[0][-1, 1] < 1e-3 < 10e-3 < nominal.summary(10, 2)[0][-1, 0]


def test_the_law_of_a_contact_is_learnt_as_an_impulse(arm: Model, parts: list[Transitions]) -> None:
    """The floor's impulse in a step, known in closed form: what the speed changed by that gravity and the command did not do."""
    network = {**SMALL, "acts_on": "contact"}
    recipe = recipe_of(network=network, contact=TOUCH, surfaces=(), near=0.002, far=0.008, training={"epochs": 150, "batch": 64})
    training, held = (samples_of(part, arm, recipe) for part in parts[:2])
    torch.testing.assert_close(training.answers[:, 0], torch.tensor([0.0, 0.0, 1 / MASS]).expand(len(training), 3))
    fitted = fit(training, held, arm, recipe)
    assert fitted.residual.layers[0][0].shape[2] == SEEN_OF_CONTACT and len(fitted.residual.output_scale) == 3
    hybrid = learned_model(arm, fitted.residual)
    x, u = torch.from_numpy(parts[2].x.T.copy()), torch.from_numpy(parts[2].u.T.copy())
    impulse = MASS * (parts[2].x_next[:, 1] - parts[2].x[:, 1] - DT * (parts[2].u[:, 0] / MASS - GRAVITY))
    near = hybrid.step_gate(x, u).numpy() == 1
    off = np.abs(MASS * hybrid.missed(x, u).numpy()[0] - impulse)[near]
    print("impulse [N·s]", np.abs(impulse[near]).mean(), "off", np.median(off), np.quantile(off, 0.95))
    assert np.abs(impulse[near]).mean() > 0.03 and np.median(off) < 0.004 and np.quantile(off, 0.95) < 0.015
    windows = windows_of(parts[2])
    learned, nominal = (
        open_loop(name, model, windows, arm) for name, model in (("x", hybrid), ("y", analytic_model(arm, DT, "leapfrog")))
    )
    own, other = learned.summary(25, 1)[0][-1], nominal.summary(25, 1)[0][-1]
    print("impact", 1e3 * own, 1e3 * other)
    assert own[0] < 1e-3 and own[1] < 8e-3 and other[1] > 15e-3  # [m]
    found = coverage(hybrid, parts[2])
    print([(group.group, group.inside, group.count) for group in found])
    assert all(group.count > 50 and 0.78 <= group.inside[0] <= 1.0 for group in found)


def test_impulses_are_told_by_the_joints_that_tell_them_best() -> None:
    """Of two joints one is noisy: its noise is not taken for impulses, and is told as what no impulse explains."""
    rng, count = np.random.default_rng(0), 2000
    answers = torch.tensor(rng.normal(size=(count, 4, 3)), dtype=torch.float32)
    true = torch.tensor(rng.normal(size=(count, 3)), dtype=torch.float32)
    contact = np.arange(count) % 2 == 0
    true[~contact] = 0
    size = torch.tensor([0.001, 0.001, 0.001, 0.5])
    noise = size * torch.tensor(rng.normal(size=(count, 4)), dtype=torch.float32)
    ones = torch.ones(count)
    target = (answers * true[:, None]).sum(-1) + noise
    samples = Samples(torch.zeros(count, 2), target, ones, ones, np.zeros(count, int), contact, answers)
    scales = Normalisers.of(samples)
    off = (explained(samples, scales.noise) - true).abs().median()
    assert off < 0.05 < (explained(samples, torch.ones(4)) - true).abs().median()
    rest = unexplained(samples, scales.noise)
    np.testing.assert_allclose(rest[:, 3], 0.5, rtol=0.1)  # [rad/s]
    assert (rest[1, :3] < 0.02).all()


def test_members_differ_and_the_file_s_mean_is_theirs(gated: tuple[Fitted, HybridDynamics], parts: list[Transitions]) -> None:
    residual, hybrid = gated[0].residual, gated[1]
    x, u = torch.from_numpy(parts[2].x.T.copy()), torch.from_numpy(parts[2].u.T.copy())
    mean, variance = hybrid.members(x, u)
    apart = (mean[0] - mean[1]).abs().mean() / mean[0].abs().mean()
    assert mean.shape == (3, 1, len(parts[2])) and 1e-3 < apart < 1 and (variance > 0).all()
    torch.testing.assert_close(hybrid.missed(x, u), mean.mean(0))
    by_hand = predicted(residual, np.concatenate([parts[2].x, parts[2].u], 1))
    np.testing.assert_allclose(mean.numpy()[:, 0], by_hand[0][..., 0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(variance.numpy()[:, 0], by_hand[1][..., 0] * residual.spread.scale**2, rtol=1e-6)


def predicted(residual: Residual, inputs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return means and variances (E, T, nv) in numpy, straight from the file's numbers."""
    y = (inputs - residual.input_mean) / residual.input_scale
    for k, (w, b) in enumerate(residual.layers):
        y = y @ w.astype(float).transpose(0, 2, 1) + b[:, None]
        y = y / (1 + np.exp(-y)) if k < len(residual.layers) - 1 else y
    n = len(residual.output_scale)
    low, high = residual.spread.lowest, residual.spread.highest
    upper = high - np.logaddexp(0, high - y[..., n:])
    log = low + np.logaddexp(0, upper - low)
    return residual.output_scale * y[..., :n], residual.output_scale**2 * np.exp(log)


def test_intervals_of_the_peg_hold(gated: tuple[Fitted, HybridDynamics], parts: list[Transitions]) -> None:
    found = coverage(gated[1], parts[2])
    print([(group.group, group.inside, group.count) for group in found])
    assert [group.group for group in found] == ["near surfaces, free", "in contact"]
    assert all(group.count > 50 and 0.78 <= group.inside[0] <= 1.0 for group in found)


def noisy(count: int, seed: int, arm2: Model) -> Samples:
    """Return samples of two outputs whose noise grows twentyfold with an input."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (count, 3))
    noise = 0.02 + 0.4 * np.clip(x[:, :1], 0, 1)
    target = np.stack([np.sin(3 * x[:, 1]), x[:, 2] ** 2], 1) + noise * rng.normal(size=(count, 2))
    tensors = [torch.tensor(values, dtype=torch.float32) for values in (x, target, np.ones(count), np.ones(count))]
    return Samples(*tensors, np.arange(count) // 50, np.zeros(count, bool))


@pytest.fixture(scope="module")
def arm2() -> Model:
    return load_model("arm2")


@pytest.fixture(scope="module")
def heteroscedastic(arm2: Model) -> Fitted:
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), training={"epochs": 80, "batch": 128})
    return fit(noisy(2000, 0, arm2), noisy(500, 1, arm2), arm2, recipe)


def test_intervals_cover_noise_of_any_size(heteroscedastic: Fitted, arm2: Model) -> None:
    residual, test = heteroscedastic.residual, noisy(4000, 2, arm2)
    mean, variance = predicted(residual, test.inputs.numpy())
    total = residual.spread.scale * np.sqrt(variance.mean(0) + mean.var(0))
    inside = np.abs(test.target.numpy() - mean.mean(0)) <= 1.645 * total
    quiet, loud = test.inputs[:, 0].numpy() < 0, test.inputs[:, 0].numpy() > 0.5
    shares = {"all": inside.mean(0), "quiet": inside[quiet].mean(0), "loud": inside[loud].mean(0)}
    print(shares, total[loud].mean(0) / total[quiet].mean(0))
    for share in shares.values():
        assert (share >= 0.80).all() and (share <= 0.97).all()
    assert (total[loud].mean(0) > 5 * total[quiet].mean(0)).all()  # one width for all would cover on the whole, too


def test_normalisers_are_the_training_samples_(arm2: Model, heteroscedastic: Fitted) -> None:
    samples = noisy(2000, 0, arm2)
    np.testing.assert_allclose(heteroscedastic.residual.input_mean, samples.inputs.numpy().mean(0), atol=1e-6)
    np.testing.assert_allclose(heteroscedastic.residual.input_scale, samples.inputs.numpy().std(0), rtol=1e-5)
    root = np.sqrt((samples.target.numpy() ** 2).mean(0))  # of the targets as they are: no mean is subtracted
    np.testing.assert_allclose(heteroscedastic.residual.output_scale, root, rtol=1e-5)
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), training={"epochs": 2})
    held = noisy(500, 1, arm2)
    moved = replace(held, inputs=held.inputs + 100, target=held.target * 50)
    one, other = (fit(samples, each, arm2, recipe).residual for each in (held, moved))
    for name in ("input_mean", "input_scale", "output_scale"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_members_stop_by_what_was_held_out_and_keep_their_best(arm2: Model) -> None:
    """Targets that are noise alone: training loss falls, held-out loss rises, and the weights kept are those of the turn."""
    rng = np.random.default_rng(0)
    train, held = noisy(300, 0, arm2), noisy(300, 1, arm2)
    train, held = (replace(one, target=torch.tensor(rng.normal(size=(300, 2)), dtype=torch.float32)) for one in (train, held))
    network = {**SMALL, "variance": False}
    settings = {"epochs": 200, "patience": 15, "batch": 64}
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), network=network, training=settings)
    fitted = fit(train, held, arm2, recipe)
    losses = np.array([epoch.validation for epoch in fitted.history])
    active = np.array([epoch.active for epoch in fitted.history])
    best = np.where(active, losses, np.inf).min(0)
    assert len(fitted.history) < 150 and (losses[-1] > best).all()
    assert fitted.history[-1].training.mean() < fitted.history[1].training.mean()
    residual = fitted.residual
    y = (held.inputs.numpy() - residual.input_mean) / residual.input_scale
    for k, (w, b) in enumerate(residual.layers):
        y = y @ w.astype(float).transpose(0, 2, 1) + b[:, None]
        y = y / (1 + np.exp(-y)) if k < len(residual.layers) - 1 else y
    found = np.log(np.abs(held.target.numpy() / residual.output_scale - y).mean(1) + LEAST).mean(1)
    np.testing.assert_allclose(found, best, rtol=1e-4)
    np.testing.assert_allclose(fitted.history[-1].best, best, rtol=1e-6)


def test_an_output_that_never_moves_stays_and_decides_nothing(arm2: Model) -> None:
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), training={"epochs": 5, "batch": 128})
    train, held = (replace(one, target=one.target * torch.tensor([1.0, 0.0])) for one in (noisy(800, 0, arm2), noisy(300, 1, arm2)))
    mean, _ = predicted(fit(train, held, arm2, recipe).residual, held.inputs.numpy())
    assert np.abs(mean[..., 1]).max() < 1e-8 < np.abs(mean[..., 0]).max()
    nets = Ensemble(3, (8,), 2, 2, "silu", True, torch.Generator().manual_seed(0))
    with torch.no_grad():
        nets.weights[-1].zero_()  # no error at all where nothing is to be predicted
        found = misses(nets, held.inputs[None], held.target[None], held.gate[None])
    assert torch.isfinite(found).all()


def test_the_same_seed_trains_the_same_and_another_does_not(arm2: Model) -> None:
    made_of = []
    for seed in (0, 0, 1):
        recipe = recipe_of(robot="arm2", base="identity", surfaces=(), training={"epochs": 2, "seed": seed})
        made_of.append(fit(noisy(300, 0, arm2), noisy(100, 1, arm2), arm2, recipe).residual.layers[0][0])
    assert np.array_equal(made_of[0], made_of[1]) and not np.allclose(made_of[0], made_of[2])
    assert not np.allclose(made_of[0][0], made_of[0][1])


def test_each_member_draws_its_own_episodes_and_impacts_more_often() -> None:
    count = np.array([100, 100, 400])
    episode = np.repeat([7, 8, 30], count)
    draw = torch.ones(600)
    draw[:10] = 4.0
    plain = Samples(torch.zeros(600, 1), torch.zeros(600, 1), torch.ones(600), draw, episode, np.zeros(600, bool))
    chances = drawing(plain, 400, np.random.default_rng(0)).numpy()
    totals = np.stack([chances[:, episode == one].sum(1) for one in (7, 8, 30)], 1)
    times = totals / np.sqrt(count)
    np.testing.assert_allclose(times, np.round(times), atol=1e-9)  # drawn a whole number of times
    assert (np.round(times).sum(1) == 3).all() and (times == 0).any() and abs(times.mean() - 1) < 1e-9
    drawn = chances[times[:, 0] > 0]
    np.testing.assert_allclose(drawn[:, 0] / drawn[:, 50], 4.0)


def test_a_lipschitz_bound_holds(arm2: Model) -> None:
    network = {**SMALL, "lipschitz": 0.8}
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), network=network, training={"epochs": 8})
    samples = noisy(1000, 0, arm2)
    residual = fit(samples, noisy(200, 1, arm2), arm2, recipe).residual
    norms = [np.linalg.norm(w.astype(float), ord=2, axis=(1, 2)) for w, _ in residual.layers]
    assert np.prod(norms, 0).max() * 1.0999**2 <= 0.8 * (1 + 1e-5)
    a, b = (np.random.default_rng(k).normal(size=(5000, 3)) for k in (0, 1))
    b = a + 0.01 * b
    one, other = (
        predicted(residual, residual.input_mean + residual.input_scale * each)[0] / residual.output_scale for each in (a, b)
    )
    steepest = (np.linalg.norm(one - other, axis=-1) / np.linalg.norm(a - b, axis=1)).max()
    free = fit(
        samples,
        noisy(200, 1, arm2),
        arm2,
        recipe.model_copy(update={"network": recipe.network.model_copy(update={"lipschitz": None})}),
    )
    wild = (np.prod([np.linalg.norm(w, ord=2, axis=(1, 2)) for w, _ in free.residual.layers], 0)).max()
    assert 0.05 < steepest <= 0.8 < wild


def spinning(arm: Model, episodes: int, speed: float, seed: int, start: float = np.pi) -> Transitions:
    """Return a pendulum that turns round and round, by the analytic model."""
    rng, base = np.random.default_rng(seed), analytic_model(arm, 0.02)
    x = torch.tensor(np.stack([rng.uniform(-start, start, episodes), rng.uniform(0.5, 1, episodes) * speed]))
    states, commands = [x], []
    for _ in range(100):
        commands.append(torch.tensor(rng.uniform(-0.2, 0.2, (1, episodes))))
        states.append(base.step(states[-1], commands[-1]))
    every, u = torch.stack(states).numpy(), torch.stack(commands).numpy()
    flat = [np.moveaxis(values, 2, 0).reshape(-1, values.shape[1]) for values in (every[:-1], u, every[1:])]
    source = source_of(arm.robot, arm.tree.revolute, 0.02)
    return made(source, *flat, episode=np.repeat(np.arange(episodes), 100), t=np.tile(0.02 * np.arange(100), episodes))


def test_a_joint_that_turns_round_many_times_is_predicted_smoothly(tmp_path: Path) -> None:
    """With sines and cosines; angles as they are lead astray after a few turns."""
    xml = """<mujoco><worldbody><body><joint name="turn" axis="0 1 0"/><geom type="capsule" size="0.02" fromto="0 0 0 0 0 -0.3"
    mass="0.5"/><site name="tip" pos="0 0 -0.3"/></body></worldbody><actuator><motor joint="turn"/></actuator></mujoco>"""
    (tmp_path / "pendulum.xml").write_text(xml)
    arm = load_model(str(tmp_path / "pendulum.xml"))
    train, held = spinning(arm, 12, 12.0, 0), spinning(arm, 4, 12.0, 1)
    far = spinning(arm, 4, 12.0, 2, start=20 * np.pi)
    assert np.ptp(train.x[:, 0]) > 6 * np.pi
    errors = {}
    for encode in (True, False):
        network = {**SMALL, "encode_angles": encode, "variance": False}
        settings = {"epochs": 25, "batch": 128}
        recipe = recipe_of(
            robot="pendulum", dt=0.02, integrator="euler", base="identity", surfaces=(), network=network, training=settings
        )
        fitted = fit(samples_of(train, arm, recipe), samples_of(held, arm, recipe), arm, recipe)
        model = learned_model(arm, fitted.residual)
        x, u = torch.from_numpy(far.x.T.copy()), torch.from_numpy(far.u.T.copy())
        errors[encode] = float(np.sqrt(np.mean((model.step(x, u)[1].numpy() - far.x_next[:, 1]) ** 2)))
        if encode:
            q = torch.linspace(-9 * np.pi, 9 * np.pi, 9001, dtype=torch.float64)
            sweep = model.missed(torch.stack([q, torch.full_like(q, 3.0)]), torch.zeros(1, 9001, dtype=torch.float64))[0]
            torch.testing.assert_close(sweep[:8001], sweep[1000:], atol=1e-9, rtol=0)  # a whole turn makes no difference
            assert sweep.diff().abs().max() < 0.05 * np.ptp(sweep.numpy())  # nor does a step across ±pi
    size = np.sqrt(np.mean((far.x_next[:, 1] - far.x[:, 1]) ** 2))
    print("turned round: error, of changes of", errors, size)
    assert errors[True] < 0.1 * size and errors[False] > 3 * errors[True]


def test_a_fully_learned_model_is_its_formula_and_knows_no_gate(arm: Model, parts: list[Transitions]) -> None:
    recipe = recipe_of(base="identity", surfaces=(), training={"epochs": 3})
    sets = [samples_of(part, arm, recipe) for part in parts[:2]]
    assert len(sets[0]) == len(parts[0])
    np.testing.assert_allclose(sets[0].target.numpy(), parts[0].x_next[:, 1:] - parts[0].x[:, 1:], atol=1e-6)
    model = learned_model(arm, fit(*sets, arm, recipe).residual)
    x, u = torch.from_numpy(parts[2].x.T.copy()), torch.from_numpy(parts[2].u.T.copy())
    mean = predicted(model.residual, np.concatenate([parts[2].x, parts[2].u], 1))[0].mean(0)
    after = model.step(x, u).numpy()
    np.testing.assert_allclose(after[1], parts[2].x[:, 1] + mean[:, 0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(after[0], parts[2].x[:, 0] + 0.5 * DT * (parts[2].x[:, 1] + after[1]), atol=1e-12)
    assert (model.step_gate(x, u) == 1).all()


def test_what_is_learnt_is_what_the_physics_missed(arm: Model, parts: list[Transitions]) -> None:
    recipe = recipe_of()
    samples = samples_of(parts[0], arm, recipe)
    z, after = parts[0].x[:, 0], parts[0].x[:, 0] + DT * parts[0].x[:, 1] + 0.5 * DT**2 * (parts[0].u[:, 0] / MASS - GRAVITY)
    near = np.minimum(z, after) - RADIUS < 0.02
    missed = parts[0].x_next[:, 1] - parts[0].x[:, 1] - DT * (parts[0].u[:, 0] / MASS - GRAVITY)
    np.testing.assert_allclose(samples.target[:, 0].numpy(), missed[near], atol=1e-6)
    part = np.clip((0.02 - (np.minimum(z, after) - RADIUS)) / 0.015, 0, 1)[near]
    np.testing.assert_allclose(samples.gate.numpy(), part * part * (3 - 2 * part), atol=1e-5)
    assert set(samples.draw.numpy()) == {1.0, 4.0} and np.abs(missed[~near]).max() < 1e-9


def test_targets_that_are_no_numbers_are_refused_by_file_and_row(arm: Model, parts: list[Transitions]) -> None:
    wild = parts[0].x.copy()
    wild[41, 1] = 1e308
    bad = replace(parts[0], x=wild, x_next=wild[:, ::1] * np.where(np.arange(len(wild)) == 41, -1, 1)[:, None])
    file, row = parts[0].where(41)
    with pytest.raises(TransitionError, match=rf"{file}: row {row}: the velocity missed of z is -inf"):
        samples_of(bad, arm, recipe_of(base="identity", surfaces=()))


def test_too_little_data_and_a_training_that_diverges_are_one_line(arm2: Model) -> None:
    recipe = recipe_of(robot="arm2", base="identity", surfaces=(), training={"epochs": 5})
    with pytest.raises(LearningError, match="validation: expected at least 10 transitions .* found 4"):
        fit(noisy(100, 0, arm2), noisy(4, 1, arm2), arm2, recipe)
    wild = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": 1e30})})
    with pytest.raises(LearningError, match="no number any more after epoch 1"):
        fit(noisy(500, 0, arm2), noisy(100, 1, arm2), arm2, wild)


def test_one_batched_product_is_each_member_alone() -> None:
    nets = Ensemble(5, (7, 6), 2, 3, "tanh", True, torch.Generator().manual_seed(0))
    x = torch.randn(3, 11, 5, generator=torch.Generator().manual_seed(1))
    mean, log = nets(x)
    for e in range(3):
        y = x[e]
        for k, (w, b) in enumerate(zip(nets.weights, nets.biases)):
            y = y @ w[e].T + b[e]
            y = torch.tanh(y) if k < 2 else y
        torch.testing.assert_close(mean[e], y[:, :2])
    assert (log > -10.1).all() and (log < 3.0).all()


class Oracle:
    """Predicts by the truth itself."""

    def rollout(self, x0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        states = [x0.numpy()]
        for command in u.numpy():
            states.append(np.array([truth(*x, float(f))[:2] for x, f in zip(states[-1].T, command[0])]).T)
        return torch.from_numpy(np.stack(states))


def test_windows_compare_like_with_like(arm: Model, parts: list[Transitions]) -> None:
    """The truth played through its own commands has no error, whatever the kind, and no stretch runs over an episode's end."""
    windows = windows_of(parts[2], steps=25, most=60)
    errors = open_loop("oracle", Oracle(), windows, arm)
    for k in range(len(KINDS)):
        for step in (1, 5, 25):
            values, count = errors.summary(step, k)
            assert count > 0 or (step == 25 and k == 2)
            assert not count or values.max() < 1e-9
    starts = np.unique(np.linspace(0, len(parts[2]) - 1, 60).astype(int))
    for n, start in enumerate(starts):
        alive = parts[2].episode[start : start + 25] == parts[2].episode[start]
        assert (windows.kind[: alive.sum(), n] >= 0).all() and (windows.kind[alive.sum() :, n] == -1).all()
        touching = parts[2].contact[start : start + alive.sum()]
        for h in range(alive.sum()):
            changes = touching[: h + 1].any() and not touching[: h + 1].all()
            fresh = (
                start > 0 and parts[2].episode[start - 1] == parts[2].episode[start] and parts[2].contact[start - 1] != touching[0]
            )
            expected = 1 if changes or fresh else 2 if touching[h] else 0
            assert windows.kind[h, n] == expected
    assert max(HORIZONS) == 50


def test_a_model_that_diverges_has_infinite_errors_not_none(arm: Model, parts: list[Transitions]) -> None:
    class Wild:
        def rollout(self, x0: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return torch.full((len(u) + 1, *x0.shape), torch.nan, dtype=torch.float64)

    values, count = open_loop("wild", Wild(), windows_of(parts[2]), arm).summary(5, 1)
    assert count > 10 and np.isinf(values).all()


def test_a_constant_input_is_no_division_by_zero() -> None:
    samples = Samples(torch.ones(20, 2), torch.zeros(20, 1), torch.ones(20), torch.ones(20), np.zeros(20, int), np.zeros(20, bool))
    scales = Normalisers.of(samples)
    assert torch.equal(scales.scale, torch.ones(2)) and torch.equal(scales.output, torch.full((1,), 1e-9))


def test_a_wipe_is_learnt_from_a_few_runs(tmp_path: Path) -> None:
    """From runs' logs to a gated residual that is exact in the air and several times better than the physics in contact."""
    recipe = load_learning_recipe("panda_wipe_learn")[0]
    arm = load_model("panda_wipe")
    source, every = source_of(arm.robot, arm.tree.revolute, recipe.dt), []
    config, file = load_run("panda_wipe_sim")
    for seed, force in enumerate((8.0, 14.0, 20.0, 17.0)):
        short = {"seed": seed, "duration": 4.0, "planner": {"samples": 64}, "goal": {"delay": 1.0, "force": force}}
        run = validate(RunConfig, merged(config.model_dump(), short), file)
        Session(run, file, lockstep=True, model=arm).run(tmp_path / str(seed))
        every.append(from_run(tmp_path / str(seed) / "log.csv", source))
    training, validation, _ = split(cut(concatenate(every[:3]), 0.5), (0.2, 0.0), seed=0)
    model = learned_model(arm, fit(*(samples_of(part, arm, recipe) for part in (training, validation)), arm, recipe).residual)
    physics, windows = analytic_model(arm, recipe.dt), windows_of(every[3], 10)
    learnt, plain = (open_loop("", each, windows, arm).summary(10, 2)[0][-1, 0] for each in (model, physics))
    print("tool off after 10 steps in contact [m]", learnt, plain)
    assert learnt < 0.1 * plain
    x, u = (torch.from_numpy(part.T.copy()) for part in (every[2].x, every[2].u))
    away = model.step_gate(x, u) == 0
    assert away.sum() > 20 and torch.equal(model.step(x, u)[:, away], physics.step(x, u)[:, away])

"""A learned model kept up with the last seconds: known truths are found, wrong ones are bounded, and planning goes on with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peg import DT, FLOOR, RADIUS, peg
from test_hybrid import residual_of

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import SpecError
from mbctrl.base.logs import read_log
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.cli.session import Session
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.last_layer import LastLayer
from mbctrl.dynamics.likeliest import Likeliest
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual, Spread, physics_of
from mbctrl.export.planner import refuse
from mbctrl.learning.runs import from_run, source_of
from mbctrl.learning.samples import learned_model
from mbctrl.planning.controller import MpcController
from mbctrl.planning.keeper import Keeper

LOG_VARIANCE = -9.0
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return peg(tmp_path_factory.mktemp("peg"))


def sure(residual: Residual, joints: int, rest: float = 0.0) -> Residual:
    """Return the same with variances, the same everywhere."""
    (w, b), n = residual.layers[-1], len(residual.output_scale)
    last = np.concatenate([w, np.zeros_like(w)], 1), np.concatenate([b, np.full_like(b, LOG_VARIANCE)], 1)
    spread = Spread(np.full(n, -30.0), np.full(n, 3.0), np.ones(joints), np.full((2, joints), rest))
    return replace(residual, layers=(*residual.layers[:-1], last), spread=spread)


def guess(arm: Model, hidden: tuple[int, ...] = (24,), members: int = 3) -> Residual:
    """Return networks near the floor that know nothing of it."""
    made = {"surfaces": (FLOOR,), "near": 0.005, "far": 0.02, "activation": "tanh", "physics": physics_of(arm.tree)}
    return sure(residual_of(arm, members, hidden, **made), 1)


def off(residual: Residual, size: float, seed: int = 5) -> Residual:
    """Return a truth: the same with its last layer off by ``size`` of its outputs' scale, about."""
    rng, n = np.random.default_rng(seed), len(residual.output_scale)
    scale = size * residual.output_scale
    width = residual.layers[-1][0].shape[2] * (residual.members if len(residual.layers) > 1 else 1)
    return residual.nudged(scale[:, None] * rng.normal(size=(n, width)) * width**-0.5, scale * rng.choice([-1.0, 1.0], n))


def touching(arm: Model, truth: HybridDynamics, count: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Return states and commands near the floor, and what truly follows, with the noise that is promised."""
    rng = np.random.default_rng(seed)
    x = np.stack([RADIUS + rng.uniform(-0.005, 0.004, count), rng.uniform(-0.1, 0.1, count)])
    x, u = torch.tensor(x), torch.tensor(rng.uniform(0, 20, (1, count)))
    after = truth.step(x, u)
    noise = truth.residual.output_scale * np.exp(LOG_VARIANCE / 2) * rng.normal(size=count)
    after[1] += torch.tensor(noise) * truth.step_gate(x, u)
    return x, u, after


@pytest.mark.parametrize("hidden", [(24,), ()])
def test_a_last_layer_that_is_off_is_found_and_beyond_the_gate_nothing_moves(arm: Model, hidden: tuple[int, ...]) -> None:
    first = guess(arm, hidden)
    model, truth = learned_model(arm, first), learned_model(arm, off(first, 0.5))
    layer = LastLayer(model, 0.5, 75)
    assert layer.refit() is None
    for part in range(0, 60, 5):
        layer.see(*(values[:, part : part + 5] for values in touching(arm, truth, 60)))
    learnt = layer.refit()
    assert learnt is not None
    found = learned_model(arm, learnt)
    x, u, _ = touching(arm, truth, 500, seed=1)
    before, after = ((one.step(x, u) - truth.step(x, u))[1].abs().mean() for one in (model, found))
    print("off by [m/s]", float(before), float(after), "noise", 0.8 * float(first.output_scale[0]) * np.exp(LOG_VARIANCE / 2))
    assert after < (0.1 if hidden else 0.2) * before
    far = torch.tensor([[0.1, 0.3], [0.0, -0.5]]).double()
    physics = model.base.step(far, torch.zeros(1, 2).double())
    assert torch.equal(found.step(far, torch.zeros(1, 2).double()), physics)
    torch.testing.assert_close(found.members(x, u)[1], model.members(x, u)[1])  # variances stay what they were


def test_it_is_bayesian_linear_regression(arm: Model) -> None:
    """In the space of weights, by the normal equations."""
    first = guess(arm)
    model, truth = learned_model(arm, first), learned_model(arm, off(first, 0.3))
    x, u, after = touching(arm, truth, 40)
    layer = LastLayer(model, 0.5, 40)
    layer.see(x, u, after)
    told = model.told(x, u, after)
    assert (told.gate > 0.5).all()
    features = np.vstack([told.features.numpy(), np.ones(40)])
    prior = (0.5 * first.output_scale[0]) ** 2 / (features**2).sum(0).mean()
    scaled = features / told.variance.numpy()[0]
    weights = np.linalg.solve(scaled @ features.T + np.eye(len(features)) / prior, scaled @ told.off.numpy()[0])
    learnt = layer.refit()
    assert learnt is not None
    expected = first.nudged(weights[None, :-1], weights[-1:])
    np.testing.assert_allclose(learnt.layers[-1][0], expected.layers[-1][0], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(learnt.layers[-1][1], expected.layers[-1][1], rtol=1e-6, atol=1e-9)
    missed = ((after - model.base.step(x, u))[1] / told.gate - model.missed(x, u)[0]).numpy()
    np.testing.assert_allclose(told.off.numpy()[0], missed, atol=1e-9)


def test_what_is_absurd_moves_it_so_far_and_what_is_no_number_not_at_all(arm: Model) -> None:
    first = guess(arm)
    model = learned_model(arm, first)
    x, u, after = touching(arm, model, 60)
    layer = LastLayer(model, 0.5, 60)
    layer.see(x, u, after + 1e6)
    learnt = layer.refit()
    assert learnt is not None
    moved = (learned_model(arm, learnt).missed(x, u) - model.missed(x, u)).square().mean().sqrt()
    assert abs(float(moved) / first.output_scale[0] - 1) < 1e-6
    layer = LastLayer(model, 0.5, 60)
    layer.see(x, u, torch.full_like(after, torch.nan))
    assert layer.refit() is None
    layer.see(x + 1.0, u, after + 1.0)  # far from the floor, which it says nothing of
    assert layer.refit() is None


@pytest.mark.parametrize("truth", [0, 1, 2])
def test_of_several_models_the_true_one_is_found_soon_and_kept(arm: Model, truth: int) -> None:
    first = guess(arm, members=1)
    models = [learned_model(arm, one) for one in (first, off(first, 0.1), off(first, 0.1, seed=6))]
    likeliest, chosen = Likeliest(models, 75, 10.0), []
    x, u, after = touching(arm, models[truth], 400)
    for k in range(400):
        likeliest.see(x[:, k : k + 1], u[:, k : k + 1], after[:, k : k + 1])
        chosen.append(likeliest.best)
    changes = np.flatnonzero(np.diff([0, *chosen]))
    print("changes after", changes + 1)
    assert len(changes) <= (0 if truth == 0 else 2) and (changes < 25).all() and chosen[-1] == truth
    x, u, after = touching(arm, models[0], 400, seed=3)  # and back
    likeliest.see(x, u, after)
    assert likeliest.best == 0


def test_models_that_are_alike_and_those_that_fail_are_never_changed_to(arm: Model) -> None:
    first = guess(arm, members=1)
    broken = replace(first, layers=(*first.layers[:-1], (first.layers[-1][0] * np.nan, first.layers[-1][1])))
    models = [learned_model(arm, one) for one in (first, first, broken)]
    likeliest = Likeliest(models, 75, 10.0)
    x, u, after = touching(arm, learned_model(arm, off(first, 0.1)), 300)
    assert not any(likeliest.see(*(values[:, k : k + 5] for values in (x, u, after))) for k in range(0, 300, 5))
    likeliest = Likeliest([models[0], learned_model(arm, off(first, 3.0))], 75, 10.0)
    x, u, after = touching(arm, models[0], 300)
    after[1, 7::50] += 1.0  # outliers decide nothing
    assert not any(likeliest.see(*(values[:, k : k + 5] for values in (x, u, after))) for k in range(0, 300, 5))


def test_requests_are_taken_for_transitions_where_they_are_a_step_apart(arm: Model) -> None:
    first = guess(arm)
    model, truth = learned_model(arm, first), learned_model(arm, off(first, 0.5))
    x, u, after = (values.numpy() for values in touching(arm, truth, 40))
    for gap, command, learnt in ((DT, True, True), (1.5 * DT, True, False), (DT, False, False)):
        keeper, t, found = Keeper([model], True, 75, 10.0), 0.0, []
        for k in range(40):
            for state, led in ((x[:, k], None), (after[:, k], u[:, k] if command else None)):
                found.append(keeper.take(PlanRequest(t, state, command=led)))
                t += gap
        assert any(one is not None for one in found) == learnt


def test_what_was_seen_of_another_contact_says_nothing_of_the_new_one(arm: Model) -> None:
    """Where the model changes, its last layer is refitted to what came after."""
    first = guess(arm, members=1)
    models = [learned_model(arm, one) for one in (first, off(first, 1.0))]
    keeper, t, learnt = Keeper(models, True, 75, 10.0), 0.0, None
    for truth, count in ((models[0], 75), (models[1], 20)):
        for x, u, after in zip(*(values.T.numpy() for values in touching(arm, truth, count))):
            keeper.take(PlanRequest(t, x))
            learnt = keeper.take(PlanRequest(t + DT, after, command=u)) or learnt
            t += 5 * DT
    assert keeper.best == 1 and learnt is not None
    x, u, _ = touching(arm, models[1], 300, seed=2)
    wrong, apart = (
        float((one.step(x, u) - models[1].step(x, u))[1].abs().mean()) for one in (learned_model(arm, learnt), models[0])
    )
    print("off by", wrong, "of", apart)
    assert wrong < 0.03 * apart


@pytest.mark.parametrize("hidden", [(), (24,), (12, 9)])
def test_what_is_added_to_a_last_layer_is_linear_in_what_it_takes_in(arm: Model, hidden: tuple[int, ...]) -> None:
    """As the networks' own inputs are, before they are normalised, where there is no hidden layer."""
    rng, residual = np.random.default_rng(3), guess(arm, hidden)
    size = residual.layers[0][0].shape[2]
    residual = replace(residual, input_mean=rng.normal(1, 1, size), input_scale=rng.uniform(0.1, 10, size))
    x, u = torch.randn(2, 30, dtype=torch.float64), torch.randn(1, 30, dtype=torch.float64)
    before = learned_model(arm, residual)
    features = before.told(x, u, x).features.numpy()
    weights, offsets = rng.normal(size=(1, len(features))), rng.normal(size=1)
    after = learned_model(arm, residual.nudged(weights, offsets))
    added = (after.missed(x, u) - before.missed(x, u)).numpy()
    np.testing.assert_allclose(added, weights @ features + offsets[:, None], rtol=1e-9, atol=1e-9)


# --- planning ---------------------------------------------------------------------------------------------------------

SCENARIO = "panda_wipe_sim"


@pytest.fixture(scope="module")
def panda() -> Model:
    return load_model("panda_wipe")


def blank(panda: Model) -> Residual:
    """Return networks on top of the declared contact that give nothing, with random hidden layers."""
    contact = load_run(SCENARIO)[0].dynamics.contact
    acts: dict[str, Any] = {"acts_on": "contact", "contact": contact, "near": 0.0005, "far": 0.003}
    made = residual_of(panda, hidden=(32, 32), activation="silu", **acts)
    made = replace(made, input_scale=np.array([5e-3, *[0.1] * 6, *[0.3] * 3, 0.5]), output_scale=np.array([0.05, 0.05, 0.2]))
    w, b = made.layers[-1]
    silent = replace(made, layers=(*made.layers[:-1], (0 * w, 0 * b)), physics=physics_of(panda.tree))
    return sure(silent, 8, rest=0.003)


def changed(file: Path, **changes: Any) -> tuple[RunConfig, Path]:
    config, scenario = load_run(SCENARIO)
    over = {"dynamics": {"residual": str(file), "threads": 1}, "planner": {"samples": 128}}
    return validate(RunConfig, merged(config.model_dump(), merged(over, changes))), scenario


@pytest.mark.parametrize("risk", ["expectation", "worst"])
def test_planning_goes_on_with_other_weights_as_if_begun_with_them(panda: Model, tmp_path: Path, risk: str) -> None:
    one = blank(panda)
    other = off(one, 2.0)
    one.save(tmp_path / "one.npz")
    other.save(tmp_path / "other.npz")
    controllers = [
        MpcController(*(lambda c, f: (c, panda, f))(*changed(tmp_path / name, planner={"risk": {"kind": risk}})))
        for name in ("one.npz", "other.npz")
    ]
    q = [-0.027, -0.039, -0.087, -2.366, -0.026, 2.373, 0.690, -0.0074]  # pressed
    request = PlanRequest(4.0, np.array([*q, *np.zeros(8)]), goal_time=4.0)
    plans = [controller.plan(request) for controller in controllers]
    assert np.abs(plans[0].u - plans[1].u).max() > 1e-6
    controllers[0].reset()
    controllers[0].backend.weigh(other)
    again = controllers[0].plan(request)
    np.testing.assert_array_equal(again.u, plans[1].u)
    np.testing.assert_array_equal(again.x, plans[1].x)


def wiped(folder: Path, panda: Model, adapt: dict[str, Any] | None) -> tuple[float, Path, list[PlanRequest]]:
    """Return the mean force error [N] on a pad ten times as soft as believed, where the logs are, and what was asked for."""
    goal = {"delay": 1.5, "period": 2.0}
    config, file = changed(folder / "blank.npz", adapt=adapt, duration=3.5, goal=goal, planner={"samples": 256})
    controller, asked = MpcController(config, panda, file), []

    def plan(request: PlanRequest) -> Plan:
        asked.append(request)
        return controller.plan(request)

    session = Session(config, file, lockstep=True, model=panda, plan=plan)
    pair = session.driver.model.pair_solref[0]
    pair[:] = 0.1 * pair[0], 0.1**0.5 * pair[1]
    out = folder / f"run-{adapt is not None}"
    session.run(out)
    log = read_log(out / "log.csv")
    return float((log["contact.force"][log["t"] > 2.5] - 15.0).mean()), out, asked


def test_a_pad_softer_than_believed_is_pressed_as_asked(panda: Model, tmp_path: Path) -> None:
    blank(panda).save(tmp_path / "blank.npz")
    blind, *_ = wiped(tmp_path, panda, None)
    found, out, asked = wiped(tmp_path, panda, {"kind": "model", "last_layer": True})
    plans = read_log(out / "plans.csv")
    print("force off by", blind, found, "N; CPU of a plan [ms]", 1e3 * np.median(plans["cpu"]))
    assert abs(blind) > 2.0 and abs(found) < 0.6 * abs(blind)
    assert set(plans["model"]) == {0.0}
    # Requests tell of the same transitions as the log.
    every = from_run(out / "log.csv", source_of(panda.robot, panda.tree.revolute, 0.02))
    told = {round(after.stamp - 0.02, 3): (before.x, after.command, after.x) for before, after in zip(asked, asked[1:])}
    for t, x, u, after in zip(every.t, every.x, every.u, every.x_next):
        for part, expected in zip(told[round(t, 3)], (x, u, after)):
            np.testing.assert_allclose(part, expected, atol=1e-6)
    assert len(every) > 150


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapt": {"kind": "model"}}, "needs last_layer, models or both"),
        ({"adapt": {"kind": "model", "last_layer": True, "heaviest": 5.0}}, "heaviest: is of kind payload"),
        ({"adapt": {"last_layer": True}}, "last_layer: is of kind model"),
        ({"adapt": {"kind": "model", "models": ["no.npz"]}}, "adapt.models: no.npz: no such file"),
        ({"adapt": {"kind": "model", "models": ["wider.npz"]}}, "adapt.models: wider.npz: far is not as in dynamics.residual"),
        ({"adapt": {"kind": "model", "models": ["small.npz"]}}, "small.npz: has other networks"),
        ({"loop": {"rate": 25}}, "adapt: kind model needs a plan each step of 0.02 s, found 25 Hz"),
        ({"planner": {"risk": {"kind": "mean"}}}, "adapt.last_layer: needs planner.risk.kind expectation, found mean"),
        ({"dynamics": {"residual": None}}, "adapt: kind model needs dynamics.residual"),
        ({"dynamics": {"backend": "torch"}}, "adapt: kind model needs compiled rollouts, found dynamics.backend torch"),
    ],
)
def test_what_cannot_be_kept_up_is_refused_in_one_line(panda: Model, tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    one = blank(panda)
    one.save(tmp_path / "one.npz")
    replace(one, far=0.004).save(tmp_path / "wider.npz")
    small = one.member(0)
    small.save(tmp_path / "small.npz")
    given = merged({"adapt": {"kind": "model", "last_layer": True}}, changes)
    if "adapt" in changes:
        given["adapt"] = {"kind": changes["adapt"].get("kind", "payload"), **changes["adapt"]}
        given["adapt"]["models"] = [
            str(tmp_path / name) if name != "no.npz" else name for name in changes["adapt"].get("models", [])
        ]
    with pytest.raises(SpecError, match=match.replace("wider", ".*wider").replace("small", ".*small")) as caught:
        config, file = changed(tmp_path / "one.npz", **given)
        MpcController(config, panda, file)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_that_is_kept_up_is_not_exported(panda: Model, tmp_path: Path) -> None:
    blank(panda).save(tmp_path / "one.npz")
    off_contact = {"kind": "model", "last_layer": True}
    config, file = changed(tmp_path / "one.npz", adapt=off_contact)
    controller = MpcController(config, panda, file)
    with pytest.raises(SpecError, match="is not exported"):
        refuse(controller)
    assert load_run_model(config, file).robot.name == "panda_wipe"

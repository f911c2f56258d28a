"""Uncertainty many steps ahead: linear systems whose spread is known in closed form, and members that disagree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peg import DT, peg

from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.propagation import KINDS, interval, matched, propagate
from mbctrl.dynamics.residual import Residual, Spread
from mbctrl.learning.evaluate import open_loop, windows_of
from mbctrl.learning.expected import expected
from mbctrl.learning.runs import source_of
from mbctrl.learning.samples import learned_model
from mbctrl.learning.transitions import made

PULL, DRAG, GAIN, NOISE, OFF = -0.4, -0.1, 0.02, 0.03, 0.05
"""Of the velocity's change in a step, with position, velocity and command; its deviation; how far members are off it [m/s]."""
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return peg(tmp_path_factory.mktemp("peg"))


def linear(arm: Model, offsets: list[float], noise: float = NOISE) -> HybridDynamics:
    """Return a slide without physics whose velocity changes linearly, with a constant deviation; members differ by offsets."""
    members, n = len(offsets), arm.tree.n
    w = np.zeros((members, 2, 3))
    w[:, 0] = PULL, DRAG, GAIN
    b = np.array([[offset, 2 * np.log(noise)] for offset in offsets])
    known: dict[str, Any] = {"near": 0.0, "far": 1.0, "dt": DT, "robot": arm.robot.name, "joints": tuple(arm.robot.joints)}
    spread = Spread(np.full(n, -30.0), np.full(n, 3.0), np.ones(n), np.zeros((2, n)))
    scales = np.zeros(3), np.ones(3), np.ones(1)
    return learned_model(arm, Residual(((w, b),), "tanh", *scales, base="identity", spread=spread, **known))


def closed_form(steps: int, offset: float, noise: float = NOISE, kept: bool = True) -> np.ndarray:
    """Return the deviations (H, 2) of position and velocity: noise of each step, carried on as a Kalman filter's prediction does;
    the offset is ± as one draw for all steps (``kept``) or anew in each."""
    step = np.array([[1 + DT * PULL / 2, DT * (1 + DRAG / 2)], [PULL, 1 + DRAG]])
    push = np.array([DT / 2, 1.0])
    covariance, away, found = np.zeros((2, 2)), np.zeros(2), []
    for _ in range(steps):
        covariance = step @ covariance @ step.T + np.outer(push, push) * (noise**2 + (0 if kept else offset**2))
        away = step @ away + push * offset * kept
        found.append(np.sqrt(np.diag(covariance) + away**2))
    return np.array(found)


def rolled(model: HybridDynamics, kind: str, particles: int = 60, steps: int = 30, starts: int = 60) -> torch.Tensor:
    """Return particles (H, nx, P, N), all from one place and under one command."""
    x0, u = torch.tensor([[0.1], [0.5]]).double().expand(2, starts), torch.full((steps, 1, starts), 0.7).double()
    with torch.no_grad():
        return torch.stack(list(propagate(model, x0, u, kind, particles, torch.Generator().manual_seed(0))))


@pytest.mark.parametrize("kind", KINDS)
def test_deviations_of_a_linear_system_are_the_closed_form(arm: Model, kind: str) -> None:
    """Members that agree leave the noise alone; then those that are off by as much each way."""
    for offset in (0.0, OFF):
        found = rolled(linear(arm, [offset, -offset]), kind)
        expected = closed_form(30, 0.0 if kind == "expectation" else offset, kept=kind == "tsinf")
        np.testing.assert_allclose(found.var(2).mean(-1).sqrt().numpy(), expected, rtol=0.05)
        middle = linear(arm, [0.0]).rollout(torch.tensor([[0.1], [0.5]]).double(), torch.full((30, 1, 1), 0.7).double())
        assert ((found.mean((2, 3)) - middle[1:, :, 0]).abs().numpy() < 4 * expected / 60).all()
    apart = closed_form(30, OFF, kept=True)[-1] / closed_form(30, OFF, kept=False)[-1]
    assert (np.abs(np.log(apart)) > 0.15).any()  # the forms differ by more than is allowed for


def test_only_a_member_kept_gives_two_heaps_where_two_disagree(arm: Model) -> None:
    model, within = linear(arm, [0.1, -0.1], noise=0.01), {}
    for kind in KINDS:
        velocity = rolled(model, kind, steps=5)[-1, 1].flatten()
        z = (velocity - velocity.mean()) / velocity.std()
        within[kind] = float((z.abs() < 0.5).double().mean())
    print(within)
    assert within["tsinf"] < 0.01  # a normal distribution has 0.38 there
    assert all(abs(share - 0.383) < 0.08 for kind, share in within.items() if kind != "tsinf")


def test_a_particle_keeps_its_member(arm: Model) -> None:
    velocity = rolled(linear(arm, [0.1, -0.1, 0.3], noise=1e-4), "tsinf", particles=9, steps=8, starts=1)[:, 1, :, 0]
    order = velocity.argsort(1)
    assert all(set((row[3 * k : 3 * k + 3] % 3).tolist()) == {member} for row in order for k, member in enumerate((1, 0, 2)))


def test_matched_particles_have_the_mean_and_covariance_and_are_normal() -> None:
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(4, 400, 3, generator=noise, dtype=torch.float64).sign() * torch.tensor([1.0, 2.0, 0.0, 1e3])[:, None, None]
    x[1] += x[0]
    found = matched(x, noise)
    for n in range(3):
        torch.testing.assert_close(found[..., n].mean(1), x[..., n].mean(1))
        torch.testing.assert_close(found[..., n].cov(), x[..., n].cov())
    z = found[0] / found[0].std(0)
    assert 2.5 < float((z**4).mean()) < 3.5 and float((x[0] ** 4).mean()) < 1.1
    assert torch.equal(matched(torch.ones(2, 5, 1), noise), torch.ones(2, 5, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_a_joint_make_no_difference_and_seeds_reproduce(kind: str) -> None:
    arm2 = load_model("arm2")
    rng = np.random.default_rng(0)
    layers = tuple((rng.normal(size=(3, b, a)) * 0.3, rng.normal(size=(3, b)) * 0.3) for a, b in ((8, 12), (12, 4)))
    known: dict[str, Any] = {"near": 0.0, "far": 1.0, "dt": DT, "robot": "arm2", "joints": tuple(arm2.robot.joints)}
    spread = Spread(np.full(2, -8.0), np.zeros(2), np.array([0.5, 2.0]), np.zeros((2, 2)))
    model = learned_model(
        arm2, Residual(layers, "silu", np.zeros(8), np.ones(8), np.ones(2), base="identity", spread=spread, **known)
    )
    start, u = torch.tensor([[3.0], [-3.0], [4.0], [-4.0]]).double(), torch.zeros(20, 2, 1).double()
    turned = start + torch.tensor([[18 * np.pi], [-2 * np.pi], [0.0], [0.0]], dtype=torch.float64)
    runs = []
    for x0, seed in ((start, 1), (turned, 1), (start, 1), (start, 2)):
        with torch.no_grad():
            runs.append(torch.stack(list(propagate(model, x0, u, kind, 20, torch.Generator().manual_seed(seed)))))
    assert runs[0][-1, 0].max() > np.pi  # across ±pi
    torch.testing.assert_close(runs[1] - turned[:, None], runs[0] - start[:, None], atol=1e-8, rtol=0)
    assert torch.equal(runs[0], runs[2]) and not torch.allclose(runs[0], runs[3])


def test_one_step_is_what_intervals_promise(arm: Model) -> None:
    """Where members agree, TS is the model's own deviation, scaled as it was found to be."""
    model = linear(arm, [0.0, 0.0])
    x, u = torch.zeros(2, 1).double(), torch.zeros(1, 1).double()
    found = next(propagate(model, x, u[None], "ts1", 20000, torch.Generator().manual_seed(0)))
    assert abs(float(found[1, :, 0].std()) / float(model.deviation(x, u)) - 1) < 0.02


def test_intervals_are_those_the_next_draw_is_in() -> None:
    noise = torch.Generator().manual_seed(0)
    for count in (19, 39, 50):
        low, high = interval(torch.randn(count, 20000, generator=noise), (0.05, 0.95))
        following = torch.randn(20000, generator=noise)
        assert abs(float(((low < following) & (following < high)).double().mean()) - 0.9) < 0.01
    assert interval(torch.tensor([[1.0], [torch.nan], [2.0]]), (0.95,)).isinf().all()


def test_intervals_many_steps_ahead_hold_where_the_model_is_the_truth(arm: Model) -> None:
    """And promise too much by as much as the truth is noisier; so it is with the tool."""
    truth, noise, starts, steps = linear(arm, [0.0]), torch.Generator().manual_seed(3), 40, 51
    states, u = [torch.randn(2, starts, generator=noise).double() * 0.1], torch.randn(steps, 1, starts, generator=noise).double()
    for command in u:
        states.append(truth.drawn(states[-1], command, None, noise))
    x = torch.stack(states).permute(2, 0, 1).numpy()  # (episodes, T + 1, nx)
    rows = x[:, :-1].reshape(-1, 2), u.permute(2, 0, 1).numpy().reshape(-1, 1), x[:, 1:].reshape(-1, 2)
    known = {"episode": np.repeat(np.arange(starts), steps), "t": np.tile(DT * np.arange(steps), starts)}
    windows = windows_of(made(source_of(arm.robot, arm.tree.revolute, DT), *rows, **known))
    for width, share in ((0.5, 0.59), (1.0, 0.9)):
        found = expected(linear(arm, [0.0], noise=width * NOISE), windows, arm)
        assert [one.way for one in found] == list(KINDS)
        for one in found:
            covered = {step: one.covered(step, 0) for step in (1, 5, 25)}
            print(one.way, width, covered)
            assert all(abs(part - share) < 0.1 for *parts, _ in covered.values() for part in parts)
            assert covered[1][2] > covered[25][2] > 150 and one.covered(1, 2)[2] == 0
    truly = open_loop("truth", truth, windows, arm).summary(25, 0)[0][-1]
    np.testing.assert_allclose(found[0].band(25, 0), truly, rtol=0.2)


def test_where_networks_say_nothing_of_their_variance_nothing_is_expected(arm: Model) -> None:
    model = linear(arm, [0.0])
    (w, b), count = model.residual.layers[0], 5
    plain = learned_model(arm, replace(model.residual, layers=((w[:, :1], b[:, :1]),), spread=None))
    source = source_of(arm.robot, arm.tree.revolute, DT)
    windows = windows_of(made(source, np.zeros((count, 2)), np.zeros((count, 1)), np.zeros((count, 2))), 5)
    assert expected(plain, windows, arm) == []


def test_an_unknown_kind_is_refused(arm: Model) -> None:
    with pytest.raises(ValueError, match="unknown kind 'ts2'; known: tsinf"):
        rolled(linear(arm, [0.0]), "ts2")

"""Planners: knots, noise, update rules, and known optima they must find."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import CubicSpline, interp1d
from scipy.stats import qmc
from torch import Tensor

from mbctrl.planning.knots import INTERPOLATIONS, Knots
from mbctrl.planning.noise import NOISES, Noise, Shape
from mbctrl.planning.objective import TorchSearch
from mbctrl.planning.planner import Planner, PlannerState
from mbctrl.planning.rules import RULES
from mbctrl.planning.rules.base import Distribution, Rule
from mbctrl.planning.rules.cem import Cem
from mbctrl.planning.rules.icem import ICem
from mbctrl.planning.rules.mppi import Mppi
from mbctrl.planning.rules.shooting import PredictiveSampling, RandomShooting

F64 = torch.float64
RULE = {
    "random_shooting": RandomShooting(),
    "predictive_sampling": PredictiveSampling(),
    "cem": Cem(elites=16),
    "icem": ICem(elites=16, keep=4),
    "mppi": Mppi(ess=0.05, adapt=0.5),
}
LEARNING = [name for name in RULE if name != "random_shooting"]


def tensor(*values: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(values, dtype=F64)


def planner(
    objective: Callable[..., Tensor],
    rule: Rule,
    *,
    knots: Knots | None = None,
    samples: int = 64,
    noise: str = "white",
    sigma: float | Tensor = 0.5,
    bound: float = 1e6,
    nu: int = 1,
    **settings: Any,
) -> Planner:
    """Return a float64 planner, 4 linear knots over 8 steps of 0.1 s unless told otherwise."""
    knots = knots or Knots(4, 8, 0.1, "linear")
    sigma = sigma if isinstance(sigma, Tensor) else torch.full((nu,), sigma, dtype=F64)
    edge = torch.full((nu,), bound, dtype=F64)
    drawn = Noise(noise, Shape(knots.count, nu, samples), dtype=F64)
    search = TorchSearch(objective, knots, drawn, -edge, edge)
    return Planner(search, rule, knots, samples=samples, sigma=sigma, **settings)


def shift_of(one: Planner, elapsed: float) -> Tensor:
    """Return the matrix that moves a planner's knots on."""
    return torch.from_numpy(one.knots.shift(elapsed))


def bowl(x: Tensor, commands: Tensor, parameters: Any) -> Tensor:
    """Return a cost whose optimum is the command curve x[0] + sin of the step."""
    goal = x[0] + torch.sin(torch.arange(len(commands), dtype=commands.dtype))
    return ((commands - goal[:, None, None]) ** 2).sum((0, 1))


def same(a: PlannerState, b: PlannerState) -> bool:
    """Return whether two states are equal bit for bit."""
    parts = ("mean", "spread", "best", "kept")
    return (a.start, a.seed, a.draws) == (b.start, b.seed, b.draws) and all(
        torch.equal(getattr(a.belief, part), getattr(b.belief, part)) for part in parts
    )


# --- knots ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("count", [3, 5, 8])
def test_basis_rows_sum_to_one(interpolation: str, count: int) -> None:
    basis = Knots(count, 16, 0.05, interpolation).basis
    np.testing.assert_allclose(basis.sum(1), 1.0, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("interpolation", "peer"),
    [("linear", lambda t, y: interp1d(t, y, axis=0)), ("cubic", lambda t, y: CubicSpline(t, y, bc_type="natural"))],
)
def test_the_curve_is_scipys(interpolation: str, peer: Callable[..., Any]) -> None:
    knots = Knots(5, 20, 0.03, interpolation)
    y = np.random.default_rng(0).normal(size=(5, 2))
    at = (np.arange(20) + 0.5) * 0.03
    expected = peer(np.linspace(0, 0.6, 5), y)(at)
    np.testing.assert_allclose(knots.commands(torch.tensor(y)[..., None])[..., 0], expected, atol=1e-12)


def test_zero_order_holds_each_knot_for_an_equal_share() -> None:
    commands = Knots(3, 6, 0.1, "zero").commands(tensor(1, 2, 3)[:, None, None])
    assert commands.flatten().tolist() == [1, 1, 2, 2, 3, 3]


def test_as_many_zero_order_knots_as_steps_are_the_steps() -> None:
    for steps in (7, 20, 50):
        assert np.array_equal(Knots(steps, steps, 0.1, "zero").basis, np.eye(steps))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_past_the_horizon_the_last_value_is_held(interpolation: str) -> None:
    weights = Knots(4, 8, 0.1, interpolation).weights(np.array([0.8, 0.9, 50.0]))
    np.testing.assert_allclose(weights, np.tile([0, 0, 0, 1.0], (3, 1)), atol=1e-12)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_no_shift_changes_nothing(interpolation: str) -> None:
    shift = Knots(5, 10, 0.1, interpolation).shift(0.0)
    np.testing.assert_allclose(shift, np.eye(5), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("interpolation", "elapsed"),
    [("zero", 0.4), ("linear", 0.13), ("linear", 0.4), ("linear", -0.05), ("cubic", 0.07), ("cubic", 5.0), ("cubic", -0.13)],
)
def test_shifted_knots_are_the_curve_seen_later(interpolation: str, elapsed: float) -> None:
    knots = Knots(5, 10, 0.1, interpolation)
    np.testing.assert_allclose(knots.shift(elapsed), knots.weights(knots.times + elapsed), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolation", ["zero", "linear"])
@pytest.mark.parametrize(("a", "b"), [(0.2, 0.4), (0.6, 0.2), (0.2, 2.0)])
def test_shifts_on_the_grid_add_up(interpolation: str, a: float, b: float) -> None:
    count = 5 if interpolation == "zero" else 6
    knots = Knots(count, 10, 0.1, interpolation)  # a knot each 0.2 s
    np.testing.assert_allclose(knots.shift(b) @ knots.shift(a), knots.shift(a + b), rtol=0, atol=1e-12)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_many_short_shifts_move_a_ramp_as_far_as_one_long(interpolation: str) -> None:
    knots = Knots(10, 20, 0.05, interpolation)
    ramp = knots.times
    for _ in range(6):
        ramp = knots.shift(0.03) @ ramp  # less than a third of a knot at a time
    # The held end is a kink, which a spline feels as a ripple all along.
    assert ramp[0] == pytest.approx(0.18, abs=1e-3 if interpolation == "cubic" else 1e-9)


@pytest.mark.parametrize(("interpolation", "count"), [("zero", 0), ("linear", 1), ("cubic", 2), ("quintic", 9)])
def test_knots_that_cannot_be_are_refused(interpolation: str, count: int) -> None:
    with pytest.raises(ValueError, match="knots|unknown interpolation"):
        Knots(count, 10, 0.1, interpolation)


# --- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", NOISES)
def test_noise_has_unit_variance_and_no_mean(kind: str) -> None:
    draws = torch.cat([Noise(kind, Shape(6, 2, 2048), dtype=F64).draw(seed) for seed in range(8)], -1)
    assert draws.mean(-1).abs().max() < 0.04  # 5 standard errors of 16384 white draws
    assert (draws.std(-1) - 1).abs().max() < 0.03


@pytest.mark.parametrize("kind", ["white", "halton", "sobol"])
def test_uncoloured_noise_is_uncorrelated(kind: str) -> None:
    draws = torch.cat([Noise(kind, Shape(4, 2, 2048), dtype=F64).draw(seed) for seed in range(8)], -1).flatten(0, 1)
    off = torch.corrcoef(draws) - torch.eye(8, dtype=F64)
    assert off.abs().max() < 0.06


def neighbours(beta: float, apart: int = 1) -> float:
    """Return the correlation of knots ``apart`` from each other, averaged along eight knots."""
    draws = torch.cat([Noise("coloured", Shape(8, 1, 4096), beta, dtype=F64).draw(seed) for seed in range(4)], -1)[:, 0]
    return torch.corrcoef(draws).diagonal(apart).mean().item()


def test_coloured_noise_grows_more_alike_with_beta() -> None:
    found = [neighbours(beta) for beta in (0.0, 1.0, 2.0, 3.0)]
    assert abs(found[0]) < 0.02 and all(later - earlier > 0.05 for earlier, later in zip(found, found[1:]))


def test_coloured_noise_forgets_with_distance() -> None:
    assert neighbours(2.0, 1) > neighbours(2.0, 3) + 0.1


@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_coloured_noise_has_the_spectrum_it_names(beta: float) -> None:
    draws = Noise("coloured", Shape(64, 1, 4096), beta, dtype=F64).draw(0)[:, 0].numpy()
    power = (np.abs(np.fft.rfft(draws * np.hanning(64)[:, None], axis=0)) ** 2).mean(1)
    low, high = np.log(np.arange(4, 17)), np.log(power[4:17])
    assert np.polyfit(low, high, 1)[0] == pytest.approx(-beta, abs=0.25)


def test_coloured_commands_do_not_mix() -> None:
    draws = Noise("coloured", Shape(4, 3, 8192), 2.0, dtype=F64).draw(0)
    assert (torch.corrcoef(draws[1]) - torch.eye(3, dtype=F64)).abs().max() < 0.05


@pytest.mark.parametrize("kind", ["halton", "sobol"])
def test_low_discrepancy_points_are_more_uniform_than_white(kind: str) -> None:
    def discrepancy(name: str, seed: int) -> float:
        points = torch.special.ndtr(Noise(name, Shape(2, 2, 256), dtype=F64).draw(seed)).flatten(0, 1).T.numpy()
        return float(qmc.discrepancy(points))

    ours, white = ([discrepancy(name, seed) for seed in range(5)] for name in (kind, "white"))
    assert max(ours) < 0.5 * min(white)


@pytest.mark.parametrize("kind", NOISES)
def test_a_seed_names_a_draw(kind: str) -> None:
    shape = Shape(4, 2, 33)
    assert torch.equal(Noise(kind, shape).draw(5), Noise(kind, shape).draw(5))
    assert not torch.equal(Noise(kind, shape).draw(5), Noise(kind, shape).draw(6))


@pytest.mark.parametrize("kind", ["white", "coloured"])
def test_calls_are_independent(kind: str) -> None:
    noise = Noise(kind, Shape(4, 2, 2048), dtype=F64)
    a, b = noise.draw(0).flatten(0, 1), noise.draw(1).flatten(0, 1)
    across = torch.stack([torch.corrcoef(torch.stack((p, q)))[0, 1] for p, q in zip(a, b)])
    assert across.abs().max() < 0.1


@pytest.mark.parametrize("kind", ["halton", "sobol"])
def test_rotations_of_the_points_are_independent(kind: str) -> None:
    noise = Noise(kind, Shape(2, 1, 8), dtype=F64)
    base = torch.special.ndtr(noise.draw(0))
    turns = torch.stack([(torch.special.ndtr(noise.draw(seed)) - base)[:, 0, 0] % 1.0 for seed in range(1, 500)], 1)
    assert (turns.mean(1) - 0.5).abs().max() < 0.06 and torch.corrcoef(turns)[0, 1].abs() < 0.15


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("samples", [1, 3])
def test_one_knot_is_enough(kind: str, samples: int) -> None:
    draw = Noise(kind, Shape(1, 1, samples)).draw(0)
    assert draw.shape == (1, 1, samples) and torch.isfinite(draw).all()


def test_unknown_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown noise 'pink'"):
        Noise("pink", Shape(2, 1, 4))


# --- the planner ----------------------------------------------------------------------------------------------------


def test_sigma_is_the_spread_of_the_candidates() -> None:
    spreads = []
    for sigma in (0.1, 0.3):
        one = planner(bowl, RandomShooting(), samples=4096, sigma=sigma)
        spreads.append(one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)[1].candidates.std(-1))
    torch.testing.assert_close(spreads[1] / spreads[0], torch.full((4, 1), 3.0, dtype=F64), rtol=1e-9, atol=0)
    assert spreads[0].mean().item() == pytest.approx(0.1, rel=0.03)


def test_sigma_may_differ_by_knot_and_command() -> None:
    sigma = torch.tensor([[0.1, 1.0], [0.2, 2.0], [0.3, 3.0], [0.4, 4.0]], dtype=F64)
    one = planner(bowl, RandomShooting(), samples=4096, sigma=sigma, nu=2)
    candidates = one.plan(one.initial(tensor(0.0, 0.0)), tensor(0), None, 0.0)[1].candidates
    torch.testing.assert_close(candidates.std(-1), sigma, rtol=0.06, atol=0)


@pytest.mark.parametrize("name", RULE)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_commands_stay_within_their_bounds(name: str, interpolation: str) -> None:
    seen = []

    def spy(x: Tensor, commands: Tensor, parameters: Any) -> Tensor:
        seen.append(commands.abs().max().item())
        return bowl(x, commands, parameters)

    knots = Knots(4, 8, 0.1, interpolation)
    one = planner(spy, RULE[name], knots=knots, sigma=3.0, bound=0.7, iterations=3)
    result = one.plan(one.initial(tensor(0.0)), tensor(0.3), None, 0.0)[1]
    assert max(seen) <= 0.7 and max(seen) == pytest.approx(0.7)
    assert result.candidates.abs().max() <= 0.7 and result.knots.abs().max() <= 0.7 + 1e-12


@pytest.mark.parametrize("name", RULE)
def test_plan_is_pure(name: str) -> None:
    one = planner(bowl, RULE[name], iterations=3)
    x = tensor(0.4)
    first, _ = one.plan(one.initial(tensor(0.0)), x, None, 0.0)
    parts = (getattr(first.belief, part).clone() for part in ("mean", "spread", "best", "kept"))
    copy = PlannerState(Distribution(*parts), 0.0, 0, first.draws)
    a, result_a = one.plan(first, x, None, 0.1)
    b, result_b = one.plan(first, x, None, 0.1)
    assert same(a, b) and same(first, copy) and x.item() == 0.4
    assert torch.equal(result_a.knots, result_b.knots) and result_a.figures == result_b.figures
    assert torch.equal(result_a.candidates, result_b.candidates) and torch.equal(result_a.weights, result_b.weights)


@pytest.mark.parametrize("name", RULE)
def test_inner_iterations_are_nested_updates(name: str) -> None:
    x, inner = tensor(0.4), planner(bowl, RULE[name], iterations=4)
    start, _ = inner.plan(inner.initial(tensor(0.0)), x, None, 0.0)
    expected, result = inner.plan(start, x, None, 0.05)
    outer = planner(bowl, RULE[name])
    state = outer.shifted(start, 0.05)
    for _ in range(4):
        state, last = outer.iterate(state, x, None)
    assert same(state, expected) and torch.equal(last.knots, result.knots) and last.figures == result.figures


@pytest.mark.parametrize("name", RULE)
def test_the_seed_decides(name: str) -> None:
    one = planner(bowl, RULE[name])
    knots = [one.plan(one.initial(tensor(0.0), seed=seed), tensor(0), None, 0.0)[1].knots for seed in (3, 3, 4)]
    assert torch.equal(knots[0], knots[1]) and not torch.equal(knots[0], knots[2])


@pytest.mark.parametrize("name", RULE)
def test_one_plan_after_another_draws_anew(name: str) -> None:
    one = planner(bowl, RULE[name])
    state, first = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    second = one.plan(replace(one.initial(tensor(0.0)), draws=state.draws), tensor(0), None, 0.0)[1]
    assert not torch.equal(first.candidates[..., -1], second.candidates[..., -1])


@pytest.mark.parametrize("name", RULE)
def test_weights_sum_to_one(name: str) -> None:
    one = planner(bowl, RULE[name], iterations=2)
    weights = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)[1].weights
    assert weights.sum().item() == pytest.approx(1.0) and weights.min() >= 0


def test_every_short_name_has_its_rule_here() -> None:
    assert {name: f"{type(rule).__module__}:{type(rule).__name__}" for name, rule in RULE.items()} == RULES


@pytest.mark.parametrize("name", LEARNING)
def test_a_warm_start_is_shifted_by_the_time_that_passed(name: str) -> None:
    one = planner(bowl, RULE[name], iterations=2)
    state, _ = one.plan(one.initial(tensor(0.0), t=1.0), tensor(0.2), None, 1.0)
    later = one.shifted(state, 1.17)
    move = shift_of(one, 0.17)
    torch.testing.assert_close(later.belief.mean, move @ state.belief.mean)
    torch.testing.assert_close(later.belief.best, move @ state.belief.best)
    assert later.start == 1.17


def test_without_growth_the_spread_is_wide_again() -> None:
    one = planner(bowl, Cem(elites=8), iterations=5)
    state, _ = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    assert state.belief.spread.max() < 0.4
    assert torch.equal(one.shifted(state, 0.1).belief.spread, torch.full((4, 1), 0.5, dtype=F64))


def test_growth_widens_a_learnt_spread_up_to_sigma() -> None:
    one = planner(bowl, Cem(elites=8), iterations=3, growth=1.5)
    state, _ = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    grown = one.shifted(state, 0.0).belief.spread
    torch.testing.assert_close(grown, (1.5 * state.belief.spread).clamp(max=0.5))
    wide = replace(state, belief=replace(state.belief, spread=grown * 9))
    assert one.shifted(wide, 0.0).belief.spread.max().item() == 0.5


# --- costs that are not numbers -------------------------------------------------------------------------------------


def faulty(values: dict[int, float]) -> Callable[..., Tensor]:
    """Return the bowl with some samples' costs replaced."""

    def objective(x: Tensor, commands: Tensor, parameters: Any) -> Tensor:
        costs = bowl(x, commands, parameters)
        for index, value in values.items():
            costs[index] = value
        return costs

    return objective


BAD = {5: torch.nan, 6: -torch.inf, 7: torch.inf, 8: torch.nan}


@pytest.mark.parametrize("name", RULE)
def test_non_finite_costs_count_and_never_win(name: str) -> None:
    one = planner(faulty(BAD), RULE[name])
    state, result = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    bad = result.candidates[:, :, list(BAD)]
    assert result.figures.nonfinite == 4 and np.isfinite([result.figures.best, result.figures.mean, result.figures.ess]).all()
    assert not result.weights[list(BAD)].any() and result.weights.sum().item() == pytest.approx(1)
    assert not any(torch.equal(state.belief.best, bad[..., i]) for i in range(4))


@pytest.mark.parametrize("name", RULE)
def test_the_update_is_that_of_the_finite_samples(name: str) -> None:
    one, old = planner(faulty(BAD), RULE[name]), planner(bowl, RULE[name])
    start = one.initial(tensor(0.0))
    state, result = one.plan(start, tensor(0), None, 0.0)
    finite = [i for i in range(64) if i not in BAD]
    candidates = result.candidates[:, :, finite]
    costs = bowl(tensor(0), old.knots.commands(candidates), None)
    expected, _ = RULE[name].update(old.shifted(start, 0.0).belief, candidates, costs)
    torch.testing.assert_close(state.belief.mean, expected.mean)
    assert torch.equal(state.belief.best, expected.best)


@pytest.mark.parametrize("name", RULE)
def test_with_few_finite_costs_only_those_are_kept(name: str) -> None:
    bad = {i: torch.nan for i in range(62)}
    one = planner(faulty(bad), RULE[name])
    state, result = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    finite = {tuple(result.candidates[:, 0, i].tolist()) for i in (62, 63)}
    kept = {tuple(state.belief.kept[:, 0, i].tolist()) for i in range(state.belief.kept.shape[-1])}
    assert kept <= finite and tuple(state.belief.best[:, 0].tolist()) in finite
    assert torch.isfinite(state.belief.mean).all() and torch.isfinite(state.belief.spread).all()


@pytest.mark.parametrize("name", RULE)
@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
def test_without_a_finite_cost_the_belief_stays(name: str, value: float) -> None:
    good, one = planner(bowl, RULE[name]), planner(lambda x, u, p: torch.full((u.shape[-1],), value, dtype=F64), RULE[name])
    before, _ = good.plan(good.initial(tensor(0.0)), tensor(0.3), None, 0.0)
    shifted = one.shifted(before, 0.1)
    after, result = one.plan(before, tensor(0.3), None, 0.1)
    assert same(replace(after, draws=shifted.draws), shifted)
    assert result.figures == (torch.inf, torch.inf, 0.0, 64) and not result.weights.any()
    assert torch.isfinite(result.knots).all()


# --- rules ----------------------------------------------------------------------------------------------------------


def candidates(seed: int = 0, samples: int = 200) -> tuple[Distribution, Tensor, Tensor]:
    """Return a belief, candidates (3, 2, N) and their costs."""
    generator = torch.Generator().manual_seed(seed)
    knots = torch.randn(3, 2, samples, generator=generator, dtype=F64)
    zero = torch.zeros(3, 2, dtype=F64)
    return Distribution(zero, zero + 1, zero, zero[..., None][..., :0]), knots, (knots - 0.5).square().sum((0, 1))


@pytest.mark.parametrize("spoilt", [False, True])
@pytest.mark.parametrize("name", RULE)
def test_a_rule_does_the_same_to_numpys_arrays(name: str, spoilt: bool) -> None:
    old, knots, costs = candidates()
    if spoilt:
        costs[::3] = torch.inf
    plain = Distribution(*(getattr(old, part).numpy() for part in ("mean", "spread", "best", "kept")))
    new, weights = RULE[name].update(old, knots, costs)
    found, shares = RULE[name].update(plain, knots.numpy(), costs.numpy())
    for a, b in ((weights, shares), *((getattr(new, part), getattr(found, part)) for part in ("mean", "spread", "best", "kept"))):
        assert isinstance(a, Tensor) and isinstance(b, np.ndarray)
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-15)


def test_mppi_weights_are_the_softmin() -> None:
    old, knots, costs = candidates()
    raw = np.exp(-costs.numpy() / 0.7)
    new, weights = Mppi(temperature=0.7).update(old, knots, costs)
    np.testing.assert_allclose(weights, raw / raw.sum(), rtol=1e-9)
    np.testing.assert_allclose(new.mean, (knots.numpy() * (raw / raw.sum())).sum(-1), rtol=1e-9)


def test_mppi_cold_takes_the_best_sample() -> None:
    old, knots, costs = candidates()
    new, _ = Mppi(temperature=1e-9).update(old, knots, costs)
    assert torch.equal(new.mean, knots[..., costs.argmin()])


def test_mppi_hot_takes_the_plain_mean() -> None:
    old, knots, costs = candidates()
    new, _ = Mppi(temperature=1e12).update(old, knots, costs)
    torch.testing.assert_close(new.mean, knots.mean(-1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 1e6, -1e6])
def test_mppi_sees_differences_on_top_of_large_costs(offset: float) -> None:
    old, knots, _ = candidates(samples=3)
    costs = offset + torch.tensor([0.0, 0.0625, 0.125])  # exact in float32, where 1e6 / temperature is not
    _, weights = Mppi(temperature=0.0625).update(old, knots.float(), costs)
    np.testing.assert_allclose(weights, np.exp([0.0, -1, -2]) / np.exp([0.0, -1, -2]).sum(), rtol=1e-5)
    _, narrow = Mppi(temperature=0.03).update(old, knots.float(), costs)
    assert (narrow[0] / narrow[1]).item() == pytest.approx(np.exp(0.0625 / 0.03), rel=1e-4)


@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_mppi_meets_its_effective_sample_size_on_top_of_large_costs(offset: float) -> None:
    old, knots, costs = candidates(samples=500)
    _, weights = Mppi(ess=0.1).update(old, knots, costs + offset)
    assert 1 / weights.square().sum().item() == pytest.approx(50, rel=0.2)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_mppi_meets_its_effective_sample_size(share: float, scale: float) -> None:
    old, knots, costs = candidates(samples=500)
    costs[:100] = torch.inf
    _, weights = Mppi(ess=share).update(old, knots, costs * scale)
    assert 1 / weights.square().sum().item() == pytest.approx(share * 400, rel=0.2)  # the ladder's rungs are a third apart


def test_mppi_meets_its_effective_sample_size_beside_a_diverged_sample() -> None:
    old, knots, costs = candidates(samples=500)
    costs[3] = 1e12
    _, weights = Mppi(ess=0.1).update(old, knots, costs)
    assert 1 / weights.square().sum().item() == pytest.approx(50, rel=0.2)


def test_mppi_with_equal_costs_weighs_equally() -> None:
    old, knots, costs = candidates()
    _, weights = Mppi(ess=0.1).update(old, knots, torch.full_like(costs, 3.0))
    torch.testing.assert_close(weights, torch.full_like(costs, 1 / 200))


def test_mppi_without_adaptation_keeps_its_spread() -> None:
    old, knots, costs = candidates()
    assert torch.equal(Mppi(ess=0.1).update(old, knots, costs)[0].spread, old.spread)


def test_mppi_adapts_to_the_weighted_deviation() -> None:
    old, knots, costs = candidates()
    new, weights = Mppi(temperature=0.5, adapt=0.3).update(old, knots, costs)
    w, k = weights.numpy(), knots.numpy()
    deviation = np.sqrt((w * (k - (w * k).sum(-1, keepdims=True)) ** 2).sum(-1))
    np.testing.assert_allclose(new.spread, 0.7 + 0.3 * deviation, rtol=1e-9)


def test_cem_refits_to_its_elites() -> None:
    old, knots, costs = candidates()
    new, weights = Cem(elites=10, smoothing=0.0).update(old, knots, costs)
    elite = knots.numpy()[..., np.argsort(costs.numpy())[:10]]
    np.testing.assert_allclose(new.mean, elite.mean(-1), rtol=1e-12)
    np.testing.assert_allclose(new.spread, elite.std(-1), rtol=1e-12)
    assert 1 / weights.square().sum().item() == pytest.approx(10)


def test_cem_smooths_with_the_old() -> None:
    old, knots, costs = candidates()
    old = replace(old, mean=old.mean + 2)
    plain, smooth = (Cem(elites=10, smoothing=share).update(old, knots, costs)[0] for share in (0.0, 0.4))
    torch.testing.assert_close(smooth.mean, 0.4 * old.mean + 0.6 * plain.mean)
    torch.testing.assert_close(smooth.spread, 0.4 * old.spread + 0.6 * plain.spread)


NARROW = [
    Cem(elites=1, smoothing=0, floor=0.2),
    ICem(elites=1, smoothing=0, floor=0.2),
    Mppi(temperature=1e-9, adapt=0.9, floor=0.2),
]


@pytest.mark.parametrize("rule", NARROW)
def test_the_spread_stays_above_its_floor(rule: Rule) -> None:
    one = planner(bowl, rule, iterations=12)
    state, _ = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    torch.testing.assert_close(state.belief.spread, torch.full((4, 1), 0.1, dtype=F64))


def test_icem_keeps_its_best_and_costs_them_again() -> None:
    one = planner(bowl, ICem(elites=8, keep=3))
    state, first = one.iterate(one.initial(tensor(0.0)), tensor(0), None)
    costs = bowl(tensor(0), one.knots.commands(first.candidates), None)
    assert torch.equal(state.belief.kept, first.candidates[:, :, costs.argsort()[:3]])
    _, second = one.iterate(state, tensor(0), None)
    assert torch.equal(second.candidates[:, :, :3], state.belief.kept)


@pytest.mark.parametrize("samples", [2, 4, 8, 64])
def test_icem_always_draws_half_its_samples_anew(samples: int) -> None:
    one = planner(bowl, ICem(elites=2, keep=8), samples=samples)
    state, first = one.iterate(one.initial(tensor(0.0)), tensor(0), None)
    _, second = one.iterate(state, tensor(0), None)
    count = min(8, samples // 2)
    assert first.candidates.shape == second.candidates.shape == (4, 1, samples)
    assert torch.equal(second.candidates[..., :count], state.belief.kept[..., :count])
    torch.testing.assert_close(second.candidates[:, :, count], state.belief.mean)


def test_icem_shifts_what_it_keeps() -> None:
    one = planner(bowl, ICem(elites=8, keep=3), iterations=2)
    state, _ = one.plan(one.initial(tensor(0.0)), tensor(0), None, 0.0)
    expected = torch.stack([shift_of(one, 0.17) @ state.belief.kept[..., i] for i in range(3)], -1)
    torch.testing.assert_close(one.shifted(state, 0.17).belief.kept, expected)


@pytest.mark.parametrize("name", ["predictive_sampling", "icem"])
def test_with_a_fixed_objective_it_never_gets_worse(name: str) -> None:
    one = planner(bowl, RULE[name], samples=16)
    state, best = one.initial(tensor(0.0)), []
    for _ in range(30):
        state, result = one.iterate(state, tensor(0.2), None)
        best.append(result.figures.best)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(best, best[1:])) and best[-1] < 0.9 * best[0]


def test_random_shooting_learns_nothing() -> None:
    one = planner(bowl, RandomShooting(), iterations=5)
    state, _ = one.plan(one.initial(tensor(0.3)), tensor(0), None, 0.0)
    assert torch.equal(state.belief.mean, torch.full((4, 1), 0.3, dtype=F64))


# --- known optima ---------------------------------------------------------------------------------------------------

STEPS = 20
A, B = tensor(1, 0.1, 0, 1).view(2, 2), tensor(0.005, 0.1)[:, None]
Q, R, Q_END = torch.diag(tensor(1.0, 0.1)), 0.05, torch.diag(tensor(10.0, 1.0))


def quadratic(x: Tensor, commands: Tensor, parameters: Any) -> Tensor:
    """Return the cost of driving a double integrator to rest at the origin."""
    state, total = x[:, None].expand(-1, commands.shape[-1]), 0.0
    for k, u in enumerate(commands):
        state = A @ state + B @ u
        weight = Q_END if k == STEPS - 1 else Q
        total = total + (state * (weight @ state)).sum(0) + R * u[0] ** 2
    return total


def riccati(x: Tensor) -> float:
    """Return the least cost, by the finite-horizon Riccati recursion."""
    value = Q_END
    for k in range(STEPS):
        gain = torch.linalg.solve(R + B.T @ value @ B, B.T @ value @ A)
        ahead = A.T @ value @ (A - B @ gain)
        value = ahead + (Q if k < STEPS - 1 else 0)
    return float(x @ value @ x)


START = tensor(1.0, 0.0)
LQR_RULE = {
    "cem": (Cem(elites=32, smoothing=0.1, floor=0.0), "white", 1.001),
    "icem": (ICem(elites=32, smoothing=0.1, floor=0.0, keep=8), "white", 1.001),
    "icem coloured": (ICem(elites=32, smoothing=0.1, floor=0.0, keep=8), "coloured", 1.05),  # fast changes are hardly tried
    "mppi": (Mppi(ess=0.05, adapt=0.5, floor=0.0), "white", 1.001),
}


def lqr(rule: Rule, noise: str, seed: int, samples: int, iterations: int, sigma: float = 2.0) -> float:
    """Return the cost of the sequence a planner with a knot a step would follow."""
    knots = Knots(STEPS, STEPS, 0.1, "zero")
    one = planner(quadratic, rule, knots=knots, samples=samples, noise=noise, sigma=sigma, iterations=iterations)
    result = one.plan(one.initial(tensor(0.0), seed=seed), START, None, 0.0)[1]
    return quadratic(START, one.knots.commands(result.knots[..., None]), None).item()


def test_riccati_is_the_optimum_of_the_quadratic_problem() -> None:
    u = torch.zeros(STEPS, 1, 1, dtype=F64, requires_grad=True)
    hessian = torch.autograd.functional.hessian(lambda v: quadratic(START, v.view(STEPS, 1, 1), None).sum(), u.detach().flatten())
    gradient = torch.autograd.grad(quadratic(START, u, None).sum(), u)[0].flatten()
    best = -torch.linalg.solve(hessian, gradient)
    assert quadratic(START, best.view(STEPS, 1, 1), None).item() == pytest.approx(riccati(START), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", LQR_RULE)
def test_a_linear_quadratic_problem_is_solved(name: str, seed: int) -> None:
    rule, noise, bound = LQR_RULE[name]
    ratio = lqr(rule, noise, seed, samples=400, iterations=40) / riccati(START)
    assert 1 - 1e-9 <= ratio < bound, f"{name}: {ratio:.5f} of the optimal cost"


@pytest.mark.parametrize("name", LEARNING)
def test_learning_beats_random_shooting_at_equal_samples(name: str) -> None:
    best, each = riccati(START), []
    for seed in range(8):
        shooting = lqr(RandomShooting(), "white", seed, samples=64 * 16, iterations=1, sigma=1.0) - best
        learnt = lqr(RULE[name], "white", seed, samples=64, iterations=16, sigma=1.0) - best
        each.append(learnt / shooting)
    # Following one sample is luck: predictive sampling is held to better at every seed, and to the same on average.
    assert max(each) < (1.0 if name == "predictive_sampling" else 0.7) and np.mean(each) < 0.7, f"{name}: {each}"


# Hanging pendulum: 1 kg at 0.5 m, a motor of 2 N·m at a command of 1; a quarter of the torque that holds it level.
MASS, LENGTH, GEAR, STEP, GRAVITY = 1.0, 0.5, 2.0, 0.02, 9.81
HANGING = tensor(np.pi, 0.0)


def pendulum(x: Tensor, u: Tensor, dt: float) -> Tensor:
    """Return the state (2, N) a step on; the angle is measured from upright."""
    acceleration = GRAVITY / LENGTH * torch.sin(x[0]) + GEAR / (MASS * LENGTH**2) * u[0]
    speed = x[1] + dt * acceleration
    return torch.stack((x[0] + dt * speed, speed))


def swing(dt: float) -> Callable[..., Tensor]:
    """Return the cost of angle from upright, speed and effort, over the horizon."""

    def objective(x: Tensor, commands: Tensor, parameters: Any) -> Tensor:
        state, total = x[:, None].expand(-1, commands.shape[-1]), 0.0
        for u in commands:
            state = pendulum(state, u, dt)
            total = total + dt * ((1 - torch.cos(state[0])) + 0.01 * state[1] ** 2 + 0.01 * u[0] ** 2)
        return total + 1 - torch.cos(state[0])

    return objective


def open_loop(rule: Rule, noise: str, samples: int, iterations: int, seed: int = 0) -> float:
    """Return the cost of the sequence found for the hanging pendulum, 50 steps of 20 ms, 10 linear knots."""
    knots = Knots(10, 50, STEP, "linear")
    one = planner(swing(STEP), rule, knots=knots, samples=samples, noise=noise, sigma=1.0, bound=1.0, iterations=iterations)
    result = one.plan(one.initial(tensor(0.0), seed=seed), HANGING, None, 0.0)[1]
    return swing(STEP)(HANGING, one.knots.commands(result.knots[..., None]), None).item()


@pytest.fixture(scope="module")
def pendulum_costs() -> tuple[float, float]:
    """Return the cost of doing nothing and the optimum, as the best of three large searches.

    In one second the motor lifts the pendulum little: what a rule gains is measured against what can be gained.
    """
    nothing = swing(STEP)(HANGING, torch.zeros(50, 1, 1, dtype=F64), None).item()
    return nothing, min(open_loop(Cem(elites=100, floor=0.0), "white", 2000, 40, seed) for seed in (10, 11, 12))


PENDULUM_RULE = {
    "random_shooting": (RandomShooting(), "white", 1, 0.5),
    "predictive_sampling": (PredictiveSampling(), "white", 15, 0.03),
    "cem": (Cem(elites=20), "white", 15, 0.03),
    "icem": (ICem(elites=20), "coloured", 15, 0.05),
    "mppi": (Mppi(ess=0.05, adapt=0.5), "white", 15, 0.05),
}


@pytest.mark.parametrize("name", PENDULUM_RULE)
def test_a_hanging_pendulum_swings_almost_as_well_as_it_can(name: str, pendulum_costs: tuple[float, float]) -> None:
    rule, noise, iterations, short = PENDULUM_RULE[name]
    nothing, best = pendulum_costs
    cost = open_loop(rule, noise, 200 * (15 // iterations), iterations)
    assert cost - best < short * (nothing - best), f"{name}: cost {cost:.4f}, optimum {best:.4f}, doing nothing {nothing:.4f}"


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", LEARNING)
def test_a_pendulum_swings_up_and_stays_up(name: str, seed: int) -> None:
    dt, rule, noise = 0.04, *PENDULUM_RULE[name][:2]
    knots = Knots(10, 40, dt, "linear")
    one = planner(swing(dt), rule, knots=knots, samples=128, noise=noise, sigma=0.7, bound=1.0, iterations=2)
    x, state = HANGING, one.initial(tensor(0.0), seed=seed)
    for step in range(150):
        state, result = one.plan(state, x, None, step * dt)
        u = one.knots.commands(result.knots[..., None])[0]
        for _ in range(4):
            x = pendulum(x[:, None], u, dt / 4)[:, 0]
        if step >= 125:  # the last second
            tilt = abs((x[0].item() + np.pi) % (2 * np.pi) - np.pi)
            assert tilt < 0.3, f"{name}: {tilt:.3f} rad from upright at {step * dt:.2f} s"

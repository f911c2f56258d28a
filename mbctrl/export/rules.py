"""Update rules as graphs: the arithmetic of ``mbctrl.planning.rules`` without a look at the host in between."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.errors import SpecError
from mbctrl.planning.rules.base import Rule
from mbctrl.planning.rules.cem import Cem
from mbctrl.planning.rules.icem import ICem
from mbctrl.planning.rules.mppi import LADDERS, Mppi
from mbctrl.planning.rules.shooting import PredictiveSampling, RandomShooting

BIG = 3.0e38
"""Stands for the cost of a rollout that is not finite: TopK and differences of infinities are not portable."""


@dataclass(frozen=True)
class Updated:
    """What an update gives: ``mean``, ``spread``, ``best`` (K, nu), ``kept`` (K, nu, E) or None, ``weights`` (N,)."""

    mean: Tensor
    spread: Tensor
    best: Tensor
    kept: Tensor | None
    weights: Tensor


def refuse_unexportable(rule: Rule) -> None:
    """Raise SpecError naming the rule where it has no graph."""
    if type(rule) not in (Cem, ICem, Mppi, PredictiveSampling, RandomShooting):
        known = "cem, icem, mppi, predictive_sampling, random_shooting"
        raise SpecError(f"{type(rule).__name__} has no ONNX graph; exportable: {known}", key="rule")


def update(rule: Rule, mean: Tensor, spread: Tensor, knots: Tensor, costs: Tensor, good: Tensor) -> Updated:
    """Return the update of ``rule``; ``costs`` (N,) have BIG where ``good`` (N,) is False."""
    cheapest, index = torch.topk(costs, 1, largest=False)
    best = knots[:, :, index].squeeze(-1)
    if isinstance(rule, Mppi):
        return _mppi(rule, mean, spread, knots, costs - cheapest, good, best)
    if isinstance(rule, (Cem, ICem)):
        return _cem(rule, mean, spread, knots, costs, best)
    one = torch.nn.functional.one_hot(index, costs.shape[0]).to(costs.dtype).squeeze(0)
    return Updated(mean if isinstance(rule, RandomShooting) else best, spread, best, None, one)


def _cem(rule: Cem | ICem, mean: Tensor, spread: Tensor, knots: Tensor, costs: Tensor, best: Tensor) -> Updated:
    count, share = min(rule.elites, costs.shape[0]), rule.smoothing
    values, index = torch.topk(costs, count, largest=False)
    chosen, real = knots[:, :, index], (values < BIG).to(costs.dtype)
    real = real / real.sum().clamp(min=1.0)
    centre = chosen @ real
    width = (((chosen - centre[:, :, None]) ** 2) @ real).sqrt()
    weights = torch.zeros_like(costs).scatter(0, index, real)
    new_mean, new_spread = share * mean + (1 - share) * centre, share * spread + (1 - share) * width
    kept = chosen[:, :, : rule.keep] if isinstance(rule, ICem) and rule.keep else None
    return Updated(new_mean, new_spread, best, kept, weights)


def _mppi(rule: Mppi, mean: Tensor, spread: Tensor, knots: Tensor, excess: Tensor, good: Tensor, best: Tensor) -> Updated:
    inverse = 1.0 / rule.temperature if rule.ess is None else _with_ess(rule.ess, excess, good)
    shares = torch.exp(-excess * inverse)
    shares = torch.where(good & (shares > 1e-30), shares, shares.new_tensor(0.0))
    weights = shares / shares.sum()
    centre = knots @ weights
    if rule.adapt > 0:
        around = (((knots - centre[:, :, None]) ** 2) @ weights).sqrt()
        spread = (1 - rule.adapt) * spread + rule.adapt * around
    return Updated(centre, spread, best, None, weights)


def _with_ess(share: float, excess: Tensor, good: Tensor) -> Tensor:
    """Return 1 over the temperature whose effective sample size is ``share`` of the finite candidates."""
    wanted = (share * good.to(excess.dtype).sum()).clamp(min=1e-6)
    most = min(int(share * excess.shape[0]) + 1, excess.shape[0])
    lowest = torch.topk(excess, most, largest=False, sorted=True)[0]
    rank = wanted.to(torch.int64).clamp(max=most - 1)
    scale = lowest.index_select(0, rank.reshape(1)).squeeze(0).clamp(min=1e-12)
    near, far = (_rung(excess, scale, wanted, ladder) for ladder in LADDERS)
    inside = (near[1] <= wanted) & (wanted <= near[2])
    return torch.where(inside, near[0], far[0]) / scale


def _rung(excess: Tensor, scale: Tensor, wanted: Tensor, ladder: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Return 10 to minus the interpolated power, and the effective sample sizes at the ladder's ends."""
    powers = torch.tensor(ladder, dtype=excess.dtype)
    inverse = torch.tensor(10.0**-ladder, dtype=excess.dtype)
    weights = torch.exp(torch.maximum(-(excess / scale)[None, :] * inverse[:, None], excess.new_tensor(-40.0)))
    sizes = weights.sum(1) ** 2 / (weights * weights).sum(1)
    logs, target = torch.log(sizes), torch.log(wanted)
    low = ((sizes[1:-1] <= wanted).to(torch.int64).sum()).reshape(1)
    a, b = logs.index_select(0, low), logs.index_select(0, low + 1)
    part = ((target - a) / (b - a).clamp(min=1e-12)).clamp(0.0, 1.0)
    power = powers.index_select(0, low) * (1 - part) + powers.index_select(0, low + 1) * part
    return torch.exp(-power.squeeze(0) * float(np.log(10.0))), sizes[0], sizes[-1]

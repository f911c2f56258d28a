"""Model predictive path integral control."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mbctrl.base.robot import Positive
from mbctrl.planning.rules.base import Distribution, Factor, Rule, Share, ShareOrNone, effective_sample_size


@dataclass(frozen=True)
class Mppi(Rule):
    """Average the candidates with weights exp(-cost / temperature), the cheapest cost subtracted first.

    Source: Williams et al., "Information Theoretic MPC for Model-Based Reinforcement Learning" (2017).

    Args:
        temperature: [cost]; the fixed one, used where ``ess`` is None.
        ess: share of the samples that should count, (0, 1): the temperature is chosen at each update so that the
            effective sample size is that share of the finite candidates.
        adapt: share of the spread refitted to the weighted candidates at each update, [0, 1); 0: fixed covariance.
        floor: least spread, as a share of the initial one.
    """

    temperature: Positive = 1.0
    ess: Share | None = None
    adapt: ShareOrNone = 0.0
    floor: Factor = 0.1

    def update(self, old: Distribution, knots: Tensor, costs: Tensor) -> tuple[Distribution, Tensor]:
        """Return the weighted mean (and spread, if adapted)."""
        excess = costs - costs.min()  # inf stays inf and weighs nothing
        weights = torch.softmax(-excess / self.temperature, 0) if self.ess is None else self._with_ess(excess)
        mean = knots @ weights
        spread = old.spread
        if self.adapt > 0:
            around = ((knots - mean[..., None]) ** 2 @ weights).sqrt()
            spread = (1 - self.adapt) * spread + self.adapt * around
        return replace(old, mean=mean, spread=spread, best=knots[:, :, costs.argmin()]), weights

    def _with_ess(self, excess: Tensor) -> Tensor:
        """Return the weights at the temperature whose effective sample size is nearest the one asked for."""
        count = torch.isfinite(excess).sum()
        # The temperature is of the order of the excess at the rank asked for; a mean would follow one diverged sample.
        rank = (self.ess * count).long().clamp(max=len(excess) - 1)
        scale = excess.sort().values[rank]
        ladder = torch.logspace(-4, 2, 49, dtype=excess.dtype, device=excess.device) * scale.clamp(min=1e-12)
        weights = torch.softmax(-excess / ladder[:, None], 1)
        size = effective_sample_size(weights)
        return weights[(size - self.ess * count).abs().argmin()]

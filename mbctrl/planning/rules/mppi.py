"""Model predictive path integral control."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mbctrl.base.robot import Positive
from mbctrl.planning.arrays import Array, host, like
from mbctrl.planning.rules.base import Distribution, Factor, Rule, Share, ShareOrNone

LADDERS = np.linspace(-1, 0.5, 10), np.linspace(-4, 2, 49)
"""Powers of ten times the scale of the costs that a temperature is looked for at: near by, then far."""


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

    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return the weighted mean (and spread, if adapted)."""
        values = host(costs)  # a pass over a few thousand numbers is quicker here than as a tensor
        best = int(values.argmin())
        excess = values - values[best]  # inf stays inf and weighs nothing
        inverse = 1.0 / self.temperature if self.ess is None else self._with_ess(excess)
        shares = np.exp(excess * np.array(-inverse, excess.dtype))
        shares *= shares > 1e-30  # next to nothing is nothing: denormal numbers are many times slower
        weights = like(shares / shares.sum(), costs)
        mean, spread = knots @ weights, old.spread
        if self.adapt > 0:
            around = ((knots - mean[..., None]) ** 2 @ weights) ** 0.5
            spread = (1 - self.adapt) * spread + self.adapt * around
        return Distribution(mean, spread, knots[:, :, best], old.kept), weights

    def _with_ess(self, excess: np.ndarray) -> float:
        """Return 1 over the temperature whose effective sample size is the one asked for."""
        wanted = self.ess * np.count_nonzero(excess < np.inf)
        # The temperature is of the order of the excess at the rank asked for; a mean would follow one diverged sample.
        scale = max(float(np.partition(excess, int(wanted))[int(wanted)]), 1e-12)
        ladder = LADDERS[0]
        sizes = _sizes(excess, scale, ladder)
        if not sizes[0] <= wanted <= sizes[-1]:
            ladder = LADDERS[1]
            sizes = _sizes(excess, scale, ladder)
        # The size grows with the temperature, between rungs as a power of it.
        power = np.interp(math.log(wanted), np.log(sizes), ladder)
        return 10.0**-power / scale


def _sizes(values: np.ndarray, scale: float, ladder: np.ndarray) -> np.ndarray:
    """Return the effective sample sizes at temperatures of ``scale`` times powers of ten, (R,)."""
    # Cut at e^-40: squares stay normal numbers, with which processors are many times faster.
    weights = np.exp(np.maximum(values * (-(10.0**-ladder) / scale).astype(values.dtype)[:, None], -40.0))
    return weights.sum(1) ** 2 / np.einsum("ij,ij->i", weights, weights)

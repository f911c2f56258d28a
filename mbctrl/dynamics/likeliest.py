"""Several learned models of one robot, of which one is trusted: the one under which the last seconds are likeliest.

As in Page's test (1954, "Continuous inspection schemes"), sums of log-likelihoods are kept from falling behind without end.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mbctrl.dynamics.hybrid import HybridDynamics

_TAILS = 4.0
"""Degrees of freedom of the distribution (Student's) errors are judged by: one outlier, a touch in the midst of a step, decides
nothing."""


class Likeliest:
    """Follows models' likelihoods; ``best`` is the index of the one that is trusted, the first one in the beginning.

    Args:
        models: whose gates are the same; with variances.
        window: transitions, of those with the gate open, in which likelihoods are forgotten.
        margin: by how much [nats] another model must be likelier to be trusted in place of the one that is.
    """

    def __init__(self, models: Sequence[HybridDynamics], window: int, margin: float) -> None:
        self._models, self._keep, self._margin = models, np.exp(-1.0 / window), margin
        self.likelihoods = np.zeros(len(models))
        self.best = 0

    @torch.no_grad()
    def see(self, x: Tensor, u: Tensor, after: Tensor) -> bool:
        """Take transitions from ``x`` (nx, N) under ``u`` (nu, N) to ``after`` (nx, N); return whether ``best`` changed."""
        before = self.best
        for found in torch.stack([_log_likelihood(model, x, u, after) for model in self._models]).T.numpy():  # (models,)
            sound = np.isfinite(found)
            if sound.any() and found[sound].any():
                told = self._keep * self.likelihoods + np.where(sound, found, -np.inf)  # once no number, never trusted
                # None falls behind without end: else what was true for long would be believed for as long afterwards.
                self.likelihoods = np.where(np.isfinite(told), np.maximum(told, told.max() - 2 * self._margin), told)
        leader = int(self.likelihoods.argmax())
        if self.likelihoods[leader] > self.likelihoods[self.best] + self._margin:
            self.best = leader
        return self.best != before


def _log_likelihood(model: HybridDynamics, x: Tensor, u: Tensor, after: Tensor) -> Tensor:
    """Return (N,) [nats], up to a constant, of the speeds after transitions; 0 where the gate is closed.

    Joints count as many as the networks have outputs: three impulses explain the errors of all of them.
    """
    error, deviation = (after - model.step(x, u))[model.nq :], model.deviation(x, u)
    found = -0.5 * (_TAILS + 1) * torch.log1p((error / deviation).square() / _TAILS) - deviation.log()
    share = len(model.residual.output_scale) / len(error)
    return torch.where((deviation == 0).all(0), torch.zeros(()).to(found), share * found.sum(0))

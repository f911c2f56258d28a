"""The last layer of an ensemble, told by what was seen in the last seconds: Bayesian linear regression on what it takes in.

What is added to the networks' sum is a normal process of zero mean: linear in the last hidden layers' values, its prior deviation
a ``share`` of the outputs' scale where it was seen, so that it does not depend on the networks' width (Rasmussen and Williams,
"Gaussian processes for machine learning", 2006, eq. 2.11 and 2.12). Nothing else of the networks moves, nor the gate: where that
is closed, the physics stays exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mbctrl.dynamics.hybrid import HybridDynamics, Told
from mbctrl.dynamics.residual import Residual

_OPEN = 0.5  # of the gate: below, what is missed says little
_FEWEST = 10  # transitions that tell anything
_FARTHEST = 1.0  # root mean square of what is added where it was seen, of the outputs' scale


class LastLayer:
    """Refits one ensemble.

    Args:
        model: as it was learnt, in double precision.
        share: prior deviation of what is added, of the outputs' scale.
        window: how many transitions it looks back on, of those with the gate open.
    """

    def __init__(self, model: HybridDynamics, share: float, window: int) -> None:
        self._model, self._share, self._window = model, share, window
        self._told: Told | None = None

    def forget(self) -> None:
        """Forget what was seen: it was of another contact."""
        self._told = None

    @torch.no_grad()
    def see(self, x: Tensor, u: Tensor, after: Tensor) -> None:
        """Take transitions from ``x`` (nx, N) under ``u`` (nu, N) to ``after`` (nx, N), in order."""
        told = self._model.told(x, u, after)
        sound = (told.gate > _OPEN) & torch.isfinite(torch.cat((told.features, told.off, told.variance))).all(0)
        kept = [values[..., sound] for values in told]
        if self._told is not None:
            kept = [torch.cat(pair, -1) for pair in zip(self._told, kept)]
        self._told = Told(*(values[..., -self._window :] for values in kept))

    def refit(self) -> Residual | None:
        """Return the ensemble that explains what was seen; None where that is too little, or where no number is found."""
        if self._told is None or len(self._told.gate) < _FEWEST:
            return None
        features = torch.cat((self._told.features, torch.ones_like(self._told.gate)[None]))
        size, scale = features.square().sum(0).mean(), torch.as_tensor(self._model.residual.output_scale)
        like, added = features.T @ features / size, []
        for off, variance, prior in zip(self._told.off, self._told.variance, (self._share * scale) ** 2):
            added.append(prior / size * (features @ torch.linalg.solve(prior * like + torch.diag(variance), off)))
        weights = torch.stack(added)  # (outputs, values + 1)
        far = (weights @ features).square().mean(1).sqrt() / (_FARTHEST * scale)
        found = (weights / far.clamp(min=1.0)[:, None]).numpy()
        return self._model.residual.nudged(found[:, :-1], found[:, -1]) if torch.isfinite(weights).all() else None

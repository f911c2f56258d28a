"""The networks while they are trained: E members as one batched product a layer.

One call for all members is 1.3 to 2 times as fast as a loop over them at 3 to 5 members, two layers of 96 and batches of 64
to 256 on one core; at 1024 the two are level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mbctrl.dynamics.hybrid import ACTIVATIONS
from mbctrl.dynamics.residual import Spread

LOWEST, HIGHEST = -10.0, 3.0
"""Bounds of the logarithm of a variance, in units of the targets' mean square."""
_STEEPEST = {"tanh": 1.0, "relu": 1.0, "silu": 1.0999}
"""Largest slope of each activation."""


class Ensemble:
    """E networks with weights of their own.

    Args:
        sizes: inputs, hidden layers, outputs.
        members: E.
        activation: between layers.
        outputs: (nv) of which there are twice as many with ``variance``.
        variance: whether the second half of the outputs are log-variances.
        generator: of the first weights.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        members: int,
        activation: str,
        variance: bool,
        generator: torch.Generator,
    ) -> None:
        sizes = (inputs, *hidden, 2 * outputs if variance else outputs)
        self.outputs, self.activation, self.variance = outputs, activation, variance
        self.weights = [
            torch.randn(members, b, a, generator=generator).mul_(a**-0.5).requires_grad_() for a, b in zip(sizes, sizes[1:])
        ]
        self.biases = [torch.zeros(members, b, requires_grad=True) for b in sizes[1:]]
        low, high = (torch.full((outputs,), bound) for bound in (LOWEST, HIGHEST))
        self._spread = Spread(low, high, torch.ones(outputs), torch.zeros(2, outputs))

    @property
    def parameters(self) -> list[Tensor]:
        """All weights and biases; the first axis of each is the member."""
        return [*self.weights, *self.biases]

    def __call__(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and log-variances (E, B, nv) for inputs (E, B, inputs), or (1, B, inputs) that all share."""
        y, last = inputs.expand(len(self.weights[0]), -1, -1), len(self.weights) - 1
        for k, (w, b) in enumerate(zip(self.weights, self.biases)):
            y = torch.baddbmm(b[:, None], y, w.transpose(1, 2))
            y = ACTIVATIONS[self.activation](y) if k < last else y
        mean = y[..., : self.outputs]
        if not self.variance:
            return mean, torch.zeros_like(mean)
        return mean, self._spread.bounded(y[..., self.outputs :], torch.nn.functional.softplus)

    @torch.no_grad()
    def bound(self, lipschitz: float) -> None:
        """Scale weights down until outputs change at most ``lipschitz`` times as much as inputs (Euclidean norms).

        The product of the layers' largest singular values and the activations' steepest slopes bounds what a network does to a
        difference (Gouk et al., "Regularisation of neural networks by enforcing Lipschitz continuity", 2021).
        """
        layers = len(self.weights)
        most = (lipschitz / _STEEPEST[self.activation] ** (layers - 1)) ** (1 / layers)
        for w in self.weights:
            norm = torch.linalg.matrix_norm(w, ord=2)
            w.mul_((most / norm).clamp(max=1.0)[:, None, None])

    def layers(self, parameters: Sequence[Tensor]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Return ``parameters``, as this ensemble's are ordered, as the arrays of a file."""
        arrays = [parameter.detach().numpy().copy() for parameter in parameters]
        return tuple(zip(arrays[: len(self.weights)], arrays[len(self.weights) :]))

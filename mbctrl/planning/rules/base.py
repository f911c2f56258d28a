"""The contract of an update rule, and what rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mbctrl.base.spec import Number

# Ranges of settings; checked where they come from a file.
Share = Annotated[Number, Field(gt=0, lt=1)]
ShareOrNone = Annotated[Number, Field(ge=0, lt=1)]
Factor = Annotated[Number, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Distribution:
    """What a planner believes of the best command sequence, in knots.

    ``mean`` and ``spread`` (K, nu), the latter the standard deviation in units of the command; ``best`` (K, nu) the
    cheapest candidate seen at the last update; ``kept`` (K, nu, E) candidates carried into the next draw, E may be 0.
    """

    mean: Tensor
    spread: Tensor
    best: Tensor
    kept: Tensor


class Figures(NamedTuple):
    """Figures of one update: cheapest and mean finite cost, effective sample size, count of non-finite costs."""

    best: float
    mean: float
    ess: float
    nonfinite: int


class Rule(ABC):
    """An update rule: frozen settings and one pure function.

    ``includes_mean``: the undisturbed mean is one of the candidates. ``executes``: which sequence the robot follows.
    """

    includes_mean: ClassVar[bool] = True
    executes: ClassVar[str] = "mean"

    @abstractmethod
    def update(self, old: Distribution, knots: Tensor, costs: Tensor) -> tuple[Distribution, Tensor]:
        """Return the new distribution and the candidates' weights (N,), which sum to one.

        Args:
            old: the distribution the candidates were drawn from.
            knots: (K, nu, N) candidates.
            costs: (N,), +inf where a rollout was not finite; at least one is finite.
        """


def ranked(costs: Tensor, count: int) -> Tensor:
    """Return the indices of the ``count`` cheapest candidates that are finite, cheapest first, (E,).

    ``costs`` must have its NaN replaced by +inf.
    """
    values = costs.cpu().numpy()  # a selection of a few among thousands is several times quicker here than as a tensor
    index = np.arange(len(values)) if count >= len(values) else np.argpartition(values, count)[:count]
    index = index[np.argsort(values[index], kind="stable")]
    return torch.from_numpy(index[values[index] < np.inf]).to(costs.device)


def equal_weights(costs: Tensor, index: Tensor) -> Tensor:
    """Return weights (N,) shared equally by the candidates at ``index``."""
    return torch.zeros_like(costs).index_fill(0, index, 1.0 / len(index))

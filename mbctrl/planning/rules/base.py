"""The contract of an update rule, and what rules share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import numpy as np
from pydantic import Field

from mbctrl.base.spec import Number
from mbctrl.planning.arrays import Array, host, like

# Ranges of settings; checked where they come from a file.
Share = Annotated[Number, Field(gt=0, lt=1)]
ShareOrNone = Annotated[Number, Field(ge=0, lt=1)]
Factor = Annotated[Number, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Distribution:
    """What a planner believes of the best command sequence, in knots.

    ``mean`` and ``spread`` (K, nu), the latter the standard deviation in units of the command; ``best`` (K, nu) the
    cheapest candidate seen at the last update; ``kept`` (K, nu, E) candidates carried into the next draw, E may be 0.
    All of one kind, numpy's or torch's (``mbctrl.planning.arrays``).
    """

    mean: Array
    spread: Array
    best: Array
    kept: Array


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
    def update(self, old: Distribution, knots: Array, costs: Array) -> tuple[Distribution, Array]:
        """Return the new distribution and the candidates' weights (N,), which sum to one.

        The arrays' kind is the planner's: write with operators and ``mbctrl.planning.arrays``.

        Args:
            old: the distribution the candidates were drawn from.
            knots: (K, nu, N) candidates.
            costs: (N,), +inf where a rollout was not finite; at least one is finite.
        """


def ranked(costs: Array, count: int) -> np.ndarray:
    """Return the indices of the ``count`` cheapest candidates that are finite, cheapest first, (E,).

    ``costs`` must have its NaN replaced by +inf.
    """
    values = host(costs)  # a selection of a few among thousands is quicker here than as a tensor
    index = np.arange(len(values)) if count >= len(values) else values.argpartition(count)[:count]
    index = index[values[index].argsort(kind="stable")]
    return index[: values[index].searchsorted(np.inf)]


def equal_weights(costs: Array, index: np.ndarray) -> Array:
    """Return weights (N,) shared equally by the candidates at ``index``."""
    weights = np.zeros(len(costs))
    weights[index] = 1.0 / len(index)
    return like(weights, costs)

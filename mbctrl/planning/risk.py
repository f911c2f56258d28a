"""One cost of a candidate from the costs its rollouts by each member of an ensemble have. Needs no torch."""

from __future__ import annotations

import numpy as np

from mbctrl.base.config import RiskSpec
from mbctrl.planning.arrays import Array, host, like


class Risk:
    """Combines members' costs; a candidate that any member gives a cost that is no finite number costs infinitely much.

    Args:
        spec: how; not ``expectation``, which is no matter of whole rollouts.
        members: E.
    """

    def __init__(self, spec: RiskSpec, members: int) -> None:
        if spec.kind == "expectation":
            raise ValueError("an expectation is taken in every step, not over rollouts")
        self.members, self._deviations = members, float(spec.weight or 0.0)
        # The worst first: what each counts. A mean is the whole of the tail, the worst its end.
        share = {"worst": 1.0 / members, "cvar": spec.share}.get(spec.kind, 1.0) * members
        self._counts = np.clip(share - np.arange(members), 0.0, 1.0) / share

    def __call__(self, costs: Array) -> Array:
        """Return costs (N,) of ``costs`` (E, N), of their kind."""
        values = host(costs)
        good = np.isfinite(values).all(0)
        values = np.where(good, values, values.dtype.type(0))
        total = self._counts.astype(values.dtype) @ -np.sort(-values, axis=0)
        if self._deviations:
            total = total + self._deviations * values.std(0)
        return like(np.where(good, total, values.dtype.type(np.inf)), costs)

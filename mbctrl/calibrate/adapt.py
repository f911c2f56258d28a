"""A planner's model that keeps up with what the tool carries: when an estimate is worth a change of the model."""

from __future__ import annotations

import numpy as np

from mbctrl.base.config import AdaptSpec
from mbctrl.calibrate.online import Estimate, OnlineEstimator, OnlineSettings
from mbctrl.dynamics.body import compose
from mbctrl.dynamics.tree import RigidTree

SPACING = 0.005
"""[s] between samples that are taken: filters of 8 Hz learn nothing from more, and one takes half a millisecond."""


class Adapter:
    """Follows a moving arm; ``payload`` (10,) is what its model shall carry now, ``estimate`` the last one.

    Args:
        tree: the arm as it is believed to be, with nothing in its tool.
        link: carries.
        spec: how fast, and how sure.
    """

    def __init__(self, tree: RigidTree, link: int, spec: AdaptSpec) -> None:
        most = {"mass_limit": spec.heaviest, "payload_memory": spec.memory}
        settings = OnlineSettings(still=True, **most)  # a controlled arm has its brakes off
        self._estimator = OnlineEstimator(tree, settings, joint=tree.joints[link])
        self._least = spec.errors**2
        self.payload = np.zeros(10)
        self.estimate: Estimate | None = None
        self._due = -np.inf

    def update(self, t: float, q: np.ndarray, v: np.ndarray, effort: np.ndarray) -> bool:
        """Take a sample, ``OnlineEstimator.update``'s, or leave it: the last was just now. Return whether the payload changed."""
        if t < self._due:
            return False
        self._due = t + SPACING - 1e-6
        self.estimate = found = self._estimator.update(t, q, v, effort)
        if not found.fresh:
            return False
        body = compose(found.mass, found.com, np.zeros((3, 3)))
        moved = body[:4] - self.payload[:4]
        if moved @ np.linalg.solve(found.payload_covariance, moved) <= self._least:
            return False
        self.payload = body
        return True

"""Keeps a planner's learned model up with the last seconds: which of several models is planned with, and its last layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.last_layer import LastLayer
from mbctrl.dynamics.likeliest import Likeliest
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import PLACE, Residual
from mbctrl.planning.backends import analytic_of, hybrid_of, learned_of

_SHARE = 0.5
"""Prior deviation of what a last layer is given, of the outputs' scale. Errors 0.24 s ahead of a wiping Panda's table with a
payload of 1 kg that nobody told of, and without it, at 0 / 0.1 / 0.5 / 1 / 3 (as force, medians): 5.2 / 4.8 / 4.2 / 4.0 / 3.9 N,
and 0.22 / 0.21 / 0.15 / 0.14 / 0.21 N."""
_EVERY = 5  # transitions taken at a time: one costs as much as many
_ITS_OWN = ("layers", "input_mean", "input_scale", "output_scale", "spread", "contact", "physics", "seed", "versions")


class Keeper:
    """Takes what plan requests tell of the steps between them.

    Args:
        models: that may be planned with, the run's own first; in double precision.
        last_layer: whether the last layer of the one in charge is refitted.
        memory: transitions it looks back on.
        margin: of ``Likeliest``.
    """

    def __init__(self, models: Sequence[HybridDynamics], last_layer: bool, memory: int, margin: float) -> None:
        self._models, self._dt, self._last_layer, self._memory, self._margin = models, models[0].dt, last_layer, memory, margin
        self.reset()

    def reset(self) -> Residual:
        """Forget everything; return the run's own model."""
        models, memory = self._models, self._memory
        self._likeliest = Likeliest(models, memory, self._margin) if len(models) > 1 else None
        self._layers = [LastLayer(model, _SHARE, memory) for model in models] if self._last_layer else []
        self._before: PlanRequest | None = None
        self._new: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        return models[0].residual

    @property
    def best(self) -> int:
        """Which model is in charge."""
        return 0 if self._likeliest is None else self._likeliest.best

    def take(self, request: PlanRequest) -> Residual | None:
        """Note what a request tells; return what is to be planned with from now on, None: as before."""
        before, self._before = self._before, request
        if before is None or request.command is None or abs(request.stamp - before.stamp - self._dt) > 0.1 * self._dt:
            return None
        parts = before.x, request.command, request.x
        if all(np.isfinite(part).all() for part in parts):
            self._new.append(parts)
        if len(self._new) < _EVERY:
            return None
        x, u, after = (torch.from_numpy(np.stack(rows, 1).astype(float)) for rows in zip(*self._new))
        self._new = []
        return self._learn(x, u, after)

    def _learn(self, x: Tensor, u: Tensor, after: Tensor) -> Residual | None:
        changed = self._likeliest is not None and self._likeliest.see(x, u, after)
        for layer in self._layers:
            if changed:  # what was seen before was of another contact
                layer.forget()
            layer.see(x, u, after)
        refitted = self._layers[self.best].refit() if self._layers else None
        return refitted or (self._models[self.best].residual if changed else None)


def keeper_of(config: RunConfig, model: Model, file: str | Path | None = None) -> Keeper | None:
    """Return what keeps the run's learned model up, None where nothing does.

    Errors:
        SpecError: where the run has no learned model with variances, for files learnt by another recipe, and for a plan that is
            not asked for once a step.
    """
    spec, dynamics = config.adapt, config.dynamics
    if spec is None or spec.kind != "model":
        return None
    here = config.model_copy(update={"dynamics": dynamics.model_copy(update={"device": "cpu"})})  # wherever plans are made
    analytic = analytic_of(here, model, file, torch.float64)
    own = hybrid_of(config, model, analytic, file)
    if own is None or own.residual.spread is None:
        raise SpecError("kind model needs dynamics.residual, of networks with variances, found none", file=file, key="adapt")
    if abs(config.loop.rate * dynamics.dt - 1) > 1e-6:
        found = f"{config.loop.rate:g} Hz"
        raise SpecError(f"kind model needs a plan each step of {dynamics.dt:g} s, found {found}", file=file, key="adapt")
    if config.loop.feedback_stiffness is not None or config.loop.feedback_damping is not None:
        raise SpecError("kind model does not know what loop.feedback_… gains add to plans; expected none", file=file, key="adapt")
    if spec.last_layer and config.planner.risk.kind != "expectation":
        found = config.planner.risk.kind
        raise SpecError(f"needs planner.risk.kind expectation, found {found}", file=file, key="adapt.last_layer")
    others = [learned_of(name, config, model, analytic, file, "adapt.models") for name in spec.models]
    for name, other in zip(spec.models, others):
        for field in fields(Residual):
            if field.name not in _ITS_OWN and getattr(other.residual, field.name) != getattr(own.residual, field.name):
                raise SpecError(f"{field.name} is not as in dynamics.residual", file=file, key=f"adapt.models: {name}")
        places = [one.contact and [getattr(one.contact, key) for key in PLACE] for one in (own.residual, other.residual)]
        if places[0] != places[1]:
            raise SpecError(f"contact is not as in dynamics.residual: {places[1]}", file=file, key=f"adapt.models: {name}")
        shapes = [[(w.shape, b.shape) for w, b in one.residual.layers] for one in (own, other)]
        if shapes[0] != shapes[1] or other.residual.spread is None:
            raise SpecError("has other networks than dynamics.residual", file=file, key=f"adapt.models: {name}")
    return Keeper([own, *others], spec.last_layer, max(1, round(spec.memory / dynamics.dt)), spec.margin)

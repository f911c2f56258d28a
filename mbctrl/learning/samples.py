"""From transitions to what networks are trained on: inputs, the velocity the base missed, the gate, how often each is drawn."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.config import ContactSpec
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.encoding import Sight
from mbctrl.dynamics.gate import Gate
from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.learning.recipe import LearningRecipe
from mbctrl.learning.transitions import Transitions, check_finite
from mbctrl.tasks.distance import capsule_obstacle

_WIDE = 4096  # states of one pass of the analytic step


def analytic_model(model: Model, dt: float, integrator: str = "euler", contact: ContactSpec | None = None) -> RigidBodyDynamics:
    """Return the arm in double precision, with its time step [s] and the contact its physics knows.

    Errors:
        SpecError: for a contact whose frames the model does not have.
    """
    known = declared(contact, model.tree, model.robot.path, "contact")
    more: dict[str, Any] = {"integrator": integrator, "contact": known, "dtype": torch.float64}
    return RigidBodyDynamics(model.tree, dt, **drive_settings(model.robot), **more)


def learned_model(model: Model, residual: Residual, dt: float | None = None) -> HybridDynamics:
    """Return a learned model in double precision, at a time step [s]; None: the one it was learnt for."""
    base = analytic_model(model, residual.dt if dt is None else dt, residual.integrator, residual.contact)
    return HybridDynamics(base, residual, model.tree.frames[model.robot.tool], capsule_obstacle)


def gate_of(model: Model, base: RigidBodyDynamics, recipe: LearningRecipe | Residual) -> Gate:
    """Return the gate of a recipe, or of a model's file, with its surfaces."""
    tool = model.tree.frames[model.robot.tool]
    return Gate(base, tool, recipe.surfaces, recipe.near, recipe.far, capsule_obstacle)


@dataclass(frozen=True)
class Samples:
    """T samples: ``inputs`` (T, inputs), ``target`` (T, nv) [rad/s], ``gate`` (T,), ``draw`` (T,) how often each is drawn relative
    to others of its episode, in float32; ``episode`` (T,) and ``contact`` (T,) in numpy."""

    inputs: Tensor
    target: Tensor
    gate: Tensor
    draw: Tensor
    episode: np.ndarray
    contact: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, mask: np.ndarray) -> Samples:
        """Return those of a mask (T,)."""
        index = torch.from_numpy(np.flatnonzero(mask))
        return Samples(
            self.inputs[index], self.target[index], self.gate[index], self.draw[index], self.episode[mask], self.contact[mask]
        )


def samples_of(transitions: Transitions, model: Model, recipe: LearningRecipe) -> Samples:
    """Return what is learnt from transitions: those whose gate is above 0.

    Errors:
        TransitionError: for targets that are no numbers, with file, row and joint.
    """
    base, n = analytic_model(model, recipe.dt, recipe.integrator, recipe.contact), model.tree.n
    gate = gate_of(model, base, recipe) if recipe.base == "analytic" else None
    sight = Sight(base, gate, recipe.network.encode_angles, recipe.network.sees_step, recipe.dt)
    x, u, after = (torch.from_numpy(values.T.copy()) for values in (transitions.x, transitions.u, transitions.x_next))
    parts: list[tuple[Any, Any, Any]] = []
    for x0, u0, x1 in zip(x.split(_WIDE, 1), u.split(_WIDE, 1), after.split(_WIDE, 1)):
        physics, opened, seen = sight(base, x0, u0)
        parts.append((seen, x1[n:] - (x0 if physics is None else physics)[n:], opened))
    inputs, target, gates = (torch.cat(columns, -1) for columns in zip(*parts))
    check_finite(transitions, target.T.numpy(), [f"the velocity missed of {joint}" for joint in model.robot.joints])
    draw = torch.from_numpy(np.where(transitions.impacts(), recipe.training.impact_weight, 1.0))
    every = Samples(inputs.T.float(), target.T.float(), gates.float(), draw.float(), transitions.episode, transitions.contact)
    return every.take((gates > 0).numpy())


def with_gaps(transitions: Transitions, model: Model, gate: Gate) -> Transitions:
    """Return transitions whose unknown gaps are measured, and, where no contact is noted at all, contact where they are closed."""
    q = torch.from_numpy(transitions.x[:, : model.tree.n].T.copy())
    measured = torch.cat([gate.gap(part) for part in q.split(_WIDE, 1)]).numpy()
    gap = np.where(np.isnan(transitions.gap), measured, transitions.gap)
    contact = transitions.contact if transitions.contact.any() else gap <= 0
    return replace(transitions, gap=gap, contact=contact)

"""From transitions to what networks are trained on: inputs, the velocity the base missed, the gate, how often each is drawn."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.config import ContactSpec
from mbctrl.dynamics.actuation import drive_settings
from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.encoding import Sight
from mbctrl.dynamics.gate import Gate, TipGate
from mbctrl.dynamics.hybrid import HybridDynamics, gate_of
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.learning.recipe import LearningRecipe
from mbctrl.learning.transitions import Transitions, check_finite
from mbctrl.tasks.distance import capsule_obstacle

_WIDE = 4096  # states of one pass of the analytic step
_ABOVE = 3.0
"""How far beyond the gate networks of a contact are taught, in widths of its edge. Measured on six runs that press gently: taught
within the gate alone they drift 5 mm in 25 steps (and wiping fails), taught beyond it 0.3 mm; a gate as wide as that lets them
guess impulses in the air, and one run in three never comes down."""


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


def gate_on(model: Model, base: RigidBodyDynamics, learnt: LearningRecipe | Residual) -> Gate | TipGate | None:
    """Return the gate of a recipe, or of a model's file; None where there is no physics beneath."""
    return gate_of(base, learnt, model.tree.frames[model.robot.tool], capsule_obstacle)


@dataclass(frozen=True)
class Samples:
    """T samples: ``inputs`` (T, inputs), ``target`` (T, nv) the velocity missed [rad/s], ``gate`` (T,), ``draw`` (T,) how often
    each is drawn relative to others of its episode, in float32; ``episode`` (T,) and ``contact`` (T,) in numpy; ``answers``
    (T, nv, 3) what joint speeds unit impulses at the contact give, None where networks act on joints."""

    inputs: Tensor
    target: Tensor
    gate: Tensor
    draw: Tensor
    episode: np.ndarray
    contact: np.ndarray
    answers: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, mask: np.ndarray) -> Samples:
        """Return those of a mask (T,)."""
        index = torch.from_numpy(np.flatnonzero(mask))
        rows = [values[index] for values in (self.inputs, self.target, self.gate, self.draw)]
        answers = None if self.answers is None else self.answers[index]
        return Samples(*rows, self.episode[mask], self.contact[mask], answers)


def concatenated(first: Samples, second: Samples) -> Samples:
    """Return the samples of both, in a row."""
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(Samples)]
    joined = [None if a is None else torch.cat((a, b)) if torch.is_tensor(a) else np.concatenate((a, b)) for a, b in pairs]
    return Samples(*joined)


def samples_of(transitions: Transitions, model: Model, recipe: LearningRecipe) -> Samples:
    """Return what is learnt from transitions: those whose gate is above 0, of networks of a contact a little farther away, too.

    Errors:
        TransitionError: for targets that are no numbers, with file, row and joint.
    """
    base, n = analytic_model(model, recipe.dt, recipe.integrator, recipe.contact), model.tree.n
    taught = recipe
    if recipe.acts_on == "contact":  # above the surface, too, there is an impulse to learn: none
        taught = recipe.model_copy(update={"near": recipe.far, "far": recipe.far + _ABOVE * (recipe.far - recipe.near)})
    sight = Sight(base, gate_on(model, base, taught), recipe.network.encode_angles, recipe.dt)
    x, u, after = (torch.from_numpy(values.T.copy()) for values in (transitions.x, transitions.u, transitions.x_next))
    parts: list[list[Tensor]] = []
    for x0, u0, x1 in zip(x.split(_WIDE, 1), u.split(_WIDE, 1), after.split(_WIDE, 1)):
        seen = sight(base, x0, u0)
        missed = (x1 - (x0 if seen.after is None else seen.after))[n:]
        parts.append([seen.inputs.T, missed.T, seen.gate])
        if seen.answers is not None:
            parts[-1].append(seen.answers.movedim(2, 0))
    inputs, target, gates, *answers = (torch.cat(columns) for columns in zip(*parts))
    check_finite(transitions, target.numpy(), [f"the velocity missed of {joint}" for joint in model.robot.joints])
    draw = torch.from_numpy(np.where(transitions.impacts(), recipe.training.impact_weight, 1.0))
    rows = [values.float() for values in (inputs, target, gates, draw)]
    every = Samples(*rows, transitions.episode, transitions.contact, answers[0].float() if answers else None)
    return every.take((gates > 0).numpy())


def with_gaps(transitions: Transitions, model: Model, learnt: LearningRecipe | Residual) -> Transitions:
    """Return transitions whose unknown gaps are measured to what ``learnt`` is gated by, and, where no contact is noted at all,
    contact where they are closed; as they are, where it is not gated."""
    gate = gate_on(model, analytic_model(model, learnt.dt, learnt.integrator), learnt)
    if gate is None:
        return transitions
    q = torch.from_numpy(transitions.x[:, : model.tree.n].T.copy())
    measured = torch.cat([gate.gap(part) for part in q.split(_WIDE, 1)]).numpy()
    gap = np.where(np.isnan(transitions.gap), measured, transitions.gap)
    contact = transitions.contact if transitions.contact.any() else gap <= 0
    return replace(transitions, gap=gap, contact=contact)

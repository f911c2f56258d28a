"""``calibration/NAME_learn.yaml``: what is learnt, of which robot, by which networks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mbctrl.base.config import ContactSpec, RobotSpec
from mbctrl.base.find import find
from mbctrl.base.robot import Positive
from mbctrl.base.spec import Number, Spec, load_yaml, validate
from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.residual import Surface, frame_of
from mbctrl.dynamics.tree import RigidTree

Count = Annotated[int, Field(ge=1, strict=True)]
Share = Annotated[Number, Field(gt=0, lt=0.5)]


class NetworkSpec(Spec):
    """The ensemble.

    ``members`` networks of ``hidden`` layers. ``variance``: they say how sure they are, too. ``lipschitz``: most that outputs
    change with inputs, both normalised; null: unbounded. ``acts_on: contact``: they see the recipe's ``contact`` alone, its
    depth, speeds and mobility, and give the impulse on its tip; ``joints``: they see the arm's state and command, and give
    joint speeds. ``encode_angles``: false gives angles as they are, which fails
    where a joint turns round; it exists to show that.
    """

    members: Count = 3
    hidden: tuple[Annotated[int, Field(ge=1, le=1024, strict=True)], ...] = (96, 96)
    activation: Literal["tanh", "silu", "relu"] = "silu"
    variance: bool = True
    lipschitz: Positive | None = None
    acts_on: Literal["joints", "contact"] = "joints"
    encode_angles: bool = True


class TrainingSpec(Spec):
    """How the ensemble is trained.

    ``epochs`` at most, of as many samples as there are; a member is done when ``patience`` epochs brought nothing on held-out
    episodes, and keeps its best weights. ``batch`` samples a step of AdamW, of rate ``learning_rate``, which falls to nothing
    over the epochs, and of ``weight_decay``: about 1 where transitions are few, 0 where they are many.
    ``impact_weight``: how often a transition with which contact begins or ends is drawn, against others. ``validation``,
    ``test``: shares of the episodes held out, drawn by ``seed``.
    """

    epochs: Count = 100
    patience: Count = 30
    batch: Count = 256
    learning_rate: Positive = 3e-3
    weight_decay: Annotated[Number, Field(ge=0)] = 0.0
    impact_weight: Positive = 4.0
    validation: Share = 0.15
    test: Share = 0.15
    seed: Annotated[int, Field(ge=0, strict=True)] = 0


class LearningRecipe(Spec):
    """What is learnt: what the ``analytic`` model misses near ``surfaces``, or all of it (``base: identity``).

    ``dt`` [s]: the model's time step, the planner's. ``contact``: what the analytic model knows of a contact already; null: it
    lets everything through. ``near``, ``far`` [m]: the gate is 1 up to the one and 0 from the other on, by the distance of the tool
    to ``surfaces``, or of the tip of the contact that is acted on to its surface. ``episode`` [s]: longer
    logs are cut into pieces, which are held out one by one; null: a log is one episode.
    """

    robot: RobotSpec
    dt: Positive
    base: Literal["analytic", "identity"] = "analytic"
    integrator: Literal["euler", "leapfrog"] = "euler"
    contact: ContactSpec | None = None
    surfaces: tuple[Surface, ...] = ()
    near: Number = 0.01  # [m]
    far: Number = 0.03  # [m]
    episode: Positive | None = None
    network: NetworkSpec = NetworkSpec()
    training: TrainingSpec = TrainingSpec()

    @property
    def acts_on(self) -> str:
        """``network.acts_on``."""
        return self.network.acts_on

    @model_validator(mode="after")
    def _gate(self) -> LearningRecipe:
        if self.base == "analytic" and self.acts_on == "joints" and not self.surfaces:
            raise ValueError("surfaces: expected at least one, where the analytic model is the base")
        if self.base == "identity" and self.surfaces:
            raise ValueError("surfaces: a model without physics has no gate, found some")
        if self.acts_on == "contact" and self.surfaces:
            raise ValueError("surfaces: networks that act on a contact are gated by its own, found some")
        if self.network.acts_on == "contact" and (self.base == "identity" or self.contact is None):
            raise ValueError("network.acts_on: contact needs an analytic base and its contact, found none")
        if not self.near < self.far:
            raise ValueError(f"near: {self.near} is not below far, {self.far}")
        return self


def load_learning_recipe(name: str) -> tuple[LearningRecipe, Path]:
    """Load a recipe by name or path; SpecError names file and key."""
    path = find("learning", name)
    return validate(LearningRecipe, load_yaml(path), path), path


def check_frames(recipe: LearningRecipe, tree: RigidTree, file: str | Path) -> None:
    """Refuse a contact and surfaces in frames that the robot's model does not have; SpecError names the recipe's ``file``."""
    declared(recipe.contact, tree, file, "contact")
    for surface in recipe.surfaces:
        frame_of(surface, tree, file)

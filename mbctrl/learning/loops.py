"""``learn:`` of a scenario: how its model is learnt while it is planned with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mbctrl.base.config import Count, RiskSpec, RunConfig
from mbctrl.base.errors import SpecError
from mbctrl.base.robot import Positive
from mbctrl.base.scene import Point
from mbctrl.base.spec import Number, Spec, load_yaml, validate
from mbctrl.learning.recipe import LearningRecipe, load_learning_recipe

_TAKEN = ("robot", "dt", "integrator")  # the scenario says these


class BoxSpec(Spec):
    """A box in the world between two corners; ``margin`` of it is kept for what looking ahead does not know."""

    low: Point  # [m]
    high: Point  # [m]
    margin: Annotated[Number, Field(ge=0)] = 0.02  # [m]

    @model_validator(mode="after")
    def _order(self) -> BoxSpec:
        for axis, low, high in zip("xyz", self.low, self.high):
            if not low + 2 * self.margin < high:
                raise ValueError(f"nothing is left along {axis} between {low:g} and {high:g} m, {self.margin:g} m off each")
        return self


class LearnSpec(Spec):
    """A loop of model-based reinforcement learning.

    ``loop``: ``once`` collects with random commands, learns, then plans; ``aggregate`` learns anew from everything before
    each trial, or before those alone by which one more of so many steps (``at``) was made; ``online`` learns anew every so many
    steps (``every``) while a trial goes on.

    ``random`` steps of the model come first, with commands from ``share`` of their range (around home, of references): drawn anew
    every ``hold`` steps or, with ``band``, sums of sines up to that [Hz]. The tool stays in ``box`` meanwhile,
    by the robot's own physics whatever is learnt. Then ``trials`` episodes of the scenario are planned with the learned model and
    ``risk``. Where there is physics beneath, it plans alone until something was learnt, and random commands may be left out. A
    trial's return is the sum over its steps of ``best`` less what the task's terms cost [1/s].

    ``model`` is a recipe of what is learnt, its name or itself without robot, time step and integrator, which are the
    scenario's; so is the seed of its training, where it names none.
    """

    loop: Literal["once", "aggregate", "online"]
    trials: Count = 10
    random: Annotated[int, Field(ge=0, strict=True)] = 200
    hold: Count = 1
    band: Positive | None = None
    share: Annotated[Number, Field(gt=0, le=1)] = 1.0
    box: BoxSpec | None = None
    every: Count | None = None
    at: tuple[Count, ...] | None = None
    best: Number = 0.0
    risk: RiskSpec = RiskSpec()
    model: str | Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _when(self) -> LearnSpec:
        if (self.every is not None) != (self.loop == "online"):
            raise ValueError(f"every: {'is of' if self.every else 'missing; is needed by'} loop online, found loop {self.loop}")
        if self.at is not None and self.loop != "aggregate":
            raise ValueError(f"at: is of loop aggregate, found loop {self.loop}")
        if self.at is not None and any(later <= earlier for earlier, later in zip(self.at, self.at[1:])):
            raise ValueError(f"at: expected increasing numbers of steps, found {list(self.at)}")
        if self.band is not None and "hold" in self.model_fields_set:
            raise ValueError("hold: is of uniform commands, found band, too, which is of sums of sines")
        if self.box is not None and not self.random:
            raise ValueError("box: is for random steps, found random 0; planned trials are kept by the task's terms")
        return self


def load_loop(file: str | Path, config: RunConfig) -> tuple[LearnSpec, LearningRecipe]:
    """Return a scenario's loop, and the recipe of its model.

    Args:
        file: the scenario's.
        config: what it resolves to.

    Errors:
        SpecError: naming file and key.
    """
    data = load_yaml(file)
    if config.adapt is not None and config.adapt.kind == "model":
        raise SpecError("kind model keeps up a model that is there already; expected none of a loop's", file=file, key="adapt")
    if "learn" not in data:
        raise SpecError("missing; this scenario does not say how it learns", file=file, key="learn")
    spec = validate(LearnSpec, data["learn"], file, "learn")
    given = {"robot": config.robot, "dt": config.dynamics.dt, "integrator": config.dynamics.integrator}
    if isinstance(spec.model, str):
        recipe, _ = load_learning_recipe(spec.model)
        for key, expected in given.items():
            found = getattr(recipe, key)
            if found != expected:
                raise SpecError(f"expected {key} {expected}, found {found}", file=file, key=f"learn.model: {spec.model}")
        if "seed" not in recipe.training.model_fields_set:
            recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": config.seed})})
    else:
        for key in _TAKEN:
            if key in spec.model:
                raise SpecError("the scenario says it already", file=file, key=f"learn.model.{key}")
        own = spec.model.get("training", {})
        training = {"seed": config.seed, **own} if isinstance(own, Mapping) else own
        recipe = validate(LearningRecipe, {**spec.model, **given, "training": training}, file, "learn.model")
    if not spec.random and (recipe.base == "identity" or spec.loop == "once"):
        raise SpecError("expected some steps, where there is nothing else to learn from, found 0", file=file, key="learn.random")
    if spec.box is not None and config.loop.latency > 0:
        raise SpecError("a box needs plans at once; expected 0 s", file=file, key="loop.latency")
    per_plan = config.loop.rate * config.dynamics.dt
    if abs(per_plan - 1) > 1e-6:
        raise SpecError(
            f"expected a plan each step of {config.dynamics.dt:g} s, found {config.loop.rate:g} Hz", file=file, key="loop.rate"
        )
    return spec, recipe

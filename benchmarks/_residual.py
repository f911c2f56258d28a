"""What learned models are made of, and how far they can be trusted; imported by the processes that train them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbctrl.base.config import ContactSpec, load_run
from mbctrl.calibrate.contact import fit_contact
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Residual
from mbctrl.learning.evaluate import KINDS, coverage, open_loop, windows_of
from mbctrl.learning.fit import fit
from mbctrl.learning.recipe import LearningRecipe, load_learning_recipe
from mbctrl.learning.samples import analytic_model, learned_model, samples_of, with_gaps
from mbctrl.learning.transitions import Transitions, cut, read_transitions, split

LEARNED = ("full", "residual", "gated", "gated on fitted contact")
"""Kinds of learned models: without physics; on top of it everywhere; near the surface; near it, with a fitted contact beneath."""


FITTED = ("stiffness", "damping", "friction")


@dataclass(frozen=True)
class Training:
    """One model to make: its ``kind`` (``analytic``, ``contact`` fitted, ``true`` contact, or one of LEARNED), the ``data`` it is
    made from, how many transitions of it, the ``seed`` that draws them, ``tests`` to judge it on by name, and where it goes."""

    recipe: str
    scenario: str
    kind: str
    data: Path
    budget: int
    seed: int
    tests: dict[str, Path]
    out: Path


@dataclass(frozen=True)
class Made:
    """A model: its file or contact, and by test: ``errors[test][kind of stretch, steps]`` = (median, 95 %, count) of the tool [m],
    ``covered[test][group]`` (nv,)."""

    kind: str
    dynamics: dict[str, Any]
    errors: dict[str, dict[tuple[str, int], tuple[float, float, int]]] = field(default_factory=dict)
    covered: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def drawn(every: Transitions, budget: int, seed: int) -> Transitions:
    """Return whole episodes, drawn by ``seed``, until there are ``budget`` transitions."""
    order = np.random.default_rng(seed).permutation(np.unique(every.episode))
    counts = np.array([(every.episode == episode).sum() for episode in order])
    chosen = order[: int(np.searchsorted(np.cumsum(counts), budget)) + 1]
    index = np.flatnonzero(np.isin(every.episode, chosen))
    place = {episode: k for k, episode in enumerate(order)}
    index = index[np.argsort([place[episode] for episode in every.episode[index]], kind="stable")]
    return every.take(index[:budget])


def made(job: Training) -> Made:
    """Make one model and judge it."""
    torch.set_num_threads(1)
    recipe, _ = load_learning_recipe(job.recipe)
    arm = load_model(recipe.robot.name)
    declared = load_run(job.scenario)[0].dynamics.contact
    every = drawn(read_transitions(job.data), job.budget, job.seed)
    if job.kind in LEARNED:
        beneath = "contact" if job.kind == "gated on fitted contact" else "none"
        contact = known(beneath, every, arm, recipe, declared)
        residual = learned(job.kind, every, arm, recipe.model_copy(update={"contact": contact}), job.seed)
        residual.save(job.out)
        model: Any = learned_model(arm, residual)
        made = Made(job.kind, {"residual": str(job.out), "contact": contact.model_dump(include=set(FITTED))})
    else:
        contact = known(job.kind, every, arm, recipe, declared)
        model = analytic_model(arm, recipe.dt, recipe.integrator, contact)
        made = Made(job.kind, {"contact": contact.model_dump(include=set(FITTED))})
    for name, path in job.tests.items():
        test = with_gaps(read_transitions(path), arm, recipe)
        judge(made, name, model, test, arm)
    return made


def learned(kind: str, every: Transitions, arm: Model, recipe: LearningRecipe, seed: int) -> Residual:
    """Return a trained model."""
    training = recipe.training.model_copy(update={"seed": seed, "test": 0.0})
    change: dict[str, Any] = {"training": training}
    if kind == "full":
        network = recipe.network.model_copy(update={"acts_on": "joints"})
        change |= {"base": "identity", "surfaces": (), "contact": None, "network": network}
        change["training"] = training.model_copy(update={"weight_decay": 0.0})  # with it: 4.9 mm in place of 3.2
    elif kind == "residual":
        change |= {"near": 10.0, "far": 11.0}  # [m] the gate is open everywhere
    recipe = recipe.model_copy(update=change)
    pieces = cut(every, 0.5 if len(every) < 1000 else recipe.episode or np.inf)
    for draw in range(100):  # few transitions, split in the middle of the air, leave nothing near the table to stop by
        training, validation, _ = split(pieces, (recipe.training.validation, 0.0), seed + 1000 * draw)
        samples = [samples_of(part, arm, recipe) for part in (training, validation)]
        if min(map(len, samples)) >= 20:
            break
    return fit(*samples, arm, recipe).residual


def known(kind: str, every: Transitions, arm: Model, recipe: LearningRecipe, true: ContactSpec) -> ContactSpec:
    """Return what the physics knows of the contact: nothing, the truth, or what the transitions say, from a start off by two.

    The start is what is left where the transitions do not tell.
    """
    if kind != "contact":
        return true if kind == "true" else true.model_copy(update={"stiffness": 0.0, "damping": 0.0})
    wrong = {"stiffness": 2.0 * true.stiffness, "damping": 0.5 * true.damping, "friction": 0.5 * true.friction}
    start = analytic_model(arm, recipe.dt, recipe.integrator, true.model_copy(update=wrong))
    try:
        found = fit_contact(start, every.x, every.u, np.cumsum(~every.follows()))
    except CalibrationError:
        return true.model_copy(update=wrong)
    return true.model_copy(update={name: float(getattr(found.contact, name)) for name in wrong})


def judge(made: Made, name: str, model: Any, test: Transitions, arm: Model) -> None:
    """Put a model's errors and coverage on one test into ``made``."""
    errors = open_loop(made.kind, model, windows_of(test, 25), arm)
    found = {}
    for k, kind in enumerate(KINDS):
        for steps in (1, 5, 10, 25):
            values, count = errors.summary(steps, k)
            found[kind, steps] = (float(values[-1, 0]), float(values[-1, 1]), count)
    made.errors[name] = found
    if made.kind in LEARNED:
        made.covered[name] = {group.group: group.inside for group in coverage(model, test)}

"""Training of an ensemble: each member on episodes of its own drawing, each stopped by episodes nobody trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from mbctrl import __version__
from mbctrl.base.errors import MbctrlError
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.residual import Residual, Spread, physics_of
from mbctrl.learning.ensemble import HIGHEST, LOWEST, Ensemble
from mbctrl.learning.recipe import LearningRecipe, TrainingSpec
from mbctrl.learning.samples import Samples, concatenated

_QUIETEST = 0.01  # of what a joint misses in all that it may be believed to
_LEAST = 10  # samples of a robot's that anything can be learnt from
_JUDGED = 30  # samples from which a quantile is taken
BETA = 0.5
"""Samples count with this power of the variance their own networks give them (Seitzer et al., "On the pitfalls of
heteroscedastic uncertainty estimation with probabilistic neural networks", 2022), else what looks noisy at first is not learnt.
Measured: on 2000 synthetic samples whose noise varies twentyfold the error of the mean is 0.112 / 0.089 / 0.081 / 0.078 and the
log-likelihood 1.457 / 1.460 / 1.454 / 1.418 at powers 0 / 0.25 / 0.5 / 1; a fully learned peg on a spring is off by 15 to 25 /
1.8 to 3.4 / 1.7 to 2.0 mm after 25 steps with an impact at powers 0 / 0.25 / 0.5 (means only, squared errors: 2.0 to 2.4).
Measured with a constant rate and members stopped by the likelihood."""
LEAST = 1e-4
NORMAL_90 = 1.6448536269514722
"""Half a 90 % interval of a normal distribution, in standard deviations."""


class LearningError(MbctrlError):
    """Data nothing can be learnt from, or a training that diverged."""


@dataclass(frozen=True)
class Epoch:
    """What an epoch brought: losses (E,) on training samples, ``misses`` on held-out ones, the best of these, which members go
    on."""

    number: int
    training: np.ndarray
    validation: np.ndarray
    best: np.ndarray
    active: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """A trained model, and how it came to be: one ``Epoch`` each."""

    residual: Residual
    history: tuple[Epoch, ...]


@dataclass(frozen=True)
class Normalisers:
    """Of inputs, mean and scale (inputs,); of targets their root mean square (means,): a gated target's mean stays in it, so that
    where the networks say nothing, nothing is added. Targets are the velocities missed, or the impulses that explain them best,
    each joint's as well as its ``noise`` (nv,) [rad/s] lets it: what the physics misses of it without contact."""

    mean: Tensor
    scale: Tensor
    output: Tensor
    noise: Tensor

    @classmethod
    def of(cls, samples: Samples) -> Normalisers:
        """Return those of the training samples."""
        spread = samples.inputs.std(0, correction=0)
        free = torch.from_numpy(~samples.contact)
        quiet = samples.target[free] if free.any() else samples.target
        noise = torch.maximum(quiet.abs().median(0).values * 1.4826, _QUIETEST * _root(samples.target)).clamp(min=1e-9)
        scale = torch.where(spread > 1e-6, spread, 1.0)
        output = _root(explained(samples, noise))
        if samples.answers is not None:  # along an axis the arm cannot be moved in there is nothing but rounding
            output = output.clamp(min=1e-3 * float(output.max()))
        return cls(samples.inputs.mean(0), scale, output.clamp(min=1e-9), noise)

    def apply(self, samples: Samples) -> Samples:
        """Return samples in units of these."""
        target = explained(samples, self.noise) / self.output
        return replace(samples, inputs=(samples.inputs - self.mean) / self.scale, target=target)


def explained(samples: Samples, noise: Tensor) -> Tensor:
    """Return what networks are to give (T, means): the velocities missed, or the impulses that explain them best."""
    if samples.answers is None:
        return samples.target
    matrix, wanted = (samples.answers / noise[:, None]).double(), (samples.target / noise).double()
    normal = matrix.mT @ matrix
    little = 1e-9 * torch.diagonal(normal, dim1=1, dim2=2).sum(1)  # an arm may not be movable every way
    normal = normal + little[:, None, None] * torch.eye(3, dtype=torch.float64)
    return torch.linalg.solve(normal, (matrix.mT @ wanted[..., None])[..., 0]).float()


def unexplained(samples: Samples, noise: Tensor) -> np.ndarray:
    """Return the deviation (2, nv) [rad/s] of the velocities missed without contact, and of what no impulse explains in it."""
    if samples.answers is None:
        return np.zeros((2, len(noise)))
    left = samples.target - _acted(samples, explained(samples, noise))
    found = np.zeros((2, len(noise)))
    for k, (values, group) in enumerate(((samples.target, ~samples.contact), (left, samples.contact))):
        if group.any():
            found[k] = np.quantile((values / samples.gate[:, None]).abs().numpy()[group], 0.9, axis=0) / NORMAL_90
    return found


def _acted(samples: Samples, given: Tensor) -> Tensor:
    """Return the joint speeds (..., T, nv) of what networks give, (..., T, means)."""
    return given if samples.answers is None else (samples.answers * given[..., None, :]).sum(-1)


def _root(values: Tensor) -> Tensor:
    return values.square().mean(0).sqrt()


def fit(
    training: Samples, validation: Samples, model: Model, recipe: LearningRecipe, tell: Callable[[Epoch], None] = lambda epoch: None
) -> Fitted:
    """Train a recipe's ensemble.

    Args:
        training: what is learnt from; normalisers are theirs.
        validation: what decides when a member stops, and how much its deviations are scaled.
        model: the arm.
        recipe: networks and training.
        tell: called after each epoch.

    Errors:
        LearningError: for too few samples, and for losses that are no numbers.
    """
    for name, samples in (("training", training), ("validation", validation)):
        if len(samples) < _LEAST:
            raise LearningError(f"{name}: expected at least {_LEAST} transitions where the gate is above 0, found {len(samples)}")
    spec, scales = recipe.network, Normalisers.of(training)
    learned, held = scales.apply(training), scales.apply(validation)
    generator = torch.Generator().manual_seed(recipe.training.seed)
    size = training.inputs.shape[1]
    nets = Ensemble(size, spec.hidden, learned.target.shape[1], spec.members, spec.activation, spec.variance, generator)
    search = _Search(nets, recipe.training, spec.lipschitz)
    history = search.run(learned, held, generator, tell)
    layers = nets.layers(search.best)
    residual = _file(layers, scales, unexplained(concatenated(training, validation), scales.noise), model, recipe)
    if residual.spread is None:
        return Fitted(residual, tuple(history))
    with torch.no_grad():
        for parameter, best in zip(nets.parameters, search.best):
            parameter.copy_(best)
        spread = replace(residual.spread, scale=recalibrated(nets, held.inputs, validation, residual))
    return Fitted(replace(residual, spread=spread), tuple(history))


class _Search:
    """Adam on all members at once; keeps each member's best weights."""

    def __init__(self, nets: Ensemble, spec: TrainingSpec, lipschitz: float | None) -> None:
        self.nets, self.spec, self.lipschitz = nets, spec, lipschitz
        self.best = [parameter.detach().clone() for parameter in nets.parameters]
        self._adam = torch.optim.AdamW(nets.parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay, foreach=True)
        self._rate = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, spec.epochs)

    def run(self, learned: Samples, held: Samples, generator: torch.Generator, tell: Callable[[Epoch], None]) -> list[Epoch]:
        spec, members = self.spec, len(self.nets.weights[0])
        chances = drawing(learned, members, np.random.default_rng(spec.seed))
        best, since = torch.full((members,), torch.inf), torch.zeros(members, dtype=torch.long)
        steps, history = -(-len(learned) // spec.batch), []
        for number in range(spec.epochs + 1):  # epoch 0: nothing learnt yet
            trained = self._train(learned, chances, steps, generator) if number else torch.full((members,), torch.nan)
            if self.lipschitz is not None:
                self.nets.bound(self.lipschitz)
            with torch.no_grad():
                found = misses(self.nets, held.inputs[None], held.target[None], held.gate[None])
            if not torch.isfinite(found).all() or (number and not torch.isfinite(trained).all()):
                raise LearningError(f"the loss is no number any more after epoch {number}; a smaller learning_rate may help")
            active = since < spec.patience
            self._keep(active & (found < best))
            since = torch.where(active & (found < best), 0, since + 1)
            best = torch.where(active, torch.minimum(best, found), best)
            history.append(Epoch(number, *(values.numpy().copy() for values in (trained, found, best, active))))
            tell(history[-1])
            if not (since < spec.patience).any():
                break
        return history

    def _train(self, learned: Samples, chances: Tensor, steps: int, generator: torch.Generator) -> Tensor:
        batch, total = min(self.spec.batch, len(learned)), 0.0
        drawn = torch.multinomial(chances, steps * batch, replacement=True, generator=generator)
        for index in drawn.split(batch, 1):  # (E, batch)
            loss = losses(self.nets, learned.inputs[index], learned.target[index], learned.gate[index], BETA).mean(1)
            self._adam.zero_grad()
            loss.sum().backward()
            self._adam.step()
            total = total + loss.detach()
        self._rate.step()
        return total / steps

    def _keep(self, better: Tensor) -> None:
        with torch.no_grad():
            for kept, parameter in zip(self.best, self.nets.parameters):
                kept[better] = parameter[better]


def losses(nets: Ensemble, inputs: Tensor, target: Tensor, gate: Tensor, beta: float = 0.0) -> Tensor:
    """Return (E, B): negative log-likelihoods, up to a constant, or half squared errors where the networks give means only.

    What is predicted is g mu with deviation g s. The likelihood counts with g²: the squared error of what is predicted, which
    stays finite where the gate closes, in ``(d - g mu)² / 2 s² + g² log s``; and with s to the power of 2 ``beta``, held fixed.
    """
    mean, log = nets(inputs)
    gate = gate[..., None]
    error = (target - gate * mean).square()
    return (0.5 * (beta * log).detach().exp() * (error * (-log).exp() + gate.square() * log)).mean(-1)


def misses(nets: Ensemble, inputs: Tensor, target: Tensor, gate: Tensor) -> Tensor:
    """Return (E,): minus the log-likelihood of held-out targets once deviations are scaled to suit them, up to a constant.

    What decides when a member stops. As they are, deviations of rare impacts are promised too small long before the mean is
    learnt, and the likelihood would stop it then; but one scale an output is found afterwards anyway (``recalibrated``), so it
    is left open here as well. Laplace's distribution, whose tails are long: ``log mean(g |d - g mu| / s) + mean(g² log s)``.
    Errors below ``LEAST`` of an output's root mean square are as good as none: one that never moves does not decide.
    """
    mean, log = nets(inputs)
    gate = gate[..., None]
    weight = gate.square() / gate.square().mean(-2, keepdim=True)
    off = (weight * (target - gate * mean).abs() / gate * (-0.5 * log).exp()).mean(-2)
    return ((off.log() + 0.5 * (weight * log).mean(-2)).exp() + LEAST).log().mean(-1)


def drawing(samples: Samples, members: int, rng: np.random.Generator) -> Tensor:
    """Return (E, T): how likely each member draws a sample.

    Each member has drawn as many episodes as there are, with replacement (a bootstrap by episode). An episode counts by the
    root of how many samples it has: long ones do not drown the others, and short ones are not learnt by heart.
    """
    _, episode = np.unique(samples.episode, return_inverse=True)
    count = int(episode.max()) + 1
    weight = samples.draw.numpy().astype(float)
    share = np.sqrt(np.bincount(episode)) / np.bincount(episode, weight)
    times = np.stack([np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(members)])
    return torch.from_numpy(times[:, episode] * (share[episode] * weight))


@torch.no_grad()
def recalibrated(nets: Ensemble, inputs: Tensor, held: Samples, residual: Residual) -> np.ndarray:
    """Return (nv,): by how much deviations are multiplied so that 90 % intervals hold 90 % of the velocities held out.

    In contact, and where networks act on joints without contact, too, where there are enough of each: the larger of the two, so
    that neither is promised too much.

    Args:
        nets: they give targets in units of the residual's ``output_scale``.
        inputs: of ``held``, normalised.
    """
    mean, log = nets(inputs[None])
    output, rest = (torch.from_numpy(values).float() for values in (residual.output_scale, residual.spread.rest[1]))
    mean, variance = _acted(held, output * mean), (output * output) * log.exp().mean(0)
    if held.answers is not None:
        variance = (held.answers.square() * variance[:, None]).sum(-1)
    gate = held.gate[:, None]
    error = (held.target / gate - mean.mean(0)) / NORMAL_90
    beyond = (error.square() - rest.square()).clamp(min=0) / (variance + mean.var(0, correction=0))
    wanted = (held.contact,) if held.answers is not None else (held.contact, ~held.contact)
    groups = [group for group in wanted if group.sum() >= _JUDGED] or [np.ones(len(held), bool)]
    scale = np.max([np.quantile(beyond.sqrt().numpy()[group], 0.9, axis=0) for group in groups], axis=0)
    return np.maximum(scale, 1e-3)


def _file(
    layers: tuple[tuple[np.ndarray, np.ndarray], ...], scales: Normalisers, rest: np.ndarray, model: Model, recipe: LearningRecipe
) -> Residual:
    n, robot = model.tree.n, model.robot
    means = len(scales.output)
    bounds = (np.full(means, LOWEST), np.full(means, HIGHEST), np.ones(n), rest)
    return Residual(
        layers,
        recipe.network.activation,
        *(values.numpy().astype(float) for values in (scales.mean, scales.scale, scales.output)),
        near=recipe.near,
        far=recipe.far,
        dt=recipe.dt,
        robot=robot.name,
        joints=tuple(robot.joints),
        surfaces=recipe.surfaces,
        base=recipe.base,
        spread=Spread(*bounds) if recipe.network.variance else None,
        acts_on=recipe.network.acts_on,
        encode_angles=recipe.network.encode_angles,
        integrator=recipe.integrator,
        contact=recipe.contact,
        physics=physics_of(model.tree) if recipe.base == "analytic" else {},
        seed=recipe.training.seed,
        versions={"mbctrl": __version__, "torch": version("torch"), "numpy": version("numpy")},
    )

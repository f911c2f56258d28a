"""Training of a policy: one network that gives a planner's knots, stopped by stretches of runs nobody trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mbctrl import __version__
from mbctrl.learning.ensemble import Ensemble
from mbctrl.learning.fit import LearningError

HIDDEN, ACTIVATION = (128, 128), "silu"
EPOCHS, PATIENCE, BATCH, RATE = 200, 40, 128, 2e-3
_MOST = 100  # steps of an epoch: more samples do not make training longer
_STRETCH = 25  # plans in a row that are held out, or learnt from, together: neighbours are all but the same
_HELD = 6  # of so many stretches one is held out
_LEAST_ERROR = 1e-4  # of a knot's variance: less is as good
LEAST = 60  # plans that anything can be learnt from


@dataclass(frozen=True)
class Trained:
    """A network as ``mbctrl.planning.policy.Policy`` takes it (``network``), and the share (1: nothing learnt) of the variance of
    held-out knots that it does not explain."""

    network: dict[str, Any]
    missed: float


def imitate(inputs: np.ndarray, knots: np.ndarray, seed: int, tell: Callable[[int], None] = lambda epoch: None) -> Trained:
    """Train a network to give ``knots`` (T, K nu) from ``inputs`` (T, inputs), rows in the order they were planned in.

    AdamW whose rate falls to nothing over the epochs; the weights of the one that does best on what is held out.

    Errors:
        LearningError: for too few plans, and for those that are no numbers.
    """
    if len(inputs) < LEAST:
        raise LearningError(f"expected at least {LEAST} plans to imitate, found {len(inputs)}")
    if not (np.isfinite(inputs).all() and np.isfinite(knots).all()):
        raise LearningError("plans to imitate hold numbers that are not finite")
    held = np.arange(len(inputs)) // min(_STRETCH, len(inputs) // _HELD) % _HELD == _HELD - 2
    (mean, scale), (middle, width) = _normal(inputs[~held]), _normal(knots[~held])
    rows = [torch.from_numpy(values).float() for values in ((inputs - mean) / scale, (knots - middle) / width)]
    index = [torch.from_numpy(np.flatnonzero(mask)) for mask in (~held, held)]
    generator = torch.Generator().manual_seed(seed)
    net = Ensemble(inputs.shape[1], HIDDEN, knots.shape[1], 1, ACTIVATION, False, generator)
    best = _fitted(net, *([values[part] for values in rows] for part in index), generator, tell)
    layers = [(w[0].astype(float), b[0].astype(float)) for w, b in net.layers(best)]
    judged = rows[1][index[1]]
    with torch.no_grad():
        for parameter, value in zip(net.parameters, best):
            parameter.copy_(value)
        error = (net(rows[0][index[1]][None])[0][0] - judged).square().mean()
        missed = float(error / judged.var(0, correction=0).mean().clamp(min=1e-12))
    versions = {"mbctrl": __version__, "torch": version("torch"), "numpy": version("numpy")}
    scales = {"input_mean": mean, "input_scale": scale, "output_mean": middle, "output_scale": width}
    return Trained({"layers": tuple(layers), "activation": ACTIVATION, **scales, "seed": seed, "versions": versions}, missed)


def _normal(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and deviation of columns; 1 in place of none."""
    spread = values.std(0)
    return values.mean(0), np.where(spread > 1e-6, spread, 1.0)


def _loss(net: Ensemble, inputs: Tensor, knots: Tensor) -> Tensor:
    """Return minus the log-likelihood, up to a constant, with the deviation of each knot left open: a plan's end, where one is as
    good as another, does not drown its beginning."""
    return ((net(inputs[None])[0][0] - knots).square().mean(0) + _LEAST_ERROR).log().mean()


def _fitted(
    net: Ensemble, learned: list[Tensor], held: list[Tensor], generator: torch.Generator, tell: Callable[[int], None]
) -> list[Tensor]:
    """Return the weights of the epoch that does best on what is held out."""
    adam = torch.optim.AdamW(net.parameters, lr=RATE, weight_decay=1e-2, foreach=True)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, EPOCHS)
    batch = min(BATCH, len(learned[0]))
    best, kept, since = float("inf"), [p.detach().clone() for p in net.parameters], 0
    for epoch in range(1, EPOCHS + 1):
        for part in torch.randperm(len(learned[0]), generator=generator)[: _MOST * batch].split(batch):
            loss = _loss(net, learned[0][part], learned[1][part])
            adam.zero_grad()
            loss.backward()
            adam.step()
        falling.step()
        with torch.no_grad():
            miss = float(_loss(net, *held))
        if not np.isfinite(miss):
            raise LearningError(f"the loss is no number any more after epoch {epoch}")
        since = 0 if miss < best else since + 1
        if miss < best:
            best, kept = miss, [p.detach().clone() for p in net.parameters]
        tell(epoch)
        if since >= PATIENCE:
            break
    return kept

"""Chooses a friction family by cross-validation inside the training log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.friction import TERMS, Friction
from mbctrl.calibrate.regression import Grams, grams, regress, solve, squares, weighted
from mbctrl.calibrate.signals import Signals
from mbctrl.dynamics.reference import ReferenceDynamics

_FOLDS = 5


@dataclass(frozen=True)
class Score:
    """A family's held-out error: mean over joints of residual over torque [1], and its sd over the folds."""

    friction: Friction
    error: float
    spread: float


def choose(
    signals: Sequence[Signals],
    reference: ReferenceDynamics,
    candidates: Sequence[Friction],
    base: np.ndarray,
    advance: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Return the candidates' scores, best first.

    Folds are contiguous fifths of the log: interleaved ones would test on what they trained on, motion being smooth. The
    load of load-dependent friction comes from a fit without it.

    Args:
        signals: the training recordings; nothing else may decide.
        reference: the arm's kinematics.
        candidates: families.
        base: indices of the independent columns of links and rotors.
        advance: told of each family's name before it is tried.
    """
    scores, links, sd = [], None, None
    by_direction: dict[tuple[str, float, float], list[Friction]] = {}
    for family in candidates:
        length = family.length if family.memory == "dahl" else 0.0
        speed = family.speed if "stribeck" in family.terms else 0.0
        by_direction.setdefault((family.memory, length, speed), []).append(family)
    n = signals[0].effort.shape[1]
    for (memory, length, speed), group in by_direction.items():
        widest = Friction(
            tuple(term for term in TERMS if any(term in one.terms for one in group)), memory, length or 2e-4, speed or 0.05
        )
        advance(widest.name)
        if links is None:
            plain = Friction(("coulomb", "viscous", "offset"), "sign")
            first, sd = weighted(grams(regress(signals, reference, plain)))
            links = first[: 10 * n]
        data = grams(regress(signals, reference, widest, links))
        for family in group:
            columns = subset(widest, family, n, base)
            scores.append(Score(family, *_held_out(data.only(columns), sd)))
    return sorted(scores, key=lambda score: score.error)


def subset(widest: Friction, family: Friction, n: int, base: np.ndarray) -> np.ndarray:
    """Return the columns of ``widest``'s equations that are ``family``'s, independent ones only."""
    width = len(widest.terms)
    terms = np.array([widest.terms.index(term) for term in family.terms])
    return np.concatenate([base, *(11 * n + j * width + terms for j in range(n))])


def _held_out(data: Grams, sd: np.ndarray) -> tuple[float, float]:
    folds = np.arange(len(data)) * _FOLDS // len(data)
    errors = []
    for fold in range(_FOLDS):
        x = solve(data[folds != fold], sd)
        left, all_of_it = squares(data[folds == fold], x).sum(0), data.s[folds == fold].sum(0)
        errors.append(np.sqrt(left / all_of_it).mean())
    return float(np.mean(errors)), float(np.std(errors))

"""Chooses a friction family by cross-validation inside the training log."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.regression import Columns, Grams, Motion, grams, regress, solve, squares, stacked, weighted

_FOLDS = 5


@dataclass(frozen=True)
class Score:
    """A family's held-out error: mean over joints of residual over torque [1], and its sd over the folds."""

    friction: Friction
    error: float
    spread: float


def choose(
    motions: Sequence[Motion],
    candidates: Sequence[Friction],
    base: np.ndarray,
    advance: Callable[[str], None] = lambda text: None,
) -> list[Score]:
    """Return the candidates' scores, best first.

    Folds are contiguous fifths of the log: interleaved ones would test on what they trained on, motion being smooth. The
    load of load-dependent friction comes from a fit without it.

    Args:
        motions: the training recordings; nothing else may decide.
        candidates: families.
        base: indices of the independent columns of links and rotors.
        advance: told of each direction before its families are tried.
    """
    n = motions[0].one.effort.shape[1]
    first, sd = weighted(grams(regress(motions, Friction())))
    by_direction: dict[tuple[str, float], list[Friction]] = {}
    for family in candidates:
        by_direction.setdefault((family.memory, family.length if family.memory == "dahl" else 0.0), []).append(family)
    scores = []
    for (memory, length), group in by_direction.items():
        advance(f"{memory} {length:g} rad" if length else memory)
        # The columns of all families that share a direction, once; a family is some of them.
        atoms = list(dict.fromkeys(atom for family in group for atom in _atoms(family)))
        singles = [Friction((term,), memory, length or 2e-4, speed or 1.0) for term, speed in atoms]
        W = [motion.equations(np.concatenate([motion.terms(one, first[: 10 * n]) for one in singles], -1)) for motion in motions]
        data = grams(stacked(motions, W, Columns(n, group[0]), 1.0))
        data = data.merged(np.arange(len(data)) * _FOLDS // len(data))
        for family in group:
            terms = np.array([atoms.index(atom) for atom in _atoms(family)])
            columns = np.concatenate([base, *(11 * n + j * len(atoms) + terms for j in range(n))])
            scores.append(Score(family, *_held_out(data.only(columns), sd)))
    return sorted(scores, key=lambda score: score.error)


def _atoms(family: Friction) -> list[tuple[str, float]]:
    """Return (term, Stribeck speed or 0) for each of a family's terms."""
    return [(term, family.speed if term == "stribeck" else 0.0) for term in family.terms]


def _held_out(data: Grams, sd: np.ndarray) -> tuple[float, float]:
    """Return mean and sd over the folds, which are the blocks."""
    errors = []
    for fold in range(len(data)):
        one = np.arange(len(data)) == fold
        x = solve(data[~one], sd)
        errors.append(np.sqrt(squares(data[one], x)[0] / data.s[fold]).mean())
    return float(np.mean(errors)), float(np.std(errors))

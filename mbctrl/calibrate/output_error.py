"""Fits an arm's unknowns so that its simulated twin moves as the arm did (output error), with intervals that mean something.

Where the regression route needs accelerations and torques, this one needs neither: it also finds delays, and the gains of an
arm that takes references. It costs more, and it needs a start from which the simulation resembles the arm.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from mbctrl.calibrate.shooting import CONVERGED, ROUGHLY, Normal, Point, Search
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.calibrate.simulate import Twin

_SETTLED = 0.02  # weights that change by less need no further round
_BLOCKS = 8  # fewer blocks of time than this say nothing about their spread: windows stand in


@dataclass(frozen=True)
class Fit:
    """What a fit found; vectors (P,) are in the order of ``names``, fixed unknowns not among them.

    ``errors`` are standard errors, the larger one of what independent residuals give and of a jackknife over ``blocks`` of time;
    NaN for parameters ``at_bounds``. ``correlation`` (P, P). ``uninformed`` are parameters the prior decides, not the data.
    ``costs`` the sum of squared residuals in units of their noise, from iteration to iteration of the last round. ``rms`` and
    ``noise`` (C,) of positions, then of velocities where they were compared: residuals, and their weights' sd. ``everything``
    are the values of all unknowns in the arm's order.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    values: np.ndarray
    errors: np.ndarray
    correlation: np.ndarray
    logarithmic: np.ndarray
    at_bounds: tuple[str, ...]
    uninformed: tuple[str, ...]
    costs: tuple[float, ...]
    rms: np.ndarray
    noise: np.ndarray
    windows: int
    blocks: int
    rollouts: int
    seconds: float
    everything: np.ndarray

    def __getitem__(self, name: str) -> float:
        """Return a fitted value by name."""
        return float(self.values[self.names.index(name)])

    def interval(self, level: float = 0.95) -> np.ndarray:
        """Return (P, 2): confidence intervals, Student's t with a degree of freedom less than blocks.

        Those of parameters searched by their logarithm are symmetric in it.
        """
        reach = student.ppf(0.5 + level / 2, max(self.blocks - 1, 1)) * self.errors
        ratio = np.exp(np.where(self.logarithmic, reach / self.values, 0.0))
        low = np.where(self.logarithmic, self.values / ratio, self.values - reach)
        return np.stack([low, np.where(self.logarithmic, self.values * ratio, self.values + reach)], 1)


def fit(
    twin: Twin,
    *,
    free_start: bool = True,
    noise: np.ndarray | None = None,
    rounds: int = 2,
    exact: bool = True,
    huber: bool = False,
    starts: int = 1,
    seed: int = 0,
    iterations: int = 50,
    advance: Callable[[str], None] = lambda text: None,
) -> Fit:
    """Return the unknowns of ``twin.arm`` under which it moves most like the log.

    Args:
        twin: arm and windows.
        free_start: each window's initial state is fitted too, near the measured one; else it is the measured one.
        noise: (C,) sd of positions [rad], then of velocities [rad/s] where they were logged; None: begin with what the log's
            filter takes away and refine from the residuals, as model errors weigh more than encoders'.
        rounds: refinements of the noise and of what ``exact`` asks for.
        exact: the simulation's own error is taken out of the residuals, so that the unknowns are those of the arm, whatever the
            time step; else they are those that suit a model stepped just like the twin.
        huber: residuals beyond 1.345 sd weigh less, for logs with outliers.
        starts: how many descents; all but the first from the best of random points within priors and bounds.
        seed: of those.
        iterations: at most, of each descent.
        advance: told of each iteration.

    Errors:
        CalibrationError: naming a parameter that moves nothing or several that cannot be told apart, or where the simulation
            diverges.
    """
    began = time.perf_counter()
    search = Search(twin, free_start, huber, iterations, advance)
    if noise is not None:
        if np.shape(noise) != search.sd.shape or not (np.isfinite(noise).all() and np.min(noise) > 0):
            raise CalibrationError(f"expected {len(search.sd)} standard deviations above 0, found {noise}", key="noise")
        search.sd = np.asarray(noise, float)
    if not search.free:
        raise CalibrationError("nothing to fit: every parameter is fixed", key="parameters")
    search.refined = rounds > 0
    best = search.approach(search.first())
    for other in search.others(starts - 1, np.random.default_rng(seed)):
        found = search.approach(other)
        best = found if found[3][-1] < best[3][-1] else best
    search.check(best[0], best[2])
    for left in reversed(range(rounds)):
        before = search.sd
        if noise is None:
            search.sd = np.maximum(search.rms(best[2]), 1e-3 * search.sd)
        if not exact and np.abs(search.sd / before - 1).max() < _SETTLED:
            best = search.descend(best[0], best[1])
            break
        if exact:
            search.correct(best)
        best = search.descend(best[0], best[1], ROUGHLY if left else CONVERGED)
    return _result(search, best, time.perf_counter() - began)


def _result(search: Search, point: Point, seconds: float) -> Fit:
    """Return the fit at ``point``."""
    z, _, normal, costs = point
    held = (z <= search.low + 1e-9) | (z >= search.high - 1e-9)
    covariance, blocks = _covariance(search, normal, ~held, costs[-1])
    sd = np.sqrt(np.diag(covariance))
    errors = sd * search.slopes(z)
    names = tuple(one.name for one in search.unknowns)
    limit = [np.inf if one.prior is None else 0.9 * one.prior[1] for one in search.unknowns]
    return Fit(
        names=names,
        units=tuple(one.kind.unit for one in search.unknowns),
        values=search.values(z),
        errors=errors,
        correlation=covariance / np.outer(sd, sd),
        logarithmic=search.positive,
        at_bounds=tuple(name for name, at in zip(names, held) if at),
        uninformed=tuple(name for name, error, most in zip(names, errors, limit) if error > most),
        costs=tuple(costs),
        rms=search.rms(normal),
        noise=search.sd,
        windows=search.twin.count,
        blocks=blocks,
        rollouts=search.rollouts,
        seconds=seconds,
        everything=search.everything(z[None])[0],
    )


def _covariance(search: Search, normal: Normal, inner: np.ndarray, cost: float) -> tuple[np.ndarray, int]:
    """Return the covariance (P, P) of z, and how many blocks it rests on; NaN where not ``inner``.

    Residuals of a model that is a little wrong are far from independent: blocks of time are left out in turn, the sandwich
    that keeps its width where blocks are few (Bell and McCaffrey, "Bias reduction in standard errors for linear regression
    with multi-stage samples", 2002).
    """
    out = np.full((len(inner), len(inner)), np.nan)
    number = np.unique(search.twin.windows.block, return_inverse=True)[1]
    number = number if number.max() + 1 >= _BLOCKS else np.arange(search.twin.count)
    keep, blocks = np.flatnonzero(inner), int(number.max()) + 1
    A, g = np.zeros((blocks, len(keep), len(keep))), np.zeros((blocks, len(keep)))
    ours, slopes = normal.reduced()
    np.add.at(A, number, ours[:, keep[:, None], keep])
    np.add.at(g, number, slopes[:, keep])
    whole = A.sum(0) + np.diag(normal.information[keep])
    scale = 1 / np.sqrt(np.maximum(np.diag(whole), 1e-300))
    scale = np.outer(scale, scale)
    bread = scale * np.linalg.pinv(scale * whole, rcond=1e-12, hermitian=True)
    left = max(normal.count - len(keep) - search.nuisances * search.twin.count, 1)
    plain = bread * cost / left
    robust = bread * normal.information[keep] @ bread
    if blocks > 1:
        without = scale * np.linalg.pinv(scale * (whole - A), rcond=1e-12, hermitian=True)
        moved = (without @ g[..., None])[..., 0]  # by how much the estimate would, one step, without that block
        robust = robust + moved.T @ moved * (blocks - 1) / blocks
    both = plain + robust
    wider = np.sqrt(np.maximum(np.diag(plain), np.diag(robust)) / np.diag(both))
    out[np.ix_(keep, keep)] = both * np.outer(wider, wider)
    return out, blocks

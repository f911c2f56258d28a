"""The regressor route from recordings to a physically consistent arm with intervals."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
from scipy.stats import norm

from mbctrl.base.errors import suggest
from mbctrl.calibrate.base_parameters import BaseParameters
from mbctrl.calibrate.choose import Score, choose
from mbctrl.calibrate.encoders import EncoderOffsets, encoder_offsets
from mbctrl.calibrate.feasible import Restrictions, fit_feasible
from mbctrl.calibrate.friction import UNITS, Friction, families
from mbctrl.calibrate.inertia import basis, proper, pseudo_inertia
from mbctrl.calibrate.recipe import FitSpec, FrictionSpec
from mbctrl.calibrate.regression import (
    Columns,
    Grams,
    Motion,
    Regression,
    bootstrap,
    delay,
    grams,
    huber,
    instrumental,
    moved_efforts,
    regress,
    weighted,
)
from mbctrl.calibrate.signals import CalibrationError, Signals
from mbctrl.dynamics.load import Model
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters, with_links
from mbctrl.dynamics.tree import RigidTree

_SPEEDS = np.array([0.0, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8])  # share of the fastest seen, where friction may not push
_SILENT = 1e-9  # a column this small beside the largest of its kind says nothing
_KNOWN = 0.5  # a parameter whose variance the data reduce by less than this share is the prior's


@dataclass(frozen=True)
class Estimates:
    """What the data determine, with intervals: base parameters of links and rotors, then friction.

    ``names``, ``meanings`` (how base parameters are grouped), ``units``; ``value``, ``se``, ``low``, ``high``, ``prior`` (b,);
    ``covariance`` (b, b) over blocks of time.
    """

    names: tuple[str, ...]
    meanings: tuple[str, ...]
    units: tuple[str, ...]
    value: np.ndarray
    se: np.ndarray
    low: np.ndarray
    high: np.ndarray
    prior: np.ndarray
    covariance: np.ndarray

    @property
    def correlation(self) -> np.ndarray:
        """Return the correlation matrix (b, b)."""
        spread = np.where(self.se > 0, self.se, 1.0)
        return self.covariance / np.outer(spread, spread)


@dataclass(frozen=True)
class Fit:
    """A calibrated arm.

    Args:
        tree: the arm with its fitted links, rotors and the Coulomb and viscous friction a planner's model has.
        prior: the arm as the model file has it.
        columns, x: all parameters (p,), physically consistent; ``names`` of them.
        base: (b,) indices of the parameters of links and rotors that were estimated, the others grouped into them.
        known: (p,) share of each parameter's prior variance that the data removed, 0 to 1.
        offset: (n,) torque offset [N·m].
        sd: (n,) residual sd of the training data [N·m].
        estimates: what the data determine.
        scores: of the friction families, best first; empty where the recipe names one.
        unconstrained: (p,) the least-squares fit that physics does not bind.
        delay: [s] by which efforts come later than the motion they go with; see ``regression.delay``.
        warnings: one line each.
        seconds: how long each step took.
    """

    tree: RigidTree
    prior: RigidTree
    columns: Columns
    names: tuple[str, ...]
    x: np.ndarray
    base: np.ndarray
    known: np.ndarray
    offset: np.ndarray
    sd: np.ndarray
    estimates: Estimates
    scores: tuple[Score, ...]
    unconstrained: np.ndarray
    delay: float
    warnings: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def friction(self) -> Friction:
        """The friction family."""
        return self.columns.friction

    @property
    def links(self) -> np.ndarray:
        """The links' parameters (n, 10)."""
        return self.x[self.columns.inertial].reshape(-1, 10)

    def torque(self, motion: Motion) -> np.ndarray:
        """Return the torques (T, n) [N·m] the fitted arm would have needed for a recording's motion."""
        return motion.equations(motion.terms(self.friction, self.x[self.columns.inertial])) @ self.x


class Identification:
    """Fits one arm.

    Args:
        model: the arm; its inertias are the prior.
        spec: what is fitted, and how.
        advance: told what is being done.

    Errors:
        CalibrationError: naming the parameter or joint at fault.
    """

    def __init__(self, model: Model, spec: FitSpec, advance: Callable[[str], None] = lambda text: None) -> None:
        self.model, self.spec, self.advance = model, spec, advance
        self.tree = model.tree
        self.reference = ReferenceDynamics(model.tree)
        self.prior = proper(link_parameters(model.tree))
        self.base = BaseParameters(model.tree, ("armature",))
        self._seconds: dict[str, float] = {}

    def motion(self, one: Signals) -> Motion:
        """Return a recording's columns."""
        return Motion(one, self.reference)

    def fit(self, motions: Sequence[Motion], commands: Sequence[Motion] = ()) -> Fit:
        """Return the fit to recordings; ``commands`` are the same recordings along the commanded motion (instrumental)."""
        scores = self._timed("friction", self._families, motions)
        family = scores[0].friction if scores else _family(self.spec.friction)
        names = self.names(family)
        restrictions, wanted = self.restrictions(names)
        regression, data, links = self._timed("equations", self._load_settled, motions, family)
        self._refuse_silent(data, names, wanted)
        estimates, free, sd, unconstrained = self._timed(
            "intervals", self._estimates, regression, data, names, restrictions, commands, links
        )
        self.advance("physically consistent fit")
        speeds = _SPEEDS * max(float(np.abs(motion.one.v).max()) for motion in motions)
        load = np.max([np.abs(motion.one.effort).max(0) for motion in motions], 0)
        x = self._timed(
            "feasible",
            fit_feasible,
            data,
            regression.columns,
            sd,
            self.prior,
            speeds,
            load,
            restrictions,
            self.spec.prior_weight,
        )
        late = self._timed("delay", delay, motions, regression, free, sd)
        known = self._known(data, regression.columns, sd, x, free)
        coulomb, viscous, offset = self._equivalent(regression.columns, x, motions)
        tree = replace(
            with_links(self.tree, x[regression.columns.inertial].reshape(-1, 10)),
            armature=np.maximum(x[regression.columns.armature], 0.0),
            damping=viscous,
            friction=coulomb,
        )
        return Fit(
            tree,
            self.tree,
            regression.columns,
            names,
            x,
            free[free < 11 * self.tree.n],
            known,
            offset,
            sd,
            estimates,
            tuple(scores),
            unconstrained,
            late,
            self._warnings(names, known, restrictions),
            dict(self._seconds),
        )

    def encoders(self, motions: Sequence[Motion], fit: Fit) -> EncoderOffsets:
        """Return the encoders' offsets that recordings show, friction being of a fit's family (its load term left out)."""
        plain = replace(fit.friction, terms=tuple(term for term in fit.friction.terms if term != "load"))
        return encoder_offsets(
            motions, self.reference, plain, self.base.columns, seconds=self.spec.block, draws=self.spec.draws, seed=self.spec.seed
        )

    def rezeroed(self, motions: Sequence[Motion], offsets: EncoderOffsets) -> list[Motion]:
        """Return recordings with positions corrected by the offsets that are known."""
        shift = np.nan_to_num(offsets.value)
        return [Motion(replace(motion.one, q=motion.one.q - shift), self.reference) for motion in motions]

    def undelayed(self, motions: Sequence[Motion], fit: Fit) -> list[Motion]:
        """Return recordings whose efforts are moved back by the delay a fit to them found."""
        return [Motion(moved_efforts(motion.one, fit.delay), self.reference) for motion in motions]

    def names(self, family: Friction) -> tuple[str, ...]:
        """Return the names of all parameters in the order of ``Columns``."""
        return (*self.base.names, *(f"{joint}.{term}" for joint in self.tree.joints for term in family.terms))

    def restrictions(self, names: tuple[str, ...]) -> tuple[Restrictions, list[int]]:
        """Return what the recipe holds fixed, bounded or near a prior, and the indices it says are free.

        Errors:
            CalibrationError: for a name that is none.
        """
        out, wanted = Restrictions(), []
        own = np.concatenate([self.prior.ravel(), self.tree.armature])
        n = self.tree.n
        if not self.spec.links:
            out.fixed.update((k, float(own[k])) for k in range(10 * n))
        if not self.spec.rotors:
            out.fixed.update((k, float(own[k])) for k in range(10 * n, 11 * n))
        for pattern, says in self.spec.parameters.items():
            found = [k for k, name in enumerate(names) if fnmatchcase(name, pattern)]
            if not found:
                raise CalibrationError(f"no such parameter{suggest(pattern, names)[:400]}", key=f"fit.parameters.{pattern}")
            for k in found:
                if says.fixed is not None:
                    out.fixed[k] = says.fixed
                if says.prior is not None:
                    out.priors[k] = says.prior
                if says.bounds is not None:
                    out.bounds[k] = says.bounds
            wanted += found if says.free else []
        return out, wanted

    def _timed(self, name: str, function: Callable, *arguments: object) -> object:
        start = time.perf_counter()
        found = function(*arguments)
        self._seconds[name] = time.perf_counter() - start
        return found

    def _families(self, motions: Sequence[Motion]) -> list[Score]:
        if self.spec.friction != "auto":
            return []
        self.advance("friction families")
        return choose(motions, families(), self.base.columns, lambda text: self.advance(f"friction: {text}"))

    def _load_settled(self, motions: Sequence[Motion], family: Friction) -> tuple[Regression, Grams, np.ndarray]:
        """Return equations whose load-dependent columns are those of the links they lead to."""
        self.advance("equations")
        links = weighted(grams(regress(motions, Friction(), seconds=self.spec.block)))[0][: 10 * self.tree.n]
        for _ in range(2 if "load" in family.terms else 1):
            regression = regress(motions, family, links, self.spec.block)
            data = grams(regression)
            links = weighted(data)[0][: 10 * self.tree.n]
        return regression, data, links

    def _refuse_silent(self, data: Grams, names: tuple[str, ...], wanted: Sequence[int]) -> None:
        """Refuse parameters that are to be fitted and move nothing."""
        size = np.sqrt(np.einsum("bnpp->p", data.G))
        kinds = np.array([name.rpartition(".")[2] for name in names])
        for k in wanted:
            if size[k] <= _SILENT * size[kinds == kinds[k]].max(initial=0.0) or size[k] == 0:
                raise CalibrationError("free, but without influence on any torque of this log: fix it", key=names[k])

    def _estimates(
        self,
        regression: Regression,
        data: Grams,
        names: tuple[str, ...],
        restrictions: Restrictions,
        commands: Sequence[Motion],
        links: np.ndarray,
    ) -> tuple[Estimates, np.ndarray, np.ndarray, np.ndarray]:
        """Return estimates, the indices they are of, joint sds and all parameters with zeros elsewhere."""
        base = (
            self.base
            if not restrictions.fixed
            else BaseParameters(self.tree, ("armature",), without=[k for k in restrictions.fixed if k < len(self.base.names)])
        )
        friction = [k for k in range(len(self.base.names), len(names)) if k not in restrictions.fixed]
        columns = np.concatenate([base.columns, friction]).astype(int)
        shifted = held(data, restrictions.fixed)
        value, sd = weighted(shifted.only(columns))
        if self.spec.estimator == "huber":
            value, sd = huber(_held_regression(regression, restrictions.fixed), columns)
        elif self.spec.estimator == "instrumental":
            if not commands:
                raise CalibrationError("needs a log with the command", key="fit.estimator: instrumental")
            along = np.concatenate([one.equations(one.terms(regression.columns.friction, links)) for one in commands])
            value = instrumental(_held_regression(regression, restrictions.fixed), along, columns, sd)
        self.advance("bootstrap")
        covariance = bootstrap(shifted.only(columns), sd, self.spec.draws, self.spec.seed)
        se = np.sqrt(np.diag(covariance))
        wide = norm.ppf(0.5 + self.spec.confidence / 2) * se
        own = np.concatenate([base.from_full(np.concatenate([self.prior.ravel(), self.tree.armature])), np.zeros(len(friction))])
        own[len(base.columns) :] = self._friction_prior(names, friction)
        full = np.zeros(len(names))
        full[columns] = value
        for k, fixed in restrictions.fixed.items():
            full[k] = fixed
        labels = (*base.labels(), *(names[k] for k in friction))
        meanings = (*base.groupings(), *(names[k] for k in friction))
        units = (*(base.units[k] for k in base.columns), *(UNITS[names[k].rpartition(".")[2]] for k in friction))
        return Estimates(labels, meanings, units, value, se, value - wide, value + wide, own, covariance), columns, sd, full

    def _friction_prior(self, names: tuple[str, ...], friction: Sequence[int]) -> list[float]:
        own = {"coulomb": self.tree.friction, "viscous": self.tree.damping}
        out = []
        for k in friction:
            joint, _, term = names[k].rpartition(".")
            out.append(float(own[term][self.tree.joints.index(joint)]) if term in own else 0.0)
        return out

    def _known(self, data: Grams, columns: Columns, sd: np.ndarray, x: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Return how much of each parameter's prior variance the data remove.

        The prior's precision is the curvature of its divergence at the fit; rotors and friction, which have none, count as
        known where they are estimated at all.
        """
        n, count = columns.n, float(data.count.sum())
        precision = np.einsum("bnpq,n->pq", data.G, 1 / sd**2, optimize=True)
        out = np.zeros(columns.count)
        out[free[free >= 10 * n]] = 1.0
        prior = np.zeros((10 * n, 10 * n))
        for j in range(n):
            turned = np.linalg.inv(pseudo_inertia(x[10 * j : 10 * j + 10])) @ basis()
            own = slice(10 * j, 10 * j + 10)
            prior[own, own] = count * self.spec.prior_weight * np.einsum("kij,lji->kl", turned, turned)
        before = np.diag(np.linalg.inv(prior))
        rest = slice(10 * n, columns.count)
        # Friction and rotors are estimated beside the links: what they could explain does not tell of the links.
        aside = precision[: 10 * n, rest] @ np.linalg.pinv(precision[rest, rest], hermitian=True) @ precision[rest, : 10 * n]
        after = np.diag(np.linalg.inv(prior + precision[: 10 * n, : 10 * n] - aside))
        out[: 10 * n] = np.clip(1 - after / before, 0.0, 1.0)
        return out

    def _equivalent(self, columns: Columns, x: np.ndarray, motions: Sequence[Motion]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the Coulomb and viscous friction nearest to the fitted curve over the speeds seen, and the offset, (n,)."""
        family, n = columns.friction, columns.n
        v = np.concatenate([motion.one.v[motion.one.moving] for motion in motions])
        load = np.concatenate([(motion.inertial @ x[columns.inertial])[motion.one.moving] for motion in motions])
        out = np.zeros((3, n))
        for j in range(n):
            speed = np.abs(v[:, j])
            slides = speed > 0.02
            if not slides.any():
                continue
            own = x[columns.friction_of(j)]
            rows = family.columns(speed[slides, None], np.ones((slides.sum(), 1)), np.abs(load[slides, j : j + 1]))[:, 0]
            for term in ("offset", "asymmetric"):
                if term in family.terms:
                    rows[:, family.terms.index(term)] = 0.0
            line = np.stack([np.ones(slides.sum()), speed[slides]], 1)
            out[:2, j] = np.maximum(np.linalg.lstsq(line, rows @ own, rcond=None)[0], 0.0)
            out[2, j] = own[family.terms.index("offset")] if "offset" in family.terms else 0.0
        return out[0], out[1], out[2]

    def _warnings(self, names: tuple[str, ...], known: np.ndarray, restrictions: Restrictions) -> tuple[str, ...]:
        links = range(10 * self.tree.n)
        kept = [names[k] for k in links if known[k] < _KNOWN and k not in restrictions.fixed]
        if not kept:
            return ()
        return (f"{len(kept)} of {len(links)} link parameters are not identified by this log and stay near the model's",)


def held(data: Grams, fixed: dict[int, float]) -> Grams:
    """Return Gram matrices of the torque that is left when some parameters are known."""
    if not fixed:
        return data
    index, value = np.array(list(fixed)), np.array(list(fixed.values()))
    g = data.g - data.G[:, :, :, index] @ value
    s = data.s - 2 * data.g[:, :, index] @ value + np.einsum("p,bnpq,q->bn", value, data.G[:, :, index[:, None], index], value)
    return Grams(data.G, g, s, data.count)


def _held_regression(regression: Regression, fixed: dict[int, float]) -> Regression:
    tau = regression.tau.copy()
    for k, value in fixed.items():
        tau -= regression.W[:, :, k] * value
    return replace(regression, tau=tau)


def _family(spec: FrictionSpec) -> Friction:
    return Friction(spec.terms, spec.memory, spec.length, spec.speed)

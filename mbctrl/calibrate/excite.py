"""An excitation trajectory for system identification: periodic, within every limit, as informative as can be found.

Sources: Swevers et al., "Optimal robot excitation and identification" (1997), for the Fourier series and the criterion.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from mbctrl.base.errors import MbctrlError, SpecError
from mbctrl.base.robot import Positive, Robot
from mbctrl.base.spec import Spec
from mbctrl.calibrate.base_parameters import BaseParameters
from mbctrl.calibrate.clearance import Clearance
from mbctrl.calibrate.excite_problem import Bounds, Problem
from mbctrl.calibrate.fourier import FourierSeries, ramp, ramp_time, there_and_back
from mbctrl.calibrate.information import Information, Quality, model_torque
from mbctrl.dynamics.load import Model

Count = Annotated[int, Field(ge=1)]
RATES = ("velocity", "acceleration", "jerk")
POOR = 0.3  # of its nominal value: an expected standard deviation above which a parameter counts as poorly excited
_NOISE = 0.02  # of the effort limit
_FINE = 1000  # samples of a period on which every limit is checked
_LEAST_RAMP = 2.0  # [s]
_ROUNDING = 1e-9
_NONE = "no motion within the limits was found; more margin, less clearance, other seeds or another home may help"


class ExcitationError(MbctrlError):
    """No trajectory, or none within the limits."""


class ExciteSettings(Spec):
    """What is asked for.

    ``duration`` [s] is the period, ``rate`` [Hz] of the samples (None: the robot's control rate), ``margin`` the share of each
    limit that may be used, ``clearance`` [m] the least distance of the arm from itself, its base and, with ``floor``, the
    plane z = 0. ``torque_noise`` [N·m] is the standard deviation of a torque sample, one or one a joint (None: 2 % of the
    effort limits). ``draws`` random motions are tried and the best of them improved, the next too while there are
    ``iterations`` left.
    """

    duration: Positive = 20.0
    harmonics: Annotated[int, Field(ge=2, le=20)] = 5
    repeats: Count = 1
    rate: Positive | None = None
    margin: Annotated[float, Field(gt=0, le=1)] = 0.8
    clearance: Annotated[float, Field(ge=0)] = 0.02
    floor: bool = True
    armature: bool = True
    torque_noise: tuple[Positive, ...] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    draws: Count = 8
    iterations: Count = 150


@dataclass(frozen=True)
class Usage:
    """What a motion, ramps included, uses: shares (n,) of the full limits by name, least clearance [m] and the pair that has it."""

    shares: dict[str, np.ndarray]
    clearance: float
    pair: str

    def within(self, settings: ExciteSettings) -> bool:
        """Return whether everything is within margin and clearance."""
        return self.clearance >= settings.clearance and all((s <= settings.margin + _ROUNDING).all() for s in self.shares.values())


@dataclass(frozen=True)
class Excitation:
    """A trajectory and what it promises; ``settings`` are complete: nothing in them is None.

    Args:
        robot, settings, base: what it was made for.
        series: one period.
        ramp: time from home to the start of the period, and back [s].
        usage: of the limits.
        quality, before: of one recording; of the best random motion within the limits.
        unavoidable: pairs of links too near each other wherever the joints go, not compared.
    """

    robot: Robot
    settings: ExciteSettings
    base: BaseParameters
    series: FourierSeries
    ramp: float
    usage: Usage
    quality: Quality
    before: Quality
    unavoidable: tuple[str, ...]

    def trajectory(self, rate: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return t (T,) [s], q, v, a (T, n) at ``rate`` [Hz] (None: the settings'), and the phase (T,).

        Phases: 0 from home to the start, 1 the periods, 2 back home.
        """
        rate = rate or self.settings.rate
        t = np.arange(int(np.floor((2 * self.ramp + self._length) * rate + _ROUNDING)) + 1) / rate
        return t, *there_and_back(self.series, self.ramp, self._length, np.asarray(self.robot.home), t)[:3], self._phase(t)

    @property
    def _length(self) -> float:
        return self.settings.duration * self.settings.repeats

    def _phase(self, t: np.ndarray) -> np.ndarray:
        return (t >= self.ramp).astype(int) + (t > self.ramp + self._length + _ROUNDING)

    def torque(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return the model's torques (T, n) [N·m] along q, v, a, friction and springs included."""
        return model_torque(self.base.reference, q, v, a)

    def relative(self) -> np.ndarray:
        """Return the expected standard deviations (b,) as shares of the nominal parameters; nan where these are 0.

        Below 1e-5 of the largest parameter of its unit a value is rounding in the model, and counts as 0.
        """
        nominal, units = np.abs(self.base.nominal()), np.array(self.base.units)[self.base.columns]
        largest = np.array([nominal[units == unit].max() for unit in units])
        return np.divide(self.quality.sd, nominal, out=np.full(len(nominal), np.nan), where=nominal > 1e-5 * largest)

    def poor(self) -> list[int]:
        """Return the indices of base parameters whose standard deviation is above 30 % of the nominal value, worst first."""
        relative = np.nan_to_num(self.relative())
        return [int(i) for i in np.argsort(-relative) if relative[i] > POOR]


def excite(
    model: Model, settings: ExciteSettings = ExciteSettings(), progress: Callable[[str, int, int], None] = lambda *_: None
) -> Excitation:
    """Find an excitation trajectory.

    Args:
        model: the arm; every joint must be actuated.
        settings: what is asked for.
        progress: called with what is being done, steps done and steps in all.

    Errors:
        SpecError: settings that do not suit the robot, or a home pose that is no place to start from.
        ExcitationError: where no motion within the limits is found.
    """
    robot, settings = model.robot, _complete(model.robot, settings)
    extras = ("armature", "viscous", "coulomb") if settings.armature else ("viscous", "coulomb")
    base = BaseParameters(model.tree, extras)
    bounds = _bounds(robot, settings)
    clearance = Clearance(model, settings.clearance, floor=settings.floor)
    top = dict(bounds.rates)
    # Without an acceleration limit: what the highest harmonic has at the velocity limit.
    quick = top.get(2, 2 * np.pi * settings.harmonics / settings.duration * top[1])
    information = Information(
        base, np.array(settings.torque_noise), (np.stack([bounds.lower, bounds.upper]), top[1], quick), 0.05 * top[1]
    )
    home = np.asarray(robot.home)
    check = _Check(robot, settings, information, clearance, home)
    check.home()
    problem = Problem(information, clearance, bounds, home, settings.duration, settings.harmonics)
    starts = _draw(problem, settings, progress)
    if not starts[0].any():
        raise ExcitationError(_NONE)
    found = _improve(problem, starts, settings, progress)
    best = max((check.shrunk(problem, x) for x in [*found, starts[0]]), key=lambda case: check.quality(case[0]).logdet)
    before = check.quality(check.shrunk(problem, starts[0])[0])
    return Excitation(robot, settings, base, *best, check.quality(best[0]), before, clearance.unavoidable)


def _complete(robot: Robot, settings: ExciteSettings) -> ExciteSettings:
    """Return the settings without a None, or refuse them."""
    if robot.nu < robot.nq:
        idle = sorted(set(robot.joints) - set(robot.driven))
        raise SpecError(f"excitation needs every joint actuated; {', '.join(idle)} is not", file=robot.path, key="actuated")
    rate, noise = settings.rate or robot.control.rate, settings.torque_noise
    if rate * settings.duration < 10 * settings.harmonics:
        least = 10 * settings.harmonics / settings.duration
        raise SpecError(f"expected at least {least:g} Hz, 10 samples a period of the highest harmonic, found {rate:g}", key="rate")
    noise = noise or tuple(_NOISE * effort for effort in _by_joint(robot, robot.limits.effort))
    if len(noise) not in (1, robot.nq):
        raise SpecError(f"expected 1 value or {robot.nq}, one a joint, found {len(noise)}", key="torque_noise")
    return settings.model_copy(update={"rate": rate, "torque_noise": noise * (robot.nq if len(noise) == 1 else 1)})


def _by_joint(robot: Robot, values: tuple[float, ...]) -> np.ndarray:
    """Return values of the actuated joints in the order of all joints, of which each is actuated."""
    return np.array([values[robot.driven.index(joint)] for joint in robot.joints])


def _bounds(robot: Robot, settings: ExciteSettings) -> Bounds:
    limits = robot.limits
    low, high = np.asarray(limits.position_lower), np.asarray(limits.position_upper)
    spare = (1 - settings.margin) * (high - low) / 2
    known = [(order, getattr(limits, kind)) for order, kind in enumerate(RATES, 1)]
    rates = tuple((order, settings.margin * np.asarray(values)) for order, values in known if values is not None)
    return Bounds(low + spare, high - spare, rates, settings.margin * _by_joint(robot, limits.effort), settings.clearance)


def _draw(problem: Problem, settings: ExciteSettings, progress: Callable[[str, int, int], None]) -> list[np.ndarray]:
    """Return random motions within the constraints, the most informative first."""
    rng = np.random.default_rng(settings.seed)
    drawn = []
    for i in range(settings.draws):
        progress("random motions within the limits", i, settings.draws)
        drawn.append(problem.draw(rng))
    return sorted(drawn, key=lambda x: -problem.value(x))


def _improve(
    problem: Problem, starts: list[np.ndarray], settings: ExciteSettings, progress: Callable[[str, int, int], None]
) -> list[np.ndarray]:
    """Return the motions the search ends with: from the best start, and from the next while iterations are left."""
    left, found = settings.iterations, []

    def tick(logdet: float) -> None:
        nonlocal done
        done += 1
        progress(f"improving motion {len(found) + 1}, log det {logdet:.1f}", done, settings.iterations)

    for x in starts:
        if found and left < settings.iterations // 4:
            break
        done = settings.iterations - left
        x, left = problem.improve(x, left, tick)
        found.append(x)
    return found


class _Check:
    """Every limit on a fine grid, ramps included, without the search's smoothing."""

    def __init__(
        self, robot: Robot, settings: ExciteSettings, information: Information, clearance: Clearance, home: np.ndarray
    ) -> None:
        self.robot, self.settings, self.information, self.clearance_of, self.at_home = robot, settings, information, clearance, home

    def home(self) -> None:
        """Refuse a home pose that is itself outside what may be used."""
        still = np.zeros((1, len(self.at_home)))
        usage = self._usage([self.at_home[None], still, still, still])
        for kind, share in usage.shares.items():
            worst = int(share.argmax())
            if share[worst] > self.settings.margin:
                text = f"home uses {share[worst]:.0%} of the {kind} limit of {self.robot.joints[worst]}, more than the margin"
                raise SpecError(f"{text} {self.settings.margin:g} allows", file=self.robot.path, key="home")
        if usage.clearance < self.settings.clearance:
            text = f"{usage.pair} are {usage.clearance * 1e3:.0f} mm apart at home, less than the clearance"
            raise SpecError(f"{text} {self.settings.clearance * 1e3:g} mm", file=self.robot.path, key="home")

    def shrunk(self, problem: Problem, x: np.ndarray) -> tuple[FourierSeries, float, Usage]:
        """Return the motion, made smaller as far as the fine grid demands, its ramp [s] and its usage."""
        for _ in range(150):
            series = problem.series(x)
            time, usage = self._with_ramp(series)
            if usage.within(self.settings):
                return series, time, usage
            x = 0.99 * x
        raise ExcitationError(_NONE)

    def _with_ramp(self, series: FourierSeries) -> tuple[float, Usage]:
        """Return the ramp's time, longer while its torque is too high, and the whole motion's usage."""
        start = series.derivative(np.zeros(1), 0)[0]
        bounds = _bounds(self.robot, self.settings)
        time = ramp_time(start - self.at_home, list(bounds.rates), _LEAST_RAMP)
        for _ in range(6):
            along = np.linspace(0, time, 200)
            tau = model_torque(self.information.base.reference, *ramp(self.at_home, start, time, along)[:3])
            if (np.abs(tau) <= bounds.effort).all():
                break
            time *= 1.3
        t = np.concatenate([along, time + np.linspace(0, series.duration, _FINE), time + series.duration + along])
        return time, self._usage(there_and_back(series, time, series.duration, self.at_home, t))

    def _usage(self, samples: list[np.ndarray]) -> Usage:
        q, v, a = samples[:3]
        limits = self.robot.limits
        low, high = np.asarray(limits.position_lower), np.asarray(limits.position_upper)
        shares = {"position": np.abs(2 * q - low - high).max(axis=0) / (high - low)}
        for order, kind in enumerate(RATES, 1):
            if (values := getattr(limits, kind)) is not None:
                shares[kind] = np.abs(samples[order]).max(axis=0) / np.asarray(values)
        shares["torque"] = np.abs(model_torque(self.information.base.reference, q, v, a)).max(axis=0) / _by_joint(
            self.robot, limits.effort
        )
        return Usage(shares, *self.clearance_of.lowest(q))

    def quality(self, series: FourierSeries) -> Quality:
        """Return the quality of the periods; the ramps are not counted."""
        t = np.arange(_FINE) * series.duration / _FINE
        samples = round(self.settings.rate * series.duration * self.settings.repeats)
        return self.information.quality(*(series.derivative(t, order) for order in range(3)), samples)

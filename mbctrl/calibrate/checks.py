"""Checks before fitting: what a log must not contain is an error, what it may contain a warning; both name the joint.

The order matters: a mistake that looks like an other one is looked for first.
"""

from __future__ import annotations

import numpy as np

from mbctrl.base.logs import LogError
from mbctrl.base.robot import Robot
from mbctrl.calibrate.evidence import EXCITED, Evidence
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.spikes import late_stamps, outliers
from mbctrl.calibrate.standing import check_alive, check_frozen, warn_of_saturation
from mbctrl.dynamics.tree import RigidTree

__all__ = ["check_recording", "outliers"]

SLOWEST, FASTEST = 5.0, 20e3
"""Robots are logged between these rates [Hz]."""
BEYOND = 0.1
"""A position further outside of the limits is impossible [rad]."""
CONTACT = 0.005
"""A joint this close to its limit may have touched it [rad]."""
RELATED = 0.8
"""Below this correlation of position increments with integrated velocity, the velocity is not the position's,"""
BETTER = 0.9
"""but that of a joint with more than this one."""
RATIO = (0.8, 1.25)
"""Position increments over integrated velocity outside of this are an error, outside of 5 % a warning."""
STRONG = 3.0
"""No drive gives more than this many times its effort limit."""
WEAK = 0.05
"""Efforts that all stay below this part of their limits are suspicious."""
WRONG = 10.0
"""An effort this many times as large or small as the model's is an error, of a model however rough."""
UNEXPLAINED = 0.5
"""Below this part of its variance explained by the model (R²), an effort is suspicious."""
DEGREES = 180 / np.pi


def check_recording(recording: Recording, robot: Robot, tree: RigidTree | None = None) -> list[str]:
    """Look for what must not be fitted.

    Args:
        recording: as ``read_recording`` returns it.
        robot: gives the limits.
        tree: the nominal model; with it signs, swapped columns and the size of efforts are checked against its torques.

    Returns:
        What was noticed and may pass, one line each.

    Errors:
        LogError: naming the joint, and the lines where it is a matter of some: a wrong unit, sign or column, a position
            that freezes, a column that is dead.
    """
    if recording.joints != robot.joints:
        raise LogError(f"expected the joints {list(robot.joints)}, found {list(recording.joints)}", file=recording.file or None)
    log = Evidence(recording, robot)
    _check_rate(log)
    _check_columns_of_velocity(log)
    check_alive(log)
    check_frozen(log)
    _check_size_of_velocity(log)
    _check_positions(log)
    _check_efforts(log)
    if tree is not None:
        _check_model(log, tree)
    warn_of_saturation(log)
    _warn_of_spikes(log)
    return log.warnings


def _check_rate(log: Evidence) -> None:
    rate = log.recording.rate
    if not SLOWEST <= rate <= FASTEST:
        units = {1e3: "ms given as s", 1e6: "us given as s", 1e9: "ns given as s", 1e-3: "s given as ms"}
        guess = next((f": stamps look like {text}" for factor, text in units.items() if 20 <= rate * factor <= 5e3), "")
        log.fail(f"expected {SLOWEST:g} to {FASTEST:g} samples a second, found {rate:.3g}{guess}")


def _check_columns_of_velocity(log: Evidence) -> None:
    """Refuse velocities that fit the position of an other joint."""
    alike = log.related[0] if log.related else np.eye(log.recording.n)
    for j in np.flatnonzero((log.motion > EXCITED) & (np.abs(np.diagonal(alike)) < RELATED)):
        best = int(np.argmax(np.abs(alike[j])))
        if abs(alike[j, best]) > BETTER:
            found = f"the velocity of {log.joints[best]} fits the position of {log.joints[j]} (correlation {alike[j, best]:.2f})"
            log.fail(f"{found}, its own does not ({alike[j, j]:.2f}): swapped columns of position or velocity", j, best)


def _check_size_of_velocity(log: Evidence) -> None:
    if log.related is None:
        return
    alike, ratios = np.diagonal(log.related[0]), log.related[1]
    for j in np.flatnonzero(log.motion > EXCITED):
        if abs(alike[j]) < RELATED:
            log.fail(f"the velocity is not the derivative of the position (correlation {alike[j]:.2f}): wrong column?", j)
        found = f"the position moves {ratios[j]:.3g} times what the velocity says"
        if not RATIO[0] < ratios[j] < RATIO[1]:
            log.fail(f"{found}: {_why_ratio(log, j, ratios[j])}", j)
        if abs(ratios[j] - 1) > 0.05:
            log.warn(found, j)


def _why_ratio(log: Evidence, j: int, ratio: float) -> str:
    limits, size = log.robot.limits, abs(ratio)
    if RATIO[0] < size < RATIO[1]:
        return "the sign of one of them is reversed"
    if RATIO[0] < size / DEGREES < RATIO[1]:
        sure = np.abs(log.q[:, j]).max() > max(-limits.position_lower[j], limits.position_upper[j]) + BEYOND
        guess = "positions look like degrees given as radians" + ("" if sure else ", or velocities like rad/s given as deg/s")
    elif RATIO[0] < size * DEGREES < RATIO[1]:
        sure = log.v is not None and np.quantile(np.abs(log.v[:, j]), 0.99) > 1.5 * limits.velocity[j]
        guess = "velocities look like deg/s given as rad/s" + ("" if sure else ", or positions like radians given as degrees")
    else:
        guess = "a wrong unit, gear ratio or column"
    return guess + (", and the sign of one of them is reversed" if ratio < 0 else "")


def _check_positions(log: Evidence) -> None:
    low, high = np.array(log.robot.limits.position_lower), np.array(log.robot.limits.position_upper)
    largest = np.abs(log.q).max(axis=0)
    beyond = np.maximum(low - log.q.min(axis=0), log.q.max(axis=0) - high)
    for j in np.flatnonzero(beyond > BEYOND):
        others = [k for k in range(len(low)) if k != j]
        fits = [k for k in others if _within(log.q[:, j], low[k], high[k]) and _within(log.q[:, k], low[j], high[j])]
        times = largest[j] / max(-low[j], high[j])
        found = f"expected positions within {low[j]:.4g} and {high[j]:.4g} rad, found up to {largest[j]:.4g} rad"
        if times > 3 or times > 1.5 and (beyond > BEYOND).sum() > 1:
            log.fail(f"{found}: looks like degrees given as radians", j)
        if fits:
            log.fail(f"{found}, which would fit {log.joints[fits[0]]}: swapped columns?", j)
        log.fail(f"{found}: a wrong zero, whole turns off, or limits too narrow in robot.yaml?", j)
    for j in np.flatnonzero((beyond > -CONTACT) & (log.motion > EXCITED)):
        log.warn(f"comes within {CONTACT:g} rad of its limit; in contact with its stop it is not free", j)
    if (log.motion < 0.01 * (high - low)).all() and log.motion.max() > 1e-4:
        j = int(np.argmax(log.motion))
        log.warn(
            f"no joint moves more than 1 % of its range, this one the most, {log.motion[j]:.2g} rad: radians given as degrees?", j
        )


def _within(x: np.ndarray, low: float, high: float) -> bool:
    return bool(low - BEYOND <= x.min() and x.max() <= high + BEYOND)


def _check_efforts(log: Evidence) -> None:
    share = np.array([np.quantile(np.abs(x), 0.999) / log.effort_limit(j) for j, x in enumerate(log.effort.T)])
    for j in np.flatnonzero(share > STRONG):
        limit = log.effort_limit(j)
        what = "milliamperes given as amperes, or N·mm as N·m" if share[j] > 30 else "a wrong unit, gain or column"
        log.fail(f"expected at most {limit:g} N·m, found {share[j] * limit:.4g} N·m: looks like {what}", j)
    for j in np.flatnonzero((share > 1.1) & (share <= STRONG)):
        log.warn(f"the effort reaches {share[j]:.2f} times its limit", j)
    if log.driven and share[log.driven].max() < WEAK and log.motion.max() > EXCITED:
        j = log.driven[int(np.argmax(share[log.driven]))]
        what = "a wrong unit, or gains?" if log.recording.gains is not None else "currents given as torques?"
        log.warn(f"no effort is more than {share[j]:.1%} of its limit, this joint's the most: {what}", j)


def _check_model(log: Evidence, tree: RigidTree) -> None:
    from mbctrl.calibrate.explain import DOMINANT, HEAVY, SCALE, Explainer, smoothed

    states = smoothed(log.t, log.q, log.effort, log.parts)
    judged = [j for j in log.driven if len(states.q) >= 20 and log.motion[j] > EXCITED and np.ptp(log.effort[:, j]) > 0]
    if not judged:
        return
    explainer = Explainer(tree, states, judged)
    now = explainer.now
    heavy = [j for j in judged if now.share[j] > HEAVY]
    if heavy and (now.scale[heavy] < SCALE[0]).all():
        found = f"efforts are {np.median(now.scale[heavy]):.2g} times the model's torques"
        log.fail(f"{found}: looks like currents given as torques, or wrong gains", *heavy)
    mistakes = explainer.mistakes()
    if mistakes:
        first = mistakes[0].joints
        texts = list(dict.fromkeys(mistake.text for mistake in mistakes if mistake.joints == first))
        explained = ", ".join(f"{now.explained[j]:.2f}" for j in first)
        log.fail(f"{', or '.join(texts)}; as it is the model explains {explained} of the effort (R²)", *first)
    for j in (j for j in judged if now.share[j] > DOMINANT):
        found = f"the effort is {now.scale[j]:.2g} times the model's torque: a wrong unit, gain or column?"
        if not 1 / WRONG < now.scale[j] < WRONG:
            log.fail(found, j)
        if not SCALE[0] < now.scale[j] < SCALE[1]:
            log.warn(found, j)
    for j in judged:
        if now.explained[j] < UNEXPLAINED:
            log.warn(f"the model explains only {now.explained[j]:.2f} of the effort (R²)", j)


def _warn_of_spikes(log: Evidence) -> None:
    late = late_stamps(log.t, log.recording.q, log.q_spikes)
    if late.any():
        first = int(np.argmax(late))
        log.warnings.append(f"line {log.line(first)}: stamps that fit no joint's position: {late.sum()}, the first one here")
    for name, found in (("position", log.q_spikes & ~late[:, None]), ("velocity", log.v_spikes), ("effort", log.effort_spikes)):
        if found is not None and found.any():
            each = ", ".join(f"{log.joints[j]} {found[:, j].sum()}" for j in np.flatnonzero(found.any(axis=0)))
            first = int(np.argmax(found.any(axis=1)))
            log.warnings.append(f"line {log.line(first)}: isolated spikes in the {name} ({each}), the first one here")

"""The tables of a calibration's report: numbers with as many digits as they deserve, as text, and what to say of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from mbctrl.calibrate.base_parameters import INERTIAL
from mbctrl.calibrate.friction import TERMS, Friction
from mbctrl.calibrate.identify import Estimates, Fit
from mbctrl.calibrate.validate import OpenLoop, Torques, Validation
from mbctrl.dynamics.tree import RigidTree

WEAK = 0.3  # a standard error this large beside its value
CORRELATED = 0.95
KNOWN = 0.5  # a parameter the data tell less of is the prior's
FAR = 5.0  # extrapolation from which a recording's errors say little
_FAMILIES, _PAIRS = 10, 12  # rows shown
_WHITE, _LAGS = 0.2, 2.0  # autocorrelation that counts as none; [s] over which it is looked at
_MEMORY = ((0.15, "noise alone"), (0.5, "some structure left"), (np.inf, "slow structure left"))  # [s]


def number(x: float, digits: int = 3) -> str:
    """Return a number with so many significant digits, without an exponent where that stays short."""
    x = float(x)
    if x == 0 or not np.isfinite(x):
        return "0" if x == 0 else "-"
    size = int(f"{x:.{digits - 1}e}".partition("e")[2])
    return f"{x:.{max(0, digits - 1 - size)}f}" if -4 <= size < 6 else f"{x:.{digits - 1}e}"


def decimals(se: float) -> int | None:
    """Return how many decimals show two digits of a standard error; None where there is none."""
    if not np.isfinite(se) or se <= 0:
        return None
    return min(max(0, 1 - int(f"{se:.1e}".partition("e")[2])), 9)


def fixed(x: float, places: int | None) -> str:
    """Return a number with so many decimals, or with four digits for None."""
    text = number(x, 4) if places is None else f"{x:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def percent(share: float) -> str:
    """Return a share as a percentage of three digits at most."""
    value = 100 * float(share)
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def span(texts: Sequence[str]) -> str:
    """Return the lowest and the highest of some numbers, or the one there is."""
    low, high = min(texts, key=float), max(texts, key=float)
    return low if low == high else f"{low}–{high}"


def joint_units(tree: RigidTree) -> list[str]:
    """Return the unit of each joint's torque or force."""
    return ["N·m" if turns else "N" for turns in tree.revolute]


def heads(tree: RigidTree) -> dict[str, str]:
    """Return the units of columns over all joints: hinges', slides', or both."""
    hinge = {"torque": "N·m", "viscous": "N·m·s/rad", "rotor": "kg·m²", "error": "mrad"}
    slide = {"torque": "N", "viscous": "N·s/m", "rotor": "kg", "error": "mm"}
    return {name: " or ".join(dict.fromkeys((hinge if turns else slide)[name] for turns in tree.revolute)) for name in hinge}


def autocorrelation(seen: Torques) -> tuple[np.ndarray, np.ndarray]:
    """Return lags (K,) [s] up to two seconds or a quarter of the recording, and the filtered residuals' autocorrelation (K, n)."""
    left = (seen.filtered - seen.predicted)[seen.moving]
    left = left - left.mean(0)
    period = float(np.median(np.diff(seen.t)))
    count = max(1, min(len(left) // 4, int(_LAGS / period))) + 1
    power = np.abs(np.fft.rfft(left, 2 * len(left), axis=0)) ** 2
    found = np.fft.irfft(power, 2 * len(left), axis=0)[:count]
    return np.arange(count) * period, found / np.maximum(found[:1], 1e-30)


def memory(seen: Torques) -> list[str]:
    """Return in words for how long each joint's residuals remember: up to the last lag with a correlation.

    The first crossing would miss slow structure under noise, whose correlation dips first and comes back.
    """
    lags, found = autocorrelation(seen)
    seconds = [float(lags[np.flatnonzero(own > _WHITE)[-1:]].sum() + lags[1]) for own in found.T]
    more = ["" if s < lags[-1] else " or more" for s in seconds]
    return [next(f"{words} ({number(s, 2)} s{m})" for limit, words in _MEMORY if s < limit) for s, m in zip(seconds, more)]


def validation_rows(seen: Validation, joints: Sequence[str]) -> list[dict[str, Any]]:
    """Return the torque table of one recording, the mean over joints last."""
    rows, words = [], memory(seen.fit)
    for j, joint in enumerate(joints):
        shares = [float(one[j]) for one in (seen.prior.relative, seen.unconstrained.relative, seen.fit.relative, seen.fit.floor)]
        rows.append(
            {
                "joint": joint,
                "rms": number(seen.fit.rms[j]),
                "shares": [percent(share) for share in shares],
                "worse": shares[2] > shares[0],
                "memory": words[j],
            }
        )
    if len(joints) > 1:
        means = [seen.prior.relative.mean(), seen.unconstrained.relative.mean(), seen.fit.relative.mean(), seen.fit.floor.mean()]
        shares = [percent(share) for share in means]
        rows.append({"joint": "mean", "rms": "", "shares": shares, "worse": bool(means[2] > means[0]), "memory": ""})
    return rows


def open_loop_rows(before: OpenLoop | None, after: OpenLoop, joints: Sequence[str]) -> list[dict[str, Any]]:
    """Return open-loop errors in thousandths, (before, after) a horizon; all joints together last."""
    rows = []
    for k, joint in enumerate((*joints, "all") if len(joints) > 1 else joints):
        cells = []
        for h in range(len(after.horizons)):
            new, old = (
                None if one is None else float(one.error[h, k] if k < len(joints) else one.total[h]) for one in (after, before)
            )
            worse = old is not None and new > old or k == len(joints) and new > after.still[h]
            cells.append({"old": "" if old is None else number(1e3 * old), "new": number(1e3 * new), "worse": bool(worse)})
        rows.append({"joint": joint, "cells": cells})
    return rows


def family_rows(fit: Fit) -> list[dict[str, Any]]:
    """Return the best families and, where it is not among them, the plainest one."""
    shown = list(enumerate(fit.scores, 1))
    plain = [entry for entry in shown[_FAMILIES:] if entry[1].friction == Friction()]
    return [
        {
            "rank": rank,
            "name": score.friction.name,
            "error": f"{100 * score.error:.2f}",
            "spread": f"{100 * score.spread:.2f}",
            "chosen": score.friction == fit.friction,
        }
        for rank, score in (*shown[:_FAMILIES], *plain)
    ]


def confidence(estimates: Estimates) -> str:
    """Return the intervals' confidence, such as ``95 %``."""
    good = estimates.se > 0
    if not good.any():
        return ""
    wide = float(np.median((estimates.high - estimates.value)[good] / estimates.se[good]))
    return f"{100 * (2 * norm.cdf(wide) - 1):.3g} %"


def estimate_rows(estimates: Estimates) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of links' and rotors' parameters, and of friction's."""
    links, friction = [], []
    for k, name in enumerate(estimates.names):
        term = name.rpartition(".")[2]
        (friction if term in TERMS else links).append(_estimate(estimates, k, term))
    return links, friction


def _estimate(all_of_them: Estimates, k: int, term: str) -> dict[str, Any]:
    names = ("value", "se", "low", "high", "prior")
    value, se, low, high, prior = (float(getattr(all_of_them, name)[k]) for name in names)
    places, flags = decimals(se), []
    if places is not None and se > WEAK * abs(value):
        flags.append(("weak", f"standard error above {WEAK:.0%} of the value"))
    if places is not None and low <= prior <= high:
        # The model file has no such term: its prior is that there is none.
        lacks = term in TERMS and term not in ("coulomb", "viscous")
        flags.append(
            ("≈ 0", "the interval contains zero") if lacks else ("≈ model", "the interval contains the model file's value")
        )
    meaning = all_of_them.meanings[k]
    return {
        "name": all_of_them.names[k],
        "meaning": "" if meaning == all_of_them.names[k] else meaning,
        "unit": all_of_them.units[k],
        "prior": number(prior, 4) if places is None or prior == 0 else fixed(prior, places),
        "value": fixed(value, places),
        "se": "" if places is None else fixed(se, places),
        "interval": "" if places is None else f"[{fixed(low, places)}, {fixed(high, places)}]",
        "bar": _bar(value, low, high, prior),
        "flags": flags,
    }


def _bar(value: float, low: float, high: float, prior: float) -> dict[str, str]:
    """Return where value, interval and prior lie on a row's own scale [%]."""
    left, right = min(low, prior), max(high, prior)
    span = (right - left) * 1.1 or 1.0
    start = (left + right) / 2 - span / 2
    places = {"low": low - start, "width": high - low, "value": value - start, "prior": prior - start}
    return {name: f"{100 * x / span:.1f}" for name, x in places.items()}


def link_rows(fit: Fit) -> list[dict[str, Any]]:
    """Return each joint's link, rotor and planner's friction before and after."""
    rows = []
    for j, joint in enumerate(fit.tree.joints):
        known, old, new = fit.known[10 * j : 10 * j + 10], fit.prior, fit.tree
        pairs = [(old.mass[j], new.mass[j], bool(known[0] < KNOWN))]
        pairs += [(old.armature[j], new.armature[j], 10 * fit.tree.n + j not in fit.base)]
        pairs += [(old.friction[j], new.friction[j], False), (old.damping[j], new.damping[j], False)]
        texts = [{"old": number(a), "new": number(b), "dim": dim} for a, b, dim in pairs]
        com = {
            "old": ", ".join(fixed(1e3 * x, 0) for x in old.com[j]),
            "new": ", ".join(fixed(1e3 * x, 0) for x in new.com[j]),
            "dim": bool(known[1:4].mean() < KNOWN),
        }
        offset = number(fit.offset[j], 2)
        rows.append({"joint": joint, "known": int((known >= KNOWN).sum()), "cells": [texts[0], com, *texts[1:]], "offset": offset})
    return rows


def known_rows(fit: Fit) -> list[dict[str, Any]]:
    """Return the heat map: per joint the share [%] the data say of each link parameter and of the rotor."""
    n, rows = fit.tree.n, []
    for j, joint in enumerate(fit.tree.joints):
        share = [*fit.known[10 * j : 10 * j + 10], fit.known[10 * n + j]]
        cells = [{"text": f"{100 * x:.0f}", "strength": f"{float(x):.2f}", "bold": bool(x >= KNOWN)} for x in share]
        if 10 * n + j not in fit.base:
            cells[-1]["text"] = "–"
        rows.append({"joint": joint, "cells": cells})
    return rows


def unknown(fit: Fit) -> list[dict[str, str]]:
    """Return per joint the link parameters that stay at the prior."""
    rows = []
    for j, joint in enumerate(fit.tree.joints):
        names = [kind for k, kind in enumerate(INERTIAL) if fit.known[10 * j + k] < KNOWN]
        if names:
            rows.append({"joint": joint, "names": "all ten" if len(names) == len(INERTIAL) else ", ".join(names)})
    return rows


def correlated(estimates: Estimates) -> tuple[list[dict[str, str]], int]:
    """Return the most correlated pairs, and how many there are above the threshold."""
    upper = np.triu(np.nan_to_num(estimates.correlation), 1)
    pairs = np.argwhere(np.abs(upper) > CORRELATED)
    pairs = sorted(pairs.tolist(), key=lambda pair: -abs(upper[tuple(pair)]))
    names = estimates.names
    return [{"a": names[a], "b": names[b], "r": f"{upper[a, b]:.3f}"} for a, b in pairs[:_PAIRS]], len(pairs)


def flat(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Return nested provenance as (dotted key, text)."""
    if isinstance(value, Mapping):
        return [row for name, inner in value.items() for row in flat(inner, f"{key}.{name}" if key else str(name))]
    if isinstance(value, (list, tuple)):
        if any(isinstance(inner, Mapping) for inner in value):
            return [(f"{key}.{k}", "; ".join(f"{a} {b}" for a, b in flat(inner))) for k, inner in enumerate(value, 1)]
        return [(key, ", ".join(_plain(inner) for inner in value))]
    return [(key, _plain(value))]


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_plain(inner) for inner in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)

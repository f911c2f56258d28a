"""Families of joint friction, all linear in their coefficients once a direction is known.

Torque of a joint at speed v, transmitting the rigid-body torque ``load``, with direction z between -1 and 1:

    offset + viscous v + z (coulomb + root sqrt|v| + stribeck exp(-|v| / v_s) + load |tau|) + asymmetric |z|

The direction is the sign of v, a tanh of it, or one with memory: pre-sliding displacement has to turn a bristle's bend
around before friction opposes the new direction (Dahl, "A solid friction model", 1968), dz/dx = (1 - z sgn(dx)) / length.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import numpy as np

TERMS = ("coulomb", "viscous", "offset", "root", "stribeck", "load", "asymmetric")
UNITS = {
    "coulomb": "N·m",
    "viscous": "N·m·s/rad",
    "offset": "N·m",
    "root": "N·m·(s/rad)^0.5",
    "stribeck": "N·m",
    "load": "1",
    "asymmetric": "N·m",
}
_BASIC = ("coulomb", "viscous", "offset")
_SMOOTH = 0.01  # [rad/s], of tanh


@dataclass(frozen=True)
class Friction:
    """A family: which terms, and what gives the direction.

    Args:
        terms: names out of TERMS.
        memory: ``sign``, ``tanh`` or ``dahl``.
        length: [rad] over which a Dahl direction turns.
        speed: [rad/s] over which the Stribeck term fades.
    """

    terms: tuple[str, ...] = _BASIC
    memory: str = "sign"
    length: float = 2e-4
    speed: float = 0.05

    @property
    def name(self) -> str:
        """One line: direction and terms."""
        memory = f"dahl {self.length:g} rad" if self.memory == "dahl" else self.memory
        terms = [f"stribeck {self.speed:g} rad/s" if term == "stribeck" else term for term in self.terms]
        return f"{memory}: {', '.join(terms)}"

    def direction(self, t: np.ndarray, v: np.ndarray, parts: tuple[tuple[int, int], ...] | None = None) -> np.ndarray:
        """Return z (T, n) along speeds ``v`` (T, n) [rad/s] at ``t`` (T,) [s]; memory starts anew in each part."""
        if self.memory == "tanh":
            return np.tanh(v / _SMOOTH)
        if self.memory == "sign":
            return np.sign(v)
        out = np.zeros_like(v)
        for first, past in parts or ((0, len(t)),):
            out[first:past] = _dahl(v[first:past] * np.gradient(t[first:past])[:, None], self.length)
        return out

    def columns(self, v: np.ndarray, z: np.ndarray, load: np.ndarray | None = None) -> np.ndarray:
        """Return (T, n, F): the factor of each term's coefficient; ``load`` (T, n) [N·m] where a term asks for it."""
        return np.stack([self._column(term, v, z, load) for term in self.terms], -1)

    def _column(self, term: str, v: np.ndarray, z: np.ndarray, load: np.ndarray | None) -> np.ndarray:
        if term == "load":
            if load is None:
                raise ValueError("load-dependent friction needs the load")
            return z * np.abs(load)
        return {
            "coulomb": lambda: z,
            "viscous": lambda: v,
            "offset": lambda: np.ones_like(v),
            "root": lambda: z * np.sqrt(np.abs(v)),
            "stribeck": lambda: z * np.exp(-np.abs(v) / self.speed),
            "asymmetric": lambda: np.abs(z),
        }[term]()

    def opposing(self, v: np.ndarray, load: float) -> np.ndarray:
        """Return (S, F): rows whose product with the coefficients is the friction against motion at speeds ``v`` (S,) >= 0.

        A physical model never pushes: the product is not negative at any speed.
        """
        rows = self.columns(v[:, None], np.ones((len(v), 1)), np.full((len(v), 1), load))[:, 0]
        rows[:, [self.terms.index(term) for term in ("offset", "asymmetric") if term in self.terms]] = 0.0
        return rows


def _dahl(dx: np.ndarray, length: float) -> np.ndarray:
    """Return the direction along steps ``dx`` (T, n) [rad], exact for motion that keeps its sign within a step."""
    sign, decay = np.sign(dx), np.exp(-np.abs(dx) / length)
    # What came before the log is not known: as if the joint had been sliding the way it first moves.
    first = np.argmax(sign != 0, axis=0)
    state = sign[first, np.arange(dx.shape[1])]
    out = np.empty_like(dx)
    for k in range(len(dx)):
        state = sign[k] + (state - sign[k]) * decay[k]
        out[k] = state
    return out


def families() -> list[Friction]:
    """Return the families a choice is made among, simplest first."""
    directions = [("sign", 0.0), ("tanh", 0.0), *(("dahl", length) for length in (1e-4, 2e-4, 5e-4))]
    curves: list[tuple[tuple[str, ...], float]] = [((), 0.05), (("root",), 0.05)]
    curves += [((*more, "stribeck"), speed) for more in ((), ("root",)) for speed in (0.02, 0.05, 0.1)]
    found = []
    for (memory, length), (curve, speed), load in product(directions, curves, ((), ("load",))):
        found.append(Friction((*_BASIC, *curve, *load), memory, length or 2e-4, speed))
    return sorted(found, key=lambda family: len(family.terms))

"""What a simulation-based fit may look for, by name, and an arm as a function of it.

Names are ``JOINT.KIND`` for the kinds of KINDS, ``payload.mass`` and ``payload.x``, ``.y``, ``.z`` for a point mass in the tool's
frame, and ``delay`` for the time between an input and its effect. Every link the arm can be given is one that could exist:
``alpha`` to ``t3`` are its log-Cholesky parameters (``mbctrl.calibrate.inertia``), ``scale`` multiplies mass and inertia,
``com_x`` to ``com_z`` move the centre of mass without touching the inertia about it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np

from mbctrl.base.errors import suggest
from mbctrl.calibrate.inertia import from_cholesky, proper, pseudo_inertia, to_cholesky
from mbctrl.calibrate.signals import CalibrationError
from mbctrl.dynamics.actuation import Impedance
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import RigidTree


class Kind(NamedTuple):
    """Unit, whether it is above zero and searched by its logarithm, bounds, and how large a change counts as one.

    A change is a factor e where ``positive``, else ``size``. Rotors and friction may be nil, where a logarithm has no end:
    they are searched as they are, within bounds.
    """

    unit: str
    positive: bool
    low: float
    high: float
    size: float = 1.0


CHOLESKY = ("alpha", "d1", "d2", "d3", "s12", "s23", "s13", "t1", "t2", "t3")
_COM = ("com_x", "com_y", "com_z")
KINDS: dict[str, Kind] = {
    "armature": Kind("kg·m²", False, 0.0, 1e3),
    "viscous": Kind("N·m·s/rad", False, 0.0, 1e4),
    "coulomb": Kind("N·m", False, 0.0, 1e4),
    "offset": Kind("N·m", False, -1e3, 1e3),
    "stiffness": Kind("N·m/rad", True, 1e-3, 1e6),
    "servo_damping": Kind("N·m·s/rad", True, 1e-6, 1e5),
    "scale": Kind("1", True, 0.02, 50.0),
    **{name: Kind("m", False, -1.0, 1.0, 0.1) for name in _COM},
    **{name: Kind("1", False, -20.0, 20.0) for name in CHOLESKY},
}
_OTHERS: dict[str, Kind] = {
    "payload.mass": Kind("kg", True, 1e-4, 200.0),
    **{f"payload.{axis}": Kind("m", False, -1.0, 1.0, 0.1) for axis in "xyz"},
    "delay": Kind("s", False, -0.02, 0.1, 0.01),
}
_GAINS = ("stiffness", "servo_damping")
_FIELDS = {"armature": "armature", "viscous": "damping", "coulomb": "friction"}  # of the tree
_LINKS = ("mass", "com", "inertia")


@dataclass(frozen=True)
class Unknown:
    """One number of the arm.

    Args:
        name: see the module.
        kind: its unit and how it is searched.
        start: where the search begins; the value itself where not ``free``.
        low, high: bounds.
        prior: (mean, sd) of what is known without the data, or None.
        free: fitted.
    """

    name: str
    kind: Kind
    start: float
    low: float
    high: float
    prior: tuple[float, float] | None = None
    free: bool = True


def unknowns(dynamics: RigidBodyDynamics, wanted: Mapping[str, Mapping[str, Any]] | Sequence[str]) -> list[Unknown]:
    """Return the unknowns of an arm that names or patterns ask for (``*.coulomb``), in the order asked for.

    Args:
        dynamics: the arm as the model has it: where the search starts, unless that is zero.
        wanted: pattern to settings: ``start``, ``bounds`` (low, high), ``prior`` (mean, sd) and ``free``. Of two patterns that
            name the same unknown, the later one's settings win.

    Errors:
        CalibrationError: for a name or setting that does not exist, a start outside its bounds, or gains of an arm without.
    """
    known = _known(dynamics)
    settings: dict[str, dict[str, Any]] = {}
    for pattern, given in (wanted if isinstance(wanted, Mapping) else dict.fromkeys(wanted, {})).items():
        named = [name for name in known if fnmatchcase(name, pattern)]
        if not named:
            if pattern.rpartition(".")[2] in _GAINS and not isinstance(dynamics.actuation, Impedance):
                raise CalibrationError("only an arm under joint impedance has gains; this one takes torques", key=pattern)
            raise CalibrationError(f"unknown parameter '{pattern}'{suggest(pattern, known)}", key="parameters")
        for name in named:
            settings.setdefault(name, {}).update(given)
    return [_unknown(name, known[name], own) for name, own in settings.items()]


def _known(dynamics: RigidBodyDynamics) -> dict[str, tuple[Kind, float]]:
    """Return every unknown's kind and start."""
    tree = dynamics.tree
    # The inertia a joint feels gives the order of magnitude of its torques: per second, per second squared.
    feels = 0.3 * np.diag(ReferenceDynamics(tree).mass_matrix(tree.reference))
    found = {}
    for kind, values in _starts(dynamics, feels).items():
        for i, value in values.items():
            own = KINDS[kind]._replace(size=max(feels[i], abs(value))) if kind in (*_FIELDS, "offset") else KINDS[kind]
            found[f"{tree.joints[i]}.{kind}"] = (own, value)
    others = {"payload.mass": 0.1 * float(tree.mass[-1] or 1.0)}
    return found | {name: (kind, others.get(name, 0.0)) for name, kind in _OTHERS.items()}


def _starts(dynamics: RigidBodyDynamics, feels: np.ndarray) -> dict[str, dict[int, float]]:
    tree, every = dynamics.tree, range(dynamics.tree.n)
    theta = np.stack([to_cholesky(link) for link in proper(link_parameters(tree))])
    starts: dict[str, dict[int, float]] = {
        kind: {i: float(getattr(tree, field)[i] or feels[i]) for i in every} for kind, field in _FIELDS.items()
    }
    starts["offset"] = dict.fromkeys(dynamics.commanded, 0.0)
    if isinstance(dynamics.actuation, Impedance):
        starts["stiffness"] = dict(zip(dynamics.commanded, map(float, dynamics.actuation.stiffness)))
        starts["servo_damping"] = dict(zip(dynamics.commanded, map(float, dynamics.actuation.damping)))
    starts["scale"] = {i: 1.0 for i in every}
    starts |= {name: {i: float(tree.com[i, k]) for i in every} for k, name in enumerate(_COM)}
    return starts | {name: {i: float(theta[i, k]) for i in every} for k, name in enumerate(CHOLESKY)}


def _unknown(name: str, known: tuple[Kind, float], settings: Mapping[str, Any]) -> Unknown:
    kind, start = known
    if odd := sorted(set(settings) - {"start", "bounds", "prior", "free"}):
        raise CalibrationError(f"unknown setting '{odd[0]}'; known: bounds, free, prior, start", key=name)
    low, high = (float(x) for x in settings.get("bounds", (kind.low, kind.high)))
    prior = settings.get("prior")
    start = float(settings.get("start", start if prior is None else prior[0]))
    if "start" not in settings:
        start = min(max(start, low), high)
    if not (low <= start <= high and np.isfinite([low, start, high]).all()) or (kind.positive and low <= 0):
        positive = " and above 0" if kind.positive else ""
        raise CalibrationError(f"expected a start within the bounds{positive}, found {start:g} and {low:g} to {high:g}", key=name)
    if prior is not None and not (np.isfinite(prior).all() and prior[1] > 0):
        raise CalibrationError(f"prior: expected a mean and a standard deviation above 0, found {prior}", key=name)
    return Unknown(name, kind, start, low, high, prior and (float(prior[0]), float(prior[1])), bool(settings.get("free", True)))


class Arm:
    """An arm as a function of its unknowns.

    Args:
        dynamics: everything that is not unknown.
        given: the unknowns; values come in their order.
        tool: the frame of a payload.

    Errors:
        CalibrationError: where a link's log-Cholesky parameters and others of the same link are asked for.
    """

    def __init__(self, dynamics: RigidBodyDynamics, given: Sequence[Unknown], tool: str = "") -> None:
        self.dynamics, self.unknowns, self.base = dynamics, list(given), dynamics.tree
        self.names = [one.name for one in given]
        self._places = [name.rpartition(".")[::2] for name in self.names]
        self._frame = None
        if any(joint == "payload" for joint, _ in self._places):
            if tool not in self.base.frames:
                raise CalibrationError(f"the payload needs a frame; the model has no '{tool}'", key="tool")
            self._frame = self.base.frames[tool]
        self._joint = {name: i for i, name in enumerate(self.base.joints)}
        self._theta = {}
        for joint, kind in self._places:
            if kind in CHOLESKY and joint not in self._theta:
                link = proper(link_parameters(self.base))[self._joint[joint]]
                self._theta[joint] = to_cholesky(link)
            if kind in ("scale", *_COM) and any(other == joint and k in CHOLESKY for other, k in self._places):
                raise CalibrationError(f"{joint}.alpha to t3 already say this", key=f"{joint}.{kind}")

    @property
    def fields(self) -> tuple[str, ...]:
        """What differs from the model, in the words of ``mbctrl.kernels.trace``."""
        kinds = {kind for joint, kind in self._places if joint not in ("", "payload")}
        moved = self._frame is not None or kinds & {"scale", *_COM, *CHOLESKY}
        out = list(_LINKS) if moved else []
        out += [field for kind, field in _FIELDS.items() if kind in kinds]
        return (*out, *(f"servo_{kind.removeprefix('servo_')}" for kind in _GAINS if kind in kinds))

    def numbers(self, values: np.ndarray) -> np.ndarray:
        """Return (K,): the values of ``fields`` for unknowns ``values`` (P,)."""
        tree, gains = self.tree(values), self.gains(values)
        parts = {"servo_stiffness": gains[0], "servo_damping": gains[1]}
        return np.concatenate([np.zeros(0), *(np.ravel(parts[f] if f in parts else getattr(tree, f)) for f in self.fields)])

    def tree(self, values: np.ndarray) -> RigidTree:
        """Return the arm with unknowns ``values`` (P,)."""
        arrays = {field: getattr(self.base, field).copy() for field in (*_LINKS, *_FIELDS.values())}
        theta = {joint: own.copy() for joint, own in self._theta.items()}
        load = np.zeros(4)  # mass, x, y, z
        for (joint, kind), value in zip(self._places, values):
            i = self._joint.get(joint, -1)
            if joint == "payload":
                load[("mass", "x", "y", "z").index(kind)] = value
            elif kind in CHOLESKY:
                theta[joint][CHOLESKY.index(kind)] = value
            elif kind == "scale":
                arrays["mass"][i] *= value
                arrays["inertia"][i] *= value
            elif kind in _COM:
                arrays["com"][i, _COM.index(kind)] = value
            elif kind in _FIELDS:
                arrays[_FIELDS[kind]][i] = value
        for joint, own in theta.items():
            i = self._joint[joint]
            arrays["mass"][i], arrays["com"][i], arrays["inertia"][i] = _body(from_cholesky(own))
        if self._frame is not None and self._frame.link >= 0:
            _carry(arrays, self._frame.link, load[0], self._frame.position + self._frame.rotation @ load[1:])
        return replace(self.base, **arrays)

    def gains(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return stiffness and damping (nu,) of the joint impedance; zeros for an arm that takes torques."""
        servo = self.dynamics.actuation
        if not isinstance(servo, Impedance):
            return np.zeros(self.dynamics.nu), np.zeros(self.dynamics.nu)
        found = {"stiffness": np.array(servo.stiffness, float), "servo_damping": np.array(servo.damping, float)}
        for (joint, kind), value in zip(self._places, values):
            if kind in found:
                found[kind][self.dynamics.commanded.index(self._joint[joint])] = value
        return found["stiffness"], found["servo_damping"]

    def offset(self, values: np.ndarray) -> np.ndarray:
        """Return (nu,) what is added to the commands [N·m], or [rad] where they are references."""
        out = np.zeros(self.dynamics.nu)
        for (joint, kind), value in zip(self._places, values):
            if kind == "offset":
                out[self.dynamics.commanded.index(self._joint[joint])] = value
        return out / self.gains(values)[0] if isinstance(self.dynamics.actuation, Impedance) else out

    def delay(self, values: np.ndarray) -> float:
        """Return the time from an input to its effect [s]."""
        return float(values[self.names.index("delay")]) if "delay" in self.names else 0.0


def _body(link: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Return mass, com (3,) and inertia about it (3, 3) of a link's ten parameters."""
    pseudo, mass = pseudo_inertia(link), float(link[0])
    com = link[1:4] / mass
    second = pseudo[:3, :3] - mass * np.outer(com, com)
    return mass, com, np.trace(second) * np.eye(3) - second


def _carry(arrays: dict[str, np.ndarray], i: int, mass: float, at: np.ndarray) -> None:
    """Add a point mass at ``at`` (3,) of link ``i``'s frame."""
    own, total = arrays["mass"][i], arrays["mass"][i] + mass
    apart = at - arrays["com"][i]
    arrays["inertia"][i] += own * mass / total * (apart @ apart * np.eye(3) - np.outer(apart, apart))
    arrays["com"][i] += mass / total * apart
    arrays["mass"][i] = total

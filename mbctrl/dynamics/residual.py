"""A learned model as data: an ensemble of small networks, on top of the physics or in its place; numpy only.

With state x = [q, v], command u and the analytic step f, ``v' = v'_f + g S mean_e r_e(e(x, u))`` and ``q' = q'_f + h g S …``: what
is learned is the velocity the physics missed, which integrates into position as the step's own does (leapfrog: over h / 2), so
that it never tears q from v. e encodes every angle as sine and cosine. g is 1 at contact and exactly 0 farther away than
``far``, where the physics is all there is.

Where it ``acts_on`` a contact, r is the impulse on the tip there along the surface's axes, and S also what joint speeds that gives:
M⁻¹ Jᵀ, with the step's own matrix M. Such a law holds wherever the surface is touched, and does what a force can do only.

With ``base`` identity there is no physics: ``v' = v + S mean_e r_e(e(x, u))``, ``q' = q + h (v + v') / 2``, and g is 1 everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mbctrl.base.config import ContactSpec
from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.npz import read_arrays, write_arrays
from mbctrl.base.robot import Robot
from mbctrl.base.scene import Obstacle
from mbctrl.base.spec import Spec, validate
from mbctrl.dynamics.contact import SEEN_OF_CONTACT
from mbctrl.dynamics.tree import Frame, RigidTree

ACTIVATIONS = ("tanh", "silu", "relu")
BASES = ("analytic", "identity")
TARGETS = ("joints", "contact")
FORMAT = 3
"""Version of the file's layout."""
PLACE = ("tip", "radius", "surface", "half")
"""Of a contact: where it is, whatever it is made of."""
PHYSICS = ("mass", "com", "inertia", "armature", "damping", "friction")
"""What calibrations change of an arm, by its names in ``RigidTree``."""
_VECTORS = ("input_mean", "input_scale", "output_scale")
_SCALARS = ("near", "far", "dt")


class Surface(Obstacle):
    """A shape that may be touched: in the world, or in ``frame``, a site or body of the robot's model, which it moves with."""

    frame: str | None = None


class Surfaces(Spec):
    """Where contact is expected."""

    surfaces: tuple[Surface, ...] = Field(min_length=1)


def frame_of(surface: Surface, tree: RigidTree, file: str | Path | None = None) -> Frame | None:
    """Return the frame a surface is in, None for the world.

    Errors:
        SpecError: where the model has none of that name.
    """
    if surface.frame is None:
        return None
    if surface.frame not in tree.frames:
        raise SpecError(
            f"the model has no site or body '{surface.frame}'{suggest(surface.frame, tree.frames)}",
            file=file,
            key=f"surfaces.{surface.name}.frame",
        )
    return tree.frames[surface.frame]


@dataclass(frozen=True)
class Spread:
    """How sure an ensemble is: bounds (means,) of the logarithm of the variance that its second half of outputs gives, in units of
    ``output_scale``². Of joint speeds: ``scale`` (nv,), by which the standard deviation that networks promise is multiplied so
    that intervals cover, and ``rest`` (2, nv) [rad/s], that of what they cannot explain, without contact and in it."""

    lowest: np.ndarray
    highest: np.ndarray
    scale: np.ndarray
    rest: np.ndarray

    def bounded(self, raw: Any, softplus: Any) -> Any:
        """Return the log-variance (…, means, N) or (…, means), softly within its bounds, of what the networks say."""
        upper = self.highest - softplus(self.highest - raw)
        return self.lowest + softplus(upper - self.lowest)


@dataclass(frozen=True)
class Residual:
    """An ensemble and its gate.

    Args:
        layers: (W (E, out, in), b (E, out)) of each layer, an activation after each but the last; inputs are
            [sin, cos of each revolute joint; q of each prismatic; v; u], of u minus the commanded joints' q where it is a
            reference, or SEEN_OF_CONTACT; outputs are means, (nv,) or (3,), and with ``spread`` as many again, what
            log-variances are made of.
        activation: tanh, silu or relu.
        input_mean, input_scale: (inputs,) subtracted from, then divided out of, the inputs.
        output_scale: (means,) of S [rad/s] or [N·s].
        near, far: g is 1 up to ``near`` [m] and 0 from ``far`` [m] on, smooth between; of the gap of what is acted on.
        dt: the time step [s] it was fitted for; another one scales with it.
        robot, joints: whose it is, its joints in order.
        surfaces: what the gate measures the distance of the tool's capsules to; none for ``base`` identity, and where it acts
            on a contact.
        base: ``analytic`` or ``identity``.
        spread: None for networks that give means only.
        acts_on: ``joints``, or ``contact``: its tip and surface.
        encode_angles: False gives the networks q itself in place of sines and cosines, to show what that costs.
        integrator: of the analytic model it was learnt on top of.
        contact: that model's; None: there is none.
        physics: that model's numbers, one array for each of PHYSICS; empty where ``base`` is identity.
        seed: of the training.
        versions: of the programs that made it.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    activation: str
    input_mean: np.ndarray
    input_scale: np.ndarray
    output_scale: np.ndarray
    near: float
    far: float
    dt: float
    robot: str
    joints: tuple[str, ...]
    surfaces: tuple[Surface, ...] = ()
    base: str = "analytic"
    spread: Spread | None = None
    acts_on: str = "joints"
    encode_angles: bool = True
    integrator: str = "euler"
    contact: ContactSpec | None = None
    physics: Mapping[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def members(self) -> int:
        """How many networks there are, E."""
        return len(self.layers[0][0])

    def member(self, e: int) -> Residual:
        """Return the ensemble that is its network ``e`` alone."""
        return replace(self, layers=tuple((w[e : e + 1], b[e : e + 1]) for w, b in self.layers))

    def nudged(self, weights: np.ndarray, offsets: np.ndarray) -> Residual:
        """Return the ensemble with ``weights`` (means, E · values) and ``offsets`` (means,) added to its summed last layer.

        Args:
            weights, offsets: in units of joint speeds or impulses.
        """
        (w, b), n, scale = self.layers[-1], len(self.output_scale), self.output_scale
        w, b = w.astype(float), b.astype(float)
        alone = len(self.layers) == 1  # what goes in is the same for all
        if alone:  # and is normalised first
            weights, offsets = weights * self.input_scale, offsets + weights @ self.input_mean
        parts = np.repeat(weights[:, None] / self.members, self.members, 1) if alone else weights.reshape(n, self.members, -1)
        w[:, :n] += np.moveaxis(parts / scale[:, None, None] * self.members, 1, 0)
        b[:, :n] += offsets / scale
        return replace(self, layers=(*self.layers[:-1], (w, b)))

    def hidden(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the layers with the normalisers inside the first; outputs in units of S."""
        layers = [(w.astype(float), b.astype(float)) for w, b in self.layers]
        w, b = layers[0]
        w = w / self.input_scale
        layers[0] = w, b - w @ self.input_mean
        return layers

    def folded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the layers with S over E inside the last, too, and means only: what is evaluated."""
        layers, n = self.hidden(), len(self.output_scale)
        w, b = layers[-1]
        scale = self.output_scale / self.members
        layers[-1] = w[:, :n] * scale[:, None], b[:, :n] * scale
        return layers

    def save(self, path: str | Path) -> None:
        """Write an .npz that holds numbers and names only; an earlier file stays until this one is whole."""
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in (*_VECTORS, *_SCALARS)}
        for k, (w, b) in enumerate(self.layers):
            arrays[f"w{k}"], arrays[f"b{k}"] = w, b
        if self.spread is not None:
            arrays["bounds"] = np.stack([self.spread.lowest, self.spread.highest])
            arrays["spread"] = np.vstack([self.spread.scale, self.spread.rest])
        arrays |= {f"physics_{name}": values for name, values in self.physics.items()}
        about = {
            "format": FORMAT,
            "robot": self.robot,
            "joints": list(self.joints),
            "base": self.base,
            "activation": self.activation,
            "acts_on": self.acts_on,
            "encode_angles": self.encode_angles,
            "integrator": self.integrator,
            "contact": self.contact and self.contact.model_dump(mode="json"),
            "seed": self.seed,
            "versions": dict(self.versions),
            "surfaces": [surface.model_dump(mode="json") for surface in self.surfaces],
        }
        write_arrays(path, about, arrays)


def peek(path: str | Path) -> tuple[str, float]:
    """Return whose a learned model is and its time step [s]; SpecError for a file that is none."""
    about, arrays = read_arrays(path, "learned model")
    if not isinstance(about.get("robot"), str) or "dt" not in arrays or arrays["dt"].shape:
        raise SpecError("is no learned model", file=path)
    return about["robot"], float(arrays["dt"])


def load_residual(
    path: str | Path,
    robot: Robot,
    tree: RigidTree,
    dt: float | None = None,
    integrator: str | None = None,
    contact: ContactSpec | None = None,
) -> Residual:
    """Load a learned model.

    Args:
        path: of the file.
        robot: the arm it is to be of.
        tree: its joints and its numbers, calibrated ones where it has any.
        dt: the time step [s] it is to be used at; None: its own. A model without physics knows no other than its own.
        integrator: of the analytic model it is to be used on top of; None: its own, and its own contact.
        contact: that model's; one without stiffness and damping is none.

    Errors:
        SpecError: for a file that is none, of another format, of another arm, learnt on top of other physics, or whose numbers
            are none.
    """
    about, arrays = read_arrays(path, "learned model")
    if about.get("format") != FORMAT:
        raise SpecError(f"expected format {FORMAT}, found {about.get('format')}", file=path, key="format")
    if about.get("robot") != robot.name:
        raise SpecError(f"expected a model of '{robot.name}', found one of '{about.get('robot')}'", file=path, key="robot")
    if about.get("joints") != list(robot.joints):
        raise SpecError(f"expected {list(robot.joints)}, found {about.get('joints')}", file=path, key="joints")
    try:
        residual = _built(about, arrays, path)
    except (KeyError, TypeError, ValueError) as error:
        raise SpecError(f"is no learned model: {error}", file=path) from None
    _check(residual, path, tree.revolute, robot.nu)
    if residual.base == "identity" and dt is not None and abs(dt - residual.dt) > 1e-9:
        raise SpecError(f"a model without physics has one time step, {residual.dt:g} s; expected {dt:g} s", file=path, key="dt")
    if residual.base == "analytic" and integrator not in (None, residual.integrator):
        raise SpecError(f"was learnt on top of '{residual.integrator}', found '{integrator}'", file=path, key="integrator")
    if residual.base == "analytic" and integrator is not None:
        _check_contact(residual, contact, path)
    _check_physics(residual.physics, tree, path)
    return residual


def _check_contact(residual: Residual, found: ContactSpec | None, path: str | Path) -> None:
    """Refuse to add what was missed to physics that misses something else, or at another contact than terms look at."""
    learnt = residual.contact
    if residual.acts_on == "contact" and learnt is not None and found is not None:
        for key in PLACE:
            was, now = (getattr(contact, key) for contact in (learnt, found))
            if was != now:
                raise SpecError(f"acts on a contact with {key} {was}, found dynamics.contact.{key} {now}", file=path, key="contact")
    told = [
        "no contact" if contact is None or contact.stiffness == contact.damping == 0 else str(contact)
        for contact in (learnt, found)
    ]
    if told[0] != told[1]:
        raise SpecError(f"was learnt on top of {told[0]}, found dynamics.contact: {told[1]}", file=path, key="contact")


def physics_of(tree: RigidTree) -> dict[str, np.ndarray]:
    """Return an arm's numbers that calibrations change."""
    return {name: np.asarray(getattr(tree, name), float) for name in PHYSICS}


def _check_physics(learnt: Mapping[str, np.ndarray], tree: RigidTree, path: str | Path) -> None:
    """Refuse an arm with other numbers than it was learnt on top of: what is missed of one is not missed of the other."""
    for name, found in physics_of(tree).items():
        expected = learnt.get(name, found)
        if expected.shape != found.shape:
            raise SpecError(f"expected {name} of shape {found.shape}, found {expected.shape}", file=path, key="physics")
        same = np.isclose(found, expected, rtol=1e-6, atol=1e-9).reshape(tree.n, -1)
        if not same.all():
            i, k = np.argwhere(~same)[0]
            was, now = (values.reshape(tree.n, -1)[i, k] for values in (expected, found))
            told = f"was learnt on top of other parameters of the robot: {name} of {tree.joints[i]} {was:.6g}, found {now:.6g}"
            raise SpecError(told, file=path, key="physics")


def _built(about: dict[str, Any], arrays: dict[str, np.ndarray], path: str | Path) -> Residual:
    count = sum(name.startswith("w") for name in arrays)
    identity = about["base"] == "identity"
    spread = None
    if "spread" in arrays:
        cover = arrays["spread"].astype(float)
        spread = Spread(*arrays["bounds"].astype(float), cover[0], cover[1:])
    return Residual(
        tuple((arrays[f"w{k}"], arrays[f"b{k}"]) for k in range(count)),
        about["activation"],
        *(arrays[name].astype(float) for name in _VECTORS),
        *(float(arrays[name]) for name in _SCALARS),
        robot=about["robot"],
        joints=tuple(about["joints"]),
        surfaces=()
        if identity or about["acts_on"] == "contact"
        else validate(Surfaces, {"surfaces": about["surfaces"]}, path).surfaces,
        base=about["base"],
        spread=spread,
        acts_on=str(about["acts_on"]),
        encode_angles=bool(about["encode_angles"]),
        integrator=str(about["integrator"]),
        contact=None if about["contact"] is None else validate(ContactSpec, about["contact"], path, "contact"),
        physics={name: arrays[f"physics_{name}"] for name in PHYSICS if f"physics_{name}" in arrays},
        seed=int(about["seed"]),
        versions=dict(about["versions"]),
    )


def _check(residual: Residual, path: str | Path, revolute: tuple[bool, ...], commands: int) -> None:
    """Refuse what does not fit together; what is multiplied with what, and positive scales."""
    n, turning = len(revolute), sum(revolute)
    inputs, means = n + commands + (2 * turning + (n - turning) if residual.encode_angles else n), n
    if residual.acts_on == "contact":
        inputs, means = SEEN_OF_CONTACT, 3
    outputs = means if residual.spread is None else 2 * means
    sizes = [inputs, *(w.shape[1] for w, _ in residual.layers if w.ndim == 3)]
    shapes = [(w.shape, b.shape) for w, b in residual.layers]
    expected = [((residual.members, b, a), (residual.members, b)) for a, b in zip(sizes, sizes[1:])] if residual.layers else []
    if not expected or shapes != expected or sizes[-1] != outputs:
        found = (residual.layers[0][0].shape[-1], sizes[-1]) if residual.layers else (0, 0)
        raise SpecError(f"expected {inputs} inputs and {outputs} outputs, found {found[0]} and {found[1]}", file=path, key="layers")
    for key, known in (("activation", ACTIVATIONS), ("base", BASES), ("acts_on", TARGETS)):
        if getattr(residual, key) not in known:
            raise SpecError(f"expected one of {', '.join(known)}, found '{getattr(residual, key)}'", file=path, key=key)
    if residual.acts_on == "contact" and (residual.base != "analytic" or residual.contact is None):
        raise SpecError("expected a contact of the analytic model to act on, found none", file=path, key="contact")
    for key, size in (("input_mean", inputs), ("input_scale", inputs), ("output_scale", means)):
        values = getattr(residual, key)
        if values.shape != (size,) or (key.endswith("scale") and not (values > 0).all()):
            raise SpecError(f"expected {size} numbers, scales above 0, found {values.tolist()}", file=path, key=key)
    if not residual.dt > 0 or (residual.base == "analytic" and not residual.near < residual.far):
        found = f"dt {residual.dt:g} s, near {residual.near:g} m, far {residual.far:g} m"
        raise SpecError(f"expected a time step above 0 and near below far, found {found}", file=path)
    shapes = {"lowest": (means,), "highest": (means,), "scale": (n,), "rest": (2, n)}
    if residual.spread is not None and any(part.shape != shapes[name] for name, part in vars(residual.spread).items()):
        raise SpecError(f"expected bounds of {means} numbers and spreads of {n}", file=path, key="spread")

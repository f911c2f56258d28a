"""A sphere on a flat surface: a spring and damper along the normal, Coulomb friction across it, taken at the end of a step.

With A = J M⁻¹ Jᵀ the step's mobility at the contact (M the step's whole matrix, servos and friction implicit in it) and w
the relative velocity the step would end with untouched, the force f on the sphere ends the step with w + h A f. So the
spring, the damper and a friction that resists like a damper are solved for in three unknowns, exactly and stable at any h
(backward Euler; Woodbury's identity for M + h Jᵀ D J), and where nothing touches the step is the free one, to the last bit.
Sources: Kelvin and Voigt's element without adhesion, and regularised Coulomb friction, as in Castro, Permenter and Han, "An
unconstrained convex formulation of compliant contact" (2022), sections III and V.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.config import ContactSpec
from mbctrl.base.errors import ModelError, SpecError, suggest
from mbctrl.dynamics.tree import Frame, RigidTree

PARAMETERS = ("stiffness", "damping", "friction")
_TINY = 1e-9  # [m] or [m/s]: nothing
_SOFT = 1e-3
SEEN_OF_CONTACT = 11
"""How many inputs networks have that act on a contact."""


@dataclass(frozen=True)
class Contact:
    """One sphere that may touch one flat surface.

    Args:
        tip: the sphere's centre, in the link that carries it.
        radius: of the sphere [m].
        surface: a point of the surface, z along its outward normal, in the link that carries it (-1: the world).
        half: the surface's half lengths along x and y [m]; None: it has no end.
        stiffness, damping, friction: [N/m], [N·s/m], [1]; Scalars where they are inputs of a program.
        slip: the speed [m/s] below which friction falls to nothing; slower, it is a damper.

    Errors:
        ModelError: where both are on the same link.
    """

    tip: Frame
    radius: float
    surface: Frame
    half: tuple[float, float] | None = None
    stiffness: Any = 2e4
    damping: Any = 100.0
    friction: Any = 0.5
    slip: float = 0.01

    def __post_init__(self) -> None:
        if self.tip.link == self.surface.link:
            raise ModelError("the tip and the surface are on the same link: they never meet", key="contact")

    @property
    def pushes(self) -> bool:
        """Whether the physics has a force of it; else only terms look at it."""
        return any(not isinstance(value, (int, float)) or value > 0 for value in (self.stiffness, self.damping))

    def moved(self, tree: RigidTree) -> np.ndarray:
        """Return (n,) 1 for joints that move the tip alone, -1 for those that move the surface alone, 0 for the rest."""
        ancestors = np.vstack((tree.ancestors(), np.zeros(tree.n)))  # -1: the world, which nothing moves
        return ancestors[self.tip.link] - ancestors[self.surface.link]

    def depth(self, tip: Any, rotation: Any, position: Any) -> Any:
        """Return how deep the sphere at ``tip`` (3) is in the surface at ``position`` (3) with axes ``rotation`` (3)(3) [m].

        Negative: the gap. Beside the surface it is no deeper than the edge is away.
        """
        out = [tip[i] - position[i] for i in range(3)]
        x, y, z = (sum(rotation[i][k] * out[i] for i in range(3)) for k in range(3))
        deep = self.radius - z
        for across, half in zip((x, y), self.half or ()):
            deep = deep - _positive(deep - (half - abs(across)))
        return deep


def declared(
    spec: ContactSpec | None, tree: RigidTree, file: str | Path | None = None, key: str = "dynamics.contact"
) -> Contact | None:
    """Return the contact a file declares for an arm, None where it declares none.

    Errors:
        SpecError: for a frame the model does not have, and for a tip that its surface carries.
    """
    if spec is None:
        return None
    for field in ("tip", "surface"):
        name = getattr(spec, field)
        if name not in tree.frames:
            raise SpecError(f"the model has no site or body '{name}'{suggest(name, tree.frames)}", file=file, key=f"{key}.{field}")
    numbers = spec.model_dump(exclude={"tip", "surface"})
    try:
        return Contact(tip=tree.frames[spec.tip], surface=tree.frames[spec.surface], **numbers)
    except ModelError as error:
        raise SpecError(error.message, file=file, key=key) from None


def normal_force(contact: Contact, depth: Any, speed: Any, mobility: Any, h: Any, lead: Any) -> tuple[Any, Any]:
    """Return the force [N] along the normal alone, and how it falls with the speed of parting [N·s/m].

    Args:
        depth: where the step takes its forces [m]; ``lead`` [s] more brings it to the step's end.
        speed: of parting at the step's end, untouched [m/s].
        mobility: along the normal [1/kg].
    """
    ahead = depth - lead * speed
    deep = _positive(ahead)
    # The damper acts for the part of the step that is spent in the surface.
    damping = contact.damping * (deep / (deep + _positive(-depth) + _TINY))
    falls = damping + lead * contact.stiffness
    return _positive(contact.stiffness * ahead - damping * speed) / (1.0 + h * falls * mobility), falls


def contact_force(contact: Contact, depth: Any, free: Any, mobility: Any, h: Any, lead: Any) -> tuple[Any, Any, Any]:
    """Return the force on the sphere (3) [N] along the surface's x, y and z.

    Args:
        depth, h, lead: as ``normal_force``.
        free: (3) the relative velocity at the step's end, untouched [m/s].
        mobility: (3)(3) symmetric [1/kg].
    """
    normal, falls = normal_force(contact, depth, free[2], mobility[2][2], h, lead)
    share = h * falls / (1.0 + h * falls * mobility[2][2])
    x, y = (free[i] + h * mobility[i][2] * normal for i in range(2))
    # What a force across meets, the normal's answer to it included.
    xx, xy, yy = (mobility[i][j] - share * mobility[i][2] * mobility[j][2] for i, j in ((0, 0), (0, 1), (1, 1)))
    square = x * x + y * y + _TINY * _TINY
    along = (xx * x * x + 2.0 * xy * x * y + yy * y * y) / square
    size = _sqrt(square)
    # Sliding friction loads or relieves the normal, which it is proportional to: one linear equation. Twice is the most, short
    # of where an arm jams.
    lean = contact.friction * share * (mobility[0][2] * x + mobility[1][2] * y) / size
    grip = contact.friction * normal / (0.5 + _positive(0.5 - lean))
    slower = size - h * along * grip - contact.slip  # what is left of the sliding, beyond the slip speed
    rate = grip / (contact.slip + _positive(slower))
    a, b, c = 1.0 + h * rate * xx, h * rate * xy, 1.0 + h * rate * yy
    scale = -rate / (a * c - b * b)
    fx, fy = scale * (c * x - b * y), scale * (a * y - b * x)
    return fx, fy, _positive(normal - share * (mobility[0][2] * fx + mobility[1][2] * fy))


def seen_of_contact(depth: Any, before: Any, free: Any, mobility: Any) -> list[Any]:
    """Return what networks see of a contact, SEEN_OF_CONTACT values.

    How deep the tip is in the surface [m]; along the surface's axes their relative velocity before a step and after it [m/s], and
    the impulse that would leave none [N·s]; the mobility along the normal [1/kg].

    Args:
        depth: where the step takes its forces [m].
        before, free: (3) the relative velocity before the step and at its end [m/s].
        mobility: (3)(3) symmetric [1/kg]; a thousandth of its trace is added to it, where an arm cannot move every way.
    """
    (a, b, c), (_, d, e), (_, _, f) = mobility
    soft = _SOFT * (a + d + f)
    # L D Lᵀ, then what stops along z, y and x.
    first = 1.0 / (a + soft)
    lb, lc = b * first, c * first
    second = 1.0 / (d + soft - lb * b)
    le = (e - lb * c) * second
    third = 1.0 / (f + soft - lc * c - le * (e - lb * c))
    y = free[1] - lb * free[0]
    pz = (free[2] - lc * free[0] - le * y) * third
    py = y * second - le * pz
    px = free[0] * first - lb * py - lc * pz
    return [depth, *before, *free, px, py, pz, f]


def offset_velocity(screw: Any, point: Any) -> tuple[Any, Any, Any]:
    """Return the velocity (3) at ``point`` (3) of a motion [angular (3), linear (3)] at the origin."""
    w, v = screw
    return (
        v[0] + w[1] * point[2] - w[2] * point[1],
        v[1] + w[2] * point[0] - w[0] * point[2],
        v[2] + w[0] * point[1] - w[1] * point[0],
    )


@dataclass(frozen=True)
class Mount:
    """The spring and damper a surface rests on: ``joint`` is a slide, the force on the surface a linear function of it.

    ``force`` [N] presses the surface along its inward normal: ``sign (stiffness (rest - q) - damping v)``, in balance with
    what the surface weighs; its inertia is left out.
    """

    joint: int
    sign: float
    stiffness: float  # [N/m]
    damping: float  # [N·s/m]
    rest: float  # [m] where it stands when nothing touches it

    def force(self, q: Any, v: Any) -> Any:
        """Return the normal force at joint positions ``q`` and speeds ``v``, first index: joint."""
        return (self.sign * self.stiffness) * (self.rest - q[self.joint]) - (self.sign * self.damping) * v[self.joint]


def mount_of(contact: Contact, tree: RigidTree) -> Mount | None:
    """Return what the surface rests on; None where that is no spring-mounted slide along its normal, fixed to the world."""
    i = contact.surface.link
    if i < 0 or tree.revolute[i] or tree.parent[i] >= 0 or not tree.stiffness[i] > 0:
        return None
    axis = tree.fixed_rotation[i][:, 2]
    sign = float((tree.fixed_rotation[i] @ contact.surface.rotation)[:, 2] @ axis)
    if abs(abs(sign) - 1) > 1e-9:
        return None
    weight = float(tree.ancestors()[:, i] @ tree.mass * (tree.gravity @ axis))
    stiffness = float(tree.stiffness[i])
    return Mount(i, sign, stiffness, float(tree.damping[i]), float(tree.spring_reference[i]) + weight / stiffness)


def _plain(function: Callable[[float], float], method: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``function`` of numbers and ``method`` of tensors and traced scalars as one."""
    return lambda x: function(x) if isinstance(x, (int, float)) else method(x)


_positive = _plain(lambda x: max(x, 0.0), lambda x: x.clip(min=0.0))
_sqrt = _plain(lambda x: float(np.sqrt(x)), lambda x: x.sqrt())

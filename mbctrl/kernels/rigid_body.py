"""Rigid-body dynamics of a tree of revolute and prismatic joints, written over scalars for tracing.

Link frames, so that a robot's own zeros and right angles fold away. Sources: Luh, Walker and Paul, "On-line
computational scheme for mechanical manipulators" (1980), for the recursive Newton-Euler bias; Walker and Orin,
"Efficient dynamic computer simulation of robotic mechanisms" (1982), for the composite-rigid-body inertia;
Featherstone, "Rigid Body Dynamics Algorithms" (2008), section 6.5, for the factorisation that keeps a branched tree's
zeros; Gautier and Khalil, "Direct calculation of minimum set of inertial parameters of serial robots" (1990), for
moving what a joint cannot tell apart to its parent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.dynamics.body import inertia_of
from mbctrl.dynamics.tree import Frame, RigidTree
from mbctrl.kernels.graph import tidy

Array = np.ndarray  # of dtype object: Scalars and floats


@dataclass
class Body:
    """A link's mass distribution at its frame's origin: ``mass``, first ``moment`` (3,), ``second`` moment (3, 3).

    The rotational inertia is trace(second) 1 - second. Second moments turn and shift with fewer operations (Wensing, Kim
    and Slotine, "Linear matrix inequalities for physically consistent inertial parameter identification", 2018).
    """

    mass: Any
    moment: Array
    second: Array


@dataclass
class Motion:
    """What a step needs of the equation of motion M a + bias + gravity = tau: M (n, n), bias and gravity (n,).

    ``known`` (n,) is gravity without the payload, what an arm that compensates its weight compensates.
    """

    mass_matrix: Array
    bias: Array
    gravity: Array
    known: Array


class TracedArm:
    """The arm's constants, tidied, its inertias regrouped.

    Args:
        tree: the arm; ``mass``, ``com``, ``inertia``, ``armature``, ``damping`` and ``friction`` may be arrays of Scalars
            (parameters that change at run time).
        payload: the link that carries one and its ten parameters (``mbctrl.dynamics.body``), of which the arm is not told.
    """

    def __init__(self, tree: RigidTree, payload: tuple[int, Array] | None = None) -> None:
        self.tree, self.n = tree, tree.n
        self.rotation = [_tidied(r) for r in tree.fixed_rotation]
        self.position = [_tidied(p) for p in tree.fixed_position]
        self.gravity = _tidied(tree.gravity)
        bodies = [_at_origin(tree.mass[i], tree.com[i], tree.inertia[i]) for i in range(tree.n)]
        self._payload = None if payload is None else (payload[0], _of_ten(payload[1]))
        if self._payload is not None:
            link, body = self._payload
            bodies[link] = _sum(bodies[link], body)
        self.bodies = self._regrouped(bodies)

    def _regrouped(self, bodies: list[Body]) -> list[Body]:
        """Move to each parent what the joint cannot tell apart: same motion, fewer numbers, no longer each a body's."""
        for i in reversed(range(self.n)):
            body, parent = bodies[i], self.tree.parent[i]
            if self.tree.revolute[i]:  # what lies on the axis
                moved = Body(body.mass, _vector(0.0, 0.0, body.moment[2]), np.diag(_vector(0.0, 0.0, body.second[2, 2])))
            else:
                moved = Body(0.0, _vector(0.0, 0.0, 0.0), body.second)
            bodies[i] = Body(body.mass - moved.mass, body.moment - moved.moment, body.second - moved.second)
            if parent >= 0:  # what reaches the world never moves
                turned = _turned(moved.second, self.rotation[i])
                bodies[parent] = _sum(bodies[parent], _carried(moved, turned, self.rotation[i], self.position[i]))
        for body in bodies:
            scale = max((abs(x) for x in (*body.moment, *body.second.flat, body.mass) if isinstance(x, float)), default=1.0)
            body.moment, body.second = _tidied(body.moment, scale or 1.0), _tidied(body.second, scale or 1.0)
        return bodies

    def turns(self, q: Array, sine: Array, cosine: Array) -> tuple[list[Array], list[Array]]:
        """Return each link's rotation (3, 3) and position (3,) in its parent, from joint values and their sin and cos.

        Entries of ``q`` count from the joint's reference.
        """
        rotations, positions = [], []
        for i in range(self.n):
            fixed, offset = self.rotation[i], self.position[i]
            if self.tree.revolute[i]:
                s, c = sine[i], cosine[i]
                x, y, z = fixed.T
                rotations.append(np.stack([x * c + y * s, y * c - x * s, z], 1))
                positions.append(offset)
            else:
                rotations.append(fixed)
                positions.append(offset + fixed[:, 2] * q[i])
        return rotations, positions

    def motion(self, rotations: list[Array], positions: list[Array], v: Array, sine: Array, cosine: Array) -> Motion:
        """Return M(q) with armature, bias and gravity torque, from ``turns``, joint speeds and the angles' sin and cos."""
        children = [[k for k in range(self.n) if self.tree.parent[k] == i] for i in range(self.n)]
        forces, torques, falls = self._bias_wrenches(rotations, positions, v)
        bias, gravity = _zeros(self.n), _zeros(self.n)
        matrix = _zeros(self.n, self.n)
        composites: list[Body] = [None] * self.n  # type: ignore[list-item]
        for i in reversed(range(self.n)):
            total = self.bodies[i]
            for k in children[i]:
                force = rotations[k] @ forces[k]
                forces[i] = forces[i] + force
                torques[i] = torques[i] + rotations[k] @ torques[k] + np.cross(positions[k], force)
                second, turn = composites[k].second, rotations[k]
                if self.tree.revolute[k] and np.count_nonzero(self.rotation[k]) == 3:  # right angles: the rest is order and sign
                    second, turn = _spun(second, sine[k], cosine[k]), self.rotation[k]
                second = _turned(second, turn)
                total = _sum(total, _carried(composites[k], second, rotations[k], positions[k]))
            composites[i] = total
            if self.tree.revolute[i]:
                bias[i] = torques[i][2]
                gravity[i] = total.moment[1] * falls[i][0] - total.moment[0] * falls[i][1]
                s = total.second
                force, torque = _vector(-total.moment[1], total.moment[0], 0.0), _vector(-s[0, 2], -s[1, 2], s[0, 0] + s[1, 1])
            else:
                bias[i] = forces[i][2]
                gravity[i] = -total.mass * falls[i][2]
                force, torque = _vector(0.0, 0.0, total.mass), _vector(total.moment[1], -total.moment[0], 0.0)
            self._column(matrix, i, force, torque, rotations, positions)
        known = gravity if self._payload is None else gravity - self._weight(rotations, positions, falls)
        return Motion(matrix, bias, gravity, known)

    def _weight(self, rotations: list[Array], positions: list[Array], falls: list[Array]) -> Array:
        """Return the payload's part (n,) of gravity, carried down from link to link."""
        out = _zeros(self.n)
        i, body = self._payload
        mass, moment = body.mass, body.moment
        while i >= 0:
            turning = moment[1] * falls[i][0] - moment[0] * falls[i][1]
            out[i] = turning if self.tree.revolute[i] else -mass * falls[i][2]
            moment = rotations[i] @ moment + mass * positions[i]
            i = self.tree.parent[i]
        return out

    def _column(self, matrix: Array, i: int, force: Array, torque: Array, rotations: list[Array], positions: list[Array]) -> None:
        """Fill row ``i`` of M: the wrench that a unit acceleration of joint i takes, felt by i and its ancestors."""
        j = i
        while True:
            matrix[i, j] = torque[2] if self.tree.revolute[j] else force[2]
            if self.tree.parent[j] < 0:
                break
            force = rotations[j] @ force
            torque = rotations[j] @ torque + np.cross(positions[j], force)
            j = self.tree.parent[j]
        matrix[i, i] = matrix[i, i] + self.tree.armature[i]

    def _bias_wrenches(self, rotations: list[Array], positions: list[Array], v: Array) -> tuple[list[Array], ...]:
        """Return each link's own inertial forces and torques at zero joint acceleration, and gravity, in its frame, (3,) each."""
        spins, turnings, drives, falls = [], [], [], []
        forces, torques = [], []
        for i in range(self.n):
            parent, down, body = self.tree.parent[i], rotations[i].T, self.bodies[i]
            rest = _vector(0.0, 0.0, 0.0)
            spin, turning, drive = rest, rest, rest
            fall = self.gravity if parent < 0 else falls[parent]
            if parent >= 0:
                spin, turning = down @ spins[parent], down @ turnings[parent]
                whirl = _whirl(spins[parent], turnings[parent])
                drive = down @ (drives[parent] + whirl @ positions[i])
            if self.tree.revolute[i]:
                turning = turning + _vector(spin[1] * v[i], -spin[0] * v[i], 0.0)
                spin = spin + _vector(0.0, 0.0, v[i])
            else:
                drive = drive + _vector(spin[1] * (2 * v[i]), -spin[0] * (2 * v[i]), 0.0)
            spins.append(spin)
            turnings.append(turning)
            drives.append(drive)
            falls.append(down @ fall)
            own = _whirl(spin, turning)
            forces.append(body.mass * drive + own @ body.moment)
            torques.append(_twisted(own, body.second) + np.cross(body.moment, drive))
        return forces, torques, falls

    def solve(self, matrix: Array, right: Array) -> Array:
        """Return M⁻¹ ``right``; M as its lower triangle, factored Lᵀ D L along the tree so that no zero fills in."""
        parent, h, x = self.tree.parent, matrix.copy(), right.copy()
        inverse = _zeros(self.n)
        for k in reversed(range(self.n)):
            inverse[k] = 1.0 / h[k, k]
            i = parent[k]
            while i >= 0:
                share, j = h[k, i] * inverse[k], i
                while j >= 0:
                    h[i, j] = h[i, j] - share * h[k, j]
                    j = parent[j]
                h[k, i] = share
                x[i] = x[i] - share * x[k]  # k is done with: nothing below it is left
                i = parent[i]
        for k in range(self.n):
            x[k] = x[k] * inverse[k]
            i = parent[k]
            while i >= 0:
                x[k] = x[k] - h[k, i] * x[i]
                i = parent[i]
        return x

    def world(self, rotations: list[Array], positions: list[Array], links: set[int]) -> dict[int, tuple[Array, Array]]:
        """Return world rotation (3, 3) and position (3,) of ``links`` (-1: the world itself)."""
        out: dict[int, tuple[Array, Array]] = {-1: (_tidied(np.eye(3)), _vector(0.0, 0.0, 0.0))}

        def pose(link: int) -> tuple[Array, Array]:
            if link not in out:
                r, p = pose(self.tree.parent[link])
                out[link] = (r @ rotations[link], p + r @ positions[link])
            return out[link]

        for link in links:
            pose(link)
        return out


def frame_in_world(poses: dict[int, tuple[Array, Array]], frame: Frame) -> tuple[Array, Array]:
    """Return a fixed frame's world rotation (3, 3) and position (3,)."""
    r, p = poses[frame.link]
    return r @ _tidied(frame.rotation), p + r @ _tidied(frame.position)


def _whirl(spin: Array, turning: Array) -> Array:
    """Return [turning]x + [spin]x [spin]x, the matrix from an offset to its acceleration."""
    (x, y, z), (a, b, c) = spin, turning
    xx, yy, zz, xy, xz, yz = x * x, y * y, z * z, x * y, x * z, y * z
    rows = [[-(yy + zz), xy - c, xz + b], [xy + c, -(xx + zz), yz - a], [xz - b, yz + a, -(xx + yy)]]
    return np.array(rows, dtype=object)


def _twisted(whirl: Array, second: Array) -> Array:
    """Return the torque that turns a body about its frame's origin: the skew part of whirl S, S its second moment (sparse)."""
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = whirl
    a, b, c, d, e, f = (second[i] for i in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)))
    return _vector(
        d * zx + b * zy + f * (zz - yy) - e * yx - c * yz,
        e * (xx - zz) + f * xy + c * xz - a * zx - d * zy,
        a * yx + d * (yy - xx) + e * yz - b * xy - f * xz,
    )


def _spun(second: Array, sine: Any, cosine: Any) -> Array:
    """Return a second moment turned about z, by the double angle."""
    xx, yy, xy, xz, yz = second[0, 0], second[1, 1], second[0, 1], second[0, 2], second[1, 2]
    both, swing = sine * cosine, 0.5 - sine * sine  # half of sin 2a and of cos 2a
    mean, difference = 0.5 * (xx + yy), xx - yy
    along = swing * difference - 2.0 * both * xy
    across = both * difference + 2.0 * swing * xy
    out = np.empty((3, 3), dtype=object)
    out[0, 0], out[1, 1], out[2, 2] = mean + along, mean - along, second[2, 2]
    out[0, 1] = out[1, 0] = across
    out[0, 2] = out[2, 0] = cosine * xz - sine * yz
    out[1, 2] = out[2, 1] = sine * xz + cosine * yz
    return out


def _carried(body: Body, turned: Array, rotation: Array, position: Array) -> Body:
    """Return a body, its second moment already ``turned``, in its parent's frame and about the parent's origin."""
    moment = rotation @ body.moment
    # S' = R S Rᵀ + h pᵀ + p hᵀ + m p pᵀ, h the turned moment
    outer = np.outer(moment + (0.5 * body.mass) * position, position)
    return Body(body.mass, moment + body.mass * position, _symmetric(turned + outer + outer.T))


def _turned(second: Array, rotation: Array) -> Array:
    """Return R S Rᵀ of a symmetric S, each entry once."""
    half = rotation @ second
    out = np.empty((3, 3), dtype=object)
    for i in range(3):
        for j in range(i + 1):
            out[i, j] = out[j, i] = half[i] @ rotation[j]
    return out


def _symmetric(matrix: Array) -> Array:
    out = matrix.copy()
    for i in range(3):
        for j in range(i):
            out[j, i] = out[i, j]
    return out


def _sum(a: Body, b: Body) -> Body:
    return Body(a.mass + b.mass, a.moment + b.moment, _symmetric(a.second + b.second))


def _at_origin(mass: Any, com: Array, inertia: Array) -> Body:
    """Return a link's moments about its frame's origin from mass, com (3,) and inertia about the com (3, 3)."""
    com, inertia = np.asarray(com, dtype=object), np.asarray(inertia, dtype=object)
    second = (0.5 * np.trace(inertia)) * _tidied(np.eye(3)) - inertia + mass * np.outer(com, com)
    return Body(mass if not isinstance(mass, np.generic) else float(mass), mass * com, _symmetric(second))


def _of_ten(values: Array) -> Body:
    """Return a body's moments from its ten parameters."""
    inertia = inertia_of(values)
    return Body(values[0], values[1:4], (0.5 * np.trace(inertia)) * _tidied(np.eye(3)) - inertia)


def _tidied(array: Any, scale: float = 1.0) -> Array:
    array = np.asarray(array, dtype=object)
    out = np.empty(array.shape, dtype=object)
    for index, value in np.ndenumerate(array):
        out[index] = tidy(float(value), scale) if isinstance(value, (float, int, np.generic)) else value
    return out


def _vector(*values: Any) -> Array:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out


def _zeros(*shape: int) -> Array:
    return np.full(shape, 0.0, dtype=object)

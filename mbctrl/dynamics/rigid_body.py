"""Analytic rigid-body dynamics in torch, batch-last: every quantity is rows of N samples.

World-frame formulation: all spatial vectors are taken at the world's origin in world axes, so that sums over
ancestors and descendants are products with constant 0/1 matrices and nothing is transformed along the tree.
Sources: Featherstone, "Rigid Body Dynamics Algorithms" (2008), chapters 2, 5 and 6, for spatial algebra, bias forces
and composite inertia; Wensing, Kim and Slotine, "Linear matrix inequalities for physically consistent inertial
parameter identification" (2018), for the second-moment form of an inertia.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbctrl.base.errors import ModelError
from mbctrl.dynamics.actuation import Impedance, Torque
from mbctrl.dynamics.body import weld
from mbctrl.dynamics.contact import Contact
from mbctrl.dynamics.touch import Touch
from mbctrl.dynamics.tree import Frame, RigidTree

INTEGRATORS = ("euler", "leapfrog")
FRICTION_SPEED = 0.01
"""Speed [rad/s] over which the model's Coulomb friction changes sign (tanh); MuJoCo's and an arm's stick instead."""


class Poses(NamedTuple):
    """World poses of the links: ``rotation`` n times (3, 3, N), ``position`` n times (3, N) [m]."""

    rotation: list[Tensor]
    position: list[Tensor]


class Moved(NamedTuple):
    """A step: the state ``after`` it (nx, N), the ``matrix`` (n, n, N) an impulse on the joints is divided by in it, servos and
    friction included, and ``middle``, the positions (n, N) where forces were taken."""

    after: Tensor
    matrix: Tensor
    middle: Tensor


class Terms(NamedTuple):
    """The equation of motion ``M a + bias + gravity = tau``: (n, n, N), (n, N), (n, N); bias is without gravity.

    ``known`` (n, N) is gravity without the payload, what an arm that compensates its weight compensates.
    """

    mass_matrix: Tensor
    bias: Tensor
    gravity: Tensor
    known: Tensor


class RigidBodyDynamics:
    """An arm's forward dynamics and time step.

    The step is semi-implicit Euler, MuJoCo's ``Euler``: v' = v + h a, q' = q + h v', with joint damping, the servo and
    Coulomb friction taken at the end of the step. With friction off it equals ``mj_step`` to rounding. ``leapfrog``
    drifts half a step with v, evaluates the dynamics there, and drifts the other half with v' (Hairer, Lubich and
    Wanner, "Geometric Numerical Integration", 2006, section I.3): second order in gravity at the same cost, for
    torque-controlled arms that swing freely.

    Args:
        tree: the arm's parameters.
        dt: time step [s].
        actuation: what a command means; see ``mbctrl.dynamics.actuation``.
        commanded: for each command the index of its joint; None: all joints in order.
        effort_limit: (nu,) bounds of the total actuator torque [N·m]; None: unbounded.
        integrator: one of INTEGRATORS.
        gravity_compensation: the arm adds its own gravity torque (counted against the limit).
        contact: what may touch; None: nothing does.
        carrier: the link that may carry a payload, see ``carrying``; None: none may.
        dtype, device: of every tensor; float32 for planning, float64 for reference.

    Errors:
        ModelError: for an inertia no rigid body can have.
    """

    def __init__(
        self,
        tree: RigidTree,
        dt: float,
        actuation: Torque | Impedance = Torque(),
        *,
        commanded: list[int] | None = None,
        effort_limit: tuple[float, ...] | None = None,
        gravity_compensation: bool = False,
        integrator: str = "euler",
        contact: Contact | None = None,
        carrier: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tree, self.dt, self.actuation, self.compensated = tree, dt, actuation, gravity_compensation
        if integrator not in INTEGRATORS:
            raise ValueError(f"unknown integrator {integrator!r}; known: {', '.join(INTEGRATORS)}")
        self.integrator, self.contact, self.carrier = integrator, contact, carrier
        self.commanded = list(range(tree.n)) if commanded is None else list(commanded)
        self.nq, self.nx, self.nu = tree.n, 2 * tree.n, len(self.commanded)
        self.dtype, self.device = dtype, torch.device(device)

        def const(array: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)

        def column(array: np.ndarray) -> Tensor:
            return const(array)[:, None]

        # One (4, 3) product turns a parent's rotation into the child's axes and the offset between their origins.
        self._joint = [const(np.vstack([r.T, p])) for r, p in zip(tree.fixed_rotation, tree.fixed_position)]
        ancestors = tree.ancestors()
        self._ancestors, self._descendants = const(ancestors), const(ancestors.T)
        self._moves, self._strictly = const(ancestors)[:, :, None], const(ancestors - np.eye(tree.n))[:, :, None]
        self._weigh(tree)
        self._payload: Tensor | None = None
        self._gravity = const(tree.gravity)[:, None]
        self._revolute = torch.tensor(tree.revolute, device=device)[:, None, None, None]
        self._any_slide = not all(tree.revolute)
        self._reference, self._armature_matrix = column(tree.reference), const(np.diag(tree.armature))[:, :, None]
        self._damping, self._friction = column(tree.damping), column(tree.friction)
        self._stiffness, self._spring = column(tree.stiffness), column(tree.spring_reference)
        self._has_friction, self._has_spring = bool(tree.friction.any()), bool(tree.stiffness.any())
        self.effort_limit = effort_limit
        self._limit = None if effort_limit is None else column(np.asarray(effort_limit, float))
        self._identity = torch.eye(3, dtype=dtype, device=device)[:, :, None]
        self._full = self.commanded == list(range(tree.n))
        self._pick = slice(None) if self._full else self.commanded
        self._on_diagonal = torch.eye(tree.n, dtype=torch.bool, device=device)[:, :, None]

    def _weigh(self, tree: RigidTree) -> None:
        def const(array: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=self.dtype, device=self.device)[:, None]

        self._second_moment = const(_second_moment_factor(tree))
        self._root_mass = const(np.sqrt(tree.mass))[..., None]
        self._mass = const(tree.mass)[..., None]
        self._composite_mass = const(tree.ancestors().T @ tree.mass)[..., None]

    def carrying(self, body: np.ndarray) -> RigidBodyDynamics:
        """Return the same arm with a body of ten parameters (``mbctrl.dynamics.body``) welded to its ``carrier``.

        What it compensates of gravity is its own weight still: it is not told.
        """
        other = object.__new__(RigidBodyDynamics)
        other.__dict__ = dict(self.__dict__)
        other._weigh(weld(self.tree, self.carrier, body))
        other._payload = torch.as_tensor(body[:4], dtype=self.dtype, device=self.device)
        return other

    def with_dt(self, dt: float) -> RigidBodyDynamics:
        """Return the same arm with another time step [s]; constants are shared."""
        other = object.__new__(RigidBodyDynamics)
        other.__dict__ = {**self.__dict__, "dt": dt}
        return other

    def poses(self, q: Tensor) -> Poses:
        """Return the link frames' world poses at ``q`` (nq, N) [rad]."""
        angle = q - self._reference
        cosine, sine = torch.cos(angle), torch.sin(angle)
        turn = torch.stack((sine, -sine), 1)
        rotations: list[Tensor] = []
        positions: list[Tensor] = []
        for i, parent in enumerate(self.tree.parent):
            base = rotations[parent] if parent >= 0 else self._identity.expand(3, 3, q.shape[-1])
            moved = torch.matmul(self._joint[i], base)  # (3, 4, N): the fixed axes and the offset
            offset = moved[:, 3] if parent < 0 else moved[:, 3] + positions[parent]
            if self.tree.revolute[i]:
                flat = torch.addcmul(moved[:, :2] * cosine[i], moved[:, :2].flip(1), turn[i])
                rotations.append(torch.cat((flat, moved[:, 2:3]), 1))
                positions.append(offset)
            else:
                rotations.append(moved[:, :3])
                positions.append(offset + moved[:, 2] * angle[i])
        return Poses(rotations, positions)

    def frame(self, poses: Poses, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return world rotation (3, 3, N) and position (3, N) [m] of a frame fixed to a link."""
        rotation = torch.as_tensor(frame.rotation, dtype=self.dtype, device=self.device)
        if frame.link < 0:
            position = torch.as_tensor(frame.position, dtype=self.dtype, device=self.device)
            return rotation[:, :, None], position[:, None]
        return torch.matmul(rotation.T, poses.rotation[frame.link]), self.point(poses, frame.link, frame.position)

    def point(self, poses: Poses, link: int, position: np.ndarray) -> Tensor:
        """Return the world position (3, N) [m] of a point (3,) [m] fixed to ``link``."""
        local = torch.as_tensor(position, dtype=self.dtype, device=self.device)
        if link < 0:
            return local[:, None]
        return torch.matmul(local, poses.rotation[link]) + poses.position[link]

    def points(self, poses: Poses, link: int, positions: np.ndarray) -> Tensor:
        """Return the world positions (P, 3, N) [m] of points (P, 3) [m] fixed to a moving ``link``."""
        local = torch.as_tensor(positions, dtype=self.dtype, device=self.device)
        return torch.matmul(local, poses.rotation[link]).movedim(1, 0) + poses.position[link]

    def terms(self, q: Tensor, v: Tensor) -> Terms:
        """Return M(q), bias without gravity and gravity torque at ``q``, ``v`` (nv, N)."""
        poses = self.poses(q)
        rotation, position = torch.stack(poses.rotation), torch.stack(poses.position)  # (n, 3, 3, N), (n, 3, N)
        axes = self.screws(rotation, position)  # (n, 3, 2, N): angular and linear
        inertia, moment = self._inertia(rotation, position)
        n, samples = self.nq, q.shape[-1]
        own = axes * v[:, None, None]
        velocity = (self._ancestors @ own.flatten(1)).view(n, 3, 2, samples)
        w, s = velocity[:, :, :1], velocity[:, :, 1:]
        above = velocity - own  # the parent's
        turned = _cross(above[:, :, :1], own)
        rest = _cross(above[:, :, 1:], own[:, :, :1])
        turning = torch.cat((turned[:, :, :1], turned[:, :, 1:] + rest), 2)
        acceleration = (self._ancestors @ turning.flatten(1)).view(n, 3, 2, samples)
        momentum = _momentum(self._mass, inertia, moment, velocity)
        wrench = _momentum(self._mass, inertia, moment, acceleration) + _cross(w, momentum)
        wrench = torch.cat((wrench[:, :, :1] + _cross(s, momentum[:, :, 1:]), wrench[:, :, 1:]), 2)
        parts = torch.cat((wrench.flatten(1, 2), inertia.flatten(1, 2), moment), 1)
        gathered = (self._descendants @ parts.flatten(1)).view(n, 18, samples)
        bias = (axes.flatten(1, 2) * gathered[:, :6]).sum(1)
        composite = _momentum(self._composite_mass, gathered[:, 6:15].unflatten(1, (3, 3)), gathered[:, 15:], axes)
        gravity = -(composite[:, :, 1] * self._gravity).sum(1)
        flat, loads = axes.flatten(1, 2), composite.flatten(1, 2)
        lower = torch.stack([(flat * load).sum(1) for load in loads]) * self._moves  # [k, j]: joint j moves link k
        matrix = lower + (lower * self._strictly).transpose(0, 1) + self._armature_matrix
        known = gravity if self._payload is None else gravity - self._weight(axes, poses)
        return Terms(matrix, bias, gravity, known)

    def _weight(self, axes: Tensor, poses: Poses) -> Tensor:
        """Return the payload's part (n, N) of gravity."""
        mass, link = self._payload[0], self.carrier
        moment = torch.matmul(self._payload[1:], poses.rotation[link]) + mass * poses.position[link]  # at the world's origin
        momentum = mass * axes[:, :, 1] + _cross(axes[:, :, :1], moment[None, :, None])[:, :, 0]
        return -(momentum * self._gravity).sum(1) * self._moves[link]

    def screws(self, rotation: Tensor, position: Tensor) -> Tensor:
        """Return each joint's axis as [angular, linear] velocity at the world's origin, (n, 3, 2, N)."""
        z = rotation[:, :, 2]
        moment = _cross(position[:, :, None], z[:, :, None])
        screws = torch.cat((z[:, :, None], moment), 2)
        if not self._any_slide:
            return screws
        slide = torch.stack((torch.zeros_like(z), z), 2)
        return torch.where(self._revolute, screws, slide)

    def _inertia(self, rotation: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return each link's inertia (n, 3, 3, N) [kg·m²] and first moment of mass (n, 3, N) [kg·m], at the world's origin."""
        factor = torch.matmul(self._second_moment, rotation)  # (n, 3, 4, N): root of the second moment, com
        center = factor[:, :, 3] + self._root_mass * position
        factor = torch.cat((factor[:, :, :3], center[:, :, None]), 2)
        second = (factor[:, :, None] * factor[:, None]).sum(3)
        trace = second[:, 0, 0] + second[:, 1, 1] + second[:, 2, 2]
        return self._identity * trace[:, None, None] - second, self._root_mass * center

    def forward_dynamics(self, q: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        """Return accelerations (nv, N) [rad/s²] at state ``q``, ``v`` under joint torques ``tau`` (nv, N) [N·m]."""
        terms = self.terms(q, v)
        rate = self._damping + self._friction_rate(v)
        return _solve(terms.mass_matrix, tau + self._springs(q) - rate * v - terms.bias - terms.gravity)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` = [q, v] under commands ``u`` (nu, N)."""
        return self.moved(x, u).after

    def moved(self, x: Tensor, u: Tensor) -> Moved:
        """Return ``step``, and what it was made of."""
        h, n = self.dt, self.nq
        q, v = x[:n], x[n:]
        middle = q + (0.5 * h) * v if self.integrator == "leapfrog" else q
        terms = self.terms(middle, v)
        load = self._springs(middle) - self._damping * v - terms.bias - terms.gravity
        drag = h * self._damping + torch.diagonal(terms.mass_matrix, dim1=0, dim2=1).T
        torque, servo_drag = self._effort(q, v, u, terms, load, drag)
        load, drag = load + torque, drag + servo_drag
        touch = Touch(self, self.contact, middle) if self.contact and self.contact.pushes else None
        if self._has_friction:
            # Friction at the speed the joint is about to have (a diagonal estimate, friction's own pull included, of
            # its straight-line form clip(v / vs)): it sticks and slides at any h.
            felt = load if touch is None else load + touch.pushed(v, load, drag)
            free, taken = (v + h * felt / drag).abs(), h * self._friction / drag
            rate = self._friction_rate(torch.maximum(free - taken, free / (1 + taken / FRICTION_SPEED)))
            load, drag = load - rate * v, drag + h * rate
        matrix = torch.where(self._on_diagonal, drag[:, None], terms.mass_matrix)
        solved = _solve(matrix, load) if touch is None else touch.solve(matrix, load, v)
        v = v + h * solved
        q = middle + (0.5 * h) * v if self.integrator == "leapfrog" else q + h * v
        return Moved(torch.cat((q, v)), matrix, middle)

    @property
    def lead(self) -> float:
        """How long before a step's end its forces are taken [s]."""
        return 0.5 * self.dt if self.integrator == "leapfrog" else self.dt

    def _effort(self, q: Tensor, v: Tensor, u: Tensor, terms: Terms, load: Tensor, drag: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total actuator torque within its limits and its implicit part, on all joints, (nv, N) each."""
        pick = self._pick
        effort = self.actuation.effort(q[pick], v[pick], u, self.dt)
        torque, servo_drag = effort.torque, effort.drag
        own = terms.known[pick] if self.compensated else torch.zeros_like(torque)
        total = torque + own
        if servo_drag is None:
            total = total if self._limit is None else torch.minimum(torch.maximum(total, -self._limit), self._limit)
            servo_drag = torch.zeros_like(total)
        elif self._limit is None:
            servo_drag = servo_drag.expand_as(total)
        else:
            end = total - servo_drag * (load[pick] + total) / (drag[pick] + servo_drag)
            bounded = torch.minimum(torch.maximum(end, -self._limit), self._limit)
            saturated = end != bounded
            total = torch.where(saturated, bounded, total)
            servo_drag = torch.where(saturated, torch.zeros_like(total), servo_drag)
        if self._full:
            return total, servo_drag
        zeros = torch.zeros_like(q)
        return zeros.index_copy(0, *self._scatter(total)), zeros.index_copy(0, *self._scatter(servo_drag))

    def _scatter(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.commanded, device=self.device), rows

    def rollout(self, x0: Tensor, u: Tensor) -> Tensor:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""
        states = [x0]
        for command in u:
            states.append(self.step(states[-1], command))
        return torch.stack(states)

    def _springs(self, q: Tensor) -> Tensor | float:
        return -self._stiffness * (q - self._spring) if self._has_spring else 0.0

    def _friction_rate(self, v: Tensor) -> Tensor | float:
        """Return Coulomb friction over speed, tanh(v / vs) friction / v, smooth through rest, (nv, N) [N·m·s/rad]."""
        if not self._has_friction:
            return 0.0
        ratio = v / FRICTION_SPEED
        small = ratio.abs() < 1e-2
        safe = torch.where(small, torch.ones_like(ratio), ratio)
        shape = torch.where(small, 1 - ratio * ratio / 3, torch.tanh(safe) / safe)
        return self._friction / FRICTION_SPEED * shape


def _second_moment_factor(tree: RigidTree) -> np.ndarray:
    """Return (n, 4, 3): for each link the transposed columns [axes * sqrt(second moment), sqrt(mass) * com]."""
    factors = np.zeros((tree.n, 4, 3))
    for i in range(tree.n):
        moments, axes = np.linalg.eigh(tree.inertia[i])
        second = moments.sum() / 2 - moments
        if second.min() < -1e-6 * max(moments.max(), 1e-12):
            raise ModelError(f"inertia violates the triangle inequality: principal moments {moments}", key=tree.joints[i])
        factors[i, :3] = (axes * np.sqrt(np.maximum(second, 0))).T
        factors[i, 3] = np.sqrt(tree.mass[i]) * tree.com[i]
    return factors


def _cross(a: Tensor, b: Tensor) -> Tensor:
    """Return the cross product of (n, 3, A, N) and (n, 3, B, N), A and B broadcasting; far faster than torch's own."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(1), b.unbind(1)
    return torch.stack((a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0), 1)


def _momentum(mass: Tensor, inertia: Tensor, moment: Tensor, motion: Tensor) -> Tensor:
    """Apply inertias at the world's origin to [angular, linear] motions (n, 3, 2, N)."""
    swapped = _cross(moment[:, :, None], motion)  # [h x w, h x s]
    angular = (inertia * motion[:, None, :, 0]).sum(2) + swapped[:, :, 1]
    return torch.stack((angular, mass * motion[:, :, 1] - swapped[:, :, 0]), 2)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve symmetric positive definite (n, n, N) systems for ``right`` (n, N) by LDLᵀ, unrolled over n."""
    rest = torch.cat((matrix, right[:, None]), 1)
    rows: list[Tensor] = []
    for _ in range(len(right)):
        row = rest[0] / rest[0, :1]
        rows.append(row[1:])
        rest = rest[1:, 1:] - rest[1:, :1] * row[None, 1:]
    solution = rows.pop()
    for row in reversed(rows):
        value = row[-1:] - (row[:-1] * solution).sum(0, keepdim=True)
        solution = torch.cat((value, solution))
    return solution

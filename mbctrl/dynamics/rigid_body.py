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
from mbctrl.dynamics.tree import Frame, RigidTree

FRICTION_SPEED = 0.01
"""Speed [rad/s] over which the model's Coulomb friction changes sign (tanh); MuJoCo's and an arm's stick instead."""


class Poses(NamedTuple):
    """World poses of the links: ``rotation`` n times (3, 3, N), ``position`` n times (3, N) [m]."""

    rotation: list[Tensor]
    position: list[Tensor]


class Terms(NamedTuple):
    """The equation of motion ``M a + bias + gravity = tau``: (n, n, N), (n, N), (n, N); bias is without gravity."""

    mass_matrix: Tensor
    bias: Tensor
    gravity: Tensor


class RigidBodyDynamics:
    """An arm's forward dynamics and time step.

    The step is semi-implicit Euler, MuJoCo's ``Euler``: v' = v + h a, q' = q + h v', with joint damping, the servo and
    Coulomb friction taken at the end of the step. With friction off it equals ``mj_step`` to rounding.

    Args:
        tree: the arm's parameters.
        dt: time step [s].
        actuation: what a command means; see ``mbctrl.dynamics.actuation``.
        commanded: for each command the index of its joint; None: all joints in order.
        effort_limit: (nu,) bounds of the total actuator torque [N·m]; None: unbounded.
        gravity_compensation: the arm adds its own gravity torque (counted against the limit).
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
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.tree, self.dt, self.actuation, self.compensated = tree, dt, actuation, gravity_compensation
        self.commanded = list(range(tree.n)) if commanded is None else list(commanded)
        self.nq, self.nx, self.nu = tree.n, 2 * tree.n, len(self.commanded)
        self.dtype, self.device = dtype, torch.device(device)

        def const(array: np.ndarray) -> Tensor:
            return torch.as_tensor(np.ascontiguousarray(array), dtype=dtype, device=device)

        def column(array: np.ndarray) -> Tensor:
            return const(array)[:, None]

        # One (4, 3) product turns a parent's rotation into the child's axes and the offset between their origins.
        self._joint = [const(np.vstack([r.T, p])) for r, p in zip(tree.fixed_rotation, tree.fixed_position)]
        self._second_moment = const(_second_moment_factor(tree))
        self._root_mass = column(np.sqrt(tree.mass))
        ancestors = tree.ancestors()
        self._ancestors, self._descendants = const(ancestors), const(ancestors.T)
        self._composite_mass = column(ancestors.T @ tree.mass)
        self._mass = column(tree.mass)
        self._above = [const(row)[:, None] for row in ancestors]  # 1 where joint j moves link k
        self._gravity = const(tree.gravity)[:, None]
        self._revolute = torch.tensor(tree.revolute, device=device)[:, None, None]
        self._any_slide = not all(tree.revolute)
        self._reference, self._armature = column(tree.reference), column(tree.armature)
        self._damping, self._friction = column(tree.damping), column(tree.friction)
        self._stiffness, self._spring = column(tree.stiffness), column(tree.spring_reference)
        self._has_friction, self._has_spring = bool(tree.friction.any()), bool(tree.stiffness.any())
        self._limit = None if effort_limit is None else column(np.asarray(effort_limit, float))
        self._identity = torch.eye(3, dtype=dtype, device=device)[:, :, None]
        self._full = self.commanded == list(range(tree.n))

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
                flat = torch.addcmul(moved[:, :2] * cosine[i], moved[:, [1, 0]], turn[i])
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
        w, s = self._screws(rotation, position)
        second, moment = self._inertia(rotation, position)
        n, rate = self.nq, v[:, None]
        wj, sj = w * rate, s * rate
        velocity = (self._ancestors @ torch.cat((wj, sj), 1).flatten(1)).view(n, 6, -1)
        wi, si = velocity[:, :3], velocity[:, 3:]
        wp, sp = wi - wj, si - sj  # the parent's
        turning = torch.cat((_cross(wp, wj), _cross(wp, sj) + _cross(sp, wj)), 1)
        acceleration = (self._ancestors @ turning.flatten(1)).view(n, 6, -1)
        mass = self._mass[:, None]
        angular, linear = _momentum(mass, second, moment, wi, si)
        torque, force = _momentum(mass, second, moment, acceleration[:, :3], acceleration[:, 3:])
        wrench = torch.cat((torque + _cross(wi, angular) + _cross(si, linear), force + _cross(wi, linear)), 1)
        gathered = (self._descendants @ torch.cat((wrench, second, moment), 1).flatten(1)).view(n, 15, -1)
        bias = (w * gathered[:, :3] + s * gathered[:, 3:6]).sum(1)
        second, moment = gathered[:, 6:12], gathered[:, 12:]
        weight = self._composite_mass * (s * self._gravity).sum(1) + (w * _cross(moment, self._gravity)).sum(1)
        angular, linear = _momentum(self._composite_mass[:, None], second, moment, w, s)
        rows = [self._above[k] * (w * angular[k] + s * linear[k]).sum(1) for k in range(n)]
        lower = torch.stack(rows)  # [k, j]: joint j above link k
        diagonal = torch.diag_embed(torch.diagonal(lower, dim1=0, dim2=1)).movedim(0, -1)
        matrix = lower + lower.transpose(0, 1) - diagonal
        return Terms(matrix + torch.diag(self._armature[:, 0])[:, :, None], bias, -weight)

    def _screws(self, rotation: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return each joint's axis as angular and linear velocity at the world's origin, (n, 3, N) each."""
        z = rotation[:, :, 2]
        w, s = z, _cross(position, z)
        if self._any_slide:
            w, s = torch.where(self._revolute, w, torch.zeros_like(w)), torch.where(self._revolute, s, z)
        return w, s

    def _inertia(self, rotation: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Return each link's second moment of mass (n, 6, N) [kg·m²] and first moment (n, 3, N) [kg·m] at the origin."""
        factor = torch.matmul(self._second_moment[:, None], rotation)  # (n, 3, 4, N): root of the second moment, com
        root = self._root_mass[:, None]
        center = factor[:, :, 3] + root * position
        factor = torch.cat((factor[:, :, :3], center[:, :, None]), 2)
        x, y, z = factor.unbind(1)
        pairs = ((x, x), (y, y), (z, z), (y, z), (x, z), (x, y))
        return torch.stack([(a * b).sum(1) for a, b in pairs], 1), root * center

    def forward_dynamics(self, q: Tensor, v: Tensor, tau: Tensor) -> Tensor:
        """Return accelerations (nv, N) [rad/s²] at state ``q``, ``v`` under joint torques ``tau`` (nv, N) [N·m]."""
        terms = self.terms(q, v)
        rate = self._damping + self._friction_rate(v)
        return _solve(terms.mass_matrix, tau + self._springs(q) - rate * v - terms.bias - terms.gravity)

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` = [q, v] under commands ``u`` (nu, N)."""
        h, n = self.dt, self.nq
        q, v = x[:n], x[n:]
        terms = self.terms(q, v)
        load = self._springs(q) - self._damping * v - terms.bias - terms.gravity
        drag = h * self._damping + torch.diagonal(terms.mass_matrix, dim1=0, dim2=1).T
        torque, servo_drag = self._effort(q, v, u, terms, load, drag)
        load, drag = load + torque, drag + servo_drag
        if self._has_friction:
            # Friction at the speed the joint is about to have (a diagonal estimate): it sticks and slides at any h.
            rate = self._friction_rate(v + h * load / drag)
            load, drag = load - rate * v, drag + h * rate
        solved = _solve(_with_diagonal(terms.mass_matrix, drag), load)
        v = v + h * solved
        return torch.cat((q + h * v, v))

    def _effort(self, q: Tensor, v: Tensor, u: Tensor, terms: Terms, load: Tensor, drag: Tensor) -> tuple[Tensor, Tensor]:
        """Return the total actuator torque within its limits and its implicit part, on all joints, (nv, N) each."""
        pick = self.commanded
        effort = self.actuation.effort(q[pick], v[pick], u, self.dt)
        torque, servo_drag = effort.torque, effort.drag
        own = terms.gravity[pick] if self.compensated else torch.zeros_like(torque)
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
    """Return the cross product along the second last axis; three wide rows beat torch's own kernel by six times."""
    (a0, a1, a2), (b0, b1, b2) = a.unbind(-2), b.unbind(-2)
    return torch.stack((a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0), -2)


def _momentum(mass: Tensor, second: Tensor, moment: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Apply an inertia at the world's origin to a spatial velocity: angular and linear part, (n, 3, N) each."""
    xx, yy, zz, yz, xz, xy = second.unbind(1)
    x, y, z = w.unbind(1)
    rotated = torch.stack(((yy + zz) * x - xy * y - xz * z, (xx + zz) * y - xy * x - yz * z, (xx + yy) * z - xz * x - yz * y), 1)
    return rotated + _cross(moment, s), mass * s + _cross(w, moment)


def _with_diagonal(matrix: Tensor, diagonal: Tensor) -> Tensor:
    """Return ``matrix`` (n, n, N) with its diagonal replaced by ``diagonal`` (n, N)."""
    mask = torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)[:, :, None]
    return torch.where(mask, diagonal[:, None], matrix)


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

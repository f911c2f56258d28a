"""What networks see of a state and a command: the one encoding of training, planning in torch and export."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mbctrl.dynamics.actuation import Torque
from mbctrl.dynamics.contact import seen_of_contact
from mbctrl.dynamics.gate import Gate, TipGate
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.touch import Touch


class Encoding:
    """[sin, cos of each revolute joint; q of each prismatic; v; u], of u minus the commanded joints' q where it is a reference.

    A reference is told from where the joint is, so that a joint that has turned round and round looks the same as before.

    Args:
        base: whose joints, commands, precision and device.
        angles: False gives q itself in place of sines and cosines.
    """

    def __init__(self, base: RigidBodyDynamics, angles: bool = True) -> None:
        n, revolute = base.nq, base.tree.revolute
        self._base, self._angles, self._n = base, angles, n
        self._relative = not isinstance(base.actuation, Torque)
        self._revolute = torch.tensor([i for i in range(n) if revolute[i]], dtype=torch.long, device=base.device)
        self._sliding = [i for i in range(n) if not revolute[i]]
        self.size = n + base.nu + (2 * len(self._revolute) + len(self._sliding) if angles else n)

    def __call__(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the inputs (inputs, N) for states ``x`` (nx, N) and commands ``u`` (nu, N)."""
        q, v = x[: self._n], x[self._n :]
        command = u - q[self._base._pick] if self._relative else u
        if not self._angles:
            return torch.cat((q, v, command))
        angle = (q - self._base._reference).index_select(0, self._revolute)
        parts = [torch.sin(angle), torch.cos(angle), q[self._sliding], v, command]
        return torch.cat([part for part in parts if len(part)])


class Seen(NamedTuple):
    """What a step looks like before anything learnt is added to it.

    ``after``: the state (nx, N) after the analytic step, None without physics; ``gate``: g (N,); ``inputs`` (inputs, N);
    ``answers`` (nv, 3, N): the joint speeds that unit impulses at the contact give, ``touching`` (N,): whether it is closed at the
    step's end without any; None where networks act on joints.
    """

    after: Tensor | None
    gate: Tensor
    inputs: Tensor
    answers: Tensor | None = None
    touching: Tensor | None = None

    def lifted(self, values: Tensor) -> Tensor:
        """Return the joint speeds (..., nv, N) of what networks give, (..., outputs, N)."""
        if self.answers is None:
            return values
        return (self.answers * values[..., None, :, :]).sum(-2)

    def spread_out(self, variances: Tensor) -> Tensor:
        """Return the variances (..., nv, N) of joint speeds, of those of what networks give, (..., outputs, N)."""
        if self.answers is None:
            return variances
        return (self.answers.square() * variances[..., None, :, :]).sum(-2)


class Sight:
    """What networks see of a step, and how far the gate is open in it; the one of training, planning in torch and export.

    Networks that act on joints see an ``Encoding``; those that act on a contact ``seen_of_contact`` alone, and so nothing of
    where it is.

    Args:
        base: the analytic arm.
        gate: where the networks count; a contact's, where they give impulses to that; None: everywhere, without physics beneath.
        angles: as ``Encoding``.
        dt: the time step [s] the networks were fitted for.
    """

    def __init__(self, base: RigidBodyDynamics, gate: Gate | TipGate | None, angles: bool, dt: float) -> None:
        self.gate, self.encode, self._dt = gate, Encoding(base, angles), dt

    def __call__(self, base: RigidBodyDynamics, x: Tensor, u: Tensor) -> Seen:
        """Return what is seen of a step of ``base``, the analytic arm, of any time step, from ``x`` (nx, N) under ``u`` (nu, N)."""
        n = base.nq
        if self.gate is None:
            return Seen(None, torch.ones_like(x[0]), self.encode(x, u))
        after, matrix, middle = base.moved(x, u)
        if isinstance(self.gate, Gate):
            return Seen(after, self.gate.open(self.gate.gaps(x[:n], after[:n]).amin(0)), self.encode(x, u))
        touch, part = Touch(base, self.gate.contact, middle), self._dt / base.dt
        answers, rows = touch.answers(matrix), touch.rows
        before, change = (rows * x[n:]).sum(1), (rows * ((after[n:] - x[n:]) * part)).sum(1)  # (3, N)
        mobility = (rows[:, :, None] * answers[None]).sum(1)  # (3, 3, N)
        free = before + change
        ahead = touch.depth - base.lead * part * free[2]
        gate = self.gate.open(-torch.maximum(touch.depth, ahead))
        return Seen(after, gate, torch.stack(seen_of_contact(touch.depth, before, free, mobility)), answers, ahead > 0)

"""What networks see of a state and a command: the one encoding of training, planning in torch and export."""

from __future__ import annotations

import torch
from torch import Tensor

from mbctrl.dynamics.actuation import Torque
from mbctrl.dynamics.gate import Gate
from mbctrl.dynamics.rigid_body import RigidBodyDynamics


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


class Sight:
    """What networks see of a step, and how far the gate is open in it; the one of training, planning in torch and export.

    Args:
        base: the analytic arm.
        gate: where the networks count; None: everywhere, without physics beneath.
        angles: as ``Encoding``.
        step: the networks see the analytic step, too: its change of velocity (nv,), that of ``dt`` [s], and the gap before and
            after it [m]. What stops the arm at a surface is nearly a linear function of how fast it would have gone on.
        dt: the time step [s] the networks were fitted for.
    """

    def __init__(self, base: RigidBodyDynamics, gate: Gate | None, angles: bool, step: bool, dt: float) -> None:
        self.gate, self.encode, self._step, self._dt = gate, Encoding(base, angles), step, dt

    def __call__(self, base: RigidBodyDynamics, x: Tensor, u: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return the state (nx, N) after the analytic step (None: there is no physics), g (N,) and the inputs (inputs, N).

        Args:
            base: the analytic arm, of any time step.
            x: (nx, N).
            u: (nu, N).
        """
        inputs, n = self.encode(x, u), base.nq
        if self.gate is None:
            return None, torch.ones_like(x[0]), inputs
        after = base.step(x, u)
        gaps = self.gate.gaps(x[:n], after[:n])
        if self._step:
            inputs = torch.cat((inputs, (after[n:] - x[n:]) * (self._dt / base.dt), gaps))
        return after, self.gate.open(gaps.amin(0)), inputs

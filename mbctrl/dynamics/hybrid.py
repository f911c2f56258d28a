"""Physics-informed dynamics in torch: the analytic step, and what an ensemble has learnt that it misses near contact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor

from mbctrl.dynamics.contact import declared
from mbctrl.dynamics.encoding import Seen, Sight
from mbctrl.dynamics.gate import Gate, Opening, TipGate
from mbctrl.dynamics.residual import Residual
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.tree import Frame

ACTIVATIONS = {"tanh": torch.tanh, "silu": torch.nn.functional.silu, "relu": torch.relu}


def gate_of(base: RigidBodyDynamics, learnt: Any, tool: Frame, distance: Any) -> Gate | TipGate | None:
    """Return the gate of a learned model, or of a recipe of one, on top of ``base``; None where there is no physics beneath.

    Args:
        learnt: its ``base``, ``acts_on``, ``contact``, ``surfaces``, ``near`` and ``far`` are looked at.
        tool, distance: as ``HybridDynamics``.
    """
    if learnt.base == "identity":
        return None
    opening = Opening(learnt.near, learnt.far)
    if learnt.acts_on == "joints":
        return Gate(base, tool, learnt.surfaces, opening, distance)
    contact = declared(learnt.contact, base.tree, key="contact")
    assert contact is not None  # the file was checked
    return TipGate(base, contact, opening)


_QUIETEST = 1e-6  # [rad/s] of what no impulse explains


class Told(NamedTuple):
    """What transitions tell of an ensemble's last layer.

    ``gate`` (N,); ``features`` (values, N) that the summed last layer takes in; ``off`` (outputs, N), by how much its sum was off
    (joint speeds or impulses), and the ``variance`` (outputs, N) of that.
    """

    gate: Tensor
    features: Tensor
    off: Tensor
    variance: Tensor


def _of(values: Tensor, member: Tensor) -> Tensor:
    """Return each sample's member's (outputs, N) of ``values`` (E, outputs, N)."""
    return values[member, :, torch.arange(len(member))].T


class HybridDynamics:
    """``RigidBodyDynamics`` with a gated residual on top, or a fully learned model in its place; the same contract.

    Args:
        base: the analytic arm; of a fully learned model only its joints, commands and time step count.
        residual: the ensemble.
        tool: a gate of surfaces looks at the capsules of this frame's link, or at the frame where there are none.
        distance: ``mbctrl.tasks.distance.capsule_obstacle``, from a layer above.
    """

    def __init__(self, base: RigidBodyDynamics, residual: Residual, tool: Frame, distance: Any) -> None:
        self.base, self.residual, self.tool, self._distance = base, residual, tool, distance
        self.nq, self.nx, self.nu, self.dtype, self.device, self.dt = base.nq, base.nx, base.nu, base.dtype, base.device, base.dt
        self._layers = [(self._tensor(w), self._tensor(b)[:, :, None]) for w, b in residual.folded()]
        # What all members take in, and what is summed over them, is one product for all of them.
        (w, b), (last, offset) = self._layers[0], self._layers[-1]
        self._first = w.reshape(-1, w.shape[2]), b.reshape(-1, 1)
        self._sum = last.transpose(0, 1).reshape(last.shape[1], -1) if len(self._layers) > 1 else last.sum(0), offset.sum(0)
        w, b = residual.hidden()[-1]
        self._heads = self._tensor(w), self._tensor(b)[:, :, None]
        self.gate = gate_of(base, residual, tool, distance)
        self._sight = Sight(base, self.gate, residual.encode_angles, residual.dt)
        self._scale = self._tensor(residual.output_scale)[:, None]
        spread = residual.spread
        self._spread = spread and replace(spread, **{k: self._tensor(value)[..., None] for k, value in vars(spread).items()})

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(np.asarray(values, float), dtype=self.dtype, device=self.device)

    def with_dt(self, dt: Any) -> HybridDynamics:
        """Return the same arm with another time step [s]."""
        other = object.__new__(HybridDynamics)
        other.__dict__ = {**self.__dict__, "base": self.base.with_dt(dt), "dt": dt}
        return other

    def each(self) -> list[HybridDynamics]:
        """Return the arm with each member of the ensemble alone."""
        alone = [self.residual.member(e) for e in range(self.residual.members)]
        return [HybridDynamics(self.base, one, self.tool, self._distance) for one in alone]

    def carrying(self, body: np.ndarray) -> HybridDynamics:
        """Return the same arm with a payload that its physics knows; see ``RigidBodyDynamics.carrying``."""
        other = object.__new__(HybridDynamics)
        other.__dict__ = {**self.__dict__, "base": self.base.carrying(body)}
        return other

    def _before_last(self, inputs: Tensor) -> Tensor:
        """Return what the last layer takes in, (E, values, N); (1, inputs, N) where it is the first."""
        y, activation = inputs, ACTIVATIONS[self.residual.activation]
        if len(self._layers) == 1:
            return y.unsqueeze(0)
        w, b = self._first
        y = activation(torch.matmul(w, y) + b).reshape(self.residual.members, -1, y.shape[1])
        for w, b in self._layers[1:-1]:
            y = activation(torch.matmul(w, y) + b)
        return y

    def missed(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the velocity the base misses in a step of ``residual.dt``, ungated, (nv, N) [rad/s]."""
        seen = self._sight(self.base, x, u)
        return seen.lifted(self._summed(seen.inputs))

    def _summed(self, inputs: Tensor) -> Tensor:
        w, b = self._sum  # S over E is in it
        return torch.matmul(w, self._before_last(inputs).flatten(0, 1)) + b

    def members(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return each member's mean [rad/s] and variance [rad²/s²] of what the base misses, ungated, (E, nv, N) each.

        Variances are 0 where the networks give means only, and without what they cannot explain.
        """
        return self._each(self._sight(self.base, x, u))

    def _each(self, seen: Seen) -> tuple[Tensor, Tensor]:
        mean, variance = self._outputs(seen.inputs)
        mean = seen.lifted(mean)
        return mean, torch.zeros_like(mean) if self._spread is None else self._spread.scale**2 * seen.spread_out(variance)

    def _outputs(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and variances (E, outputs, N) of what each member gives, joint speeds or impulses; variances as trained."""
        (w, b), outputs = self._heads, len(self._scale)
        y = torch.matmul(w, self._before_last(inputs)) + b
        mean = self._scale * y[:, :outputs]
        if self._spread is None:
            return mean, torch.zeros_like(mean)
        return mean, self._scale**2 * self._spread.bounded(y[:, outputs:], torch.nn.functional.softplus).exp()

    def deviation(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the standard deviation (nv, N) [rad/s] of the velocity after a step: the members' own and their disagreement."""
        seen = self._sight(self.base, x, u)
        mean, variance = self._each(seen)
        disagreement = mean.var(0, correction=0)
        if self._spread is not None:
            disagreement = disagreement * self._spread.scale**2  # the whole deviation was scaled so that intervals cover
            if seen.touching is not None:
                disagreement = disagreement + torch.where(seen.touching, self._spread.rest[1], self._spread.rest[0]) ** 2
        return seen.gate * (variance.mean(0) + disagreement).sqrt() * (self.dt / self.residual.dt)

    def told(self, x: Tensor, u: Tensor, after: Tensor) -> Told:
        """Return what transitions from ``x`` (nx, N) under ``u`` (nu, N) to ``after`` (nx, N) tell networks with variances."""
        seen = self._sight(self.base, x, u)
        features = self._before_last(seen.inputs).flatten(0, 1)
        own, scale = self._outputs(seen.inputs)[1].mean(0), self._spread.scale.square()
        own = own * (scale if seen.answers is None else scale.mean())
        before = x if seen.after is None else seen.after
        missed = (after - before)[self.nq :] / (seen.gate.clamp(min=1e-6) * (self.dt / self.residual.dt))
        off = missed - seen.lifted(self._summed(seen.inputs))
        if seen.answers is None:
            return Told(seen.gate, features, off, own)
        # The impulse that explains it best, each joint's part of it as well as its noise lets it.
        noise = self._spread.rest[0].clamp(min=max(1e-2 * float(self._spread.rest[0].max()), _QUIETEST))
        answers, wanted = (seen.answers / noise[:, None]).permute(2, 0, 1), (off / noise).T[..., None]
        normal = answers.mT @ answers
        inverse = torch.linalg.inv(normal + 1e-9 * normal.diagonal(dim1=1, dim2=2).sum(1)[:, None, None] * torch.eye(3).to(normal))
        return Told(seen.gate, features, (inverse @ (answers.mT @ wanted))[..., 0].T, own + inverse.diagonal(dim1=1, dim2=2).T)

    def step_gate(self, x: Tensor, u: Tensor) -> Tensor:
        """Return g (N,) of a step: the larger one of before and, by the base, after it."""
        return self._sight(self.base, x, u).gate

    def step(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the state (nx, N) one step after ``x`` under ``u`` (nu, N)."""
        seen = self._sight(self.base, x, u)
        found = self._summed(seen.inputs)
        return self._after(x, seen, found if seen.after is None else seen.lifted(self._gated(seen, found)))

    def drawn(self, x: Tensor, u: Tensor, member: Tensor | None, noise: Generator) -> Tensor:
        """Return a state (nx, N) one step after ``x`` under ``u``, drawn as a member of the ensemble says: its mean, its variance.

        How far its mean is from that of all counts by the factor that ``deviation`` counts disagreement by.

        Args:
            member: (N,) which member's; None: means and variances of all are averaged.
            noise: of what is drawn.
        """
        seen = self._sight(self.base, x, u)
        mean, variance = self._outputs(seen.inputs)  # (E, outputs, N)
        middle, variance = mean.mean(0), variance.mean(0) if member is None else _of(variance, member)
        found = self._gated(seen, seen.lifted(middle))
        if member is not None:
            apart = seen.lifted(_of(mean, member) - middle)
            found = found + self._gated(seen, apart if self._spread is None else self._spread.scale * apart)
        if self._spread is not None:
            shape = {"generator": noise, "dtype": self.dtype, "device": self.device}
            deviation = variance.sqrt() * torch.randn(variance.shape, **shape)  # impulses, whose joint speeds are not independent
            away = self._spread.scale * seen.lifted(deviation)
            if seen.touching is not None:
                rest = torch.where(seen.touching, self._spread.rest[1], self._spread.rest[0])
                away = away + rest * torch.randn(rest.shape, **shape)
            found = found + self._gated(seen, away)
        return self._after(x, seen, found)

    def _gated(self, seen: Seen, values: Tensor) -> Tensor:
        # Nothing times what is not a number is not nothing: far away the physics is all there is.
        return torch.where(seen.gate > 0, seen.gate * values, torch.zeros((), dtype=self.dtype))

    def _after(self, x: Tensor, seen: Seen, missed: Tensor) -> Tensor:
        """Return the state after a step, ``missed`` (nv, N) added to the base's velocity."""
        n, more = self.nq, missed * (self.dt / self.residual.dt)
        if seen.after is None:
            v = x[n:] + more
            return torch.cat((x[:n] + 0.5 * self.dt * (x[n:] + v), v))
        return torch.cat((seen.after[:n] + self.base.lead * more, seen.after[n:] + more))

    def rollout(self, x0: Tensor, u: Tensor) -> Tensor:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""
        states = [x0]
        for command in u:
            states.append(self.step(states[-1], command))
        return torch.stack(states)

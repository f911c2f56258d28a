"""Judging models on transitions they have not seen: errors in open loop, and whether intervals hold what they promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from mbctrl.dynamics.hybrid import HybridDynamics
from mbctrl.dynamics.load import Model
from mbctrl.learning.fit import NORMAL_90
from mbctrl.learning.samples import analytic_model
from mbctrl.learning.transitions import Transitions

HORIZONS = (1, 5, 10, 25, 50)
"""Steps ahead that tables show."""
FEWEST = 10
"""Transitions or stretches that a share is worth saying of."""
KINDS = ("free", "impact", "in contact")
"""What a stretch of steps is: without contact, with contact that begins or ends, all in contact."""


class Rolls(Protocol):
    """Anything that predicts: analytic, learned, or the simulator itself."""

    def rollout(self, x0: Any, u: Any) -> Any:
        """Return states (H+1, nx, N) from ``x0`` (nx, N) under ``u`` (H, nu, N)."""


@dataclass(frozen=True)
class Windows:
    """N starts of stretches without a break, and H steps of each: ``x0`` (nx, N), ``u`` (H, nu, N), the truth ``x`` (H, nx, N),
    ``kind`` (H, N) an index into KINDS of all steps so far, -1 where the stretch has ended."""

    x0: np.ndarray
    u: np.ndarray
    x: np.ndarray
    kind: np.ndarray


@dataclass(frozen=True)
class Errors:
    """Absolute errors of one model over windows: ``joints`` (H, nq, N) [rad], ``tool`` (H, N) [m]; a state that is no number is
    an infinite error."""

    name: str
    joints: np.ndarray
    tool: np.ndarray
    kind: np.ndarray

    def summary(self, step: int, kind: int) -> tuple[np.ndarray, int]:
        """Return median and 95 % quantile of the errors ``step`` steps ahead, (nq + 1, 2), joints and then tool, and of how many
        windows; NaN where there are none."""
        chosen = self.kind[step - 1] == kind
        values = np.vstack([self.joints[step - 1][:, chosen], self.tool[step - 1][chosen]])
        count = int(chosen.sum())
        if not count:
            return np.full((len(values), 2), np.nan), 0
        # Not interpolated: half way to infinity is no number.
        return np.quantile(values, (0.5, 0.95), axis=1, method="higher").T, count


@dataclass(frozen=True)
class Coverage:
    """Share of velocities after a step that are within 90 % intervals, (nv,) each, and of how many transitions."""

    group: str
    inside: np.ndarray
    count: int


def windows_of(transitions: Transitions, steps: int = HORIZONS[-1], most: int = 1500) -> Windows:
    """Return stretches of up to ``steps`` steps, from at most ``most`` starts, evenly spaced; every contact's beginning among them
    is as likely as any other transition."""
    count = len(transitions)
    breaks = np.flatnonzero(~transitions.follows())  # each is the first of an unbroken stretch
    ends = np.append(breaks[1:], count)
    end = np.repeat(ends, ends - breaks)  # one past the last transition of its stretch
    starts = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
    index = starts + np.arange(steps)[:, None]  # (H, N)
    inside = index < end[starts]
    index = np.minimum(index, end[starts] - 1)
    contact = np.where(inside, transitions.contact[index], False)
    changed = np.where(inside, transitions.impacts()[index], False)
    touched = np.cumsum(contact, 0)
    kind = np.where(touched == 0, 0, np.where(touched == np.arange(1, steps + 1)[:, None], 2, 1))
    kind = np.where(np.logical_or.accumulate(changed, 0), 1, kind)
    return Windows(
        transitions.x[starts].T,
        np.moveaxis(transitions.u[index], 2, 1),
        np.moveaxis(transitions.x_next[index], 2, 1),
        np.where(inside, kind, -1),
    )


@torch.no_grad()
def open_loop(name: str, model: Rolls, windows: Windows, arm: Model) -> Errors:
    """Return a model's errors over windows."""
    n = arm.tree.n
    rolled = model.rollout(torch.from_numpy(windows.x0.copy()), torch.from_numpy(windows.u.copy()))
    found = np.asarray(rolled, float)[1:]
    tool = tool_of(arm, windows.x[:, :n]), tool_of(arm, found[:, :n])
    joints = np.abs(found[:, :n] - windows.x[:, :n])
    away = np.linalg.norm(tool[1] - tool[0], axis=1)
    return Errors(name, *(np.where(np.isfinite(values), values, np.inf) for values in (joints, away)), windows.kind)


@torch.no_grad()
def tool_of(arm: Model, q: np.ndarray) -> np.ndarray:
    """Return tool positions (H, 3, N) [m] at ``q`` (H, nq, N)."""
    base = analytic_model(arm, 1.0)
    flat = torch.from_numpy(np.moveaxis(q, 1, 0).reshape(q.shape[1], -1))
    _, position = base.frame(base.poses(flat), arm.tree.frames[arm.robot.tool])
    return np.moveaxis(position.expand(3, flat.shape[1]).numpy().reshape(3, len(q), -1), 0, 1)


@torch.no_grad()
def coverage(model: HybridDynamics, transitions: Transitions) -> list[Coverage]:
    """Return how many velocities 90 % intervals hold, where the gate is open: not in contact, and in contact.

    Empty for a model that gives means only.
    """
    if model.residual.spread is None:
        return []
    x, u = (torch.from_numpy(part.T.copy()) for part in (transitions.x, transitions.u))
    inside, gates = [], []
    for x0, u0, after in zip(x.split(4096, 1), u.split(4096, 1), torch.from_numpy(transitions.x_next.T.copy()).split(4096, 1)):
        error = (after - model.step(x0, u0))[model.nq :].abs()
        inside.append(error <= NORMAL_90 * model.deviation(x0, u0))
        gates.append(model.step_gate(x0, u0) > 0)
    within, near = torch.cat(inside, 1).numpy(), torch.cat(gates).numpy()
    where = "near surfaces, free" if model.residual.base == "analytic" else "free"
    groups = ((where, near & ~transitions.contact), ("in contact", near & transitions.contact))
    return [Coverage(name, within[:, chosen].mean(1), int(chosen.sum())) for name, chosen in groups if chosen.any()]


@torch.no_grad()
def gates_over(model: HybridDynamics, arm: Model, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return tool positions (3, N) [m] of random configurations within the limits, and the gate (N,) there."""
    limits, rng = arm.robot.limits, np.random.default_rng(seed)
    low, high = (np.clip(np.asarray(bound)[:, None], -np.pi, np.pi) for bound in (limits.position_lower, limits.position_upper))
    q = rng.uniform(low, high, (arm.tree.n, count))
    return tool_of(arm, q[None])[0], model.gate.open(model.gate.gap(torch.from_numpy(q))).numpy()


def table(errors: Sequence[Errors], steps: Sequence[int] = HORIZONS) -> list[dict[str, Any]]:
    """Return one row a model, kind and number of steps: ``model``, ``kind``, ``steps``, ``count``, ``values`` (nq + 1, 2)."""
    rows = []
    for k, kind in enumerate(KINDS):
        for step in steps:
            for one in errors:
                values, count = one.summary(step, k)
                rows.append({"model": one.name, "kind": kind, "steps": step, "count": count, "values": values})
    return rows

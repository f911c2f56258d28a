"""The arm's model as the control process uses it: momentum, gravity, tool pose and clearance in microseconds, compiled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.base.errors import BundleError
from mbctrl.base.extras import need
from mbctrl.kernels.trace import Traced
from mbctrl.kernels.watch import OUTPUTS
from mbctrl.runtime.bundle import ROLLOUT, Bundle

_STEP = 1e-4  # [s] by which momentum is looked at before and after, along the present velocity: M changes by its first order
_REST = 0.02  # [rad/s] over which Coulomb friction changes sign here


@dataclass(frozen=True)
class Seen:
    """One state: ``momentum``, ``beta``, ``gravity`` (n,), ``position`` (3,) [m] and ``rotation`` (3, 3) of the tool; distances
    ``scene`` and ``self`` [m] of the arm to obstacles and to itself."""

    momentum: np.ndarray
    beta: np.ndarray
    gravity: np.ndarray
    position: np.ndarray
    rotation: np.ndarray
    scene: float
    itself: float


class ArmWatch:
    """Evaluates the bundle's watch program.

    Args:
        bundle: checked.

    Errors:
        BundleError: where the program is none.
    """

    def __init__(self, bundle: Bundle) -> None:
        need("llvmlite", "deploy", "watching the arm")
        from mbctrl.kernels.llvm import words
        from mbctrl.kernels.native import Native

        try:
            data = bundle.rollout()["watch"]
            self._traced = Traced.from_dict(data["traced"])
            self._damping, self._friction = np.asarray(data["damping"], float), np.asarray(data["friction"], float)
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"no watch program: {error}", file=bundle.folder / ROLLOUT) from None
        self.n, program = bundle.robot.nq, self._traced.program
        self._native = Native(program, np.float64)
        self._width, self._size = self._native.lanes.width, program.states
        places = self._places()
        if places["self"].stop > self._size or len(self._damping) != self.n:
            raise BundleError(f"the watch program does not fit {self.n} joints", file=bundle.folder / ROLLOUT)
        self._at = places
        self._uniform = np.zeros(max(1, program.sizes["uniform"]))
        # Memory and job of each width that was asked for: making them costs more than the program.
        self._prepared: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]] = {}
        self._kept: list[np.ndarray] = []
        self._words, self._looks = words, _STEP * np.array([0.0, -1.0, 1.0])

    def _places(self) -> dict[str, slice]:
        sizes = dict(zip(OUTPUTS, (self.n, self.n, self.n, 3, 9, 1, 1)))
        ends = np.cumsum(list(sizes.values()))
        return {name: slice(int(end) - size, int(end)) for (name, size), end in zip(sizes.items(), ends)}

    def obstacles(self, positions: Sequence[np.ndarray]) -> None:
        """Set where the obstacles are, (3,) [m] each."""
        for name, place in self._traced.uniform.items():
            self._uniform[place] = positions[int(name.split(".")[1])]

    def _evaluate(self, states: np.ndarray) -> np.ndarray:
        """Return the outputs (size, k) at states (2 n, k), until the next call."""
        count = states.shape[1]
        width = -(-count // self._width) * self._width
        if width not in self._prepared:
            self._prepared[width] = self._prepare(width)
        start, out, words, job, address = self._prepared[width]
        start[: 2 * self.n, :count] = states
        start[: 2 * self.n, count:] = states[:, -1:]
        job[:] = words  # a run counts its blocks there
        self._native.run(address, 0)
        return out[1, :, :count]

    def _prepare(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Return start and outputs for ``width`` states, the job's words as they were at first, the job and its address."""
        start, out, commands = np.zeros((self._size, width)), np.empty((2, self._size, width)), np.zeros((1, 1, width))
        arrays = {"start": start, "states": out, "uniform": self._uniform, "commands": commands}
        pointers = {name: array.ctypes.data for name, array in arrays.items()}
        job = self._words(blocks=self._native.blocks(width), samples=width, steps=1, **pointers)
        self._kept.append(commands)  # the job knows its address only
        return start, out, job.copy(), job, job.ctypes.data

    def __call__(self, q: np.ndarray, v: np.ndarray) -> Seen:
        """Return what there is to see at joint positions ``q`` and velocities ``v`` (n,)."""
        states = np.empty((2 * self.n, 3))
        states[: self.n] = q[:, None] + v[:, None] * self._looks
        states[self.n :] = v[:, None]
        found, at = self._evaluate(states), self._at
        now, before, after = found[:, [0, 1, 2]].T
        # C' v = dM/dt v - C v, because dM/dt = C + C'.
        change = (after[at["momentum"]] - before[at["momentum"]]) * (0.5 / _STEP)
        friction = self._damping * v + self._friction * np.tanh(v * (1 / _REST))
        gravity = now[at["gravity"]]
        beta = change - now[at["bias"]] - gravity - friction
        rotation, scene, itself = now[at["rotation"]].reshape(3, 3), float(now[at["scene"].start]), float(now[at["self"].start])
        return Seen(now[at["momentum"]], beta, gravity, now[at["position"]], rotation, scene, itself)

    def clearance(self, q: np.ndarray) -> float:
        """Return the least distance [m] of the arm to obstacles and to itself over positions (T, n), T at most 32."""
        states = np.zeros((2 * self.n, len(q)))
        states[: self.n] = q.T
        found: Any = self._evaluate(states)
        return float(min(found[self._at["scene"]].min(), found[self._at["self"]].min()))

"""A planner's habit: a small network from what is measured and asked to a plan's knots, distilled from a planner's own plans.

Source: Nagabandi et al., "Neural Network Dynamics for Model-Based Deep Reinforcement Learning with Model-Free Fine-Tuning" (2018),
section V, where a policy imitates a model-based controller by DAgger (Ross, Gordon and Bagnell, "A Reduction of Imitation Learning
and Structured Prediction to No-Regret Online Learning", 2011). Here it gives a whole plan, so that the planner may begin with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import SpecError
from mbctrl.base.npz import read_arrays, write_arrays
from mbctrl.dynamics.residual import ACTIVATIONS
from mbctrl.planning.arrays import Array, like, namespace
from mbctrl.planning.chain import Chain
from mbctrl.planning.knots import Knots
from mbctrl.planning.planner import Parameters

FORMAT = 1
"""Version of the file's layout."""
_NEAR, _STRAIGHT = 0.01, 0.05
"""Distances [m] and entries of rotations below which a policy sees errors as they are; of larger ones it sees the logarithm, since
it has to tell 1 mm from 2 as well as 0.1 m from 0.2."""
_ARRAYS = ("input_mean", "input_scale", "output_mean", "output_scale", "low", "high")
_KNOTS = ("count", "steps", "dt", "interpolation", "at")


@dataclass(frozen=True)
class Asked:
    """What of its goal a policy sees: the goal's ``kind`` (and of which frame), whether it has a ``position``, a ``rotation``,
    ``joints``, and how many ``obstacles`` there are."""

    kind: str
    position: bool
    rotation: bool
    joints: bool
    obstacles: int


@dataclass(frozen=True)
class Sees:
    """From a state and what is asked to what a network sees: nothing that changes where a joint turns round once more.

    Args:
        revolute: which joints turn.
        reference: (nq,) of the joints [rad] or [m].
        chain: to the tool, or to the goal's object.
        asked: of the goal.
    """

    revolute: tuple[bool, ...]
    reference: np.ndarray
    chain: Chain
    asked: Asked

    @property
    def size(self) -> int:
        """How many inputs there are."""
        n, turning, asked = len(self.revolute), sum(self.revolute), self.asked
        return (1 + asked.joints) * (n + turning) + n + 6 * (asked.position + asked.rotation + asked.obstacles)

    def __call__(self, x: Array, parameters: Parameters) -> Array:
        """Return the inputs (inputs,) for state ``x`` (nx,).

        They are sines and cosines of joints that turn, positions of those that slide, speeds; how the target, and each obstacle,
        lies from the tool at the plan's beginning and end, in the world; by how much the first two columns of the rotation from
        the tool's to the target's at the end differ from none; and the joints' differences from theirs, encoded as they are.
        """
        n, asked = len(self.revolute), self.asked
        angle = x[:n] - like(self.reference, x)
        parts = [self._joints(angle), x[n:]]
        if asked.position or asked.obstacles:
            turn, at = self.chain.pose(angle)
        if asked.position:
            p = parameters.p_target
            parts += [at * 0, at * 0] if p is None else [_seen(p[:, 0, 0] - at, _NEAR), _seen(p[:, -1, 0] - at, _NEAR)]
        if asked.rotation:
            r = parameters.r_target
            off = turn.T @ (turn if r is None else r[:, :, -1, 0]) - like(np.eye(3), x)
            parts.append(_seen(off[:, :2].reshape(6), _STRAIGHT))
        if asked.joints:
            parts.append(self._joints(parameters.q_target - x[:n]))
        for obstacle in parameters.obstacles:
            parts += [_seen(obstacle[:, 0, 0] - at, _NEAR), _seen(obstacle[:, -1, 0] - at, _NEAR)]
        return namespace(x).concatenate(parts)

    def _joints(self, angle: Array) -> Array:
        module, n = namespace(angle), len(self.revolute)
        turning = [i for i in range(n) if self.revolute[i]]
        sliding = [i for i in range(n) if not self.revolute[i]]
        return module.concatenate((module.sin(angle[turning]), module.cos(angle[turning]), angle[sliding]))


def _seen(error: Array, near: float) -> Array:
    """Return errors on a scale that is even up to ``near`` and logarithmic beyond."""
    return namespace(error).arcsinh(error * (1 / near))


@dataclass(frozen=True)
class Policy:
    """A network and what it stands for.

    Args:
        layers: (W (out, in), b (out,)) of each, an activation after each but the last.
        activation: tanh, silu or relu.
        input_mean, input_scale: (inputs,) subtracted from, then divided out of, what it sees.
        output_mean, output_scale: (K nu,) of the knots [rad] or [N·m].
        low, high: (nu,) bounds of the command.
        follows: the joints whose positions knots are told from, of references; None: knots are torques.
        sees: its inputs.
        knots: of the plans.
        robot, joints: whose it is, its joints in order.
        seed: of the training.
        versions: of the programs that made it.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    activation: str
    input_mean: np.ndarray
    input_scale: np.ndarray
    output_mean: np.ndarray
    output_scale: np.ndarray
    low: np.ndarray
    high: np.ndarray
    follows: tuple[int, ...] | None
    sees: Sees
    knots: Knots
    robot: str
    joints: tuple[str, ...]
    seed: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, x: Array, parameters: Parameters) -> Array:
        """Return knots (K, nu) within their bounds for state ``x`` (nx,), in numpy or torch as ``x`` is."""
        y = (self.sees(x, parameters) - like(self.input_mean, x)) / like(self.input_scale, x)
        for k, (w, b) in enumerate(self.layers):
            y = like(w, x) @ y + like(b, x)
            y = self._activated(y) if k < len(self.layers) - 1 else y
        y = (y * like(self.output_scale, x) + like(self.output_mean, x)).reshape(self.knots.count, -1)
        if self.follows is not None:
            y = y + x[list(self.follows)]
        module = namespace(x)
        return module.minimum(module.maximum(y, like(self.low, x)), like(self.high, x))

    def _activated(self, y: Array) -> Array:
        module = namespace(y)
        if self.activation == "relu":
            return module.maximum(y, y * 0)
        return module.tanh(y) if self.activation == "tanh" else y * (0.5 * module.tanh(0.5 * y) + 0.5)

    def save(self, path: str | Path) -> None:
        """Write an .npz that holds numbers and names only; an earlier file stays until this one is whole."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        for k, (w, b) in enumerate(self.layers):
            arrays[f"w{k}"], arrays[f"b{k}"] = w, b
        more = {"activation": self.activation, "seed": self.seed, "versions": dict(self.versions)}
        write_arrays(path, _where(self) | more, arrays)


@dataclass(frozen=True)
class Place:
    """Where a policy is to be used: the robot's name and joints, its command's bounds (nu,), whether and after which joints its
    commands are references, what is seen, and the plans' knots."""

    robot: str
    joints: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    follows: tuple[int, ...] | None
    sees: Sees
    knots: Knots

    def policy(self, **trained: Any) -> Policy:
        """Return a policy for this place, of its network and normalisers."""
        return Policy(**trained, **{part.name: getattr(self, part.name) for part in fields(self)})


def _where(place: Place | Policy) -> dict[str, Any]:
    """Return what a file says of where its policy is to be used, in JSON's types."""
    return {
        "format": FORMAT,
        "robot": place.robot,
        "joints": list(place.joints),
        "goal": asdict(place.sees.asked),
        "knots": {key: getattr(place.knots, key) for key in _KNOTS},
        "references": place.follows is not None,
    }


def load_policy(path: str | Path, place: Place) -> Policy:
    """Load a policy.

    Errors:
        SpecError: for a file that is none, of another format, or of another arm, goal or planner than ``place``.
    """
    about, arrays = read_arrays(path, "policy")
    if "goal" not in about or "knots" not in about:
        raise SpecError("is no policy; mbctrl distil makes one", file=path)
    for key, value in _where(place).items():
        if about.get(key) != value:
            raise SpecError(f"expected {value}, found {about.get(key)}", file=path, key=key)
    if about.get("activation") not in ACTIVATIONS:
        raise SpecError(f"expected one of {', '.join(ACTIVATIONS)}, found '{about.get('activation')}'", file=path, key="activation")
    outputs = place.knots.count * len(place.low)
    _check_shapes(arrays, place.sees.size, outputs, len(place.low), path)
    for key in ("low", "high"):
        if not np.array_equal(arrays[key], getattr(place, key)):
            raise SpecError(f"expected {getattr(place, key).tolist()}, found {arrays[key].tolist()}", file=path, key=key)
    count = sum(name.startswith("w") for name in arrays)
    return place.policy(
        layers=tuple((arrays[f"w{k}"], arrays[f"b{k}"]) for k in range(count)),
        activation=about["activation"],
        **{name: arrays[name] for name in _ARRAYS if name not in ("low", "high")},
        seed=int(about.get("seed", 0)),
        versions=dict(about.get("versions", {})),
    )


def _check_shapes(arrays: dict[str, np.ndarray], inputs: int, outputs: int, commands: int, path: str | Path) -> None:
    sizes = dict(zip(_ARRAYS, (inputs, inputs, outputs, outputs, commands, commands)))
    count = sum(name.startswith("w") for name in arrays)
    names = {*sizes, *(f"{kind}{k}" for kind in "wb" for k in range(count))}
    if set(arrays) != names or not count:
        raise SpecError(f"expected arrays {sorted(names)}, found {sorted(arrays)}", file=path)
    for key, size in sizes.items():
        if arrays[key].shape != (size,) or (key.endswith("scale") and not (arrays[key] > 0).all()):
            raise SpecError(f"expected {size} numbers, scales above 0, found {arrays[key].tolist()}", file=path, key=key)
    before = inputs
    for k in range(count):
        w, b = arrays[f"w{k}"], arrays[f"b{k}"]
        after = outputs if k == count - 1 else (len(w) if w.ndim == 2 else 0)
        if w.shape != (after, before) or b.shape != (after,):
            raise SpecError(f"expected ({after}, {before}) and ({after},), found {w.shape} and {b.shape}", file=path, key=f"w{k}")
        before = after

"""A learned residual as data: an ensemble of small networks, gated by the distance to contact surfaces; numpy only.

With state x = [q, v], command u and the analytic step f, ``v' = v'_f + g S mean_e r_e(e(x, u))`` and ``q' = q'_f + h g S …``: what
is learned is the velocity the physics missed, which integrates into position, so that it never tears q from v. e encodes every
angle as sine and cosine. g is 1 at contact and exactly 0 farther away than ``far``, where the physics is all there is.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from mbctrl.base.errors import SpecError
from mbctrl.base.scene import Obstacle
from mbctrl.base.spec import Spec, validate

ACTIVATIONS = ("tanh", "silu", "relu")
_PARTS = ("input_mean", "input_scale", "output_scale", "near", "far", "dt")


class Surfaces(Spec):
    """Where contact is expected: shapes that stand still."""

    surfaces: tuple[Obstacle, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Residual:
    """An ensemble and its gate.

    Args:
        layers: (W (E, out, in), b (E, out)) of each layer, an activation after each but the last; inputs are
            [sin, cos of each revolute joint; q of each prismatic; v; u minus the commanded joints' q], outputs (nv,).
        activation: tanh, silu or relu.
        input_mean, input_scale: (inputs,) subtracted from, then divided out of, the inputs.
        output_scale: (nv,) S [rad/s].
        surfaces: what the gate measures the distance of the tool's capsules to.
        near, far: g is 1 up to ``near`` [m] and 0 from ``far`` [m] on, smooth between.
        dt: the time step [s] it was fitted for; another one scales with it.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    activation: str
    input_mean: np.ndarray
    input_scale: np.ndarray
    output_scale: np.ndarray
    surfaces: tuple[Obstacle, ...]
    near: float
    far: float
    dt: float

    @property
    def members(self) -> int:
        """How many networks there are, E."""
        return len(self.layers[0][0])

    def folded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the layers with the normalisers inside the first and S over E inside the last: what is evaluated."""
        layers = [(w.astype(float), b.astype(float)) for w, b in self.layers]
        w, b = layers[0]
        w = w / self.input_scale
        layers[0] = w, b - w @ self.input_mean
        w, b = layers[-1]
        scale = self.output_scale / self.members
        layers[-1] = w * scale[:, None], b * scale
        return layers

    def save(self, path: str | Path) -> None:
        """Write an .npz that holds numbers and names only."""
        arrays: dict[str, Any] = {name: np.asarray(getattr(self, name)) for name in _PARTS}
        for k, (w, b) in enumerate(self.layers):
            arrays[f"w{k}"], arrays[f"b{k}"] = w, b
        surfaces = Surfaces(surfaces=self.surfaces).model_dump_json()
        data = io.BytesIO()
        np.savez_compressed(data, activation=np.array(self.activation), surfaces=np.array(surfaces), **arrays)
        Path(path).write_bytes(data.getvalue())


def load_residual(path: str | Path, joints: tuple[bool, ...], commands: int) -> Residual:
    """Load a residual for an arm whose joints are revolute or not, with so many commands.

    Errors:
        SpecError: for a file that is none, or of another arm.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            count = sum(name.startswith("w") for name in data.files)
            layers = tuple((data[f"w{k}"], data[f"b{k}"]) for k in range(count))
            parts = {name: data[name] for name in _PARTS}
            activation, text = str(data["activation"]), str(data["surfaces"])
    except (OSError, ValueError, KeyError) as error:
        raise SpecError(f"is no residual: {error}", file=path) from None
    import json

    surfaces = validate(Surfaces, json.loads(text), path).surfaces
    n = len(joints)
    inputs = 2 * sum(joints) + (n - sum(joints)) + n + commands
    found = (layers[0][0].shape[-1] if layers else 0, layers[-1][0].shape[1] if layers else 0)
    if found != (inputs, n) or activation not in ACTIVATIONS:
        raise SpecError(f"expected {inputs} inputs, {n} outputs and one of {', '.join(ACTIVATIONS)}, found {found}", file=path)
    if not all(np.isfinite(part).all() for layer in layers for part in layer):
        raise SpecError("holds numbers that are not finite", file=path)
    scalars = {name: float(parts[name]) for name in ("near", "far", "dt")}
    arrays = {name: parts[name].astype(float) for name in ("input_mean", "input_scale", "output_scale")}
    return Residual(layers, activation, surfaces=surfaces, **arrays, **scalars)

"""Unit-variance noise over knots: white, coloured, low-discrepancy; every draw from an explicit seed and its number."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mbctrl.planning.arrays import tensor
from mbctrl.planning.white import colouring, normals, uniforms

NOISES = ("white", "coloured", "halton", "sobol")


@dataclass(frozen=True)
class Shape:
    """Knots K, commands nu and samples N of a draw."""

    knots: int
    commands: int
    samples: int


class Noise:
    """Draws (K, nu, N) standard normals.

    White noise is counter-based: number m of sample n in draw d is a function of (m, n, d) and the seed, so that
    compiled kernels draw the same numbers in whatever order. Coloured noise has a power spectrum f^-beta along the knots
    (Timmer and Koenig, "On generating power law noise", 1995), each knot at unit variance. Halton and Sobol points are
    drawn once and turned by a random rotation modulo one at each call (Cranley and Patterson 1976), which keeps their
    spread and makes calls independent.

    Args:
        kind: one of NOISES.
        shape: what is drawn.
        beta: the colour's exponent; 0 is white.
        dtype, device: of the draws.

    Attributes:
        counted: whether draws are the counter-based ones.
        colour: (K, K) rows that colour white noise, or None.
    """

    def __init__(
        self,
        kind: str,
        shape: Shape,
        beta: float = 2.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if kind not in NOISES:
            raise ValueError(f"unknown noise {kind!r}; known: {', '.join(NOISES)}")
        self._size = (shape.knots, shape.commands, shape.samples)
        self._like = {"dtype": dtype, "device": torch.device(device)}
        self.colour: Tensor | None = None
        self.counted = kind in ("white", "coloured")
        if kind == "coloured":
            self.colour = torch.as_tensor(colouring(shape.knots, beta), **self._like)
        if not self.counted:
            self._points = torch.as_tensor(_points(kind, shape), **self._like).view(self._size)

    def draw(self, seed: int, draw: int = 0) -> Tensor:
        """Return the (K, nu, N) draw number ``draw`` of ``seed``."""
        knots, commands, samples = self._size
        kind = np.float64 if self._like["dtype"] == torch.float64 else np.float32
        if not self.counted:
            turn = tensor(uniforms(seed, draw, knots * commands, 1, kind), **self._like).view(knots, commands, 1)
            return torch.special.ndtri(((self._points + turn) % 1.0).clamp(1e-6, 1 - 1e-6))
        white = tensor(normals(seed, draw, knots * commands, samples, kind), **self._like)
        return (white if self.colour is None else self.colour @ white.view(knots, -1)).view(self._size)


def _points(kind: str, shape: Shape) -> np.ndarray:
    """Return (K * nu, N) points of a low-discrepancy sequence in the unit cube."""
    dimension = shape.knots * shape.commands
    if kind == "halton":
        from scipy.stats import qmc  # half a second to import, and only this noise needs it

        return qmc.Halton(dimension, scramble=True, seed=0).random(shape.samples).T
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=0)
    return engine.draw(shape.samples, dtype=torch.float64).numpy().T

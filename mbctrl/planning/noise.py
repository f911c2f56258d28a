"""Unit-variance noise over knots: white, coloured, low-discrepancy; every draw from an explicit seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOISES = ("white", "coloured", "halton", "sobol")


@dataclass(frozen=True)
class Shape:
    """Knots K, commands nu and samples N of a draw."""

    knots: int
    commands: int
    samples: int


class Noise:
    """Draws (K, nu, N) standard normals.

    Coloured noise has a power spectrum f^-beta along the knots (Timmer and Koenig, "On generating power law noise",
    1995), each knot at unit variance. Halton and Sobol points are drawn once and turned by a random rotation modulo
    one at each call (Cranley and Patterson 1976), which keeps their spread and makes calls independent.

    Args:
        kind: one of NOISES.
        shape: what is drawn.
        beta: the colour's exponent; 0 is white.
        dtype, device: of the draws.
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
        self._colour: Tensor | None = None
        self._points: Tensor | None = None
        if kind == "coloured":
            self._colour = torch.as_tensor(_colouring(shape.knots, beta), **self._like)
        if kind in ("halton", "sobol"):
            self._points = torch.as_tensor(_points(kind, shape), **self._like).view(self._size)

    def draw(self, seed: int) -> Tensor:
        """Return the (K, nu, N) draw that belongs to ``seed``."""
        generator = torch.Generator(self._like["device"]).manual_seed(seed)
        if self._points is None:
            white = torch.randn(self._size, generator=generator, **self._like)
            return white if self._colour is None else (self._colour @ white.flatten(1)).view(self._size)
        turn = torch.rand((*self._size[:2], 1), generator=generator, **self._like)
        return torch.special.ndtri(((self._points + turn) % 1.0).clamp(1e-6, 1 - 1e-6))


def _colouring(knots: int, beta: float) -> np.ndarray:
    """Return the (K, K) matrix that colours white noise: the circulant with amplitude f^(-beta/2), unit row norm."""
    # Twice the length, cut: the ends of the horizon must not be neighbours.
    frequency = np.maximum(np.fft.rfftfreq(2 * knots), 1 / (2 * knots))
    kernel = np.fft.irfft(frequency ** (-beta / 2), 2 * knots)
    covariance = np.array([[np.roll(kernel, i) @ np.roll(kernel, j) for j in range(knots)] for i in range(knots)])
    return np.linalg.cholesky(covariance / covariance[0, 0] + 1e-9 * np.eye(knots))


def _points(kind: str, shape: Shape) -> np.ndarray:
    """Return (K * nu, N) points of a low-discrepancy sequence in the unit cube."""
    dimension = shape.knots * shape.commands
    if kind == "halton":
        from scipy.stats import qmc  # half a second to import, and only this noise needs it

        return qmc.Halton(dimension, scramble=True, seed=0).random(shape.samples).T
    engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=0)
    return engine.draw(shape.samples, dtype=torch.float64).numpy().T

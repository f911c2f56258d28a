"""Unit-variance noise over knots: white, coloured, low-discrepancy; every draw from an explicit seed and its number."""

from __future__ import annotations

import math
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
        self._shape = shape
        self._size = (shape.knots, shape.commands, shape.samples)
        self._like = {"dtype": dtype, "device": torch.device(device)}
        self.colour: Tensor | None = None
        self.counted = kind in ("white", "coloured")
        if kind == "coloured":
            self.colour = torch.as_tensor(_colouring(shape.knots, beta), **self._like)
        if not self.counted:
            self._points = torch.as_tensor(_points(kind, shape), **self._like).view(self._size)

    def draw(self, seed: int, draw: int = 0) -> Tensor:
        """Return the (K, nu, N) draw number ``draw`` of ``seed``."""
        if not self.counted:
            turn = uniforms(seed, draw, self._shape.knots * self._shape.commands, 1, **self._like).view(*self._size[:2], 1)
            return torch.special.ndtri(((self._points + turn) % 1.0).clamp(1e-6, 1 - 1e-6))
        white = normals(seed, draw, self._shape.knots * self._shape.commands, self._shape.samples, **self._like)
        return (white if self.colour is None else self.colour @ white.view(self._shape.knots, -1)).view(self._size)


def normals(seed: int, draw: int, rows: int, samples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (rows, samples) standard normals: Philox bits through Box and Muller's transform (1958)."""
    a, b, c, d = philox(seed, draw, -(-rows // 4), samples, device)
    pairs = []
    for radius_bits, angle_bits in ((a, b), (c, d)):
        share = radius_bits.to(dtype) * 2.0**-32 + 2.0**-33
        radius = torch.sqrt(-2 * torch.log(share))
        signed = torch.where(angle_bits < 2**31, angle_bits, angle_bits - 2**32)
        angle = signed.to(dtype) * (math.pi * 2.0**-31)
        pairs += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(pairs, 1).reshape(-1, samples)[:rows]


def uniforms(seed: int, draw: int, rows: int, samples: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return (rows, samples) numbers uniform in [0, 1)."""
    bits = torch.stack(philox(seed, draw, -(-rows // 4), samples, device), 1).reshape(-1, samples)[:rows]
    return (bits >> 8).to(dtype) * 2.0**-24


def philox(seed: int, draw: int, groups: int, samples: int, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """Return four (groups, samples) int64 tensors of 32 random bits: Philox 4x32 with ten rounds.

    The counter is (sample, group, draw, 0), the key the seed's two halves. Source: Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 0xFFFFFFFF
    c0 = torch.arange(samples, device=device).expand(groups, -1)
    c1 = torch.arange(groups, device=device)[:, None].expand(-1, samples)
    c2, c3 = torch.full_like(c0, draw & low), torch.zeros_like(c0)
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        # The product of two 32-bit numbers wraps an int64's sign, which leaves its 64 bits as they should be.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32 & low) ^ c1 ^ k0, second & low, (first >> 32 & low) ^ c3 ^ k1, first & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


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

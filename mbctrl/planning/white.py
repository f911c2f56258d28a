"""White noise by counter, and the matrix that colours it: numpy's, the same numbers compiled kernels draw."""

from __future__ import annotations

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def normals(seed: int, draw: int, rows: int, samples: int, dtype: type = np.float32) -> np.ndarray:
    """Return (rows, samples) standard normals: Philox bits through Box and Muller's transform (1958)."""
    a, b, c, d = philox(seed, draw, -(-rows // 4), samples)
    kind, pairs = np.dtype(dtype).type, []
    for radius_bits, angle_bits in ((a, b), (c, d)):
        share = radius_bits.astype(kind) * kind(2.0**-32) + kind(2.0**-33)
        radius = np.sqrt(-2 * np.log(share))
        angle = angle_bits.astype(np.uint32).view(np.int32).astype(kind) * kind(np.pi * 2.0**-31)
        pairs += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.stack(pairs, 1).reshape(-1, samples)[:rows]


def uniforms(seed: int, draw: int, rows: int, samples: int, dtype: type = np.float32) -> np.ndarray:
    """Return (rows, samples) numbers uniform in [0, 1)."""
    bits = np.stack(philox(seed, draw, -(-rows // 4), samples), 1).reshape(-1, samples)[:rows]
    return (bits >> np.uint64(8)).astype(dtype) * np.dtype(dtype).type(2.0**-24)


def philox(seed: int, draw: int, groups: int, samples: int) -> tuple[np.ndarray, ...]:
    """Return four (groups, samples) uint64 arrays of 32 random bits: Philox 4x32 with ten rounds.

    The counter is (sample, group, draw, 0), the key the seed's two halves. Source: Salmon, Moraes, Dror and Shaw,
    "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    c0 = np.broadcast_to(np.arange(samples, dtype=np.uint64), (groups, samples))
    c1 = np.broadcast_to(np.arange(groups, dtype=np.uint64)[:, None], (groups, samples))
    c2, c3 = np.full_like(c0, draw & 0xFFFFFFFF), np.zeros_like(c0)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (second >> _HALF) ^ c1 ^ np.uint64(k0),
            second & _LOW,
            (first >> _HALF) ^ c3 ^ np.uint64(k1),
            first & _LOW,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c0, c1, c2, c3


def colouring(knots: int, beta: float) -> np.ndarray:
    """Return the (K, K) matrix that colours white noise along K knots: spectrum f^-beta, unit row norm.

    It is a root of the circulant covariance with amplitude f^(-beta / 2). Source: Timmer and Koenig, "On generating power
    law noise" (1995).
    """
    # Twice the length, cut: the ends of the horizon must not be neighbours.
    frequency = np.maximum(np.fft.rfftfreq(2 * knots), 1 / (2 * knots))
    kernel = np.fft.irfft(frequency ** (-beta / 2), 2 * knots)
    covariance = np.array([[np.roll(kernel, i) @ np.roll(kernel, j) for j in range(knots)] for i in range(knots)])
    return np.linalg.cholesky(covariance / covariance[0, 0] + 1e-9 * np.eye(knots))

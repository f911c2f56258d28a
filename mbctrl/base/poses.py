"""Rotations as plain numpy: roll-pitch-yaw, quaternions and angles between."""

from __future__ import annotations

import math

import numpy as np


def rotation_from_rpy(rpy: np.ndarray) -> np.ndarray:
    """Return the (3, 3) rotation of roll, pitch, yaw [rad], (3,): R = Rz(yaw) Ry(pitch) Rx(roll), URDF's convention."""
    (cr, cp, cy), (sr, sp, sy) = np.cos(rpy), np.sin(rpy)
    return np.array(
        [
            [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
            [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
            [-sp, cp * sr, cp * cr],
        ]
    )


def rotation_from_quaternion(quaternion: np.ndarray) -> np.ndarray:
    """Return the (3, 3) rotation of a unit quaternion (w, x, y, z), (4,)."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def quaternion_from_rotation(rotation: np.ndarray) -> np.ndarray:
    """Return the unit quaternion (w, x, y, z) of a (3, 3) rotation, w >= 0.

    Source: Shepperd, "Quaternion from rotation matrix" (1978): divide by the largest component.
    """
    (a, b, c), (d, e, f), (g, h, i) = np.asarray(rotation, float).tolist()
    squares = (a + e + i, a - e - i, e - a - i, i - a - e)  # 4 w² - 1, 4 x² - 1, …
    largest = max(range(4), key=squares.__getitem__)
    twice = math.sqrt(max(1.0 + squares[largest], 0.0))
    rest = (
        (twice**2, h - f, c - g, d - b),
        (h - f, twice**2, b + d, c + g),
        (c - g, b + d, twice**2, f + h),
        (d - b, c + g, f + h, twice**2),
    )[largest]
    quaternion = np.array(rest) * (0.5 / twice)
    return -quaternion if quaternion[0] < 0 else quaternion


def align_z(axis: np.ndarray) -> np.ndarray:
    """Return a (3, 3) rotation whose third column is ``axis`` (unit)."""
    if axis[2] > 1 - 1e-12:
        return np.eye(3)
    helper = np.eye(3)[np.argmin(np.abs(axis))]
    x = np.cross(helper, axis)
    x /= np.linalg.norm(x)
    return np.stack([x, np.cross(axis, x), axis], axis=1)


def angle_between(a: np.ndarray, b: np.ndarray) -> float:
    """Return the angle [rad] of the rotation from ``a`` to ``b``, each (3, 3); accurate near 0 and near pi."""
    delta = a.T @ b
    sine = np.array([delta[2, 1] - delta[1, 2], delta[0, 2] - delta[2, 0], delta[1, 0] - delta[0, 1]])
    return float(np.arctan2(np.linalg.norm(sine), np.trace(delta) - 1))

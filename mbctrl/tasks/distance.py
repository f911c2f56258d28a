"""Signed distances from capsules to spheres, boxes and planes; vectors are indexed by component, [0], [1], [2].

Trailing shapes broadcast, so one call serves all capsules and samples. Source: Ericson, "Real-Time Collision
Detection" (2005), section 5.1, for the closest point on a segment.
"""

from __future__ import annotations

from typing import Any

from mbctrl.tasks.algebra import absolute, clip01, dot, maximum, minimum, positive, sqrt

_TINY = 1e-12  # keeps the square root differentiable at zero and a point capsule's division defined


def _difference(a: Any, b: Any) -> list[Any]:
    return [a[i] - b[i] for i in range(3)]


def capsule_sphere(a: Any, b: Any, radius: Any, center: Any, size: Any) -> Any:
    """Return the distance [m] of capsule (``a``, ``b``, ``radius``) from the sphere at ``center`` of radius ``size``."""
    along, reach = _difference(b, a), _difference(center, a)
    part = clip01(dot(reach, along) / (dot(along, along) + _TINY))
    gap = [reach[i] - part * along[i] for i in range(3)]
    return sqrt(dot(gap, gap) + _TINY) - radius - size


def capsule_plane(a: Any, b: Any, radius: Any, point: Any, normal: Any) -> Any:
    """Return the height [m] of capsule (``a``, ``b``, ``radius``) over the plane through ``point`` with unit ``normal``."""
    return minimum(dot(_difference(a, point), normal), dot(_difference(b, point), normal)) - radius


def capsule_box(a: Any, b: Any, radius: Any, center: Any, half: Any, points: int = 5) -> Any:
    """Return the distance [m] of a capsule from an axis-aligned box of half lengths ``half``, never too large.

    The capsule is covered by ``points`` (at least 2) spheres from end to end, each grown to cover halfway to the next,
    so the figure is at most ``sqrt(r² + (length / (2 (points - 1)))²) - r`` too small. Where the two overlap it is
    negative, but may say less than the full depth.
    """
    along = _difference(b, a)
    cover = sqrt(radius * radius + dot(along, along) / (4.0 * (points - 1) ** 2))
    nearest = None
    for k in range(points):
        part = k / (points - 1)
        out = [absolute(a[i] + part * along[i] - center[i]) - half[i] for i in range(3)]
        beyond = [positive(value) for value in out]
        inside = minimum(maximum(maximum(out[0], out[1]), out[2]), 0.0 * out[0])
        distance = sqrt(dot(beyond, beyond) + _TINY) + inside
        nearest = distance if nearest is None else minimum(nearest, distance)
    return nearest - cover


def capsule_obstacle(a: Any, b: Any, radius: Any, obstacle: Any, center: Any = None) -> Any:
    """Return the distance [m] of a capsule from an ``mbctrl.base.scene.Obstacle``, where it stands or at ``center`` (3,)."""
    center = [float(x) for x in obstacle.position] if center is None else center
    if obstacle.shape == "sphere":
        return capsule_sphere(a, b, radius, center, float(obstacle.size[0]))
    if obstacle.shape == "box":
        return capsule_box(a, b, radius, center, [float(size) for size in obstacle.size])
    return capsule_plane(a, b, radius, center, [float(x) for x in obstacle.normal])


def capsule_capsule(a: Any, b: Any, radius: Any, c: Any, d: Any, other: Any) -> Any:
    """Return the distance [m] of capsule (``a``, ``b``, ``radius``) from capsule (``c``, ``d``, ``other``), never too small.

    The nearer of four candidates: the segments' common normal cut to both, and from each end the other segment's nearest
    point. Source: Ericson (2005), section 5.1.9; exact but for crossings of nearly parallel segments, where the ends decide.
    """
    u, w, r = _difference(b, a), _difference(d, c), _difference(a, c)
    uu, ww, uw, ur, wr = dot(u, u) + _TINY, dot(w, w) + _TINY, dot(u, w), dot(u, r), dot(w, r)
    s = clip01((uw * wr - ur * ww) / (uu * ww - uw * uw + _TINY))
    t = clip01((uw * s + wr) / ww)
    s = clip01((uw * t - ur) / uu)
    gap = [r[i] + s * u[i] - t * w[i] for i in range(3)]
    nearest = dot(gap, gap)
    for point, start, along, square in ((a, c, w, ww), (b, c, w, ww), (c, a, u, uu), (d, a, u, uu)):
        reach = _difference(point, start)
        part = clip01(dot(reach, along) / square)
        gap = [reach[i] - part * along[i] for i in range(3)]
        nearest = minimum(nearest, dot(gap, gap))
    return sqrt(nearest + _TINY) - radius - other

"""How near an arm comes to itself, to its base and to the floor, with gradients, by MuJoCo's own distances."""

from __future__ import annotations

from collections import defaultdict

import mujoco
import numpy as np

from mbctrl.dynamics.load import Model

_COLLISION_GROUP = 3
_FLOOR = "floor"
_BASE = "base"
_ROUND = (int(mujoco.mjtGeom.mjGEOM_SPHERE), int(mujoco.mjtGeom.mjGEOM_CAPSULE))


class Clearance:
    """Distances of an arm's links from each other, from what does not move and from the floor ``z = 0``.

    Geoms are those of MuJoCo's group 3, of moving bodies and of bodies that do not move each, and all of them where it has
    none; planes are left out. Links joined by a joint are not compared, nor pairs that stay nearer than ``required``, or as
    near as they are, wherever the joints go: these are in ``unavoidable``.

    Args:
        model: the arm.
        required: the least distance wanted [m].
        floor: compare with the floor.
        seed: of the random poses that tell what is unavoidable.
    """

    def __init__(self, model: Model, required: float, *, floor: bool = True, seed: int = 0) -> None:
        self.mj, self.tree, self.required = model.mj, model.tree, required
        self.reach = required + 0.06  # [m] beyond this a distance is not computed
        self._data = mujoco.MjData(self.mj)
        self._moves = _moves(self.mj)
        self._geoms = _collision_geoms(self.mj, self._moves)
        every = _pairs(self.mj, self._moves, self._geoms, floor)
        self._choose(every)
        limits, rng = model.robot.limits, np.random.default_rng(seed)
        poses = rng.uniform(limits.position_lower, limits.position_upper, (200, self.tree.n))
        distance = self.distances(poses)[0]
        low, high = distance.min(axis=0), distance.max(axis=0)
        stuck = (high < self.reach) & ((high < required) | (high - low < 2e-3))
        self.unavoidable = tuple(name for name, tight in zip(self.names, stuck) if tight)
        self._choose({name: pairs for name, pairs in every.items() if name not in self.unavoidable})

    def _choose(self, pairs: dict[str, list[tuple[int, int]]]) -> None:
        self.names = tuple(pairs)
        flat = [(a, b, i) for i, group in enumerate(pairs.values()) for a, b in group]
        self._a, self._b, self._owner = (np.array(column, int) for column in (zip(*flat) if flat else ((), (), ())))
        bodies = self.mj.geom_bodyid
        self._bodies = np.stack([bodies[self._a], np.where(self._b < 0, 0, bodies[self._b])], axis=1)  # the floor is the world's

    def distances(self, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return distances (T, P) [m] of the P pairs ``names``, at most ``reach``, and their gradients (T, P, n) [m/rad].

        Args:
            q: (T, n) joint positions [rad].
        """
        mj, data, n = self.mj, self._data, self.tree.n
        out = np.full((len(q), len(self.names)), self.reach)
        ends = np.zeros((*out.shape, 2, 3))  # the nearest point of either geom
        bodies = np.zeros((*out.shape, 2), int)
        axis, anchor = np.empty((len(q), n, 3)), np.empty((len(q), n, 3))
        for t, pose in enumerate(q):
            data.qpos[mj.jnt_qposadr] = pose
            mujoco.mj_kinematics(mj, data)
            axis[t], anchor[t] = data.xaxis, data.xanchor
            for k in np.flatnonzero(self._gaps() < self.reach):
                owner = self._owner[k]
                distance, points = self._distance(self._a[k], self._b[k], out[t, owner])
                if distance < out[t, owner]:
                    out[t, owner], ends[t, owner] = distance, points
                    bodies[t, owner] = self._bodies[k]
        return out, self._slopes(out, ends, bodies, axis, anchor)

    def lowest(self, q: np.ndarray) -> tuple[float, str]:
        """Return the smallest distance [m] along q (T, n), at most ``reach``, and the pair that has it."""
        if not self.names:
            return self.reach, "nothing to compare"
        least = self.distances(q)[0].min(axis=0)
        return float(least.min()), self.names[int(least.argmin())]

    def _gaps(self) -> np.ndarray:
        """Return distances (P,) between bounding spheres, and of bounding spheres from the floor [m]."""
        place, radius = self._data.geom_xpos, self.mj.geom_rbound
        between = np.linalg.norm(place[self._a] - place[self._b], axis=1) - radius[self._a] - radius[self._b]
        return np.where(self._b < 0, place[self._a, 2] - radius[self._a], between)

    def _distance(self, a: int, b: int, bound: float) -> tuple[float, np.ndarray]:
        """Return the distance of two geoms, at most ``bound``, and the point of each that is nearest (2, 3)."""
        if b < 0:
            point = _lowest_point(self.mj, self._data, a)
            return float(point[2]), np.stack([point, point * [1, 1, 0]])
        ends = np.zeros(6)
        return mujoco.mj_geomDistance(self.mj, self._data, a, b, bound, ends), ends.reshape(2, 3)

    def _slopes(
        self, distance: np.ndarray, ends: np.ndarray, bodies: np.ndarray, axis: np.ndarray, anchor: np.ndarray
    ) -> np.ndarray:
        """Return the distances' gradients (T, P, n): how fast each joint moves the nearest points apart."""
        slope = np.zeros((*distance.shape, self.tree.n))
        t, pair = np.nonzero((distance < self.reach) & (np.abs(distance) > 1e-9))
        near, far = ends[t, pair, 0], ends[t, pair, 1]
        normal = (far - near) / distance[t, pair, None]
        hinge = self.mj.jnt_type == mujoco.mjtJoint.mjJNT_HINGE
        for point, body, sign in ((far, bodies[t, pair, 1], 1.0), (near, bodies[t, pair, 0], -1.0)):
            turning = np.cross(axis[t], point[:, None] - anchor[t])
            velocity = np.where(hinge[:, None], turning, axis[t]) * self._moves[body][:, :, None]
            slope[t, pair] += sign * np.einsum("kc,kjc->kj", normal, velocity)
        return slope


def _moves(mj: mujoco.MjModel) -> np.ndarray:
    """Return (nbody, njnt): whether the joint moves the body."""
    moves = np.zeros((mj.nbody, mj.njnt), bool)
    for b in range(1, mj.nbody):
        moves[b] = moves[mj.body_parentid[b]]
        moves[b, mj.body_jntadr[b] : mj.body_jntadr[b] + mj.body_jntnum[b]] = True
    return moves


def _collision_geoms(mj: mujoco.MjModel, moves: np.ndarray) -> list[int]:
    solid = [g for g in range(mj.ngeom) if mj.geom_type[g] not in (mujoco.mjtGeom.mjGEOM_PLANE, mujoco.mjtGeom.mjGEOM_HFIELD)]
    chosen = []
    for moving in (True, False):
        group = [g for g in solid if moves[mj.geom_bodyid[g]].any() == moving]
        chosen += [g for g in group if mj.geom_group[g] == _COLLISION_GROUP] or group
    return chosen


def _pairs(mj: mujoco.MjModel, moves: np.ndarray, geoms: list[int], floor: bool) -> dict[str, list[tuple[int, int]]]:
    """Return the geom pairs of each pair of links, -1 for the floor; a link is named by its joint."""
    # Joints come parents before children, so a body's link is the last joint that moves it.
    links = {g: int(np.flatnonzero(moves[mj.geom_bodyid[g]])[-1]) if moves[mj.geom_bodyid[g]].any() else -1 for g in geoms}
    parent = {
        j: int(np.flatnonzero(moves[mj.jnt_bodyid[j]])[-2]) if moves[mj.jnt_bodyid[j]].sum() > 1 else -1 for j in range(mj.njnt)
    }
    name = [mj.joint(j).name for j in range(mj.njnt)]
    pairs: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for g in geoms:
        for h in geoms:
            i, j = links[g], links[h]
            if i > j and parent[i] != j:
                pairs[f"{name[i]} and {name[j] if j >= 0 else _BASE}"].append((g, h))
        if floor and links[g] >= 0:
            pairs[f"{name[links[g]]} and {_FLOOR}"].append((g, -1))
    return dict(pairs)


def _lowest_point(mj: mujoco.MjModel, data: mujoco.MjData, g: int) -> np.ndarray:
    """Return the lowest point (3,) of a sphere or capsule, or of the box around another geom."""
    rotation = data.geom_xmat[g].reshape(3, 3)
    down = -np.sign(rotation[2])
    if mj.geom_type[g] in _ROUND:
        half = mj.geom_size[g, 1] if mj.geom_type[g] == mujoco.mjtGeom.mjGEOM_CAPSULE else 0.0
        return data.geom_xpos[g] + rotation[:, 2] * down[2] * half - [0.0, 0.0, mj.geom_size[g, 0]]
    return data.geom_xpos[g] + rotation @ (mj.geom_aabb[g, :3] + down * mj.geom_aabb[g, 3:])

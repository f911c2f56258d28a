"""Base parameters: the fewest numbers that determine an arm's joint torques, and how the others group into them."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from scipy.linalg import qr, solve_triangular

from mbctrl.base.errors import ModelError
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters
from mbctrl.dynamics.tree import RigidTree

INERTIAL = ("m", "mx", "my", "mz", "Ixx", "Ixy", "Iyy", "Ixz", "Iyz", "Izz")
"""The ten parameters of a link in the regressor's order, in its joint's frame, inertia about that frame's origin."""
_UNITS = {"m": "kg", "mx": "kg·m", "my": "kg·m", "mz": "kg·m", "viscous": "N·m·s/rad", "coulomb": "N·m"}

Extra = Literal["armature", "viscous", "coulomb"]
EXTRAS: tuple[Extra, ...] = get_args(Extra)

# Columns are scaled to length one first. Dependent ones then leave 1e-13 or less of themselves, independent ones of the
# shipped arms more than 1e-3; a distance between joint axes of a micrometre would count as none.
TOLERANCE = 1e-8

# Which columns are kept where there is a choice: those that Khalil and Kleinfinger's rules keep on every link, the last link
# first, then rotors, then the three that go to the link before: of a joint that turns about z its mass, mz and Iyy.
_KEPT = ("mx", "my", "Ixx", "Ixy", "Ixz", "Iyz", "Izz")
_GROUPED = ("Iyy", "mz", "m")


class BaseParameters:
    """The base parameters of a tree's joint torques: ``W(q, v, a) @ full == W[..., columns] @ base`` for every state.

    The full vector holds ten parameters a link (``INERTIAL``), then one block of n for each of ``extras`` in the order
    given: rotor inertia (torque ``a``), viscous friction (``v``) and Coulomb friction (``sign(v)``), all at the joint.
    Independent columns are found on a regressor over random states: its rank by QR with column pivoting, then QR in a fixed
    order of preference, so that the choice does not hang on the draw. Sources: Gautier, "Numerical calculation of the base
    inertial parameters of robots" (1991); Khalil and Kleinfinger, "Minimum operations and minimum parameters of the dynamic
    models of tree structure robots" (1987).

    Args:
        tree: the arm, n joints.
        extras: which parameters besides the links'.
        tolerance: share of a column's length that must remain beside the columns kept for it to count as independent.
        seed: of the random states.

    Attributes:
        names: of the full parameters, ``joint.kind``, p of them.
        units: SI units of the full parameters.
        columns: indices of the b independent columns, rising.
        map: (b, p); base = map @ full.

    Errors:
        ModelError: where the two factorisations disagree on the rank.
    """

    def __init__(
        self, tree: RigidTree, extras: tuple[Extra, ...] = ("armature",), *, tolerance: float = TOLERANCE, seed: int = 0
    ) -> None:
        self.tree, self.extras, self.tolerance = tree, tuple(extras), tolerance
        self.reference = ReferenceDynamics(tree)
        self.names = full_names(tree, self.extras)
        self.units = tuple(unit(tree, name) for name in self.names)
        rng = np.random.default_rng(seed)
        states = 4 * len(self.names) // tree.n + 10
        q, v, a = rng.uniform(-np.pi, np.pi, (3, states, tree.n))
        stacked = self.regressor(q, v, a).reshape(-1, len(self.names))
        self.columns, self.map = _independent(stacked, self._preference(), tolerance)

    @property
    def count(self) -> int:
        """Number of base parameters, b."""
        return len(self.columns)

    def regressor(self, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
        """Return the full regressor (T, n, p) along q [rad], v [rad/s], a [rad/s²], each (T, n)."""
        return self.extend(self.reference.regressor(q, v, a), v, a)

    def extend(self, links: np.ndarray, v: np.ndarray, a: np.ndarray, sign: np.ndarray | None = None) -> np.ndarray:
        """Return (T, n, p): the links' regressor (T, n, 10 n) with the columns of ``extras`` behind it.

        ``sign`` (T, n) stands for sign(v) where given, for whoever needs it smooth.
        """
        diagonal = {"armature": a, "viscous": v, "coulomb": np.sign(v) if sign is None else sign}
        return np.concatenate([links, *(diagonal[extra][:, :, None] * np.eye(self.tree.n) for extra in self.extras)], axis=2)

    def reduce(self, regressor: np.ndarray) -> np.ndarray:
        """Return the base columns (..., b) of a full regressor (..., p)."""
        return regressor[..., self.columns]

    def from_full(self, full: np.ndarray) -> np.ndarray:
        """Return the base parameters (b,) of the full ones (p,)."""
        return self.map @ full

    def nominal(self) -> np.ndarray:
        """Return the tree's own base parameters (b,)."""
        own = {"armature": self.tree.armature, "viscous": self.tree.damping, "coulomb": self.tree.friction}
        return self.from_full(np.concatenate([link_parameters(self.tree).ravel(), *(own[extra] for extra in self.extras)]))

    def labels(self) -> list[str]:
        """Return the name of each base parameter: that of the column kept, with a plus where others are grouped into it."""
        return [self.names[c] + ("+" if np.count_nonzero(row) > 1 else "") for c, row in zip(self.columns, self.map)]

    def groupings(self) -> list[str]:
        """Return each base parameter in full, such as ``joint6.my - 0.088 joint7.mz + joint7.my``."""
        return [_sum(row, self.names, int(column)) for column, row in zip(self.columns, self.map)]

    def _preference(self) -> list[int]:
        """Return the full parameters' indices, those to keep first."""
        n = self.tree.n
        index = {(i, kind): 10 * i + k for i in range(n) for k, kind in enumerate(INERTIAL)}
        first = [index[i, kind] for i in reversed(range(n)) for kind in _KEPT]
        last = [index[i, kind] for i in reversed(range(n)) for kind in _GROUPED]
        return first + list(range(10 * n, len(self.names))) + last


def full_names(tree: RigidTree, extras: tuple[Extra, ...] = ()) -> tuple[str, ...]:
    """Return ``joint.kind`` for the links' parameters and the extras, in the order of the full vector."""
    links = [f"{joint}.{kind}" for joint in tree.joints for kind in INERTIAL]
    return (*links, *(f"{joint}.{extra}" for extra in extras for joint in tree.joints))


def unit(tree: RigidTree, name: str) -> str:
    """Return the SI unit of a full parameter."""
    joint, _, kind = name.rpartition(".")
    if kind in EXTRAS and not tree.revolute[tree.joints.index(joint)]:
        return {"armature": "kg", "viscous": "N·s/m", "coulomb": "N"}[kind]
    return _UNITS.get(kind, "kg·m²")


def _independent(stacked: np.ndarray, preference: list[int], tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the columns to keep (b,), rising, and the map (b, p) from all parameters to theirs."""
    length = np.linalg.norm(stacked, axis=0)
    moving = [c for c in preference if length[c] > tolerance * length.max()]  # the others never cause a torque
    scaled = stacked[:, moving] / length[moving]
    pivots = np.abs(np.diag(qr(scaled, mode="r", pivoting=True)[0]))
    rank = int((pivots > tolerance * pivots[0]).sum())
    # In a fixed order a column's diagonal is what the columns before it leave of it.
    kept = [c for c, left in zip(moving, np.abs(np.diag(qr(scaled, mode="r")[0]))) if left > tolerance]
    if len(kept) != rank:
        raise ModelError(f"the number of base parameters is unclear: {rank} by pivoted, {len(kept)} by ordered elimination")
    columns = np.array(sorted(kept))
    others = np.array([c for c in moving if c not in set(kept)], int)
    q, r = qr(stacked[:, columns] / length[columns], mode="economic")
    share = solve_triangular(r, q.T @ (stacked[:, others] / length[others]))
    share *= length[others] / length[columns][:, None]
    mapping = np.zeros((rank, stacked.shape[1]))
    mapping[np.arange(rank), columns] = 1.0
    mapping[:, others] = np.where(np.abs(share) > 1e-9, share, 0.0)  # rounding; coefficients are lengths and their products
    return columns, mapping


def _sum(row: np.ndarray, names: tuple[str, ...], first: int) -> str:
    text = names[first]
    for c in np.flatnonzero(row):
        if c != first:
            size = f"{abs(row[c]):.4g} " if abs(abs(row[c]) - 1) > 1e-9 else ""
            text += f" {'-' if row[c] < 0 else '+'} {size}{names[c]}"
    return text

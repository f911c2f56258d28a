"""Models and small helpers shared by the tests of the dynamics."""

from __future__ import annotations

import copy
from functools import cache

import mujoco
import numpy as np
import torch

from mbctrl.dynamics.load import load_model, tree_from_mujoco
from mbctrl.dynamics.tree import RigidTree

ROBOTS = ("panda", "ur10e", "ur5e", "arm2", "dm_control:jaco_arm", "dm_control:cartpole-swingup", "dm_control:reacher-hard")
TREES = ("random0", "random1", "random2", "crowded")
_OFF = mujoco.mjtDisableBit
FREE = _OFF.mjDSBL_CONTACT | _OFF.mjDSBL_LIMIT | _OFF.mjDSBL_EQUALITY | _OFF.mjDSBL_ACTUATION

CROWDED = """
<mujoco>
  <compiler angle="radian"/>
  <option gravity="0.5 -1 -9"/>
  <worldbody>
    <body name="foot" pos="0.1 0.2 0.3" euler="0.3 0.1 0">
      <geom type="box" size="0.1 0.1 0.1"/>
      <body name="many" pos="0 0.1 0.2" euler="0 0.4 0.2">
        <joint name="x" type="slide" axis="1 0.2 0" pos="0.3 0.2 0.1" ref="0.2" stiffness="3" springref="0.1" armature="0.2"
          damping="0.3"/>
        <joint name="y" type="slide" axis="0 1 0" damping="0.1"/>
        <joint name="turn" axis="0.2 0.1 -1" pos="0.05 -0.1 0.2" ref="-0.7" stiffness="2" springref="-0.3" armature="0.05"
          damping="0.2"/>
        <joint name="tilt" axis="0 1 0" pos="0.02 0.03 -0.04" armature="0.02"/>
        <geom name="lid" type="cylinder" size="0.05 0.2" pos="0.02 0.03 0.1" euler="0.3 0.5 0.1" mass="1.3"/>
        <body name="welded" pos="0.2 0 0.1" euler="0.5 0.2 0.1">
          <geom name="egg" type="ellipsoid" size="0.1 0.05 0.2" mass="0.7"/>
          <site name="tip" pos="0.1 0.2 0.3" euler="0.1 0.2 0.3"/>
          <body name="arm" pos="0.1 0.1 0">
            <joint name="elbow" axis="1 1 0" ref="0.4" damping="0.1"/>
            <geom name="bone" type="capsule" size="0.03" fromto="0 0 0 0.2 0.1 0.3" mass="0.4"/>
            <body name="tail" pos="0.2 0.1 0.3">
              <geom name="ball" type="sphere" size="0.06" pos="0.01 0 0.02" mass="0.2"/>
            </body>
          </body>
          <body name="fork" pos="-0.1 0.1 0">
            <joint name="wrist" axis="0 -1 1" damping="0.05"/>
            <geom name="brick" type="box" size="0.05 0.1 0.02" pos="0.05 0 0" euler="0.1 0.9 0.3" mass="0.5"/>
          </body>
        </body>
      </body>
    </body>
  </worldbody>
</mujoco>
"""


def random_xml(seed: int, bodies: int = 7) -> str:
    """Return a random tree: several roots, hinges and slides, welded bodies, off-centre anchors, springs."""
    rng = np.random.default_rng(seed)

    def words(values: np.ndarray) -> str:
        return " ".join(f"{value:.17g}" for value in values)

    def joint(name: str) -> str:
        kind = "slide" if rng.random() < 0.3 else "hinge"
        numbers = {key: words(rng.uniform(0, 1, 1)) for key in ("ref", "stiffness", "springref", "armature", "damping")}
        rest = " ".join(f'{key}="{value}"' for key, value in numbers.items())
        axis, anchor = words(rng.normal(size=3)), words(rng.normal(size=3) / 5)
        return f'<joint name="{name}" type="{kind}" axis="{axis}" pos="{anchor}" {rest}/>'

    def body(i: int) -> str:
        joints = "".join(joint(f"j{i}_{k}") for k in range(rng.integers(1, 4) if i in (0, 1) or rng.random() < 0.7 else 0))
        sides = rng.uniform(0.1, 1, 3) ** 2  # of a box: always a possible inertia
        inertia = words((sides.sum() - sides) / 12)
        inner = "".join(body(child) for child in range(i + 1, bodies) if parent[child] == i)
        return (
            f'<body name="b{i}" pos="{words(rng.normal(size=3) / 3)}" quat="{words(rng.normal(size=4))}">{joints}'
            f'<inertial pos="{words(rng.normal(size=3) / 5)}" quat="{words(rng.normal(size=4))}" mass="{rng.uniform(0.5, 2):.17g}"'
            f' diaginertia="{inertia}"/><site name="s{i}" pos="{words(rng.normal(size=3))}" quat="{words(rng.normal(size=4))}"/>'
            f"{inner}</body>"
        )

    parent = [-1, 0] + [int(rng.integers(-1, i)) for i in range(2, bodies)]
    roots = "".join(body(i) for i in range(bodies) if parent[i] < 0)
    gravity = words(rng.normal(size=3) * 5)
    return f'<mujoco><compiler angle="radian"/><option gravity="{gravity}"/><worldbody>{roots}</worldbody></mujoco>'


@cache
def _compiled(name: str) -> tuple[mujoco.MjModel, RigidTree]:
    if name in ROBOTS:
        model = load_model(name)
        return model.mj, model.tree
    mj = mujoco.MjModel.from_xml_string(CROWDED if name == "crowded" else random_xml(int(name.removeprefix("random"))))
    return mj, tree_from_mujoco(mj)


def model_of(name: str, friction: bool = False) -> tuple[mujoco.MjModel, RigidTree]:
    """Return a model without contacts, limits and actuators, Euler integrator, and its tree.

    ``friction``: False: none; True: the model's own, or an invented one where it has none.
    """
    mj, tree = _compiled(name)
    mj = copy.copy(mj)
    mj.opt.disableflags |= FREE
    mj.opt.integrator = mujoco.mjtIntegrator.mjINT_EULER
    if not friction:
        mj.dof_frictionloss[:] = 0
    elif not mj.dof_frictionloss.any():
        mj.dof_frictionloss[:] = np.linspace(0.05, 0.3, mj.nv) * np.minimum(1, 10 * mj.dof_M0)
    return mj, tree_from_mujoco(mj)


def random_states(tree: RigidTree, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return q, v and torques, each (n, nv); every speed is above 0.5."""
    rng = np.random.default_rng(seed)
    q = rng.uniform(-3, 3, (n, tree.n))
    v = rng.uniform(0.5, 3, (n, tree.n)) * rng.choice([-1, 1], (n, tree.n))
    return q, v, rng.uniform(-5, 5, (n, tree.n)) * np.minimum(1, tree.mass.sum())


def rows(array: np.ndarray) -> torch.Tensor:
    """Return (N, k) samples batch-last."""
    return torch.from_numpy(np.ascontiguousarray(np.asarray(array, float).T))


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error of any sample (first axis) over that sample's largest expected value."""
    found, expected = (np.asarray(x).reshape(len(x), -1) for x in (found, expected))
    return float((np.abs(found - expected).max(1) / np.maximum(np.abs(expected).max(1), 1e-12)).max())

"""Dynamics: errors of every robot against MuJoCo and Pinocchio, and throughput against mujoco.rollout."""

from __future__ import annotations

import os
from typing import Any

import mujoco
import numpy as np
import torch
from _common import Say, median_time, row

from mbctrl.base.find import names
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.dynamics.simulator import SimulatorDynamics

STATES = 200


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return error rows for every robot, then throughput rows for the 7-joint arm."""
    out = []
    for name in [*names("robots"), "dm_control:jaco_arm"]:
        say(name)
        out += error_rows(name)
    return out + throughput_rows(quick, say)


def error_rows(name: str) -> list[dict[str, Any]]:
    """Return a robot's largest relative errors of forward dynamics (float64) and of a 1 s rollout."""
    model = load_model(name)
    rng = np.random.default_rng(0)
    tree = model.tree
    n = tree.n
    low, high = np.asarray(model.robot.limits.position_lower), np.asarray(model.robot.limits.position_upper)
    q = rng.uniform(np.maximum(low, -3), np.minimum(high, 3), (STATES, n))
    # Every joint slides: there MuJoCo's friction constraint and the smooth model are the same force.
    v = rng.uniform(0.5, 2.0, (STATES, n)) * rng.choice([-1, 1], (STATES, n))
    tau = rng.normal(size=(STATES, n)) * 5
    ours = RigidBodyDynamics(tree, 0.001, dtype=torch.float64)
    a = ours.forward_dynamics(*(torch.tensor(x.T.copy()) for x in (q, v, tau))).numpy().T
    reference = ReferenceDynamics(tree)
    b = np.stack([reference.forward_dynamics(*x) for x in zip(q, v, tau)])
    c, sliding = _mujoco(model.mj, q, v, tau, tree.friction)
    relative = np.abs(a - b).max(1) / np.abs(b).max(1)
    against = np.abs(a - c)[sliding].max(1) / np.abs(c)[sliding].max(1)
    short = name.removeprefix("dm_control:")
    return [
        row(f"{short}: self-check M, bias, gravity", model.error, "rel", "<=", 1e-9),
        row(f"{short}: acceleration vs Pinocchio", relative.max(), "rel", "<=", 1e-9),
        row(f"{short}: acceleration vs MuJoCo ({sliding.sum()} states)", against.max(), "rel", "<=", 1e-9),
        row(f"{short}: 1 s rollout vs mj_step", _rollout_error(model), "rel", "<=", 1e-9),
    ]


def _free(mj: mujoco.MjModel) -> mujoco.MjModel:
    mj.opt.disableflags |= (
        mujoco.mjtDisableBit.mjDSBL_LIMIT | mujoco.mjtDisableBit.mjDSBL_CONTACT | mujoco.mjtDisableBit.mjDSBL_ACTUATION
    )
    mj.opt.tolerance, mj.opt.iterations = 0, 200
    return mj


def _mujoco(
    mj: mujoco.MjModel, q: np.ndarray, v: np.ndarray, tau: np.ndarray, friction: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return MuJoCo's accelerations, and in which states its friction opposes every joint's motion in full."""
    mj, accelerations, sliding = _free(mj), [], []
    data = mujoco.MjData(mj)
    for state in zip(q, v, tau):
        data.qpos[:], data.qvel[:], data.qfrc_applied[:] = state
        mujoco.mj_forward(mj, data)
        accelerations.append(data.qacc.copy())
        sliding.append(np.allclose(data.qfrc_constraint, -friction * np.sign(state[1]), rtol=1e-12, atol=1e-14))
    return np.stack(accelerations), np.array(sliding)


def _rollout_error(model: Model) -> float:
    """Return the largest difference over 1 s from mj_step's Euler, relative to the largest state; friction off in both."""
    from dataclasses import replace

    mj = _free(model.mj)
    mj.dof_frictionloss[:] = 0
    mj.opt.integrator, mj.opt.timestep = mujoco.mjtIntegrator.mjINT_EULER, 0.001
    rng = np.random.default_rng(1)
    steps, n = 1000, model.tree.n
    torque = np.cumsum(rng.normal(size=(steps, n)), 0) * 0.02
    ours = RigidBodyDynamics(replace(model.tree, friction=np.zeros(n)), 0.001, dtype=torch.float64)
    x = np.concatenate([model.robot.home, np.zeros(n)])
    states = ours.rollout(torch.tensor(x)[:, None], torch.tensor(torque)[:, :, None])[1:, :, 0].numpy()
    data = mujoco.MjData(mj)
    data.qpos[:] = model.robot.home
    theirs = []
    for u in torque:
        data.qfrc_applied[:] = u
        mujoco.mj_step(mj, data)
        theirs.append(np.concatenate([data.qpos, data.qvel]))
    theirs = np.stack(theirs)
    return float(np.abs(states - theirs).max() / np.abs(theirs).max())


def throughput_rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return steps a second of torch (one thread) and mujoco.rollout (all threads), panda, and their ratio."""
    model = load_model("panda")
    torch.set_num_threads(1)
    out = []
    for samples in (256, 1024) if quick else (64, 256, 1024, 4096):
        say(f"throughput, {samples} samples")
        horizon = 16
        u = torch.zeros(horizon, 7, samples)
        x = torch.zeros(14, samples)
        x[:7] = torch.tensor(model.robot.home)[:, None]
        ours = RigidBodyDynamics(model.tree, 0.001)
        theirs = SimulatorDynamics(model.mj, model.mj.opt.timestep, batched=False)
        with torch.inference_mode():
            fast = median_time(lambda: ours.rollout(x, u), 5 if quick else 15)
        slow = median_time(lambda: theirs.rollout(x.double(), u.double()), 3 if quick else 7)
        count = samples * horizon
        out += [
            row(f"torch, 1 thread, {samples} x {horizon}", count / fast / 1e6, "M steps/s"),
            row(f"mujoco.rollout, {os.cpu_count()} threads, {samples} x {horizon}", count / slow / 1e6, "M steps/s"),
            row(f"torch over mujoco.rollout, {samples} x {horizon}", slow / fast, "x"),
        ]
    return out

"""Logs of arms whose truth is known: smooth excitation, rigid bodies, friction, noise as sensors have it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from mbctrl.calibrate.recording import Recording
from mbctrl.dynamics.body import compose
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.reference import ReferenceDynamics
from mbctrl.dynamics.tree import RigidTree

BODY = compose(2.0, np.array([0.03, -0.02, 0.10]), np.array([[4e-3, 2e-4, 0], [2e-4, 5e-3, 1e-4], [0, 1e-4, 3e-3]]))
QUANTUM = 1e-5  # [rad] of the encoders


@cache
def arm(name: str) -> RigidTree:
    """Return a robot's tree with friction of a size its drives have."""
    tree = load_model(name).tree
    size = 8.0 if name == "ur10e" else 1.0
    return replace(tree, friction=size * np.linspace(1.0, 0.3, tree.n), damping=size * np.linspace(1.5, 0.4, tree.n))


@cache
def home(name: str) -> np.ndarray:
    return np.array(load_model(name).robot.home)


def motion(name: str, seconds: float, rate: float, seed: int, reach: float = 0.6, period: float = 10.0):
    """Return t (T,), q, v, a (T, n) around the robot's home, frequencies multiples of 1 / ``period``."""
    rng, t = np.random.default_rng(seed), np.arange(0, seconds, 1 / rate)
    centre = home(name)
    q, v, a = np.tile(centre, (len(t), 1)), np.zeros((len(t), len(centre))), np.zeros((len(t), len(centre)))
    for k in (1, 2, 3, 5):
        w, phase = 2 * np.pi * k / period, rng.uniform(0, 6, len(centre)) + 2 * np.pi * k / period * t[:, None]
        size = rng.uniform(0.3, 1.0, len(centre)) * rng.choice([-1, 1], len(centre)) * reach / np.sqrt(k)
        q, v, a = q + size * np.sin(phase), v + size * w * np.cos(phase), a - size * w * w * np.sin(phase)
    return t, q, v, a


def torque(tree: RigidTree, q: np.ndarray, v: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Return motor torques (T, n) [N·m]: rigid bodies, rotors, Coulomb and viscous friction."""
    return ReferenceDynamics(tree).inverse_dynamics(q, v, a) + tree.friction * np.sign(v) + tree.damping * v


def recording(
    tree: RigidTree, name: str, *, seed: int, noise: float = 0.02, seconds: float = 20.0, reach: float = 1.0, gains=None
) -> Recording:
    """Return a log at 100 Hz; the torque noise is ``noise`` of each joint's spread; gains are what efforts are divided by."""
    t, q, v, a = motion(name, seconds, 100.0, 5, reach)
    rng = np.random.default_rng(seed)
    tau = torque(tree, q, v, a)
    tau = tau + noise * tau.std(0) * rng.normal(size=tau.shape)
    measured = np.round(q / QUANTUM) * QUANTUM
    return Recording(tree.joints, t, measured, tau / (1.0 if gains is None else gains), v + 1e-3 * rng.normal(size=v.shape))

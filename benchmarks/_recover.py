"""One calibration of a simulated arm whose truth is known; imported by the processes that do it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.parameters import load_parameters, write_parameters
from mbctrl.calibrate.excite import ExciteSettings, excite
from mbctrl.calibrate.friction import Friction
from mbctrl.calibrate.identify import Identification
from mbctrl.calibrate.inertia import feasible, from_cholesky, proper, to_cholesky
from mbctrl.calibrate.payload import identify_payload
from mbctrl.calibrate.recipe import FilterSpec, FitSpec, FrictionSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.result import fitted_parameters
from mbctrl.calibrate.signals import prepare
from mbctrl.dynamics.body import compose, weld
from mbctrl.dynamics.load import load_model
from mbctrl.dynamics.reference import ReferenceDynamics, link_parameters, with_links
from mbctrl.dynamics.tree import RigidTree

ROBOTS = {"arm2": 0.5, "panda": 2.0, "ur10e": 10.0}
"""Robot and size of its friction [N·m]."""
RATE, COUNTS, NOISE, JITTER, GAPS, DELAY = 250.0, 2**19, 0.02, 1e-3, 0.005, 0.003
FAMILY = Friction(memory="dahl", length=2e-4)
LOAD = 2.0  # [kg]


def motion_of(name: str) -> tuple[np.ndarray, ...]:
    """Return t, q, v, a of two periods of the excitation."""
    settings = ExciteSettings(duration=20.0, repeats=2, iterations=60, draws=4)
    return excite(load_model(name), settings).trajectory(RATE)[:4]


def _truth(name: str, seed: int) -> tuple[RigidTree, np.ndarray]:
    """Return an arm of bodies that could exist, unlike the model file's, and its friction (n, 3)."""
    tree, rng = load_model(name).tree, np.random.default_rng(seed)
    theta = np.stack([to_cholesky(link) for link in proper(link_parameters(tree))])
    theta[:, 0] += rng.uniform(-0.1, 0.1, tree.n)
    theta[:, 4:] *= rng.uniform(0.9, 1.1, (tree.n, 6))
    links = np.stack([from_cholesky(row) for row in theta])
    size = ROBOTS[name] * np.linspace(1.0, 0.3, tree.n) * rng.uniform(0.8, 1.2, tree.n)
    friction = np.stack([size, 0.8 * size, np.zeros(tree.n)], 1)
    armature = tree.armature * rng.uniform(0.8, 1.3, tree.n) + 0.02
    return replace(with_links(tree, links), armature=armature), friction


def log_of(tree: RigidTree, friction: np.ndarray, motion: tuple[np.ndarray, ...], rng: np.random.Generator) -> Recording:
    """Return what a real logger would have of the motion: quantised, jittered, with holes, efforts late and noisy."""
    t, q, v, a = motion
    torque = ReferenceDynamics(tree).inverse_dynamics(q, v, a)
    terms = FAMILY.columns(v, FAMILY.direction(t, v))
    torque = torque + np.einsum("tnf,nf->tn", terms, friction)
    stamps = t + np.clip(JITTER * rng.normal(size=len(t)), -1.5e-3, 1.5e-3)
    seen, late = (np.stack([np.interp(s, t, x) for x in torque.T], 1) for s in (stamps, stamps - DELAY))
    late = late + NOISE * np.sqrt((seen**2).mean(0)) * rng.normal(size=late.shape)
    position = np.stack([np.interp(stamps, t, x) for x in q.T], 1)
    step = 2 * np.pi / COUNTS
    keep = rng.uniform(size=len(t)) > GAPS
    return Recording(tree.joints, stamps[keep], (np.round(position / step) * step)[keep], late[keep], file="simulated")


def one_seed(job: tuple[str, int, tuple[np.ndarray, ...]]) -> dict[str, Any]:
    """Fit one simulated log; return errors against the truth."""
    name, seed, motion = job
    model, rng = load_model(name), np.random.default_rng(seed + 10_000)
    tree, friction = _truth(name, seed)
    spec = FilterSpec(motion=15.0)
    log = log_of(tree, friction, motion, rng)
    first = Identification(model, FitSpec(friction=FrictionSpec(memory="dahl", length=2e-4), draws=20))
    late = first.fit([first.motion(prepare(log, spec))]).delay
    # Efforts are moved by the delay found, and everything is fitted anew.
    on_time = replace(log, effort=np.stack([np.interp(log.t + late, log.t, x) for x in log.effort.T], 1))
    one = Identification(model, FitSpec(friction=FrictionSpec(memory="dahl", length=2e-4)))
    bare = prepare(on_time, spec)
    fit = one.fit([one.motion(bare)])
    e, b = fit.estimates, one.base.count
    expected = one.base.from_full(np.concatenate([link_parameters(tree).ravel(), tree.armature]))
    off = np.abs(e.value[:b] - expected)
    found = fit.x[11 * tree.n :].reshape(tree.n, -1)[:, :2]
    total = [row[:, 0] + 0.5 * row[:, 1] for row in (found, friction)]  # at half a radian a second
    body = compose(LOAD, np.array([0.02, -0.01, 0.08]), 4e-3 * np.eye(3))
    heavy = log_of(weld(tree, tree.n - 1, body), friction, motion, rng)
    heavy = replace(heavy, effort=np.stack([np.interp(heavy.t + late, heavy.t, x) for x in heavy.effort.T], 1))
    weighed = identify_payload([bare], [prepare(heavy, spec)], model.tree, friction=FAMILY, draws=10)
    return {
        "within": off <= 3 * e.se[:b],
        "covered": (e.low[:b] <= expected) & (expected <= e.high[:b]),
        "friction": float(np.abs(total[0] / total[1] - 1).max()),
        "parts": float(np.abs(found / friction[:, :2] - 1).max()),
        "delay": abs(late - DELAY),
        "impossible": int((~feasible(fit.links)).sum()),
        "payload": abs(weighed.mass / LOAD - 1),
    }


def calibrated(name: str, truth: Path, path: Path, seed: int = 0) -> None:
    """Write to ``path`` what a calibration makes of a log of the arm whose parameters ``truth`` holds."""
    model, tree = load_model(name), load_model(name, load_parameters(truth)).tree
    friction = np.stack([tree.friction, tree.damping, np.zeros(tree.n)], 1)
    log = log_of(tree, friction, motion_of(name), np.random.default_rng(seed))
    one = Identification(model, FitSpec())
    fit = one.fit([one.motion(prepare(log, FilterSpec(motion=15.0)))])
    write_parameters(path, fitted_parameters(model, fit, {"log": "simulated"}))

"""Fits by simulation: time, error and intervals against mujoco.sysid on one simulated arm, and a real arm's log.

The peer runs in the interpreter ``MBCTRL_SYSID_PYTHON`` names (one that has ``mujoco[sysid]``), else in this one. The problem is
its home ground: ten parameters of a five-joint arm, the data a rollout of MuJoCo at the very step that both fits take, 1 %
noise. ``MBCTRL_DATA`` names the folder with the UR10e's logs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np
import torch
from _common import Say, row

from mbctrl.calibrate.output_error import Fit, fit
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.simulate import Twin
from mbctrl.calibrate.starts import regressed
from mbctrl.calibrate.unknowns import Arm, unknowns
from mbctrl.dynamics.load import load_model, tree_from_mujoco
from mbctrl.dynamics.rigid_body import RigidBodyDynamics
from mbctrl.kernels.native import Native
from mbctrl.kernels.trace import trace_dynamics
from mbctrl.planning.compiled import drive_of

STEP, JOINTS = 0.002, 5
ARMATURE, DAMPING = np.array([0.4, 0.5, 0.25, 0.12, 0.08]), np.array([1.2, 1.0, 0.6, 0.3, 0.25])
NAMES = [f"joint{i}.{kind}" for kind in ("armature", "damping") for i in range(JOINTS)]
TRUE = np.concatenate([ARMATURE, DAMPING])
LIMIT = 1800.0  # [s] the peer may take
UR10E_GAINS = np.array([10.0, 10.6956, 8.4566, 9.0029, 9.48, 10.1232])  # [N·m/A]
PEER_SECONDS, PEER_ERROR = 1111.0, 24.8  # mujoco.sysid 4.0.0 on this log, 42 parameters, 2 cores, in another run; open loop [mrad]


def arm_xml() -> str:
    """Return a hanging arm of five joints, axes in turn about z, y, y, z, y, with motors and joint sensors."""
    axes, lengths, masses = ("0 0 1", "0 1 0", "0 1 0", "0 0 1", "0 1 0"), (0.1, 0.3, 0.25, 0.12, 0.1), (3.0, 2.5, 1.6, 0.8, 0.5)
    inner = ""
    for i in reversed(range(JOINTS)):
        at = 0.0 if i == 0 else -lengths[i - 1]
        inner = (
            f'<body pos="0 0 {at}"><inertial pos="0.02 0.01 {-lengths[i] / 2}" mass="{masses[i]}" diaginertia="'
            f'{masses[i] * 0.012:.6g} {masses[i] * 0.011:.6g} {masses[i] * 0.004:.6g}"/><joint name="joint{i}" axis="{axes[i]}" '
            f'armature="{ARMATURE[i]}" damping="{DAMPING[i]}"/>{inner}</body>'
        )
    motors = "".join(f'<motor joint="joint{i}"/>' for i in range(JOINTS))
    sensors = "".join(
        f'<{kind} name="joint{i}_{kind}" joint="joint{i}"/>' for kind in ("jointpos", "jointvel") for i in range(JOINTS)
    )
    return (
        f'<mujoco><compiler angle="radian"/><option timestep="{STEP}" integrator="Euler"/><worldbody>{inner}</worldbody>'
        f"<actuator>{motors}</actuator><sensor>{sensors}</sensor></mujoco>"
    )


class Problem(NamedTuple):
    """Ten unknowns and a log: stamps (T,), torques, noisy positions and speeds (T, n), the true state at the start (2n,)."""

    mj: mujoco.MjModel
    log: Recording
    first: np.ndarray
    start: np.ndarray


def problem(seconds: float, seed: int) -> Problem:
    """Return ``seconds`` of the arm's motion under sine torques, noise 1 % of each signal's rms."""
    mj, rng = mujoco.MjModel.from_xml_string(arm_xml()), np.random.default_rng(seed)
    data, steps = mujoco.MjData(mj), round(seconds / STEP)
    t = np.arange(steps) * STEP
    hertz, phase = np.array([0.35, 0.8, 1.5]), np.random.default_rng(7).uniform(0, 2 * np.pi, (JOINTS, 3))
    size = np.array([6.0, 6.0, 4.0, 2.0, 1.2])
    u = np.stack([a * np.sin(2 * np.pi * hertz * t[:, None] + p).sum(1) for a, p in zip(size, phase)], 1)
    states = np.empty((steps, 2 * JOINTS))
    for k in range(steps):
        states[k] = np.concatenate([data.qpos, data.qvel])
        data.ctrl[:] = u[k]
        mujoco.mj_step(mj, data)
    noisy = states + 0.01 * np.sqrt((states**2).mean(0)) * rng.normal(size=states.shape)
    joints = tuple(mj.joint(j).name for j in range(mj.njnt))
    factor = np.random.default_rng(3).uniform(-1, 1, len(TRUE))
    return Problem(mj, Recording(joints, t, noisy[:, :JOINTS], u, noisy[:, JOINTS:]), states[0], TRUE * 2.0**factor)


def ours(one: Problem, window: float) -> tuple[Fit, float, Twin]:
    """Return our fit and its time with the windows' and the kernel's preparation; the machine code is in the cache."""
    began = time.perf_counter()
    dynamics = RigidBodyDynamics(tree_from_mujoco(one.mj), STEP, dtype=torch.float64)
    wanted = {name.replace("damping", "viscous"): {"start": x, "bounds": (0.01, 10.0)} for name, x in zip(NAMES, one.start)}
    twin = Twin(Arm(dynamics, unknowns(dynamics, wanted)), [one.log], window=window, step=STEP, hold="zero")
    found = fit(twin, exact=False)  # MuJoCo's own steps are the truth here
    return found, time.perf_counter() - began, twin


def theirs(one: Problem, twin: Twin | None = None) -> dict[str, Any]:
    """Return the peer's answer: over the whole log from the true start, or over ``twin``'s windows and measured starts."""
    whole = twin is None
    first = np.zeros(1, int) if whole else np.searchsorted(one.log.t, twin.windows.begin - 1e-9)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "problem.npz"
        np.savez(
            path,
            xml=arm_xml(),
            names=NAMES,
            start=one.start,
            low=np.full(len(TRUE), 0.01),
            high=np.full(len(TRUE), 10.0),
            u=one.log.effort,
            q=one.log.q,
            v=one.log.v,
            first=first,
            samples=len(one.log.t) if whole else len(twin.windows.target) + 1,
            states=one.first[None] if whole else twin.windows.start.T,
        )
        command = [
            os.environ.get("MBCTRL_SYSID_PYTHON") or sys.executable,
            str(Path(__file__).with_name("_sysid_peer.py")),
            str(path),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"missing": str(error)[:200]}
    if done.returncode or not done.stdout.strip():
        return {"missing": (done.stderr.strip().splitlines() or ["no answer"])[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows(quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return the comparison for 2 s (quick) and 10 s of data, our coverage over noise seeds, and the real arm."""
    out = []
    for seconds in (2.0,) if quick else (2.0, 10.0):
        out += comparison(seconds, quick, say)
    return out + compile_rows() + real_rows(say)


def comparison(seconds: float, quick: bool, say: Say) -> list[dict[str, Any]]:
    """Return rows of both fits on the same log.

    Ours takes windows of half a second, as for a real arm, whose model errors pile up in longer ones; and windows as long as
    the log's half, as the model is exact here and the peer takes the whole of it.
    """
    label = f"{seconds:g} s"
    ours(problem(seconds, 0), 0.5)  # the kernel comes from the cache from now on
    out, mine = [], {}
    for window in (0.5, seconds / max(1, round(seconds / 5)) - 2 * STEP):
        say(f"{label} of data, ours, windows of {window:.2g} s")
        fits = [ours(problem(seconds, seed), window) for seed in range(5 if quick else 20)]
        intervals = [found.interval() for found, _, _ in fits]
        covered = np.mean([(one[:, 0] <= TRUE) & (one[:, 1] >= TRUE) for one in intervals])
        errors, took = [_error(found.values) for found, _, _ in fits], [one for _, one, _ in fits]
        mine[window] = errors[0], float(np.median(took)), fits[0][2]
        name = f"{label}: ours, windows of {window:.2g} s"
        out += [
            row(f"{name}, time, median of {len(fits)} seeds", mine[window][1], "s"),
            row(f"{name}, rms error of 10 parameters, seed 0", errors[0], "%"),
            row(f"{name}, rms error, median of {len(fits)} seeds", float(np.median(errors)), "%"),
            row(f"{name}, 95 % intervals cover", 100 * float(covered), "%", ">=", 85.0),
        ]
    for name, window in (("", max(mine)), (", windows of 0.5 s", 0.5)):
        say(f"{label} of data, mujoco.sysid{name}")
        peer = theirs(problem(seconds, 0), None if not name else mine[window][2])
        if "missing" in peer:
            out.append(row(f"{label}: mujoco.sysid{name} skipped: {peer['missing']}", float("nan"), "s"))
            continue
        values, half = np.array(peer["values"]), np.array(peer["half"])
        error = _error(values)
        out += [
            row(f"{label}: mujoco.sysid {peer['version']}{name}, time", peer["seconds"], "s"),
            row(f"{label}: mujoco.sysid{name}, rms error, seed 0", error, "%"),
            row(f"{label}: mujoco.sysid{name}, 95 % intervals cover", 100 * float((np.abs(values - TRUE) <= half).mean()), "%"),
            row(f"{label}: error, ours over mujoco.sysid{name}", mine[window][0] / error, "x"),
            row(f"{label}: time, mujoco.sysid{name} over ours", peer["seconds"] / mine[window][1], "x", ">=", 10.0),
        ]
    return out


def _error(values: np.ndarray) -> float:
    """Return the rms relative error [%]."""
    return 100 * float(np.sqrt(((values / TRUE - 1) ** 2).mean()))


def compile_rows() -> list[dict[str, Any]]:
    """Return how long the kernel takes to compile, once for a robot and a set of unknowns."""
    dynamics = RigidBodyDynamics(tree_from_mujoco(mujoco.MjModel.from_xml_string(arm_xml())), STEP, dtype=torch.float64)
    traced = trace_dynamics(dynamics.tree, drive_of(dynamics), ("armature", "damping"), each=True)
    with tempfile.TemporaryDirectory() as folder:
        return [row("ours, compilation, once", Native(traced.program, np.float64, folder=Path(folder)).seconds, "s")]


def real_rows(say: Say) -> list[dict[str, Any]]:
    """Return the UR10e: fitted to a 30 s log, open loop on a 50 s log of another trajectory."""
    folder = Path(os.environ.get("MBCTRL_DATA", "")) / "ur10e"
    if "MBCTRL_DATA" not in os.environ or not folder.is_dir():
        return [row("UR10e skipped: MBCTRL_DATA does not name a folder with ur10e/", float("nan"), "s")]
    tree = load_model(str(folder / "ur10e.urdf")).tree
    model = RigidBodyDynamics(tree, 0.001, dtype=torch.float64)

    def log(name: str, lines: slice = slice(None)) -> Recording:
        data = np.genfromtxt(folder / name, delimiter=",")[lines]
        return Recording(tree.joints, data[:, 0] - data[0, 0], data[:, 1:7], data[:, 13:19] * UR10E_GAINS, data[:, 7:13], file=name)

    train, test = log("ur-20_02_10-30sec_12harm.csv", slice(634, 3510)), log("ur-20_02_12-50sec_12harm.csv")
    wanted = {f"*.{kind}": {} for kind in ("scale", "com_x", "com_y", "armature", "viscous", "coulomb", "offset")}
    wanted["*.scale"] = {"prior": (1.0, 0.5)}
    given = unknowns(model, wanted)
    given = [replace(one, prior=(one.start, 0.1)) if ".com_" in one.name else one for one in given]
    out = []
    for free in (True, False):
        say(f"UR10e, starts {'free' if free else 'as measured'}")
        began = time.perf_counter()
        arm = Arm(model, regressed(given, model, [train]))
        found = fit(Twin(arm, [train]), free_start=free)
        took = time.perf_counter() - began
        check = Twin(arm, [test], window=0.53, every=40 / test.rate, skip=3.5)
        error = 1e3 * float(np.sqrt((check.errors(found.everything)[-1, :6] ** 2).mean()))
        label = f"UR10e, {len(found.names)} parameters, starts {'free' if free else 'measured'}"
        out += [
            row(f"{label}: 30 s log to parameters", took, "s"),
            row(f"{label}: the {PEER_SECONDS:g} s of mujoco.sysid in another run over ours", PEER_SECONDS / took, "x"),
            row(f"{label}: open loop 0.53 s, {check.count} windows", error, "mrad", "<=", 22.0),
            row(f"{label}: open loop over its {PEER_ERROR} mrad", error / PEER_ERROR, "x"),
        ]
    return out

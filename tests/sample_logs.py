"""Logs of simulated arms for the tests of calibration: smooth motions, torques of the reference dynamics plus friction."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.calibrate.recipe import LogSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.reference import ReferenceDynamics

# For each arm: about where it moves [rad], how far [rad], viscous [N·m·s/rad] and Coulomb friction [N·m].
ARMS = {
    "arm2": ([0.1, 0.2], [0.45, 0.45], [0.02, 0.02], [0.25, 0.08]),
    "ur10e": (
        [0.0, -1.3, 1.2, -1.5, -1.0, 0.3],
        [1.0, 0.6, 0.9, 0.9, 1.2, 1.2],
        [21.0, 20.0, 10.0, 3.6, 2.5, 3.0],
        [12.5, 13.0, 5.0, 2.0, 2.7, 2.3],
    ),
}


@cache
def model_of(arm: str) -> Model:
    """Return an arm's model."""
    return load_model(arm)


def sample_recording(
    arm: str = "arm2", seed: int = 0, *, seconds: float = 12.0, rate: float = 100.0, velocity: bool = True, quantum: float = 0.0,
    jitter: float = 0.0, rest: float = 0.0,
) -> Recording:  # fmt: skip
    """Return a clean log: three sines a joint from 0.1 to 1 Hz, noise of 2e-5 rad, 1e-3 rad/s and 0.3 % of the torques.

    Args:
        arm: one of ``ARMS``.
        seed: of everything random.
        seconds: how long.
        rate: samples a second.
        velocity: whether velocities were logged.
        quantum: resolution of positions [rad], 0 for none.
        jitter: standard deviation of the stamps, in periods; positions are those of the uneven times.
        rest: how long the arm stands still at either end [s].
    """
    center, reach, viscous, coulomb = (np.array(column) for column in ARMS[arm])
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    t = t + jitter / rate * rng.uniform(-1.7, 1.7, len(t))
    n, waves = len(center), (0.1, 0.37, 0.83)
    phase, share = rng.uniform(0, 2 * np.pi, (3, n)), rng.uniform(0.5, 1, (3, n)) * np.array([[0.5], [0.3], [0.12]])
    clock, speed, change = _clock(t, seconds, rest)
    q, v, a = np.tile(center, (len(t), 1)), np.zeros((len(t), n)), np.zeros((len(t), n))
    for frequency, p, s in zip(waves, phase, share * reach):
        w = 2 * np.pi * frequency
        angle = w * clock[:, None] + p
        q += s * np.sin(angle)
        v += s * w * speed[:, None] * np.cos(angle)
        a += s * (w * change[:, None] * np.cos(angle) - (w * speed[:, None]) ** 2 * np.sin(angle))
    effort = ReferenceDynamics(model_of(arm).tree).inverse_dynamics(q, v, a) + viscous * v + coulomb * np.tanh(v / 0.01)
    q, v = q + 2e-5 * rng.normal(size=q.shape), v + 1e-3 * rng.normal(size=q.shape)
    effort = effort + 0.003 * np.abs(effort).max(axis=0) * rng.normal(size=q.shape)
    return Recording(
        joints=model_of(arm).robot.joints, t=t, q=np.round(q / quantum) * quantum if quantum else q, effort=effort,
        v=v if velocity else None, lines=np.arange(2, len(t) + 2), parts=((0, len(t)),), file=f"{arm}.csv",
    )  # fmt: skip


def _clock(t: np.ndarray, seconds: float, rest: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the time along the motion and its first two derivatives: still for ``rest`` [s] at either end, ramps of 1 s."""
    if not rest:
        return t, np.ones_like(t), np.zeros_like(t)
    fine = np.linspace(t[0], t[-1], 20 * len(t))
    x = np.clip(np.minimum(fine - rest, seconds - rest - fine), 0, 1)
    speed = x**2 * (3 - 2 * x)
    clock = np.cumsum(speed) * (fine[1] - fine[0])
    return np.interp(t, fine, clock), np.interp(t, fine, speed), np.interp(t, fine, np.gradient(speed, fine))


def changed(recording: Recording, **columns: np.ndarray) -> Recording:
    """Return the recording with other columns."""
    return dataclasses.replace(recording, **columns)


def columns_of(recording: Recording) -> dict[str, np.ndarray]:
    """Return the columns of a log by name: ``t``, ``q.JOINT``, ``v.JOINT``, ``tau.JOINT``."""
    columns = {"t": recording.t}
    for name, x in (("q", recording.q), ("v", recording.v), ("tau", recording.effort)):
        if x is not None:
            columns |= {f"{name}.{joint}": x[:, j] for j, joint in enumerate(recording.joints)}
    return columns


def spec_of(recording: Recording, **change: Any) -> LogSpec:
    """Return the recipe that reads ``columns_of``."""
    joints = recording.joints
    data = {
        "time": {"column": "t"},
        "position": {"columns": [f"q.{joint}" for joint in joints], "unit": "rad"},
        "velocity": {"columns": [f"v.{joint}" for joint in joints], "unit": "rad/s"} if recording.v is not None else None,
        "effort": {"columns": [f"tau.{joint}" for joint in joints], "unit": "N·m"},
    }
    return LogSpec.model_validate({**data, **change})


def write_csv(path: Path, recording: Recording, header: bool = True, delimiter: str = ",") -> list[str]:
    """Write a log as text; return its lines."""
    columns = columns_of(recording)
    lines = [delimiter.join(columns)] if header else []
    lines += [delimiter.join(f"{value!r}" for value in row) for row in np.stack(list(columns.values()), axis=1).tolist()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines

"""A peg that falls and is pressed onto a spring and damper: one slide joint whose motion is known in closed form."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mbctrl.base.config import ContactSpec
from mbctrl.dynamics.load import Model, load_model
from mbctrl.dynamics.residual import Surface
from mbctrl.learning.runs import source_of
from mbctrl.learning.transitions import Transitions, concatenate, made

MASS, RADIUS, GRAVITY = 1.0, 0.01, 9.81  # [kg], [m], [m/s²]
STIFFNESS, DAMPING = 2000.0, 30.0  # [N/m], [N·s/m]
DT = 0.02  # [s]
TOUCH = ContactSpec(tip="tip", radius=RADIUS, surface="floor", stiffness=0.0, damping=0.0, friction=0.0)
FLOOR = Surface(name="floor", shape="plane", position=(0.0, 0.0, 0.0))
XML = f"""\
<mujoco model="peg">
  <option gravity="0 0 -{GRAVITY}"/>
  <worldbody>
    <site name="floor"/>
    <body name="peg">
      <joint name="z" type="slide" axis="0 0 1" limited="true" range="-0.1 1.0"/>
      <geom type="sphere" size="{RADIUS}" mass="{MASS}"/>
      <site name="tip"/>
    </body>
  </worldbody>
  <actuator><motor name="z" joint="z" ctrllimited="true" ctrlrange="-60 60"/></actuator>
</mujoco>
"""


def peg(folder: Path) -> Model:
    """Return the peg's model, in a file of ``folder``."""
    (folder / "peg.xml").write_text(XML)
    return load_model(str(folder / "peg.xml"))


def fly(z: float, v: float, force: float, t: float) -> tuple[float, float]:
    """Return height [m] and speed after ``t`` seconds without contact."""
    a = force / MASS - GRAVITY
    return z + v * t + 0.5 * a * t * t, v + a * t


def press(z: float, v: float, force: float, t: float) -> tuple[float, float]:
    """Return height and speed after ``t`` seconds on the spring: an underdamped oscillation about where forces balance."""
    rate = DAMPING / (2 * MASS)
    turn = np.sqrt(STIFFNESS / MASS - rate * rate)
    rest = RADIUS + (force - MASS * GRAVITY) / STIFFNESS
    a, b = z - rest, (v + rate * (z - rest)) / turn
    decay, c, s = np.exp(-rate * t), np.cos(turn * t), np.sin(turn * t)
    return rest + decay * (a * c + b * s), decay * ((b * turn - rate * a) * c - (a * turn + rate * b) * s)


def truth(z: float, v: float, force: float, t: float = DT, parts: int = 200) -> tuple[float, float, bool]:
    """Return height, speed and whether it touched, ``t`` seconds on; exact but for when contact begins and ends (0.1 ms)."""
    touched = False
    for _ in range(parts):
        inside = z < RADIUS
        touched |= inside
        z, v = (press if inside else fly)(z, v, force, t / parts)
    return z, v, touched


def play(model: Model, seconds: float, seed: int, top: float = 0.06) -> Transitions:
    """Return a peg pulled to random heights between 15 mm below the floor and ``top`` [m] above it."""
    rng, rows = np.random.default_rng(seed), []
    z, v, wanted = float(rng.uniform(0.015, top)), 0.0, 0.0
    for k in range(round(seconds / DT)):
        if k % 10 == 0:
            wanted = rng.uniform(-0.015, top)
        force = float(np.clip(MASS * GRAVITY + 150 * (wanted - z) - 15 * v + rng.normal(0, 0.5), -60, 60))
        after = truth(z, v, force)
        rows.append((z, v, force, *after))
        z, v = after[:2]
    data = np.array(rows)
    source = source_of(model.robot, model.tree.revolute, DT)
    return made(source, data[:, :2], data[:, 2:3], data[:, 3:5], contact=data[:, 5] > 0)


def plays(model: Model, count: int, seconds: float = 4.0, seed: int = 0) -> Transitions:
    """Return several, an episode each."""
    return concatenate([play(model, seconds, seed + k) for k in range(count)])

"""A payload that comes and goes while the simulation runs: a ball welded to the tool's body of a compiled model."""

from __future__ import annotations

import mujoco
import numpy as np

from mbctrl.base.config import PayloadSpec
from mbctrl.base.errors import ModelError
from mbctrl.base.poses import rotation_from_quaternion
from mbctrl.dynamics.parameters import principal

_SHORTCUTS = ("body_sameframe", "geom_sameframe", "site_sameframe")


class Grip:
    """The tool of a model, with a ball in it or without.

    Args:
        model: compiled; changed in place, now and at every change.
        tool: the site or body the ball's centre is described in.
        payload: the ball, and when it comes and goes.

    Errors:
        ModelError: where MuJoCo keeps the tool's body so simply that no weight fits in.
    """

    def __init__(self, model: mujoco.MjModel, tool: str, payload: PayloadSpec) -> None:
        self._model, self._payload, self.carried = model, payload, 0.0
        body, rotation, position = tool_frame(model, tool)
        if model.body_simple[body]:
            raise ModelError("its body turns about its centre of mass alone and cannot carry a payload", key=tool)
        self._body, self._scratch = body, mujoco.MjData(model)
        self._bare = _inertial(model, body)
        ball = 0.4 * payload.mass * payload.radius**2 * np.eye(3)
        self._loaded = _together(self._bare, (payload.mass, position + rotation @ np.asarray(payload.com), ball))
        # Frames that coincide with the body's inertial one are copied from it: it is about to move.
        for name, of in zip(_SHORTCUTS, (np.arange(model.nbody), model.geom_bodyid, model.site_bodyid)):
            getattr(model, name)[of == body] = 0

    def update(self, t: float) -> None:
        """Bring the model to time ``t`` [s]."""
        mass = self._payload.mass if self._payload.carried(t) else 0.0
        if mass == self.carried:
            return
        self.carried, model, body = mass, self._model, self._body
        total, com, inertia = self._loaded if mass else self._bare
        moments, axes = principal(inertia)
        model.body_mass[body], model.body_ipos[body] = total, com
        model.body_inertia[body], model.body_iquat[body] = moments, axes
        mujoco.mj_setConst(model, self._scratch)


def tool_frame(model: mujoco.MjModel, tool: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Return the body that a site is on or that has the name, and the tool's rotation (3, 3) and position (3,) [m] in it."""
    site = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_SITE, tool)
    if site < 0:
        return mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_BODY, tool), np.eye(3), np.zeros(3)
    return int(model.site_bodyid[site]), rotation_from_quaternion(model.site_quat[site]), model.site_pos[site].copy()


Inertial = tuple[float, np.ndarray, np.ndarray]  # mass [kg], centre (3,) [m] and inertia (3, 3) [kg·m²] about it


def _inertial(model: mujoco.MjModel, body: int) -> Inertial:
    turn = rotation_from_quaternion(model.body_iquat[body])
    return float(model.body_mass[body]), model.body_ipos[body].copy(), turn @ np.diag(model.body_inertia[body]) @ turn.T


def _together(a: Inertial, b: Inertial) -> Inertial:
    mass = a[0] + b[0]
    com, inertia = (a[0] * a[1] + b[0] * b[1]) / mass, np.zeros((3, 3))
    for part, centre, own in (a, b):
        off = centre - com
        inertia += own + part * (off @ off * np.eye(3) - np.outer(off, off))
    return mass, com, inertia

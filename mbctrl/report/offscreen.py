"""Off-screen OpenGL for MuJoCo, with whatever backend this machine has.

MuJoCo fixes its backend when it is first imported, from ``MUJOCO_GL`` alone, and falls back on GLFW, which needs a
display. Here the backend is chosen when the first picture is wanted, and its context is opened directly.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from types import TracebackType
from typing import Any

import mujoco
import numpy as np

from mbctrl.base.errors import ExtraError

HINT = "install a GPU driver with EGL, or software rendering: apt install libosmesa6"
SKY = (0.78, 0.83, 0.89, 1.0)  # behind a model that has no sky of its own
BACKENDS = ("egl", "osmesa", "glfw")
# A backend that does not work can abort the whole process, so each is tried in one of its own.
PROBE = """
import importlib, sys, mujoco
context = importlib.import_module("mujoco." + sys.argv[1]).GLContext(32, 32)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100).free()
context.free()
"""


@cache
def choose_backend() -> str:
    """Return the MuJoCo subpackage to open contexts with: ``egl``, ``osmesa`` or ``glfw``, ``""`` for MuJoCo's own choice.

    ``MUJOCO_GL`` decides where it is set; else, on Linux, the first that works of EGL and OSMesa, and GLFW if there
    is a display.

    Errors:
        ExtraError: when none works.
    """
    wanted = os.environ.get("MUJOCO_GL", "").lower().strip()
    if wanted in ("disable", "disabled", "off", "false", "0"):
        raise ExtraError(f"rendering is switched off by MUJOCO_GL={wanted}")
    if not sys.platform.startswith("linux"):
        return ""
    if wanted in BACKENDS:
        if not _works(wanted):
            raise ExtraError(f"MUJOCO_GL={wanted} does not work here; unset it, or {HINT}")
        return wanted
    for backend in BACKENDS if os.environ.get("DISPLAY") else BACKENDS[:2]:
        if _works(backend):
            return backend
    raise ExtraError(f"no OpenGL to render with; {HINT}")


def _works(backend: str) -> bool:
    environment = {**os.environ, "MUJOCO_GL": backend}
    try:
        command = [sys.executable, "-c", PROBE, backend]
        return subprocess.run(command, env=environment, capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class Canvas:
    """A picture to render a model into; a context manager.

    Args:
        model: what to render; its picture settings are changed, so give a copy.
        width: of the picture [px]; rounded down to even, as video wants it.
        height: of the picture [px]; likewise.

    Errors:
        ExtraError: when there is no OpenGL.
    """

    def __init__(self, model: mujoco.MjModel, width: int, height: int) -> None:
        self.width, self.height = width - width % 2, height - height % 2
        model.vis.global_.offwidth, model.vis.global_.offheight = self.width, self.height
        self._model, self._mjr = model, None
        self._gl = _open_context(self.width, self.height)
        if _in_software():
            _cheapen(model)
        self._bare = not (model.tex_type == mujoco.mjtTexture.mjTEXTURE_SKYBOX).any()
        self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, self._mjr)
        self._scene, self._option = mujoco.MjvScene(model, maxgeom=5000), mujoco.MjvOption()
        self._rect = mujoco.MjrRect(0, 0, self.width, self.height)
        self._pixels = np.empty((self.height, self.width, 3), np.uint8)

    def render(
        self,
        data: mujoco.MjData,
        camera: mujoco.MjvCamera,
        draw: Callable[[mujoco.MjvScene], None] | None = None,
        text: str = "",
    ) -> np.ndarray:
        """Return a picture (height, width, 3), uint8 RGB; ``draw`` adds to the scene, ``text`` is put in a corner."""
        self._gl.make_current()
        mujoco.mjv_updateScene(self._model, data, self._option, None, camera, mujoco.mjtCatBit.mjCAT_ALL, self._scene)
        if self._bare:
            _hang_backdrop(self._scene)
        if draw is not None:
            draw(self._scene)
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        if text:
            font, corner = mujoco.mjtFont.mjFONT_NORMAL, mujoco.mjtGridPos.mjGRID_BOTTOMLEFT
            mujoco.mjr_overlay(font, corner, self._rect, text, "", self._mjr)
        mujoco.mjr_readPixels(self._pixels, None, self._rect, self._mjr)
        return np.ascontiguousarray(self._pixels[::-1])

    def close(self) -> None:
        """Free the context; safe to call twice."""
        if self._mjr is not None:
            self._gl.make_current()
            self._mjr.free()
            self._gl.free()
            self._mjr = None

    def __enter__(self) -> Canvas:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _hang_backdrop(scene: mujoco.MjvScene) -> None:
    """Put a pale wall behind everything, where MuJoCo would show black: what is translucent must blend with it."""
    camera, geom = scene.camera[0], scene.geoms[scene.ngeom]
    forward, up = np.asarray(camera.forward, float), np.asarray(camera.up, float)
    far = 0.95 * camera.frustum_far
    rotation = np.stack([np.cross(up, -forward), up, -forward], axis=1)
    size, place = np.array([4 * far, 4 * far, 1e-3 * far]), camera.pos + far * forward
    mujoco.mjv_initGeom(geom, mujoco.mjtGeom.mjGEOM_BOX, size, place, rotation.ravel(), np.array(SKY, np.float32))
    geom.category, geom.emission, geom.specular = mujoco.mjtCatBit.mjCAT_DECOR, 0.6, 0.0
    scene.ngeom += 1


def _in_software() -> bool:
    """Say whether the context in force draws on the processor."""
    try:
        from OpenGL import GL

        name = GL.glGetString(GL.GL_RENDERER) or b""
    except Exception:  # without PyOpenGL or its entry points the backend is a display's own, on a GPU
        return False
    return any(word in name.lower() for word in (b"llvmpipe", b"softpipe", b"swrast", b"software"))


def _cheapen(model: mujoco.MjModel) -> None:
    """Set a picture quality that a processor can draw at some 20 frames a second; it is five times faster so."""
    quality = model.vis.quality
    quality.offsamples, quality.shadowsize = 0, min(quality.shadowsize, 1024)
    quality.numslices, quality.numstacks = min(quality.numslices, 16), min(quality.numstacks, 8)
    model.mat_reflectance[:] = 0  # each mirror draws the scene once more, and so does each light with shadows
    model.light_castshadow[np.flatnonzero(model.light_castshadow)[1:]] = False


def _open_context(width: int, height: int) -> Any:
    backend = choose_backend()
    try:
        kind = importlib.import_module(f"mujoco.{backend}").GLContext if backend else mujoco.GLContext
        context = kind(width, height)
        context.make_current()
    except Exception as error:  # each backend fails in its own way
        message = f"OpenGL ({backend or 'default'}) cannot be opened: {error}; set MUJOCO_GL before the start, or {HINT}"
        raise ExtraError(message) from error
    return context

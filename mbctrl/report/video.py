"""A video of a run, rendered off screen from its log: the arm, its target, the tool's trace and the obstacles."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from mbctrl.base.errors import ExtraError
from mbctrl.base.logs import Log, LogError
from mbctrl.base.scene import MOVING, Goal, Obstacle, PoseGoal
from mbctrl.report import replacing
from mbctrl.report.offscreen import Canvas

logger = logging.getLogger(__name__)

TRACE = 4.0  # [s], how long the tool's trace stays visible
TOOL, TARGET, OBSTACLE, GHOST = (0.10, 0.55, 1.0), (0.20, 0.80, 0.35), (0.90, 0.15, 0.12), (0.95, 0.75, 0.20)
AXES = ((0.90, 0.20, 0.20), (0.20, 0.75, 0.25), (0.20, 0.40, 0.95))
AnyGoal = Goal | None


def render_video(
    model: mujoco.MjModel,
    log: Log,
    path: Path,
    *,
    joints: list[str],
    obstacles: tuple[Obstacle, ...] = (),
    goal: AnyGoal = None,
    fps: int = 30,
    width: int = 960,
    height: int = 540,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Render a run in real time as an MP4 (H.264).

    Args:
        model: the robot; its camera ``main`` is used if it has one.
        log: the run log with ``t`` [s] and ``q.JOINT`` [rad or m], and ``tcp`` and ``target`` where known.
        path: the file to write; it appears only when it is complete.
        joints: the joints' names in the model, as in the log.
        obstacles, goal: drawn in red, moving as planned; all the poses, or the curve, in pale (None: nothing).
        fps, width, height: frames a second and their size [px], even.
        progress: called with (frames done, frames in all).

    Errors:
        ExtraError, LogError: without OpenGL or PyAV; for a log without samples or these joints.
    """
    av = _import_av()
    clip = _Clip(model, log, joints, fps)
    drawing = _Drawing(clip, obstacles, goal)
    with Canvas(clip.model, width, height) as canvas, replacing(path) as temporary:
        with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as file:
            stream = _stream(av, file, fps, canvas.width, canvas.height)
            for done, pixels in enumerate(_pictures(canvas, clip, drawing), 1):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
                if progress:
                    progress(done, clip.frames)
            file.mux(stream.encode(None))
    logger.info("wrote %s, %d frames", path, clip.frames)


def _pictures(canvas: Canvas, clip: _Clip, drawing: _Drawing) -> Iterator[np.ndarray]:
    for index in range(clip.frames):
        clip.pose(index)
        yield canvas.render(clip.data, drawing.camera, lambda scene: drawing.draw(scene, index), f"{clip.times[index]:5.1f} s")


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ExtraError('a video needs PyAV: pip install "mbctrl[sim]"') from None
    return av


def _stream(av: Any, file: Any, fps: int, width: int, height: int) -> Any:
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    options = {"crf": "21", "preset": "veryfast"} if codec == "libx264" else {"q": "3"}
    stream = file.add_stream(codec, rate=Fraction(fps), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    if codec == "mpeg4":
        stream.bit_rate = 6_000_000
    return stream


class _Clip:
    """The log at the frames' times: joint positions, tool and target."""

    def __init__(self, model: mujoco.MjModel, log: Log, joints: list[str], fps: int) -> None:
        if "t" not in log or not len(log["t"]):
            raise LogError("no samples to render")
        self.model = copy.copy(model)
        self.data = mujoco.MjData(self.model)
        self._address = [_address(model, joint) for joint in joints]
        t = log["t"] - log["t"][0]
        self.start = float(log["t"][0])
        self.fps, self.frames = fps, int(t[-1] * fps + 1e-6) + 1
        self.times = np.arange(self.frames) / fps
        self.q = np.stack([np.interp(self.times, t, log[f"q.{joint}"]) for joint in joints], axis=1)
        row = np.clip(np.searchsorted(t, self.times + 1e-9, side="right") - 1, 0, None)
        self.tool = log["tcp"][row] if "tcp" in log else np.full((self.frames, 3), np.nan)
        parts = [
            log[name][row] if name in log else np.full((self.frames, n), np.nan)
            for name, n in (("target", 3), ("target_quaternion", 4))
        ]
        self.target = np.concatenate(parts, axis=1)  # position, then wxyz

    def pose(self, index: int) -> None:
        """Put the model into frame ``index``'s configuration."""
        self.data.qpos[self._address] = self.q[index]
        mujoco.mj_forward(self.model, self.data)


def _address(model: mujoco.MjModel, joint: str) -> int:
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, joint)
    if number < 0:
        raise LogError("the model has no such joint", key=joint)
    return int(model.jnt_qposadr[number])


class _Drawing:
    """What is drawn over the model, and where from."""

    def __init__(self, clip: _Clip, obstacles: tuple[Obstacle, ...], goal: AnyGoal) -> None:
        model = clip.model
        self.clip, self.obstacles = clip, [item for item in obstacles if item.shape != "plane"]
        self.pale = _pale_targets(goal)
        self.size = 0.045 * float(np.clip(model.stat.extent, 0.2, 2.0))  # [m], of the marks, to suit the arm
        self.camera = _camera(model, clip, self.obstacles)

    def draw(self, scene: mujoco.MjvScene, index: int) -> None:
        """Add the marks of frame ``index`` to the scene; what comes first stays when it is full."""
        for obstacle in self.obstacles:
            position, _ = obstacle.at(self.clip.start + self.clip.times[index])
            kind = mujoco.mjtGeom.mjGEOM_SPHERE if obstacle.shape == "sphere" else mujoco.mjtGeom.mjGEOM_BOX
            add_geom(scene, kind, _three(obstacle.size), position, np.eye(3), (*OBSTACLE, 0.3))
        self._draw_target(scene, self.clip.target[index])
        for line in self.pale:
            for a, b in zip(line[:-1], line[1:]):
                add_segment(scene, a, b, 0.04 * self.size, (*GHOST, 0.55))
            if len(line) == 1:
                add_geom(scene, mujoco.mjtGeom.mjGEOM_SPHERE, [0.3 * self.size] * 3, line[0], np.eye(3), (*GHOST, 0.6))
        self._draw_trace(scene, index)

    def _draw_target(self, scene: mujoco.MjvScene, target: np.ndarray) -> None:
        if not np.isfinite(target[:3]).all():
            return
        add_geom(scene, mujoco.mjtGeom.mjGEOM_SPHERE, [0.55 * self.size] * 3, target[:3], np.eye(3), (*TARGET, 0.4))
        if not np.isfinite(target[3:]).all():
            return
        rotation = np.empty(9)
        mujoco.mju_quat2Mat(rotation, target[3:])
        for axis, colour in zip(rotation.reshape(3, 3).T, AXES):
            add_segment(scene, target[:3], target[:3] + 1.6 * self.size * axis, 0.09 * self.size, (*colour, 1.0))

    def _draw_trace(self, scene: mujoco.MjvScene, index: int) -> None:
        first = max(0, index - round(TRACE * self.clip.fps))
        last = self.clip.tool[index]
        for step in range(index - 1, first - 1, -1):  # from new to old, so that a full scene loses the oldest
            point = self.clip.tool[step]
            # Short steps are joined: each costs time, and a tool at rest would pile up hundreds of them.
            if np.isfinite(point).all() and np.isfinite(last).all() and np.linalg.norm(point - last) > 0.25 * self.size:
                fade = 1 - (index - step) / (TRACE * self.clip.fps)
                add_segment(scene, last, point, 0.07 * self.size, (*TOOL, max(0.85 * fade, 0.02)))
                last = point


def _three(size: tuple[float, ...]) -> list[float]:
    return [*size, *[size[-1]] * (3 - len(size))]


def _pale_targets(goal: AnyGoal) -> list[np.ndarray]:
    """Return lines (N, 3) [m] that show the whole goal; of one point each for poses."""
    if isinstance(goal, PoseGoal):
        return [np.array([target.position]) for target in goal.targets] if len(goal.targets) > 1 else []
    if isinstance(goal, MOVING):
        return [goal.sample(0, np.linspace(0, goal.lap, 61))[0]]
    return []


def _camera(model: mujoco.MjModel, clip: _Clip, obstacles: list[Obstacle]) -> mujoco.MjvCamera:
    """Return the model's camera ``main``, or a free one that frames the arm, its path and the obstacles."""
    camera = mujoco.MjvCamera()
    main = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "main")
    if main >= 0:
        camera.type, camera.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, main
        return camera
    mujoco.mjv_defaultFreeCamera(model, camera)
    points = [obstacle.at(0.0)[0][None] for obstacle in obstacles]
    solid = (model.geom_type != mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_rbound < 2.0)  # no floors or walls
    for index in np.unique(np.linspace(0, clip.frames - 1, 9).astype(int)):
        clip.pose(index)
        points += [clip.data.geom_xpos[solid], clip.tool[index][None], clip.target[index][None, :3]]
    cloud = np.concatenate(points)
    cloud = cloud[np.isfinite(cloud).all(axis=1)]
    if len(cloud):
        low, high = cloud.min(axis=0), cloud.max(axis=0)
        camera.lookat[:] = (low + high) / 2
        radius = max(float(np.linalg.norm(high - low)) / 2, 0.5 * float(model.geom_rbound[solid].max(initial=0.05)))
        camera.distance = radius / np.sin(np.radians(model.vis.global_.fovy) / 2)
    return camera


def add_geom(
    scene: mujoco.MjvScene, kind: int, size: list[float], position: np.ndarray, rotation: np.ndarray, rgba: tuple[float, ...]
) -> None:
    """Add a decoration to a scene, unless it is full: ``size`` (3,) [m], ``position`` (3,) [m], ``rotation`` (3, 3)."""
    if scene.ngeom >= scene.maxgeom:
        return
    geom = scene.geoms[scene.ngeom]
    size, position, rgba = np.asarray(size, float), np.asarray(position, float), np.asarray(rgba, np.float32)
    mujoco.mjv_initGeom(geom, kind, size, position, rotation.reshape(9), rgba)
    geom.category, geom.specular = mujoco.mjtCatBit.mjCAT_DECOR, 0.1
    scene.ngeom += 1


def add_segment(scene: mujoco.MjvScene, start: np.ndarray, end: np.ndarray, radius: float, rgba: tuple[float, ...]) -> None:
    """Add a capsule between two points (3,) [m] to a scene, unless it is full; ``radius`` [m]."""
    if scene.ngeom >= scene.maxgeom:
        return
    capsule = mujoco.mjtGeom.mjGEOM_CAPSULE
    add_geom(scene, capsule, [radius] * 3, start, np.eye(3), rgba)
    mujoco.mjv_connector(scene.geoms[scene.ngeom - 1], capsule, radius, np.asarray(start, float), np.asarray(end, float))

"""A live view in the browser: the arm, a target to drag, obstacles and the paths the planner is considering."""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np

from mbctrl.base.errors import ExtraError, ModelError
from mbctrl.base.scene import Obstacle

logger = logging.getLogger(__name__)

Pose = tuple[np.ndarray, np.ndarray | None]  # position (3,) [m], wxyz (4,) or None: any orientation

RED, GREEN, IDENTITY = (214, 60, 52), (70, 190, 110), (1.0, 0.0, 0.0, 0.0)
NEAR, FAR = np.array([0, 200, 255]), np.array([130, 30, 235])  # colours of the fan, from now to the horizon
GRAB = 0.5  # [s], how long after the last drag event the gizmo still belongs to the user


class Viewer:
    """Serves the view; made for one control process and any number of browser windows.

    Args:
        model: the robot.
        joints: names in the model of the joints whose positions ``update`` gets.
        host: address to serve on; the default is this machine alone. Whoever can reach it can move the target.
        port: port to serve on; the next free one is taken when it is in use, see ``url``.

    Errors:
        ExtraError: without viser.
        ModelError: for a joint that the model does not have.
    """

    def __init__(self, model: mujoco.MjModel, joints: list[str], *, host: str = "127.0.0.1", port: int = 8080) -> None:
        viser = _import_viser()
        self._model, self._data = model, mujoco.MjData(model)
        self._address = [_address(model, joint) for joint in joints]
        self._lock = threading.Lock()
        self._dragged: tuple[np.ndarray, np.ndarray] | None = None
        self._held, self._touched = False, -np.inf
        self._obstacles: dict[Obstacle, Any] = {}
        self._fan: Any = None
        self._status = ""
        # Browsers open connections ahead of need and drop them; that is not worth a traceback each time.
        logging.getLogger("websockets.server").setLevel(logging.CRITICAL)
        with _silence():
            self._server = viser.ViserServer(host=host, port=port, label="mbctrl", verbose=False)
        # A window may ask for a tunnel to the outside, through which anybody could move a real arm's target.
        self._server.request_share_url = lambda verbose=True: None
        self.url = f"http://{self._server.get_host()}:{self._server.get_port()}"
        mujoco.mj_kinematics(model, self._data)
        self._extent = _bounds(model, self._data)[1]
        self._scale = self._extent / 1.2  # marks are sized for an arm of Panda's reach
        self._framed = False
        _stage(self._server, model, self._extent)
        self._bodies = {body: self._add_body(body) for body in _shown_bodies(model)}
        self._gizmo = self._add_gizmo()
        self._text = self._server.gui.add_markdown("waiting for the first state …")
        self._show_fan = self._server.gui.add_checkbox("planned paths", True)
        logger.info("viewer at %s", self.url)

    def update(
        self,
        t: float,
        q: np.ndarray,
        target: Pose | None,
        obstacles: Sequence[tuple[Obstacle, np.ndarray]],
        fan: np.ndarray | None,
        status: str,
    ) -> None:
        """Show a state.

        Args:
            t: time of the run [s].
            q: (nu,) joint positions [rad or m].
            target: tool pose aimed at, or None; it is ignored while the user drags the gizmo.
            obstacles: each with its position (3,) [m] now.
            fan: (F, H+1, 3) tool paths [m], or None.
            status: a line of Markdown for the panel.
        """
        self._data.qpos[self._address] = q
        mujoco.mj_kinematics(self._model, self._data)
        if not self._framed:  # only now is it known how the arm stands
            self._framed = True
            _frame(self._server, *_bounds(self._model, self._data), self._extent)
        with self._server.atomic():
            for body, frame in self._bodies.items():
                frame.position, frame.wxyz = self._data.xpos[body], self._data.xquat[body]
            self._place_target(target)
            self._place_obstacles(obstacles)
            self._place_fan(fan)
        text = f"**t = {t:.1f} s**\n\n{status}"
        if text != self._status:
            self._text.content = self._status = text

    def dragged(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pose that the user dragged the target to, position (3,) [m] and wxyz (4,), once; else None."""
        with self._lock:
            pose, self._dragged = self._dragged, None
        return pose

    def close(self) -> None:
        """Stop serving; safe to call twice."""
        if self._server is not None:
            with _silence():
                self._server.stop()
            self._server = None

    # --- parts of the scene ---------------------------------------------------------------------------------------

    def _add_body(self, body: int) -> Any:
        name = f"/robot/{body}"
        frame = self._server.scene.add_frame(name, show_axes=False, position=self._data.xpos[body], wxyz=self._data.xquat[body])
        for geom in _shown_geoms(self._model, body):
            _add_geom(self._server.scene, f"{name}/{geom}", self._model, geom)
        return frame

    def _add_gizmo(self) -> Any:
        scene, scale = self._server.scene, self._scale
        gizmo = scene.add_transform_controls("/target", scale=0.16 * scale, line_width=2.5, depth_test=False, visible=False)
        scene.add_icosphere("/target/ball", 0.022 * scale, GREEN, opacity=0.55, cast_shadow=False, receive_shadow=False)
        scene.add_frame("/target/axes", axes_length=0.075 * scale, axes_radius=0.004 * scale, origin_radius=0.0)
        gizmo.on_update(self._on_drag)
        return gizmo

    def _on_drag(self, event: Any) -> None:  # in one of viser's threads
        pose = np.array(event.target.position, float), np.array(event.target.wxyz, float)
        with self._lock:
            self._held = event.phase != "end"
            self._touched = time.monotonic()
            if event.phase != "start":
                self._dragged = pose

    def _place_target(self, target: Pose | None) -> None:
        if self._gizmo.visible != (target is not None):
            self._gizmo.visible = target is not None
        with self._lock:  # a window closed in mid-drag never ends it: after a while without news it counts as ended
            quiet = time.monotonic() - self._touched
            busy = self._dragged is not None or quiet < (10 * GRAB if self._held else GRAB)
        if target is None or busy:
            return
        position, wxyz = target
        if not np.allclose(self._gizmo.position, position, atol=1e-5):
            self._gizmo.position = position
        if wxyz is not None and not np.allclose(self._gizmo.wxyz, wxyz, atol=1e-5):
            self._gizmo.wxyz = wxyz

    def _place_obstacles(self, obstacles: Sequence[tuple[Obstacle, np.ndarray]]) -> None:
        for obstacle in self._obstacles.keys() - {obstacle for obstacle, _ in obstacles}:
            self._obstacles.pop(obstacle).remove()
        for obstacle, position in obstacles:
            if obstacle.shape == "plane":
                continue  # floors and walls would hide what matters
            if obstacle not in self._obstacles:
                self._obstacles[obstacle] = self._add_obstacle(obstacle, position)
            node = self._obstacles[obstacle]
            if not np.array_equal(node.position, position):
                node.position = position

    def _add_obstacle(self, obstacle: Obstacle, position: np.ndarray) -> Any:
        name, scene = f"/obstacles/{obstacle.name}", self._server.scene
        if obstacle.shape == "sphere":
            return scene.add_icosphere(name, obstacle.size[0], RED, opacity=0.55, position=position)
        return scene.add_box(name, RED, tuple(2 * length for length in obstacle.size), opacity=0.55, position=position)

    def _place_fan(self, fan: np.ndarray | None) -> None:
        shown = fan is not None and fan.size > 0 and self._show_fan.value
        if self._fan is not None and self._fan.visible != shown:
            self._fan.visible = shown
        if not shown:
            return
        points, colours = fan_segments(fan)
        if self._fan is None or len(self._fan.points) != len(points):
            name = "/fan"
            self._fan = self._server.scene.add_line_segments(name, points, colours, thickness=2.0, thickness_units="screen")
        else:
            self._fan.points = points


def fan_segments(fan: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn paths (F, H+1, 3) [m] into segments (F H, 2, 3) and their colours (F H, 2, 3), uint8, paling over the horizon."""
    number, samples = fan.shape[:2]
    points = np.stack([fan[:, :-1], fan[:, 1:]], axis=2).reshape(-1, 2, 3).astype(np.float32)
    shade = NEAR + (FAR - NEAR) * np.linspace(0, 1, samples)[:, None]
    colours = np.tile(np.stack([shade[:-1], shade[1:]], axis=1), (number, 1, 1)).astype(np.uint8)
    return points, colours


def _silence() -> contextlib.AbstractContextManager[Any]:
    """Keep viser's banners from standard output: what is printed there is the command line's business."""
    return contextlib.redirect_stdout(io.StringIO())


def _import_viser() -> Any:
    try:
        import viser
    except ImportError:
        raise ExtraError('the viewer needs viser: pip install "mbctrl[viewer]"') from None
    return viser


def _address(model: mujoco.MjModel, joint: str) -> int:
    number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_JOINT, joint)
    if number < 0:
        raise ModelError("the model has no such joint", key=joint)
    return int(model.jnt_qposadr[number])


def _bounds(model: mujoco.MjModel, data: mujoco.MjData) -> tuple[np.ndarray, float]:
    """Return centre (3,) and largest side [m] of what is shown, which unlike the model's own figures has no floor in it."""
    geoms = [geom for body in _shown_bodies(model) for geom in _shown_geoms(model, body)]
    if not geoms:
        return np.asarray(model.stat.center), float(np.clip(model.stat.extent, 0.2, 3.0))
    place, radius = data.geom_xpos[geoms], model.geom_rbound[geoms][:, None]
    low, high = (place - radius).min(axis=0), (place + radius).max(axis=0)
    return (low + high) / 2, float(np.clip((high - low).max(), 0.2, 3.0))


def _frame(server: Any, center: np.ndarray, side: float, extent: float) -> None:
    """Point the first camera at the arm as it stands, with room for where it may go."""
    distance = max(side, 0.85 * extent)
    server.initial_camera.position = tuple(center + distance * np.array([1.15, -1.07, 0.6]))
    server.initial_camera.look_at = tuple(center)
    server.initial_camera.fov = np.radians(45)


def _stage(server: Any, model: mujoco.MjModel, extent: float) -> None:
    """Set theme, lights and floor."""
    server.gui.configure_theme(dark_mode=True, show_logo=False, show_share_button=False, brand_color=(60, 130, 220))
    server.scene.configure_default_lights(enabled=False)
    server.scene.add_light_hemisphere("/lights/sky", sky_color=(255, 255, 255), ground_color=(90, 95, 110), intensity=1.15)
    key, fill = (1.5 * extent, -extent, 2.5 * extent), (-extent, 1.5 * extent, extent)
    server.scene.add_light_directional("/lights/key", intensity=1.9, cast_shadow=True, position=key)
    server.scene.add_light_directional("/lights/fill", color=(190, 210, 255), intensity=0.6, position=fill)
    cell = 0.1 if extent > 0.6 else 0.02
    floor = _floor_height(model)
    server.scene.add_grid(
        "/floor", infinite_grid=True, cell_size=cell, section_size=5 * cell, fade_distance=6 * extent, cell_color=(62, 66, 74),
        section_color=(92, 98, 110), plane_color=(34, 37, 43), plane_opacity=1.0, shadow_opacity=0.35, position=(0, 0, floor),
    )  # fmt: skip


def _floor_height(model: mujoco.MjModel) -> float:
    planes = np.flatnonzero((model.geom_type == mujoco.mjtGeom.mjGEOM_PLANE) & (model.geom_bodyid == 0))
    return float(model.geom_pos[planes, 2].min()) if len(planes) else 0.0


# --- geoms of the model ---------------------------------------------------------------------------------------------------


def _shown_bodies(model: mujoco.MjModel) -> list[int]:
    return [body for body in range(model.nbody) if _shown_geoms(model, body)]


def _shown_geoms(model: mujoco.MjModel, body: int) -> list[int]:
    """Return the geoms of a body that are for looking: not those of group 3, which by custom are for collisions."""
    geoms = [geom for geom in range(model.ngeom) if model.geom_bodyid[geom] == body and _colour(model, geom)[3] > 0]
    solid = [geom for geom in geoms if model.geom_type[geom] != mujoco.mjtGeom.mjGEOM_PLANE]  # the floor is a grid
    if (model.geom_group == 3).all():
        return solid
    return [geom for geom in solid if model.geom_group[geom] != 3]


def _colour(model: mujoco.MjModel, geom: int) -> np.ndarray:
    """Return rgba (4,) in 0..1: the material's, unless the geom has its own, as MuJoCo does it."""
    own, material = model.geom_rgba[geom], model.geom_matid[geom]
    return model.mat_rgba[material] if material >= 0 and np.allclose(own, (0.5, 0.5, 0.5, 1)) else own


def _add_geom(scene: Any, name: str, model: mujoco.MjModel, geom: int) -> None:
    kinds, kind, size = mujoco.mjtGeom, model.geom_type[geom], model.geom_size[geom]
    rgba = _colour(model, geom)
    common: dict[str, Any] = {
        "color": tuple(int(round(255 * value)) for value in rgba[:3]),
        "opacity": None if rgba[3] >= 0.999 else float(rgba[3]),
        "position": model.geom_pos[geom],
        "wxyz": model.geom_quat[geom],
    }
    if kind == kinds.mjGEOM_SPHERE:
        scene.add_icosphere(name, float(size[0]), **common)
    elif kind == kinds.mjGEOM_ELLIPSOID:
        scene.add_icosphere(name, 1.0, scale=tuple(map(float, size)), **common)
    elif kind == kinds.mjGEOM_BOX:
        scene.add_box(name, dimensions=tuple(2 * size), **common)
    elif kind == kinds.mjGEOM_CYLINDER:
        scene.add_cylinder(name, float(size[0]), float(2 * size[1]), **common)
    elif kind == kinds.mjGEOM_CAPSULE:
        scene.add_mesh_simple(name, *capsule_mesh(float(size[0]), float(size[1])), **common)
    elif kind == kinds.mjGEOM_MESH:
        scene.add_mesh_simple(name, *model_mesh(model, int(model.geom_dataid[geom])), side="double", **common)
    else:
        logger.debug("geom %d of kind %s is not shown", geom, kind)


def capsule_mesh(radius: float, half: float, around: int = 24, rings: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) [m] and faces (N, 3) of a capsule along z; ``half`` is the cylinder's half length [m]."""
    polar = np.concatenate([np.linspace(0, np.pi / 2, rings), np.linspace(np.pi / 2, np.pi, rings)])
    turn = np.linspace(0, 2 * np.pi, around, endpoint=False)
    height = radius * np.cos(polar) + np.repeat([half, -half], rings)
    ring = radius * np.sin(polar)
    x, y, z = np.outer(ring, np.cos(turn)), np.outer(ring, np.sin(turn)), np.repeat(height[:, None], around, axis=1)
    start = (np.arange(len(polar) - 1)[:, None] * around + np.arange(around)).ravel()
    side = (np.arange(len(polar) - 1)[:, None] * around + (np.arange(around) + 1) % around).ravel()
    faces = np.concatenate([np.stack([start, start + around, side], 1), np.stack([side, start + around, side + around], 1)])
    return np.stack([x, y, z], axis=-1).reshape(-1, 3), faces


def model_mesh(model: mujoco.MjModel, mesh: int) -> tuple[np.ndarray, np.ndarray]:
    """Return vertices (V, 3) [m] and faces (N, 3) of a mesh, with vertices split where its normals have an edge."""
    faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
    corners = np.stack([model.mesh_face[faces].ravel(), model.mesh_facenormal[faces].ravel()], axis=1)
    unique, index = np.unique(corners, axis=0, return_inverse=True)
    return model.mesh_vert[model.mesh_vertadr[mesh] + unique[:, 0]], index.reshape(-1, 3)

"""What a run is judged by, computed by MuJoCo and not by the planner's own model: tool pose and clearance."""

from __future__ import annotations

import mujoco
import numpy as np

from mbctrl.base.errors import ModelError
from mbctrl.base.robot import Robot
from mbctrl.base.scene import Obstacle
from mbctrl.dynamics.load import parse_model

_KINDS = {"sphere": mujoco.mjtGeom.mjGEOM_SPHERE, "box": mujoco.mjtGeom.mjGEOM_BOX, "plane": mujoco.mjtGeom.mjGEOM_PLANE}
_FAR = 2.0  # [m], distances are not followed beyond
_COLLISION_GROUP = 3


class Monitor:
    """Tool pose and clearance of a robot among obstacles.

    Args:
        mj: the compiled model.
        robot: its tool, and the model file the obstacles are added to.
        obstacles: what to keep clear of.

    Errors:
        ModelError: for obstacles with a model that is not a file.
    """

    def __init__(self, mj: mujoco.MjModel, robot: Robot, obstacles: tuple[Obstacle, ...] = ()) -> None:
        if obstacles and ":" in robot.model_path:
            raise ModelError("obstacles need a robot with a model file", file=robot.model_path, key="obstacles")
        self.obstacles = obstacles
        self.model = _with_obstacles(robot.model_path, obstacles) if obstacles else mj
        self.data = mujoco.MjData(self.model)
        self._tool = robot.tool
        self._arm = _collision_geoms(self.model)
        self._geoms = [self.model.geom(f"obstacle:{obstacle.name}").id for obstacle in obstacles]

    def update(self, q: np.ndarray, t: float) -> None:
        """Move the arm to ``q`` (nq,) [rad] and the obstacles to time ``t`` [s]."""
        self.data.qpos[:] = q
        for i, obstacle in enumerate(self.obstacles):
            self.data.mocap_pos[i] = obstacle.at(t)[0]
        mujoco.mj_kinematics(self.model, self.data)
        if self.obstacles:
            mujoco.mj_comPos(self.model, self.data)

    def tool(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the tool's position (3,) [m] and rotation (3, 3)."""
        return self.pose(self._tool)

    def pose(self, frame: str) -> tuple[np.ndarray, np.ndarray]:
        """Return position (3,) [m] and rotation (3, 3) of a site, or of the body of that name."""
        site = mujoco.mj_name2id(self.model, mujoco.mjtObj.mjOBJ_SITE, frame)
        place = self.data.site(site) if site >= 0 else self.data.body(frame)
        return place.xpos.copy(), place.xmat.reshape(3, 3).copy()

    def clearance(self) -> float:
        """Return the least distance of the arm's moving collision geoms from any obstacle [m]; nan without obstacles."""
        if not self._geoms:
            return float("nan")
        pairs = ((arm, obstacle) for arm in self._arm for obstacle in self._geoms)
        return min(mujoco.mj_geomDistance(self.model, self.data, arm, other, _FAR, None) for arm, other in pairs)


def _with_obstacles(path: str, obstacles: tuple[Obstacle, ...]) -> mujoco.MjModel:
    spec = parse_model(path)
    for obstacle in obstacles:
        body = spec.worldbody.add_body(name=f"obstacle:{obstacle.name}", mocap=True, pos=obstacle.position)
        size = [*obstacle.size, 0, 0, 0][:3] if obstacle.shape != "plane" else [0, 0, 0.01]
        geom = body.add_geom(name=f"obstacle:{obstacle.name}", type=_KINDS[obstacle.shape], size=size, contype=0, conaffinity=0)
        if obstacle.shape == "plane":
            geom.alt.type = mujoco.mjtOrientation.mjORIENTATION_ZAXIS  # zaxis alone is ignored
            geom.alt.zaxis = obstacle.normal
    return spec.compile()


def _collision_geoms(model: mujoco.MjModel) -> list[int]:
    moving = [
        g
        for g in range(model.ngeom)
        if model.body_weldid[model.geom_bodyid[g]] != 0 and model.body_mocapid[model.geom_bodyid[g]] < 0
    ]
    return [g for g in moving if model.geom_group[g] == _COLLISION_GROUP] or moving

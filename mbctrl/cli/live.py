"""The viewer in a process of its own, so that drawing never holds up the control loop."""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import DriverError
from mbctrl.base.extras import need
from mbctrl.base.poses import quaternion_from_rotation, rotation_from_quaternion
from mbctrl.runtime.process import answer, quiet_start

Target = tuple[np.ndarray, np.ndarray | None]


class ViewerPort:
    """Starts the viewer's process and feeds it; ``url`` is where it is shown.

    Errors:
        ExtraError: without viser.
    """

    def __init__(self, config: RunConfig, file: Path, port: int) -> None:
        need("viser", "viewer", "the viewer")
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, file, port), daemon=True)
        quiet_start(self._process)
        theirs.close()
        said = self._pipe.recv() if self._pipe.poll(60) else DriverError("the viewer did not come up", key="viewer")
        if isinstance(said, BaseException):
            raise said
        self.url: str = said

    def exchange(self, live: Any) -> Target | None:
        """Send what there is to see; return a target the user dragged, or None. Never waits."""
        if not self._process.is_alive():
            return None
        error, joints = live.progress.position_error, not np.isfinite(live.progress.rotation_error)
        what = f"joint error {error:.3f} rad" if joints else f"position error {error * 1e3:.1f} mm"
        status = f"{what}  \nlatency {live.latency * 1e3:.0f} ms"
        self._pipe.send((live.t, live.q, live.target, None if live.plan is None else live.plan.fan, status))
        target = None
        while self._pipe.poll():
            target = self._pipe.recv()
        return target

    def close(self) -> None:
        """End the viewer's process."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
        self._pipe.close()


def _serve(pipe: Connection, config: RunConfig, file: Path, port: int) -> None:
    """Run the viewer's process: build, then draw the newest state until the pipe closes."""

    def work() -> None:
        from mbctrl.dynamics.load import load_model
        from mbctrl.viewer import Viewer

        model = load_model(config.robot.name, file=file, key="robot")  # what is drawn has no mass
        viewer = Viewer(model.mj, list(model.robot.joints), port=port)
        pipe.send(viewer.url)
        while True:
            message = pipe.recv()
            while pipe.poll():  # only the newest is worth drawing
                message = pipe.recv()
            dragged = _draw(viewer, config, *message)
            if dragged is not None:
                pipe.send(dragged)

    answer(pipe, "viewer", work)


def _draw(viewer: Any, config: RunConfig, t: float, q: np.ndarray, target: Target | None, fan: Any, status: str) -> Target | None:
    """Show a state; return the target the user has dragged since, or None."""
    pose = None if target is None else (target[0], None if target[1] is None else quaternion_from_rotation(target[1]))
    viewer.update(t, q, pose, [(obstacle, obstacle.at(t)[0]) for obstacle in config.obstacles], fan, status)
    dragged = viewer.dragged()
    if dragged is None:
        return None
    any_orientation = target is not None and target[1] is None
    return dragged[0], None if any_orientation else rotation_from_quaternion(dragged[1])

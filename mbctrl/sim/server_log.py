"""What the simulated robot itself went through, tick by tick, and the judgement of it that fault tests rest on.

The file is one line of JSON (robot, joints, period) and then raw little-endian float64 rows. Not the CSV of a run: 1000
rows of text cost the loop about 10 ms a second, the same in binary about 0.1 ms, so it can be written while the
robot runs, memory stays bounded and a server that is killed loses a quarter of a second at most.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mbctrl.base.logs import LogError
from mbctrl.base.robot import Robot
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.sim.plant import Plant

_FORMAT = "mbctrl server log 1"
_ROWS = 256  # between writes
_STATUS = {status: float(i) for i, status in enumerate(Status)}
REST = 0.01  # [rad/s] below which a joint stands still


def _widths(nq: int, nu: int) -> dict[str, int]:
    single = dict.fromkeys(("t", "host"), 1)
    return {**single, "q": nq, "v": nq, "tau": nu, "q_ref": nu, **dict.fromkeys(("commanded", "fault", "status", "late"), 1)}


class ServerLogWriter:
    """Takes one row a tick and writes 256 at a time; also keeps the largest torques and speeds, as a summary needs them.

    Args:
        path: the file to create; None: nothing is written.
        robot: order and limits.
    """

    def __init__(self, path: Path | None, robot: Robot) -> None:
        widths = _widths(robot.nq, robot.nu)
        ends = np.cumsum(list(widths.values()))
        self._part = {name: slice(end - width, end) for (name, width), end in zip(widths.items(), ends)}
        self._rows, self._count = np.zeros((_ROWS, int(ends[-1])), "<f8"), 0
        self.effort, self.speed = np.zeros(robot.nu), np.zeros(robot.nq)  # [N·m], [rad/s] largest so far
        self._file: BinaryIO | None = None
        if path is not None:
            names = {"robot": robot.name, "joints": robot.joints, "actuated": robot.driven}
            about = json.dumps({"format": _FORMAT, **names, "period": 1 / robot.control.rate})
            try:
                self._file = open(path, "wb", buffering=0)
                self._file.write(about.encode() + b"\n")
            except OSError as error:
                if self._file is not None:
                    self._file.close()
                raise LogError(f"cannot be written: {error.strerror}", file=path) from None

    def add(self, plant: Plant, state: RobotState, host: float, fault: bool, late: float) -> None:
        """Append one tick: the plant and its state after it, the host's monotonic time [s], how late the tick was [s]."""
        row, part = self._rows[self._count], self._part
        row[0], row[1] = state.stamp, host
        row[part["q"]], row[part["v"]], row[part["tau"]], row[part["q_ref"]] = state.q, state.v, state.tau, plant.law.q_ref
        row[-4:] = plant.commanded, fault, _STATUS[state.status], late
        self._count += 1
        if self._count == _ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows gathered so far; a full disk ends the log, not the robot."""
        rows, self._count = self._rows[: self._count], 0
        if not len(rows):
            return
        self.effort = np.maximum(self.effort, np.abs(rows[:, self._part["tau"]]).max(axis=0))
        self.speed = np.maximum(self.speed, np.abs(rows[:, self._part["v"]]).max(axis=0))
        if self._file is not None:
            try:
                self._file.write(rows.data)
            except OSError:
                self._file.close()
                self._file = None

    def close(self) -> None:
        """Write and close; safe to call twice."""
        self.flush()
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class ServerLog:
    """A server's log of T ticks.

    ``t`` (T,) the robot's own time [s], ``host`` (T,) the host's time.monotonic() [s], ``q`` (T, nq) [rad], ``v`` (T, nq)
    [rad/s], ``tau`` (T, nu) total torque applied [N·m], ``q_ref`` (T, nu) of the law in force [rad], ``commanded`` (T,)
    whether that was a client's, ``fault`` (T,) whether an injected fault was active, ``status`` (T,) Status, ``late`` (T,)
    how late the tick was [s].
    """

    robot: str
    joints: tuple[str, ...]
    period: float
    t: np.ndarray
    host: np.ndarray
    q: np.ndarray
    v: np.ndarray
    tau: np.ndarray
    q_ref: np.ndarray
    commanded: np.ndarray
    fault: np.ndarray
    status: np.ndarray
    late: np.ndarray

    @property
    def injected_at(self) -> float:
        """The robot's time [s] of the first tick with a fault active; LogError where there is none."""
        if not self.fault.any():
            raise LogError("no fault was active while it was written", key="fault")
        return float(self.t[np.argmax(self.fault)])

    def at_host(self, host: float) -> float:
        """Return the robot's time [s] of the first tick at or after ``host``, a time.monotonic() of the same machine."""
        later = self.host >= host
        if not later.any():
            raise LogError(f"ends before {host:.3f} s of the host's clock", key="host")
        return float(self.t[np.argmax(later)])


def read_server_log(path: str | Path) -> ServerLog:
    """Read a server's log; a last row that was cut off is left out.

    Errors:
        LogError: for a file that is missing or no such log.
    """
    try:
        head, _, body = Path(path).read_bytes().partition(b"\n")
        about = json.loads(head)
        widths = _widths(len(about["joints"]), len(about["actuated"]))
        right = about["format"] == _FORMAT
    except OSError as error:
        raise LogError(f"cannot be read: {error.strerror}", file=path) from None
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise LogError(f"expected a '{_FORMAT}'", file=path)
    width = sum(widths.values())
    data = np.frombuffer(body, "<f8", len(body) // (8 * width) * width).reshape(-1, width)
    parts = dict(zip(widths, np.split(data, np.cumsum(list(widths.values()))[:-1], axis=1)))
    columns = {name: part[:, 0] if name in ("t", "host", "late") else part for name, part in parts.items()}
    columns |= {name: parts[name][:, 0] > 0 for name in ("commanded", "fault")}
    columns["status"] = np.array([*Status], object)[parts["status"][:, 0].astype(int)]
    return ServerLog(about["robot"], tuple(about["joints"]), about["period"], **columns)


@dataclass(frozen=True)
class Judgement:
    """What a robot did from an injection on; counts are of (tick, joint) pairs.

    ``standstill`` [s] from the injection until every joint is below 0.01 rad/s and stays there; inf where it never is.
    ``effort``, ``effort_rate`` and ``speed`` are the largest shares of the robot's limits; ``effort_rate`` None where it
    has no such limit. What is not finite counts as beyond every limit.
    """

    standstill: float
    effort: float
    effort_rate: float | None
    speed: float
    position_violations: int
    velocity_violations: int
    effort_violations: int

    @property
    def violations(self) -> int:
        """Position, velocity and effort limits together."""
        return self.position_violations + self.velocity_violations + self.effort_violations


def judge(log: ServerLog, robot: Robot, injected_at: float) -> Judgement:
    """Judge what the robot did from ``injected_at`` [s, the log's t] on.

    Errors:
        LogError: where the log ends before.
    """
    first = int(np.searchsorted(log.t, injected_at - 1e-9))
    if first == len(log.t):
        raise LogError(f"ends before the injection at {injected_at:.3f} s", key="t")
    limits, t = robot.limits, log.t[first:]
    q, v, tau = (np.nan_to_num(part[first:], nan=math.inf) for part in (log.q, log.v, log.tau))
    effort, speed = np.abs(tau) / np.asarray(limits.effort), np.abs(v) / np.asarray(limits.velocity)
    outside = (q < np.asarray(limits.position_lower) - 1e-9) | (q > np.asarray(limits.position_upper) + 1e-9)
    moving = np.flatnonzero((np.abs(v) >= REST).any(axis=1))
    still = 0 if not len(moving) else int(moving[-1]) + 1
    return Judgement(
        standstill=math.inf if still == len(t) else float(max(t[still] - injected_at, 0.0)),
        effort=float(effort.max()),
        effort_rate=_rate(log, robot, first),
        speed=float(speed.max()),
        position_violations=int(outside.sum()),
        velocity_violations=int((speed > 1 + 1e-9).sum()),
        effort_violations=int((effort > 1 + 1e-9).sum()),
    )


def _rate(log: ServerLog, robot: Robot, first: int) -> float | None:
    """Return the largest torque rate over its limit, the step into row ``first`` included."""
    if robot.limits.effort_rate is None:
        return None
    tau = log.tau[max(first - 1, 0) :]
    rates = np.abs(np.diff(tau, axis=0)) / log.period / np.asarray(robot.limits.effort_rate)
    return float(np.nan_to_num(rates, nan=math.inf).max(initial=0.0))

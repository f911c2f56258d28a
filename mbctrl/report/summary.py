"""What a run achieved, from its logs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from mbctrl.base.config import RunConfig
from mbctrl.base.logs import Log
from mbctrl.base.robot import Robot
from mbctrl.base.scene import MOVING, CircleGoal
from mbctrl.report.payload import Change, payload_changes
from mbctrl.runtime.loop import Counts
from mbctrl.runtime.progress import Progress


@dataclass(frozen=True)
class Summary:
    """The judgement of a run; lengths [m], angles [rad], times [s]; nan or None where a figure does not apply.

    ``limits`` holds, for each kind of limit, the largest share of it that was used and the joint that used it.
    """

    duration: float
    targets: int
    reached: list[float]
    reach_errors: list[tuple[float, float]]
    position_error: float  # at the end
    rotation_error: float
    tracking_rms: float  # after the first lap
    tracking_from: float
    clearance: float
    force_rms: float  # [N] of the error of the goal's force, when the tracking error is taken
    force_peak: float  # [N] in the second after the first touch
    touched: float  # [s] when that was
    payload: list[Change]  # what the tool picked up and put down
    carried: float  # [kg] what the planner's model carried at the end
    reward: float | None
    latency_p50: float
    latency_p99: float
    cpu: float
    plan_rate: float
    ess: float
    nonfinite: int
    late: int
    plans: int
    missed: int
    ticks: int
    held: int
    clamps: dict[str, int] = field(default_factory=dict)
    limits: dict[str, tuple[float, str]] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def violations(self) -> list[str]:
        """The limits the simulator's log exceeds, worst joint each."""
        return [f"{kind} of {joint}: {share:.1%}" for kind, (share, joint) in self.limits.items() if share > 1.0]


def summarise(
    config: RunConfig,
    robot: Robot,
    log: Log,
    plans: Log,
    counts: Counts,
    clamps: Counter[str],
    progress: Progress,
    reward: float | None,
    interrupted: bool,
) -> Summary:
    """Judge a run from its logs ``log`` and ``plans`` and what the loop counted."""
    t, error = log["t"], log["error.position"]
    lap = config.goal.lap if isinstance(config.goal, MOVING) else np.inf
    after = t > lap
    latency, cpu, ess = plans["latency"], plans["cpu"], plans["ess"]
    duration = float(t[-1]) if len(t) else 0.0
    return Summary(
        duration=duration,
        targets=progress.count,
        reached=list(progress.reached),
        reach_errors=list(progress.errors),
        position_error=progress.position_error,
        rotation_error=progress.rotation_error,
        tracking_rms=float(np.sqrt(np.mean(error[after] ** 2))) if after.any() else np.nan,
        tracking_from=float(lap),
        clearance=float(np.nanmin(log["clearance"])) if np.isfinite(log["clearance"]).any() else np.nan,
        **_pressing(config, log, after),
        payload=payload_changes(log),
        carried=float(log["payload.planned"][-1]) if "payload.planned" in log and len(t) else np.nan,
        reward=reward,
        latency_p50=_percentile(latency, 50),
        latency_p99=_percentile(latency, 99),
        cpu=_percentile(cpu, 50),
        plan_rate=len(latency) / duration if duration else 0.0,
        ess=_percentile(ess, 50),
        nonfinite=int(plans["nonfinite"].sum()),
        late=counts.late,
        plans=counts.plans,
        missed=counts.missed,
        ticks=counts.ticks,
        held=counts.held,
        clamps=dict(clamps),
        limits=limit_use(robot, log),
        interrupted=interrupted,
    )


def _pressing(config: RunConfig, log: Log, after: np.ndarray) -> dict[str, float]:
    """Return the figures of a contact, nan where there is none."""
    found = dict.fromkeys(("force_rms", "force_peak", "touched"), np.nan)
    if "contact.force" not in log:
        return found
    t, force = log["t"], log["contact.force"]
    if (force > 0).any():
        touched = float(t[np.argmax(force > 0)])
        found |= {"touched": touched, "force_peak": float(force[(t >= touched) & (t <= touched + 1.0)].max())}
    if isinstance(config.goal, CircleGoal) and config.goal.force is not None and after.any():
        found["force_rms"] = float(np.sqrt(np.mean((force[after] - config.goal.force) ** 2)))
    return found


def limit_use(robot: Robot, log: Log) -> dict[str, tuple[float, str]]:
    """Return, by kind of limit, the largest share of it the log uses and the joint: 1 is at the limit.

    Rates are differences over one control period, acceleration and jerk of the logged velocity.
    """
    limits = robot.limits
    fresh = np.diff(log["t"], prepend=-np.inf) > 0  # a robot may report the same measurement twice
    t, q, v, tau = (log[name][fresh] for name in ("t", "q", "v", "tau"))
    if len(t) < 4:
        return {}
    dt = np.diff(t)[:, None]
    low, high = np.asarray(limits.position_lower), np.asarray(limits.position_upper)
    middle, half = (low + high) / 2, (high - low) / 2
    acceleration = np.diff(v, axis=0) / dt
    used = {
        "position": (np.abs(q - middle) / half, robot.joints),
        "velocity": (np.abs(v) / limits.velocity, robot.joints),
        "torque": (np.abs(tau) / limits.effort, robot.driven),
    }
    if limits.effort_rate is not None:
        used["torque rate"] = (np.abs(np.diff(tau, axis=0) / dt) / limits.effort_rate, robot.driven)
    if limits.acceleration is not None:
        used["acceleration"] = (np.abs(acceleration) / limits.acceleration, robot.joints)
    if limits.jerk is not None:
        used["jerk"] = (np.abs(np.diff(acceleration, axis=0) / dt[1:]) / limits.jerk, robot.joints)
    return {kind: (float(share.max()), names[int(share.max(0).argmax())]) for kind, (share, names) in used.items()}


def _percentile(values: np.ndarray, q: float) -> float:
    return float(np.percentile(values, q)) if len(values) else np.nan

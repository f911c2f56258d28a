"""From what a user has, a run's log.csv or a Parquet file, to transitions at the model's time step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mbctrl.base.logs import Log, LogError, read_log
from mbctrl.base.robot import Robot
from mbctrl.learning.transitions import Source, TransitionError, Transitions, concatenate, made, read_transitions


def source_of(robot: Robot, revolute: Sequence[bool], dt: float) -> Source:
    """Return whose transitions a robot's are, at ``dt`` [s]."""
    command = "rad" if robot.control.mode == "impedance" else "N·m"
    return Source(robot.name, tuple(robot.joints), tuple(bool(turns) for turns in revolute), tuple(robot.driven), command, dt)


def read_all(paths: Sequence[str | Path], source: Source) -> Transitions:
    """Read transitions (.parquet) and logs of runs (.csv), which must be of ``source``.

    Errors:
        TransitionError, LogError: naming file and key, column or row.
    """
    parts = []
    for path in paths:
        part = read_transitions(path) if Path(path).suffix == ".parquet" else from_run(path, source)
        _check(part, source, path)
        parts.append(part)
    return concatenate(parts)


def _check(part: Transitions, source: Source, path: str | Path) -> None:
    for key, expected in vars(source).items():
        found = getattr(part.source, key)
        if found != expected and not (key == "dt" and abs(found - expected) < 1e-9):
            raise TransitionError(f"expected {expected}, found {found}", file=path, key=key)
    if not len(part):
        raise TransitionError("holds no transition", file=path)


def from_run(path: str | Path, source: Source) -> Transitions:
    """Return a run's transitions: states ``source.dt`` apart, and the command in between as planners mean it.

    Of torques that is the mean. Of references it is the last one in force: an implicit servo compares it with the state at the
    step's end (``Knots.at``); the mean would put half a step of lag into what is learnt.

    A stretch in which control periods were missed, or in which the safety gate changed the command, is left out: what
    moved the arm there is not what the log says.

    Errors:
        LogError: for another robot, and for a time step that is no multiple of the control period.
    """
    log = read_log(path)
    _whose(log, source, path)
    period = 1.0 / float(log.header["control_rate_hz"])
    every = round(source.dt / period)
    if every < 1 or abs(every * period - source.dt) > 1e-6:
        raise LogError(f"expected dt a multiple of the control period {period:g} s, found {source.dt:g} s", file=path, key="dt")
    t, q, v, u = log["t"], log["q"], log["v"], log["u"]
    starts = np.arange(0, len(t) - every, every)
    lasts = np.abs(t[starts + every] - t[starts] - source.dt) < 0.5 * period
    clamped = _summed(log["gate.clamped"] > 0, every)[starts] > 0
    kept = starts[lasts & ~clamped]
    x = np.hstack([q, v])
    pressed = log["contact.force"] > 0 if "contact.force" in log else np.zeros(len(t), bool)
    contact = _summed(pressed, every)[kept] > 0
    command = u[kept + every - 1] if source.command == "rad" else _summed(u, every)[kept] / every
    known = {"contact": contact, "t": t[kept], "row": kept + 1, "files": (str(path),)}
    return made(source, x[kept], command, x[kept + every], **known)


def _summed(values: np.ndarray, every: int) -> np.ndarray:
    """Return for each row the sum of so many from it on, (T - every + 1, …)."""
    total = np.cumsum(values, 0, dtype=float)
    return total[every - 1 :] - np.concatenate([np.zeros_like(total[:1]), total[:-every]])


def _whose(log: Log, source: Source, path: str | Path) -> None:
    for key, expected in (("robot", source.robot), ("joints", list(source.joints))):
        if log.header.get(key) != expected:
            raise LogError(f"expected {expected}, found {log.header.get(key)}", file=path, key=key)
    if "control_rate_hz" not in log.header:
        raise LogError("missing; is this a log of mbctrl run?", file=path, key="control_rate_hz")
    wanted = [f"u.{joint}" for joint in source.driven] + [f"{part}.{joint}" for part in "qv" for joint in source.joints]
    for column in (*wanted, "t", "gate.clamped"):
        if column not in log:
            raise LogError("no such column", file=path, key=column)
    unit = log.units[f"u.{source.driven[0]}"]
    expected = source.columns()[f"u_{source.driven[0]}"]
    if unit != expected:
        raise LogError(f"expected commands in {expected}, found {unit}", file=path, key=f"u.{source.driven[0]}")

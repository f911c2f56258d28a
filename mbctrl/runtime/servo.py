"""The control process: driver, guard and the one control loop at the robot's rate; plans come through mailboxes."""

from __future__ import annotations

import math
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import DriverError, MbctrlError, SpecError
from mbctrl.base.plan import PlanRequest
from mbctrl.base.scene import MOVING
from mbctrl.runtime.bundle import Bundle, load_bundle
from mbctrl.runtime.driver import Driver, JointCommand, RobotState
from mbctrl.runtime.guard import Guard, GuardSettings
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.logfile import log_header, record_dtype
from mbctrl.runtime.loop import ControlLoop, Tick
from mbctrl.runtime.port import MailboxPort, Sizes
from mbctrl.runtime.process import steady
from mbctrl.runtime.progress import Progress
from mbctrl.runtime.proxy import DriverProcess
from mbctrl.runtime.realtime import AbsoluteClock, RealTime, name_process
from mbctrl.runtime.recorder import Recorder
from mbctrl.runtime.shared import Mailbox
from mbctrl.runtime.watch import ArmWatch

LOG, BLACK_BOX = "log.mcap", "blackbox.mcap"
CLAMPS = ["gate", "limiter"]  # bits of a record's ``clamped``
SERVO_PRIORITY, DRIVER_PRIORITY = 50, 60
_TEXT = 200
_STALLED = 5.0  # [s] without coming nearer
_ENDING = 3.0  # [s] the arm has to come to rest at the end
_AT_REST = 0.1  # [s] for which everything must be as it should before the arm is armed
_LOOKS = 50  # control periods between looks at the parent
_GLANCE = 0.01  # [s] between looks at the way that is left to the goal
STATUS = np.dtype(
    [("t", "f8"), ("mode", "u1"), ("reached", "i4"), ("index", "i4"), ("position", "f8"), ("rotation", "f8"), ("plans", "i8")]
    + [("latency", "f8"), ("planner", "u1"), ("log", "u1"), ("reason", f"S{_TEXT}")]
)
ORDERS = np.dtype([("rearm", "i8"), ("end", "u1")])


@dataclass(frozen=True)
class ServoJob:
    """What the control process is told; everything in it can be pickled.

    ``make(robot, *args, **options)`` makes the driver in a process of its own; ``folder`` holds the mailboxes, ``out`` the
    logs; ``threads`` is left to the planner; ``realtime`` asks for real-time scheduling.
    """

    bundle: Path
    folder: Path
    out: Path
    config: RunConfig
    make: Callable[..., Driver]
    options: dict[str, Any] = field(default_factory=dict)
    realtime: bool = True
    guard: GuardSettings = GuardSettings()
    seal: str = ""
    parent: int = 0


class OnClock(Driver):
    """A driver whose stamps are on ``time.monotonic()``, on a loop's clock."""

    def __init__(self, driver: Driver, clock: AbsoluteClock) -> None:
        self._driver, self._clock = driver, clock

    def open(self) -> None:
        """Open the driver."""
        self._driver.open()
        self.senses_torque, self.follows = self._driver.senses_torque, self._driver.follows

    def read(self) -> RobotState:
        """Return the newest measurement."""
        state = self._driver.read()
        return replace(state, stamp=state.stamp - self._clock.epoch)

    def write(self, command: JointCommand) -> None:
        """Pass a command on."""
        self._driver.write(command)

    def stop(self) -> None:
        """Stop the driver."""
        self._driver.stop()


class Servo:
    """One run of the control process.

    Args:
        job: what to do.
        say: sends the parent a line that is worth printing.
    """

    def __init__(self, job: ServoJob, say: Callable[[str], None]) -> None:
        self.job, self._say = job, say
        self.notes: list[str] = []
        self.bundle: Bundle = load_bundle(job.bundle)
        if job.seal and self.bundle.seal != job.seal:
            raise DriverError("changed since the start", key=str(job.bundle))
        self.robot, self.config = self.bundle.robot, job.config
        self.clock = AbsoluteClock()
        realtime = RealTime(DRIVER_PRIORITY, inherit=True, timer_slack=1e-6) if job.realtime else RealTime()
        self._process = DriverProcess(self.robot, job.make, (self.robot,), job.options, realtime=realtime)
        self.driver = OnClock(self._process, self.clock)
        self.status, self._orders = Mailbox(job.folder / "status", STATUS), Mailbox(job.folder / "orders", ORDERS)
        self.progress = Progress(self.config.goal)
        self._record = np.zeros((), record_dtype(self.robot))
        self._squares, self._followed = 0.0, 0
        self._told, self._rearmed, self._finished = 0, 0, 0.0
        self._glance = max(1, round(_GLANCE * self.robot.control.rate))
        self._best, self._best_at, self._stalled = np.inf, 0.0, -1
        self._trouble = self._armed = False

    def run(self) -> dict[str, Any]:
        """Open, check, arm, run, stop; return what there is to say of it.

        Errors:
            DriverError: where the robot does not come up or may not be armed.
        """
        names: dict[str, Any] = {"modes": [mode.name for mode in Mode], "clamps": CLAMPS}
        header = log_header(self.robot, epoch=self.clock.epoch, bundle=self.bundle.seal, **names)
        recorder = Recorder(self.job.out / LOG, self._record.dtype, header, rate=self.robot.control.rate)
        self.recorder = recorder
        try:
            self._open(recorder)
            self.notes += self._process.notes
            if self.job.realtime:  # not before: compiling at that priority would starve whatever else has to keep its times
                self.notes += RealTime(SERVO_PRIORITY, lock=True, timer_slack=1e-6, freeze=False).apply()
            self.watch.obstacles([obstacle.at(0.0)[0] for obstacle in self.config.obstacles])
            self.guard = Guard(self.robot, self.watch, self.driver, self.job.guard)
            self.port = MailboxPort(self.job.folder, Sizes.of(self.bundle))
            self._arm()
            self.loop = ControlLoop(
                self.robot, self.driver, self.port, self.clock, self.config.loop, self._request, self._observe, self.guard
            )
            with steady():
                self.loop.run(self.config.duration + _ENDING)
        finally:
            self.driver.stop()
            if any(change.fault and change.after >= Mode.STOP for change in self._changes()):
                self._dump()
            recorder.close()
            if not self._armed:  # nothing happened that a log could tell of
                (self.job.out / LOG).unlink(missing_ok=True)
        return self.summary()

    def _open(self, recorder: Recorder) -> None:
        """Start the driver's and the log's processes side by side; each takes half a second to come up."""
        failed: list[BaseException] = []

        def drive() -> None:
            try:
                self.driver.open()
            except BaseException as error:  # noqa: BLE001 -- raised again below
                failed.append(error)

        opening = threading.Thread(target=drive, name="mbctrl opening")
        opening.start()
        try:
            recorder.open()
            self.watch = ArmWatch(self.bundle)
        finally:
            opening.join()
        if failed:
            raise failed[0]

    def _changes(self) -> list[Any]:
        return self.guard.ladder.changes if hasattr(self, "guard") else []

    def _dump(self) -> None:
        try:
            self.recorder.dump(self.job.out / BLACK_BOX)
        except SpecError as error:
            self._say(str(error))

    def _arm(self) -> None:
        """Measure for a moment, check, wait for the planner, arm.

        Errors:
            DriverError: with every reason why not.
        """
        period, deadline = 1 / self.robot.control.rate, self.clock.now() + 60.0
        first, tick, refused = self.clock.now() + 0.2, 0, ["no measurement yet"]
        since: float | None = None  # nothing was against it: an arm that swings is at rest twice a swing
        while True:
            now = self.clock.now()
            self.guard.measured(self.driver.read(), now)
            if now > first and self.port.ready:
                refused = self.guard.refusals()
                since = None if refused else now if since is None else since
                if since is not None and now - since >= _AT_REST or refused and now > first + 2.0:
                    break
            if now > deadline:
                raise DriverError("the planner did not come up within 60 s", key="planner")
            if os.getppid() != self.job.parent:
                raise DriverError("the supervisor is gone", key="servo")
            if (orders := self._orders.read()) is not None and orders[1]["end"]:
                raise DriverError("ended before the arm was armed", key="servo")
            tick += 1
            self.clock.wait_until(now + period)
        refused = refused or self.guard.arm(0.0)
        if refused:
            raise DriverError("not armed: " + "; ".join(refused), key=self.robot.name)
        self._armed = True
        self.guard.sensors.reset()  # the clock starts anew
        if self.guard.contact is not None:
            self.guard.contact.reset()

    def _request(self, t: float, state: RobotState) -> PlanRequest:
        obstacles = tuple(obstacle.at(t) for obstacle in self.config.obstacles)
        return PlanRequest(t, np.concatenate([state.q, state.v]), goal=self.progress.index, goal_time=t, obstacles=obstacles)

    def _observe(self, tick: Tick) -> bool:
        guard, t = self.guard, tick.t
        self._log(tick)
        seen = guard.found.seen
        if seen is not None and self.loop.counts.ticks % self._glance == 0:
            self.progress.update(t, tick.state.q, (seen.position, seen.rotation))
            self._stall(t)
            self._track(t)
        if self.config.obstacles:
            self.watch.obstacles([obstacle.at(t)[0] for obstacle in self.config.obstacles])
        if self.loop.counts.ticks % _LOOKS == 0:
            self._look(t)
        return self._going_on(t, tick)

    def _log(self, tick: Tick) -> None:
        record, sent, guard = self._record, tick.sent, self.guard
        state = tick.state
        record["t"], record["stamp"], record["seq"] = tick.t, state.stamp, state.seq
        record["q"], record["v"], record["tau"] = state.q, state.v, state.tau
        if sent is not None:
            record["q_ref"], record["v_ref"], record["torque"] = sent.q_ref, sent.v_ref, sent.torque
        record["mode"] = guard.ladder.mode
        record["clamped"] = tick.clamped | bool(guard.found.limited) << 1
        record["plan_seq"], record["latency"] = 0 if tick.plan is None else tick.plan.seq, tick.latency
        self.recorder.put(record)
        for change in guard.ladder.changes[self._told :]:
            level = "error" if change.after >= Mode.STOP and change.fault else "info"
            self.recorder.event(change.t, level, f"{change.before.name} -> {change.after.name}: {change.reason}")
        self._told = len(guard.ladder.changes)

    def _stall(self, t: float) -> None:
        """Say once a target when the arm does not come nearer to it (fault 14): it stays at the best it can do."""
        progress = self.progress
        if progress.index != self._stalled and progress.position_error < 0.95 * self._best:
            self._best, self._best_at = progress.position_error, t
        if progress.count > 1 and len(progress.reached) and progress.reached[-1] == t:
            self._best, self._best_at = np.inf, t
        due = not progress.done and progress.count > 0 and t - self._best_at > _STALLED
        if due and progress.index != self._stalled:
            self._stalled = progress.index
            text = f"NO_PROGRESS: {progress.position_error * 1e3:.1f} mm from target {progress.index + 1} for {_STALLED:g} s"
            self.recorder.event(t, "warning", text)
            self._say(text)

    def _track(self, t: float) -> None:
        """Sum up how far the tool is from a moving target, after the first lap and while plans are followed."""
        goal = self.config.goal
        if isinstance(goal, MOVING) and t > goal.lap and self.guard.ladder.mode is Mode.RUN:
            self._squares += self.progress.position_error**2
            self._followed += 1

    def _look(self, t: float) -> None:
        """What need not be done every period: the parent, its orders, the log's health, the status."""
        ladder, orders = self.guard.ladder, self._orders.read()
        if os.getppid() != self.job.parent:
            ladder.escalate(t, Mode.STOP, "the supervisor is gone", 7)
            self._finished = self._finished or t
        if orders is not None and orders[1]["end"] and not self._finished:
            self._end(t, "asked to end")
        if orders is not None and orders[1]["rearm"] > self._rearmed:
            self._rearmed = int(orders[1]["rearm"])
            refused = self.guard.arm(t)
            self._say("re-armed" if not refused else "not re-armed: " + "; ".join(refused))
        if not self._trouble and not self.recorder.healthy:
            self._trouble = True
            self._say(f"the log has ended, control goes on: {self.recorder.trouble or f'{self.recorder.lost} records lost'}")
        counts, record = self.loop.counts, np.zeros((), STATUS)
        record["t"], record["mode"], record["reached"], record["index"] = (
            t,
            ladder.mode,
            len(self.progress.reached),
            self.progress.index,
        )
        record["position"], record["rotation"] = self.progress.position_error, self.progress.rotation_error
        record["plans"], record["latency"] = counts.plans, counts.latencies[-1] if counts.latencies else 0.0
        record["planner"], record["log"], record["reason"] = self.port.alive, not self._trouble, ladder.reason.encode()[:_TEXT]
        self.status.write(record)

    def _end(self, t: float, why: str) -> None:
        self._finished = t
        self.guard.ladder.escalate(t, Mode.STOP, why)

    def _going_on(self, t: float, tick: Tick) -> bool:
        if not self._finished and (t >= self.config.duration or (self.progress.done and self.config.stop_when_done)):
            self._end(t, "finished")
        if not self._finished:
            return True
        rest = bool((np.abs(tick.state.v) < 0.01).all())
        return not (rest and t > self._finished + 0.1) and t < self._finished + _ENDING

    def summary(self) -> dict[str, Any]:
        """Return figures of the run as plain values."""
        counts, guard, progress = self.loop.counts, self.guard, self.progress
        return {
            "duration": self.clock.now(),
            "reached": list(progress.reached),
            "errors": list(progress.errors),
            "targets": progress.count,
            "position_error": progress.position_error,
            "rotation_error": progress.rotation_error,
            "tracking": math.sqrt(self._squares / self._followed) if self._followed else float("nan"),
            "ticks": counts.ticks,
            "missed": counts.missed,
            "held": counts.held,
            "plans": counts.plans,
            "late": counts.late,
            "latencies": np.asarray(counts.latencies),
            "lateness": np.asarray(counts.lateness),
            "clamps": dict(self.loop.gate.counts),
            "furthest": guard.furthest,
            "sensors": dict(guard.sensors.counts),
            "rejected": dict(guard.counts),
            "changes": [(c.t, c.before.name, c.after.name, c.reason, c.fault) for c in guard.ladder.changes],
            "lost": self.recorder.lost,
            "notes": list(dict.fromkeys(self.notes)),
            "memory": _peak_memory(),
        }


def _peak_memory() -> float:
    """Return this process's largest resident size so far [MiB]."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def serve_servo(pipe: Any, job: ServoJob) -> None:
    """Run the control process; sends ("say", text), then ("done", summary) or ("failed", error) through the pipe."""
    name_process("mbctrl servo")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)

    def send(kind: str, what: Any) -> None:
        try:
            pipe.send((kind, what))
        except OSError:
            pass  # nobody listens any more

    try:
        servo = Servo(job, lambda text: send("say", text))
        send("done", servo.run())
    except MbctrlError as error:
        send("failed", error)
    except Exception as error:  # noqa: BLE001 -- whatever it is, the parent must learn of it
        send("failed", DriverError(f"the control process failed: {type(error).__name__}: {error}", key="servo"))
    if os.getppid() != job.parent:
        shutil.rmtree(job.folder, ignore_errors=True)  # nobody else is left to do it


def _leave(*_: Any) -> None:
    raise SystemExit(0)

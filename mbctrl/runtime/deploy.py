"""The supervisor: starts control and planner, brings the planner back when it dies, tells what it sees."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import DriverError, MbctrlError
from mbctrl.runtime.port import PlannerJob, serve_plans
from mbctrl.runtime.process import answer, quiet_start
from mbctrl.runtime.servo import ORDERS, STATUS, ServoJob, serve_servo
from mbctrl.runtime.shared import Mailbox, private_folder

_RESTARTS = 5
_HUNG = 1.0  # [s] a planner may be silent before it is killed
_START = 30.0  # [s] it may take to come up
_PAUSE = 0.02  # [s]


@dataclass(frozen=True)
class Settings:
    """How to plan: engine, onnxruntime's provider, threads (0: all cores but one)."""

    engine: str = "kernel"
    provider: str = "cpu"
    threads: int = 0


class Deployment:
    """A run on a robot: ``run`` blocks until it is over.

    Args:
        job: of the control process, its folder and parent not filled in.
        settings: of the planner.
        watch: called with each new STATUS record, some times a second; returns "rearm", "end" or None.
        say: told every line worth printing.
    """

    def __init__(
        self,
        job: ServoJob,
        settings: Settings,
        watch: Callable[[np.void], str | None],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.settings, self._watch, self._say = settings, watch, say
        self.folder = private_folder()
        self.job = replace(job, folder=self.folder, parent=os.getpid())
        self._context = multiprocessing.get_context("spawn")
        self._status, self._orders = Mailbox(self.folder / "status", STATUS), Mailbox(self.folder / "orders", ORDERS)
        self._rearm, self._generation, self._silent, self._started = 0, 0, 0.0, 0.0
        self._planner: Any = None
        self._servo: Any = None
        self.restarts: list[float] = []

    @property
    def planner_pid(self) -> int:
        """The planner's process."""
        return self._planner.pid

    @property
    def servo_pid(self) -> int:
        """The control process."""
        return self._servo.pid

    def run(self) -> dict[str, Any]:
        """Run until the control process ends; return its summary. A first Ctrl-C brings the arm to rest.

        Errors:
            BundleError, DriverError: whatever kept it from running.
        """
        try:
            return self._run()
        finally:
            self._end()

    def _run(self) -> dict[str, Any]:
        # Nothing here multiplies large matrices; without this every process keeps memory for a thread a core.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        try:
            self._start_planner()
            self._pipe, theirs = self._context.Pipe()
            self._servo = self._context.Process(target=serve_servo, args=(theirs, self.job), name="mbctrl servo")
            quiet_start(self._servo)
            theirs.close()
            return self._supervise()
        except KeyboardInterrupt:
            if self._servo is None or self._servo.pid is None:
                raise
            self._say("ending: bringing the arm to rest")
            self.order_end()
            return self._supervise()

    def order_end(self) -> None:
        """Have the arm brought to rest and the run ended."""
        self._order(end=True)

    def _order(self, end: bool = False) -> None:
        self._orders.write(np.array((self._rearm, end), ORDERS))

    def _start_planner(self) -> None:
        self._generation += 1
        self._planner_pipe, theirs = self._context.Pipe(duplex=False)
        s, job = self.settings, self.job
        what = PlannerJob(
            job.bundle, self.folder, s.engine, s.provider, s.threads, self._generation, job.config, 0.0, job.seal, os.getpid()
        )
        self._planner = self._context.Process(target=_plan, args=(theirs, what), daemon=True, name="mbctrl planner")
        quiet_start(self._planner)
        theirs.close()
        self._coming, self._started = True, time.monotonic()

    def _supervise(self) -> dict[str, Any]:
        seen = 0
        while True:
            said = self._said()
            if said is not None:
                return said
            self._care_for_planner()
            if self._status.number != seen and (got := self._status.read()) is not None:
                seen, record = got
                self._silent = 0.0 if record["planner"] else (self._silent or time.monotonic())
                order = self._watch(record)
                if order == "rearm":
                    self._rearm += 1
                    self._order()
                elif order == "end":
                    self.order_end()
            if not self._servo.is_alive() and not self._pipe.poll():
                raise DriverError("the control process died; the robot's own watchdog stops it", key="servo")
            time.sleep(_PAUSE)

    def _said(self) -> dict[str, Any] | None:
        while self._pipe.poll():
            try:
                kind, what = self._pipe.recv()
            except (EOFError, OSError):
                raise DriverError("the control process died; the robot's own watchdog stops it", key="servo") from None
            if kind == "say":
                self._say(what)
            elif kind == "failed":
                raise what
            else:
                return what
        return None

    def _care_for_planner(self) -> None:
        """Learn what kept a new planner from starting; start another one for one that died or hangs."""
        if self._coming and self._planner_pipe.poll():
            self._coming, self._silent = False, 0.0
            error = self._last_word()
            if error is not None and not self.restarts:
                raise error
            if error is not None:
                self._say(str(error))
        now = time.monotonic()  # one that comes up answers nothing yet
        hung = now - self._started > _START if self._coming else self._silent and now - self._silent > _HUNG
        if self._planner.is_alive() and not hung:
            return
        if len(self.restarts) >= _RESTARTS:
            return
        why = "hangs" if self._planner.is_alive() else f"died (exit code {self._planner.exitcode})"
        if not self._planner.is_alive() and (error := self._last_word()) is not None:
            self._say(str(error))
        self._planner.kill()
        self._planner.join(5)
        self._silent = 0.0
        self.restarts.append(time.monotonic())
        self._say(f"the planner {why}; starting another one")
        self._start_planner()

    def _last_word(self) -> MbctrlError | None:
        """Return what the planner says, if that is an error."""
        try:
            return self._planner_pipe.recv() if self._planner_pipe.poll() else None
        except (EOFError, OSError):
            return None

    def _end(self) -> None:
        servo, planner = self._servo, self._planner
        if servo is not None and servo.pid is not None:
            self.order_end()
            servo.join(8)
            for end in (servo.terminate, servo.kill):
                if servo.is_alive():
                    end()
                    servo.join(5)
        if planner is not None and planner.pid is not None:
            planner.kill()
            planner.join(5)
        shutil.rmtree(self.folder, ignore_errors=True)


def _plan(pipe: Any, job: PlannerJob) -> None:
    answer(pipe, "planner", lambda: serve_plans(job, pipe.send))


def make_folder(out: Path) -> Path:
    """Make the run's folder.

    Errors:
        DriverError: where it exists or cannot be made.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise DriverError("exists already", file=out) from None
    except OSError as error:
        raise DriverError(f"cannot be made: {error.strerror}", file=out) from None
    return out

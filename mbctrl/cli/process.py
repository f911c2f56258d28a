"""The planner in a process of its own, so that planning never holds up the control loop."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from mbctrl.base.config import RunConfig
from mbctrl.base.errors import DriverError
from mbctrl.base.plan import Plan, PlanRequest
from mbctrl.runtime.loop import PlannerPort
from mbctrl.runtime.process import answer, quiet_start, steady


class ProcessPort(PlannerPort):
    """Starts a planner process and talks to it through a pipe.

    Args:
        config: the resolved run the planner is built from.
        file: the scenario's file, for errors.
    """

    def __init__(self, config: RunConfig, file: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, config, file), daemon=True)
        quiet_start(self._process)
        theirs.close()
        self._busy = False

    def wait_ready(self, timeout: float = 120.0) -> None:
        """Wait until the planner is built and warm; re-raises what its construction raised."""
        if not self._pipe.poll(timeout):
            raise DriverError(f"the planner process did not come up within {timeout:g} s", key="planner")
        self._receive()

    def submit(self, request: PlanRequest) -> None:
        """Send a request."""
        self._busy = True
        try:
            self._pipe.send(request)
        except OSError:
            raise DriverError("the planner process died", key="planner") from None

    def poll(self, t: float) -> Plan | None:
        """Return the plan if it has come."""
        if not self._busy:
            return None
        if not self._process.is_alive() and not self._pipe.poll():
            raise DriverError("the planner process died", key="planner")
        if not self._pipe.poll():
            return None
        self._busy = False
        return self._receive()

    @property
    def busy(self) -> bool:
        """Whether a plan is under way."""
        return self._busy

    def close(self) -> None:
        """End the planner process."""
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(5)
        self._pipe.close()

    def _receive(self):
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise DriverError("the planner process died", key="planner") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, config: RunConfig, file: Path) -> None:
    """Run the planner process: build, warm up, then one plan a request until the pipe closes."""
    spare = max(1, (os.cpu_count() or 2) - 1)  # one core stays with the control loop
    os.environ.setdefault("OMP_NUM_THREADS", str(spare))
    if config.dynamics.threads == 0:
        config = config.model_copy(update={"dynamics": config.dynamics.model_copy(update={"threads": spare})})

    def work() -> None:
        from mbctrl.cli.build import build_controller

        controller = build_controller(config, file, warm=True)
        with steady():
            pipe.send(None)
            while True:
                pipe.send(controller.plan(pipe.recv()))

    answer(pipe, "planner", work)

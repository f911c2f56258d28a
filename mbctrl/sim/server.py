"""The loop of a simulated robot's controller: real time, one tick a control period, behind any wire protocol."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mbctrl.runtime.driver import Status
from mbctrl.sim.faults import Faults
from mbctrl.sim.server_log import ServerLogWriter
from mbctrl.sim.wire import Wire

_log = logging.getLogger(__name__)
_STOPS = {"estop": Status.EMERGENCY_STOP, "pstop": Status.PROTECTIVE_STOP}


@dataclass
class Served:
    """What a server did."""

    ticks: int = 0
    late: int = 0  # ticks that began more than a period after their time
    worst: float = 0.0  # [s] the latest of them
    commands: int = 0  # periods in which a motion command came
    halts: list[tuple[float, str, Status]] = field(default_factory=list)  # (robot's time [s], reason, status)
    effort: float = 0.0  # largest share of a torque limit
    speed: float = 0.0  # largest share of a speed limit


def serve(
    wire: Wire,
    log_path: Path | None = None,
    faults: Faults | None = None,
    duration: float | None = None,
    ready: Callable[[], None] | None = None,
) -> Served:
    """Run a simulated robot until ``duration`` [s] is over or KeyboardInterrupt; return what happened.

    Simulated time is wall time: deadlines are absolute, and after a late wake-up the periods that were missed are
    simulated under the law in force, one log row each, before anything is received; nothing is sent for them, so a client
    sees the sequence number jump as over a lossy network. Fault times count from the first motion command. The calling
    process runs before all others from then on, where the system lets it (SCHED_FIFO).

    Args:
        wire: the protocol, over the plant.
        log_path: of the server's log; None: no log.
        faults: what goes wrong; None: nothing.
        ready: called once the wire listens.

    Errors:
        DriverError: where the wire cannot listen or the simulation becomes unstable.
        LogError: where the log cannot be created.
    """
    server = _Server(wire, log_path, faults or Faults())
    try:
        wire.open()
        _first_in_line()
        if ready is not None:
            ready()
        gc.collect()
        gc.freeze()  # a full collection of all that was imported would hold up a tick by tens of milliseconds
        server.run(float("inf") if duration is None else duration)
    except KeyboardInterrupt:
        pass
    finally:
        gc.unfreeze()
        wire.close()
        server.log.close()
    return server.summary()


class _Server:
    def __init__(self, wire: Wire, log_path: Path | None, faults: Faults) -> None:
        self.wire, self.plant, self.faults = wire, wire.plant, faults
        self.log = ServerLogWriter(log_path, self.plant.robot)
        self.served = Served()
        self._first: float | None = None  # the robot's time [s] of the first motion command
        self._status = self.plant.status

    def run(self, duration: float) -> None:
        """Tick until ``duration`` [s] is over."""
        period, served, start, tick = self.plant.period, self.served, time.monotonic(), 0
        while tick * period < duration - 1e-9:
            tick += 1
            left = start + tick * period - time.monotonic()
            if left > 0:
                time.sleep(left)
            late = time.monotonic() - start - tick * period
            served.late += late > period
            served.worst = max(served.worst, late)
            while late > period:
                self._tick(late)
                tick, late = tick + 1, late - period
            served.commands += self._period(late)

    def _period(self, late: float) -> bool:
        """Do one period; return whether a motion command came in it."""
        commanded = self.wire.receive()
        if commanded and self._first is None:
            self._first = self.plant.state.stamp
        self._tick(late)
        state, publish = self.plant.state, self.wire.publish
        if self._first is None or not self.faults.faults:
            publish(state)
        else:
            for sample in self.faults.outgoing(state, state.stamp - self._first):
                publish(sample)
        return commanded

    def _tick(self, late: float) -> None:
        plant, active = self.plant, False
        if self._first is not None and self.faults.faults:
            since = plant.state.stamp - self._first
            active = self.faults.active(since)
            self._events(since)
        state = plant.tick()
        self.log.add(plant, state, time.monotonic(), active, late)
        if state.status is not self._status:
            self._status = state.status
            if not state.status.usable:
                self.served.halts.append((state.stamp, plant.reason, state.status))
        self.served.ticks += 1

    def _events(self, since: float) -> None:
        begin, end = self.faults.events(since)
        for fault in begin:
            if fault.kind == "kill":
                self.log.close()
                os._exit(1)
            if fault.kind == "push":
                self.plant.push(fault.value)
            else:
                self.plant.halt(f"injected {fault.kind}", _STOPS[fault.kind])
        for fault in end:
            if fault.kind == "push":
                self.plant.push(0.0)
            else:
                self.plant.reset()

    def summary(self) -> Served:
        """Return what happened, with the shares of the limits used."""
        limits = self.plant.robot.limits
        self.served.effort = float((self.log.effort / np.asarray(limits.effort)).max())
        self.served.speed = float((self.log.speed / np.asarray(limits.velocity)).max())
        return self.served


def _first_in_line() -> None:
    """Be scheduled before other processes where the system lets us; a robot's controller is never short of time."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    except (AttributeError, PermissionError):  # not Linux, or no privilege
        _log.info("no real-time priority: ticks will be late when the machine is busy")

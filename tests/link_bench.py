"""Helpers of the tests with a simulated robot behind UDP: in one thread with a clock by hand, or in another process."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings

from mbctrl.base.robot import Robot
from mbctrl.cli.sim import sim
from mbctrl.drivers.link import LinkDriver
from mbctrl.runtime.driver import JointCommand
from mbctrl.sim.faults import Fault, Faults
from mbctrl.sim.link_wire import LinkWire
from mbctrl.sim.plant import Plant

PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # of a machine that is busy
SPAWN = multiprocessing.get_context("spawn")


def hold(robot: Robot, reference: np.ndarray, speed: np.ndarray | float = 0.0) -> JointCommand:
    """Return an impedance command with the robot's own gains."""
    zero = np.zeros(robot.nu)
    return JointCommand(reference, zero + speed, np.asarray(robot.control.stiffness), np.asarray(robot.control.damping), zero)


class Bench:
    """A wire over real sockets whose periods a test counts out one by one, on a clock of its own."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.robot, self.now = model.robot, 100.0
        self.plant = Plant(model.mj, model.robot)
        self.wire = LinkWire(self.plant, "127.0.0.1:0", now=lambda: self.now, **options)
        self.wire.open()
        self.host = "{}:{}".format(*self.wire.address)
        self.faults = Faults()
        self.newest = 0  # number of a sample that was sent

    def period(self, passing: float | None = None) -> bool:
        """Do one period of the server, which lasts ``passing`` [s]; return whether a command came."""
        self.now += self.plant.period if passing is None else passing
        moved = self.wire.receive()
        for sample in self.faults.outgoing(self.plant.tick(), self.plant.state.stamp):
            self.wire.publish(sample)
            self.newest = max(self.newest, sample.seq)
        return moved

    def connect(self, driver: LinkDriver) -> None:
        """Open a driver while the robot runs; raises what opening raises."""
        failed: list[BaseException] = []

        def target() -> None:
            try:
                driver.open()
            except BaseException as error:  # noqa: BLE001 -- raised below
                failed.append(error)

        thread = threading.Thread(target=target)
        thread.start()
        while thread.is_alive():
            self.period()
            thread.join(0.002)
        if failed:
            raise failed[0]

    def inject(self, *faults: Fault, seed: int = 0) -> None:
        """Put faults in, timed from the robot's start."""
        self.faults = Faults(faults, seed)

    def close(self) -> None:
        self.wire.close()


def _sim(pipe: Any, options: dict[str, Any]) -> None:
    sim(**options, ready=pipe.send)


class SimProcess:
    """``mbctrl sim`` in a process of its own; ``host`` is where it listens."""

    def __init__(self, log: Path, **options: Any) -> None:
        self.log = log
        pipe, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(target=_sim, args=(theirs, {"log": log, "host": "127.0.0.1:0", **options}), daemon=True)
        self.process.start()
        theirs.close()
        assert pipe.poll(60), "the server did not come up"
        self.host = pipe.recv()
        pipe.close()

    def wait(self) -> int | None:
        """Wait for the end it has of its own; return the exit code."""
        self.process.join(60)
        return self.process.exitcode

    def stop(self) -> int | None:
        """Ask it to end as a service manager does; return the exit code."""
        self.process.terminate()
        return self.wait()


def until(what: Callable[[], bool], tries: int = 20_000) -> bool:
    """Poll until ``what`` holds; False if it never does."""
    pause = threading.Event()
    return any(what() or pause.wait(1e-3) for _ in range(tries))

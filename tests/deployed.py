"""Deployments on simulated robots behind real protocols, and what the robots' own logs say of them afterwards."""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from link_bench import SPAWN, SimProcess

from mbctrl.base.config import RunConfig, merged
from mbctrl.base.errors import MbctrlError
from mbctrl.base.robot import Robot, load_robot
from mbctrl.base.spec import import_name, validate
from mbctrl.cli.deploy import DRIVERS
from mbctrl.cli.sim import PROTOCOLS
from mbctrl.dynamics.load import load_model
from mbctrl.runtime.bundle import load_bundle
from mbctrl.runtime.deploy import Deployment, Settings
from mbctrl.runtime.driver import JointCommand
from mbctrl.runtime.guard import GuardSettings
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.port import Boxes, Sizes
from mbctrl.runtime.servo import ServoJob
from mbctrl.sim.plant import Plant
from mbctrl.sim.server import serve
from mbctrl.sim.server_log import Judgement, ServerLog, judge, read_server_log

ROBOTS = {"link": "panda", "ur": "ur10e", "franka": "panda"}
_hosts = itertools.count(1)


def free_host(protocol: str) -> str:
    """Return an address nothing of this session has used: the vendors' ports are fixed, a closed one lingers."""
    return "127.0.0.1:0" if protocol == "link" else f"127.0.{100 + os.getpid() % 100}.{next(_hosts)}"


@contextmanager
def server(protocol: str, log: Path, *faults: str, robot: str | None = None, **options: Any) -> Iterator[SimProcess]:
    """Run a simulated robot in a process of its own; ``host`` is where."""
    host = free_host(protocol)
    robot = robot or ROBOTS[protocol]
    arm = SimProcess(log, robot=robot, protocol=protocol, faults=tuple(faults), **{"host": host, **options})
    arm.host = arm.host if protocol == "link" else host
    try:
        yield arm
    finally:
        if arm.process.is_alive():
            os.kill(arm.process.pid, signal.SIGCONT)
            arm.stop()


@dataclass
class Run:
    """A deployment under way and what came of it; ``host`` times are time.monotonic()."""

    deployment: Deployment
    protocol: str
    summary: dict[str, Any] | None = None
    error: MbctrlError | None = None
    said: list[str] = field(default_factory=list)
    injected: float | None = None  # host's time of what the test did
    log: ServerLog | None = None
    robot: Robot | None = None
    seconds: float = 0.0  # the whole run took

    @property
    def changes(self) -> list[tuple[Mode, str, int]]:
        """Return what the ladder did: (mode, why, fault)."""
        assert self.error is None and self.summary is not None, self.error
        return [(Mode[after], why, fault) for _, _, after, why, fault in self.summary["changes"]]

    @property
    def faults(self) -> dict[int, Mode]:
        """Return the worst mode by the number of the fault that led to it."""
        worst: dict[int, Mode] = {}
        for mode, _, fault in self.changes:
            if fault:
                worst[fault] = max(worst.get(fault, mode), mode)
        return worst

    @property
    def at(self) -> float:
        """Return the robot's time of the injection, the server's fault or the test's deed."""
        return self.log.injected_at if self.injected is None else self.log.at_host(self.injected)

    def judged(self, since: float | None = None) -> Judgement:
        """Judge what the robot did since the injection."""
        return judge(self.log, self.robot, self.at if since is None else since)


class Watch:
    """Reads the status as a person would: acts once, when the loop's time is ``when``; ends a run that stopped or is ``done``."""

    def __init__(self, run: Run, act: Callable[[Run], None] | None, when: float, done: Callable[[Any, Run], bool] | None) -> None:
        self._run, self._act, self._when, self._done = run, act, when, done

    def __call__(self, record: np.void) -> str | None:
        run = self._run
        if self._act is not None and record["t"] >= self._when:
            act, self._act = self._act, None
            run.injected = time.monotonic()
            act(run)
        stopped = record["mode"] >= Mode.STOP
        return "end" if stopped or (self._act is None and self._done is not None and self._done(record, run)) else None


def deploy(
    bundle: Path,
    protocol: str,
    arm: SimProcess,
    out: Path,
    *,
    act: Callable[[Run], None] | None = None,
    when: float = 0.6,
    done: Callable[[Any, Run], bool] | None = None,
    duration: float = 6.0,
    hold: float = 5.0,
    goal: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Run ``bundle`` on ``arm`` to the end; the log is read when the robot has come to its own end."""
    out.mkdir()
    loaded = load_bundle(bundle)
    changes = {"duration": duration, **({} if goal is None else {"goal": goal})}
    settings = validate(RunConfig, merged(loaded.config.model_dump(), changes), bundle)
    make = import_name(DRIVERS[protocol], DRIVERS, file="test", key="driver")
    job = ServoJob(
        bundle, Path(), out, settings, make, {"host": arm.host, **options}, guard=GuardSettings(hold=hold), seal=loaded.seal
    )
    run = Run(None, protocol, robot=loaded.robot)
    watch = Watch(run, act, when, done)
    run.deployment = Deployment(job, Settings(threads=1), watch, run.said.append)
    start = time.monotonic()
    try:
        run.summary = run.deployment.run()
    except MbctrlError as error:
        run.error = error
    run.seconds = time.monotonic() - start
    return run


def settle(run: Run, arm: SimProcess) -> Run:
    """Let the robot alone for a moment, longer where nobody saw it come to rest; end it and read its log."""
    if arm.process.is_alive():
        threading.Event().wait(1.2)
        arm.stop()
    run.log = read_server_log(arm.log)
    return run


def command_line(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run ``mbctrl`` as a user does, nobody at the terminal."""
    return subprocess.run(
        [sys.executable, "-m", "mbctrl.cli.main", *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout
    )


def children(pid: int) -> list[int]:
    """Return the processes ``pid`` has started."""
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def family(pid: int) -> list[int]:
    """Return ``pid`` and all that came of it."""
    return [pid, *(each for child in children(pid) for each in family(child))]


def driver_pid(run: Run) -> int:
    """Return the driver's process."""
    return _child(run.deployment.servo_pid, "mbctrl driver")


def log_pid(run: Run) -> int:
    """Return the log's process."""
    return _child(run.deployment.servo_pid, "mbctrl log")


def _child(pid: int, name: str) -> int:
    (found,) = [c for c in children(pid) if Path(f"/proc/{c}/comm").read_text().strip() == name]
    return found


def stop_for(pid: int, seconds: float) -> None:
    """Stop a process for a while, as a suspended machine or a swapping one does."""
    os.kill(pid, signal.SIGSTOP)
    threading.Timer(seconds, os.kill, (pid, signal.SIGCONT)).start()


class Impostor:
    """Takes the planner's place: the real one is halted, its requests are answered with ``answer(record, request)``.

    It is the plan mailbox that is tampered with: everything behind it is the real runtime.
    """

    def __init__(self, run: Run, bundle: Path, answer: Callable[[Any, Any], None]) -> None:
        loaded = load_bundle(bundle)
        self._sizes = Sizes.of(loaded)
        self._boxes = Boxes(run.deployment.folder, self._sizes)
        self._run, self._answer, self._dt = run, answer, float(loaded.manifest["knots"]["dt"])
        self._over = threading.Event()
        self._planner = run.deployment.planner_pid
        os.kill(self._planner, signal.SIGSTOP)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        done = 0
        while not self._over.wait(1e-3):
            if self._boxes.requests.number == done or (got := self._boxes.requests.read()) is None:
                continue
            done, request = got
            plan = np.zeros((), self._sizes.plan)
            plan["answers"], plan["seq"], plan["stamp"] = done, 900_000 + done, request["stamp"]
            plan["t0"], plan["dt"] = request["stamp"] + request["latency"], self._dt
            plan["x"][:] = request["x"]
            plan["x"][:, self._sizes.nq :] = 0.0
            plan["u"][:] = request["x"][: self._sizes.nu]
            self._answer(plan, request)
            self._boxes.plans.write(plan)

    def end(self) -> None:
        """Give the planner its place back."""
        self._over.set()
        self._thread.join(5)
        try:
            os.kill(self._planner, signal.SIGCONT)
        except ProcessLookupError:
            pass


def listening(pids: list[int]) -> list[tuple[str, str]]:
    """Return (protocol, local address) of every internet socket these processes have: listening, connected or datagram."""
    inodes = set()
    for pid in pids:
        try:
            links = [os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue  # gone meanwhile
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for kind in ("tcp", "tcp6", "udp", "udp6"):
        table = Path(f"/proc/net/{kind}")
        for line in table.read_text().splitlines()[1:] if table.exists() else ():
            words = line.split()
            if words[9] in inodes:
                found.append((kind, _address(words[1])))
    return found


def _address(text: str) -> str:
    """Return an address of /proc/net: words of 32 bits, each in the machine's own order."""
    raw = bytes.fromhex(text.split(":")[0])
    whole = b"".join(raw[i : i + 4][:: 1 if sys.byteorder == "big" else -1] for i in range(0, len(raw), 4))
    return str(ipaddress.ip_address(whole))


def copy_of_robot(name: str, folder: Path, home: tuple[float, ...] | None = None, mass: float = 0.0) -> str:
    """Return the file of a robot like ``name`` that starts elsewhere, or has ``mass`` [kg] more in its last body."""
    shutil.copytree(Path(load_robot(name).path).parent, folder)
    file = folder / "robot.yaml"
    if home is not None:
        file.write_text(re.sub(r"(?m)^home: \[.*?\]", f"home: [{', '.join(map(str, home))}]", file.read_text()))
    if mass:
        (model,) = folder.glob("*.xml")
        head, mark, tail = model.read_text().rpartition(' mass="')
        number, quote, rest = tail.partition('"')
        model.write_text(head + mark + str(float(number) + mass) + quote + rest)
    return str(file)


class Restless(Plant):
    """An arm that swings its first joint about by itself while nobody commands it."""

    def _brake(self) -> None:
        stiffness, damping = self.gains
        reference = self._braking[0].copy()
        reference[0] += 0.2 * np.sin(2 * np.pi * self.ticks * self.period)
        zero = np.zeros(len(reference))
        self._apply(JointCommand(reference, zero, stiffness, damping, zero))


@contextmanager
def restless(protocol: str, log: Path) -> Iterator[SimProcess]:
    """Run a Restless robot behind a protocol, as ``server`` does."""
    host, (pipe, theirs) = free_host(protocol), SPAWN.Pipe()
    arm = object.__new__(SimProcess)
    arm.log, arm.process = log, SPAWN.Process(target=_restless, args=(theirs, protocol, host, log), daemon=True)
    arm.process.start()
    try:
        assert pipe.poll(60), "the server did not come up"
        arm.host = pipe.recv() or host
        yield arm
    finally:
        arm.stop()


def _restless(pipe: Any, protocol: str, host: str, log: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    model = load_model(ROBOTS[protocol])
    module, _, name = PROTOCOLS[protocol].partition(":")
    wire = getattr(import_module(module), name)(Restless(model.mj, model.robot), host)
    serve(wire, log, ready=lambda: pipe.send("{}:{}".format(*wire.address) if protocol == "link" else None))

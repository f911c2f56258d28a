"""Deployed planners as a user has them: cold starts, runs against simulated robots, and what those leave to look at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.config import merged
from mbctrl.base.errors import DriverError
from mbctrl.base.spec import import_name, validate
from mbctrl.cli.deploy import DRIVERS
from mbctrl.runtime.bundle import Bundle
from mbctrl.runtime.deploy import Deployment, Settings
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.logfile import read_recording
from mbctrl.runtime.servo import LOG, ServoJob
from mbctrl.sim.server_log import ServerLog, judge, read_server_log

ADDRESS = os.environ.get("MBCTRL_BENCH_HOST", "127.0.0.1")
"""Where simulated robots listen: another address of loopback where that one's ports are taken."""
SPAWN = get_context("spawn")
BLOCKED = ("torch", "mujoco", "scipy", "pinocchio", "onnx", "onnxscript", "dm_control", "matplotlib", "cvxpy", "pandas")
_MIB = 1024.0  # KiB

_START = f"""
import sys, time
started, folder, engine = float(sys.argv[1]), sys.argv[2], sys.argv[3]
for name in {BLOCKED!r}:
    sys.modules[name] = None
from mbctrl.runtime.bundle import load_bundle
from mbctrl.runtime.planner import build_planner
imported = time.monotonic()
bundle = load_bundle(folder)
loaded = time.monotonic()
build_planner(bundle, engine, threads=1).warm()
built = time.monotonic()
import json
kib = dict(line.split(":", 1) for line in open("/proc/self/status"))
held = {{name: int(kib[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM")}}
print(json.dumps({{"import": imported - started, "load": loaded - imported, "build": built - loaded, **held}}))
"""


def cold_start(folder: Path, engine: str, cache: Path | None = None) -> dict[str, float]:
    """Start an interpreter without torch and all that, have it build a planner of the bundle.

    Returns the seconds from the interpreter's start to all imports, then of loading the bundle and of building (golden
    vectors and a first plan included), and resident memory now and at most [MiB]. ``cache`` is the folder of compiled code.
    The peak is /proc's VmHWM: ru_maxrss of a child starts at what its parent held.
    """
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"} | ({} if cache is None else {"MBCTRL_CACHE": str(cache)})
    command = [sys.executable, "-c", _START, repr(time.monotonic()), str(folder), engine]
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    if said.returncode:
        raise DriverError(said.stderr.strip().splitlines()[-1], key="cold start")
    return json.loads(said.stdout)


def _sim(pipe: Any, options: dict[str, Any]) -> None:
    from mbctrl.cli.sim import sim

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # --json says nothing else
    sim(**options, ready=pipe.send)


@contextmanager
def served(robot: str, protocol: str, log: Path) -> Iterator[str]:
    """Run ``mbctrl sim`` in a process of its own; give where it listens, as a driver's host."""
    pipe, theirs = SPAWN.Pipe()
    host = f"{ADDRESS}:0" if protocol == "link" else ADDRESS
    process = SPAWN.Process(target=_sim, args=(theirs, {"robot": robot, "protocol": protocol, "host": host, "log": log}))
    process.start()
    theirs.close()
    try:
        if not pipe.poll(60):
            raise DriverError("did not come up", key=f"mbctrl sim {robot} --protocol {protocol}")
        yield pipe.recv() if protocol == "link" else ADDRESS
    except EOFError:
        raise DriverError("died while starting", key=f"mbctrl sim {robot} --protocol {protocol}") from None
    finally:
        process.terminate()
        process.join(20)
        if process.is_alive():
            process.kill()
        pipe.close()


def _burn(parent: int) -> None:
    x = 1.0
    while os.getppid() == parent:
        for _ in range(100_000):
            x = x * 0.999 + 0.001


@contextmanager
def burning(count: int) -> Iterator[None]:
    """Keep ``count`` processes of ordinary priority computing."""
    burners = [SPAWN.Process(target=_burn, args=(os.getpid(),), daemon=True) for _ in range(count)]
    for burner in burners:
        burner.start()
    time.sleep(1.0 if burners else 0.0)  # their imports
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.join()


@dataclass
class Deployed:
    """A run: its ``summary`` and what its robot's server logged.

    ``armed`` [s] from ``Deployment()`` to the control loop's first period (known to 20 ms), ``held`` [MiB] resident by process,
    ``sent`` (T,) [s] the age of the measurement a command was computed from when its control period began, ``taken`` (M,) [s]
    when the robot took it.
    """

    summary: dict[str, Any]
    server: ServerLog
    armed: float
    held: dict[str, float] = field(default_factory=dict)
    sent: np.ndarray = field(default_factory=lambda: np.zeros(0))
    taken: np.ndarray = field(default_factory=lambda: np.zeros(0))


def deployed(
    bundle: Bundle, protocol: str, duration: float, say: Callable[[str], None], engine: str = "kernel", burners: int = 0
) -> Deployed:
    """Run a bundle for ``duration`` [s] against a simulated robot behind ``protocol``, targets reached or not.

    Errors:
        DriverError: whatever kept it from running.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        changes = {"duration": duration, "stop_when_done": False}
        config = validate(type(bundle.config), merged(bundle.config.model_dump(), changes), bundle.folder)
        with served(bundle.robot.name, protocol, folder / "server.bin") as host, burning(burners):
            make = import_name(protocol, DRIVERS, file="bench", key="driver")
            job = ServoJob(bundle.folder.resolve(), Path(), folder, config, make, {"host": host}, seal=bundle.seal)
            watch, start = _Watch(), time.monotonic()
            watch.deployment = Deployment(job, Settings(engine), watch, say)
            summary = watch.deployment.run()
        for t, before, after, reason, fault in summary["changes"]:
            if fault:
                say(f"{bundle.robot.name} over {protocol}: {t:.3f} s: {before} -> {after}, {reason}")
        server = read_server_log(folder / "server.bin")
        topics = read_recording(folder / LOG).topics
        sent = topics["/state"]["t"] - topics["/state"]["stamp"]
        return Deployed(summary, server, watch.armed - start, watch.held, sent, command_ages(topics, server))


class _Watch:
    """Looks at a run's first records: when it was armed, and a second later what its processes hold."""

    def __init__(self) -> None:
        self.deployment: Deployment | None = None
        self.armed, self.held = float("nan"), {}

    def __call__(self, record: np.void) -> str | None:
        t = float(record["t"])
        if self.armed != self.armed:
            self.armed = time.monotonic() - t
        if not self.held and t > 1.0:
            self.held = resident(self.deployment.servo_pid, self.deployment.planner_pid)
        return "end" if record["mode"] == Mode.STOP else None  # nobody is here to re-arm


def resident(servo: int, planner: int) -> dict[str, float]:
    """Return the resident memory [MiB] of the planner, the control process and its children: the driver's and the log's."""
    found = {"planner": _rss(planner), "servo": _rss(servo)}
    # In the order they were started; multiprocessing's own helper is no process of ours.
    children = sorted(int(pid) for task in Path(f"/proc/{servo}/task").iterdir() for pid in (task / "children").read_text().split())
    ours = [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]
    for who, pid in zip(("driver", "log"), ours):
        found[who] = _rss(pid)
    return found


def _rss(pid: int) -> float:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["VmRSS"].split()[0]) / _MIB


def supervisor_memory(bundle: Path) -> float:
    """Return what a process holds [MiB] that has imported what ``mbctrl deploy`` needs and loaded the bundle."""
    code = (
        "import sys, mbctrl.cli.main, mbctrl.cli.deploy as d, pathlib; d.load_bundle(pathlib.Path(sys.argv[1]))\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(bundle)], capture_output=True, text=True, timeout=60, check=True)
    return int(said.stdout) / _MIB


def command_ages(topics: dict[str, dict[str, np.ndarray]], server: ServerLog) -> np.ndarray:
    """Return the age [s] of each command when the robot took it, by the host's clock in the server's log.

    That is from the control period whose measurement the command was computed from to the control period in which the
    command came into force: no clocks are compared, since the control side's record of a period names both, measured
    positions and sent references, and each is looked for in the server's log bit by bit. What is there twice (an arm at rest)
    or not at all (an extrapolated measurement, a command overtaken by the next) is left out. ``link`` alone carries both
    unchanged: a UR smooths references and a Franka is sent torques, and neither's server logs what arrived.
    """
    measured, sent = topics["/state"]["q"], topics["/command"]["q_ref"]
    states = _once(server.q)
    first = np.flatnonzero((np.diff(server.q_ref, axis=0) != 0).any(axis=1)) + 1  # periods with a new reference
    references = _once(server.q_ref[first])
    ages = []
    for q, q_ref in zip(measured[: len(sent)], sent):
        i, j = states.get(q.tobytes()), references.get(q_ref.tobytes())
        if i is not None and j is not None and first[j] > i:
            ages.append(server.host[first[j]] - server.host[i])
    return np.asarray(ages)


def _once(rows: np.ndarray) -> dict[bytes, int]:
    """Return the rows that are there once, by content."""
    found: dict[bytes, int | None] = {}
    for i, row in enumerate(np.ascontiguousarray(rows, float)):
        key = row.tobytes()
        found[key] = None if key in found else i
    return {key: i for key, i in found.items() if i is not None}


def judged(run: Deployed, robot: Any) -> tuple[int, int]:
    """Return (limit violations, times the robot's own watchdog or protection stopped it) from the first command on."""
    server = run.server
    if not server.commanded.any():
        return 0, 0
    first = int(np.argmax(server.commanded))
    usable = np.array([status.usable for status in server.status[first:]])
    return judge(server, robot, float(server.t[first])).violations, int((usable[:-1] & ~usable[1:]).sum())


def planned(job: tuple[str, int, dict[str, Any], str, Path]):
    """Run (scenario, seed, changes, engine, bundle) in lockstep with the bundle's planner; return its Summary.

    The engine ``unexported`` leaves the run its own.
    """
    import torch

    from mbctrl.base.config import RunConfig, load_run
    from mbctrl.cli.session import Session
    from mbctrl.runtime.bundle import load_bundle
    from mbctrl.runtime.loop import InlinePort
    from mbctrl.runtime.planner import build_planner

    torch.set_num_threads(1)
    name, seed, changes, engine, folder = job
    config, file = load_run(name)
    over = merged({"seed": seed, "dynamics": {"threads": 1}}, changes)
    config = RunConfig.model_validate(merged(config.model_dump(), over))
    session = Session(config, file, lockstep=True)
    if engine != "unexported":
        session.port = InlinePort(build_planner(load_bundle(folder), engine, threads=1, config=config).plan, config.loop.latency)
    with tempfile.TemporaryDirectory() as place:
        return session.run(Path(place) / "run")


def export_command(name: str, overrides: list[str], folder: Path) -> float:
    """Run ``mbctrl export`` as a user does; return how long that took [s]."""
    code = "import sys; from mbctrl.cli.main import main; sys.exit(main())"
    start = time.monotonic()
    said = subprocess.run(
        [sys.executable, "-c", code, "export", name, *overrides, "-o", str(folder)], capture_output=True, text=True
    )
    if said.returncode:
        raise DriverError((said.stderr or said.stdout).strip(), key=f"mbctrl export {name}")
    return time.monotonic() - start


def size(folder: Path) -> float:
    """Return a bundle's size [MB]."""
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e6


def without_cache(folder: Path, engine: str) -> dict[str, float]:
    """A cold start with nothing compiled yet."""
    cache = Path(tempfile.mkdtemp())
    try:
        return cold_start(folder, engine, cache)
    finally:
        shutil.rmtree(cache, ignore_errors=True)

"""``mbctrl sim``: a simulated robot behind a real wire protocol, with faults on request."""

from __future__ import annotations

import signal
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from mbctrl.base.errors import SpecError, suggest
from mbctrl.base.extras import need

console = Console()
PROTOCOLS = {
    "link": "mbctrl.sim.link_wire:LinkWire",
    "ur": "mbctrl.sim.ur_wire:UrWire",
    "franka": "mbctrl.sim.franka_wire:FrankaWire",
}
_PORTS = {"ur": "TCP 29999, 30003, 30004", "franka": "TCP 1337"}


def sim(
    robot: str,
    protocol: str = "link",
    host: str = "127.0.0.1",
    faults: tuple[str, ...] = (),
    log: Path | None = None,
    duration: float | None = None,
    start_noise: float = 0.0,
    seed: int = 0,
    key_file: Path | None = None,
    ready: Callable[[str], None] | None = None,
) -> int:
    """Run a simulated robot until ``duration`` [s], Ctrl-C or SIGTERM; return the exit code, 0.

    Args:
        robot: by name or path.
        protocol: a key of ``PROTOCOLS``.
        host: address to listen at; for link HOST or HOST:PORT.
        faults: ``KIND[=VALUE]@START[:END]`` each, see ``mbctrl.sim.faults``.
        log: file for the server's log.
        start_noise: the joints start uniformly within this of home [rad].
        seed: of start and faults.
        key_file: authenticates every frame of link.
        ready: called with where the robot listens, once it does.

    Errors:
        SpecError, ModelError, DriverError, LogError: in one line each.
    """
    if protocol not in PROTOCOLS:
        raise SpecError(f"unknown protocol '{protocol}'{suggest(protocol, PROTOCOLS)}", key="protocol")
    if key_file is not None and protocol != "link":
        raise SpecError(f"{protocol} knows no keys; only link authenticates its frames", key="key_file")
    for key, value in (("duration", duration), ("start_noise", start_noise)):
        if value is not None and not (np.isfinite(value) and value >= 0):
            raise SpecError(
                f"expected a number not below 0, found {value:g}", file="command line", key=f"--{key.replace('_', '-')}"
            )
    for module in ("mujoco", "pinocchio"):
        need(module, "sim", "simulating a robot")
    from mbctrl.dynamics.load import load_model
    from mbctrl.sim.faults import Faults, parse_fault
    from mbctrl.sim.plant import Plant
    from mbctrl.sim.server import serve

    wrong = Faults([parse_fault(text) for text in faults], seed)
    model = load_model(robot, key="robot")
    limits = model.robot.limits
    offset = np.random.default_rng(seed).uniform(-start_noise, start_noise, model.robot.nq)
    start = (np.asarray(model.robot.home) + offset).clip(limits.position_lower, limits.position_upper)
    module, _, name = PROTOCOLS[protocol].partition(":")
    options = {"key_file": key_file} if protocol == "link" else {}
    wire = getattr(import_module(module), name)(Plant(model.mj, model.robot, start), host, **options)

    def listening() -> None:
        where = f"{host}, {_PORTS[protocol]}" if protocol in _PORTS else "UDP {}:{}".format(*wire.address)
        console.print(f"{model.robot.name}: {protocol} at {where}, {model.robot.control.rate:g} Hz; Ctrl-C ends it", soft_wrap=True)
        if ready is not None:
            ready(where.removeprefix("UDP "))

    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        served = serve(wire, log, wrong, duration, listening)
    finally:
        signal.signal(signal.SIGTERM, before)
    _screen(served, getattr(wire, "counts", {}), wire.plant.period, log)
    return 0


def _screen(served, counts, period: float, log: Path | None) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("ticks", f"{served.ticks} ({served.ticks * period:.1f} s)")
    late = f"{served.late}, the worst {served.worst * 1e3:.1f} ms"
    table.add_row("late ticks", late if served.late else "none")
    table.add_row("motion commands", str(served.commands))
    for stamp, reason, status in served.halts[:8]:
        table.add_row("halt", f"{stamp:.3f} s  {status.value}: {reason}")
    if len(served.halts) > 8:
        table.add_row("", f"and {len(served.halts) - 8} more")
    table.add_row("limits used", f"torque {served.effort:.0%}, speed {served.speed:.0%}")
    table.add_row("frames", ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if count) or "all good")
    if log is not None:
        table.add_row("log", str(log))
    console.print(table, highlight=False)

"""What ``mbctrl doctor`` says of the machine a robot is to be controlled from: times, kernel, ports, disk."""

from __future__ import annotations

import multiprocessing
import platform
import shutil
import socket
from pathlib import Path
from typing import Any

from rich.markup import escape

from mbctrl.drivers.link_protocol import PORT
from mbctrl.runtime.process import quiet_start
from mbctrl.runtime.realtime import RealTime

_TCP = {29999: "ur dashboard", 30003: "ur script", 30004: "ur RTDE", 1337: "franka"}
_UDP = {PORT: "link"}
_PATIENCE = 20.0  # [s] for a child process
_LOG = 4e6 / 60  # [bytes/s] about what a log of a 1 kHz arm takes, rounded up
_HOST = "127.0.0.1"


def machine() -> list[tuple[str, str]]:
    """Return (what, finding) a row, marked up for a screen."""
    return [
        ("real-time permission", _realtime()),
        ("kernel", _kernel()),
        ("CPU governor", _governor()),
        ("ports of mbctrl sim", _ports()),
        ("disk space here", _disk()),
    ]


def _realtime() -> str:
    """Ask for it in a process that then ends: what was not permitted, or that all was."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_try, args=(theirs,), daemon=True)
    quiet_start(child)
    theirs.close()
    try:
        said = ours.recv() if ours.poll(_PATIENCE) else ["no answer: memory may not be locked"]
    except (EOFError, OSError):
        said = ["the process that asked for it died"]
    finally:
        child.kill()
        child.join()
    return "priority and memory lock permitted" if not said else "\n".join(f"[yellow]{escape(note)}[/]" for note in said)


def _try(pipe: Any) -> None:
    from mbctrl.runtime.servo import DRIVER_PRIORITY

    pipe.send(RealTime(priority=DRIVER_PRIORITY, lock=True).apply())


def _kernel() -> str:
    said = platform.version()
    kinds = [kind for kind in ("PREEMPT_RT", "PREEMPT_DYNAMIC", "PREEMPT") if kind in said.replace(" ", "_")]
    if _text("/sys/kernel/realtime") == "1":
        kinds = ["PREEMPT_RT"]
    return f"{platform.system()} {platform.release()}" + (f", {kinds[0]}" if kinds else "")


def _governor() -> str:
    found = {_text(path) for path in sorted(Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor"))}
    if not found:
        return "cannot be read"
    said = ", ".join(sorted(found))
    return (
        said if found == {"performance"} else f"[yellow]{escape(said)}[/]: for steady times: cpupower frequency-set -g performance"
    )


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _ports() -> str:
    kinds = ((socket.SOCK_STREAM, _TCP), (socket.SOCK_DGRAM, _UDP))
    taken = [f"{port} ({what})" for kind, ports in kinds for port, what in ports.items() if not _free(kind, port)]
    every = ", ".join(str(port) for _, ports in kinds for port in ports)
    return f"{every} free on {_HOST}" if not taken else f"[yellow]taken on {_HOST}:[/] {', '.join(taken)}"


def _free(kind: int, port: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as trial:
        if kind == socket.SOCK_STREAM:  # as servers do: connections that are being forgotten do not count
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((_HOST, port))
        except OSError:
            return False
        return True


def _disk() -> str:
    try:
        free = shutil.disk_usage(Path.cwd()).free
    except OSError as error:
        return f"[yellow]unknown:[/] {escape(error.strerror or str(error))}"
    said = f"{free / 1e9:.1f} GB free, {free / _LOG / 3600:.0f} h of a 1 kHz arm's log"
    return said if free > 1e9 else f"[yellow]{said}[/]"

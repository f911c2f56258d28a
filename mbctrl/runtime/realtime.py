"""What makes a process keep its times: priority, memory, cores, the garbage collector, and a clock that sleeps to a time.

A 500 Hz loop on a loaded machine starts 4.65 ms late at the 99th percentile with default scheduling and 0.1 ms late with
all of this. Every step that the system does not permit is left out with one line that says how to permit it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mbctrl.runtime.clock import Clock

# sys/mman.h, sys/prctl.h. On fault: what is used stays, and libraries of 200 MB of which a tenth is used do not all come in.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT, _PR_SET_TIMERSLACK, _PR_SET_NAME = 1, 2, 4, 29, 15
_CAP_IPC_LOCK = 14  # linux/capability.h
_CLOCK_MONOTONIC, _TIMER_ABSTIME = 1, 1  # linux/time.h, the same on every architecture
_LONGEST_SPIN = 200e-6  # [s]: under SCHED_FIFO nothing else runs on the core meanwhile


@dataclass(frozen=True)
class RealTime:
    """Settings of a process that has to keep its times; what is None or False is left as it is.

    ``priority`` of SCHED_FIFO, 1 to 99; ``inherit`` gives it to threads and processes started later too (a vendor's own
    receive thread; never a planner's). ``lock`` keeps in RAM all memory once it was used. ``cores`` the process may run on.
    ``timer_slack`` [s] of its sleeps. ``freeze`` collects garbage once and keeps the collector off what exists by then;
    ``collect = False`` also turns it off, for a process that makes no reference cycles.
    """

    priority: int | None = None
    inherit: bool = False
    lock: bool = False
    cores: tuple[int, ...] | None = None
    timer_slack: float | None = None
    freeze: bool = True
    collect: bool = True

    def apply(self) -> list[str]:
        """Apply to this process, from the thread that is to keep its times; return what was not permitted, never raise."""
        said: list[str] = []
        if self.cores is not None:
            said += _attempt("cores", "use cores the process may run on: taskset -p PID", lambda: _set_cores(self.cores))
        if self.timer_slack is not None:
            said += _attempt("timer slack", "it needs Linux", lambda: _set_slack(self.timer_slack))
        if self.lock:
            permit = "ulimit -l unlimited, 'memlock unlimited' in /etc/security/limits.conf, or the capability CAP_IPC_LOCK"
            said += _attempt("memory lock", permit, _lock_memory)
        if self.priority is not None:
            permit = (
                f"ulimit -r {self.priority}, 'rtprio {self.priority}' in /etc/security/limits.conf, or the capability CAP_SYS_NICE"
            )
            said += _attempt("real-time priority", permit, lambda: _set_priority(self.priority, self.inherit))
        if self.freeze:
            gc.collect()
            gc.freeze()
        if not self.collect:
            gc.disable()
        return said


def name_process(name: str) -> None:
    """Have ps and top call this process ``name`` (15 characters of it), where the system can."""
    if sys.platform.startswith("linux"):
        _libc().prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()), 0, 0, 0)


def _attempt(what: str, permit: str, step: Callable[[], None]) -> list[str]:
    try:
        step()
    except (OSError, ValueError, AttributeError, OverflowError) as error:  # AttributeError: a system without the call
        reason = getattr(error, "strerror", None) or ("not on this system" if isinstance(error, AttributeError) else str(error))
        return [f"{what} not set: {reason}; to permit it: {permit}"]
    return []


def _set_cores(cores: tuple[int, ...]) -> None:
    os.sched_setaffinity(0, cores)


def _set_priority(priority: int, inherit: bool) -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO | (0 if inherit else os.SCHED_RESET_ON_FORK), os.sched_param(priority))


def _set_slack(slack: float) -> None:
    if not sys.platform.startswith("linux"):
        raise ValueError("not on this system")
    _check(_libc().prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(max(1, round(slack * 1e9))), 0, 0, 0))


def _lock_memory() -> None:
    import resource

    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and not _capable(_CAP_IPC_LOCK):
        # Locked within a limit, the process would die of the first allocation beyond it, in the middle of a run.
        raise ValueError(f"only {limit // 1024} KiB may be locked")
    _check(_libc().mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))


def _capable(capability: int) -> bool:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("CapEff:") and int(line.split()[1], 16) >> capability & 1 for line in lines)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class AbsoluteClock(Clock):
    """The machine's monotonic clock, which sleeps to a time instead of for a time, so that no delay before the call adds up.

    ``epoch`` is what ``time.monotonic()`` said at 0: what a driver needs to stamp on this clock. Elsewhere than on Linux it
    sleeps for a time.

    Args:
        spin: how long before the due time to wake up and wait for it awake [s]; bounded to 200 µs.
    """

    def __init__(self, spin: float = 0.0) -> None:
        self._spin = min(max(spin, 0.0), _LONGEST_SPIN)
        self._nanosleep = getattr(_libc(), "clock_nanosleep", None) if sys.platform.startswith("linux") else None
        if self._nanosleep is not None:
            self._nanosleep.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(_Timespec), ctypes.c_void_p)
        self._due = _Timespec()
        self.restart()

    def restart(self) -> None:
        """Make now 0."""
        self.epoch = time.monotonic()
        self._before = self._suspended()

    def now(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.epoch

    def wait_until(self, t: float) -> float:
        """Wait until ``t``; return how late the wake-up was [s]. A signal's handler runs during the wait."""
        due = self.epoch + t
        self._sleep(due - self._spin)
        now = time.monotonic()
        while due - self._spin <= now < due:  # bounded: a sleep cut short is not made up for awake
            now = time.monotonic()
        return max(now - due, 0.0)

    def suspended(self) -> float:
        """Return how long the machine has been suspended since the start [s], which the monotonic clock does not count."""
        return max(self._suspended() - self._before, 0.0)

    def _suspended(self) -> float:
        clock = getattr(time, "CLOCK_BOOTTIME", None)
        return 0.0 if clock is None else time.clock_gettime(clock) - time.monotonic()

    def _sleep(self, due: float) -> None:
        if self._nanosleep is None:
            time.sleep(max(due - time.monotonic(), 0.0))
            return
        self._due.seconds = int(due)
        self._due.nanoseconds = int((due - int(due)) * 1e9)
        while due > time.monotonic() and self._nanosleep(_CLOCK_MONOTONIC, _TIMER_ABSTIME, ctypes.byref(self._due), None) != 0:
            pass  # a signal woke it up: its handler runs here, then the rest is slept

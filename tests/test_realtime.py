"""Real-time settings either hold or say why not; the absolute clock never wakes early."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time

import pytest

from mbctrl.runtime import realtime
from mbctrl.runtime.realtime import AbsoluteClock, RealTime

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")


def apply_and_look(pipe, settings, limits):
    """Run in a child: settings stay with the process."""
    for limit in limits:
        resource.setrlimit(limit, (0, 0))
    said = settings.apply()
    scheduler = os.sched_getscheduler(0)
    pipe.send((said, scheduler, os.sched_getaffinity(0), gc.get_freeze_count(), gc.isenabled()))


def in_a_child(settings, limits=()):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=apply_and_look, args=(theirs, settings, limits))
    process.start()
    assert ours.poll(60)
    answer = ours.recv()
    process.join(10)
    return answer


@linux
def test_settings_hold_or_say_why_not():
    core = min(os.sched_getaffinity(0))
    wanted = RealTime(priority=10, lock=True, cores=(core,), timer_slack=1e-6, collect=False)
    said, scheduler, cores, frozen, collecting = in_a_child(wanted)
    fifo = scheduler & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    assert fifo != any("real-time priority" in line and "rtprio 10" in line for line in said)
    assert cores == {core} and frozen > 0 and not collecting
    assert all("\n" not in line and "to permit it" in line for line in said) and len(said) <= 2


@linux
def test_what_is_impossible_is_said_and_nothing_is_raised(monkeypatch):
    monkeypatch.setattr(realtime, "_capable", lambda capability: False)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    said = RealTime(priority=1000, lock=True, cores=(100_000,), timer_slack=None, freeze=False).apply()
    assert len(said) == 3
    assert "taskset" in said[0] and "memlock" in said[1] and "0 KiB" in said[1] and "rtprio" in said[2]


def test_a_system_without_the_calls_is_told_of(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setscheduler", raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    said = RealTime(priority=5, cores=(0,), timer_slack=1e-6, freeze=False).apply()
    assert [line.split(":")[1].split(";")[0].strip() for line in said] == ["not on this system"] * 3
    clock = AbsoluteClock()
    clock.wait_until(0.01)
    assert clock.now() >= 0.01


def test_nothing_is_asked_for_by_default():
    assert RealTime(freeze=False).apply() == []


@pytest.mark.parametrize("spin", [0.0, 1e-4, 10.0])
def test_the_clock_never_wakes_early_and_tells_how_late(spin):
    clock = AbsoluteClock(spin)
    assert clock._spin <= 200e-6
    for tick in range(1, 20):
        late = clock.wait_until(tick * 0.002)
        assert late >= 0 and clock.now() >= tick * 0.002
    started = clock.now()
    assert clock.wait_until(started - 0.5) >= 0.5  # what is past is not waited for, and its age is told
    assert clock.suspended() < 0.5


def test_the_clock_runs_from_its_epoch():
    clock = AbsoluteClock()
    before = time.monotonic()
    clock.restart()
    assert before <= clock.epoch <= time.monotonic() and clock.now() >= 0


def test_a_signal_is_handled_and_the_wait_goes_on():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(clock.now()))
    try:
        clock = AbsoluteClock()
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1))
        timer.start()
        clock.wait_until(0.3)
        timer.join()
        assert len(seen) == 1 and clock.now() >= 0.3
    finally:
        signal.signal(signal.SIGUSR1, before)

"""A driver in a process of its own: what goes in comes out, and whoever dies, the robot is stopped and the other side told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from _fake_driver import FakeDriver

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.runtime import proxy
from mbctrl.runtime.driver import JointCommand, Status
from mbctrl.runtime.proxy import DriverProcess
from mbctrl.runtime.realtime import RealTime

ROBOT = load_robot("panda")
ROBOT = ROBOT.model_copy(update={"control": ROBOT.control.model_copy(update={"rate": 100.0})})


def command(value: float) -> JointCommand:
    return JointCommand(*(np.full(7, value + i) for i in range(5)))


def proxied(tmp_path: Path, fault: str = "", **options) -> DriverProcess:
    options = {"silence": 5.0, **options}  # a busy machine is not what is tested
    return DriverProcess(ROBOT, FakeDriver, (ROBOT.nq, tmp_path / "diary", fault), {"epoch": 5.0}, **options)


def diary(tmp_path: Path) -> list[str]:
    return (tmp_path / "diary").read_text().split()


def wait_for(what, limit: float = 20.0):
    deadline = time.monotonic() + limit
    while not (got := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return got


@pytest.fixture
def opened(tmp_path):
    drivers = []

    def opened(fault: str = "", **options) -> DriverProcess:
        drivers.append(proxied(tmp_path, fault, **options))
        drivers[-1].open()
        return drivers[-1]

    yield opened
    for driver in drivers:
        driver.stop()


def test_states_and_commands_make_the_round_trip(opened, tmp_path):
    driver = opened()
    first = driver.read()
    assert driver.alive and not driver.senses_torque and first.status is Status.OK
    assert first.q.tolist() == [0] * 7 and first.v.tolist() == [1] * 7
    assert first.tau.tolist() == [2] * 7 and first.gravity.tolist() == [3] * 7
    assert first.stamp <= time.monotonic() - 5.0
    os.kill(driver._process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group; it is the control side's to handle
    driver.write(command(0.5))
    later = wait_for(lambda: state if (state := driver.read()).q[0] == 0.5 else None)
    assert later.seq > first.seq and later.stamp > first.stamp and first.q[0] == 0  # what was handed out stays as it was
    folder = driver._folder
    driver.stop()
    driver.stop()
    assert diary(tmp_path) == ["open", "command", "stop"] and not driver.alive and not folder.exists()
    with pytest.raises(DriverError, match="not open"):
        driver.read()
    driver.open()  # and again
    assert driver.read().seq >= 1


def test_the_robots_status_and_the_processs_notes_come_through(opened):
    driver = opened("status", realtime=RealTime(priority=1000))
    assert driver.read().status is Status.PROTECTIVE_STOP
    assert len(driver.notes) == 1 and "rtprio" in driver.notes[0]


def test_what_is_not_finite_is_refused_before_it_is_sent(opened, tmp_path):
    driver = opened()
    with pytest.raises(DriverError, match="not finite"):
        driver.write(command(np.nan))
    assert driver._boxes.commands.number == 0


@pytest.mark.parametrize(("fault", "said"), [("open", "port 30004: refused"), ("bug", "failed: KeyError")])
def test_what_open_raises_is_raised_here(tmp_path, fault, said):
    driver = proxied(tmp_path, fault)
    with pytest.raises(DriverError, match=said):
        driver.open()
    assert not driver.alive and diary(tmp_path) == ["open", "stop"]


def test_an_open_that_hangs_is_given_up(tmp_path):
    driver = proxied(tmp_path, "never", patience=3.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proxy, "_STOP_LIMIT", 0.2)
        with pytest.raises(DriverError, match="within 3 s"):
            driver.open()
    assert not driver.alive


def fails(driver: DriverProcess) -> DriverError | None:
    try:
        driver.read()
    except DriverError as error:
        return error
    return None


def test_what_read_raises_is_raised_here_and_the_robot_is_stopped(opened, tmp_path):
    driver = opened("read")
    driver.write(command(1.0))
    error = wait_for(lambda: fails(driver))
    assert "port 30004: lost the connection" in str(error)
    with pytest.raises(DriverError, match="lost"):
        driver.write(command(2.0))
    wait_for(lambda: not driver.alive)
    assert diary(tmp_path) == ["open", "command", "stop"]


@pytest.mark.parametrize(("fault", "name"), [("", "SIGKILL"), ("crash", "SIGSEGV")])
def test_a_driver_process_that_dies_is_noticed(opened, fault, name):
    driver = opened(fault, silence=0.1)
    driver.read()
    if fault:
        driver.write(command(1.0))
    else:
        driver._process.kill()
    error = wait_for(lambda: fails(driver))
    assert f"died (killed by {name})" in str(error) and not driver.alive
    driver.stop()


def test_a_frozen_driver_process_shows_in_the_stamps_age(opened):
    driver = opened(silence=0.1)
    os.kill(driver._process.pid, signal.SIGSTOP)
    try:
        time.sleep(0.05)
        state = driver.read()
        time.sleep(0.2)
        assert driver.read() is state  # old, and no error: age is the control side's to judge
    finally:
        os.kill(driver._process.pid, signal.SIGCONT)


def test_silence_after_the_first_command_stops_the_robot(opened, tmp_path):
    driver = opened(silence=0.2)
    time.sleep(0.5)  # before the first command there is no hurry
    driver.read()
    assert diary(tmp_path) == ["open"]
    driver.write(command(1.0))
    wait_for(lambda: diary(tmp_path) == ["open", "command", "stop"])
    assert "silent for" in str(wait_for(lambda: fails(driver)))


def test_a_stop_that_hangs_is_ended(opened, tmp_path, monkeypatch):
    driver = opened("stop")
    monkeypatch.setattr(proxy, "_STOP_LIMIT", 0.4)
    driver.stop()
    assert not driver.alive and diary(tmp_path) == ["open", "stop"]


CONTROL = """
import sys, time
from pathlib import Path
import test_proxy
if __name__ == "__main__":
    driver = test_proxy.proxied(Path(sys.argv[1]), silence=1000.0)
    driver.open()
    driver.write(test_proxy.command(1.0))
    while driver.read().q[0] != 1.0:
        time.sleep(0.005)
    print(driver._process.pid, driver._folder, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_robot_is_stopped_when_the_control_process_dies(tmp_path, end):
    script = tmp_path / "control.py"
    script.write_text(CONTROL)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with open(tmp_path / "said", "wb") as said:
        control = subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, stderr=said, env=environment, text=True
        )
    with control:
        pid, folder = control.stdout.readline().split()
        control.send_signal(end)
    wait_for(lambda: diary(tmp_path)[-1] == "stop")
    wait_for(lambda: not Path(f"/proc/{pid}").exists() and not Path(folder).exists())
    assert diary(tmp_path) == ["open", "command", "stop"]
    assert end == signal.SIGINT or "Traceback" not in (tmp_path / "said").read_text()

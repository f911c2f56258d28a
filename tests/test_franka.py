"""Franka: the vendor's own client against the simulated arm in another process; the wire against raw and random packets."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError, ExtraError
from mbctrl.base.robot import load_robot
from mbctrl.drivers.franka import FrankaDriver, _Clock
from mbctrl.runtime.driver import JointCommand, RobotState, Status
from mbctrl.sim import fci
from mbctrl.sim.fci_model import urdf
from mbctrl.sim.franka_wire import FrankaWire
from mbctrl.sim.plant import Plant

ROBOT = load_robot("panda")
MODEL = mujoco.MjModel.from_xml_path(ROBOT.model_path)
ZERO = np.zeros(7)
MOVING = np.full(7, 0.5)  # [N·m]: more than holding the arm takes
GAINS = np.asarray(ROBOT.control.stiffness), np.asarray(ROBOT.control.damping)
PATIENT = 5.0  # [s], a driver's timeout on a machine that may be busy with anything
HOST = f"127.{1 + os.getpid() // 250 % 250}.{1 + os.getpid() % 250}"  # the port is fixed: each run has addresses of its own


def law(q: np.ndarray, v: np.ndarray = ZERO, torque: np.ndarray = ZERO) -> JointCommand:
    return JointCommand(q, v, *GAINS, torque)


def wait(what: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# --- the vendor's client against the arm in another process ------------------------------------------------------------


class Arm:
    """A server process."""

    def __init__(self, host: str, log: Path) -> None:
        self.host, self._log = host, log
        code = [sys.executable, str(Path(__file__).with_name("_franka_server.py")), host, str(log)]
        self._process = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout.readline() == "ready\n"
        wait(lambda: log.stat().st_size > 1000)

    def order(self, line: str) -> None:
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def last(self) -> list[str]:
        """Return the newest whole line of the log: period, speed, status, reason."""
        with self._log.open("rb") as file:
            file.seek(max(file.seek(0, os.SEEK_END) - 200, 0))
            return file.read().decode().split("\n")[-2].split()

    def stands(self) -> bool:
        return float(self.last()[1]) < 1e-3

    def close(self) -> None:
        self.order("quit")
        print(self._process.communicate(timeout=10)[0])
        assert self._process.returncode == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arm]:
    pytest.importorskip("franky")
    arm = Arm(f"{HOST}.1", tmp_path_factory.mktemp("franka") / "log")
    yield arm
    arm.close()


@pytest.fixture
def arm(server: Arm) -> Iterator[Arm]:
    server.order("reset")
    wait(lambda: server.last()[2] == "OK" and server.stands())
    yield server


@pytest.fixture
def driver(arm: Arm) -> Iterator[FrankaDriver]:
    driver = FrankaDriver(ROBOT, arm.host, timeout=PATIENT)
    driver.open()
    yield driver
    driver.close()


def move(driver: FrankaDriver, seconds: float) -> tuple[np.ndarray, np.ndarray]:
    """Follow a sine of all joints; return measured positions (T, 7), and the references then in force."""
    begin, start, seen, wanted = time.monotonic(), driver.read().q, [], []

    def reference(t: float) -> tuple[np.ndarray, np.ndarray]:
        return start + 0.1 * (1 - np.cos(np.pi * t)), 0.1 * np.pi * np.sin(np.pi * t) * np.ones(7)

    while (t := time.monotonic() - begin) < seconds:
        driver.write(law(*reference(t)))
        time.sleep(0.002)
        seen.append(driver.read().q)
        wanted.append(reference(t)[0])
    return np.array(seen), np.array(wanted)


def test_it_connects_and_holds_the_arm(driver: FrankaDriver) -> None:
    state = driver.read()
    assert state.status is Status.OK and np.isfinite(state.q).all()
    assert np.abs(state.v).max() < 1e-2
    assert np.abs(state.tau - state.gravity).max() < 0.5  # the client's own model against the plant's
    assert np.abs(state.gravity).max() > 1.0


def test_a_state_every_millisecond_with_stamps_of_the_robots_own(driver: FrankaDriver) -> None:
    states = [driver.read()]
    wait(lambda: states.append(driver.read()) or states[-1].seq > states[0].seq + 300)
    new = [state for last, state in zip(states, states[1:]) if state.seq != last.seq]
    assert all(b.seq > a.seq and b.stamp >= a.stamp for a, b in zip(new, new[1:]))
    for last, state in zip(states, states[1:]):
        assert state.seq != last.seq or state.stamp == last.stamp
    assert all(state.stamp <= time.monotonic() for state in states)
    ahead = np.array([state.stamp - 1e-3 * state.seq for state in new])
    assert np.diff(ahead).max() < 1e-4  # the robot's time, and not that of the arrivals


def test_a_sine_of_all_joints_is_tracked(driver: FrankaDriver) -> None:
    seen, wanted = move(driver, 2.0)
    assert np.ptp(seen, axis=0).min() > 0.15
    assert np.abs(seen - wanted)[20:].max() < 0.05
    assert driver.read().status is Status.OK


def test_plain_torque_and_back(driver: FrankaDriver) -> None:
    start = driver.read().q
    free = JointCommand(ZERO, ZERO, ZERO, np.full(7, 5.0), np.array([0, 0, 0, 0, 0, 0, 0.5]))
    driver.write(free)
    wait(lambda: driver.read().q[6] > start[6] + 0.02)
    driver.write(law(start))
    wait(lambda: np.abs(driver.read().q - start).max() < 5e-3)
    driver.write(replace(free, torque=ZERO))
    driver.open()  # begins with the robot's own gains again
    driver.write(law(start + 0.05))
    wait(lambda: np.abs(driver.read().q - start - 0.05).max() < 5e-3)


@pytest.mark.parametrize("part", ["q_ref", "v_ref", "stiffness", "damping", "torque"])
@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_refused(driver: FrankaDriver, part: str, value: float) -> None:
    good = law(driver.read().q)
    bad = getattr(good, part).copy()
    bad[3] = value
    with pytest.raises(DriverError, match="a command is not finite"):
        driver.write(replace(good, **{part: bad}))
    driver.write(good)
    assert driver.read().status is Status.OK


@pytest.mark.parametrize(
    ("order", "status", "mode"),
    [
        ("estop", Status.EMERGENCY_STOP, "UserStopped"),
        ("protective", Status.PROTECTIVE_STOP, "Reflex"),
        ("fault", Status.FAULT, "Other"),
    ],
)
def test_a_stop_of_the_robot_is_its_status(arm: Arm, driver: FrankaDriver, order: str, status: Status, mode: str) -> None:
    move(driver, 0.3)
    arm.order(order)
    wait(lambda: driver.read().status is status)
    driver.write(law(ZERO))  # dropped
    wait(arm.stands)
    with pytest.raises(DriverError, match=f"{mode}.*expected Idle"):
        driver.open()
    driver.recover = True
    if status is not Status.PROTECTIVE_STOP:  # a person has to do it
        with pytest.raises(DriverError, match=mode):
            driver.open()
        arm.order("reset")
        wait(lambda: arm.last()[2] == "OK")
    driver.open()
    move(driver, 0.2)
    assert driver.read().status is Status.OK


def test_a_frozen_robot_is_an_ageing_stamp(arm: Arm, driver: FrankaDriver) -> None:
    arm.order("freeze 0.6")
    wait(lambda: arm.last()[-1] == "frozen")
    ages: list[tuple[int, float]] = []

    def old() -> bool:
        state = driver.read()
        ages.append((state.seq, time.monotonic() - state.stamp))
        return ages[-1][1] > 0.3

    wait(old)
    same = [age for seq, age in ages if seq == ages[-1][0]]
    assert all(b > a for a, b in zip(same, same[1:])) and same[0] < 0.3 < same[-1]


def test_a_frozen_robot_for_good_keeps_nobody_waiting(arm: Arm, driver: FrankaDriver) -> None:
    arm.order("freeze 2.5")
    wait(lambda: driver.reason)  # the vendor's client notices after a second
    state = driver.read()
    assert driver.read() is state and state.status.usable  # nothing newer is known; its age says it
    driver.write(law(state.q))
    driver.close()
    wait(lambda: arm.last()[-1] != "frozen")


def test_stop_brings_the_arm_to_rest_and_leaves_it_held(arm: Arm, driver: FrankaDriver) -> None:
    move(driver, 0.5)
    assert not arm.stands()
    driver.stop()
    assert not driver._robot.is_in_control
    wait(arm.stands)
    rest = driver.read()
    driver.write(law(rest.q + 0.3))
    driver.stop()
    wait(lambda: driver.read().seq > rest.seq + 200)
    assert np.abs(driver.read().q - rest.q).max() < 5e-3
    assert driver.read().status is Status.OK and arm.last()[2] == "OK"


def test_a_law_nobody_renews_ends(arm: Arm, caplog: pytest.LogCaptureFixture) -> None:
    driver = FrankaDriver(ROBOT, arm.host, timeout=0.2)
    driver.open()
    try:
        q = driver.read().q
        with caplog.at_level(logging.WARNING):
            driver.write(law(q, v=np.full(7, 0.2)))
            wait(lambda: driver.read().status is Status.FAULT)
        assert driver.reason == "no command for 0.2 s" and driver.reason in caplog.text
        wait(arm.stands)
        assert arm.last()[2] == "OK"
    finally:
        driver.close()


def test_a_measurement_that_is_not_finite_is_passed_on_and_ends_the_motion(arm: Arm, driver: FrankaDriver) -> None:
    arm.order("nan")
    wait(lambda: driver.read().status is Status.FAULT)
    wait(arm.stands)


_CLIENT = """
import sys, time
import numpy as np
from mbctrl.base.robot import load_robot
from mbctrl.drivers.franka import FrankaDriver
from mbctrl.runtime.driver import JointCommand
robot = load_robot("panda")
driver = FrankaDriver(robot, sys.argv[1], timeout=60.0)
driver.open()
q, gains, begin = driver.read().q, (np.array(robot.control.stiffness), np.array(robot.control.damping)), time.monotonic()
while True:
    t = time.monotonic() - begin
    driver.write(JointCommand(q + 0.1 * np.sin(3 * t), 0.3 * np.cos(3 * t) * np.ones(7), *gains, np.zeros(7)))
    time.sleep(0.002)
    print("moving", flush=True) if t > 0.3 else None
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_client_is_noticed_by_the_robot(arm: Arm, how: signal.Signals) -> None:
    client = subprocess.Popen([sys.executable, "-c", _CLIENT, arm.host], stdout=subprocess.PIPE, text=True)
    try:
        assert client.stdout.readline() == "moving\n"
        client.send_signal(how)
        wait(lambda: arm.last()[2:4] == ["PROTECTIVE_STOP", "communication_constraints_violation"])
        wait(arm.stands)
    finally:
        client.kill()
        client.wait()
        client.stdout.close()


def test_a_second_client_is_refused_and_the_first_not_disturbed(arm: Arm, driver: FrankaDriver) -> None:
    second = FrankaDriver(ROBOT, arm.host)
    with pytest.raises(DriverError, match=rf"franka {arm.host}:1337: .*refused") as caught:
        second.open()
    assert "\n" not in str(caught.value)
    move(driver, 0.2)
    assert driver.read().status is Status.OK
    driver.close()
    wait(lambda: opens(second))
    second.close()


def opens(driver: FrankaDriver) -> bool:
    try:
        driver.open()
    except DriverError:
        return False
    return True


def test_nothing_listens() -> None:
    pytest.importorskip("franky")
    with pytest.raises(DriverError, match=rf"franka {HOST}.9:1337: ") as caught:
        FrankaDriver(ROBOT, f"{HOST}.9").open()
    assert "\n" not in str(caught.value)


def test_somebody_listens_and_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("franky")
    monkeypatch.setattr("mbctrl.drivers.franka._OPENING", 0.3)
    with socket.create_server((f"{HOST}.8", fci.PORT)), pytest.raises(DriverError, match="no answer within 0.3 s"):
        FrankaDriver(ROBOT, f"{HOST}.8").open()
    wait(lambda: not any(thread.name == "franka-open" for thread in threading.enumerate()))


def test_without_the_vendors_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "franky", None)
    with pytest.raises(ExtraError, match=r"mbctrl\[franka\]"):
        FrankaDriver(ROBOT).open()


def test_another_robot_is_refused() -> None:
    with pytest.raises(DriverError, match="expected 7 driven joints, found 6"):
        FrankaDriver(load_robot("ur10e"))


_PYLIBFRANKA = """
import sys
import numpy as np
import pylibfranka
robot = pylibfranka.Robot(sys.argv[1], pylibfranka.RealtimeConfig.kIgnore)
robot.set_collision_behavior([20.0] * 7, [20.0] * 7, [20.0] * 6, [20.0] * 6)
model = robot.load_model()
control = robot.start_torque_control()
first, q = None, None
for k in range(300):
    state, _ = control.readOnce()
    q = np.array(state.q) if q is None else q
    torque = 100 * (q - np.array(state.q)) - 10 * np.array(state.dq)
    torque = torque.clip(np.array(state.tau_J_d) - 1, np.array(state.tau_J_d) + 1)
    command = pylibfranka.Torques(torque.tolist())
    command.motion_finished = k == 299
    control.writeOnce(command)
state = robot.read_once()
print(np.abs(np.array(model.gravity(state)) - np.array(state.tau_J)).max() < 1.0, state.current_errors, len(state.O_T_EE))
"""


def test_the_vendors_own_bindings_take_the_arm_for_one(arm: Arm) -> None:
    if find_spec("pylibfranka") is None:  # it cannot be imported beside franky
        pytest.skip("pylibfranka is not installed")
    done = subprocess.run([sys.executable, "-c", _PYLIBFRANKA, arm.host], capture_output=True, text=True, timeout=30)
    assert done.stdout == "True [] 16\n", done.stdout + done.stderr


# --- the clock ---------------------------------------------------------------------------------------------------------


def test_the_fastest_packet_sets_the_clock() -> None:
    clock, rng = _Clock(), np.random.default_rng(0)
    times = np.arange(1, 2001) * 1e-3
    stamps = np.array([clock.stamp(t, t + 100.0 + delay) for t, delay in zip(times, rng.exponential(2e-3, len(times)))])
    assert (np.diff(stamps) >= 0).all()
    assert np.abs(stamps - times - 100.0)[-500:].max() < 2e-4
    assert clock.stamp(times[-1], 200.0) == stamps[-1]  # no news


def test_a_drifting_clock_is_followed_and_a_delay_is_not() -> None:
    clock = _Clock()
    for t in np.arange(1, 100_001) * 1e-2:  # the robot's quartz is 50 ppm slow
        stamp = clock.stamp(t, 1.00005 * t)
    assert abs(stamp - 1.00005 * t) < 1e-3
    late = [clock.stamp(t + dt, 1.00005 * (t + dt) + 0.05) for dt in np.arange(1, 101) * 1e-2]
    assert late[-1] < 1.00005 * (t + 1.0) + 1e-3


# --- the codec ---------------------------------------------------------------------------------------------------------


def test_packets_have_the_sizes_of_the_real_ones_and_survive_the_trip() -> None:
    assert (fci.STATE.itemsize, fci.COMMAND.itemsize) == (1377, 371)
    rng = np.random.default_rng(0)
    for layout in (fci.STATE, fci.COMMAND):
        sent = np.zeros((), layout)
        for name in layout.names:
            kind, shape = layout[name].base, layout[name].shape
            sent[name] = rng.normal(size=shape) if kind.kind == "f" else rng.integers(0, 2, shape)
        got = np.frombuffer(sent.tobytes(), layout)[0]
        assert all(np.array_equal(got[name], sent[name]) for name in layout.names)
    assert fci.take_command(bytes(371)) is not None and fci.take_command(bytes(370)) is None


@settings(max_examples=100, deadline=None)
@given(
    command=st.sampled_from(fci.Command), number=st.integers(0, 2**32 - 1), payload=st.binary(max_size=500), cut=st.integers(0, 511)
)
def test_requests_come_in_any_pieces(command: fci.Command, number: int, payload: bytes, cut: int) -> None:
    data = fci.HEADER.pack(command, number, fci.HEADER.size + len(payload)) + payload
    buffer = bytearray(data[:cut])
    early = fci.take_request(buffer)
    buffer += data[cut:]
    assert (early or fci.take_request(buffer)) == fci.Request(command, number, payload)
    assert not buffer


@pytest.mark.parametrize(("command", "size"), [(12, 12), (2**32 - 1, 12), (0, 11), (0, 5000)])
def test_what_is_no_request_is_refused(command: int, size: int) -> None:
    with pytest.raises(DriverError, match="expected 0 to 11"):
        fci.take_request(bytearray(fci.HEADER.pack(command, 0, size)))


# --- the wire, a period at a time --------------------------------------------------------------------------------------


class Client:
    """A client of raw sockets beside the wire, in this process."""

    def __init__(self, host: str, version: int = fci.VERSION) -> None:
        self.plant = Plant(MODEL, ROBOT)
        self.wire = FrankaWire(self.plant, host)
        self.wire.open()
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.udp.settimeout(5)
        self.connect(version)

    def connect(self, version: int = fci.VERSION) -> None:
        self.tcp = socket.create_connection((self.wire.host, fci.PORT), 5)
        assert self.ask(fci.Command.CONNECT, fci.CONNECT.pack(version, self.udp.getsockname()[1])) == (version != fci.VERSION)

    def period(self, torque: np.ndarray | None = None, **fields: object) -> bool:
        """Run a period, after a command; return whether the wire saw one."""
        if torque is not None:
            command = np.zeros((), fci.COMMAND)
            command["message_id"], command["tau_J_d"] = self.plant.ticks, torque
            for name, value in fields.items():
                command[name] = value
            self.udp.sendto(command.tobytes(), (self.wire.host, fci.PORT))
        seen = self.wire.receive()
        self.wire.publish(self.plant.tick())
        return seen

    def state(self) -> np.void:
        """Return the newest state packet."""
        data = self.udp.recv(2000)
        self.udp.setblocking(False)
        try:
            while True:
                data = self.udp.recv(2000)
        except BlockingIOError:
            self.udp.settimeout(5)
        return np.frombuffer(data, fci.STATE)[0]

    def ask(self, command: fci.Command, payload: bytes = b"") -> int:
        """Return the status of the answer."""
        self.tcp.sendall(fci.HEADER.pack(command, 7, fci.HEADER.size + len(payload)) + payload)
        return self.answer()

    def answer(self) -> int:
        """Return the status of the next answer."""
        data = b""
        self.tcp.setblocking(False)
        for _ in range(100):
            self.period()
            try:
                data += self.tcp.recv(1 << 16)
            except BlockingIOError:
                continue
            if len(data) > fci.HEADER.size and len(data) == fci.HEADER.unpack_from(data)[2]:
                return data[fci.HEADER.size]
        raise AssertionError("no answer")

    def start(self) -> int:
        return self.ask(fci.Command.MOVE, fci.MOVE.pack(fci.EXTERNAL_CONTROLLER, fci.NO_GENERATOR) + bytes(105))

    def close(self) -> None:
        self.tcp.close()
        self.udp.close()
        self.wire.close()


@pytest.fixture
def client() -> Iterator[Client]:
    client = Client(f"{HOST}.2")
    yield client
    client.close()


def test_a_torque_reaches_the_arm_and_comes_back_as_the_state(client: Client) -> None:
    assert client.start() == fci.Move.STARTED
    torque = np.zeros(7)
    for _ in range(30):
        torque[5] = min(torque[5] + 0.9, 8.0)
        assert client.period(torque)
    state, truth = client.state(), client.plant.state
    assert state["robot_mode"] == fci.Mode.MOVE and state["message_id"] == client.plant.ticks
    assert state["tau_J_d"][5] == pytest.approx(8.0) and state["control_command_success_rate"] > 0.5
    assert np.allclose(state["q"], truth.q) and np.allclose(state["dq"], truth.v, rtol=1e-6)
    assert truth.tau[5] - truth.gravity[5] == pytest.approx(8.0, abs=0.2) and truth.v[5] > 0.01
    assert np.allclose(state["O_T_EE"].reshape(4, 4).T[:3, :3] @ state["O_T_EE"].reshape(4, 4).T[:3, :3].T, np.eye(3), atol=1e-6)
    client.period(torque, motion_generation_finished=1)
    assert client.answer() == fci.Move.SUCCESS and client.plant.status is Status.OK
    assert client.state()["robot_mode"] == fci.Mode.IDLE


@pytest.mark.parametrize(
    ("torque", "reason", "answer"),
    [
        (np.full(7, 5.0), "controller_torque_discontinuity", fci.Move.REFLEX),
        (np.full(7, np.nan), "torque command not finite", fci.Move.INPUT_ERROR),
        (np.full(7, np.inf), "torque command not finite", fci.Move.INPUT_ERROR),
    ],
)
def test_a_torque_the_arm_must_not_get(client: Client, torque: np.ndarray, reason: str, answer: fci.Move) -> None:
    client.start()
    client.period(ZERO)
    client.period(torque)
    assert client.plant.reason == reason and client.plant.status is Status.PROTECTIVE_STOP
    assert client.answer() == answer
    state = client.state()
    assert state["robot_mode"] == fci.Mode.REFLEX and state["errors"].sum() == state["reflex_reason"].sum() == 1
    assert np.abs(client.plant.state.tau - client.plant.state.gravity).max() < 1.0
    assert client.start() == fci.Move.NOT_POSSIBLE
    assert client.ask(fci.Command.AUTOMATIC_ERROR_RECOVERY) == fci.Recovery.SUCCESS
    assert client.start() == fci.Move.STARTED


def test_a_late_step_is_spread_over_periods(client: Client) -> None:
    client.start()
    client.period(ZERO)
    number = client.plant.ticks
    for _ in range(2):
        client.period()
    client.period(np.full(7, 2.0), message_id=number + 1)  # answers the state before the newest: a step for each
    applied = [client.state()["tau_J_d"][0]]
    for _ in range(3):
        client.period()
        applied.append(client.state()["tau_J_d"][0])
    assert client.plant.status is Status.OK and np.allclose(applied, [1.0, 2.0, 2.0, 2.0])


def test_twenty_periods_without_a_command(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr("mbctrl.sim.franka_wire.time", SimpleNamespace(monotonic=lambda: now[0]))
    client.start()
    for _ in range(5):
        client.period(ZERO)
    for _ in range(30):  # in no time: the server's own hurry
        client.period()
    assert client.plant.status is Status.OK
    client.period(ZERO)
    now[0] += 0.03
    for _ in range(19):
        client.period()
    assert client.plant.status is Status.OK
    client.period()
    assert client.plant.reason == "communication_constraints_violation"
    assert client.answer() == fci.Move.REFLEX
    assert client.state()["errors"].nonzero()[0].tolist() == [25]


def test_old_foreign_and_prophetic_commands_do_not_count(client: Client) -> None:
    client.start()
    for _ in range(5):
        client.period(MOVING)
    ticks = client.plant.ticks
    assert not client.period(MOVING, message_id=ticks - 1) and not client.period(MOVING, message_id=ticks + 100)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        command = np.zeros((), fci.COMMAND)
        command["message_id"] = client.plant.ticks
        other.sendto(command.tobytes(), (client.wire.host, fci.PORT))
        assert not client.period()
    assert client.period(MOVING)


def test_what_a_client_asks_for(client: Client) -> None:
    assert client.ask(fci.Command.MOVE, fci.MOVE.pack(0, 0)) == fci.Move.INVALID
    assert client.ask(fci.Command.MOVE) == fci.Move.INVALID
    assert client.ask(fci.Command.SET_COLLISION_BEHAVIOR, bytes(416)) == 0
    assert client.ask(fci.Command.GET_ROBOT_MODEL) == 0
    assert client.start() == fci.Move.STARTED and client.start() == fci.Move.NOT_POSSIBLE
    client.plant.halt("estop", Status.EMERGENCY_STOP)
    assert client.answer() == fci.Move.EMERGENCY and client.state()["robot_mode"] == fci.Mode.USER_STOPPED
    assert client.ask(fci.Command.AUTOMATIC_ERROR_RECOVERY) == fci.Recovery.SAFETY_FUNCTIONS
    client.plant.reset()
    client.start()
    client.tcp.close()
    client.period()
    assert client.plant.reason == "communication_constraints_violation"
    client.connect()


def test_another_version_is_told_so() -> None:
    Client(f"{HOST}.2", version=9).close()


def test_a_port_that_is_taken_is_named(client: Client) -> None:
    client.wire._channel.drop()
    client.period()
    with pytest.raises(DriverError, match=rf"{HOST}.2:1337: cannot .*expected a free"):
        FrankaWire(Plant(MODEL, ROBOT), f"{HOST}.2").open()


@pytest.fixture(scope="module")
def survivor() -> Iterator[Client]:
    client = Client(f"{HOST}.3")
    yield client
    client.close()


def request(command: int, payload: bytes) -> bytes:
    return fci.HEADER.pack(command, 1, fci.HEADER.size + len(payload)) + payload


NOISE = st.one_of(
    st.binary(max_size=600),
    st.builds(request, st.integers(0, 15), st.binary(max_size=450)),
    st.lists(st.builds(request, st.sampled_from(fci.Command), st.binary(max_size=130)), max_size=4).map(b"".join),
)
DATAGRAM = st.one_of(st.binary(max_size=400), st.binary(min_size=371, max_size=371))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=NOISE, datagrams=st.lists(DATAGRAM, max_size=3), moving=st.booleans())
def test_random_bytes_never_stop_the_server(survivor: Client, noise: bytes, datagrams: list[bytes], moving: bool) -> None:
    survivor.plant.reset()
    if moving:
        survivor.start()
        survivor.period(ZERO)
    for datagram in datagrams:
        survivor.udp.sendto(datagram, (survivor.wire.host, fci.PORT))
    survivor.tcp.sendall(noise)
    for _ in range(5):
        survivor.period()
    survivor.tcp.close()
    survivor.period()
    assert np.isfinite(survivor.plant.state.q).all() and np.abs(survivor.plant.state.v).max() < 0.1
    survivor.connect()


def test_a_flood_is_read_a_bit_at_a_time(client: Client) -> None:
    client.start()
    for _ in range(200):
        client.udp.sendto(bytes(371), (client.wire.host, fci.PORT))
    client.tcp.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.tcp.send(request(fci.Command.SET_LOAD, bytes(104)) * 1000)
    for _ in range(300):
        client.period()
    assert client.plant.ticks > 300 and np.isfinite(client.plant.state.q).all()


def test_a_client_that_says_nothing_does_not_keep_others_out(client: Client) -> None:
    client.tcp.close()
    client.period()
    with socket.create_connection((client.wire.host, fci.PORT), 5) as silent:
        for _ in range(1010):
            client.wire.receive()
        client.connect()
        silent.settimeout(5)
        with pytest.raises(ConnectionResetError):
            silent.recv(1)


def test_the_model_it_sends_is_the_one_it_moves() -> None:
    pinocchio = pytest.importorskip("pinocchio")
    model = pinocchio.buildModelFromXML(urdf(MODEL, ROBOT))
    data, truth, force = model.createData(), mujoco.MjData(MODEL), np.zeros(7)
    rng = np.random.default_rng(0)
    for q in rng.uniform(ROBOT.limits.position_lower, ROBOT.limits.position_upper, (20, 7)):
        truth.qpos[:] = q
        mujoco.mj_forward(MODEL, truth)
        mujoco.mj_rne(MODEL, truth, 0, force)
        assert np.allclose(pinocchio.computeGeneralizedGravity(model, data, q), force, atol=1e-9)


def test_a_state_of_the_robot_is_a_robot_state(client: Client) -> None:
    """The planted fault of the status bits: a sample that says stop ends the motion, whatever the plant says."""
    client.start()
    client.period(ZERO)
    client.wire.receive()
    sample: RobotState = replace(client.plant.tick(), status=Status.EMERGENCY_STOP)
    client.wire.publish(sample)
    assert client.state()["robot_mode"] == fci.Mode.USER_STOPPED
    assert client.answer() == fci.Move.EMERGENCY

"""Universal Robots: the simulated controller by itself, and the driver with the vendor's client against it in another process."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.drivers.ur import DASHBOARD_PORT, RTDE_PORT, SCRIPT_PORT, UrDriver, _model
from mbctrl.dynamics.load import Model, load_model
from mbctrl.runtime.driver import JointCommand, Status
from mbctrl.sim.plant import Plant
from mbctrl.sim.rtde import OUTPUTS, TYPES, Kind, Recipe, message, split
from mbctrl.sim.ur_script import DONE, READY, ControlScript
from mbctrl.sim.ur_wire import UrWire

HERE = Path(__file__).parent
HOST = "127.0.0.3"  # the ports are hard-coded in the client: whatever else runs on this machine has 127.0.0.1
ROBOT = load_robot("ur10e")
STIFFNESS, DAMPING, ZERO = np.asarray(ROBOT.control.stiffness), np.asarray(ROBOT.control.damping), np.zeros(6)
SPEEDJ, SERVOJ, TORQUE, SPEED_STOP, SERVO_STOP, WATCHDOG, END = 9, 11, 66, 15, 16, 35, 255


def hold(q: np.ndarray) -> JointCommand:
    """Return a position reference with the robot's own gains."""
    return JointCommand(q, ZERO, STIFFNESS, DAMPING, ZERO)


# --- codec ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from(list(Kind)), st.binary(max_size=60)), max_size=8), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_messages_survive_any_cutting_of_the_stream(messages: list[tuple[Kind, bytes]], size: int) -> None:
    stream = b"".join(message(*each) for each in messages)
    found, rest = [], b""
    for start in range(0, len(stream), size):
        more, rest = split(rest + stream[start : start + size])
        found += more
    assert found == messages and rest == b""


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_data_package_returns_as_it_was_packed(data: st.DataObject) -> None:
    names = tuple(data.draw(st.lists(st.sampled_from(sorted(OUTPUTS)), min_size=1, max_size=12, unique=True)))
    recipe = Recipe(data.draw(st.integers(1, 255)), names, tuple(OUTPUTS[name] for name in names))
    values = {
        name: tuple(
            data.draw(st.floats(allow_nan=False) if "d" in TYPES[kind][0] else st.integers(0, 2**31 - 1)) for _ in range(width)
        )
        for name, kind, width in zip(names, recipe.types, recipe.widths)
    }
    (kind, payload), *none = split(recipe.pack([number for numbers in values.values() for number in numbers]))[0]
    assert kind == Kind.DATA and not none
    assert recipe.unpack(payload) == values
    with pytest.raises(DriverError, match="bytes, expected"):
        recipe.unpack(payload + b"\0")


def test_a_length_shorter_than_the_header_is_refused() -> None:
    with pytest.raises(DriverError, match="2 bytes, expected at least 3"):
        split(b"\0\2U")


# --- the control program, in lockstep ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("ur10e")


class Bench:
    """A plant and its program, one period at a time, on a clock of its own."""

    def __init__(self, model: Model) -> None:
        self.plant, self.t = Plant(model.mj, model.robot), 0.0
        self.script = ControlScript(self.plant, lambda: self.t)
        self.script.start()

    def run(self, periods: int, command: int | None = None, arguments: Any = (), each: Callable[[int], Any] | None = None) -> None:
        """Advance; a ``command`` is sent every period, with ``arguments`` or what ``each`` returns for the period."""
        for index in range(periods):
            if command is not None:
                values = list(arguments if each is None else each(index))
                self.script.integers[0], self.script.doubles[: len(values)] = command, values
                self.script.feed()
            self.script.cycle()
            self.plant.tick()
            self.t += self.plant.period

    def servo(self, periods: int, each: Callable[[int], np.ndarray]) -> None:
        """Stream servoJ targets."""
        self.run(periods, SERVOJ, each=lambda index: [*each(index), 0, 0, 0.002, 0.03, 600])


def test_servoj_targets_are_followed(model: Model) -> None:
    bench, home = Bench(model), np.asarray(ROBOT.home)
    errors = []

    def target(index: int) -> np.ndarray:
        wanted = home + 0.2 * (1 - np.cos(0.004 * index))
        errors.append(np.abs(bench.plant.state.q - wanted).max())
        return wanted

    bench.servo(1000, target)
    assert np.abs(bench.plant.state.q - home).max() > 0.1  # the reference moves the arm: the bound below says something
    assert max(errors) < 0.02
    assert bench.script.states[0] == READY


def test_speedj_reaches_its_speed_and_the_stop_command_ends_it(model: Model) -> None:
    bench, speed = Bench(model), np.array([0.3, 0.1, -0.1, 0.2, -0.2, 0.3])
    bench.run(400, SPEEDJ, [*speed, 1.5, 0.0])
    np.testing.assert_allclose(bench.plant.state.v, speed, atol=0.02)
    bench.run(1, SPEED_STOP, [10.0])
    assert bench.script.states[0] == READY  # not done while it moves
    bench.run(200, SPEED_STOP, [10.0])
    assert bench.script.states[0] == DONE
    assert np.abs(bench.plant.state.v).max() < 0.02
    bench.run(1, 0)
    assert bench.script.states[0] == READY


def test_direct_torque_moves_the_joint_it_is_put_on(model: Model) -> None:
    bench = Bench(model)
    bench.run(50, TORQUE, [40.0, 0, 0, 0, 0, 0])
    assert bench.plant.state.v[0] > 0.05
    np.testing.assert_allclose(bench.plant.state.tau[0], 40.0)


def test_the_watchdog_ends_the_program_after_five_periods_of_silence(model: Model) -> None:
    bench, home = Bench(model), np.asarray(ROBOT.home)
    bench.run(1, WATCHDOG, [100.0])
    bench.run(1, 0)
    bench.servo(100, lambda index: home + 0.002 * index)
    bench.run(4)
    assert bench.script.running and bench.plant.status is Status.OK
    bench.run(2)
    assert not bench.script.running and bench.plant.status is Status.FAULT
    assert "watchdog" in bench.plant.reason
    assert np.abs(bench.plant.state.v).max() > 0.1
    bench.run(300)
    assert np.abs(bench.plant.state.v).max() < 0.01
    bench.script.start()
    assert bench.script.running and bench.plant.status is Status.OK


def test_without_a_watchdog_the_last_target_is_held_for_ever(model: Model) -> None:
    bench, home = Bench(model), np.asarray(ROBOT.home)
    bench.servo(10, lambda _: home + 0.1)
    bench.run(1000)
    assert bench.script.running
    np.testing.assert_allclose(bench.plant.state.q, home + 0.1, atol=0.01)


@pytest.mark.parametrize(
    "arguments",
    [
        [np.nan, 0, 0, 0, 0, 0, 0, 0, 0.002, 0.03, 600],
        [*ROBOT.home, 0, 0, 0.002, 0.5, 600],
        [*ROBOT.home, 0, 0, 0.002, 0.03, np.nan],
    ],
)
def test_a_servoj_no_arm_takes_is_a_protective_stop(model: Model, arguments: list[float]) -> None:
    bench = Bench(model)
    bench.run(10, SERVOJ, arguments)
    assert bench.plant.status is Status.PROTECTIVE_STOP and not bench.script.running
    assert np.isfinite(bench.plant.state.q).all() and np.abs(bench.plant.state.v).max() < 0.01


def test_an_unknown_command_ends_the_program(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(model)
    bench.run(1, 1)
    assert not bench.script.running and "not simulated" in caplog.text


# --- the wire, on ports of its own ------------------------------------------------------------------------------------


@pytest.fixture
def wire(model: Model) -> Iterator[UrWire]:
    wire = UrWire(Plant(model.mj, model.robot), ports=(0, 0, 0))
    wire.open()
    yield wire
    wire.close()


@contextmanager
def client(wire: UrWire, port: int = 2) -> Iterator[Callable[[bytes], bytes]]:
    """Yield a function that sends bytes, lets the wire run some periods and returns what came."""
    with socket.create_connection((wire.host, wire.ports[port]), timeout=1) as link:
        link.setblocking(False)

        def ask(data: bytes, periods: int = 5) -> bytes:
            found = b""
            for index in range(periods):
                if index == 0:
                    try:
                        link.sendall(data)
                    except OSError:
                        return b""  # the wire has hung up
                turn(wire)
                try:
                    found += link.recv(65536)
                except OSError:
                    pass
            return found

        yield ask


def turn(wire: UrWire) -> None:
    """Run a period."""
    wire.receive()
    wire.publish(wire.plant.tick())


CLAIM = message(Kind.INPUTS, b"input_int_register_0,input_double_register_0")
WHOLE = [
    message(Kind.VERSION, b"\0\2"),
    message(Kind.CONTROLLER),
    CLAIM,
    message(Kind.OUTPUTS, struct.pack(">d", 500) + b"timestamp,actual_q"),
    message(Kind.START),
    message(Kind.DATA, struct.pack(">Bid", 1, SERVOJ, float("nan"))),
]


def test_an_input_belongs_to_who_claimed_it_until_it_goes(wire: UrWire) -> None:
    with client(wire) as first, client(wire) as second:
        assert split(first(CLAIM))[0] == [(Kind.INPUTS, b"\1INT32,DOUBLE")]
        assert split(second(CLAIM))[0] == [(Kind.INPUTS, b"\0IN_USE,IN_USE")]
    turn(wire)
    with client(wire) as third:
        assert split(third(CLAIM))[0] == [(Kind.INPUTS, b"\1INT32,DOUBLE")]


def test_unknown_names_are_said_to_be_unknown(wire: UrWire) -> None:
    with client(wire) as ask:
        (_, payload), *_ = split(ask(message(Kind.OUTPUTS, struct.pack(">d", 500) + b"timestamp,speed_of_light")))[0]
        assert payload == b"\0DOUBLE,NOT_FOUND"
        assert split(ask(message(Kind.START)))[0] == [(Kind.START, b"\0")]


@given(
    st.lists(st.one_of(st.binary(max_size=80), st.sampled_from(WHOLE), st.tuples(st.sampled_from(WHOLE), st.data())), max_size=8)
)
@settings(max_examples=60, deadline=None)
def test_no_bytes_bring_the_wire_down(parts: list[Any]) -> None:
    sent = []
    for part in parts:
        if isinstance(part, tuple):  # a whole message with a byte changed
            whole, data = part
            at = data.draw(st.integers(0, len(whole) - 1))
            part = whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :]
        sent.append(part)
    for port in range(3):
        with client(FUZZED, port) as ask:
            for part in sent:
                ask(part, 2)
    turn(FUZZED)
    with client(FUZZED) as ask:  # and it still answers
        assert split(ask(message(Kind.CONTROLLER)))[0] == [(Kind.CONTROLLER, struct.pack(">4I", 5, 26, 0, 0))]


@pytest.fixture(scope="module", autouse=True)
def fuzzed(model: Model) -> Iterator[None]:
    global FUZZED  # hypothesis and function-scoped fixtures do not mix
    FUZZED = UrWire(Plant(model.mj, model.robot), ports=(0, 0, 0))
    FUZZED.open()
    yield
    FUZZED.close()


@pytest.mark.parametrize(
    "bad",
    [
        message(Kind.OUTPUTS, b"short"),
        message(Kind.OUTPUTS, struct.pack(">d", 500) + b"a," * 30000),
        message(Kind.DATA, b"\7no such recipe"),
        message(Kind.DATA),
        b"\0\0\0",
        b"\0\3?",
    ],
)
def test_what_is_not_rtde_is_dropped_and_the_others_stay(wire: UrWire, bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with client(wire) as good, client(wire) as other:
        assert good(message(Kind.VERSION, b"\0\2"))
        other(bad, 20)
        assert caplog.text.count("a client is dropped") == 1
        assert split(good(message(Kind.VERSION, b"\0\2")))[0] == [(Kind.VERSION, b"\1")]


@pytest.mark.parametrize("frequency", [1e-320, -1.0, float("nan")])
def test_a_frequency_that_is_none_starts_nothing(wire: UrWire, frequency: float) -> None:
    with client(wire) as ask:
        ask(message(Kind.OUTPUTS, struct.pack(">d", frequency) + b"timestamp"))
        assert split(ask(message(Kind.START)))[0] == [(Kind.START, b"\0")]


def test_a_client_gets_the_rate_it_asked_for(wire: UrWire) -> None:
    with client(wire) as ask:
        ask(message(Kind.OUTPUTS, struct.pack(">d", 125) + b"timestamp"))
        found, _ = split(ask(message(Kind.START), 41))
        stamps = [struct.unpack(">d", payload[1:])[0] for kind, payload in found if kind == Kind.DATA]
        assert len(stamps) == 10
        np.testing.assert_allclose(np.diff(stamps), 0.008)


def test_a_taken_port_is_named(wire: UrWire) -> None:
    other = UrWire(wire.plant, ports=(0, wire.ports[1], 0))
    with pytest.raises(DriverError, match=f"127.0.0.1:{wire.ports[1]}: cannot listen"):
        other.open()
    assert other.ports == ()


# --- the driver without a controller --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value", [("lookahead", 0.5), ("gain", 50.0), ("watchdog", 0.0), ("gain", float("nan")), ("mode", "speedj")]
)
def test_an_option_out_of_range_is_refused(key: str, value: Any) -> None:
    with pytest.raises(DriverError, match=key):
        UrDriver(ROBOT, **{key: value})


def test_a_robot_of_seven_joints_is_refused() -> None:
    with pytest.raises(DriverError, match="six actuated joints, 'panda' has 7"):
        UrDriver(load_robot("panda"))


class Torn:
    """A vendor's receiver whose sample changes after so many calls: what is read across the change is of two samples."""

    def __init__(self, changes: int) -> None:
        self.left, self.sample = changes, 1.0

    def __getattr__(self, name: str) -> Callable[[], Any]:
        self.left -= 1
        self.sample += self.left == 0
        if name == "getTimestamp":
            return lambda: self.sample
        return lambda: {"getSafetyStatusBits": 1, "getRobotMode": 7, "getRuntimeState": 2}.get(name, [self.sample] * 6)


@pytest.mark.parametrize("calls", range(1, 12))
def test_a_measurement_is_never_of_two_samples(calls: int) -> None:
    driver = UrDriver(ROBOT)
    driver._receive = Torn(calls)
    state = driver.read()
    assert set(state.q) == set(state.v) == set(state.gravity) == {driver._stamp}


@contextmanager
def mute(*ports: int) -> Iterator[None]:
    """Listen on 127.0.0.2 and say nothing but the dashboard's first line."""
    listeners = [socket.create_server(("127.0.0.2", port)) for port in ports]
    links: list[socket.socket] = []

    def greet() -> None:
        links.append(listeners[0].accept()[0])
        links[0].sendall(b"Connected: Universal Robots Dashboard Server\n")

    thread = threading.Thread(target=greet)
    thread.start()
    try:
        yield
    finally:
        thread.join(5)
        for each in listeners + links:
            each.close()


@pytest.mark.parametrize(
    "ports, found",
    [
        ((), "127.0.0.2:29999: no Universal Robots controller listens (Connection refused)"),
        ((DASHBOARD_PORT,), "127.0.0.2:30003: no Universal Robots controller listens (Connection refused)"),
        ((DASHBOARD_PORT, SCRIPT_PORT), "127.0.0.2:30004: no Universal Robots controller listens (Connection refused)"),
        ((DASHBOARD_PORT, SCRIPT_PORT, RTDE_PORT), "127.0.0.2:30004: expected RTDE, found silence (timed out)"),
    ],
)
def test_nobody_there_is_one_line_with_host_and_port(ports: tuple[int, ...], found: str) -> None:
    pytest.importorskip("rtde_control")
    with mute(*ports) if ports else nullcontext(), pytest.raises(DriverError) as caught:
        UrDriver(ROBOT, "127.0.0.2").open()
    assert str(caught.value) == found


@pytest.mark.parametrize("text, size", [("UR10", "UR10"), ("ur10e", "UR10"), ("UR5e", "UR5"), ("my_arm", ""), ("could not", "")])
def test_the_size_of_an_arm_is_read_off_its_name(text: str, size: str) -> None:
    assert _model(text) == size


# --- the driver and the vendor's client against the wire in another process -------------------------------------------


class Server:
    """The process of tests/_ur_server.py."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "_ur_server.py"), HOST]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
        assert "ready" in json.loads(self.process.stdout.readline())

    def ask(self, word: str) -> Any:
        """Say a word; return the answer."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def log(self) -> SimpleNamespace:
        """Return what happened since the last log."""
        found = SimpleNamespace(**self.ask("log"))
        stamps, host, came, q, v, target = zip(*found.rows)
        found.stamp, found.came, found.q, found.v, found.target = map(np.array, (stamps, came, q, v, target))
        return found

    def until(self, condition: Callable[[SimpleNamespace], bool]) -> SimpleNamespace:
        """Return the first log that meets the condition."""
        for _ in range(100):
            time.sleep(0.05)
            if condition(log := self.log()):
                return log
        raise AssertionError("the condition never came true")

    def quit(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.fixture
def server() -> Iterator[Server]:
    pytest.importorskip("rtde_control")
    made = Server()
    yield made
    made.quit()


@pytest.fixture
def driver(server: Server) -> Iterator[UrDriver]:
    made = UrDriver(ROBOT, HOST, watchdog=2.0)  # tolerant of a busy machine; the tests of the watchdog have their own
    made.open()
    yield made
    made.close()


def sine(driver: UrDriver, periods: int, amplitude: float = 0.2) -> list[tuple[np.ndarray, np.ndarray]]:
    """Stream a sine from where the arm is; return measured positions and targets."""
    start, first, seen = driver.read().q, time.monotonic(), []
    for index in range(periods):
        t = time.monotonic() - first
        target = start + amplitude * (1 - np.cos(2 * t))
        driver.write(hold(target))
        seen.append((driver.read().q, target))
        time.sleep(max(first + 0.002 * (index + 1) - time.monotonic(), 0.0))
    return seen


def fresh(driver: UrDriver, condition: Callable[[Any], bool]) -> Any:
    """Return the first measurement that meets the condition."""
    for _ in range(2000):
        if condition(state := driver.read()):
            return state
        time.sleep(0.005)
    raise AssertionError(f"the condition never came true; last: {state}")


def test_a_bare_vendor_client_reads_every_period_in_order(server: Server) -> None:
    from rtde_receive import RTDEReceiveInterface

    plain = RTDEReceiveInterface(HOST)  # with its own list of variables
    try:
        stamps = [plain.getTimestamp()]
        while len(stamps) < 200:
            if (stamp := plain.getTimestamp()) != stamps[-1]:
                stamps.append(stamp)
    finally:
        plain.disconnect()
    steps = np.diff(stamps) / 0.002
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-6)
    assert (steps > 0.5).all() and (np.round(steps) == 1).any()


def test_a_measurement_is_one_sample_of_the_plant(server: Server, driver: UrDriver) -> None:
    states = []
    first = time.monotonic()
    start = driver.read().q
    for _ in range(500):
        driver.write(hold(start + 0.2 * np.sin(3 * (time.monotonic() - first))))
        states.append(driver.read())
        time.sleep(0.001)
    log = server.log()
    rows = {tuple(q): tuple(v) for q, v in zip(log.q, log.v)}
    assert len({state.seq for state in states}) > 100
    for state in states:
        assert rows[tuple(state.q)] == tuple(state.v)  # position and speed of the same period, bit for bit
    seq, stamp = np.array([state.seq for state in states]), np.array([state.stamp for state in states])
    assert (np.diff(seq) >= 0).all() and (np.diff(stamp)[np.diff(seq) > 0] > 0).all()
    assert ((np.diff(seq) == 0) == (np.diff(stamp) == 0)).all()
    assert states[-1].status is Status.OK and np.abs(states[-1].gravity).max() > 10


def test_a_sine_is_followed(server: Server, driver: UrDriver) -> None:
    seen = sine(driver, 750)
    log = server.log()
    assert max(np.abs(q - target).max() for q, target in seen) < 0.1
    assert np.ptp(log.q, axis=0).min() > 0.3  # it moved
    sent = {tuple(target) for _, target in seen}
    moving = log.target[log.came]
    arrived = [tuple(row) in sent for row in moving]
    assert len(moving) > 200 and all(arrived)  # nothing was sent that was not meant, to the last bit
    assert log.status == "ok"


def test_nan_is_refused_before_the_wire(server: Server, driver: UrDriver) -> None:
    command = hold(driver.read().q)
    server.log()
    for part in ("q_ref", "v_ref", "stiffness", "damping", "torque"):
        for bad in (np.nan, -np.inf):
            with pytest.raises(DriverError, match="not finite"):
                driver.write(replace(command, **{part: np.where(np.arange(6) == 3, bad, getattr(command, part))}))
    assert not server.until(lambda log: len(log.came) > 20).came.any()
    driver.write(command)  # while this one arrives
    assert server.until(lambda log: log.came.any()).status == "ok"


def test_a_reference_servoj_cannot_take_is_refused(driver: UrDriver) -> None:
    with pytest.raises(DriverError, match="stiffness"):
        driver.write(JointCommand(ZERO, ZERO, ZERO, ZERO, ZERO))


def test_a_second_driver_is_refused_and_the_first_goes_on(server: Server, driver: UrDriver) -> None:
    sine(driver, 50)
    second = UrDriver(ROBOT, HOST)
    with pytest.raises(DriverError, match="127.0.0.3:30004: another client commands this arm"):
        second.open()
    server.log()
    sine(driver, 50)
    log = server.log()
    assert log.came.any() and log.status == "ok"


@pytest.mark.parametrize("word, status", [("emergency", Status.EMERGENCY_STOP), ("protective", Status.PROTECTIVE_STOP)])
def test_a_stop_by_the_arm_is_its_status(server: Server, driver: UrDriver, word: str, status: Status) -> None:
    sine(driver, 100)
    assert driver.read().status is Status.OK
    server.ask(word)
    fresh(driver, lambda state: state.status is status)
    driver.write(hold(driver.read().q))  # harmless: the arm takes nothing
    state = fresh(driver, lambda state: np.abs(state.v).max() < 0.02)
    assert state.status is status
    with pytest.raises(DriverError, match=f"takes no commands: {status.value}"):
        driver.open()
    server.ask("reset")
    driver.open()
    assert driver.read().status is Status.OK
    sine(driver, 50)
    assert server.log().came.any()


def test_a_frozen_stream_shows_as_a_stamp_that_ages(server: Server, driver: UrDriver) -> None:
    sine(driver, 20)
    server.ask("freeze")
    try:
        time.sleep(0.05)
        before = driver.read()
        time.sleep(0.2)
        after = driver.read()
        assert (before.stamp, before.seq) == (after.stamp, after.seq)
        assert time.monotonic() - after.stamp > 0.2  # and the client still says that all is well:
        assert driver._control.isConnected() and driver._control.servoJ(after.q.tolist(), 0.0, 0.0, 0.002, 0.03, 600.0)
    finally:
        server.ask("thaw")
    assert fresh(driver, lambda state: state.seq > after.seq).stamp > after.stamp


def test_stop_brings_the_arm_to_rest_and_ends_the_program(server: Server) -> None:
    driver = UrDriver(ROBOT, HOST, watchdog=10.0)  # braking from this speed takes longer than the watchdog waits
    driver.open()
    sine(driver, 390, 0.75)
    assert np.abs(driver.read().v).max() > 1.1
    driver.stop()
    state = fresh(driver, lambda state: np.abs(state.v).max() < 0.01)
    assert state.status is Status.FAULT  # no program: no commands are taken
    assert server.log().status == "ok"  # the arm did not have to stop by itself
    driver.stop()
    driver.open()
    assert driver.read().status is Status.OK
    driver.close()


def test_a_frozen_arm_is_sent_nothing_more_until_it_is_opened_again(server: Server, driver: UrDriver) -> None:
    seen = sine(driver, 20)
    server.ask("freeze")
    try:
        time.sleep(0.7)
        before = driver.read()
        with pytest.raises(DriverError, match="silent"):
            driver.write(hold(seen[0][0]))
        driver.stop()  # returns at once: the client would wait for minutes
    finally:
        server.ask("thaw")
    assert fresh(driver, lambda state: state.seq > before.seq).status is Status.FAULT
    with pytest.raises(DriverError, match="silent"):
        driver.write(hold(seen[0][0]))
    assert server.until(lambda log: log.status == "fault").reason.startswith("RTDE watchdog")
    driver.open()
    assert driver.read().status is Status.OK
    sine(driver, 20)
    assert server.log().came.any()


def test_a_program_that_may_be_another_gets_its_watchdog_again(server: Server, driver: UrDriver) -> None:
    sine(driver, 20)
    assert driver._guarded
    time.sleep(0.6)
    driver.read()
    assert not driver._guarded


CLIENT = """
import sys, time, numpy as np
from mbctrl.base.robot import load_robot
from mbctrl.drivers.ur import UrDriver
from mbctrl.runtime.driver import JointCommand
robot = load_robot("ur10e")
driver = UrDriver(robot, sys.argv[1])
driver.open()
print("open", flush=True)
start, first, zero = driver.read().q, time.monotonic(), np.zeros(6)
gains = np.array(robot.control.stiffness), np.array(robot.control.damping)
while True:
    driver.write(JointCommand(start + 0.2 * (1 - np.cos(2 * (time.monotonic() - first))), zero, *gains, zero))
    time.sleep(0.002)
"""


def test_the_arm_stops_itself_when_the_client_is_killed(server: Server) -> None:
    code = [sys.executable, "-c", CLIENT, HOST]
    client = subprocess.Popen(code, stdout=subprocess.PIPE, env=ENVIRONMENT, cwd=HERE.parent)
    try:
        assert client.stdout.readline() == b"open\n"
        server.until(lambda log: np.abs(log.v[-1]).max() > 0.1)
    finally:
        client.kill()
        client.communicate(timeout=10)
    log = server.until(lambda log: np.abs(log.v[-1]).max() < 0.01)
    assert log.status == "fault" and "watchdog: no input for 10 ms" in log.reason


def test_direct_torque_follows_too(server: Server) -> None:
    driver = UrDriver(ROBOT, HOST, mode="torque", watchdog=2.0)
    driver.open()
    try:
        seen = sine(driver, 500)
        assert max(np.abs(q - target).max() for q, target in seen) < 0.15
        assert np.ptp(server.log().q, axis=0).min() > 0.1
    finally:
        driver.close()

"""The link protocol: frames that are whole or refused, one owner, a robot that stops when its client is gone."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from link_bench import PATIENT, SPAWN, Bench, SimProcess, hold, until

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.drivers.link import LinkDriver
from mbctrl.drivers.link_protocol import (
    Frame,
    FrameError,
    Kind,
    Sequence,
    about,
    decode,
    encode,
    endpoint,
    load_key,
    pack,
    unpack,
)
from mbctrl.drivers.stamps import StampMap
from mbctrl.dynamics.load import load_model
from mbctrl.runtime.driver import JointCommand, Status
from mbctrl.sim.faults import Fault
from mbctrl.sim.link_wire import LinkWire
from mbctrl.sim.plant import Plant
from mbctrl.sim.server_log import judge, read_server_log

KEY = b"k" * 32
FRAMES = st.builds(
    Frame,
    st.sampled_from(Kind),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(allow_nan=False, allow_infinity=False),
    st.integers(0, 255),
    st.binary(max_size=300),
)


@pytest.fixture(scope="module")
def model():
    return load_model("panda")


@pytest.fixture
def bench(model):
    bench = Bench(model)
    yield bench
    bench.close()


@pytest.fixture
def drivers():
    made: list[LinkDriver] = []
    yield lambda *args, **options: made.append(LinkDriver(*args, **options)) or made[-1]
    for driver in made:
        driver.stop()


# --- frames ---------------------------------------------------------------------------------------------------------


@PATIENT
@given(FRAMES, st.sampled_from([None, KEY]))
def test_a_frame_survives_the_trip(frame, key):
    assert decode(encode(frame, key), key) == frame


@PATIENT
@given(FRAMES, st.sampled_from([None, KEY]), st.data())
def test_one_flipped_bit_is_refused(frame, key, data):
    whole = encode(frame, key)
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    broken = bytearray(whole)
    broken[bit // 8] ^= 1 << bit % 8
    with pytest.raises(FrameError, match="malformed" if key is None else "unauthenticated"):
        decode(bytes(broken), key)


def test_every_bit_of_a_command_is_guarded():
    whole = encode(Frame(Kind.COMMAND, 1, 2, 0.0, 3.0, 0, pack(*np.ones((5, 7)))))
    for bit in range(8 * len(whole)):
        broken = bytearray(whole)
        broken[bit // 8] ^= 1 << bit % 8
        with pytest.raises(FrameError):
            decode(bytes(broken))


@PATIENT
@given(st.binary(max_size=200), st.sampled_from([None, KEY]))
def test_noise_is_no_frame(data, key):
    with pytest.raises(FrameError):
        decode(data, key)


@pytest.mark.parametrize("cut", [1, 4, 16, 40])
def test_a_frame_cut_or_longer_is_refused(cut):
    whole = encode(Frame(Kind.STATE, body=bytes(64)))
    for broken in (whole[:-cut], whole + bytes(cut)):
        with pytest.raises(FrameError):
            decode(broken)


@pytest.mark.parametrize("stamp", [float("nan"), float("inf")])
def test_a_stamp_that_is_no_number_is_refused(stamp):
    with pytest.raises(FrameError):
        decode(encode(Frame(Kind.STATE, robot_stamp=stamp)))


def test_another_key_or_none_is_refused():
    frame = Frame(Kind.STOP, 5, 6)
    for sent, expected in ((encode(frame), KEY), (encode(frame, b"x" * 32), KEY), (encode(frame, KEY), None)):
        with pytest.raises(FrameError):
            decode(sent, expected)


@PATIENT
@given(st.lists(st.lists(st.floats(width=64), max_size=9), min_size=1, max_size=5))
def test_arrays_survive_the_trip(lists):
    arrays = [np.asarray(each, float) for each in lists]
    for sent, got in zip(arrays, unpack(pack(*arrays), *map(len, arrays)), strict=True):
        np.testing.assert_array_equal(got, sent)


def test_a_body_of_another_size_is_refused():
    with pytest.raises(FrameError):
        unpack(bytes(8 * 6), 3, 4)


# --- numbers and stamps ---------------------------------------------------------------------------------------------


@PATIENT
@given(st.integers(1, 60), st.randoms(use_true_random=False))
def test_what_is_lost_reordered_and_doubled_is_counted(n, random):
    """However they come, what is not counted lost has come once, and the newest is never passed by an older one."""
    sent = list(range(n))
    kept = [seq for seq in sent if random.random() < 0.7] or [0]
    arrived = kept + [random.choice(kept) for _ in range(random.randrange(5))]
    random.shuffle(arrived)
    counts, news = Counter(), []
    sequence = Sequence(counts)
    for seq in arrived:
        if sequence.news(seq):
            news.append(seq)
    assert news == sorted(set(news)) and news[-1] == max(kept)
    assert counts["duplicated"] == len(arrived) - len(kept)
    assert len(news) + counts["reordered"] == len(kept)
    if arrived[0] == min(kept):
        assert counts["lost"] == max(kept) - min(kept) + 1 - len(kept)


def test_a_huge_jump_of_the_number_costs_nothing():
    sequence = Sequence(Counter())
    assert [sequence.news(seq) for seq in (0, 2**64 - 1, 2**64 - 1, 5)] == [True, True, False, False]


def test_a_sample_held_up_shows_its_age_and_slow_drift_does_not():
    stamps = StampMap(epoch=1000.0)
    assert stamps(0.0, 1003.0) == pytest.approx(3.0)
    assert stamps(1.0, 1003.9) == pytest.approx(3.9)  # the first had been held up by 0.1 s
    assert stamps(2.0, 1005.4) == pytest.approx(4.9, abs=1e-3)  # this one 0.5 s
    drifting = StampMap()
    for hour in np.linspace(0, 5 * 3600, 5001):  # a robot's clock that is slow by 100 ppm
        age = hour - drifting(hour * (1 - 1e-4), hour)
    assert 0 <= age < 1e-3


# --- addresses and keys ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "no.such.host.invalid", "::1"])
def test_a_bad_address_is_named(host):
    with pytest.raises(DriverError, match="host"):
        endpoint(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "192.0.2.1:5000"])
def test_another_machine_needs_a_key(model, host):
    with pytest.raises(DriverError, match="key_file"):
        LinkDriver(model.robot, host).open()
    with pytest.raises(DriverError, match="key_file"):
        LinkWire(Plant(model.mj, model.robot), host)


@pytest.mark.parametrize(
    ("content", "mode", "complaint"), [(None, 0, "cannot be read"), (b"short", 0o600, "16"), (KEY, 0o644, "chmod 600")]
)
def test_a_bad_key_file_is_refused(tmp_path, content, mode, complaint):
    path = tmp_path / "link.key"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(DriverError, match=complaint):
        load_key(path, "127.0.0.1")


def key_file(folder, content=KEY):
    path = folder / f"{content[:1].decode()}.key"
    path.write_bytes(content)
    path.chmod(0o600)
    return path


# --- handshake and lease --------------------------------------------------------------------------------------------


def test_another_robot_is_refused_with_the_reason(bench, drivers):
    with pytest.raises(DriverError, match=r"refused: expected joints \['joint1'.*found \['shoulder_pan_joint'"):
        bench.connect(drivers(load_robot("ur10e"), bench.host))


def test_the_client_too_looks_at_the_joints(bench, drivers, model, monkeypatch):
    monkeypatch.setattr("mbctrl.sim.link_wire.difference", lambda robot, told: "")
    with pytest.raises(DriverError, match="expected joints"):
        bench.connect(drivers(load_robot("ur10e"), bench.host))
    bench.period()
    bench.connect(drivers(model.robot, bench.host))  # the lease was given back


def test_nobody_there(model, drivers):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(DriverError, match="no answer within 0.2 s"):
            drivers(model.robot, host, timeout=0.2).open()
    with pytest.raises(DriverError, match="no answer"):
        drivers(model.robot, host, timeout=0.2).open()


def test_a_port_in_use_is_named(bench, model):
    with pytest.raises(DriverError, match=f"UDP {bench.host}: cannot listen"):
        LinkWire(bench.plant, bench.host).open()


def test_a_second_client_is_refused_until_the_lease_lapses(bench, drivers, model):
    first, second = drivers(model.robot, bench.host), drivers(model.robot, bench.host)
    bench.connect(first)
    with pytest.raises(DriverError, match=r"owned by 127\.0\.0\.1:\d+ for another 0\.\d\d s"):
        bench.connect(second)
    bench.period(0.6)
    bench.connect(second)
    bench.period()
    assert second.read().seq == bench.plant.state.seq
    stamp = first.read().stamp
    first.write(hold(model.robot, bench.plant.state.q + 0.1))
    assert not bench.period() and first.read().stamp == stamp, "the first lost its lease and moves nothing"
    assert bench.wire.counts["foreign"] == 1


def test_reading_keeps_the_lease(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    for _ in range(4):
        driver._last_sent -= 0.2
        driver.read()
        bench.period(0.3)
    bench.period()
    assert driver.read().seq == bench.plant.state.seq


def test_stop_releases_the_robot_and_the_lease(bench, drivers, model):
    driver, other = drivers(model.robot, bench.host), drivers(model.robot, bench.host)
    bench.connect(driver)
    driver.write(hold(model.robot, bench.plant.state.q + 0.05))
    assert bench.period() and bench.plant.commanded
    driver.write(hold(model.robot, bench.plant.state.q + 0.05))
    driver.stop()
    driver.stop()
    assert not bench.period() and not bench.plant.commanded and bench.plant.status is Status.OK
    bench.connect(other)
    with pytest.raises(DriverError, match="before open"):
        driver.write(hold(model.robot, bench.plant.state.q))


def test_read_and_write_before_open(drivers, model):
    driver = drivers(model.robot)
    with pytest.raises(DriverError, match="before open"):
        driver.read()
    with pytest.raises(DriverError, match="before open"):
        driver.write(hold(model.robot, np.zeros(7)))


# --- authentication -------------------------------------------------------------------------------------------------


def test_with_a_key_only_those_who_have_it_are_heard(model, drivers, tmp_path):
    mine, other = key_file(tmp_path), key_file(tmp_path, b"other" * 8)
    bench = Bench(model, key_file=mine)
    try:
        for path in (None, other):
            with pytest.raises(DriverError, match="same key_file"):
                bench.connect(drivers(model.robot, bench.host, key_file=path, timeout=0.2))
        assert bench.wire.counts["unauthenticated"] >= 2
        driver = drivers(model.robot, bench.host, key_file=mine)
        bench.connect(driver)
        driver.write(hold(model.robot, bench.plant.state.q))
        assert bench.period()
        forged = Frame(Kind.COMMAND, driver._session, 999, body=pack(*np.zeros((5, 7))))
        driver._socket.send(encode(forged))
        assert not bench.period() and bench.wire.counts["unauthenticated"] >= 3
    finally:
        bench.close()


def test_a_command_recorded_and_sent_again_moves_nothing(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    driver.write(hold(model.robot, bench.plant.state.q))
    assert bench.period()
    again = Frame(Kind.COMMAND, driver._session, driver._sent, body=pack(*np.ones((5, 7))))
    driver._socket.send(encode(again))
    assert not bench.period() and bench.wire.counts["duplicated"] == 1
    driver._socket.send(encode(dataclasses.replace(again, session=driver._session ^ 1, seq=999)))
    assert not bench.period() and bench.wire.counts["foreign"] == 1


# --- commands and samples -------------------------------------------------------------------------------------------


def test_a_sine_is_followed(bench, drivers, model):
    robot, driver = model.robot, drivers(model.robot, bench.host)
    bench.connect(driver)
    home, error, period = np.asarray(robot.home), [], bench.plant.period
    for tick in range(2000):
        phase = 2 * np.pi * tick * period
        reference = home + 0.1 * (1 - np.cos(phase)) / 2
        state = driver.read()
        assert state.seq == bench.plant.state.seq
        np.testing.assert_array_equal(state.q, bench.plant.state.q)
        np.testing.assert_array_equal(state.gravity, bench.plant.state.gravity)
        error.append(np.abs(state.q - reference).max())
        driver.write(hold(robot, reference, 0.1 * np.pi * np.sin(phase)))
        assert bench.period()
    assert max(error) < 0.01 and np.ptp(error) > 0, "within a tenth of the amplitude"
    assert bench.plant.status is Status.OK and not +driver.counts and not +bench.wire.counts
    assert driver.round_trip > 0


@pytest.mark.parametrize("part", ["q_ref", "v_ref", "stiffness", "damping", "torque"])
def test_a_command_that_is_not_finite_is_refused_on_both_sides(bench, drivers, model, part, monkeypatch):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    bad = dataclasses.replace(hold(model.robot, bench.plant.state.q), **{part: np.full(7, np.nan)})
    with pytest.raises(DriverError, match="not finite"):
        driver.write(bad)
    assert not bench.period()
    body = pack(bad.q_ref, bad.v_ref, bad.stiffness, bad.damping, bad.torque)
    driver._send(Kind.COMMAND, body)
    assert not bench.period() and not bench.plant.commanded and bench.wire.counts["not finite"] == 1


def test_of_several_commands_the_newest_counts(bench, drivers, model):
    driver, home = drivers(model.robot, bench.host), np.asarray(model.robot.home)
    bench.connect(driver)
    for seq, offset in ((12, 0.02), (10, 0.5), (11, 0.5), (12, 0.5)):
        command = hold(model.robot, home + offset)
        body = pack(command.q_ref, command.v_ref, command.stiffness, command.damping, command.torque)
        driver._transmit(Frame(Kind.COMMAND, driver._session, seq, body=body))
    assert bench.period()
    np.testing.assert_array_equal(bench.plant.law.q_ref, home + 0.02)
    assert bench.wire.counts["reordered"] == 2 and bench.wire.counts["duplicated"] == 1


@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        (Fault("drop", 0.0, value=0.3), "lost"),
        (Fault("reorder", 0.0), "reordered"),
        (Fault("duplicate", 0.0), "duplicated"),
    ],
    ids=lambda value: getattr(value, "kind", value),
)
def test_a_lossy_network_is_counted_and_the_newest_wins(bench, drivers, model, fault, counted):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    driver.read()
    driver.counts.clear()
    bench.inject(fault)
    ticks = 200
    for _ in range(ticks):
        bench.period()
        assert driver.read().seq == bench.newest
    assert set(+driver.counts) == {counted}
    expected = {"lost": (0.15 * ticks, 0.45 * ticks), "reordered": (ticks / 2 - 1, ticks / 2), "duplicated": (ticks, ticks)}[
        counted
    ]
    assert expected[0] <= driver.counts[counted] <= expected[1]


def test_a_measurement_that_is_no_number_is_passed_on_for_the_runtime_to_judge(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    bench.inject(Fault("nan", 0.0))
    bench.period()
    assert np.isnan(driver.read().q).sum() == 1


def test_a_frozen_stream_ages(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    bench.period()
    state = driver.read()
    bench.inject(Fault("freeze", 0.0))
    ages = []
    for _ in range(5):
        bench.period()
        again = driver.read()
        assert (again.stamp, again.seq) == (state.stamp, state.seq)
        ages.append(time.monotonic() - again.stamp)
    assert ages == sorted(ages) and ages[0] < ages[-1]
    bench.inject()
    bench.period()
    assert driver.read().stamp > state.stamp


def test_the_status_comes_with_the_samples(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    bench.plant.halt("a button", Status.EMERGENCY_STOP)
    bench.period()
    assert driver.read().status is Status.EMERGENCY_STOP


# --- the robot's own watchdog ---------------------------------------------------------------------------------------


def test_the_robot_stops_itself_without_commands_and_only_then(bench, drivers, model):
    driver, home = drivers(model.robot, bench.host), np.asarray(model.robot.home)
    bench.connect(driver)
    bench.period(0.2)
    assert bench.plant.status is Status.OK, "nothing is in force, nothing to miss"
    for _ in range(10):
        driver.write(hold(model.robot, home))
        assert bench.period(0.04)
    bench.period(0.06)
    assert bench.plant.status is Status.PROTECTIVE_STOP and "no command for 50 ms" in bench.plant.reason
    driver.write(hold(model.robot, home + 0.1))
    assert not bench.period() and not bench.plant.commanded, "latched"
    assert driver.read().status is Status.PROTECTIVE_STOP


def test_a_protective_stop_is_left_when_asked_to_an_emergency_stop_never(bench, model, drivers):
    for status, after in ((Status.PROTECTIVE_STOP, Status.OK), (Status.EMERGENCY_STOP, Status.EMERGENCY_STOP)):
        for recover, expected in ((False, status), (True, after)):
            bench.plant.reset()
            bench.plant.halt("test", status)
            driver = drivers(model.robot, bench.host, recover=recover)
            bench.connect(driver)
            assert bench.plant.status is expected
            driver.stop()
            bench.period()


def _drive(pipe, host):
    """Move all joints until killed; say so once they move."""
    robot = load_robot("panda")
    driver = LinkDriver(robot, host)
    driver.open()
    home, start = np.asarray(robot.home), time.monotonic()
    while True:
        t = time.monotonic() - start
        state = driver.read()
        driver.write(hold(robot, home + 0.1 * (1 - np.cos(3 * t)), 0.3 * np.sin(3 * t)))
        if t > 0.4 and pipe is not None:
            pipe.send(float(np.abs(state.v).max()))
            pipe = None
        time.sleep(1e-3)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_robot_stops_itself_when_its_client_dies(tmp_path, how):
    server = SimProcess(tmp_path / "server.log", robot="panda", duration=60)
    pipe, theirs = SPAWN.Pipe()
    client = SPAWN.Process(target=_drive, args=(theirs, server.host), daemon=True)
    client.start()
    assert pipe.poll(60)
    speed = pipe.recv()
    os.kill(client.pid, how)
    killed = time.monotonic()
    time.sleep(1.0)
    client.kill()
    client.join(10)
    assert server.stop() == 0
    log, robot = read_server_log(server.log), load_robot("panda")
    verdict = judge(log, robot, log.at_host(killed))
    assert speed > 0.1, "it was not moving: nothing was shown"
    assert log.commanded.any() and not log.commanded[-1] and log.status[-1] is Status.PROTECTIVE_STOP
    assert verdict.standstill < 0.8 and verdict.violations == 0


def test_nothing_sent_to_the_port_can_end_the_server(model):
    bench = Bench(model)
    noise = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    noise.connect(bench.wire.address)
    json_like = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["joints", "actuated", "recover", "x"]), inner),
        max_leaves=6,
    )
    hellos = json_like.map(lambda told: Frame(Kind.HELLO, 1, body=json.dumps(told).encode()))

    @settings(PATIENT, max_examples=300)
    @given(st.binary(max_size=1500) | (FRAMES | hellos).map(encode))
    def attack(data):
        noise.send(data)
        bench.wire.receive()
        bench.plant.tick()
        assert bench.plant.status is Status.OK and not bench.plant.commanded

    try:
        attack()
        noise.send(encode(Frame(Kind.HELLO, 1, body=b"[" * 3000)))
        bench.period()
    finally:
        noise.close()
        bench.close()


def test_an_owner_that_sends_nonsense_moves_nothing(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    for body in (b"", bytes(8 * 34), bytes(8 * 36), b"x" * 280 + b"y"):
        driver._send(Kind.COMMAND, body)
        assert not bench.period()
    assert bench.wire.counts["malformed"] == 4
    bad = JointCommand(*np.full((5, 7), np.inf))
    with pytest.raises(DriverError):
        driver.write(bad)


def test_nonsense_sent_to_the_client_is_counted(bench, drivers, model):
    driver = drivers(model.robot, bench.host)
    bench.connect(driver)
    address = driver._socket.getsockname()
    state = driver.read()
    for frame in (Frame(Kind.STATE, driver._session ^ 1, 10**9), Frame(Kind.STATE, driver._session, 10**9, status=200)):
        bench.wire._socket.sendto(encode(frame), address)
    bench.wire._socket.sendto(encode(Frame(Kind.STATE, driver._session, 10**9, body=bytes(3))), address)
    bench.wire._socket.sendto(b"noise", address)
    assert until(lambda: driver.read().seq >= state.seq and driver.counts["malformed"] == 2 and driver.counts["foreign"] == 2)
    bench.period()
    assert driver.read().seq == bench.plant.state.seq


def test_what_both_sides_say_of_themselves(model):
    told = about(model.robot)
    assert told["joints"] == told["actuated"] == list(model.robot.joints)

"""The servo driver with the vendor's own client, on a pseudo-terminal with servos behind it."""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import pytest

from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.runtime.driver import JointCommand, Status
from mbctrl.runtime.proxy import DriverProcess

pytest.importorskip("dynamixel_sdk")
pytest.importorskip("serial")

from _fake_servos import Servos  # noqa: E402

from mbctrl.drivers.servo import ServoDriver  # noqa: E402

IDS = (11, 3, 7, 5, 2, 9)
ZEROS, SIGNS = (2048, 2000, 2100, 2048, 1800, 2048), (1, -1, 1, 1, -1, 1)
ROBOT = load_robot("ur10e")
ROBOT = ROBOT.model_copy(
    update={
        "limits": ROBOT.limits.model_copy(update={"position_lower": (-2.0,) * 6, "position_upper": (2.0,) * 6}),
        "control": ROBOT.control.model_copy(update={"rate": 100.0}),
    }
)


def command(q) -> JointCommand:
    zero = np.zeros(6)
    return JointCommand(np.asarray(q, float), zero, zero, zero, zero)


@pytest.fixture
def servos():
    servos = Servos(IDS)
    yield servos
    servos.unplug()


@pytest.fixture
def driver(servos):
    driver = make(servos)
    yield driver
    driver.stop()


def make(servos, **options) -> ServoDriver:
    options = {
        "port": servos.device,
        "ids": IDS,
        "zeros": ZEROS,
        "signs": SIGNS,
        "reply": 0.5,
        "watchdog": None,
        **options,
    }  # a busy machine is no fault
    return ServoDriver(ROBOT, **options)


def fresh(driver: ServoDriver):
    """Read when the bus is due to be asked again."""
    time.sleep(max(driver._due - time.monotonic(), 0.0) + 1e-4)
    return driver.read()


def test_angles_speeds_and_torques_have_their_units_zeros_and_signs(servos):
    for number, zero, sign in zip(IDS, ZEROS, SIGNS):
        servos.put(number, 132, zero + sign * 1024, 4)  # a quarter of a turn the joint's way
        servos.put(number, 128, -sign * 100, 4)
        servos.put(number, 126, sign * 200, 2)
    driver = make(servos, torque_constants=(2.0,) * 6, epoch=time.monotonic() - 100)
    driver.open()
    state = driver.read()
    assert np.allclose(state.q, np.pi / 2) and np.allclose(state.v, -100 * 0.229 * 2 * np.pi / 60)
    assert np.allclose(state.tau, 200 * 2.69e-3 * 2.0) and not state.gravity.any() and not driver.senses_torque
    assert 100 <= state.stamp < 130 and state.seq >= 1 and state.status is Status.OK
    driver.stop()


def test_commands_arrive_and_the_first_is_where_it_stands(servos, driver):
    for number in IDS:
        servos.put(number, 116, 4000, 4)  # a goal left from before
        servos.put(number, 98, 0xFF, 1)  # and a watchdog that has gone off
    driver.open()
    assert [servos.get(number, 132, 4) for number in IDS] == [2048] * 6  # nothing has moved
    assert all(servos.get(number, 64, 1) == 1 for number in IDS)
    q = np.array([0.1, -0.2, 0.3, -0.4, 0.5, 1.9])
    driver.write(command(q))
    state = fresh(driver)
    assert np.abs(state.q - q).max() <= np.pi / 4096 + 1e-12 and state.seq >= 2
    again = driver.read()
    assert again is state or again.seq > state.seq


def test_every_position_survives_the_bus(servos, driver):
    """Also those whose bytes look like a packet's header, which the protocol stuffs."""
    driver.open()
    for ticks in (0x0FD, 0x7FF, 0x3FD, 0x2FF):
        q = (ticks - np.array(ZEROS)) * np.array(SIGNS) * 2 * np.pi / 4096
        driver.write(command(q))
        assert np.allclose(fresh(driver).q, q)
    servos.put(11, 126, -1, 2)
    servos.put(11, 128, 0xFD, 4)
    assert np.isclose(fresh(driver).v[0], 0xFD * 0.229 * 2 * np.pi / 60)


def test_gains_and_watchdog_are_set_before_the_torque(servos):
    driver = make(servos, gains=(900, 30), watchdog=0.1)
    driver.open()
    assert [servos.get(2, address, 2) for address in (84, 80)] == [900, 30] and servos.get(2, 98, 1) == 5
    order = [address for number, address, _ in servos.writes if number == 2]
    assert order.index(116) < order.index(64) and order.index(84) < order.index(64)
    driver.stop()


def test_stop_holds_or_lets_go(servos):
    driver = make(servos, watchdog=0.1)
    driver.open()
    driver.write(command([0.1] * 6))
    fresh(driver)
    servos.memory[3][132:136] = (1900).to_bytes(4, "little")  # it has not got there
    driver._port.is_using = True  # as a transaction leaves it that a signal broke off
    driver.stop()
    driver.stop()
    assert servos.get(3, 116, 4) == 1900 and servos.get(3, 64, 1) == 1 and servos.get(3, 98, 1) == 0
    with pytest.raises(DriverError, match="not open"):
        driver.read()
    driver = make(servos, at_stop="off")
    driver.open()
    driver.stop()
    assert all(servos.get(number, 64, 1) == 0 for number in IDS)


@pytest.mark.parametrize(
    ("fault", "said"), [("silent", r"does not answer.*\(-3001\)"), ("corrupt", r"answers with a damaged packet \(-3002\)")]
)
def test_a_servo_that_fails_is_named_and_a_passing_fault_is_not_an_error(servos, driver, fault, said):
    driver.open()
    state = driver.read()
    servos.once = True
    getattr(servos, fault).add(7)
    assert fresh(driver).stamp == state.stamp and driver._failed == 1  # the old one again: its age is how health is judged
    assert fresh(driver).seq > state.seq and driver._failed == 0
    servos.once = False
    getattr(servos, fault).add(7)
    with pytest.raises(DriverError, match=rf"servo 7 \(elbow_joint\): {said}"):
        for _ in range(1000):
            driver.read()
            time.sleep(0.002)
    assert driver._failed == 3


def test_an_unplugged_bus_is_an_error_at_once(servos, driver, caplog):
    driver.open()
    servos.unplug()
    with pytest.raises(DriverError, match=f"{servos.device}: the bus is gone"):
        while True:
            driver.read()
    with pytest.raises(DriverError, match="the bus is gone"):
        driver.write(command([0.0] * 6))
    with caplog.at_level(logging.ERROR):
        driver.stop()
    assert "were not told to stop" in caplog.text


def test_a_servo_in_alarm_is_a_fault_of_the_robot(servos, driver):
    driver.open()
    servos.alarm.add(5)
    assert fresh(driver).status is Status.FAULT
    servos.alarm.clear()
    assert fresh(driver).status is Status.OK


@pytest.mark.parametrize(
    ("number", "address", "value", "said"),
    [
        (9, 11, 1, r"servo 9 \(wrist_3_joint\): operating mode 1, expected 3 \(position\)"),
        (9, 70, 36, "in alarm: overheating, overload; reboot it"),
        (9, 52, 1500, r"limits are 744 to 3352 ticks, the servo's own 1500 to 4095"),
    ],
)
def test_a_servo_that_does_not_fit_is_refused(servos, driver, number, address, value, said):
    servos.put(number, address, value, 4 if address > 90 or address == 52 else 1)
    with pytest.raises(DriverError, match=said):
        driver.open()
    assert not any(servos.get(one, 64, 1) for one in IDS)


def test_a_missing_servo_is_refused(servos, driver):
    servos.silent.add(2)
    with pytest.raises(DriverError, match=r"servo 2 \(wrist_2_joint\): does not answer"):
        driver.open()


def test_what_is_not_finite_is_not_sent(servos, driver):
    driver.open()
    before = len(servos.writes)
    with pytest.raises(DriverError, match="not finite"):
        driver.write(command([np.nan] * 6))
    assert len(servos.writes) == before


def test_ports_are_told_of(servos, driver, tmp_path):
    with pytest.raises(DriverError, match="ttyNONE: cannot be opened"):
        ServoDriver(ROBOT, port=str(tmp_path / "ttyNONE")).open()
    with pytest.raises(DriverError, match="baud rate of 12345 is not known"):
        make(servos, baudrate=12345).open()
    driver.open()
    with pytest.raises(DriverError, match=f"{servos.device}: is in use by another process"):
        make(servos).open()
    assert os.path.exists(servos.device)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ids": (1, 2)}, "expected 6 values"),
        ({"signs": (2,) * 6}, "signs of"),
        ({"ids": (1,) * 6}, "different"),
        ({"at_stop": "x"}, "hold or off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(servos, options, said):
    with pytest.raises(DriverError, match=said):
        make(servos, **options)


def test_a_robot_with_a_free_joint_is_refused():
    robot = ROBOT.model_copy(update={"actuated": ROBOT.joints[:5]})
    with pytest.raises(DriverError, match="5 of 6 joints"):
        ServoDriver(robot)


def test_in_a_process_of_its_own_as_it_is_run(servos):
    options = {"port": servos.device, "ids": IDS, "zeros": ZEROS, "signs": SIGNS, "reply": 0.5, "watchdog": 0.1}
    driver = DriverProcess(ROBOT, ServoDriver, (ROBOT,), options, silence=5.0)
    driver.open()
    try:
        q, deadline = np.full(6, 0.5), time.monotonic() + 20
        driver.write(command(q))
        while np.abs(driver.read().q - q).max() > np.pi / 4096 + 1e-12:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        assert not driver.senses_torque
        driver._process.kill()
        driver._process.join(10)
        assert servos.get(3, 98, 1) == 5  # nobody told them to stop: their own watchdog is still set
    finally:
        driver.stop()
    driver.open()  # the lock died with the process
    driver.stop()
    assert servos.get(3, 98, 1) == 0

"""The simulated robot's controller: its loop in real time, its faults, its log and the judgement of it."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from link_bench import PATIENT, SimProcess, hold, until

from mbctrl.base.errors import DriverError, SpecError
from mbctrl.base.logs import LogError
from mbctrl.base.robot import load_robot
from mbctrl.cli.sim import PROTOCOLS, sim
from mbctrl.drivers.link import LinkDriver
from mbctrl.dynamics.load import load_model
from mbctrl.runtime.driver import RobotState, Status
from mbctrl.sim import server
from mbctrl.sim.faults import KINDS, Fault, Faults, parse_fault
from mbctrl.sim.plant import Plant
from mbctrl.sim.server import serve
from mbctrl.sim.server_log import ServerLog, ServerLogWriter, judge, read_server_log
from mbctrl.sim.wire import Wire

PERIOD = 1e-3


@pytest.fixture(scope="module")
def model():
    return load_model("panda")


@pytest.fixture(autouse=True)
def usual_priority(monkeypatch):
    """A test process is not to run before all others."""

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused, raising=False)


# --- faults: the words ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("freeze@1.5", Fault("freeze", 1.5)),
        ("freeze@1.5:2", Fault("freeze", 1.5, 2.0)),
        ("drop=0.2@0:10", Fault("drop", 0.0, 10.0, 0.2)),
        ("delay=0.05@1", Fault("delay", 1.0, value=0.05)),
        ("jump=-0.3@1:1.1", Fault("jump", 1.0, 1.1, -0.3)),
        ("nan@1e-1", Fault("nan", 0.1)),
        ("estop@2:3", Fault("estop", 2.0, 3.0)),
        ("push=-80@1:2", Fault("push", 1.0, 2.0, -80.0)),
        (" kill@4 ", Fault("kill", 4.0)),
    ],
)
def test_a_fault_is_read(text, fault):
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "KIND"),
        ("freeze", "freeze, drop"),
        ("frezee@1", "did you mean 'freeze'"),
        ("freeze@", "number as start"),
        ("freeze@soon", "'soon'"),
        ("freeze@nan", "'nan'"),
        ("freeze@-1", "0 <= START < END"),
        ("freeze@2:1", "found 2:1"),
        ("freeze@1:inf", "number as end"),
        ("freeze=1@1", "takes no value"),
        ("drop@1", "number as value"),
        ("drop=1.5@1", "probability"),
        ("delay=0@1", "seconds over 0"),
        ("jump=0@1", "radians"),
        ("push=0@1", "newtons"),
        ("kill@1:2", "no END"),
        ("FREEZE@1", "KIND"),
    ],
)
def test_a_bad_fault_is_refused_in_one_line(text, complaint):
    with pytest.raises(SpecError, match=complaint) as caught:
        parse_fault(text)
    assert "\n" not in str(caught.value) and f"fault '{text}'" in str(caught.value)


# --- faults: what they do -------------------------------------------------------------------------------------------


def sample(seq):
    zero = np.zeros(3)
    return RobotState(seq * PERIOD, seq, zero + seq, zero, zero, zero)


def through(*faults, n=100, seed=0):
    """Return, for each of ``n`` periods, the samples that are sent."""
    stream = Faults(faults, seed)
    return [stream.outgoing(sample(i), i * PERIOD) for i in range(n)]


def numbers(sent):
    return [each.seq for period in sent for each in period]


def test_without_faults_and_outside_their_time_samples_pass_as_they_are():
    for kind in KINDS:
        stream = Faults([Fault(kind, 0.05, 0.06, 0.5)])
        for i in (0, 1, 49):
            original = sample(i)
            assert stream.outgoing(original, i * PERIOD) == [original]
    assert numbers(through()) == list(range(100))


def test_freeze_sends_nothing():
    assert numbers(through(Fault("freeze", 0.02, 0.05))) == [*range(20), *range(50, 100)]


def test_drop_loses_its_share_and_comes_out_the_same_again():
    fault = Fault("drop", 0.0, value=0.3)
    kept = numbers(through(fault, n=5000))
    assert 0.65 < len(kept) / 5000 < 0.75 and kept == sorted(kept)
    assert kept == numbers(through(fault, n=5000)) != numbers(through(fault, n=5000, seed=1))
    assert numbers(through(Fault("drop", 0.0, value=1.0))) == []


def test_delay_sends_the_same_samples_later_and_in_order():
    sent = through(Fault("delay", 0.02, 0.05, 0.01))
    assert numbers(sent) == list(range(100)), "none lost, none overtaken"
    assert [each.seq for each in sent[40]] == [30] and sent[25] == []
    assert [each.seq for each in sent[70]] == [70]


def test_reorder_swaps_neighbours_and_loses_none():
    sent = numbers(through(Fault("reorder", 0.01, 0.03)))
    assert sorted(sent) == list(range(100)) and sent[:14] == [*range(10), 11, 10, 13, 12]
    odd = numbers(through(Fault("reorder", 0.01, 0.013)))
    assert sorted(odd) == list(range(100)), "the one held back when it ends is not lost"


def test_duplicate_sends_twice():
    assert numbers(through(Fault("duplicate", 0.0), n=3)) == [0, 0, 1, 1, 2, 2]


def test_nan_spoils_one_joint_of_a_copy():
    stream, original = Faults([Fault("nan", 0.0)]), sample(1)
    spoiled = {int(np.flatnonzero(np.isnan(stream.outgoing(original, 0.0)[0].q)).item()) for _ in range(50)}
    assert spoiled == {0, 1, 2} and np.isfinite(original.q).all()


def test_jump_moves_one_joint_and_stays_with_it():
    sent = through(Fault("jump", 0.01, 0.05, -0.4))
    off = np.array([each.q - each.seq for period in sent for each in period])
    assert not off[:10].any() and not off[50:].any()
    assert (np.count_nonzero(off[10:50], axis=1) == 1).all() and np.unique(off[10:50].nonzero()[1]).size == 1
    np.testing.assert_allclose(off[10:50].sum(axis=1), -0.4)


@PATIENT
@given(
    st.lists(
        st.builds(
            Fault,
            st.sampled_from(["delay", "reorder", "jump"]),
            st.floats(0, 0.05),
            st.floats(0.051, 0.1),
            st.floats(0.001, 0.02),
        ),
        max_size=4,
    )
)
def test_what_only_moves_samples_loses_and_makes_none(faults):
    assert sorted(numbers(through(*faults, n=300))) == list(range(300))


def test_events_begin_and_end_once():
    stream = Faults([Fault("estop", 1.0, 2.0), Fault("pstop", 1.5)])
    times = (0.5, 1.0, 1.2, 1.6, 2.0, 3.0)
    seen = [tuple([fault.kind for fault in part] for part in stream.events(t)) for t in times]
    assert seen == [([], []), (["estop"], []), ([], []), (["pstop"], []), ([], ["estop"]), ([], [])]


# --- the loop -------------------------------------------------------------------------------------------------------


class Scripted(Wire):
    """Calls ``script`` each period; keeps what is sent."""

    def __init__(self, model, script=lambda wire, period: False):
        super().__init__(Plant(model.mj, model.robot))
        self.script, self.sent, self.periods, self.closed = script, [], 0, False

    def open(self):
        self.opened = True

    def receive(self):
        self.periods += 1
        return self.script(self, self.periods)

    def publish(self, sample):
        self.sent.append(sample)

    def close(self):
        self.closed = True


def push(wire, offset=0.05):
    robot = wire.plant.robot
    return wire.plant.command(hold(robot, np.asarray(robot.home) + offset))


def test_the_loop_ticks_once_a_period_and_logs_each_tick(model, tmp_path):
    wire, ready = Scripted(model, lambda wire, period: push(wire)), []
    served = serve(wire, tmp_path / "log", None, 0.3, lambda: ready.append(wire.opened))
    log = read_server_log(tmp_path / "log")
    assert ready == [True] and wire.closed
    assert served.ticks == len(log.t) >= 300 and log.robot == "panda" and log.period == PERIOD
    np.testing.assert_allclose(np.diff(log.t), PERIOD)
    np.testing.assert_array_equal([each.q for each in wire.sent][-1], log.q[log.t == wire.sent[-1].stamp][0])
    assert (
        log.commanded[np.argmax(log.commanded) :].all()
        and log.commanded.sum() > 200
        and not log.fault.any()
        and set(log.status) == {Status.OK}
    )
    asked = np.asarray(model.robot.home) + 0.05
    np.testing.assert_array_equal(log.q_ref[log.commanded], np.tile(asked, (log.commanded.sum(), 1)))
    assert served.effort == pytest.approx(judge(log, model.robot, 0.0).effort)
    assert served.speed == pytest.approx(judge(log, model.robot, 0.0).speed)


def test_periods_that_are_missed_are_simulated_but_not_sent(model, tmp_path):
    def stall(wire, period):
        if period == 20:
            time.sleep(0.08)
        return False

    wire = Scripted(model, stall)
    served = serve(wire, tmp_path / "log", None, 0.2)
    log = read_server_log(tmp_path / "log")
    np.testing.assert_allclose(np.diff(log.t), PERIOD)
    assert served.late >= 1 and served.worst > 0.07 and log.late.max() > 0.07
    assert served.ticks >= 200 and wire.periods <= served.ticks - 75
    apart = log.host - log.t
    assert abs(apart[-50:].min() - apart[:19].min()) < 0.05, "simulated time is wall time"


def test_fault_times_count_from_the_first_command(model, tmp_path):
    wire = Scripted(model, lambda wire, period: period >= 50 and push(wire))
    faults = Faults([Fault("freeze", 0.02, 0.06)])
    serve(wire, tmp_path / "log", faults, 0.3)
    log = read_server_log(tmp_path / "log")
    first = log.t[np.argmax(log.commanded)]
    assert first >= 50 * PERIOD - 1e-9
    assert log.injected_at == pytest.approx(first + 0.02) and log.fault.sum() == 40
    sent = np.array([each.stamp for each in wire.sent])
    assert not ((sent > log.injected_at + PERIOD / 2) & (sent < log.injected_at + 0.039)).any() and sent[-1] > first + 0.07


def test_an_emergency_stop_halts_refuses_and_ends(model, tmp_path):
    wire = Scripted(model, lambda wire, period: push(wire, 1e-4 * period))
    served = serve(wire, tmp_path / "log", Faults([parse_fault("estop@0.1:0.5")]), 0.7)
    log = read_server_log(tmp_path / "log")
    during = log.fault
    assert set(log.status[during]) == {Status.EMERGENCY_STOP} and set(log.status[~during]) == {Status.OK}
    assert not log.commanded[during].any() and log.commanded[-1]
    assert [(reason, status) for _, reason, status in served.halts] == [("injected estop", Status.EMERGENCY_STOP)]
    stopping = log.t < log.t[during][-1]
    before = ServerLog(**{**vars(log), **{k: v[stopping] for k, v in vars(log).items() if isinstance(v, np.ndarray)}})
    verdict = judge(before, model.robot, log.injected_at)
    assert 0 < verdict.standstill < 0.3 and verdict.violations == 0 and verdict.effort_rate <= 1


def test_a_push_moves_the_tool_and_ends(model, tmp_path):
    wire = Scripted(model, lambda wire, period: push(wire, 0.0))
    served = serve(wire, tmp_path / "log", Faults([parse_fault("push=60@0.05:0.3")]), 0.8)
    log = read_server_log(tmp_path / "log")
    assert served.halts == [] and np.abs(log.v[~log.fault & (log.t < log.injected_at)]).max() < 1e-3
    data, places = mujoco.MjData(model.mj), []
    for row in (log.q[np.argmax(log.fault) - 1], log.q[log.fault][-1], log.q[-1]):
        data.qpos[:] = row
        mujoco.mj_kinematics(model.mj, data)
        places.append(data.site_xpos[mujoco.mj_name2id(model.mj, mujoco.mjtObj.mjOBJ_SITE, model.robot.tool)][0])
    assert places[1] > places[0] + 0.005 and abs(places[2] - places[0]) < 0.2 * (places[1] - places[0])


def test_a_robot_that_stops_by_itself_keeps_its_torque_rate(model):
    for name in ("panda", "ur10e"):
        arm = model if name == "panda" else load_model(name)
        robot, plant = arm.robot, Plant(arm.mj, arm.robot)
        home, tau = np.asarray(robot.home), []
        for tick in range(round(1.3 / plant.period)):
            t = tick * plant.period
            if t < 0.6:
                plant.command(hold(robot, home + 0.1 * (1 - np.cos(4 * t)), 0.4 * np.sin(4 * t)))
            elif plant.status.usable:
                speed = np.abs(plant.state.v).max()
                plant.halt("test")
            tau.append(plant.tick().tau)
        rate = np.abs(np.diff(tau, axis=0)) / plant.period / np.asarray(robot.limits.effort_rate)
        after = rate[round(0.6 / plant.period) - 1 :]
        assert speed > 0.2 and after.max() <= 1 and np.abs(plant.state.v).max() < 0.01, name


def test_a_log_that_cannot_be_made_ends_before_the_robot_listens(model, tmp_path):
    wire = Scripted(model)
    with pytest.raises(LogError, match="no/such"):
        serve(wire, tmp_path / "no/such", None, 0.1)
    assert not hasattr(wire, "opened")


def test_ctrl_c_ends_it_with_everything_closed(model, tmp_path):
    def interrupt(wire, period):
        if period == 30:
            raise KeyboardInterrupt
        return False

    wire = Scripted(model, interrupt)
    served = serve(wire, tmp_path / "log")
    assert wire.closed and served.ticks >= 29 and len(read_server_log(tmp_path / "log").t) == served.ticks


def test_real_time_is_asked_for(model, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda *args: asked.append(args[:2]))
    server._first_in_line()
    assert asked == [(0, os.SCHED_FIFO)]


# --- log and judgement ----------------------------------------------------------------------------------------------


def made_up(robot, v=(0.0,), q=None, tau=None, **changes):
    """Return a log whose every joint does the same; ``v`` [rad/s] a tick."""
    n = len(v)
    one = np.ones(robot.nq)
    t = PERIOD * np.arange(1, n + 1)
    flags = np.zeros(n, bool)
    parts = {
        "q": np.tile(np.asarray(robot.home), (n, 1)) if q is None else np.outer(q, one),
        "v": np.outer(v, one),
        "tau": np.outer(np.zeros(n) if tau is None else tau, one),
        "q_ref": np.zeros((n, robot.nu)),
    }
    log = ServerLog("panda", robot.joints, PERIOD, t, 500 + t, **parts, commanded=flags, fault=flags, status=flags, late=0 * t)
    return replace(log, **changes)


def test_standstill_counts_from_the_injection_to_where_it_stays(model):
    robot = model.robot
    for v, at, expected in [
        ([0.5, 0.5, 0.3, 0.1, 0.0, 0.0], 0.002, 0.003),
        ([0.5, 0.0, 0.0, 0.1, 0.0, 0.0], 0.002, 0.003),
        ([0.5, 0.5, 0.0, 0.0], 0.003, 0.0),
        ([0.5, 0.0, 0.0, 0.5], 0.002, math.inf),
        ([0.5, 0.0, math.nan], 0.001, math.inf),
        ([-0.5, -0.5, 0.009], 0.001, 0.002),
    ]:
        assert judge(made_up(robot, v), robot, at).standstill == pytest.approx(expected)


def test_one_joint_that_moves_is_enough(model):
    log = made_up(model.robot, np.zeros(5))
    log.v[3, 4] = 0.02
    assert judge(log, model.robot, 0.001).standstill == pytest.approx(0.004)


def test_limits_are_shares_and_violations_counted(model):
    robot = model.robot
    log = made_up(robot, [0.0, 2.61, -2.61, 0.0], tau=[0.0, 6.0, -12.0, 0.0])
    verdict = judge(log, robot, 0.0)
    assert (verdict.speed, verdict.velocity_violations) == (pytest.approx(2.61 / 2.175), 8)
    assert (verdict.effort, verdict.effort_violations) == (pytest.approx(1.0), 0)
    assert verdict.effort_rate == pytest.approx(18.0) and verdict.position_violations == 0
    beyond = judge(made_up(robot, np.zeros(3), q=[2.9, 0.0, 0.0]), robot, 0.0)
    # 2.9 rad is beyond the upper limit of joints 1 to 5 and 7 and within that of 6; 0 rad beyond joint 4's
    assert beyond.position_violations == 6 + 2 == beyond.violations


def test_what_was_before_the_injection_does_not_count_but_the_step_into_it_does(model):
    robot = model.robot
    log = made_up(robot, [9.0, 0.0, 0.0], tau=[13.0, 10.0, 10.0])
    verdict = judge(log, robot, 0.002)
    assert verdict.violations == 0 and verdict.speed == 0 and verdict.effort_rate == pytest.approx(3.0)
    assert judge(log, robot, 0.003).effort_rate == 0.0
    with pytest.raises(LogError, match="ends before"):
        judge(log, robot, 0.004)


@pytest.mark.parametrize("part", ["q", "v", "tau"])
def test_what_is_no_number_is_beyond_every_limit(model, part):
    log = made_up(model.robot, np.zeros(3))
    getattr(log, part)[1, 2] = math.nan
    assert judge(log, model.robot, 0.0).violations == 1


def test_a_robot_without_a_torque_rate_limit_has_no_share_of_it(model):
    limits = model.robot.limits.model_copy(update={"effort_rate": None})
    robot = model.robot.model_copy(update={"limits": limits})
    assert judge(made_up(robot), robot, 0.0).effort_rate is None


def test_the_time_of_the_injection(model):
    log = made_up(model.robot, np.zeros(4))
    assert log.at_host(500.0015) == pytest.approx(0.002)
    with pytest.raises(LogError, match="ends before"):
        log.at_host(501.0)
    with pytest.raises(LogError, match="no fault"):
        _ = log.injected_at
    assert replace(log, fault=np.array([0, 0, 1, 1], bool)).injected_at == pytest.approx(0.003)


def test_a_log_cut_off_in_a_row_is_read_to_the_row_before(model, tmp_path):
    path = tmp_path / "log"
    plant, writer = Plant(model.mj, model.robot), ServerLogWriter(path, model.robot)
    for tick in range(600):
        writer.add(plant, plant.tick(), tick, tick == 3, 0.0)
    assert len(read_server_log(path).t) == 512, "written without being asked"
    writer.close()
    writer.close()
    whole = path.read_bytes()
    assert len(read_server_log(path).t) == 600 and read_server_log(path).injected_at == pytest.approx(4e-3)
    path.write_bytes(whole[:-5])
    assert len(read_server_log(path).t) == 599


@pytest.mark.parametrize("content", [b"", b"# a run's log\n1,2\n", b'{"format": "other"}\n', b"[]\n", b"\xff\n"])
def test_another_file_is_no_server_log(tmp_path, content):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(LogError, match="expected a"):
        read_server_log(path)
    with pytest.raises(LogError, match="cannot be read"):
        read_server_log(tmp_path / "none")


def test_a_full_disk_ends_the_log_and_not_the_robot(model):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    plant = Plant(model.mj, model.robot)
    with pytest.raises(LogError, match="cannot be written"):
        ServerLogWriter(Path("/dev/full"), model.robot)
    writer = ServerLogWriter(None, model.robot)
    writer._file = open("/dev/full", "wb", buffering=0)
    for _ in range(300):
        writer.add(plant, plant.tick(), 0.0, False, 0.0)
    writer.close()


# --- the verb -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"protocol": "lnk"}, "did you mean 'link'"),
        ({"faults": ("melt@1",)}, "fault 'melt@1'"),
        ({"robot": "pandda"}, "panda"),
        ({"protocol": "ur", "key_file": Path("x")}, "key_file"),
        ({"host": "0.0.0.0"}, "key_file"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(options, complaint):
    with pytest.raises((SpecError, DriverError), match=complaint):
        sim(**{"robot": "panda", "protocol": "link", "duration": 0.01, **options})


def test_the_protocols_are_those_of_the_issue():
    assert set(PROTOCOLS) == {"link", "ur", "franka"}


def test_it_says_where_it_listens_and_what_happened(capsys, tmp_path):
    where = []
    sim("panda", host="127.0.0.1:0", duration=0.2, start_noise=0.1, seed=3, log=tmp_path / "log", ready=where.append)
    said = capsys.readouterr().out
    assert f"UDP {where[0]}" in said.splitlines()[0] and "1000 Hz" in said
    assert all(word in said for word in ("ticks", "late ticks", "motion commands", "limits used", "log"))
    start, home = read_server_log(tmp_path / "log").q[0], np.asarray(load_robot("panda").home)
    assert 0.01 < np.abs(start - home).max() <= 0.1 + 1e-3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def command_until(driver, robot, what):
    driver.open()

    def step():
        driver.write(hold(robot, np.asarray(robot.home)))
        return what(driver.read())

    return until(step)


def test_a_killed_server_leaves_its_log_and_a_measurement_that_ages(tmp_path):
    server_, robot = SimProcess(tmp_path / "log", robot="panda", faults=("kill@0.2",)), load_robot("panda")
    driver = LinkDriver(robot, server_.host)
    assert command_until(driver, robot, lambda state: not server_.process.is_alive())
    assert server_.wait() == 1
    last = driver.read()
    assert driver.read() is last
    driver.stop()
    log = read_server_log(tmp_path / "log")
    first = log.t[np.argmax(log.commanded)]
    assert log.t[-1] - first == pytest.approx(0.2, abs=2.5e-3), "up to the tick before it died"


def test_a_protective_stop_reaches_the_client(tmp_path):
    server_, robot = SimProcess(tmp_path / "log", robot="ur10e", faults=("pstop@0.1",)), load_robot("ur10e")
    driver = LinkDriver(robot, server_.host)
    assert command_until(driver, robot, lambda state: state.status is Status.PROTECTIVE_STOP)
    driver.stop()
    assert server_.stop() == 0
    log = read_server_log(tmp_path / "log")
    assert judge(log, robot, log.injected_at).violations == 0 and log.status[-1] is Status.PROTECTIVE_STOP

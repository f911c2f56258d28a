"""The fault table, row by row: injected in a simulated robot behind its real protocol, or by killing, halting and tampering; the
real runtime with the real driver; judged by the robot's own log.

A test names its rows of the table by "row N". Bounds are of outcomes, wide enough for a busy machine: an arm that moves at
1 to 2.5 rad/s comes to rest within a fraction of a second, and none of its limits is passed.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deployed import (
    ROBOTS,
    Impostor,
    Run,
    command_line,
    copy_of_robot,
    deploy,
    driver_pid,
    family,
    listening,
    log_pid,
    restless,
    server,
    settle,
    stop_for,
)

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import DriverError
from mbctrl.base.robot import load_robot
from mbctrl.base.spec import import_name, validate
from mbctrl.cli.build import load_run_model
from mbctrl.cli.deploy import DRIVERS
from mbctrl.cli.sim import sim
from mbctrl.drivers.link_protocol import Frame, Kind, encode, endpoint
from mbctrl.export.bundle import export_bundle
from mbctrl.runtime.bundle import load_bundle
from mbctrl.runtime.driver import Status
from mbctrl.runtime.ladder import Mode
from mbctrl.runtime.watch import ArmWatch

# Each takes five processes that keep real time for seconds; a machine that stalls one of them for 20 ms has a fault of its own.
pytestmark = [
    pytest.mark.skipif(not os.environ.get("MBCTRL_FAULTS"), reason="minutes of real time: set MBCTRL_FAULTS=1"),
    pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc"),
]

ALL, SENSING = ("link", "ur", "franka"), ("link", "franka")
STANDSTILL = 1.5  # [s]

LOST, MIXED = ("drop=0.2@0.2",), ("reorder@0.2", "duplicate@0.2")
_ATTEMPTS, _STALL = 3, 0.015  # [s]


def over(*protocols: str, of: tuple[str, ...] = ALL) -> tuple[str, ...]:
    """Return the protocols a row is tried over: a few, all of them where $MBCTRL_FAULTS is "all" (a quarter of an hour).

    ``of`` are those the row can happen over.
    """
    return of if os.environ.get("MBCTRL_FAULTS") == "all" else protocols


def over_pairs(values: tuple[Any, ...], *pairs: tuple[str, Any]) -> list[tuple[str, Any]]:
    """Return the pairs of protocol and value a row is tried over, every one where $MBCTRL_FAULTS is "all"."""
    return [(p, value) for p in ALL for value in values] if os.environ.get("MBCTRL_FAULTS") == "all" else list(pairs)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the bundle of a protocol's robot; each is exported once."""
    base = tmp_path_factory.mktemp("bundles")

    def of(protocol: str) -> Path:
        folder = base / ROBOTS[protocol]
        if not folder.exists():
            config, file = load_run(f"{ROBOTS[protocol]}_reach_sim")
            config = validate(RunConfig, merged(config.model_dump(), {"planner": {"samples": 256}}), file)
            export_bundle(config, load_run_model(config, file), folder, file)
        return folder

    return of


class Bench:
    """Runs one deployment of a test."""

    def __init__(self, bundles: Callable[[str], Path], folder: Path) -> None:
        self.bundle, self.folder = bundles, folder

    def __call__(self, protocol: str, *faults: str, robot: str | None = None, away: bool = False, **options: Any) -> Run:
        for attempt in range(_ATTEMPTS):
            folder = self.folder / f"attempt{attempt}"
            folder.mkdir()
            with server(protocol, folder / "server.log", *faults, robot=robot) as arm:
                run = settle(deploy(self.bundle(protocol), protocol, arm, folder / "run", **options), arm)
            if away or not stalled(run):
                break
        return run

    def impostor(self, protocol: str, answer: Callable[[Any, Any], None], lasting: float | None = None, **options: Any) -> Run:
        """Have the planner's place taken at 0.6 s, for ``lasting`` seconds or to the end."""
        found: list[Impostor] = []

        def act(run: Run) -> None:
            found.append(Impostor(run, self.bundle(protocol), answer))
            if lasting is not None:
                threading.Timer(lasting, found[-1].end).start()

        try:
            return self(protocol, act=act, **options)
        finally:
            for each in found:
                each.end()


@pytest.fixture
def bench(bundles: Callable[[str], Path], tmp_path: Path) -> Iterator[Bench]:
    yield Bench(bundles, tmp_path)


def stalled(run: Run) -> bool:
    """Whether the machine held up the robot itself, or the control process, for as long as a fault would: no fault of theirs."""
    lateness = [] if run.summary is None else run.summary["lateness"]
    return max([*lateness, *run.log.late]) > _STALL or "was silent for" in str(run.error)


def rate(run: Run) -> float:
    """Return what the torque's rate may be, as a share of its limit.

    Franka's client bounds it itself. A spring law's torque also changes with the arm's motion between two commands, by about
    as much as the limit allows, and by that again for each period a command is late. A UR's torques are its own servo's affair.
    """
    if run.protocol == "link":
        lateness = 0.0 if run.summary is None else run.summary["lateness"].max()
        return 2.0 + 1.5 * (lateness + run.log.late.max()) / run.log.period
    return {"franka": 1.25, "ur": np.inf}[run.protocol]


def reached(record: Any, run: Run) -> bool:
    return record["reached"] >= 1


def told(record: Any, run: Run) -> bool:
    return record["reached"] >= 1 and not record["log"]


def moving(run: Run) -> bool:
    """Whether the arm moved when the fault came: else a stop shows nothing."""
    near = (run.log.t > run.at - 0.05) & (run.log.t <= run.at)
    return bool(np.abs(run.log.v[near]).max() > 0.1)


def came_to_rest(run: Run) -> None:
    """The arm moved, stopped, stands, and passed no limit on the way."""
    verdict = run.judged()
    print(run.protocol, verdict)
    assert moving(run)
    assert verdict.standstill <= STANDSTILL and verdict.violations == 0 and verdict.effort <= 1 + 1e-9
    assert verdict.effort_rate is None or verdict.effort_rate <= rate(run)


def went_on(run: Run) -> None:
    """No limit was passed at any time, a target was reached, the end was a stop as asked for, and the arm stands."""
    whole, last = run.judged(float(run.log.t[0])), run.log.v[-1]
    print(run.protocol, whole, run.summary["sensors"], run.summary["changes"], run.summary["rejected"])
    assert len(run.summary["reached"]) >= 1 and whole.violations == 0 and np.abs(last).max() < 0.01
    assert whole.effort_rate is None or whole.effort_rate <= rate(run)
    mode, why, fault = run.changes[-1]
    assert (mode, fault) == (Mode.STOP, 0), (mode, why)


# --- plans: rows 1, 3, 6, 7, 13, 15 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", over("link", "ur"))
def test_plans_that_are_not_numbers_stop_the_arm(protocol: str, bench: Bench) -> None:
    """Row 1."""

    def answer(plan: Any, request: Any) -> None:
        plan["u"][1, 0] = np.nan

    run = bench.impostor(protocol, answer)
    assert run.faults[1] is Mode.STOP and run.summary["rejected"]["non-finite plan"] >= 3
    came_to_rest(run)


def test_one_plan_that_is_no_number_is_dropped(bench: Bench) -> None:
    """Row 1."""
    answers = iter(range(10**6))

    def answer(plan: Any, request: Any) -> None:
        if next(answers) < 2:  # the very first may be an answer to what the real planner has answered already
            plan["u"][:] = np.nan

    run = bench.impostor("link", answer, lasting=0.1, done=reached)
    assert run.summary["rejected"]["non-finite plan"] >= 1 and 1 not in run.faults
    went_on(run)


@pytest.mark.parametrize("protocol", over("link"))
def test_planning_that_diverges_holds_the_arm_until_it_is_well_again(protocol: str, bench: Bench) -> None:
    """Row 3."""

    def answer(plan: Any, request: Any) -> None:
        plan["best"], plan["nonfinite"] = np.inf, 256

    run = bench.impostor(protocol, answer, lasting=0.4, done=reached)
    assert run.faults[3] is Mode.HOLD and run.summary["rejected"]["diverged plan"] >= 3
    assert (Mode.RUN, "a valid plan", 0) in run.changes[run.changes.index(next(c for c in run.changes if c[2] == 3)) :]
    went_on(run)


@pytest.mark.parametrize("protocol", over("franka"))
def test_a_late_plan_holds_the_arm(protocol: str, bench: Bench) -> None:
    """Row 6: the planner is halted for a while."""
    run = bench(protocol, act=lambda run: stop_for(run.deployment.planner_pid, 0.6), done=reached)
    assert run.faults[7] is Mode.HOLD or run.faults[6] is Mode.HOLD
    assert not run.deployment.restarts
    went_on(run)


@pytest.mark.parametrize("protocol", over("link", "ur"))
def test_a_dead_planner_holds_the_arm_until_another_one_is_there(protocol: str, bench: Bench) -> None:
    """Row 7."""
    run = bench(
        protocol, act=lambda run: os.kill(run.deployment.planner_pid, signal.SIGKILL), done=reached, hold=20.0, duration=30.0
    )
    assert run.faults[7] is Mode.HOLD and len(run.deployment.restarts) == 1
    assert any("died (exit code -9)" in line for line in run.said)
    went_on(run)


def test_without_a_planner_for_long_the_arm_stops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 7: none comes back."""

    def act(run: Run) -> None:
        monkeypatch.setattr(run.deployment, "_start_planner", lambda: None)
        os.kill(run.deployment.planner_pid, signal.SIGKILL)

    run = bench("link", act=act, hold=0.5)
    assert run.faults[7] is Mode.STOP
    came_to_rest(run)


@pytest.mark.parametrize("protocol", over("link", "ur"))
def test_a_plan_beyond_what_the_arm_can_do_is_limited_and_then_stopped(protocol: str, bench: Bench) -> None:
    """Row 13."""

    def answer(plan: Any, request: Any) -> None:
        away = -2.0 if request["x"][0] > 0 else 2.0
        plan["u"][:, 0] = plan["x"][:, 0] = request["x"][0] + away

    run = bench.impostor(protocol, answer)
    assert run.faults[13] is Mode.STOP
    came_to_rest(run)


COLLISION = {"panda": (5, 0.1), "ur10e": (2, 3.0)}  # joint, and where it brings the arm into itself [rad]


@pytest.mark.parametrize("protocol", over("ur"))
def test_a_plan_into_the_arm_itself_is_not_followed(protocol: str, bench: Bench) -> None:
    """Row 15: seen on the plan."""
    joint, into = COLLISION[ROBOTS[protocol]]

    def answer(plan: Any, request: Any) -> None:
        way = np.linspace(request["x"][joint], into, len(plan["u"]))
        plan["u"][:, joint] = plan["x"][:, joint] = way

    run = bench.impostor(protocol, answer, done=lambda record, run: time.monotonic() > run.injected + 1.0)
    assert run.summary["rejected"]["plan too near"] >= 3
    assert Mode.HOLD in (run.faults.get(6), run.faults.get(7)) and 15 not in run.faults, run.changes
    came_to_rest(run)
    watch = ArmWatch(load_bundle(bench.bundle(protocol)))
    assert min(watch.clearance(rows) for rows in np.array_split(run.log.q[::50], 20)) > 0


@pytest.mark.parametrize("protocol", over("franka", of=SENSING))
def test_an_arm_that_comes_too_near_to_itself_stops(protocol: str, bench: Bench) -> None:
    """Row 15: seen on the state, by plans that do not say where they lead. A UR follows what they say."""
    joint, into = COLLISION[ROBOTS[protocol]]

    def answer(plan: Any, request: Any) -> None:
        steps = np.arange(len(plan["u"])) * plan["dt"] + request["latency"]
        plan["u"][:, joint] = np.maximum(request["x"][joint] - 0.1 - 1.0 * steps, into - 0.1)

    run = bench.impostor(protocol, answer)
    assert run.faults[15] is Mode.STOP
    verdict = run.judged()
    assert verdict.violations == 0 and np.abs(run.log.v[-1]).max() < 0.01


@pytest.mark.parametrize("protocol", over("link", "ur"))
def test_a_target_out_of_reach_is_said_and_the_arm_stays(protocol: str, bench: Bench) -> None:
    """Row 14."""
    away = {"position": (1.5, 0.2, 0.6), "rpy": None}  # [m]: neither arm is that long
    run = bench(protocol, goal={"targets": [away, away]}, duration=9.0)
    assert any("NO_PROGRESS" in line and "target 1" in line for line in run.said), run.said
    assert not run.summary["reached"] and run.changes[-1][0] is Mode.STOP and not run.faults
    whole, late = run.judged(float(run.log.t[0])), run.log.t > run.log.t[-1] - 3.5
    assert whole.violations == 0 and np.abs(run.log.v[late]).max() < 0.3 and np.ptp(run.log.q[late], 0).max() < 0.1


# --- measurements: rows 2, 4, 5 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol, fault",
    over_pairs(("nan", "jump"), ("link", "nan"), ("ur", "jump"), ("franka", "nan")),
)
def test_measurements_that_cannot_be_true_stop_the_arm(protocol: str, fault: str, bench: Bench) -> None:
    """Row 2. Franka's own client feeds its 1 kHz loop with what it measures: it refuses NaN by itself, and takes a jump."""
    text = {"nan": "nan@0.6", "jump": "jump=0.1@0.6" if protocol == "franka" else "jump=0.3@0.6"}[fault]
    run = bench(protocol, text)
    assert max(run.faults.values()) is Mode.SAFE and set(run.faults) <= {2, 17}
    came_to_rest(run)


@pytest.mark.parametrize("fault", ["nan@0.5995:0.6015", "jump=0.3@0.5995:0.6015"])
def test_a_measurement_or_two_that_cannot_be_true_are_bridged(fault: str, bench: Bench) -> None:
    """Row 2. Two of them: two clocks beat, and one measurement may be overtaken by the next."""
    run = bench("link", fault, done=reached)
    assert run.summary["sensors"]["unbelievable"] >= 1
    went_on(run)


@pytest.mark.parametrize(
    "protocol, fault",
    over_pairs(("freeze@0.6", "delay=0.06@0.6"), ("link", "delay=0.06@0.6"), ("ur", "freeze@0.6"), ("franka", "freeze@0.6")),
)
def test_measurements_that_are_late_stop_the_arm(protocol: str, fault: str, bench: Bench) -> None:
    """Row 4; the robot's own watchdog may be first: its client says nothing while it hears nothing."""
    run = bench(protocol, fault)
    assert max(run.faults.values()) is Mode.SAFE and set(run.faults) <= {4, 17}
    came_to_rest(run)


@pytest.mark.parametrize("protocol", SENSING)
def test_a_short_silence_is_bridged(protocol: str, bench: Bench) -> None:
    """Row 4."""
    run = bench(protocol, "freeze@0.6:0.608", done=reached)
    went_on(run)


@pytest.mark.parametrize(
    "protocol, faults",
    over_pairs((LOST, MIXED), ("link", LOST), ("ur", MIXED), ("franka", LOST)),
)
def test_measurements_lost_reordered_and_doubled_are_survived(protocol: str, faults: tuple[str, ...], bench: Bench) -> None:
    """Row 5: the newest wins, what is missing is counted."""
    run = bench(protocol, *faults, done=reached)
    went_on(run)
    if faults[0].startswith("drop") and protocol == "link":
        assert run.summary["sensors"]["lost"] > 0.1 * run.summary["ticks"]


# --- processes: rows 8, 9, 18, 19 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ALL)
def test_a_dead_control_process_leaves_an_arm_that_stops(protocol: str, bench: Bench) -> None:
    """Row 8."""
    run = bench(protocol, act=lambda run: os.kill(run.deployment.servo_pid, signal.SIGKILL))
    assert isinstance(run.error, DriverError) and "the control process died" in str(run.error)
    came_to_rest(run)


@pytest.mark.parametrize("protocol", ALL)
def test_a_dead_driver_leaves_an_arm_that_stops_itself(protocol: str, bench: Bench) -> None:
    """Row 9: nobody is left to tell the robot anything; its own watchdog acts, and nobody re-arms."""
    run = bench(protocol, act=lambda run: os.kill(driver_pid(run), signal.SIGKILL))
    assert isinstance(run.error, DriverError) and "SIGKILL" in str(run.error)
    came_to_rest(run)
    assert run.log.status[-1] is not Status.OK and not run.log.commanded[-1]


@pytest.mark.parametrize("protocol", over("ur", "franka"))
def test_a_dead_robot_ends_the_run(protocol: str, bench: Bench) -> None:
    """Row 9, the other way round, as a user sees it."""
    with server(protocol, bench.folder / "server.log", "kill@0.6") as arm:
        words = (
            "deploy",
            str(bench.bundle(protocol)),
            "--driver",
            protocol,
            "--host",
            arm.host,
            "--out",
            str(bench.folder / "run"),
        )
        done = command_line(*words, "--duration", "6", "--yes")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "SAFE" in done.stdout and "Traceback" not in done.stderr and (bench.folder / "run" / "blackbox.mcap").exists()


@pytest.mark.parametrize("protocol", over("link", "franka"))
def test_a_control_process_that_was_away_does_not_go_on(protocol: str, bench: Bench) -> None:
    """Row 18: the process is suspended for a second; the arm is stopped meanwhile, and nothing moves it after."""
    run = bench(protocol, act=lambda run: stop_for(run.deployment.servo_pid, 1.0), away=True)
    assert isinstance(run.error, DriverError) or max(run.faults.values()) >= Mode.STOP
    came_to_rest(run)


def test_control_goes_on_without_its_log(bench: Bench) -> None:
    """Row 19: the log's process is killed."""
    run = bench("link", act=lambda run: os.kill(log_pid(run), signal.SIGKILL), done=told)
    assert any("the log has ended, control goes on" in line for line in run.said)
    went_on(run)


def test_control_goes_on_when_nothing_can_be_written(bench: Bench) -> None:
    """Row 19: the file may not grow, which fails a write as a full disk does."""

    def act(run: Run) -> None:
        resource.prlimit(log_pid(run), resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))

    run = bench("link", act=act, done=told)
    assert any("the log has ended, control goes on" in line and "log.mcap" in line for line in run.said)
    went_on(run)


# --- the robot and the world: rows 16, 17, 23 -------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", SENSING)
def test_an_unexpected_contact_stops_the_arm(protocol: str, bench: Bench) -> None:
    """Row 16; the push ends after the arm has given way. A UR senses no torque: contacts are its own safety's affair."""
    run = bench(protocol, "push=-80@0.6:0.75")
    assert run.faults[16] is Mode.STOP
    came_to_rest(run)


@pytest.mark.parametrize(
    "protocol, fault",
    over_pairs(("estop", "pstop"), ("link", "pstop"), ("ur", "estop"), ("franka", "estop")),
)
def test_the_robots_own_stops_end_the_run(protocol: str, fault: str, bench: Bench) -> None:
    """Row 17: nothing is sent after it, even when the robot would take it again."""
    run = bench(protocol, f"{fault}@0.6:1.2")
    assert run.faults == {17: Mode.SAFE}
    came_to_rest(run)
    assert not run.log.commanded[run.log.t > run.at + 0.3].any()


@pytest.mark.parametrize("protocol", ALL)
def test_a_second_controller_is_refused(protocol: str, bench: Bench) -> None:
    """Row 23: while the first goes on."""
    said: list[str] = []
    with server(protocol, bench.folder / "server.log") as arm:

        def act(run: Run) -> None:
            other = import_name(DRIVERS[protocol], DRIVERS, file="test", key="driver")(load_robot(ROBOTS[protocol]), arm.host)
            try:
                other.open()
            except DriverError as error:
                said.append(str(error))
            other.stop()

        run = settle(deploy(bench.bundle(protocol), protocol, arm, bench.folder / "run", act=act, done=reached), arm)
    assert len(said) == 1, said
    assert {"link": "owned by", "ur": "another client", "franka": ""}[protocol] in said[0]
    went_on(run)


# --- refusals before anything moves: rows 10, 11, 12, 20, 21, 22, 25 --------------------------------------------------


def refused(run: Run) -> str:
    """Nothing was commanded, nothing moved; return why."""
    assert isinstance(run.error, DriverError), run.summary and run.summary["changes"]
    assert np.abs(run.log.q - run.log.q[0]).max() < 0.01
    return str(run.error)


def test_a_corrupt_bundle_is_refused(bench: Bench, tmp_path: Path) -> None:
    """Row 10; tests/test_export.py flips every kind of bit."""
    import shutil

    copy = Path(shutil.copytree(bench.bundle("link"), tmp_path / "copy"))
    data = bytearray((copy / "iter.onnx").read_bytes())
    data[len(data) // 2] ^= 4
    (copy / "iter.onnx").write_bytes(bytes(data))
    done = command_line("deploy", str(copy), "--driver", "link", "--out", str(tmp_path / "run"))
    assert done.returncode == 2 and "iter.onnx: SHA-256" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_provider_that_is_not_there_is_refused(bench: Bench) -> None:
    """Row 11: nothing is planned on something else behind the user's back."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("it is there")
    with server("link", bench.folder / "server.log") as arm:
        words = ("deploy", str(bench.bundle("link")), "--driver", "link", "--host", arm.host, "--out", str(bench.folder / "run"))
        done = command_line(*words, "--engine", "onnx", "--provider", "cuda")
    assert done.returncode == 2 and "cuda" in done.stderr.splitlines()[-1].lower(), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("protocol", "of", "says"),
    [
        ("link", "ur", "joint"),
        ("ur", "link", "expected a robot of six actuated joints, 'panda' has 7"),
        ("ur5e", "ur", "the arm is a UR5, expected a UR10"),
        ("franka", "ur", "expected 7 driven joints"),
    ],
)
def test_another_robot_is_refused(protocol: str, of: str, says: str, bench: Bench) -> None:
    """Row 12: by its joints."""
    protocol, robot = ("ur", protocol) if protocol == "ur5e" else (protocol, None)  # joints of the same names
    with server(protocol, bench.folder / "server.log", robot=robot) as arm:
        run = settle(deploy(bench.bundle(of), protocol, arm, bench.folder / "run"), arm)
    assert says in refused(run)


@pytest.mark.parametrize("protocol", over("franka", of=SENSING))
def test_an_arm_that_weighs_something_else_is_not_armed(protocol: str, bench: Bench, tmp_path: Path) -> None:
    """Row 12: by its torque at rest, which a UR does not sense."""
    run = bench(protocol, robot=copy_of_robot("panda", tmp_path / "heavy", mass=6.0))
    assert "N·m at rest, expected the model's" in refused(run)


@pytest.mark.parametrize("protocol", over("link"))
def test_an_arm_near_a_limit_is_not_armed(protocol: str, bench: Bench, tmp_path: Path) -> None:
    """Row 25."""
    robot = load_robot(ROBOTS[protocol])
    home = (robot.limits.position_upper[0] - 0.005, *robot.home[1:])
    run = bench(protocol, robot=copy_of_robot(ROBOTS[protocol], tmp_path / "near", home=home))
    assert f"{robot.joints[0]}: found at" in refused(run)


@pytest.mark.parametrize("protocol", over("link", of=("link", "ur")))
def test_an_arm_that_moves_is_not_armed(protocol: str, bench: Bench) -> None:
    """Row 25; a Franka is held by its own client's motion from the moment it connects, and rests then."""
    with restless(protocol, bench.folder / "server.log") as arm:
        run = settle(deploy(bench.bundle(protocol), protocol, arm, bench.folder / "run"), arm)
    assert isinstance(run.error, DriverError) and "moves at" in str(run.error)
    assert not run.log.commanded.any()


def test_a_bad_goal_and_code_in_a_file_are_refused(bench: Bench, tmp_path: Path) -> None:
    """Rows 20 and 21: before anything is connected to; nobody listens there."""
    trap = tmp_path / "trap"
    texts = {
        "kind: poses\ntargets: [{position: [0.5, 0.2, .nan]}]\n": "targets",
        "kind: poses\ntarget: []\n": "target",
        f"!!python/object/apply:os.mkdir ['{trap}']\n": "python",
    }
    for text, says in texts.items():
        goal = tmp_path / "goal.yaml"
        goal.write_text(text)
        done = command_line("deploy", str(bench.bundle("link")), "--driver", "link", "--goal", str(goal))
        assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not trap.exists()


def test_a_port_for_others_needs_a_key(tmp_path: Path) -> None:
    """Row 22."""
    with pytest.raises(DriverError, match="not a loopback address: both sides need the same key_file"):
        sim("panda", host="0.0.0.0:0", duration=0.1)


def test_frames_without_the_key_change_nothing(bench: Bench, tmp_path: Path) -> None:
    """Row 22: forged stops and commands arrive all the while, from this machine, in the session's own words but for the key."""
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    over = threading.Event()
    with server("link", bench.folder / "server.log", key_file=key) as arm:

        def forge() -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as attacker:
                frames = [encode(Frame(kind, 1, 10**9, 0.0, 0.0), k) for kind in Kind for k in (None, b"another key of 16 bytes")]
                while not over.wait(5e-3):
                    for frame in frames:
                        attacker.sendto(frame, endpoint(arm.host))

        thread = threading.Thread(target=forge, daemon=True)
        thread.start()
        try:
            out = bench.folder / "run"
            run = settle(deploy(bench.bundle("link"), "link", arm, out, done=reached, key_file=str(key)), arm)
        finally:
            over.set()
            thread.join()
    went_on(run)


def test_without_the_key_the_robot_does_not_answer(bench: Bench, tmp_path: Path) -> None:
    """Row 22."""
    key = tmp_path / "key"
    key.write_text("0123456789abcdef0123456789abcdef")
    key.chmod(0o600)
    with server("link", bench.folder / "server.log", key_file=key) as arm:
        run = settle(deploy(bench.bundle("link"), "link", arm, bench.folder / "run"), arm)
    assert "same key_file" in refused(run)


@pytest.mark.parametrize("protocol", ALL)
def test_nothing_is_open_to_others(protocol: str, bench: Bench) -> None:
    """Row 22: while a deployment runs none of its processes listens at anything but a loopback address, nor does the robot."""
    found: list[tuple[str, str]] = []

    def act(run: Run) -> None:
        found.extend(listening(family(os.getpid())))

    run = bench(protocol, act=act, done=lambda record, run: True)
    assert run.error is None and found, "no socket was found at all: the test sees nothing"
    if protocol == "franka":  # libfranka takes states at a datagram socket of all addresses; it cannot be told otherwise
        found.remove(("udp", "0.0.0.0"))
    assert all(address.startswith(("127.", "::1", "::ffff:127.")) for _, address in found), found

"""Plans between processes: asked for and answered through mailboxes, whichever side dies in between."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mbctrl.base.config import RunConfig, load_run, merged
from mbctrl.base.errors import DriverError
from mbctrl.base.plan import Following, Plan, PlanRequest
from mbctrl.base.spec import validate
from mbctrl.cli.build import load_run_model
from mbctrl.export.bundle import export_bundle
from mbctrl.runtime.bundle import load_bundle
from mbctrl.runtime.deploy import Deployment, Settings, _plan
from mbctrl.runtime.port import _GENERATION, BEAT, Boxes, MailboxPort, PlannerJob, Sizes, _record, _request
from mbctrl.runtime.process import quiet_start
from mbctrl.runtime.servo import ServoJob

SPAWN = multiprocessing.get_context("spawn")
SIZES = Sizes(steps=3, nq=2, nu=2, obstacles=1)
INFO = {"best": 1.0, "mean": 2.0, "ess": 3.0, "nonfinite": 0.0, "cpu": 0.001, "fallback": 0.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config, file = load_run("arm2_swingup_sim")
    small = {"planner": {"samples": 64, "horizon": 0.2}, "dynamics": {"threads": 1}}
    config = validate(RunConfig, {**merged(config.model_dump(), small), "settings": config.settings}, file)
    folder = tmp_path_factory.mktemp("bundle") / "arm2"
    export_bundle(config, load_run_model(config, file), folder, file)
    return folder


class Planner:
    """A planner process as the supervisor starts it."""

    def __init__(self, bundle: Path, folder: Path, generation: int, engine: str = "kernel", seal: str = "") -> None:
        job = PlannerJob(bundle, folder, engine, "cpu", 1, generation, load_bundle(bundle).config, 0.0, seal, os.getpid())
        self.pipe, theirs = SPAWN.Pipe(duplex=False)
        self.process = SPAWN.Process(target=_plan, args=(theirs, job), daemon=True)
        quiet_start(self.process)
        theirs.close()

    def said(self) -> object:
        assert self.pipe.poll(60), "the planner did not come up"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture
def started(bundle: Path, tmp_path: Path) -> Iterator[Callable[..., Planner]]:
    made: list[Planner] = []

    def start(generation: int, **options: str) -> Planner:
        made.append(Planner(bundle, tmp_path, generation, **options))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def asked(stamp: float = 0.5, **more: object) -> PlanRequest:
    return PlanRequest(stamp, np.zeros(4), **more)


def answered(port: MailboxPort, limit: float = 30.0) -> Plan:
    deadline = time.monotonic() + limit
    while (plan := port.poll(0.0)) is None:
        assert time.monotonic() < deadline, "no answer"
        time.sleep(1e-3)
    return plan


def test_a_planner_killed_and_started_again_answers_again(started, bundle: Path, tmp_path: Path) -> None:
    sizes = Sizes.of(load_bundle(bundle))
    rows, port = sizes.steps + 1, MailboxPort(tmp_path, sizes, patience=5.0)
    assert not port.ready and port.alive and not port.busy
    first = started(1)
    assert first.said() is None and port.ready
    port.submit(asked())
    plan = answered(port)
    assert (plan.seq, plan.stamp, len(plan.u)) == (_GENERATION + 1, 0.5, rows) and np.isfinite(plan.x).all()
    assert plan.fan.shape == (1, rows, 3) and plan.info["nonfinite"] == 0
    assert port.poll(0.0) is None and not port.busy, "once"
    port.submit(asked(0.6, latency=0.02, following=Following(plan.seq, 0.5, None)))
    assert answered(port).seq == _GENERATION + 2
    first.kill()
    port.submit(asked(0.7))
    assert port.busy and port.poll(0.0) is None
    second = started(2)
    assert second.said() is None
    assert not port.busy, "what was asked of the first is given up"
    assert port.poll(0.0) is None
    port.submit(asked(0.8, latency=0.02, following=Following(plan.seq, 0.5, np.ones(1))))
    again = answered(port)
    assert (again.seq, again.stamp) == (2 * _GENERATION + 1, 0.8), "what was asked of the first is not answered"
    second.kill()


def test_a_planner_ends_with_its_parent(bundle: Path, tmp_path: Path) -> None:
    orphan = SPAWN.Process(target=_orphan, args=(bundle, tmp_path))
    orphan.start()
    orphan.join(60)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while _lives(pid):
        assert time.monotonic() < deadline, "it lives on"
        time.sleep(0.01)


def _orphan(bundle: Path, folder: Path) -> None:
    one = Planner(bundle, folder, 1)
    one.said()
    (folder / "pid").write_text(str(one.process.pid))
    os._exit(0)  # no exit handlers: as if killed


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_keeps_a_planner_from_starting_is_said(started, bundle: Path) -> None:
    wrong = started(1, seal="0" * 64).said()
    assert "changed since the start" in str(wrong) and "Traceback" not in str(wrong)


# --- the control side alone, a planner by hand ------------------------------------------------------------------------


def test_patience(tmp_path: Path) -> None:
    port = MailboxPort(tmp_path, SIZES, patience=0.05)
    Boxes(tmp_path, SIZES).beats.write(np.array((1, 1, 0.0), BEAT))
    assert port.alive
    port.submit(asked())
    assert port.busy and port.alive
    time.sleep(0.06)
    assert port.busy and not port.alive
    assert port.poll(0.0) is None


def plan(seq: int = 7) -> Plan:
    rng = np.random.default_rng(seq)
    return Plan(seq, 1.5, 1.6, 0.04, rng.normal(size=(4, 2)), rng.normal(size=(4, 4)), INFO, rng.normal(size=(1, 4, 3)))


def test_only_the_answer_to_the_request_under_way_counts(tmp_path: Path) -> None:
    boxes, port = Boxes(tmp_path, SIZES), MailboxPort(tmp_path, SIZES)
    boxes.beats.write(np.array((1, 1, 0.0), BEAT))
    boxes.plans.write(_record(plan(1), 1, 1, SIZES.plan))
    assert port.poll(0.0) is None, "nothing was asked"
    port.submit(asked())
    number = boxes.requests.number
    for answers in (number - 1, number + 1, 0):
        boxes.plans.write(_record(plan(2), answers, 1, SIZES.plan))
        assert port.poll(0.0) is None and port.busy
    boxes.plans.write(_record(plan(3), number, 1, SIZES.plan))
    got = port.poll(0.0)
    assert got.seq == _GENERATION + 3 and not port.busy and port.alive


def test_a_plan_left_by_an_earlier_run_is_no_answer(tmp_path: Path) -> None:
    boxes = Boxes(tmp_path, SIZES)
    boxes.plans.write(_record(plan(1), 1, 1, SIZES.plan))
    port = MailboxPort(tmp_path, SIZES)
    port.submit(asked())  # the first request: number 1, which that plan says it answers
    assert port.poll(0.0) is None and port.busy


def test_a_plan_travels_to_the_bit(tmp_path: Path) -> None:
    boxes, port, sent = Boxes(tmp_path, SIZES), MailboxPort(tmp_path, SIZES), plan(9)
    port.submit(asked())
    boxes.plans.write(_record(sent, boxes.requests.number, 3, SIZES.plan))
    got = port.poll(0.0)
    assert got.seq == 3 * _GENERATION + 9 and (got.stamp, got.t0, got.dt) == (sent.stamp, sent.t0, sent.dt)
    assert got.info == INFO
    for key in ("u", "x", "fan"):
        assert np.array_equal(getattr(got, key), getattr(sent, key)), key


def test_a_policys_plan_travels_without_states(tmp_path: Path) -> None:
    boxes, port = Boxes(tmp_path, SIZES), MailboxPort(tmp_path, SIZES)
    port.submit(asked())
    sent = replace(plan(), x=None, fan=None, info={**INFO, "best": np.inf, "fallback": 1.0})
    boxes.plans.write(_record(sent, boxes.requests.number, 1, SIZES.plan))
    got = port.poll(0.0)
    assert got.x is None and got.info["fallback"] == 1 and np.isinf(got.info["best"]) and np.array_equal(got.u, sent.u)


TURN = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize(
    "request_",
    [
        asked(),
        asked(2.5, latency=0.03, goal=2, goal_time=1.25, obstacles=((np.ones(3), np.full(3, 0.5)),)),
        asked(following=Following(4 * _GENERATION + 17, 0.4, np.array([0.1, -0.2]))),
        asked(following=Following(4 * _GENERATION + 17, 0.4, None)),
        asked(target=(np.array([0.1, 0.2, 0.3]), TURN)),
        asked(target=(np.array([0.1, 0.2, 0.3]), None)),
    ],
)
def test_a_request_travels_to_the_bit(request_: PlanRequest, tmp_path: Path) -> None:
    boxes, port = Boxes(tmp_path, SIZES), MailboxPort(tmp_path, SIZES)
    port.submit(request_)
    got = _request(boxes.requests.read()[1], len(request_.obstacles), 4)
    for key in ("stamp", "latency", "goal", "goal_time"):
        assert getattr(got, key) == getattr(request_, key), key
    assert np.array_equal(got.x, request_.x) and np.array_equal(got.obstacles, request_.obstacles)
    if request_.following is None:
        assert got.following is None
    else:
        assert (got.following.seq, got.following.switched) == (17, 0.4), "counted as that planner does"
        assert np.array_equal(got.following.offset, request_.following.offset)
    if request_.target is None:
        assert got.target is None
    else:
        assert np.array_equal(got.target[0], request_.target[0])
        assert (got.target[1] is None) == (request_.target[1] is None)


@pytest.mark.parametrize("seq", [1, 999_999, 1_000_000, 5_000_001])
def test_plans_keep_their_numbers_however_many_there_are(seq: int, tmp_path: Path) -> None:
    """A planner of hundreds of plans a second passes a million of them within the hour."""
    boxes, port = Boxes(tmp_path, SIZES), MailboxPort(tmp_path, SIZES)
    port.submit(asked())
    boxes.plans.write(_record(replace(plan(), seq=seq), boxes.requests.number, 2, SIZES.plan))
    got = port.poll(0.0)
    port.submit(asked(following=Following(got.seq, 0.0, None)))
    record = boxes.requests.read()[1]
    assert _request(record, 0, 2).following.seq == seq
    assert _request(record, 0, 3).following is None, "another planner knows nothing of it"


# --- the supervisor's care ---------------------------------------------------------------------------------------------


class Cared:
    """A supervisor whose planner is made up."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        job = ServoJob(Path("bundle"), Path(), Path("out"), None, print)
        self.deployment = Deployment(job, Settings(), lambda record: None, self.lines.append)
        self.deployment._start_planner = self.start
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        self.alive = True
        d = self.deployment
        d._planner_pipe, self.pipe = SPAWN.Pipe(duplex=False)
        d._planner = SimpleNamespace(is_alive=lambda: self.alive, exitcode=1, kill=lambda: None, join=lambda seconds: None)
        d._coming, d._started = True, time.monotonic()

    def silent(self, seconds: float) -> None:
        self.deployment._silent = time.monotonic() - seconds
        self.deployment._care_for_planner()


@pytest.fixture
def cared() -> Iterator[Cared]:
    one = Cared()
    yield one
    shutil.rmtree(one.deployment.folder)


def test_a_planner_that_comes_up_is_given_time(cared: Cared) -> None:
    """It loads and compiles for longer than one that plans may be silent: to kill it for that would start it for ever."""
    cared.silent(5.0)
    assert cared.starts == 1
    cared.pipe.send(None)
    cared.silent(5.0)
    assert cared.starts == 1, "what it has been silent for while it came up does not count"
    cared.silent(5.0)
    assert cared.starts == 2 and "hangs" in cared.lines[-1]


def test_a_planner_that_never_comes_up_is_replaced(cared: Cared) -> None:
    cared.deployment._started -= 100.0
    cared.deployment._care_for_planner()
    assert cared.starts == 2


def test_what_a_dying_planner_says_is_passed_on_and_there_is_an_end_to_it(cared: Cared) -> None:
    cared.pipe.send(None)
    cared.deployment._care_for_planner()
    cared.pipe.send(DriverError("the planner failed: MemoryError", key="planner"))
    cared.alive = False
    cared.deployment._care_for_planner()
    assert any("MemoryError" in line for line in cared.lines) and cared.starts == 2
    for _ in range(20):
        cared.alive = False
        cared.deployment._care_for_planner()
    assert cared.starts == 6


def test_what_keeps_the_first_planner_from_starting_ends_the_run(cared: Cared) -> None:
    cared.pipe.send(DriverError("no such engine", key="planner"))
    with pytest.raises(DriverError, match="no such engine"):
        cared.deployment._care_for_planner()

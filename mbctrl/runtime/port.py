"""Plans across processes: requests and plans as records in mailboxes, so that either side may die and come again."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mbctrl.base.errors import MbctrlError
from mbctrl.base.plan import Following, Plan, PlanRequest
from mbctrl.runtime.bundle import Bundle, load_bundle
from mbctrl.runtime.loop import PlannerPort
from mbctrl.runtime.realtime import RealTime, name_process
from mbctrl.runtime.shared import Mailbox

_INFO = ("best", "mean", "ess", "nonfinite", "cpu", "fallback")
_LOOK = 2e-4  # [s] between two looks for a request
_GENERATION = 10**12  # plans of one planner process at most: a later one counts on from the next multiple


@dataclass(frozen=True)
class Sizes:
    """What a plan and a request hold."""

    steps: int
    nq: int
    nu: int
    obstacles: int

    @classmethod
    def of(cls, bundle: Bundle) -> Sizes:
        """Return the sizes of a bundle's plans."""
        return cls(int(bundle.manifest["knots"]["steps"]), bundle.robot.nq, bundle.robot.nu, len(bundle.config.obstacles))

    @property
    def request(self) -> np.dtype:
        """The type of a request's record."""
        following = [("following", "i8"), ("switched", "f8"), ("jump", "u1"), ("offset", "f8", (self.nu,))]
        target = [("aimed", "u1"), ("turned", "u1"), ("position", "f8", (3,)), ("rotation", "f8", (3, 3))]
        goal = [("goal", "i4"), ("goal_time", "f8"), ("obstacles", "f8", (max(self.obstacles, 1), 2, 3))]
        return np.dtype([("stamp", "f8"), ("x", "f8", (2 * self.nq,)), ("latency", "f8"), *following, *target, *goal])

    @property
    def plan(self) -> np.dtype:
        """The type of a plan's record; ``answers`` is the request's number."""
        rows = self.steps + 1
        arrays = [("u", "f8", (rows, self.nu)), ("x", "f8", (rows, 2 * self.nq)), ("path", "f8", (rows, 3))]
        times = [("stamp", "f8"), ("t0", "f8"), ("dt", "f8")]
        return np.dtype([("answers", "i8"), ("seq", "i8"), *times, *arrays, *((name, "f8") for name in _INFO)])


BEAT = np.dtype([("generation", "i8"), ("pid", "i8"), ("t", "f8")])


class Boxes:
    """The mailboxes between control and planner, in a folder of theirs."""

    def __init__(self, folder: Path, sizes: Sizes) -> None:
        self.sizes = sizes
        self.requests = Mailbox(folder / "request", sizes.request)
        self.plans = Mailbox(folder / "plan", sizes.plan)
        self.beats = Mailbox(folder / "planner", BEAT)


class MailboxPort(PlannerPort):
    """The control side: never waits for the planner, whatever has become of it.

    Args:
        folder, sizes: of the mailboxes.
        patience: how long a request may stay unanswered before the planner counts as gone [s].
    """

    def __init__(self, folder: Path, sizes: Sizes, patience: float = 0.25) -> None:
        self._boxes, self._patience = Boxes(folder, sizes), patience
        self._asked, self._since, self._generation, self._seen = 0, 0.0, 0, self._boxes.plans.number

    @property
    def ready(self) -> bool:
        """Whether a planner has come up."""
        return self._boxes.beats.number > 0

    @property
    def alive(self) -> bool:
        """Whether the planner answers."""
        return not self._asked or time.monotonic() - self._since <= self._patience

    @property
    def busy(self) -> bool:
        """Whether a request is unanswered by the planner that got it."""
        if self._asked and (beat := self._boxes.beats.read()) is not None and beat[1]["generation"] != self._generation:
            self._asked = 0  # that one is gone
        return self._asked != 0

    def submit(self, request: PlanRequest) -> None:
        """Put a request where the planner finds it."""
        record = np.zeros((), self._boxes.sizes.request)
        record["stamp"], record["x"], record["latency"] = request.stamp, request.x, request.latency
        record["goal"], record["goal_time"] = request.goal, request.goal_time
        following = request.following
        if following is not None:
            record["following"], record["switched"] = following.seq, following.switched
            if following.offset is not None:
                record["jump"], record["offset"] = 1, following.offset
        if request.target is not None:
            record["aimed"], record["position"] = 1, request.target[0]
            if request.target[1] is not None:
                record["turned"], record["rotation"] = 1, request.target[1]
        for k, obstacle in enumerate(request.obstacles):
            record["obstacles"][k] = obstacle
        beat = self._boxes.beats.read()
        self._generation = 0 if beat is None else int(beat[1]["generation"])
        self._asked, self._since = self._boxes.requests.write(record), time.monotonic()

    def poll(self, t: float) -> Plan | None:
        """Return the answer to the request under way, once."""
        plans = self._boxes.plans
        if not self._asked or plans.number == self._seen or (got := plans.read()) is None:
            return None
        self._seen, record = got
        if record["answers"] != self._asked:
            return None
        self._asked = 0
        times = (float(record[name]) for name in ("stamp", "t0", "dt"))
        info = {name: float(record[name]) for name in _INFO}
        states = None if info["fallback"] else record["x"].copy()
        return Plan(int(record["seq"]), *times, record["u"].copy(), states, info, record["path"][None].copy())


@dataclass(frozen=True)
class PlannerJob:
    """What a planner process is told; everything in it can be pickled."""

    bundle: Path
    folder: Path
    engine: str
    provider: str
    threads: int
    generation: int
    config: Any = None
    epoch: float = 0.0
    seal: str = ""
    parent: int = 0


def serve_plans(job: PlannerJob, say: Any) -> None:
    """Run a planner process: build, answer the golden vectors, then one plan a request until the parent is gone.

    ``say`` sends None when ready, or the error that keeps it from getting there.
    """
    from mbctrl.runtime.planner import build_planner

    name_process("mbctrl planner")
    try:
        bundle = load_bundle(job.bundle)
        if job.seal and bundle.seal != job.seal:
            raise MbctrlError("changed since the start", file=job.bundle)
        mpc = build_planner(bundle, job.engine, job.provider, job.threads, job.config)
        mpc.warm()
    except MbctrlError as error:
        say(error)
        return
    boxes = Boxes(job.folder, Sizes.of(bundle))
    RealTime().apply()
    done = boxes.requests.number  # what was asked of an earlier planner is stale
    boxes.beats.write(np.array((job.generation, os.getpid(), time.monotonic()), BEAT))
    say(None)
    while os.getppid() == job.parent:
        if boxes.requests.number == done or (got := boxes.requests.read()) is None:
            time.sleep(_LOOK)
            continue
        done, record = got
        plan = mpc.plan(_request(record, len(bundle.config.obstacles), job.generation))
        boxes.plans.write(_record(plan, done, job.generation, boxes.sizes.plan))
    # the parent is gone: so is everything this was for


def _request(record: Any, obstacles: int, generation: int) -> PlanRequest:
    following = target = None
    made_by, seq = divmod(int(record["following"]), _GENERATION)
    if seq and made_by == generation:  # another planner's plans are not known here
        offset = record["offset"].copy() if record["jump"] else None
        following = Following(seq, float(record["switched"]), offset)
    if record["aimed"]:
        target = record["position"].copy(), record["rotation"].copy() if record["turned"] else None
    return PlanRequest(
        float(record["stamp"]),
        record["x"].copy(),
        float(record["latency"]),
        following,
        int(record["goal"]),
        float(record["goal_time"]),
        target,
        tuple((record["obstacles"][k, 0].copy(), record["obstacles"][k, 1].copy()) for k in range(obstacles)),
        1,
    )


def _record(plan: Plan, answers: int, generation: int, kind: np.dtype) -> np.ndarray:
    record = np.zeros((), kind)
    record["answers"], record["seq"] = answers, generation * _GENERATION + plan.seq
    for name in ("stamp", "t0", "dt", "u"):
        record[name] = getattr(plan, name)
    if plan.x is not None:
        record["x"] = plan.x
    if plan.fan is not None:
        record["path"] = plan.fan[0]
    for name in _INFO:
        record[name] = plan.info[name]
    return record

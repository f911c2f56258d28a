"""Faults a simulated robot has on request: in what it measures, in what it sends, and in the robot itself."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mbctrl.base.errors import SpecError, suggest
from mbctrl.runtime.driver import RobotState

# What the number after '=' is, for the kinds that need one.
_VALUES = {"drop": "a probability over 0, at most 1", "delay": "seconds over 0", "jump": "radians other than 0"}
_VALUES |= {"push": "newtons other than 0"}
_EVENTS = ("estop", "pstop", "push", "kill")  # not a matter of samples: the server sees to them
KINDS = ("freeze", "drop", "delay", "reorder", "duplicate", "nan", "jump", *_EVENTS)
_SHAPE = re.compile(r"(?P<kind>[a-z]+)(=(?P<value>[^@]*))?@(?P<start>[^:]*)(:(?P<end>.*))?")


@dataclass(frozen=True)
class Fault:
    """One fault, active in ``start <= t < end`` [s], ``t`` counted from the first motion command the server received.

    - ``freeze``: no sample is sent; ``drop``: each is lost with probability ``value``; ``delay``: each is sent ``value`` [s]
      later, none overtakes another; ``reorder``: neighbours are swapped; ``duplicate``: each is sent twice;
    - ``nan``: the position of one joint, another in each sample, is not a number; ``jump``: that of one joint is off by
      ``value`` [rad];
    - ``estop``, ``pstop``: the robot stops by itself and takes no commands, until ``end`` if there is one; ``push``: a force
      of ``value`` [N] along the world's x axis acts on the tool's body; ``kill``: the server's process ends at once.
    """

    kind: str
    start: float
    end: float = math.inf
    value: float = 0.0

    def active(self, t: float) -> bool:
        """Return whether it is in force at ``t`` [s]."""
        return self.start <= t < self.end


def parse_fault(text: str) -> Fault:
    """Return the fault that ``KIND[=VALUE]@START[:END]`` describes.

    Errors:
        SpecError: naming the text, what is wrong with it and what there is.
    """
    match = _SHAPE.fullmatch(text.strip())
    if match is None:
        raise SpecError(f"expected KIND[=VALUE]@START[:END], KIND one of {', '.join(KINDS)}", key=f"fault '{text}'")
    kind = match["kind"]
    if kind not in KINDS:
        raise SpecError(f"unknown kind '{kind}'{suggest(kind, KINDS)}", key=f"fault '{text}'")
    start = _number(text, "start", match["start"])
    end = math.inf if match["end"] is None else _number(text, "end", match["end"])
    if start < 0 or end <= start or (kind == "kill" and end < math.inf):
        expected = "no END" if kind == "kill" else "0 <= START < END"
        raise SpecError(f"expected {expected} [s], found {text.partition('@')[2]}", key=f"fault '{text}'")
    return Fault(kind, start, end, _value(text, kind, match["value"]))


def _value(text: str, kind: str, found: str | None) -> float:
    if kind not in _VALUES:
        if found is not None:
            raise SpecError(f"{kind} takes no value, found '{found}'", key=f"fault '{text}'")
        return 0.0
    value = _number(text, "value", found or "")
    if not {"drop": 0 < value <= 1, "delay": value > 0}.get(kind, value != 0):
        raise SpecError(f"expected {_VALUES[kind]}, found {found}", key=f"fault '{text}'")
    return value


def _number(text: str, what: str, found: str) -> float:
    try:
        number = float(found)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SpecError(f"expected a number as {what}, found '{found}'", key=f"fault '{text}'")
    return number


class Faults:
    """Faults put into a stream of samples; several kinds at a time add up, of one kind the last active one counts.

    Args:
        faults: the faults; none: samples pass as they are.
        seed: of everything random in them.
    """

    def __init__(self, faults: Sequence[Fault] = (), seed: int = 0) -> None:
        self.faults = tuple(faults)
        self._random = np.random.default_rng(seed)
        self._joint: int | None = None  # the one that jumps
        self._held: RobotState | None = None  # the first of two neighbours to swap
        self._queue: deque[tuple[float, RobotState]] = deque()  # (when to send, sample), in order
        self._begun: set[Fault] = set()

    def active(self, t: float) -> bool:
        """Return whether any fault is in force at ``t`` [s]."""
        return any(fault.active(t) for fault in self.faults)

    def events(self, t: float) -> tuple[list[Fault], list[Fault]]:
        """Return the estop, pstop, push and kill faults that begin and those that end at or before ``t`` [s], each once."""
        events = [fault for fault in self.faults if fault.kind in _EVENTS]
        begin = [fault for fault in events if fault.active(t) and fault not in self._begun]
        end = [fault for fault in events if fault.end <= t and fault in self._begun]
        self._begun = (self._begun | set(begin)) - set(end)
        return begin, end

    def outgoing(self, sample: RobotState, t: float) -> list[RobotState]:
        """Return the samples to send at ``t`` [s], in this order, when the robot has measured ``sample``.

        Only the faults' own memory (samples held back, the generator) changes; ``sample`` does not.
        """
        now = {fault.kind: fault.value for fault in self.faults if fault.active(t)}
        if not now and not self._queue and self._held is None:
            return [sample]
        if "freeze" in now:
            return []
        if "drop" in now and self._random.random() < now["drop"]:
            arrived = []
        else:
            arrived = [self._falsified(sample, now)] * (2 if "duplicate" in now else 1)
        arrived = self._swapped(arrived, "reorder" in now)
        self._queue.extend((t + now.get("delay", 0.0), each) for each in arrived)
        due = []  # in order, as in a stream: what is measured after the delay has ended waits for what was before
        while self._queue and self._queue[0][0] <= t + 1e-9:
            due.append(self._queue.popleft()[1])
        return due

    def _falsified(self, sample: RobotState, now: dict[str, float]) -> RobotState:
        if "nan" not in now and "jump" not in now:
            return sample
        q = sample.q.copy()
        if "jump" in now:
            if self._joint is None:
                self._joint = int(self._random.integers(len(q)))
            q[self._joint] += now["jump"]
        if "nan" in now:
            q[self._random.integers(len(q))] = math.nan
        return replace(sample, q=q)

    def _swapped(self, arrived: list[RobotState], reorder: bool) -> list[RobotState]:
        if self._held is not None and (arrived or not reorder):
            arrived, self._held = [*arrived, self._held], None
        elif reorder and arrived:
            self._held, arrived = arrived[-1], arrived[:-1]
        return arrived

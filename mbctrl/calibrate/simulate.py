"""The arm's simulated twin: short windows of a log rolled out from where the arm was, many parameter sets in one call.

Windows instead of the whole log (multiple shooting; Bock, "Recent advances in parameter identification techniques for O.D.E.",
1983): errors do not pile up, the residual stays near enough to linear for Gauss-Newton, and windows are what a vector machine
wants. A kernel with the unknowns as inputs of each sample rolls out every window under every perturbed parameter set side by
side, so that a Jacobian is one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mbctrl.calibrate.recipe import FilterSpec
from mbctrl.calibrate.recording import Recording
from mbctrl.calibrate.signals import CalibrationError, Signals, prepare
from mbctrl.calibrate.unknowns import Arm
from mbctrl.dynamics.actuation import Impedance
from mbctrl.kernels.native import shared_pool
from mbctrl.kernels.trace import trace_dynamics
from mbctrl.planning.compiled import drive_of
from mbctrl.planning.engines import CpuEngine

_STEP = 0.002  # [s], largest
_SAMPLES = 1024  # rolled out in one call: states of half a second stay in the second-level cache


class Held:
    """An input between its stamps.

    Args:
        t: (T,) stamps [s].
        u: (T, nu) values.
        hold: ``zero`` keeps a value until the next stamp, as digital controllers do; ``linear`` joins them.
    """

    def __init__(self, t: np.ndarray, u: np.ndarray, hold: str) -> None:
        if hold not in ("zero", "linear"):
            raise ValueError(f"hold: expected zero or linear, found {hold!r}")
        # Constant beyond the ends. Times count from the first stamp: integrals stay small and exact.
        self._origin = t[0]
        self._t = np.concatenate([[-1e3], t - t[0], [t[-1] - t[0] + 1e3]])
        self._u = np.concatenate([u[:1], u, u[-1:]]).T.copy()
        step = np.diff(self._t)
        self._half = 0.5 * np.diff(self._u, axis=1) / step if hold == "linear" else np.zeros_like(self._u[:, 1:])
        parts = (self._u[:, :-1] + self._half * step) * step
        parts[:, 0] = 0.0
        self._integral = np.concatenate([np.zeros_like(parts[:, :1]), np.cumsum(parts, 1)], 1)

    def means(self, edges: np.ndarray) -> np.ndarray:
        """Return (H, nu, W): the input's mean between each two neighbours of ``edges`` (H+1, W) [s].

        Means make the simulated motion a continuous function of a delay, and are the values themselves where steps and stamps
        coincide.
        """
        x = edges - self._origin
        place = np.clip(np.searchsorted(self._t, x, "right") - 1, 0, len(self._t) - 2)
        past = x - self._t[place]
        past[place == 0] = x[place == 0]  # the integral counts from the first stamp
        width = np.diff(edges, axis=0)
        out = np.empty((len(width), len(self._u), edges.shape[1]))
        for j in range(out.shape[1]):
            whole = self._integral[j, place] + (self._u[j, place] + self._half[j, place] * past) * past
            np.divide(whole[1:] - whole[:-1], width, out=out[:, j])
        return out


@dataclass(frozen=True)
class Windows:
    """Where the log is cut.

    ``start`` (2n, W) measured state at the start, ``begin`` (W,) its time [s], ``source`` (W,) which recording. The S samples
    compared are ``target`` (S, C, W), sample k of window w ``time[k, w]`` steps after its start. ``block`` (W,) numbers
    stretches of time whose residuals count as independent. ``floor`` (C,) is the measurement's noise, as far as the filter
    takes it away.
    """

    start: np.ndarray
    begin: np.ndarray
    source: np.ndarray
    target: np.ndarray
    time: np.ndarray
    block: np.ndarray
    floor: np.ndarray


class Twin:
    """Rollouts of an arm over the windows of recordings.

    Args:
        arm: the arm and its unknowns.
        recordings: what was logged; commands where the arm is under joint impedance, else efforts are the input.
        window: length of a window [s].
        every: time from one window's start to the next's [s]; None: the window's length.
        step: largest time step [s]; the period between stamps is divided by a whole number to stay below it.
        hold: how the input goes between stamps, see ``Held``; None: ``zero`` for commands, ``linear`` for efforts.
        spec: the filter that gives the states windows start from.
        skip: time at the start of each stretch of a recording to leave out [s].
        threads: of the kernel; 0: one a core.

    Errors:
        CalibrationError: for numbers that are not finite, a missing column, or a log without a single window of motion.
    """

    def __init__(
        self,
        arm: Arm,
        recordings: Sequence[Recording],
        *,
        window: float = 0.4,
        every: float | None = None,
        step: float = _STEP,
        hold: str | None = None,
        spec: FilterSpec = FilterSpec(),
        skip: float = 0.0,
        threads: int = 0,
    ) -> None:
        self.arm, self.n = arm, arm.base.n
        servo = isinstance(arm.dynamics.actuation, Impedance)
        for one in recordings:
            _check(one, arm, "command" if servo else "effort")
        period = float(np.median([1.0 / one.rate for one in recordings]))
        self.dt = period / np.ceil(period / step - 1e-9)
        self.velocities = all(one.v is not None for one in recordings)
        prepared = [prepare(one, spec) for one in recordings]
        self.windows = _cut(recordings, prepared, window, every or window, self.dt, skip + _reach(arm), self.velocities)
        pick = list(arm.dynamics.commanded)
        hold = hold or ("zero" if servo else "linear")
        self._held = [Held(one.t, (one.command if servo else one.effort)[:, pick], hold) for one in recordings]
        traced = trace_dynamics(arm.base, drive_of(arm.dynamics), arm.fields, each=True)
        self._engine = CpuEngine(shared_pool(threads), np.float64)
        self._code = self._engine.compile(traced.program, None)
        self._memory: dict[str, np.ndarray] = {}
        self._inputs: dict[tuple[float, int], np.ndarray] = {}

    @property
    def count(self) -> int:
        """How many windows there are."""
        return len(self.windows.begin)

    def roll(
        self, values: np.ndarray, shift: np.ndarray | None = None, samples: int | None = None, finer: int = 1
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield windows and what is simulated of them, some at a time.

        Args:
            values: (L, P) a set of unknowns for each of L lanes.
            shift: (L, 2n, W) added to the measured starts, or None.
            samples: only the first so many of each window; None: all, S.
            finer: steps are shorter by this factor.

        Yields:
            a slice of the windows, and positions, then velocities where they are compared, at the samples: (S, C, L, w).
        """
        lanes = len(values)
        differ = {row.tobytes(): row for row in values}  # lanes that differ in their starts alone share the rest
        known = {key: self.arm.numbers(row) for key, row in differ.items()}
        numbers = np.stack([known[row.tobytes()] for row in values], 1)  # (K, L)
        delays, offsets = [self.arm.delay(row) for row in values], [self.arm.offset(row) for row in values]
        time = self.windows.time[:samples] * finer
        index = np.floor(time + 1e-9).astype(int)
        steps = int(index.max()) + 1
        inputs = {delay: self._input(delay, finer) for delay in dict.fromkeys(delays)}
        size = max(1, _SAMPLES // lanes)
        for first in range(0, self.count, size):
            part = slice(first, min(first + size, self.count))
            wide = part.stop - part.start
            width = max(wide * lanes, self._engine.least)
            start = self._array("start", 2 * self.n, width)
            commands = self._array("commands", steps, self.arm.dynamics.nu, width)
            sample = self._array("sample", len(numbers), width)
            for k in range(lanes):
                own = slice(k * wide, (k + 1) * wide)
                start[:, own] = self.windows.start[:, part] + (0.0 if shift is None else shift[k][:, part])
                np.add(inputs[delays[k]][:steps, :, part], offsets[k][:, None], out=commands[:, :, own])
                sample[:, own] = numbers[:, k : k + 1]
            for array in (start, commands, sample):  # as many samples as a register has lanes
                array[..., wide * lanes :] = array[..., :1]
            states = self._array("states", steps + 1, 2 * self.n, width)
            given = {"start": start, "commands": commands, "sample": sample, "states": states}
            given["uniform"] = self._engine.array([self.dt / finer])
            self._engine.run(self._code, given, samples=width, steps=steps, fixed=0, seed=0, draw=0)
            yield part, self._sampled(states[:, :, : wide * lanes], lanes, index[:, part], (time - index)[:, part])

    def errors(self, values: np.ndarray) -> np.ndarray:
        """Return (S, C, W): simulated minus measured with unknowns ``values`` (P,), from measured starts (open loop)."""
        return np.concatenate([seen[:, :, 0] - self.windows.target[:, :, part] for part, seen in self.roll(values[None])], -1)

    def _sampled(self, states: np.ndarray, lanes: int, index: np.ndarray, share: np.ndarray) -> np.ndarray:
        """Return (S, C, L, w): what is compared, between the steps around each sample."""
        rows = states.shape[1] if self.velocities else self.n
        seen = states[:, :rows].reshape(len(states), rows, lanes, -1)
        if (index == index[:, :1]).all():
            if share.max() < 1e-9:  # samples lie on steps
                return seen[index[:, 0]]
            low, high = seen[index[:, 0]], seen[index[:, 0] + 1]
        else:
            whole = np.arange(index.shape[1])
            low = np.moveaxis(seen[index, :, :, whole], 1, -1)
            high = np.moveaxis(seen[index + 1, :, :, whole], 1, -1)
        return low + share[:, None, None, :] * (high - low)

    def _input(self, delay: float, finer: int) -> np.ndarray:
        """Return the commands (H, nu, W) of all windows."""
        if (delay, finer) in self._inputs:
            return self._inputs[delay, finer]
        steps = int(np.floor(self.windows.time.max() * finer + 1e-9)) + 1
        edges = np.arange(steps + 1)[:, None] * (self.dt / finer) - delay + self.windows.begin
        out = np.empty((steps, self.arm.dynamics.nu, self.count))
        for k, held in enumerate(self._held):
            own = self.windows.source == k
            out[:, :, own] = held.means(edges[:, own])
        if len(self._inputs) > 8:  # the last few delays come again, in the next trial or Jacobian
            del self._inputs[next(iter(self._inputs))]
        self._inputs[delay, finer] = out
        return out

    def _array(self, name: str, *shape: int) -> np.ndarray:
        """Return memory that stays from call to call: fresh pages cost more than the rollout that fills them."""
        size = int(np.prod(shape))
        if name not in self._memory or self._memory[name].size < size:
            self._memory[name] = np.zeros(max(size, 1))
        return self._memory[name][:size].reshape(shape)


def _check(one: Recording, arm: Arm, source: str) -> None:
    if one.joints != arm.base.joints:
        raise CalibrationError(f"expected joints {list(arm.base.joints)}, found {list(one.joints)}", file=one.file, key="joints")
    if getattr(one, source) is None:
        raise CalibrationError("the log has no commands, which drive an arm under joint impedance", file=one.file, key="command")
    for name in ("t", "q", "v", source):
        values = getattr(one, name)
        if values is not None and not np.isfinite(values).all():
            row, *joint = np.argwhere(~np.isfinite(values))[0]
            where = f"{name}.{one.joints[joint[0]]}" if joint else name
            raise CalibrationError(f"not a finite number in sample {row}", file=one.file, key=where)


def _reach(arm: Arm) -> float:
    """Return how far back the input may be asked for [s]."""
    return max([abs(one.high if one.free else one.start) for one in arm.unknowns if one.name == "delay"], default=0.0)


def _cut(
    recordings: Sequence[Recording],
    prepared: Sequence[Signals],
    window: float,
    every: float,
    dt: float,
    skip: float,
    velocities: bool,
) -> Windows:
    """Return the windows in which the arm moves all the time."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("start", "begin", "source", "target", "time", "block", "noise")}
    samples = max(2, round(window * recordings[0].rate))
    number = 0
    for source, (one, smooth) in enumerate(zip(recordings, prepared)):
        stride = max(1, round(every * one.rate))
        # The filtered signals may be on other stamps than the log.
        still = np.interp(one.t, smooth.t, ~smooth.moving) > 0
        state = np.stack([np.interp(one.t, smooth.t, x) for x in np.concatenate([smooth.q, smooth.v], 1).T], 1)
        seen = np.concatenate([one.q, one.v], 1) if velocities else one.q
        parts["noise"].append((seen - state[:, : seen.shape[1]])[~still] ** 2)
        for first, past in one.parts or ((0, len(one.t)),):
            begin = first + int(np.searchsorted(one.t[first:past], one.t[first] + skip))
            for k in range(begin, past - samples, stride):
                if still[k : k + samples + 1].any():
                    continue
                chosen = slice(k + 1, k + samples + 1)
                parts["start"].append(state[k])
                parts["begin"].append(one.t[k])
                parts["source"].append(np.array(source))
                parts["target"].append(seen[chosen])
                parts["time"].append((one.t[chosen] - one.t[k]) / dt)
                parts["block"].append(np.array(number + int((one.t[k] - one.t[0]) / max(1.0, window))))
        number += int((one.t[-1] - one.t[0]) / max(1.0, window)) + 1
    if not parts["start"]:
        raise CalibrationError(f"no window of {window:g} s in which the arm moves", file=recordings[0].file, key="window")
    stacked = {name: np.stack(rows, -1) for name, rows in parts.items() if name != "noise"}
    floor = np.sqrt(np.concatenate(parts["noise"]).mean(0))
    return Windows(**stacked, floor=np.maximum(floor, 1e-6 * np.abs(stacked["target"]).max()))

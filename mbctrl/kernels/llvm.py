"""Lowers a program to LLVM IR: one vector lane a sample, the whole horizon in registers, costs out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mbctrl.kernels.network_llvm import NetworkWriter, scratch
from mbctrl.kernels.program import Program
from mbctrl.kernels.vector import Lanes, Writer

# A job is an array of 64-bit words: counts, addresses and bits, in this order.
SLOTS = (
    "next",  # block to do next; threads take turns
    "done",  # blocks done
    "blocks",
    "samples",
    "steps",
    "start",  # (nx,) of all samples, or (nx, N)
    "commands",  # (H, nu, N)
    "table",  # (H, columns)
    "uniform",
    "sample",  # (P, N)
    "cost",  # (N,), or 0
    "states",  # (H + 1, nx, N), or 0
    "basis",  # (H, K)
    "knots",  # (K, nu, N), in and out
    "mean",  # (K, nu)
    "spread",  # (K, nu)
    "lower",  # (nu,)
    "upper",  # (nu,)
    "fixed",  # knots of the first so many samples are given
    "seed",
    "draw",
    "weights",  # of all networks, one after another: for each layer W (out, in), then b (out,); read if there are any
)
_X86 = [
    "declare void @llvm.x86.sse2.pause()",
    "declare void @llvm.x86.sse.stmxcsr(ptr)",
    "declare void @llvm.x86.sse.ldmxcsr(ptr)",
]
_COUNTS = ("next", "done", "blocks", "samples", "steps", "fixed", "seed", "draw")  # the others are addresses


@dataclass(frozen=True)
class Sampling:
    """Commands as knots spread over the horizon by a basis.

    Args:
        knots: K.
        colour: (K, K) rows that colour white noise along the knots, None: white; unused without ``draws``.
        draws: the kernel draws the knots around ``mean`` itself; else they are all given.
    """

    knots: int
    colour: tuple[tuple[float, ...], ...] | None = None
    draws: bool = True


class Lowering:
    """Writes one program's function ``run(ptr job, i64 wait)``.

    Args:
        program: what to lower.
        lanes: precision and vector width.
        sampling: how commands come: as knots; None: as they are, and each sample then has its own start.
        x86: the target is x86: wait with its pause, and take numbers below the normal range as zero while running (they
            cost a hundred times as much, and a joint coming to rest passes through them).
    """

    def __init__(self, program: Program, lanes: Lanes, sampling: Sampling | None, x86: bool = False) -> None:
        if sampling is not None and sampling.draws and lanes.bits != 32:
            raise ValueError("noise is drawn in float32 only: give the knots")
        self.program, self.lanes, self.sampling, self.x86 = program, lanes, sampling, x86
        self.w = Writer(lanes)
        self.live = program.live
        self._values: dict[int, Any] = {}  # names; of a network's call those of its outputs

    def text(self) -> str:
        """Return the module's IR."""
        lanes, w = self.lanes, self.w
        align = lanes.bits // 8 * lanes.width
        w.label("entry")
        networks = self.program.networks
        self.slots = {name: self._slot(name) for name in SLOTS[2:] if networks or name != "weights"}
        rows = self.sampling.knots * self.program.commands if self.sampling else 1
        w.do(f"%local = alloca [{rows} x {lanes.vector}], align {align}")
        if networks:
            w.do(f"%layers = alloca [{scratch(networks)} x {lanes.vector}], align {align}")
            self._networks = NetworkWriter(w, networks, self.slots["weights"], "%layers")
        w.do("%next = getelementptr i64, ptr %job, i64 0")
        w.do("%finished = getelementptr i64, ptr %job, i64 1")
        self.last = w.put(f"sub i64 {self.slots['samples']}, {lanes.width}")
        self._flush_denormals()
        w.do("br label %take")
        w.label("take")
        block = w.put("atomicrmw add ptr %next, i64 1 monotonic")
        w.do(f"br i1 {w.put(f'icmp slt i64 {block}, ' + self.slots['blocks'])}, label %work, label %rest")
        w.label("work")
        self.base = self._smaller(w.put(f"mul i64 {block}, {lanes.width}"), self.last)  # the last block overlaps its neighbour
        if self.sampling:
            self._draw()
        self._rollout()
        w.do("atomicrmw add ptr %finished, i64 1 release")
        w.do("br label %take")
        self._wait()
        suffix = f"v{lanes.width}f{lanes.bits}"
        operands = {"sqrt": 1, "fabs": 1, "fma": 3}
        declared = [f"declare {lanes.vector} @llvm.{n}.{suffix}({', '.join([lanes.vector] * k)})" for n, k in operands.items()]
        bits = min(512, lanes.bits * lanes.width)
        attributes = f'nounwind "prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        body = "\n".join(w.lines)
        tail = "\n".join([*declared, *(_X86 if self.x86 else [])])
        return f"define void @run(ptr %job, i64 %wait) #0 {{\n{body}\n}}\n{tail}\nattributes #0 = {{ {attributes} }}\n"

    def _flush_denormals(self) -> None:
        if not self.x86:
            return
        w = self.w
        w.do("%control = alloca i32, align 4")
        w.do("call void @llvm.x86.sse.stmxcsr(ptr %control)")
        w.do("%mode = load i32, ptr %control")
        w.do(f"store i32 {w.put('or i32 %mode, 32832')}, ptr %control")  # flush to zero, denormals are zero
        w.do("call void @llvm.x86.sse.ldmxcsr(ptr %control)")

    def _slot(self, name: str) -> str:
        w = self.w
        kind = "i64" if name in _COUNTS else "ptr"
        return w.put(f"load {kind}, ptr {w.put(f'getelementptr i64, ptr %job, i64 {SLOTS.index(name)}')}, align 8")

    def _smaller(self, a: str, b: str) -> str:
        w = self.w
        return w.put(f"select i1 {w.put(f'icmp slt i64 {a}, {b}')}, i64 {a}, i64 {b}")

    def _lane_address(self, name: str, row: str | int) -> str:
        """Return the address of this block's lanes in row ``row`` of an array (rows, N)."""
        w = self.w
        start = w.put(f"mul i64 {row}, {self.slots['samples']}")
        return w.at(self.slots[name], w.put(f"add i64 {start}, {self.base}"))

    def _draw(self) -> None:
        """Bring the knots of this block's samples into local memory, drawing those that are not given."""
        sampling, w, lanes, nu = self.sampling, self.w, self.lanes, self.program.commands
        rows = sampling.knots * nu
        if not sampling.draws:
            for row in range(rows):
                self._keep_knot(row, w.load(self._lane_address("knots", row)))
            return
        w.do("br label %draw")
        w.label("draw")
        step = "<" + ", ".join(f"i{lanes.bits} {i}" for i in range(lanes.width)) + ">"
        index = w.integer("add", self._word(self.base), step)
        seed, high = self._word(self.slots["seed"]), self._word(w.put(f"lshr i64 {self.slots['seed']}, 32"))
        draw = self._word(self.slots["draw"])
        white: list[str] = []
        for group in range((rows + 3) // 4):
            white += w.normals([index, lanes.whole(group), draw, lanes.whole(0)], [seed, high])
        knots = [self._coloured(white, row, nu) for row in range(rows)]
        knots = [
            w.fma(w.load_all(w.at(self.slots["spread"], str(i))), k, w.load_all(w.at(self.slots["mean"], str(i))))
            for i, k in enumerate(knots)
        ]
        any_given = w.put(f"icmp slt i64 {self.base}, {self.slots['fixed']}")
        w.do(f"br i1 {any_given}, label %given, label %drawn")
        w.label("given")
        given = w.put(f"icmp slt {lanes.integer} {index}, {self._word(self.slots['fixed'])}")
        mixed = [w.select(given, w.load(self._lane_address("knots", i)), k) for i, k in enumerate(knots)]
        w.do("br label %drawn")
        w.label("drawn")
        merged = [w.put(f"phi {lanes.vector} [ {k}, %draw ], [ {m}, %given ]") for k, m in zip(knots, mixed)]
        for row, knot in enumerate(merged):
            knot = self._bounded(knot, row % nu)
            w.store(knot, self._lane_address("knots", row))
            self._keep_knot(row, knot)

    def _word(self, value: str) -> str:
        """Return an i64 value's low bits in all lanes."""
        lanes, w = self.lanes, self.w
        low = value if lanes.bits == 64 else w.put(f"trunc i64 {value} to i{lanes.bits}")
        one = w.put(f"insertelement {lanes.integer} poison, i{lanes.bits} {low}, i64 0")
        return w.put(f"shufflevector {lanes.integer} {one}, {lanes.integer} poison, <{lanes.width} x i32> zeroinitializer")

    def _coloured(self, white: list[str], row: int, nu: int) -> str:
        if self.sampling.colour is None:
            return white[row]
        w, knot, j = self.w, row // nu, row % nu
        total: str | None = None
        for k, weight in enumerate(self.sampling.colour[knot]):
            if weight:
                part = w.mul(white[k * nu + j], self.lanes.number(weight))
                total = part if total is None else w.add(total, part)
        return total or self.lanes.number(0)

    def _bounded(self, value: str, j: int) -> str:
        w = self.w
        low, high = (w.load_all(w.at(self.slots[name], str(j))) for name in ("lower", "upper"))
        return w.min(high, w.max(low, value))

    def _keep_knot(self, row: int, value: str) -> None:
        w = self.w
        w.do(f"store {self.lanes.vector} {value}, ptr {w.put(f'getelementptr {self.lanes.vector}, ptr %local, i64 {row}')}")

    def _rollout(self) -> None:
        """Roll one block of samples out."""
        program, graph, w, lanes = self.program, self.program.graph, self.w, self.lanes
        self._input = {"start": self._start, "uniform": self._uniform, "sample": self._sample}
        first = {k: self._value(program.first[k]) for k in self.live}
        for index in graph.needed(program.following[k] for k in self.live):
            if index not in program.varying:
                self._value(index)
        self._states("0", {k: first[k] for k in range(program.states)}, "before")
        w.do("br label %loop")
        w.label("loop")
        self._step = w.put("phi i64 [ 0, %before ], [ %following, %after ]")
        place = len(w.lines)
        carry = {k: f"%c{k}" for k in self.live}
        self._input |= {"carry": carry.__getitem__, "table": self._table, "command": self._command}
        for index in graph.needed(program.following[k] for k in self.live):
            self._value(index)
        following = {k: self._value(program.following[k]) for k in self.live}
        w.do(f"%following = add i64 {self._step}, 1")
        self._states("%following", {k: following[k] for k in range(program.states)}, "after")
        phis = [f"  {carry[k]} = phi {lanes.vector} [ {first[k]}, %before ], [ {following[k]}, %after ]" for k in self.live]
        w.lines[place:place] = phis
        w.do(f"br i1 {w.put('icmp slt i64 %following, ' + self.slots['steps'])}, label %loop, label %end")
        w.label("end")
        if program.cost is not None:
            wrong = lanes.number(0)  # x - x is 0 for numbers and NaN for the rest: a state that is none spoils the cost
            for k in range(program.states):
                wrong = w.add(wrong, w.sub(following[k], following[k]))
            w.store(w.add(following[program.cost], wrong), w.at(self.slots["cost"], self.base))

    def _states(self, step: str, values: dict[int, str], then: str) -> None:
        """Write the states if they are asked for, then go on in block ``then``."""
        w, nx = self.w, self.program.states
        wanted = w.put(f"icmp ne ptr {self.slots['states']}, null")
        w.do(f"br i1 {wanted}, label %{then}.write, label %{then}")
        w.label(f"{then}.write")
        row = w.put(f"mul i64 {step}, {nx}")
        for k, value in values.items():
            w.store(value, self._lane_address("states", w.put(f"add i64 {row}, {k}")))
        w.do(f"br label %{then}")
        w.label(then)

    def _wait(self) -> None:
        """End; with ``wait``, only when every block is done (a while: another thread may have been put to sleep)."""
        w = self.w
        w.label("rest")
        w.do("br label %spin")
        w.label("spin")
        spins = w.put("phi i64 [ %wait, %rest ], [ %left, %again ]")
        done = w.put("load atomic i64, ptr %finished acquire, align 8")
        short = w.put(f"icmp slt i64 {done}, {self.slots['blocks']}")
        more = w.put(f"icmp sgt i64 {spins}, 0")
        w.do(f"br i1 {w.put(f'and i1 {short}, {more}')}, label %again, label %exit")
        w.label("again")
        if self.x86:
            w.do("call void @llvm.x86.sse2.pause()")
        w.do(f"%left = sub i64 {spins}, 1")
        w.do("br label %spin")
        w.label("exit")
        if self.x86:
            w.do("store i32 %mode, ptr %control")
            w.do("call void @llvm.x86.sse.ldmxcsr(ptr %control)")
        w.do("ret void")

    def _value(self, index: int) -> Any:
        """Return the name of a node's value, written now if it is not yet; of a network's call, its outputs' names."""
        found = self._values.get(index)
        if found is None:
            name, *rest = self.program.graph.nodes[index]
            if name == "const":
                found = self.lanes.number(rest[0])
            elif name == "input":
                found = self._input[rest[0]](rest[1])
            elif name == "network":
                found = self._networks.call(f"net{index}", rest[0], self._value(rest[1]), [self._value(i) for i in rest[2:]])
            elif name == "output":
                found = self._value(rest[0])[rest[1]]
            else:
                found = getattr(self.w, name)(*(self._value(i) for i in rest))
            self._values[index] = found
        return found

    def _start(self, i: int) -> str:
        if self.sampling is None:
            return self.w.load(self._lane_address("start", i))
        return self.w.load_all(self.w.at(self.slots["start"], str(i)))

    def _uniform(self, i: int) -> str:
        return self.w.load_all(self.w.at(self.slots["uniform"], str(i)))

    def _sample(self, i: int) -> str:
        return self.w.load(self._lane_address("sample", i))

    def _table(self, column: int) -> str:
        w = self.w
        row = w.put(f"mul i64 {self._step}, {self.program.sizes['table']}")
        return w.load_all(w.at(self.slots["table"], w.put(f"add i64 {row}, {column}")))

    def _command(self, j: int) -> str:
        w, nu = self.w, self.program.commands
        if self.sampling is None:
            row = w.put(f"mul i64 {self._step}, {nu}")
            return w.load(self._lane_address("commands", w.put(f"add i64 {row}, {j}")))
        count = self.sampling.knots
        row = w.put(f"mul i64 {self._step}, {count}")
        total: str | None = None
        for k in range(count):
            knot = w.put(f"getelementptr {self.lanes.vector}, ptr %local, i64 {k * nu + j}")
            share = w.load_all(w.at(self.slots["basis"], w.put(f"add i64 {row}, {k}")))
            part = w.mul(w.put(f"load {self.lanes.vector}, ptr {knot}"), share)
            total = part if total is None else w.add(total, part)
        return self._bounded(total, j)


_PLACE = {name: i for i, name in enumerate(SLOTS)}


def words(**values: int) -> np.ndarray:
    """Return a job with its slots set; the rest are 0."""
    job = np.zeros(len(SLOTS), np.uint64)
    for name, value in values.items():
        job[_PLACE[name]] = value & 0xFFFFFFFFFFFFFFFF
    return job.view(np.int64)

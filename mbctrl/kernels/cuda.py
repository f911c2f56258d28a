"""Lowers a program to CUDA C: one thread a sample, the whole horizon in registers, costs out. Text only, no CUDA needed.

The same text compiles as plain C, where one call of ``rollout`` does one sample: so its arithmetic is tested without a GPU.
"""

from __future__ import annotations

import math

import numpy as np

from mbctrl.kernels import network_cuda
from mbctrl.kernels.llvm import Sampling
from mbctrl.kernels.program import Program
from mbctrl.kernels.vector import COSINE, FARTHEST, SINE, half_pi

# Arguments of ``rollout`` in order, 64 bits each: counts, then addresses; unused ones are 0. Shapes as in ``llvm.SLOTS``.
COUNTS = ("samples", "steps", "fixed")  # N; H; knots of the first so many samples are given
READ = ("start", "commands", "table", "uniform", "sample", "basis", "mean", "spread", "lower", "upper", "weights")
WRITTEN = ("knots", "cost", "states")
KEY = "key"  # (2,) int64: seed and draw; in memory, so that a captured launch draws anew when it is replayed
SLOTS = (*COUNTS, *READ, *WRITTEN, KEY)
BLOCK = 128
"""Threads of a block at most; bounds the registers of a thread."""

_FORMS = {
    "add": "{} + {}",
    "sub": "{} - {}",
    "mul": "{} * {}",
    "div": "{} / {}",
    "neg": "-{}",
    "sqrt": "SQRT({})",
    "exp": "EXP({})",
    "abs": "ABS({})",
    "less": "{} < {}",
    "select": "{} ? {} : {}",
    # The second where either is not a number: fmax and fmin would return the first.
    "max": "{0} > {1} ? {0} : {1}",
    "min": "{0} < {1} ? {0} : {1}",
}

_PRELUDE = """\
typedef @REAL@ real;
typedef long long word;
typedef unsigned int u32;
typedef unsigned long long u64;
#ifdef __CUDACC__
#define KERNEL extern "C" __global__ void __launch_bounds__(@BLOCK@)
#define INLINE static __device__ __forceinline__
#define RESTRICT __restrict__
#define THREAD_PARAMETER
#define THREAD (blockIdx.x * (word)blockDim.x + threadIdx.x)
#define INFINITE ((real)__longlong_as_double(0x7ff0000000000000LL))
#define NOT_A_NUMBER ((real)__longlong_as_double(0x7ff8000000000000LL))
#else
#include <math.h>
#ifdef __cplusplus
#define KERNEL extern "C" void
#else
#define KERNEL void
#endif
#define INLINE static inline
#define RESTRICT __restrict
#define THREAD_PARAMETER , word thread
#define THREAD thread
#define INFINITE ((real)INFINITY)
#define NOT_A_NUMBER ((real)NAN)
#endif
#define SQRT sqrt@F@
#define EXP exp@F@
#define LOG log@F@
#define ABS fabs@F@
#define FMA fma@F@

INLINE real bounded(real x, real low, real high) {
  const real raised = low > x ? low : x;
  return high < raised ? high : raised;
}
"""

_SINE_COSINE_32 = """
/* Sine and cosine: reduction by multiples of pi/2 in parts (Cody and Waite, 1980), polynomials; as the processor's kernel.
   The library's own brings a path for huge angles at every call: a third more code, and memory for each thread. */
INLINE void sine_cosine(real x, real* sine, real* cosine) {
  const real turns = rintf(x * @TWO_OVER_PI@);
  const real rest = ABS(x) < @FARTHEST@ ? @REST@ : NOT_A_NUMBER; /* further away it has no figures left */
  const real square = rest * rest;
  const real s = FMA(rest * square, @SIN@, rest);
  const real c = FMA(square * square, @COS@, FMA(square, -0.5f, 1.0f));
  const int quadrant = (int)turns;
  const real first = quadrant & 1 ? c : s, second = quadrant & 1 ? s : c;
  *sine = quadrant & 2 ? -first : first;
  *cosine = (quadrant + 1) & 2 ? -second : second;
}
"""

_SINE_COSINE_64 = """
INLINE void sine_cosine(real x, real* sine, real* cosine) {
  *sine = sin(x);
  *cosine = cos(x);
}
"""

_NORMALS = """
/* Two standard normals of 64 random bits (Box and Muller, 1958). */
INLINE void two_normals(u32 radius_bits, u32 angle_bits, real* out) {
  const real radius = SQRT(@MINUS_TWO@ * LOG((real)radius_bits * @SHARE@ + @HALF@));
  real sine, cosine;
  sine_cosine((real)(int)angle_bits * @TURN@, &sine, &cosine);
  out[0] = radius * cosine;
  out[1] = radius * sine;
}

/* Four standard normals of a counter: Philox 4x32, ten rounds (Salmon et al., "Parallel random numbers", 2011). */
INLINE void four_normals(u32 sample, u32 group, u32 draw, u64 seed, real* out) {
  u32 c0 = sample, c1 = group, c2 = draw, c3 = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
  for (int i = 0; i < 10; ++i) {
    const u64 first = (u64)c0 * 0xD2511F53u, second = (u64)c2 * 0xCD9E8D57u;
    c0 = (u32)(second >> 32) ^ c1 ^ k0;
    c1 = (u32)second;
    c2 = (u32)(first >> 32) ^ c3 ^ k1;
    c3 = (u32)first;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  two_normals(c0, c1, out);
  two_normals(c2, c3, out + 2);
}
"""


def source(program: Program, dtype: type | np.dtype = np.float32, sampling: Sampling | None = None) -> str:
    """Return the CUDA C of one program's kernel ``rollout``, its arguments those of SLOTS.

    Args:
        program: what to lower.
        dtype: float32, or float64 for tests.
        sampling: how commands come: as knots; None: as they are, and each sample then has its own start.
    """
    return CudaLowering(program, np.dtype(dtype), sampling).text()


def required(program: Program, sampling: Sampling | None) -> tuple[str, ...]:
    """Return the names of the arguments that must not be 0."""
    names = ["samples", "steps", "start"]
    names += [kind for kind in ("table", "uniform", "sample") if program.sizes.get(kind)]
    names += ["commands"] if sampling is None else ["basis", "knots", "lower", "upper"]
    names += ["mean", "spread", KEY] if sampling is not None and sampling.draws else []
    names += ["weights"] if program.networks else []
    return (*names, *(["cost"] if program.cost is not None else []))


class CudaLowering:
    """Writes one program as CUDA C; see ``source``."""

    def __init__(self, program: Program, dtype: np.dtype, sampling: Sampling | None) -> None:
        self.program, self.dtype, self.sampling = program, dtype, sampling
        self.live = program.live
        self.lines: list[str] = []
        self._names: dict[int, str] = {}
        self._angles: set[int] = set()
        self._indent = "  "

    def text(self) -> str:
        """Return the source."""
        head = self._head()
        arguments = [f"word {name}" for name in COUNTS]
        arguments += [f"const real* RESTRICT {name}" for name in READ]
        arguments += [f"real* RESTRICT {name}" for name in WRITTEN]
        self._do("const word n = THREAD;")
        self._do("if (n >= samples) return;")
        self._commands()
        self._rollout()
        body = "\n".join(self.lines)
        return f"{head}\nKERNEL rollout({', '.join(arguments)}, const word* RESTRICT {KEY} THREAD_PARAMETER) {{\n{body}\n}}\n"

    def _head(self) -> str:
        """Return what comes before the kernel."""
        single = self.dtype == np.float32
        head = _PRELUDE + (_SINE_COSINE_32 if single else _SINE_COSINE_64)
        if self.sampling and self.sampling.draws:
            head += _NORMALS
        head += network_cuda.functions(self.program.networks)
        rest = "x"
        for part in half_pi(self.dtype.itemsize * 8):
            rest = f"FMA(turns, {self.number(-part)}, {rest})"
        pieces = {
            "REAL": "float" if single else "double",
            "F": "f" if single else "",
            "BLOCK": str(BLOCK),
            "TWO_OVER_PI": self.number(2 / math.pi),
            "REST": rest,
            "FARTHEST": self.number(FARTHEST[32]),
            "SIN": self._polynomial(SINE),
            "COS": self._polynomial(COSINE),
            "MINUS_TWO": self.number(-2),
            "SHARE": self.number(2.0**-32),
            "HALF": self.number(2.0**-33),
            "TURN": self.number(math.pi * 2.0**-31),
        }
        for name, piece in pieces.items():
            head = head.replace(f"@{name}@", piece)
        return head

    def _polynomial(self, coefficients: tuple[float, ...]) -> str:
        """Return sum c_k square^k by Horner's rule."""
        total = self.number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = f"FMA({total}, square, {self.number(c)})"
        return total

    def number(self, value: float) -> str:
        """Return a literal of the kernel's precision: the shortest that reads back as the same number."""
        with np.errstate(over="ignore"):
            rounded = self.dtype.type(value)
        if np.isnan(rounded):
            return "NOT_A_NUMBER"
        if np.isinf(rounded):
            return "INFINITE" if rounded > 0 else "(-INFINITE)"
        text = f"{rounded!s}{'f' if self.dtype == np.float32 else ''}"
        return f"({text})" if np.signbit(rounded) else text

    def _do(self, line: str) -> None:
        self.lines.append(self._indent + line)

    def _put(self, name: str, expression: str, kind: str = "real") -> str:
        self._do(f"const {kind} {name} = {expression};")
        return name

    def _commands(self) -> None:
        """Bring this sample's knots into ``knot``, drawing those that are not given."""
        sampling, nu = self.sampling, self.program.commands
        if sampling is None:
            return
        rows = sampling.knots * nu
        self._do(f"real knot[{rows}];")
        if not sampling.draws:
            for row in range(rows):
                self._do(f"knot[{row}] = knots[{row} * samples + n];")
            return
        groups = -(-rows // 4)
        self._do(f"real white[{4 * groups}];")
        for group in range(groups):
            self._do(f"four_normals((u32)n, {group}, (u32){KEY}[1], (u64){KEY}[0], white + {4 * group});")
        for row in range(rows):
            self._do(f"knot[{row}] = mean[{row}] + spread[{row}] * ({self._coloured(row, nu)});")
        self._do("if (n < fixed) {")
        for row in range(rows):
            self._do(f"  knot[{row}] = knots[{row} * samples + n];")
        self._do("}")
        for row in range(rows):
            self._do(f"knot[{row}] = bounded(knot[{row}], lower[{row % nu}], upper[{row % nu}]);")
            self._do(f"knots[{row} * samples + n] = knot[{row}];")

    def _coloured(self, row: int, nu: int) -> str:
        if self.sampling.colour is None:
            return f"white[{row}]"
        weights = enumerate(self.sampling.colour[row // nu])
        return " + ".join(f"{self.number(w)} * white[{k * nu + row % nu}]" for k, w in weights if w) or self.number(0)

    def _rollout(self) -> None:
        """Roll this thread's sample out."""
        program = self.program
        graph, varying = program.graph, program.varying
        needed = graph.needed(program.following[k] for k in self.live)
        first = {k: self._value(program.first[k]) for k in self.live}
        for index in needed:
            if index not in varying:
                self._value(index)
        for k, value in first.items():
            self._do(f"real c{k} = {value};")
        self._states("0")
        self._do("for (word step = 0; step < steps; ++step) {")
        self._indent = "    "
        for index in needed:
            self._value(index)
        following = {k: self._value(program.following[k]) for k in self.live}
        for k, value in following.items():
            self._do(f"c{k} = {value};")
        self._states("(step + 1)")
        self._indent = "  "
        self._do("}")
        if program.cost is not None:
            # x - x is 0 for numbers and NaN for the rest: a state that is none spoils the cost.
            wrong = " + ".join(f"(c{k} - c{k})" for k in range(program.states))
            self._do(f"cost[n] = c{program.cost} + ({wrong});")

    def _states(self, step: str) -> None:
        nx = self.program.states
        self._do("if (states) {")
        for k in range(nx):
            self._do(f"  states[({step} * {nx} + {k}) * samples + n] = c{k};")
        self._do("}")

    def _value(self, index: int) -> str:
        """Return the name of a node's value, written now if it is not yet."""
        found = self._names.get(index)
        if found is None:
            name, *rest = self.program.graph.nodes[index]
            if name == "const":
                found = self.number(rest[0])
            elif name == "input":
                found = self._put(f"v{index}", self._input(*rest))
            elif name == "network":
                found = f"net{index}"
                gate, *inputs = map(self._value, rest[1:])
                for line in network_cuda.call(found, self.program.networks, rest[0], gate, inputs):
                    self._do(line)
            elif name == "output":
                found = self._put(f"v{index}", f"{self._value(rest[0])}[{rest[1]}]")
            elif name in ("sin", "cos"):
                found = self._sine_cosine(rest[0])[name]
            else:
                kind = "int" if name == "less" else "real"
                found = self._put(f"v{index}", _FORMS[name].format(*map(self._value, rest)), kind)
            self._names[index] = found
        return found

    def _sine_cosine(self, angle: int) -> dict[str, str]:
        """Return the names of a node's sine and cosine; the compiler drops the one that is not used."""
        names = {"sin": f"s{angle}", "cos": f"t{angle}"}
        if angle not in self._angles:
            self._angles.add(angle)
            self._do(f"real {names['sin']}, {names['cos']};")
            self._do(f"sine_cosine({self._value(angle)}, &{names['sin']}, &{names['cos']});")
        return names

    def _input(self, kind: str, i: int) -> str:
        """Return the expression that reads an input."""
        if kind == "command":
            return self._command(i)
        return {
            "carry": f"c{i}",
            "uniform": f"uniform[{i}]",
            "sample": f"sample[{i} * samples + n]",
            "table": f"table[step * {self.program.sizes.get('table', 0)} + {i}]",
            "start": f"start[{i}]" if self.sampling else f"start[{i} * samples + n]",
        }[kind]

    def _command(self, j: int) -> str:
        nu = self.program.commands
        if self.sampling is None:
            return f"commands[(step * {nu} + {j}) * samples + n]"
        count = self.sampling.knots
        total = " + ".join(f"basis[step * {count} + {k}] * knot[{k * nu + j}]" for k in range(count))
        return f"bounded({total}, lower[{j}], upper[{j}])"

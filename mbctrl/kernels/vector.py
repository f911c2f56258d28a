"""LLVM IR for functions of whole vectors: arithmetic, sine, cosine, exponential, activations, logarithm, counter-based noise.

Every function works lane by lane. Largest errors, measured by the tests: float32 sine and cosine 1e-7 absolute for
angles up to 1e4 rad; exp 3e-7 relative; float64 sine and cosine 1e-15 absolute there, exp 1e-15 relative.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import numpy as np

# Weighted least squares fits on the reduced range, weights driven to equal extremes; errors 4e-9 and 1.2e-10.
SINE = (-0.1666665452, 0.008332154761, -0.0001951445332)
COSINE = (0.04166664552, -0.001388730811, 2.443220901e-05)
_EXP = (0.4999999341, 0.1666652011, 0.04166839421, 0.008368780545, 0.001381446737)  # error 3e-9

FARTHEST = {32: 1e5, 64: 1e9}
"""Angles [rad] beyond which sine and cosine are not a number, by the bits of a float."""


@dataclass(frozen=True)
class Lanes:
    """A vector of ``width`` floats of ``bits`` (32 or 64)."""

    bits: int
    width: int

    @property
    def scalar(self) -> str:
        """IR type of one lane."""
        return "float" if self.bits == 32 else "double"

    @property
    def vector(self) -> str:
        """IR type of the vector."""
        return f"<{self.width} x {self.scalar}>"

    @property
    def integer(self) -> str:
        """IR type of integers as wide as the lanes."""
        return f"<{self.width} x i{self.bits}>"

    @property
    def mask(self) -> str:
        """IR type of a comparison."""
        return f"<{self.width} x i1>"

    @property
    def dtype(self) -> type:
        """numpy type of one lane."""
        return np.float32 if self.bits == 32 else np.float64

    def number(self, value: float) -> str:
        """Return a number as an IR constant of all lanes, rounded to the lanes' precision."""
        with np.errstate(over="ignore"):
            rounded = float(np.float32(value)) if self.bits == 32 else float(value)
        return f"splat ({self.scalar} 0x{struct.unpack('>Q', struct.pack('>d', rounded))[0]:016X})"

    def whole(self, value: int) -> str:
        """Return an integer as an IR constant of all lanes."""
        return f"splat (i{self.bits} {value})"


class Writer:
    """Writes IR instructions of one function, names counted up."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.lines = lanes, []
        self._count = 0
        self._reduced: dict[str, tuple[str, str]] = {}

    def put(self, instruction: str) -> str:
        """Append an instruction that has a result; return the result's name."""
        self._count += 1
        name = f"%v{self._count}"
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """Append an instruction without a result."""
        self.lines.append(f"  {instruction}")

    def label(self, name: str) -> None:
        """Begin a block."""
        self.lines.append(f"{name}:")
        self._reduced.clear()

    # Floating point; ``contract`` lets products and sums fuse.
    def add(self, a: str, b: str) -> str:
        return self.put(f"fadd contract {self.lanes.vector} {a}, {b}")

    def sub(self, a: str, b: str) -> str:
        return self.put(f"fsub contract {self.lanes.vector} {a}, {b}")

    def mul(self, a: str, b: str) -> str:
        return self.put(f"fmul contract {self.lanes.vector} {a}, {b}")

    def div(self, a: str, b: str) -> str:
        # A refined estimate of the reciprocal costs more: its multiply-adds compete with all others, the divider is idle.
        return self.put(f"fdiv contract {self.lanes.vector} {a}, {b}")

    def neg(self, a: str) -> str:
        return self.put(f"fneg {self.lanes.vector} {a}")

    def less(self, a: str, b: str) -> str:
        return self.put(f"fcmp olt {self.lanes.vector} {a}, {b}")

    def select(self, mask: str, a: str, b: str) -> str:
        vector = self.lanes.vector
        return self.put(f"select {self.lanes.mask} {mask}, {vector} {a}, {vector} {b}")

    def max(self, a: str, b: str) -> str:
        """The larger; ``b`` where either is not a number."""
        return self.select(self.put(f"fcmp ogt {self.lanes.vector} {a}, {b}"), a, b)

    def min(self, a: str, b: str) -> str:
        """The smaller; ``b`` where either is not a number."""
        return self.select(self.less(a, b), a, b)

    def intrinsic(self, name: str, *operands: str) -> str:
        """Call an intrinsic over whole vectors."""
        vector = self.lanes.vector
        suffix = f"v{self.lanes.width}f{self.lanes.bits}"
        return self.put(f"call {vector} @llvm.{name}.{suffix}({', '.join(f'{vector} {o}' for o in operands)})")

    def sqrt(self, a: str) -> str:
        return self.intrinsic("sqrt", a)

    def abs(self, a: str) -> str:
        return self.intrinsic("fabs", a)

    def fma(self, a: str, b: str, c: str) -> str:
        return self.intrinsic("fma", a, b, c)

    def broadcast(self, scalar: str) -> str:
        """Return a scalar in all lanes."""
        lanes = self.lanes
        one = self.put(f"insertelement {lanes.vector} poison, {lanes.scalar} {scalar}, i64 0")
        return self.put(f"shufflevector {lanes.vector} {one}, {lanes.vector} poison, <{lanes.width} x i32> zeroinitializer")

    def load_all(self, pointer: str) -> str:
        """Return the number at ``pointer`` in all lanes."""
        return self.broadcast(self.put(f"load {self.lanes.scalar}, ptr {pointer}, align {self.lanes.bits // 8}"))

    def load(self, pointer: str) -> str:
        """Return the vector at ``pointer``, which is aligned to its elements only."""
        return self.put(f"load {self.lanes.vector}, ptr {pointer}, align {self.lanes.bits // 8}")

    def store(self, value: str, pointer: str) -> None:
        """Store a vector at ``pointer``, which is aligned to its elements only."""
        self.do(f"store {self.lanes.vector} {value}, ptr {pointer}, align {self.lanes.bits // 8}")

    def at(self, pointer: str, index: str) -> str:
        """Return the address of element ``index`` (an i64 value) behind ``pointer``."""
        return self.put(f"getelementptr {self.lanes.scalar}, ptr {pointer}, i64 {index}")

    def integer(self, operation: str, a: str, b: str) -> str:
        """Apply an integer operation to vectors as wide as the lanes."""
        return self.put(f"{operation} {self.lanes.integer} {a}, {b}")

    def cast(self, operation: str, value: str, source: str, target: str) -> str:
        return self.put(f"{operation} {source} {value} to {target}")

    def sin(self, x: str) -> str:
        return self._sincos(x)[0]

    def cos(self, x: str) -> str:
        return self._sincos(x)[1]

    def _sincos(self, x: str) -> tuple[str, str]:
        """Return sine and cosine: reduction by multiples of pi/2 in two or three parts (Cody and Waite, 1980), polynomials."""
        if x in self._reduced:
            return self._reduced[x]
        lanes = self.lanes
        magic = lanes.number(1.5 * 2.0 ** (23 if lanes.bits == 32 else 52))  # adding it rounds to a whole number in the low bits
        shifted = self.fma(x, lanes.number(2 / math.pi), magic)
        turns = self.sub(shifted, magic)
        quadrant = self.cast("bitcast", shifted, lanes.vector, lanes.integer)
        # Further away the reduction has no figures left: not a number, lest a rollout that ran away look cheap.
        known = self.less(self.abs(x), lanes.number(FARTHEST[lanes.bits]))
        rest = self.select(known, x, lanes.number(math.nan))
        for part in half_pi(lanes.bits):
            rest = self.fma(turns, lanes.number(-part), rest)
        square = self.mul(rest, rest)
        sine, cosine = self._polynomials(rest, square)
        odd = self.put(f"icmp ne {lanes.integer} {self.integer('and', quadrant, lanes.whole(1))}, zeroinitializer")
        self._reduced[x] = (
            self._signed(self.select(odd, cosine, sine), quadrant),
            self._signed(self.select(odd, sine, cosine), self.integer("add", quadrant, lanes.whole(1))),
        )
        return self._reduced[x]

    def _polynomials(self, rest: str, square: str) -> tuple[str, str]:
        lanes = self.lanes
        if lanes.bits == 32:
            sin, cos = SINE, COSINE
        else:  # Taylor's, to the last bit on |rest| <= pi/4
            sin = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(1, 9))
            cos = tuple((-1) ** k / math.factorial(2 * k) for k in range(2, 10))
        over = self.polynomial(square, sin)
        sine = self.fma(self.mul(rest, square), over, rest)
        cosine = self.fma(
            self.mul(square, square), self.polynomial(square, cos), self.fma(square, lanes.number(-0.5), lanes.number(1))
        )
        return sine, cosine

    def polynomial(self, x: str, coefficients: tuple[float, ...]) -> str:
        """Return sum c_k x^k by Horner's rule."""
        total = self.lanes.number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = self.fma(total, x, self.lanes.number(c))
        return total

    def _signed(self, value: str, quadrant: str) -> str:
        """Flip the sign where bit 1 of ``quadrant`` is set."""
        lanes = self.lanes
        top = self.integer("shl", self.integer("and", quadrant, lanes.whole(2)), lanes.whole(lanes.bits - 2))
        flipped = self.integer("xor", self.cast("bitcast", value, lanes.vector, lanes.integer), top)
        return self.cast("bitcast", flipped, lanes.integer, lanes.vector)

    def exp(self, x: str) -> str:
        """Return e^x: 2^n times a polynomial; 0 and inf beyond the range."""
        lanes = self.lanes
        mantissa, low, high = (23, -87.0, 88.3) if lanes.bits == 32 else (52, -708.0, 709.4)
        bounded = self.min(lanes.number(high), self.max(lanes.number(low), x))
        magic = lanes.number(1.5 * 2.0**mantissa)
        shifted = self.fma(bounded, lanes.number(1 / math.log(2)), magic)
        n = self.sub(shifted, magic)
        first = float(np.float32(math.log(2))) if lanes.bits == 32 else math.log(2)
        second = math.log(2) - first if lanes.bits == 32 else 2.3190468138462996e-17
        rest = self.fma(n, lanes.number(-second), self.fma(n, lanes.number(-first), bounded))
        series = _EXP if lanes.bits == 32 else tuple(1 / math.factorial(k) for k in range(2, 14))
        value = self.fma(self.mul(rest, rest), self.polynomial(rest, series), self.add(rest, lanes.number(1)))
        power = self.integer("shl", self.cast("bitcast", shifted, lanes.vector, lanes.integer), lanes.whole(mantissa))
        scaled = self.integer("add", self.cast("bitcast", value, lanes.vector, lanes.integer), power)
        result = self.cast("bitcast", scaled, lanes.integer, lanes.vector)
        result = self.select(self.less(x, lanes.number(low)), lanes.number(0), result)
        result = self.select(self.less(lanes.number(high), x), lanes.number(math.inf), result)
        return self.select(self.put(f"fcmp uno {lanes.vector} {x}, {x}"), x, result)

    def tanh(self, x: str) -> str:
        """Return the hyperbolic tangent, (1 - e) / (1 + e) of e = exp(-2 |x|), which does not overflow."""
        one = self.lanes.number(1)
        e = self.exp(self.mul(self.abs(x), self.lanes.number(-2)))
        size = self.div(self.sub(one, e), self.add(one, e))
        return self.select(self.less(x, self.lanes.number(0)), self.neg(size), size)

    def silu(self, x: str) -> str:
        """Return x / (1 + exp(-x)); 0 where the exponential overflows."""
        return self.div(x, self.add(self.lanes.number(1), self.exp(self.neg(x))))

    def relu(self, x: str) -> str:
        """Return the larger of x and 0."""
        return self.max(self.lanes.number(0), x)

    def log(self, x: str) -> str:
        """Return the natural logarithm of positive, normal numbers (float32): exponent plus 2 artanh of the mantissa's rest."""
        lanes = self.lanes
        bits = self.cast("bitcast", x, lanes.vector, lanes.integer)
        # Counting the exponent from 2/3 keeps the mantissa in [2/3, 4/3): no branch, and log near 1 stays exact.
        counted = self.integer("sub", bits, lanes.whole(0x3F2AAAAB))
        exponent = self.cast("sitofp", self.integer("ashr", counted, lanes.whole(23)), lanes.integer, lanes.vector)
        kept = self.integer("add", self.integer("and", counted, lanes.whole(0x007FFFFF)), lanes.whole(0x3F2AAAAB))
        rest = self.sub(self.cast("bitcast", kept, lanes.integer, lanes.vector), lanes.number(1))
        ratio = self.div(rest, self.add(rest, lanes.number(2)))
        square = self.mul(ratio, ratio)
        series = self.polynomial(square, tuple(2 / (2 * k + 1) for k in range(5)))
        return self.fma(exponent, lanes.number(math.log(2)), self.mul(ratio, series))

    def normals(self, counter: list[str], key: list[str]) -> list[str]:
        """Return four standard normals from a counter of four and a key of two integer vectors (32 bits).

        Philox 4x32 with ten rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), then Box and
        Muller's transform (1958); ``mbctrl.planning.noise`` draws the same numbers.
        """
        lanes, c, k = self.lanes, list(counter), list(key)
        wide = f"<{lanes.width} x i64>"
        for _ in range(10):
            halves = []
            for factor, value in ((0xD2511F53, c[0]), (0xCD9E8D57, c[2])):
                product = self.put(f"mul {wide} {self.cast('zext', value, lanes.integer, wide)}, splat (i64 {factor})")
                high = self.put(f"lshr {wide} {product}, splat (i64 32)")
                halves.append((self.cast("trunc", high, wide, lanes.integer), self.cast("trunc", product, wide, lanes.integer)))
            (high0, low0), (high1, low1) = halves
            c = [self._xor3(high1, c[1], k[0]), low1, self._xor3(high0, c[3], k[1]), low0]
            k = [self.integer("add", k[0], lanes.whole(0x9E3779B9)), self.integer("add", k[1], lanes.whole(0xBB67AE85))]
        out = []
        for radius_bits, angle_bits in ((c[0], c[1]), (c[2], c[3])):
            share = self.cast("uitofp", radius_bits, lanes.integer, lanes.vector)
            share = self.fma(share, lanes.number(2.0**-32), lanes.number(2.0**-33))
            radius = self.sqrt(self.mul(self.log(share), lanes.number(-2)))
            angle = self.mul(self.cast("sitofp", angle_bits, lanes.integer, lanes.vector), lanes.number(math.pi * 2.0**-31))
            out += [self.mul(radius, self.cos(angle)), self.mul(radius, self.sin(angle))]
        return out

    def _xor3(self, a: str, b: str, c: str) -> str:
        return self.integer("xor", self.integer("xor", a, b), c)


def half_pi(bits: int) -> tuple[float, ...]:
    """Return pi/2 as a sum of numbers of the lanes' precision."""
    if bits == 64:
        return (1.5707963267948966, 6.123233995736766e-17, -1.4973849048591833e-33)
    first = float(np.float32(math.pi / 2))
    second = float(np.float32(math.pi / 2 - first))
    return first, second, float(np.float32(math.pi / 2 - first - second))

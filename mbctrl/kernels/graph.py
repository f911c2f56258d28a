"""Scalar expressions as a graph: hash-consed, with constants folded and zeros, ones and signs removed as it is built.

``Scalar`` is a number to numpy's object arrays, so that ``R @ p`` and ``np.cross`` trace as they are. An operation whose
result is known returns a plain float. Products with zero are taken as zero and ``x - x`` too, which is true of every
finite number; a lane that is not finite is found by the program's own check, not by these terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from mbctrl.kernels.network import Network

BINARY = ("add", "sub", "mul", "div", "min", "max", "less")
UNARY = ("neg", "sqrt", "sin", "cos", "exp", "abs")
OPERATIONS = (*BINARY, *UNARY, "select")
_FREE = ("const", "input", "neg", "output")


def operands(key: tuple[Any, ...]) -> tuple[int, ...]:
    """Return the nodes that the node ``key`` is computed from."""
    start, stop = {"const": (0, 0), "input": (0, 0), "network": (2, None), "output": (1, 2)}.get(key[0], (1, None))
    return key[start:stop]


class Graph:
    """Nodes in the order they were made: ``("const", value)``, ``("input", kind, index)`` or ``(operation, *operands)``.

    Operands are indices of earlier nodes. Equal nodes are one node. For calls of networks see ``mbctrl.kernels.network``.
    """

    def __init__(self) -> None:
        self.nodes: list[tuple[Any, ...]] = []
        self._index: dict[tuple[Any, ...], int] = {}

    def node(self, *key: Any) -> int:
        """Return the index of the node ``key``, made if it is new."""
        index = self._index.get(key)
        if index is None:
            index = self._index[key] = len(self.nodes)
            self.nodes.append(key)
        return index

    def input(self, kind: str, index: int) -> Scalar:
        """Return the input ``index`` of a kind."""
        return Scalar(self, self.node("input", kind, index))

    def network(self, k: int, network: Network, inputs: Iterable[Any], gate: Any = 1.0) -> np.ndarray:
        """Return the outputs (outputs,) of the program's network ``k``: 0 where ``gate`` is 0 or less, else gate times them.

        Machine code skips a network's layers where no sample of a block has a gate above 0.

        Args:
            k, network: which of the program's networks it will be, and its shape.
            inputs: (inputs,) Scalars or numbers.
            gate: Scalar or number.

        Errors:
            ValueError: for another count of inputs than the network's.
        """
        inputs = list(inputs)
        if len(inputs) != network.inputs:
            raise ValueError(f"expected {network.inputs} inputs, found {len(inputs)}")
        out = np.full(network.outputs, 0.0, dtype=object)
        if isinstance(gate, Scalar) or not gate <= 0:
            call = self.node("network", k, self.operand(gate), *map(self.operand, inputs))
            out[:] = [Scalar(self, self.node("output", call, i)) for i in range(network.outputs)]
        return out

    def operand(self, value: Any) -> int:
        """Return the node of a Scalar or a number."""
        return value.index if isinstance(value, Scalar) else self.node("const", float(value))

    def needed(self, outputs: Iterable[int]) -> list[int]:
        """Return the nodes ``outputs`` depend on, themselves included, operands first."""
        seen, stack = set(), list(outputs)
        while stack:
            index = stack.pop()
            if index in seen:
                continue
            seen.add(index)
            stack.extend(operands(self.nodes[index]))
        return sorted(seen)

    def count(self, outputs: Iterable[int]) -> dict[str, int]:
        """Return how many operations of each name ``outputs`` take; sign changes are free."""
        counts: dict[str, int] = {}
        for index in self.needed(outputs):
            name = self.nodes[index][0]
            if name not in _FREE:
                counts[name] = counts.get(name, 0) + 1
        return counts


class Scalar:
    """One value in a graph, with the operators of a number."""

    __slots__ = ("graph", "index")

    def __init__(self, graph: Graph, index: int) -> None:
        self.graph, self.index = graph, index

    def _make(self, *key: Any) -> Scalar:
        return Scalar(self.graph, self.graph.node(*key))

    def _key(self) -> tuple[Any, ...]:
        return self.graph.nodes[self.index]

    def _of(self, index: int) -> Any:
        """Return an operand as a value: a float where it is a constant."""
        key = self.graph.nodes[index]
        return key[1] if key[0] == "const" else Scalar(self.graph, index)

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, Scalar):
            if isinstance(other, np.ndarray):
                return NotImplemented  # numpy takes it element by element
            if other == 0:
                return self
            return self._make("add", self.index, self.graph.operand(other))
        a, b = self._key(), other._key()
        if b[0] == "neg":
            return self - self._of(b[1])
        if a[0] == "neg":
            return other - self._of(a[1])
        return self._make("add", *sorted((self.index, other.index)))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        if not isinstance(other, Scalar):
            return NotImplemented if isinstance(other, np.ndarray) else self + -float(other)
        if other.index == self.index:
            return 0.0
        a, b = self._key(), other._key()
        if b[0] == "neg":
            return self + self._of(b[1])
        if a[0] == "neg":
            return -(self._of(a[1]) + other)
        return self._make("sub", self.index, other.index)

    def __rsub__(self, other: Any) -> Any:
        if other == 0:
            return -self
        a = self._key()
        if a[0] == "neg":
            return self._of(a[1]) + other
        return self._make("sub", self.graph.operand(other), self.index)

    def __neg__(self) -> Any:
        key = self._key()
        if key[0] == "neg":
            return self._of(key[1])
        if key[0] == "sub":
            return self._make("sub", key[2], key[1])
        return self._make("neg", self.index)

    def __mul__(self, other: Any) -> Any:
        key = self._key()
        if isinstance(other, Scalar):
            if key[0] == "neg":
                return -(self._of(key[1]) * other)
            if other._key()[0] == "neg":
                return -(self * self._of(other._key()[1]))
            return self._make("mul", *sorted((self.index, other.index)))
        if isinstance(other, np.ndarray):
            return NotImplemented
        other = float(other)
        if other == 0:
            return 0.0
        if other == 1:
            return self
        if other < 0:
            return -(self * -other)
        if key[0] == "neg":
            return -(self._of(key[1]) * other)
        if key[0] == "mul":
            first = self.graph.nodes[key[1]]
            if first[0] == "const":
                return Scalar(self.graph, key[2]) * (first[1] * other)
        return self._make("mul", self.graph.operand(other), self.index)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Any:
        if not isinstance(other, Scalar):
            return NotImplemented if isinstance(other, np.ndarray) else self * (1.0 / float(other))
        return self._quotient(self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return 0.0 if other == 0 else self._quotient(float(other), self)

    def _quotient(self, a: Any, b: Scalar) -> Any:
        if isinstance(a, Scalar) and a._key()[0] == "neg":
            return -self._quotient(self._of(a._key()[1]), b)
        if b._key()[0] == "neg":
            return -self._quotient(a, Scalar(self.graph, b._key()[1]))
        return self._make("div", self.graph.operand(a), b.index)

    def __pow__(self, power: Any) -> Any:
        if isinstance(power, float) and power.is_integer():
            power = int(power)
        if not isinstance(power, int) or not 1 <= power <= 16:
            raise TypeError(f"a traced value can be raised to a whole power from 1 to 16, found {power!r}")
        result = self
        for _ in range(power - 1):
            result = result * self
        return result

    def __eq__(self, other: object) -> bool:
        raise TypeError("traced values cannot be compared for equality: write where(abs(a - b) < tolerance, …)")

    __ne__ = __eq__
    __hash__ = None

    def __lt__(self, other: Any) -> Scalar:
        return self._make("less", self.index, self.graph.operand(other))

    def __gt__(self, other: Any) -> Scalar:
        return self._make("less", self.graph.operand(other), self.index)

    def __bool__(self) -> bool:
        raise TypeError("a traced value has no truth of its own: write where(condition, a, b) in place of if")

    def __abs__(self) -> Any:
        key = self._key()
        return self._make("abs", key[1] if key[0] == "neg" else self.index)

    def sqrt(self) -> Scalar:
        """Square root."""
        return self._make("sqrt", self.index)

    def sin(self) -> Any:
        """Sine of an angle [rad]."""
        key = self._key()
        return -self._make("sin", key[1]) if key[0] == "neg" else self._make("sin", self.index)

    def cos(self) -> Scalar:
        """Cosine of an angle [rad]."""
        key = self._key()
        return self._make("cos", key[1] if key[0] == "neg" else self.index)

    def exp(self) -> Scalar:
        """Exponential."""
        return self._make("exp", self.index)

    def abs(self) -> Any:
        """Absolute value."""
        return abs(self)

    def clip(self, min: float | None = None, max: float | None = None) -> Any:
        """Return the value bounded to [min, max]; a bound may be None."""
        low = self if min is None else maximum(min, self)
        return low if max is None else minimum(max, low)


def maximum(a: Any, b: Any) -> Any:
    """Return the larger of two; not a number where ``b`` is not (and the constant goes first)."""
    return _ordered("max", max, a, b)


def minimum(a: Any, b: Any) -> Any:
    """Return the smaller of two; not a number where ``b`` is not (and the constant goes first)."""
    return _ordered("min", min, a, b)


def _ordered(name: str, plain: Callable[[float, float], float], a: Any, b: Any) -> Any:
    if not isinstance(b, Scalar):
        a, b = b, a
    if not isinstance(b, Scalar):
        return plain(float(a), float(b))
    return b._make(name, b.graph.operand(a), b.index)


def where(condition: Any, a: Any, b: Any) -> Any:
    """Return ``a`` where ``condition`` (of ``<`` or ``>``) holds, else ``b``."""
    if not isinstance(condition, Scalar):
        return a if condition else b
    graph = condition.graph
    first, second = graph.operand(a), graph.operand(b)
    return a if first == second else condition._make("select", condition.index, first, second)


_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "less": np.less,
    "neg": np.negative,
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "exp": np.exp,
    "abs": np.abs,
    "select": np.where,
    "max": lambda a, b: np.where(a > b, a, b),
    "min": lambda a, b: np.where(a < b, a, b),
}


def evaluate(
    graph: Graph,
    outputs: list[int],
    inputs: Callable[[str, int], Any],
    networks: Callable[[int, Any, list[Any]], Any] | None = None,
) -> list[Any]:
    """Return the values of ``outputs`` with numpy: the reference every lowering is held against.

    Args:
        graph, outputs: what to compute.
        inputs: value of an input of a kind and index; numbers or arrays.
        networks: outputs of network k for a gate and inputs, as ``Network.values``; None: the graph calls none.
    """
    values: dict[int, Any] = {}
    for index in graph.needed(outputs):
        name, *rest = graph.nodes[index]
        if name == "const":
            values[index] = rest[0]
        elif name == "input":
            values[index] = inputs(*rest)
        elif name == "network":
            values[index] = networks(rest[0], values[rest[1]], [values[i] for i in rest[2:]])
        elif name == "output":
            values[index] = values[rest[0]][rest[1]]
        else:
            values[index] = _NUMPY[name](*(values[i] for i in rest))
    return [values[index] for index in outputs]


def tidy(value: float, scale: float = 1.0) -> float:
    """Return ``value`` with rounding residue of a compiled model removed: 0, 1 or -1 (times scale) where it is that close."""
    for whole in (0.0, 1.0, -1.0):
        if math.isclose(value, whole * scale, rel_tol=0, abs_tol=1e-12 * scale):
            return whole * scale
    return float(value)

"""LLVM IR for calls of networks: loops over layers, rows and inputs; weights read in the loops, activations on the stack.

Largest errors of the activations, measured by the tests: tanh 2e-7 absolute in float32, 5e-16 in float64; silu
3e-7 and 1e-15 relative to the larger of its argument and 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mbctrl.kernels.network import Network, offsets
from mbctrl.kernels.vector import Writer

_ROWS = 8  # sums side by side: they share each load of an activation, and a sum waits four times as long as it works


def scratch(networks: Sequence[Network]) -> int:
    """Return how many vectors calls keep on the stack: a layer's inputs and its outputs."""
    return 2 * max((size for network in networks for size in network.sizes), default=0)


class NetworkWriter:
    """Writes calls into a function.

    Args:
        w: the function.
        networks: the program's.
        weights: address of their weights, one after another.
        memory: address of ``scratch`` vectors.
    """

    def __init__(self, w: Writer, networks: Sequence[Network], weights: str, memory: str) -> None:
        self.w, self.networks, self.weights = w, networks, weights
        self._offsets = offsets(networks)
        self._sides = (memory, self._vector(memory, str(scratch(networks) // 2)))

    def call(self, name: str, k: int, gate: str, inputs: Sequence[str]) -> list[str]:
        """Return the outputs of network ``k``; its layers are skipped where no lane's gate is above 0 or not a number.

        Args:
            name: begins the names of the call's blocks; not used before.
            gate, inputs: vectors.
        """
        w, network, zero = self.w, self.networks[k], self.w.lanes.number(0)
        on = w.put(f"fcmp ugt {w.lanes.vector} {gate}, {zero}")
        bits = w.cast("bitcast", on, w.lanes.mask, f"i{w.lanes.width}")
        w.do(f"br label %{name}")
        w.label(name)
        w.do(f"br i1 {w.put(f'icmp eq i{w.lanes.width} {bits}, 0')}, label %{name}.end, label %{name}.on")
        w.label(f"{name}.on")
        for i, value in enumerate(inputs):
            w.store(value, self._vector(self._sides[0], str(i)))
        start = self._offsets[k]
        source, target = self._sides
        for layer, (columns, rows) in enumerate(network.layers):
            self._layer(f"{name}.{layer}", start, columns, rows, source, target)
            if layer < len(network.layers) - 1:
                self._activate(f"{name}.{layer}.active", network.activation, rows, target)
            start += (columns + 1) * rows
            source, target = target, source
        raw = [w.load(self._vector(source, str(i))) for i in range(network.outputs)]
        gated = [w.select(on, w.mul(gate, value), zero) for value in raw]
        w.do(f"br label %{name}.done")
        w.label(f"{name}.done")
        w.do(f"br label %{name}.end")
        w.label(f"{name}.end")
        return [w.put(f"phi {w.lanes.vector} [ {zero}, %{name} ], [ {value}, %{name}.done ]") for value in gated]

    def _vector(self, address: str, index: str) -> str:
        return self.w.put(f"getelementptr {self.w.lanes.vector}, ptr {address}, i64 {index}")

    def _layer(self, name: str, start: int, columns: int, rows: int, source: str, target: str) -> None:
        """Write W x + b of vectors at ``source`` to ``target``; W begins at weight ``start``."""
        rest = rows % _ROWS

        def group(row: str, _: list[str]) -> list[str]:
            self._rows(f"{name}.sum", start, (columns, rows), row, _ROWS, source, target)
            return []

        if rows > rest:
            self._loop(f"{name}.rows", rows - rest, _ROWS, [], group)
        if rest:
            self._rows(f"{name}.rest", start, (columns, rows), str(rows - rest), rest, source, target)

    def _rows(self, name: str, start: int, shape: tuple[int, int], row: str, count: int, source: str, target: str) -> None:
        """Write ``count`` rows from ``row`` on."""
        w, (columns, rows) = self.w, shape
        bias = w.at(self.weights, w.put(f"add i64 {row}, {start + columns * rows}"))
        matrix = w.at(self.weights, w.put(f"add i64 {w.put(f'mul i64 {row}, {columns}')}, {start}"))

        def add(column: str, sums: list[str]) -> list[str]:
            x, here = w.load(self._vector(source, column)), w.at(matrix, column)
            return [w.fma(w.load_all(w.at(here, str(i * columns))), x, total) for i, total in enumerate(sums)]

        sums = self._loop(name, columns, 1, [w.load_all(w.at(bias, str(i))) for i in range(count)], add)
        for i, total in enumerate(sums):
            w.store(total, self._vector(target, w.put(f"add i64 {row}, {i}")))

    def _activate(self, name: str, activation: str, count: int, place: str) -> None:
        """Apply an activation to ``count`` vectors at ``place``."""
        w = self.w

        def apply(i: str, _: list[str]) -> list[str]:
            address = self._vector(place, i)
            w.store(getattr(w, activation)(w.load(address)), address)
            return []

        self._loop(name, count, 1, [], apply)

    def _loop(self, name: str, count: int, step: int, first: list[str], body: Callable[[str, list[str]], list[str]]) -> list[str]:
        """Write a loop, ``count`` at least 1: ``body`` is given the index and what is carried, and returns what is next."""
        w, index = self.w, f"%{name}.index"
        carried = [f"%{name}.{i}" for i in range(len(first))]
        w.do(f"br label %{name}.before")
        w.label(f"{name}.before")
        w.do(f"br label %{name}")
        w.label(name)
        w.do(f"{index} = phi i64 [ 0, %{name}.before ], [ {index}.next, %{name}.after ]")
        place = len(w.lines)
        following = body(index, carried)
        w.lines[place:place] = [
            f"  {c} = phi {w.lanes.vector} [ {a}, %{name}.before ], [ {b}, %{name}.after ]"
            for c, a, b in zip(carried, first, following)
        ]
        w.do(f"br label %{name}.after")
        w.label(f"{name}.after")
        w.do(f"{index}.next = add i64 {index}, {step}")
        w.do(f"br i1 {w.put(f'icmp slt i64 {index}.next, {count}')}, label %{name}, label %{name}.end")
        w.label(f"{name}.end")
        return following

"""Small networks inside a program: their shape is the program's, their weights are given when it runs. Knows no lowering.

In a graph a call is one node ``("network", k, gate, *inputs)``, of network ``k`` of the program, which has no value of its
own, and a node ``("output", call, i)`` for each output that is used. An output is 0 where the gate is 0 or less, whatever
the inputs and weights are, else the gate times the network's; a gate that is not a number gives what is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

WIDEST = 1024
"""Most values of a layer: the machine code keeps two layers of a block of samples on the stack, 256 KiB at most."""

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "tanh": np.tanh,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.where(x < 0, 0, x),
}


@dataclass(frozen=True)
class Network:
    """Layers ``y = W x + b``, an activation after each but the last.

    Its weights are a run of numbers: for each layer W (out, in) row by row, then b (out,).

    Args:
        sizes: how many inputs, how many values of each hidden layer, how many outputs; each 1 to WIDEST.
        activation: ``tanh``, ``silu`` or ``relu``.

    Errors:
        ValueError: for other sizes or another activation.
    """

    sizes: tuple[int, ...]
    activation: str

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not isinstance(sizes, tuple) or len(sizes) < 2 or not all(type(n) is int and 1 <= n <= WIDEST for n in sizes):
            raise ValueError(f"expected the sizes of inputs, hidden layers and outputs, each 1 to {WIDEST}, found {sizes!r}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")

    @property
    def inputs(self) -> int:
        """How many inputs it takes."""
        return self.sizes[0]

    @property
    def outputs(self) -> int:
        """How many outputs it gives."""
        return self.sizes[-1]

    @property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each layer, in order."""
        return tuple(zip(self.sizes, self.sizes[1:]))

    @property
    def weights(self) -> int:
        """How many weights it has, biases included."""
        return sum((columns + 1) * rows for columns, rows in self.layers)

    @property
    def operations(self) -> int:
        """How many operations a call takes: a product and a sum a weight that is no bias, one an activation, one a gate."""
        return sum(2 * columns * rows + rows for columns, rows in self.layers)

    def flat(self, layers: Sequence[tuple[Any, Any]]) -> np.ndarray:
        """Return ``(W, b)`` of each layer, (out, in) and (out,), as the run of weights, float64.

        Errors:
            ValueError: where their shapes are not the network's.
        """
        expected = [((rows, columns), (rows,)) for columns, rows in self.layers]
        found = [(np.shape(matrix), np.shape(bias)) for matrix, bias in layers]
        if found != expected:
            raise ValueError(f"expected weights and biases of shapes {expected}, found {found}")
        return np.concatenate([np.ravel(np.asarray(part, float)) for layer in layers for part in layer])

    def values(self, weights: np.ndarray, gate: Any, inputs: Sequence[Any]) -> np.ndarray:
        """Return the gated outputs (outputs, ...) with numpy, in float64: the reference every lowering is held against.

        Args:
            weights: (self.weights,).
            gate, inputs: numbers or arrays of one shape (...).
        """
        gate, *inputs = np.broadcast_arrays(gate, *inputs)
        x, start = np.stack(inputs).astype(float), 0
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is meant to pass
            for k, (columns, rows) in enumerate(self.layers):
                matrix, start = weights[start : start + rows * columns].reshape(rows, columns), start + rows * columns
                bias, start = weights[start : start + rows], start + rows
                x = np.tensordot(matrix, x, 1) + bias.reshape(-1, *[1] * gate.ndim)
                x = ACTIVATIONS[self.activation](x) if k < len(self.layers) - 1 else x
            return np.where(gate <= 0, 0.0, gate * x)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {"sizes": list(self.sizes), "activation": self.activation}

    @staticmethod
    def from_dict(data: Any) -> Network:
        """Return the network ``to_dict`` described.

        Errors:
            ValueError: where it is none.
        """
        if not isinstance(data, dict) or data.keys() != {"sizes", "activation"} or not isinstance(data["sizes"], list):
            raise ValueError(f"expected a network's sizes and activation, found {data!r}")
        return Network(tuple(data["sizes"]), data["activation"])


def offsets(networks: Iterable[Network]) -> tuple[int, ...]:
    """Return where each network's weights begin in the run of all of them, then how many there are."""
    return tuple(accumulate((network.weights for network in networks), initial=0))


def check_calls(nodes: Sequence[tuple[Any, ...]], results: Iterable[int], networks: Sequence[Network]) -> None:
    """Refuse calls that machine code must not be made of: it would read or write where nothing is.

    Args:
        nodes: of a graph; operands are earlier nodes.
        results: nodes whose values are used outside the graph.
        networks: the program's.

    Errors:
        ValueError: where a call does not fit its network, an output no call, or a call is used as if it had a value.
    """
    calls = {i for i, key in enumerate(nodes) if key[0] == "network"}
    for i, (name, *rest) in enumerate(nodes):
        if name == "network":
            k, values = rest[0], rest[1:]
            if not 0 <= k < len(networks) or len(values) != 1 + networks[k].inputs:
                raise ValueError(f"node {i}: no network {k} of {len(values) - 1} inputs; known: {list(networks)}")
            if any(nodes[v][0] == "less" for v in values):
                raise ValueError(f"node {i}: gates and inputs are numbers: write where(condition, 1.0, 0.0)")
        elif name == "output":
            call, o = rest
            if call not in calls or not 0 <= o < networks[nodes[call][1]].outputs:
                raise ValueError(f"node {i}: node {call} is no call with an output {o}")
            continue
        else:
            values = [] if name in ("const", "input") else rest
        if not calls.isdisjoint(values):
            raise ValueError(f"node {i}: a network's call has no value of its own, only its outputs have")
    if not calls.isdisjoint(results):
        raise ValueError("a network's call has no value of its own, only its outputs have")

"""A rollout as data: what is carried from step to step, what a step computes, what it reads. Knows of no robot."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mbctrl.kernels.graph import OPERATIONS, Graph, operands
from mbctrl.kernels.network import Network, check_calls

KINDS = ("start", "carry", "command", "table", "uniform", "sample")
"""Inputs: ``start`` the state at the start; ``carry`` what the last step left; ``command`` the step's command; ``table`` a
row of numbers a step; ``uniform`` numbers for the whole rollout; ``sample`` numbers of each sample."""

_ARITY = {"less": 2, "select": 3, "neg": 1, "sqrt": 1, "sin": 1, "cos": 1, "exp": 1, "abs": 1}


@dataclass(frozen=True)
class Program:
    """A traced rollout.

    Args:
        graph: the expressions.
        states, commands: nx and nu.
        first: for each carried value its node before the first step, of ``start``, ``uniform`` and ``sample`` inputs.
        following: for each its node after a step; the first nx are the state.
        cost: index of the carried value that is the rollout's cost, or None.
        sizes: how many inputs there are of each of the kinds table, uniform and sample.
        networks: what the graph calls; their weights, given at run time, follow each other in this order.

    Errors:
        ValueError: where a call in the graph does not fit the networks.
    """

    graph: Graph
    states: int
    commands: int
    first: tuple[int, ...]
    following: tuple[int, ...]
    cost: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    networks: tuple[Network, ...] = ()

    def __post_init__(self) -> None:
        check_calls(self.graph.nodes, (*self.first, *self.following), self.networks)

    @cached_property
    def live(self) -> tuple[int, ...]:
        """The carried values that the state or the cost depends on, in order."""
        found = set(range(self.states)) | ({self.cost} if self.cost is not None else set())
        while True:
            used = {rest[1] for rest in self._inputs(self.following[k] for k in found) if rest[0] == "carry"}
            if used <= found:
                return tuple(sorted(found))
            found |= used

    def _inputs(self, outputs: Iterable[int]) -> list[tuple[str, int]]:
        nodes = self.graph.nodes
        return [nodes[i][1:] for i in self.graph.needed(outputs) if nodes[i][0] == "input"]

    @cached_property
    def varying(self) -> frozenset[int]:
        """The nodes that differ from step to step; the others are computed once."""
        out: set[int] = set()
        for index, key in enumerate(self.graph.nodes):
            if key[0] == "input":
                if key[1] in ("carry", "command", "table"):
                    out.add(index)
            elif any(i in out for i in operands(key)):
                out.add(index)
        return frozenset(out)

    @cached_property
    def operations(self) -> dict[str, int]:
        """How many operations of each name a step takes; of networks, how many calls."""
        return self.graph.count(self.following[k] for k in self.live)

    @property
    def operation_count(self) -> int:
        """How many operations a step takes, those inside its networks included."""
        nodes = self.graph.nodes
        calls = [nodes[i][1] for i in self.graph.needed(self.following[k] for k in self.live) if nodes[i][0] == "network"]
        return sum(self.operations.values()) - len(calls) + sum(self.networks[k].operations for k in calls)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the program's content; equal programs have equal digests."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, unused nodes left out."""
        used = self.graph.needed((*self.first, *self.following))
        place = {index: i for i, index in enumerate(used)}
        nodes = []
        for index in used:
            key = self.graph.nodes[index]
            moved = [place[i] for i in operands(key)]
            if key[0] in ("const", "input"):
                nodes.append([*key])
            elif key[0] == "network":
                nodes.append([*key[:2], *moved])
            else:
                nodes.append([key[0], *moved, *key[1 + len(moved) :]])
        data = {
            "nodes": nodes,
            "states": self.states,
            "commands": self.commands,
            "first": [place[i] for i in self.first],
            "following": [place[i] for i in self.following],
            "cost": self.cost,
            "sizes": dict(self.sizes),
        }
        return data | ({"networks": [network.to_dict() for network in self.networks]} if self.networks else {})

    @staticmethod
    def from_dict(data: dict[str, Any]) -> Program:
        """Return the program ``to_dict`` described, every index checked: machine code made from it reads what they say.

        Errors:
            ValueError: for an unknown operation, input or network, or an index that is out of range.
        """
        try:
            states, commands, cost = int(data["states"]), int(data["commands"]), data["cost"]
            first, following = tuple(data["first"]), tuple(data["following"])
            sizes = {kind: int(data["sizes"].get(kind, 0)) for kind in ("table", "uniform", "sample")}
            networks = tuple(map(Network.from_dict, data.get("networks", ())))
            limits = {"start": states, "carry": len(first), "command": commands, **sizes}
            graph = Graph()
            for i, (name, *rest) in enumerate(data["nodes"]):
                node = graph.node(*_checked(i, name, rest, limits))
                if node != i:
                    raise ValueError(f"node {i} repeats node {node}")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"not a program: {type(error).__name__} {error}") from None
        carried, count = len(first), len(graph.nodes)
        if len(following) != carried or not all(_within(k, count) for k in (*first, *following)):
            raise ValueError("the carried values do not match the nodes")
        if not 0 <= states <= carried or not (cost is None or _within(cost, carried)):
            raise ValueError(f"{states} states and cost {cost!r} do not fit {carried} carried values")
        program = Program(graph, states, commands, first, following, cost, sizes, networks)
        if any(kind not in ("start", "uniform", "sample") for kind, _ in program._inputs(first)):
            raise ValueError("what is carried at first depends on what only a step has")
        return program


def _within(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _checked(i: int, name: Any, rest: list[Any], limits: dict[str, int]) -> tuple[Any, ...]:
    """Return node ``i``'s key, or raise ValueError."""
    if name == "const":
        (value,) = rest
        return name, float(value)
    if name == "input":
        kind, index = rest
        if kind not in limits or not _within(index, limits[kind]):
            raise ValueError(f"node {i}: unknown input {rest}; known: {limits}")
        return name, kind, index
    if name in ("network", "output"):  # whether call, network and output fit is the program's to check
        whole = len(rest) >= 2 and all(type(k) is int for k in rest) and (name == "network" or len(rest) == 2)
        if not whole or not all(_within(k, i) for k in operands((name, *rest))):
            raise ValueError(f"node {i}: not {'a call' if name == 'network' else 'an output'} of earlier nodes: {rest}")
        return name, *rest
    if name not in OPERATIONS or len(rest) != _ARITY.get(name, 2):
        raise ValueError(f"node {i}: unknown operation {name!r} of {len(rest)} operands")
    if not all(_within(k, i) for k in rest):
        raise ValueError(f"node {i}: operands {rest} are not earlier nodes")
    return name, *rest

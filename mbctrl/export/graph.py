"""ONNX graphs put together from flat parts: a part is exported once, then scanned over or repeated by protobuf surgery.

Letting the exporter unroll a horizon takes it minutes and its optimiser longer; copying the nodes of one step takes
milliseconds and gives the same numbers to the bit.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, nn

OPSET = 18
"""Every operator used has a CPU and a CUDA kernel at this version; newer ones re-version some and move them to the CPU."""


_LARGE = 1024
"""Constants of more numbers than these that repeat themselves along their last axis are kept once and expanded."""


@dataclass
class Part:
    """A flat piece of graph: nodes, constants, and the names of its inputs and outputs."""

    nodes: list[NodeProto]
    constants: dict[str, np.ndarray]
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]


def exported(module: nn.Module, example: tuple[Any, ...], inputs: Sequence[str], outputs: Sequence[str]) -> Part:
    """Return ``module`` as a flat part; ``inputs`` name the example's tensors in order, those in dicts included.

    Errors:
        torch.onnx.OnnxExporterError: for an operation that has no ONNX form.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.inference_mode(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            example,
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=list(outputs),
            verbose=False,
        )
        program.optimize()
    graph = program.model_proto.graph
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string = node.name = ""
    constants = {held.name: numpy_helper.to_array(held) for held in graph.initializer}
    return Part(list(graph.node), constants, list(graph.input), list(graph.output))


class Assembly:
    """A graph under construction; names are made unique by prefix, constants are shared between copies of a part."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}

    def add(self, part: Part, copy: str, shared: str, given: dict[str, str], nodes: list[NodeProto] | None = None) -> list[str]:
        """Append a copy of ``part``; its inputs are bound to the names in ``given``; return the names of its outputs.

        ``nodes`` is the list to append to where it is not the graph's own: a loop's body, which sees the graph's constants.
        """
        names = dict(given)
        for name, value in part.constants.items():
            names[name] = self.constant(f"{shared}.{name}", value)
        for node in part.nodes:
            made = NodeProto()
            made.CopyFrom(node)
            for k, name in enumerate(node.input):
                made.input[k] = names[name] if name else ""
            for k, name in enumerate(node.output):
                names[name] = f"{copy}.{name}" if name else ""
                made.output[k] = names[name]
            (self.nodes if nodes is None else nodes).append(made)
        return [names[value.name] for value in part.outputs]

    def scan(self, body: Part, start: str, rows: str, out: str, more: dict[str, str] | None = None) -> str:
        """Append a Scan of ``body`` (state, row) -> state over the leading index of ``rows``; return the states after each step.

        ``more`` binds further inputs of the body to values of the outer graph.
        """
        inside: list[NodeProto] = []
        state, row = (value.name for value in body.inputs[:2])
        after = self.add(body, out, out, {state: f"{out}.state", row: f"{out}.row", **(more or {})}, inside)[0]
        inside.append(helper.make_node("Identity", [after], [f"{out}.kept"]))
        kinds = body.inputs[0].type, body.inputs[1].type
        graph = helper.make_graph(
            inside,
            f"{out}.body",
            [helper.make_value_info(f"{out}.state", kinds[0]), helper.make_value_info(f"{out}.row", kinds[1])],
            [helper.make_value_info(after, kinds[0]), helper.make_value_info(f"{out}.kept", kinds[0])],
        )
        self.nodes.append(helper.make_node("Scan", [start, rows], [f"{out}.last", f"{out}.after"], body=graph, num_scan_inputs=1))
        return f"{out}.after"

    def unrolled(self, body: Part, start: str, rows: str, count: int, out: str) -> str:
        """Append ``count`` copies of ``body``; return the states after each step, one above the other, as ``scan`` does."""
        state, row = (value.name for value in body.inputs[:2])
        parts = [f"{out}.row{k}" for k in range(count)]
        self.nodes.append(helper.make_node("Split", [rows], [f"{name}.one" for name in parts], axis=0, num_outputs=count))
        zero = self.constant("first", np.zeros(1, np.int64))
        now, after = start, []
        for k, name in enumerate(parts):
            self.node("Squeeze", [f"{name}.one", zero], name)
            now = self.add(body, f"{out}.{k}", out, {state: now, row: name})[0]
            after.append(self.node("Unsqueeze", [now, zero], f"{out}.after{k}"))
        return self.node("Concat", after, f"{out}.after", axis=0)

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Append one operator; return its output's name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        """Keep a constant; return its name."""
        if name not in self._constants:
            self._constants[name] = value
            if value.size > _LARGE and (value == value[..., :1]).all():
                self._constants[name] = np.array(value.shape, np.int64)
                self._constants[f"{name}.one"] = value[..., :1].copy()
                self.node("Expand", [f"{name}.one", name], f"{name}.all")
        return f"{name}.all" if f"{name}.one" in self._constants else name

    def model(
        self, inputs: Sequence[ValueInfoProto], outputs: dict[str, ValueInfoProto], metadata: dict[str, str]
    ) -> onnx.ModelProto:
        """Return the model; ``outputs`` maps names of values in the graph to what they are called and their types."""
        for name, value in outputs.items():
            self.node("Identity", [name], value.name)
        constants = [numpy_helper.from_array(value, name) for name, value in self._constants.items()]
        graph = helper.make_graph(self.nodes, "mbctrl", list(inputs), list(outputs.values()), constants)
        _shorten(graph, {value.name: value.name for value in (*inputs, *outputs.values())})
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10, producer_name="mbctrl")
        helper.set_model_props(model, metadata)
        onnx.checker.check_model(model, full_check=False)
        return model


def _shorten(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Give values short names, those in ``names`` apart: they are half of an unrolled graph's size."""

    def short(name: str) -> str:
        return names.setdefault(name, np.base_repr(len(names), 36)) if name else ""

    for value in (*graph.initializer, *graph.input, *graph.output):
        value.name = short(value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [short(name) for name in field]
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _shorten(attribute.g, names)


def info(name: str, value: Tensor | tuple[int | str, ...]) -> ValueInfoProto:
    """Return a float input or output of ``value``'s shape."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, list(value.shape if isinstance(value, Tensor) else value))


def node_count(model: onnx.ModelProto) -> int:
    """Return how many operators one evaluation runs; a Scan's body counts once for each of the ``steps`` of the metadata."""
    steps = int({p.key: p.value for p in model.metadata_props}.get("steps", "1"))
    bodies = [a.g for node in model.graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return len(model.graph.node) + steps * sum(len(body.node) for body in bodies)

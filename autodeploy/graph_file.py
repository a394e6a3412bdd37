"""The graph of a program in its file: nodes as JSON, and their values derived anew when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from autodeploy.codec import decode, decode_target, describe, encode, encode_target, fake_input
from autodeploy.custom_ops import symbolic
from autodeploy.errors import ProgramFileError
from autodeploy.light_torch import for_shapes_alone
from autodeploy.specs import EXAMPLE_PAGE_SIZE, EXAMPLE_PAGES, CacheSpec, InputSpec


def encode_node(node: fx.Node, names: Mapping[Any, str]) -> dict[str, Any]:
    """names: what the symbolic dims are called in the node's value."""
    target = encode_target(node.target) if node.op == "call_function" else str(node.target)
    data = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args)}
    data |= {"kwargs": encode(node.kwargs)["dict"]} if node.kwargs else {}
    return data | ({"value": describe(node.meta["val"], names)} if node.op != "output" else {})


def encode_parameter(tensor: Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def read_graph(nodes: list[dict[str, Any]], parameters: Mapping[str, dict[str, Any]]) -> fx.GraphModule:
    """A graph of saved nodes over meta parameters. Its nodes have no values: that is enough to run it."""
    graph, made = fx.Graph(), dict[str, fx.Node]()
    for data in nodes:
        target = decode_target(data["target"]) if data["op"] == "call_function" else data["target"]
        args, kwargs = tuple(decode(data["args"], made)), decode({"dict": data.get("kwargs", {})}, made)
        made[data["name"]] = graph.create_node(data["op"], target, args, kwargs, data["name"])
    with for_shapes_alone():
        tensors = {name: _meta_parameter(kind) for name, kind in parameters.items()}
    with _use_lazy_graph_module(True):  # what is executed is another one, over real weights
        return _make_graph_module(tensors, graph)


def _meta_parameter(kind: dict[str, Any]) -> Tensor:
    tensor = torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]), device="meta")
    return torch.nn.Parameter(tensor, requires_grad=False)


class ValueReader:
    """Derives the value of every node of a graph that was read, in order."""

    def __init__(
        self, inputs: Mapping[str, InputSpec], caches: Mapping[str, CacheSpec], parameters: Mapping[str, Tensor]
    ) -> None:
        from torch.fx.experimental.symbolic_shapes import ShapeEnv  # late: running a program needs no values

        self.inputs, self.caches, self.parameters = inputs, caches, parameters
        self.mode, self.known = FakeTensorMode(shape_env=ShapeEnv()), dict[str, Any]()

    def read(self, graph: fx.Graph, saved: Mapping[str, Any] | None = None) -> None:
        """saved: value of each node as it was saved. Raises ProgramFileError where another one is derived."""
        for node in graph.nodes:
            if node.op != "output":
                node.meta["val"] = self._derive(node)
                if saved is not None:
                    self._compare(node, saved[node.name])

    def _compare(self, node: fx.Node, saved: Any) -> None:
        derived = describe(node.meta["val"], {size.node.expr: name for name, size in self.known.items()})
        if derived != saved:
            what = encode_target(node.target) if node.op == "call_function" else node.target
            raise ProgramFileError(f"{node.name} was saved as {saved}, but {what} gives {derived}. Save it again.")

    def _derive(self, node: fx.Node) -> Any:
        """The value of a node from those of its arguments, or from the spec of an input, a cache or a parameter."""
        if node.op == "placeholder" and node.name in self.inputs:
            return fake_input(self.mode, self.inputs[node.name], self.known)
        with self.mode, torch.no_grad():
            if node.op == "placeholder":
                spec = self.caches[node.name]
                return torch.empty(spec.shape(EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE), dtype=getattr(torch, spec.dtype))
            if node.op == "get_attr":
                parameter = self.parameters[str(node.target)]
                return torch.empty(parameter.shape, dtype=parameter.dtype)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])  # pyright: ignore
            return symbolic(node.target)(*args, **kwargs)

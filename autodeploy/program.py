"""A Program: an FX graph on meta tensors and, beside it, everything that must be known to run it."""

from __future__ import annotations

import json
from collections import Counter
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from autodeploy.codec import decode, decode_recipe, decode_target, describe, encode, encode_recipe, encode_target, fake_input
from autodeploy.custom_ops import SEMANTIC_OPS, symbolic
from autodeploy.errors import ProgramFileError
from autodeploy.specs import EXAMPLE_PAGE_SIZE, EXAMPLE_PAGES, CacheSpec, InputSpec, Level, PagedKV, SlidingWindowKV
from autodeploy.weights import WeightPlan


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    rewrites: int
    seconds: float
    op_delta: dict[str, int]
    """Op name -> nodes more (or fewer) than before."""


@dataclass
class Program:
    graph: fx.GraphModule
    """Parameters and buffers are meta tensors, read by `get_attr`; every node carries its fake value in `meta["val"]`."""
    inputs: dict[str, InputSpec]
    """Placeholders that the executor fills each step, in order."""
    caches: dict[str, CacheSpec]
    """Placeholders that the executor allocates once, after the inputs."""
    weights: WeightPlan
    rope_thresholds: tuple[int, ...] = ()
    """A request whose length crosses one of these is recomputed from its first token."""
    providers: dict[str, str] = field(default_factory=dict)
    """Semantic op -> the provider chosen, and why not the ones before it."""
    history: list[PassRecord] = field(default_factory=list)

    @property
    def level(self) -> Level:
        """Exported until a pass has run, lowered once caches are in, canonical between."""
        if self.caches:
            return Level.LOWERED
        return Level.CANONICAL if self.history else Level.EXPORTED

    def snapshot(self) -> Snapshot:
        """What is needed to bring the program back as it is now; cheap, since nodes and values are shared, not copied."""
        nodes = [NodeRecord.of(node) for node in self.graph.graph.nodes]
        tensors = {name: self.parameter(name) for name in self.weights}
        return Snapshot(nodes, tensors, replace(self, **self._copies()))

    def restore(self, snapshot: Snapshot) -> None:
        """Undo everything since the snapshot."""
        vars(self).update(vars(snapshot.as_program()))

    def _copies(self) -> dict[str, Any]:
        """The tables that passes change in place; what is in them is frozen."""
        return {name: copy(getattr(self, name)) for name in ("inputs", "caches", "providers", "history")}

    def check(self) -> None:
        """Placeholders are inputs then caches; parameters read are parameters planned; every value is known."""
        placeholders = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        expected = [*self.inputs, *self.caches]
        assert placeholders == expected, f"placeholders are {placeholders}, but inputs and caches are {expected}"
        read = {str(node.target) for node in self.graph.graph.nodes if node.op == "get_attr"}
        planned = set(self.weights)
        assert read == planned, f"read but not planned: {sorted(read - planned)}; planned but not read: {sorted(planned - read)}"
        bare = [node.name for node in self.graph.graph.nodes if node.op != "output" and "val" not in node.meta]
        assert not bare, f"nodes without a value in meta: {bare[:5]}"

    def op_counts(self) -> Counter[str]:
        return Counter(op_name(node.target) for node in self.graph.graph.nodes if node.op == "call_function")

    def parameter(self, name: str) -> torch.Tensor:
        """The meta tensor that stands for a parameter."""
        value: Any = self.graph
        for part in name.split("."):
            value = getattr(value, part)
        return value

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> list[str]:
        passes = ", ".join(record.name for record in self.history) or "none"
        names = {size.node.expr: name for name, size in symbols(self).items()}
        lines = [f"program ({self.level.value}; passes: {passes})", "", "inputs:"]
        lines += [f"  {name}: {spec.dtype}[{', '.join(map(str, spec.shape))}]" for name, spec in self.inputs.items()]
        lines += ["caches:", *(f"  {name}: {spec}" for name, spec in self.caches.items())]
        lines += ["weights:"]
        lines += [f"  {name}: {describe(self.parameter(name), names)} = {self.weights[name]}" for name in self.weights]
        statements = (node for node in self.graph.graph.nodes if node.op in ("call_function", "output"))
        lines += ["graph:", *(f"  {_statement(node, names)}" for node in statements)]
        return lines

    def save(self, folder: Path) -> None:
        """Write program.json: ops, arguments, shapes, recipes, specs. No weights. The same program gives the same bytes."""
        names = {size.node.expr: name for name, size in symbols(self).items()}
        data = {
            "version": FORMAT_VERSION,
            "inputs": {name: asdict(spec) for name, spec in self.inputs.items()},
            "caches": {name: {"kind": type(spec).__name__, **asdict(spec)} for name, spec in self.caches.items()},
            "weights": {name: encode_recipe(recipe) for name, recipe in self.weights.recipes.items()},
            "parameters": {name: _parameter_type(self.parameter(name)) for name in self.weights},
            "rope_thresholds": self.rope_thresholds,
            "providers": self.providers,
            "history": [asdict(record) for record in self.history],
            "nodes": [_encode_node(node, names) for node in self.graph.graph.nodes],
        }
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(json.dumps(data, indent=1))

    @classmethod
    def load(cls, folder: Path) -> Program:
        """Read what `save` wrote, deriving every value anew. Raises ProgramFileError when one is not what was saved."""
        data = _read(folder / FILE_NAME)
        inputs = {name: InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for name, spec in data["inputs"].items()}
        caches = {name: _decode_cache(spec) for name, spec in data["caches"].items()}
        program = cls(
            graph=_GraphReader(inputs, caches, data["parameters"]).read(data["nodes"]),
            inputs=inputs,
            caches=caches,
            weights=WeightPlan({name: decode_recipe(recipe) for name, recipe in data["weights"].items()}),
            rope_thresholds=tuple(data["rope_thresholds"]),
            providers=data["providers"],
            history=[PassRecord(**record) for record in data["history"]],
        )
        program.check()
        return program


@dataclass(frozen=True, slots=True)
class NodeRecord:
    """One node as it was; its arguments refer to the nodes of that time."""

    node: fx.Node
    op: str
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]

    @classmethod
    def of(cls, node: fx.Node) -> NodeRecord:
        return cls(node, node.op, node.name, node.target, node.args, node.kwargs, dict(node.meta))


@dataclass(frozen=True)
class Snapshot:
    """A program at one moment: its nodes in order, its meta tensors, and copies of everything beside the graph."""

    nodes: list[NodeRecord]
    tensors: dict[str, torch.Tensor]
    program: Program
    """All but `graph` is as it was."""

    def build_graph(self) -> fx.GraphModule:
        """The graph of that moment, of new nodes with the old names."""
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        for record in self.nodes:
            args, kwargs = fx.map_arg((record.args, record.kwargs), new.__getitem__)  # pyright: ignore
            new[record.node] = graph.create_node(record.op, record.target, args, kwargs, record.name)
            new[record.node].meta = dict(record.meta)
        return fx.GraphModule(dict[str, Any](self.tensors), graph)

    def as_program(self) -> Program:
        """A program of its own, equal to the one of that moment."""
        return replace(self.program, graph=self.build_graph(), **self.program._copies())


def op_name(target: Any) -> str:
    """aten.linear, autodeploy.rms_norm, operator.getitem; a chosen provider shows its function's name."""
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return name.removesuffix(".default")
    module = getattr(target, "__module__", "").rpartition(".")[2].lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def is_semantic(node: fx.Node, name: str) -> bool:
    """Does this node call the semantic op of that name (before a provider is chosen)?"""
    op = SEMANTIC_OPS.get(node.target) if node.op == "call_function" else None
    return op is not None and op.name == name


def symbols(program: Program) -> dict[str, Any]:
    """Symbolic dims by the names the input specs give them; T of `input_ids` is T everywhere."""
    values = {node.name: node.meta["val"] for node in program.graph.graph.nodes if node.op == "placeholder"}
    found: dict[str, Any] = {}
    for name, spec in program.inputs.items():
        for dim, size in zip(spec.shape, values[name].shape, strict=True):
            if isinstance(dim, str):
                found.setdefault(dim, size)
    return found


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_argument, value)) + "]"
    return str(value).removeprefix("torch.")


def _statement(node: fx.Node, names: dict[Any, str]) -> str:
    arguments = [*map(_argument, node.args), *(f"{key}={_argument(value)}" for key, value in node.kwargs.items())]
    if node.op == "output":
        return f"return {arguments[0]}"
    call, value = f"{op_name(node.target)}({', '.join(arguments)})", node.meta.get("val")
    if value is None:
        return call
    return f"{node.name}{'' if isinstance(value, list | tuple) else f': {describe(value, names)}'} = {call}"


# Saving and loading

FILE_NAME, FORMAT_VERSION = "program.json", 1
CACHE_KINDS = {kind.__name__: kind for kind in (PagedKV, SlidingWindowKV)}


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ProgramFileError(f"{path} cannot be read ({error}). Save the program again.") from error
    if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
        raise ProgramFileError(f"{path} is not a program of format {FORMAT_VERSION}. Save it again with this version.")
    return data


def _parameter_type(tensor: torch.Tensor) -> dict[str, Any]:
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def _decode_cache(data: dict[str, Any]) -> CacheSpec:
    return CACHE_KINDS[data["kind"]](**{key: value for key, value in data.items() if key != "kind"})


def _encode_node(node: fx.Node, names: dict[Any, str]) -> dict[str, Any]:
    target = encode_target(node.target) if node.op == "call_function" else str(node.target)
    data = {"name": node.name, "op": node.op, "target": target, "args": encode(node.args)}
    data |= {"kwargs": encode(node.kwargs)["dict"]} if node.kwargs else {}
    return data | ({"value": describe(node.meta["val"], names)} if node.op != "output" else {})


class _GraphReader:
    """Builds a graph from saved nodes; every value is derived anew and compared with the saved one."""

    def __init__(self, inputs: dict[str, InputSpec], caches: dict[str, CacheSpec], parameters: dict[str, Any]) -> None:
        self.inputs, self.caches = inputs, caches
        self.mode, self.known = FakeTensorMode(shape_env=ShapeEnv()), dict[str, Any]()
        self.tensors: dict[str, Any] = {
            name: torch.nn.Parameter(torch.empty(kind["shape"], dtype=getattr(torch, kind["dtype"]), device="meta"), False)
            for name, kind in parameters.items()
        }

    def read(self, nodes: list[dict[str, Any]]) -> fx.GraphModule:
        graph, made = fx.Graph(), dict[str, fx.Node]()
        for data in nodes:
            target = decode_target(data["target"]) if data["op"] == "call_function" else data["target"]
            args, kwargs = tuple(decode(data["args"], made)), decode({"dict": data.get("kwargs", {})}, made)
            node = made[data["name"]] = graph.create_node(data["op"], target, args, kwargs, data["name"])
            if node.op != "output":
                node.meta["val"] = self.derive(node)
                self.compare(node, data)
        return fx.GraphModule(self.tensors, graph)

    def compare(self, node: fx.Node, data: dict[str, Any]) -> None:
        derived = describe(node.meta["val"], {size.node.expr: name for name, size in self.known.items()})
        if derived != data["value"]:
            raise ProgramFileError(
                f"{node.name} was saved as {data['value']}, but {data['target']} gives {derived}. Save it again."
            )

    def derive(self, node: fx.Node) -> Any:
        """The value of a node from those of its arguments, or from the spec of an input, a cache or a parameter."""
        if node.op == "placeholder" and node.name in self.inputs:
            return fake_input(self.mode, self.inputs[node.name], self.known)
        with self.mode, torch.no_grad():
            if node.op == "placeholder":
                spec = self.caches[node.name]
                return torch.empty(spec.shape(EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE), dtype=getattr(torch, spec.dtype))
            if node.op == "get_attr":
                parameter = self.tensors[str(node.target)]
                return torch.empty(parameter.shape, dtype=parameter.dtype)
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: arg.meta["val"])  # pyright: ignore
            return symbolic(node.target)(*args, **kwargs)

"""A Program: an FX graph on meta tensors and, beside it, everything that must be known to run it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from autodeploy.codec import decode_format, decode_recipe, describe, encode_recipe
from autodeploy.custom_ops import SEMANTIC_OPS
from autodeploy.errors import ProgramFileError
from autodeploy.graph_file import ValueReader, encode_node, encode_parameter, read_graph
from autodeploy.specs import (
    CacheSpec,
    InputSpec,
    LatentKV,
    Level,
    PagedKV,
    RecurrentState,
    SlidingWindowKV,
)
from autodeploy.weights import WeightPlan


@dataclass(frozen=True)
class PassRecord:
    """What one pass did."""

    name: str
    rewrites: int
    seconds: float
    op_delta: dict[str, int]
    """Op name -> nodes more (or fewer) than before."""


@dataclass(frozen=True)
class Choice:
    """Which provider some calls of a semantic op got."""

    provider: str
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Each provider preferred to it, or timed beside it -> the reasons against that one."""


@dataclass(frozen=True)
class Twin:
    """A smaller model of the same kinds of layers, whose passes were verified numerically in place of those of a large one."""

    num_layers: int
    """Attention calls."""
    num_bytes: int
    """Of its weights in float64."""
    model_bytes: int
    """Of the large model's weights in float64."""
    max_bytes: int
    """What numeric verification may take."""


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
    providers: dict[str, tuple[Choice, ...]] = field(default_factory=dict)
    """Semantic op -> the choices made for its calls, each different one once."""
    history: list[PassRecord] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)
    """Parameter or stored tensor that is not used as its format would have it -> how, and why; nothing depends on these."""
    twin: Twin | None = None
    """What the numbers were verified on, where that was not this program."""
    derived: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Calls, by their target and what they see of their arguments -> their values, as they were derived."""

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
        return {name: copy(getattr(self, name)) for name in ("inputs", "caches", "providers", "history", "remarks")}

    def check(self) -> None:
        """Placeholders are inputs then caches; parameters read are parameters planned; every value is known."""
        self._check_tables()
        bare = [node.name for node in self.graph.graph.nodes if node.op != "output" and "val" not in node.meta]
        assert not bare, f"nodes without a value in meta: {bare[:5]}"

    def _check_tables(self) -> None:
        """What holds without values too."""
        placeholders = [node.name for node in self.graph.graph.nodes if node.op == "placeholder"]
        expected = [*self.inputs, *self.caches]
        assert placeholders == expected, f"placeholders are {placeholders}, but inputs and caches are {expected}"
        read = {str(node.target) for node in self.graph.graph.nodes if node.op == "get_attr"}
        planned = set(self.weights)
        assert read == planned, f"read but not planned: {sorted(read - planned)}; planned but not read: {sorted(planned - read)}"

    def derive_values(self) -> None:
        """Give every node its value, where the program was decoded without them."""
        if any("val" not in node.meta for node in self.graph.graph.nodes if node.op == "placeholder"):
            self._value_reader().read(self.graph.graph)

    def _value_reader(self) -> ValueReader:
        return ValueReader(self.inputs, self.caches, {name: self.parameter(name) for name in self.weights})

    def op_counts(self) -> Counter[str]:
        return Counter(op_name(node.target) for node in self.graph.graph.nodes if node.op == "call_function")

    def parameter(self, name: str) -> torch.Tensor:
        """The meta tensor that stands for a parameter."""
        value: Any = self.graph
        for part in name.split("."):
            value = getattr(value, part)
        return value

    @property
    def weight_bytes(self) -> int:
        """Of all parameters together."""
        return sum(self.parameter(name).nbytes for name in self.weights)

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
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILE_NAME).write_text(self.as_json())

    def as_json(self) -> str:
        """What `save` writes."""
        names = {size.node.expr: name for name, size in symbols(self).items()}
        data = {
            "version": FORMAT_VERSION,
            "inputs": {name: asdict(spec) for name, spec in self.inputs.items()},
            "caches": {name: {"kind": type(spec).__name__, **asdict(spec)} for name, spec in self.caches.items()},
            "weights": {name: encode_recipe(recipe) for name, recipe in self.weights.recipes.items()},
            "formats": {name: asdict(stored) for name, stored in self.weights.formats.items()},
            "parameters": {name: encode_parameter(self.parameter(name)) for name in self.weights},
            "rope_thresholds": self.rope_thresholds,
            "providers": {name: [asdict(choice) for choice in choices] for name, choices in self.providers.items()},
            "history": [asdict(record) for record in self.history],
            "remarks": self.remarks,
            "twin": asdict(self.twin) if self.twin else None,
            "nodes": [encode_node(node, names) for node in self.graph.graph.nodes],
        }
        return json.dumps(data, indent=1)

    @classmethod
    def load(cls, folder: Path) -> Program:
        """Read what `save` wrote, deriving every value anew. Raises ProgramFileError when one is not what was saved."""
        data = _read(folder / FILE_NAME)
        program = _decode(data)
        program._value_reader().read(program.graph.graph, {node["name"]: node.get("value") for node in data["nodes"]})
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

FILE_NAME, FORMAT_VERSION = "program.json", 4
CACHE_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (PagedKV, SlidingWindowKV, LatentKV, RecurrentState)}


def decode_program(text: str | bytes) -> Program:
    """A program from the content of its file, without values: for one that is known to be as it was saved, and is to run."""
    program = _decode(_parse(text, FILE_NAME))
    program._check_tables()
    return program


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except (OSError, ValueError) as error:
        raise ProgramFileError(f"{path} cannot be read ({error}). Save the program again.") from error
    return _parse(text, str(path))


def _parse(text: str | bytes, name: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ProgramFileError(f"{name} cannot be read ({error}). Save the program again.") from error
    if not isinstance(data, dict) or data.get("version") != FORMAT_VERSION:
        raise ProgramFileError(f"{name} is not a program of format {FORMAT_VERSION}. Save it again with this version.")
    return data


def _decode(data: dict[str, Any]) -> Program:
    return Program(
        graph=read_graph(data["nodes"], data["parameters"]),
        inputs={name: InputSpec(**{**spec, "shape": tuple(spec["shape"])}) for name, spec in data["inputs"].items()},
        caches={name: _decode_cache(spec) for name, spec in data["caches"].items()},
        weights=WeightPlan(
            {name: decode_recipe(recipe) for name, recipe in data["weights"].items()},
            {name: decode_format(stored) for name, stored in data["formats"].items()},
        ),
        rope_thresholds=tuple(data["rope_thresholds"]),
        providers={name: tuple(map(_decode_choice, choices)) for name, choices in data["providers"].items()},
        history=[PassRecord(**record) for record in data["history"]],
        remarks=data["remarks"],
        twin=Twin(**data["twin"]) if data["twin"] else None,
    )


def _decode_cache(data: dict[str, Any]) -> CacheSpec:
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "kind"
    }
    return CACHE_KINDS[data["kind"]](**fields)


def _decode_choice(data: dict[str, Any]) -> Choice:
    return Choice(data["provider"], {name: tuple(reasons) for name, reasons in data["against"].items()})

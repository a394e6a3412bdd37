"""Layers that are alike are traced once: each later one is a mark in the trace, and becomes a copy of what the first one left.

before:  y0 = layer0(x)                     y1 = repeated([y0], [y0], 0)
after:   y0 = add(linear(x, w0), x)         y1 = add(linear(y0, w1), y0)

What a call computes is a function of what it reads. Two layers are alike when their modules hold the same, parameter for
parameter, but for numbers and strings, such as `layer_idx`, that the first one did not read while it was traced; and two calls
when their arguments are alike too. A layer that does more than return new tensors (it writes into an argument, or sets an
attribute) is not repeated.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import has_side_effect
from torch.utils._pytree import tree_flatten, tree_unflatten

from autodeploy.capture.mask_tags import MaskTag
from autodeploy.custom_ops.op import LIBRARY

SCALARS = (bool, int, float, str, type(None), torch.dtype)
PLAIN = (Tensor, *SCALARS)
Place = tuple[str, str]
"""A module's path within its layer, and the name of one of its attributes."""
DEEPEST = 8
"""Levels of containers and closures that are looked into."""
SIZES = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat)


def _nothing(values: list[Tensor], call: int) -> None:
    """Stands before and after what a call computes. values: the tensors it is given, then those it gives."""


def _like(values: list[Tensor], likes: list[Tensor], call: int) -> list[Tensor]:
    """What that call would give for these values."""
    return [torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device) for like in likes]


for _name, _schema, _function in (
    ("mark", "(Tensor[] values, int call) -> ()", _nothing),
    ("repeated", "(Tensor[] values, Tensor[] likes, int call) -> Tensor[]", _like),
):
    LIBRARY.define(_name + _schema)
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autodeploy::{_name}", _function, lib=LIBRARY)
MARK, REPEATED = torch.ops.autodeploy.mark.default, torch.ops.autodeploy.repeated.default
has_side_effect(MARK)


@dataclass(frozen=True)
class Held:
    """What a layer's modules hold."""

    form: Any
    """Equal for layers that hold the same, scalars aside."""
    scalars: Mapping[Place, Any]
    tensors: list[Tensor]
    """Parameters and buffers, each once, in the order of the modules."""


@dataclass(eq=False)
class First:
    """A call that was traced."""

    layer: nn.Module
    held: Held
    given: Any
    """Equal for arguments that are alike."""
    reads: set[Place] = field(default_factory=set)
    is_repeatable: bool = False
    leaves: list[Any] = field(default_factory=list)
    """Those of its result."""
    spec: Any = None

    @property
    def made(self) -> list[Tensor]:
        return _tensors(self.leaves)


class Repeats:
    """The calls of a model's layers while it is traced, and what becomes of them in the graph."""

    def __init__(self) -> None:
        self._firsts: list[First] = []
        self._copies: list[tuple[First, Held]] = []
        self._before: dict[int, Held] = {}
        """id of a layer -> what it holds before export puts other tensors in the place of parameters."""
        self._watched: set[tuple[type, str]] = set()
        """Classes and those of their attributes whose reads are noted."""
        self._at_work: First | None = None

    @contextmanager
    def watched(self, model: nn.Module) -> Iterator[None]:
        """Inside, calls of the model's layers come here: of what `nn.ModuleList`s hold that are in no other one."""
        lists = [layers for layers in _outer_lists(model) if len(layers) > 1]
        self._before = {id(layer): hold(layer) for layers in lists for layer in layers}
        self._watched = {place for layers in lists for place in self._varying(layers)}
        with ExitStack() as stack:
            for kind in {type(layer) for layers in lists for layer in layers}:
                stack.enter_context(_overridden(kind, "forward", self._routed(kind.forward)))
            for kind, name in self._watched:
                stack.enter_context(_overridden(kind, name, _Watched(name, self._note_read)))
            yield

    def _varying(self, layers: nn.ModuleList) -> Iterator[tuple[type, str]]:
        """Classes of modules, and those of their scalars that are not the same in all layers."""
        values: dict[Place, set[Any]] = defaultdict(set)
        kinds: dict[Place, set[type]] = defaultdict(set)
        for layer in layers:
            for (path, name), value in self._before[id(layer)].scalars.items():
                values[path, name].add(value)
                kinds[path, name].add(type(layer.get_submodule(path)))
        return ((kind, name) for (path, name), found in values.items() if len(found) > 1 for kind in kinds[path, name])

    def _routed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._at_work is not None or id(layer) not in self._before or "forward" in vars(layer):
                return forward(layer, *args, **kwargs)
            held, (leaves, given) = self._hold(layer), _given(args, kwargs)
            for first in self._firsts:
                if first.is_repeatable and first.given == given and self._is_alike(first, held):
                    return self._repeat(first, held, leaves)
            return self._trace(First(layer, held, given), functools.partial(forward, layer), args, kwargs)

        return call

    def _hold(self, layer: nn.Module) -> Held:
        before, now = self._before[id(layer)], hold(layer)
        return Held((before.form, now.form), now.scalars, before.tensors)

    def _is_alike(self, first: First, held: Held) -> bool:
        """Would the layer do what the first one did?"""
        if first.held.form != held.form:
            return False
        others = [place for place, value in first.held.scalars.items() if held.scalars[place] != value]
        is_watched = ((type(first.layer.get_submodule(path)), name) in self._watched for path, name in others)
        return first.reads.isdisjoint(others) and all(is_watched)

    def _note_read(self, module: nn.Module, name: str) -> None:
        if self._at_work is not None:
            found = (path for path, each in self._at_work.layer.named_modules() if each is module)
            self._at_work.reads.update((path, name) for path in found)

    def _trace(self, first: First, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number, (leaves, _) = len(self._firsts), _given(args, kwargs)
        tensors = _tensors(leaves)
        versions = [tensor._version for tensor in tensors]  # these count the writes
        self._firsts.append(first)
        MARK(tensors, number)
        self._at_work = first
        try:
            result = forward(*args, **kwargs)
        finally:
            self._at_work = None
        first.leaves, first.spec = tree_flatten(result)
        MARK(first.made, number)
        held, (after, given) = self._hold(first.layer), _given(args, kwargs)
        storages, others = ([tensor.untyped_storage()._cdata for tensor in found] for found in (first.made, tensors))
        first.is_repeatable = (
            all(isinstance(leaf, PLAIN) for leaf in first.leaves)
            and all(isinstance(leaf, (*PLAIN, MaskTag)) for leaf in leaves)
            and len({*storages} - {*others}) == len(storages)
            and [*map(id, after)] == [*map(id, leaves)]
            and [tensor._version for tensor in tensors] == versions
            and (given, held.form, held.scalars) == (first.given, first.held.form, first.held.scalars)
        )
        return result

    def _repeat(self, first: First, held: Held, leaves: list[Any]) -> Any:
        made = iter(REPEATED(_tensors(leaves), first.made, len(self._copies)))
        self._copies.append((first, held))
        return tree_unflatten([next(made) if isinstance(leaf, Tensor) else leaf for leaf in first.leaves], first.spec)

    def write_out(self, module: fx.GraphModule) -> None:
        """Put copies of what the first calls left where the others are marked, with the parameters of their layers."""
        graph = module.graph
        owners = {id(operator.attrgetter(str(node.target))(module)): node for node in graph.find_nodes(op="get_attr")}
        bounds: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=MARK):
            bounds[node.args[1]].append(node)
        bodies = {number: _body(start, end) for number, (start, end) in bounds.items()}
        repeated = graph.find_nodes(op="call_function", target=REPEATED)
        for node in repeated:
            first, held = self._copies[node.args[2]]  # pyright: ignore
            start, end = bounds[number := self._firsts.index(first)]
            pairs = zip(first.held.tensors, held.tensors, strict=True)
            parameters = {owners[id(there)]: owners[id(here)] for there, here in pairs if id(there) in owners}
            _copy(bodies[number], start, end, node, parameters)
        for node in (*(node for pair in bounds.values() for node in pair), *repeated):
            graph.erase_node(node)


def _outer_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outer_lists(child)


def hold(layer: nn.Module) -> Held:
    """What the layer's modules hold: parameters and buffers by shape, other attributes by what they are."""
    paths, numbers = {id(module): path for path, module in layer.named_modules()}, dict[int, int]()
    form: list[Any] = []
    tensors: list[Tensor] = []
    scalars: dict[Place, Any] = {}
    for path, module in layer.named_modules(remove_duplicate=False):
        form.append((path, paths[id(module)], type(module)))
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                for key, tensor in value.items():
                    if tensor is not None:
                        if id(tensor) not in numbers:
                            numbers[id(tensor)] = len(tensors)
                            tensors.append(tensor)
                        form.append((key, numbers[id(tensor)], name, _layout(tensor)))
            elif isinstance(value, SCALARS) and not hasattr(type(module), name):
                scalars[path, name] = (type(value), value)
                form.append(name)
            elif name != "_modules":
                form.append((name, _form_of(value, paths)))
    return Held(form, scalars, tensors)


def _layout(tensor: Tensor) -> Any:
    return type(tensor), tensor.dtype, tensor.device, [*map(str, tensor.shape)], [*map(str, tensor.stride())]


def _form_of(value: Any, paths: Mapping[int, str], depth: int = 0) -> Any:
    """Equal for values that do the same in layers with modules at these paths; what is not known is only like itself."""
    if isinstance(value, SCALARS):
        return type(value), value
    if id(value) in paths:
        return "module", paths[id(value)]
    inner = functools.partial(_form_of, paths=paths, depth=depth + 1)
    if depth < DEEPEST:
        if isinstance(value, list | tuple | set | frozenset):
            return type(value), [*map(inner, value)]
        if isinstance(value, dict):
            return type(value), [(inner(key), inner(item)) for key, item in value.items()]
        if isinstance(value, MethodType):
            return MethodType, inner(value.__func__), inner(value.__self__)
        if isinstance(value, FunctionType):
            cells = [inner(cell.cell_contents) for cell in value.__closure__ or ()]
            return FunctionType, value.__code__, cells, inner(value.__defaults__), inner(value.__kwdefaults__)
        if isinstance(value, functools.partial):
            return functools.partial, inner(value.func), inner(value.args), inner(value.keywords)
    return "object", id(value)


def _given(args: Any, kwargs: Any) -> tuple[list[Any], Any]:
    """The leaves of a call's arguments, and what is equal for calls whose arguments are alike."""
    leaves, spec = tree_flatten((args, kwargs))
    ids = [id(leaf) for leaf in leaves]
    forms = [(ids.index(id(x)), _layout(x)) if isinstance(x, Tensor) else _form_of(x, {}) for x in leaves]
    return leaves, (spec, forms)


def _tensors(leaves: list[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


class _Watched:
    """An attribute of a class's instances, with a callback at each time that one is read."""

    def __init__(self, name: str, note: Callable[[nn.Module, str], None]) -> None:
        self.name, self.note = name, note

    def __get__(self, module: nn.Module | None, kind: type) -> Any:
        if module is None or self.name not in vars(module):
            raise AttributeError(f"'{kind.__name__}' has no attribute '{self.name}'")
        self.note(module, self.name)
        return vars(module)[self.name]

    def __set__(self, module: nn.Module, value: Any) -> None:
        vars(module)[self.name] = value

    def __delete__(self, module: nn.Module) -> None:
        del vars(module)[self.name]


@contextmanager
def _overridden(kind: type, name: str, value: Any) -> Iterator[None]:
    """The class has an attribute of its own inside, over one that it may inherit."""
    own, before = name in vars(kind), vars(kind).get(name)
    setattr(kind, name, value)
    try:
        yield
    finally:
        if own:
            setattr(kind, name, before)
        else:
            delattr(kind, name)


def _body(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The calls between two marks that compute tensors; a size is the same in every copy."""
    nodes, node = [], start.next
    while node is not end:
        if node.op == "call_function" and node.target is not MARK and not isinstance(node.meta.get("val"), SIZES):
            nodes.append(node)
        node = node.next
    return nodes


def _copy(body: list[fx.Node], start: fx.Node, end: fx.Node, node: fx.Node, parameters: Mapping[fx.Node, fx.Node]) -> None:
    """Replace a mark by a copy of a first call's nodes that reads what the mark reads."""
    there, here = _path(start), _path(node)
    values: dict[fx.Node, fx.Node] = {**parameters, **dict(zip(start.args[0], node.args[0], strict=True))}  # pyright: ignore
    with node.graph.inserting_before(node):
        for each in body:
            copied = values[each] = node.graph.node_copy(each, lambda arg: values.get(arg, arg))
            if "nn_module_stack" in each.meta:
                copied.meta["nn_module_stack"] = {
                    key: (here + path.removeprefix(there) if f"{path}.".startswith(f"{there}.") else path, kind)
                    for key, (path, kind) in each.meta["nn_module_stack"].items()
                }
    for item in list(node.users):
        made: fx.Node = end.args[0][item.args[1]]  # pyright: ignore
        item.replace_all_uses_with(values.get(made, made))
        node.graph.erase_node(item)


def _path(node: fx.Node) -> str:
    return list(node.meta["nn_module_stack"].values())[-1][0]

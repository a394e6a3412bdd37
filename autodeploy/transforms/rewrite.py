"""Helpers that graph passes share: calls with known values, structural patterns, dead code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import permutations
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from autodeploy.codec import fake_input
from autodeploy.custom_ops import symbolic
from autodeploy.custom_ops.op import argument_defaults, call_arguments
from autodeploy.program import Choice, Program, symbols
from autodeploy.specs import EXAMPLE_PAGE_SIZE, EXAMPLE_PAGES, CacheSpec, input_spec

aten = torch.ops.aten
COMMUTATIVE = {aten.mul.Tensor, aten.add.Tensor}
CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.dtype_layout}

Bindings = dict[str, Any]


def val(node: Any) -> Any:
    """The fake value of a node (a constant is its own value)."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


def calls(program: Program, *targets: Any) -> list[fx.Node]:
    """Call nodes of these targets (overloads or semantic ops), in graph order."""
    wanted = {_overload(target) for target in targets}
    return [node for node in program.graph.graph.nodes if node.op == "call_function" and node.target in wanted]


def _overload(target: Any) -> Any:
    """What a node calls. Raises TypeError for `aten.square`: nodes call its overloads, such as `aten.square.default`."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [leaf for leaf in target.overloads() if "out" not in leaf]
        names, name = sorted(overloads, key=lambda leaf: leaf not in ("default", "Tensor")), str(target)
        raise TypeError(f"{name} is a packet of overloads; write {' or '.join(f'{name}.{leaf}' for leaf in names[:3])}")
    return getattr(target, "overload", target)


def named_op(name: str) -> Any:
    """The aten op of that name: "cumsum" is aten.cumsum.default, "slice.Tensor" aten.slice.Tensor."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def arguments(node: Any) -> Bindings:
    """The arguments of a call (a node, or the record of one) by their names, defaults included."""
    return call_arguments(node.target, node.args, node.kwargs)


def fake_mode(program: Program) -> FakeTensorMode:
    return next(iter(program.graph.graph.nodes)).meta["val"].fake_mode


def derived_value(program: Program, node: fx.Node) -> Any:
    """A call node's value, from its arguments' values. The calls of a layer are those of the next one, and are derived once."""
    call = node.target, _seen(node.args), _seen(tuple(node.kwargs.items()))
    if call not in program.derived:
        args, kwargs = fx.map_arg((node.args, node.kwargs), val)  # pyright: ignore
        with fake_mode(program), enable_python_dispatcher(), torch.no_grad():  # some shape rules need it for symbolic sizes
            program.derived[call] = symbolic(node.target)(*args, **kwargs)
    return program.derived[call]


def _seen(argument: Any) -> Any:
    """What a call sees of an argument, to find an equal call by: kinds of nodes; constants as text, so that 1 is not 1.0."""
    if isinstance(argument, fx.Node):
        return kind_of(argument.meta["val"])
    return tuple(map(_seen, argument)) if isinstance(argument, list | tuple) else repr(argument)


def kind_of(value: Any) -> Any:
    """What another call can see of a value: dtype, shape, layout."""
    if isinstance(value, list | tuple):
        return tuple(map(kind_of, value))
    if isinstance(value, torch.Tensor):
        return value.dtype, *map(_expression, (*value.shape, *value.stride()))
    return _expression(value)


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def evaluate_node(program: Program, node: fx.Node) -> None:
    """Note a call node's value."""
    node.meta["val"] = derived_value(program, node)


def insert_call(program: Program, before: fx.Node, target: Any, *args: Any, name: str | None = None, **kwargs: Any) -> fx.Node:
    """A new call, its value derived, in front of `before`."""
    graph = program.graph.graph
    with graph.inserting_before(before):
        node = graph.create_node("call_function", _overload(target), args, kwargs, name=name)
    node.meta["stack_trace"] = before.meta.get("stack_trace")
    evaluate_node(program, node)
    return node


def replace_call(program: Program, old: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A new call in the place of an old one, which goes, together with what only it used (a gone node has no users)."""
    node = insert_call(program, old, target, *args)
    readers = list(old.users)
    old.replace_all_uses_with(node)
    erase_unused(old)
    if _strides(val(node)) != _strides(val(old)):
        pass_on_strides(program, readers)
    return node


def pass_on_strides(program: Program, readers: list[fx.Node]) -> None:
    """Derive anew the readers of a value that has other strides than the one it replaced; and theirs, as far as it shows."""
    while readers:
        node = readers.pop()
        if node.op != "call_function":
            continue
        before = _strides(val(node))
        derive_again(program, node)
        if _strides(val(node)) != before:
            readers += node.users


def derive_again(program: Program, node: fx.Node) -> None:
    """Note a call node's value anew where its arguments may have other strides now: a view may have to copy then."""
    try:
        evaluate_node(program, node)
    except (RuntimeError, ValueError):
        if node.target is not aten.view.default:
            raise
        node.target = aten.reshape.default
        evaluate_node(program, node)


def _strides(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return list(map(_strides, value))
    return str(value.stride()) if isinstance(value, torch.Tensor) else None


def erase_unused(*nodes: fx.Node) -> None:
    """Erase calls without users, and what becomes unused by that."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if not node.users and node.op == "call_function" and not node.is_impure() and node in node.graph._find_nodes_lookup_table:
            waiting += node.all_input_nodes
            node.graph.erase_node(node)


def is_named(name: str, pattern: str) -> bool:
    """Whether a user's pattern (* stands for anything) means a parameter, whose `.weight` may be left out."""
    return fnmatch(name, pattern) or fnmatch(name.removesuffix(".weight"), pattern)


def insert_parameter(program: Program, before: fx.Node, name: str, value: torch.Tensor) -> fx.Node:
    """A `get_attr` of a new parameter in front of `before`; its recipe is the caller's to add. value: a meta tensor."""
    module: Any = program.graph
    *path, leaf = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = getattr(module, part)
    setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    with program.graph.graph.inserting_before(before):
        node = program.graph.graph.get_attr(name)
    with fake_mode(program):
        node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
    return node


def set_parameter(program: Program, name: str, value: torch.Tensor) -> None:
    """A parameter of that name becomes one like this meta tensor; its recipe, and what reads it, are the caller's."""
    *path, leaf = name.split(".")
    module: Any = program.graph
    for part in path:
        module = getattr(module, part)
    if leaf in module._buffers:
        setattr(module, leaf, value)
    else:
        setattr(module, leaf, torch.nn.Parameter(value, requires_grad=False))
    for node in program.graph.graph.find_nodes(op="get_attr", target=name):
        with fake_mode(program):
            node.meta["val"] = torch.empty(value.shape, dtype=value.dtype)


def set_arguments(node: fx.Node, changed: Mapping[str, Any]) -> None:
    """Arguments of a call, by name, become these."""
    names = list(argument_defaults(node.target))
    args, kwargs = list(node.args), dict(node.kwargs)
    for name, value in changed.items():
        if (at := names.index(name)) < len(args):
            args[at] = value
        else:
            kwargs[name] = value
    node.args, node.kwargs = tuple(args), kwargs


def insert_input(program: Program, name: str) -> fx.Node:
    """The placeholder of that input (see `specs.input_spec`), made behind the other inputs when it is not there yet."""
    placeholders = {node.name: node for node in program.graph.graph.nodes if node.op == "placeholder"}
    if name not in placeholders:
        spec = input_spec(name)
        value = fake_input(fake_mode(program), spec, symbols(program))
        with program.graph.graph.inserting_after(placeholders[list(program.inputs)[-1]]):
            placeholders[name] = program.graph.graph.placeholder(name)
        placeholders[name].meta["val"] = value
        program.inputs[name] = spec
    return placeholders[name]


def insert_cache(program: Program, prefix: str, spec: CacheSpec) -> fx.Node:
    """The placeholder of a new cache, behind the inputs and the other caches."""
    graph = program.graph.graph
    name = f"{prefix}_{sum(known.startswith(prefix) for known in program.caches)}"
    with graph.inserting_after([node for node in graph.nodes if node.op == "placeholder"][-1]):
        graph.placeholder(name)
    return set_cache(program, name, spec)


def set_cache(program: Program, name: str, spec: CacheSpec) -> fx.Node:
    """The placeholder of that name, which now is a cache like this."""
    node = next(node for node in program.graph.graph.nodes if node.op == "placeholder" and node.name == name)
    with fake_mode(program):
        node.meta["val"] = torch.empty(spec.shape(EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE), dtype=getattr(torch, spec.dtype))
    program.caches[name] = spec
    return node


def note_choice(program: Program, op: str, choice: Choice) -> None:
    """Write a choice down beside those made for other calls of the same op, unless it is one of them."""
    choices = program.providers.get(op, ())
    if choice not in choices:
        program.providers[op] = (*choices, choice)


def erase_dead(program: Program) -> None:
    """Remove calls without users and effects, parameters nobody reads and, from the plan, their recipes."""
    graph = program.graph.graph
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    program.weights = program.weights.without(set(program.weights) - read)


# Patterns. A pattern is a `Var`, a `Call`, or a constant that must be equal.


@dataclass(frozen=True)
class Var:
    """Matches any argument, the same one each time; `where` restricts it."""

    name: str
    where: Callable[[Any], bool] | None = None


@dataclass(frozen=True, init=False)
class Call:
    """Matches a call of one of `targets` with these arguments, in order or by their names; all others have their defaults."""

    targets: tuple[Any, ...]
    args: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]

    def __init__(self, targets: Any, *args: Any, **named: Any) -> None:
        targets = targets if isinstance(targets, tuple) else (targets,)
        object.__setattr__(self, "targets", tuple(map(_overload, targets)))
        object.__setattr__(self, "args", args)
        object.__setattr__(self, "named", tuple(named.items()))


@dataclass(frozen=True)
class MaybeCast:
    """Matches the inner pattern below a dtype cast, or without one."""

    inner: Any


def match(pattern: Any, value: Any, bindings: Bindings | None = None) -> Iterator[Bindings]:
    """Every way in which `value` (a node or a constant) is the pattern, as bindings of its variables."""
    bindings = bindings or {}
    if isinstance(pattern, Var):
        bound = bindings.get(pattern.name, value)
        same = bound is value or (not isinstance(value, fx.Node) and bound == value)
        if same and (pattern.where is None or pattern.where(value)):
            yield {**bindings, pattern.name: value}
    elif isinstance(pattern, MaybeCast):
        if isinstance(value, fx.Node) and value.op == "call_function" and value.target in CASTS:
            yield from match(pattern.inner, value.args[0], bindings)
        yield from match(pattern.inner, value, bindings)
    elif isinstance(pattern, Call):
        yield from _match_call(pattern, value, bindings)
    elif isinstance(pattern, list | tuple):
        if isinstance(value, list | tuple) and len(value) == len(pattern):
            yield from _match_all(tuple(pattern), tuple(value), bindings)
    elif not isinstance(value, fx.Node) and pattern == value:
        yield bindings


def _match_call(pattern: Call, node: Any, bindings: Bindings) -> Iterator[Bindings]:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target not in pattern.targets:
        return
    given, defaults, named = arguments(node), argument_defaults(node.target), dict(pattern.named)
    leading = list(given)[: len(pattern.args)]
    if len(leading) < len(pattern.args) or not named.keys() <= given.keys():
        return
    if any(given[name] != default for name, default in defaults.items() if name not in {*leading, *named}):
        return
    actual = tuple(given[name] for name in leading)
    orders = permutations(actual) if node.target in COMMUTATIVE else [actual]
    for order in orders:
        yield from _match_all((*pattern.args, *named.values()), (*order, *(given[name] for name in named)), bindings)


def _match_all(patterns: tuple[Any, ...], values: tuple[Any, ...], bindings: Bindings) -> Iterator[Bindings]:
    if not patterns:
        yield bindings
        return
    for first in match(patterns[0], values[0], bindings):
        yield from _match_all(patterns[1:], values[1:], first)


def first_match(
    patterns: dict[Any, Any], node: fx.Node, where: Callable[[fx.Node, Bindings], bool]
) -> tuple[Any, Bindings] | None:
    """(key, bindings) of the first way in which the node is one of the patterns and `where` agrees."""
    for key, pattern in patterns.items():
        for bindings in match(pattern, node):
            if where(node, bindings):
                return key, bindings
    return None

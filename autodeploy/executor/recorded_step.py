"""A step of fixed shapes as a list of calls on fixed memory: what a CUDA graph is on a GPU, for kernels of the CPU.

The first step of a shape is run node by node. Every value gets its place in an arena; of a provider that did nothing but call
kernels only the kernels' raw calls are kept, views cost nothing, and what else there is is called again and copied to its place.
Later steps of that shape copy the inputs in and run the list: no graph, no allocation, no dispatch for kernels and views.
"""

from __future__ import annotations

import math
import mmap
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from autodeploy.custom_ops import PROVIDED
from autodeploy.custom_ops.cpp import BuildError, Kernel, KernelCalls, kernels, record_kernels

ALIGNMENT = 64
ARENA_BYTES = 1 << 30
"""Of address space: memory is taken as it is first written to."""
ALLOCATES = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
COPIES = {torch.ops.aten.to.dtype, torch.ops.aten._to_copy.default, torch.ops.aten.clone.default}
_take_rows = Kernel("take_rows", "ppplll")

Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Arena:
    """Places for the values of recorded steps, which all share it, since one step runs at a time."""

    def __init__(self, num_bytes: int = ARENA_BYTES) -> None:
        self.area, self.num_bytes = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), num_bytes
        self.base = torch.frombuffer(self.area, dtype=torch.uint8).data_ptr()
        self.clear()

    def clear(self) -> None:
        """Everything is free again."""
        self._free: list[tuple[int, int]] = [(0, self.num_bytes)]  # (start, stop), in order
        self._taken: dict[int, int] = {}  # start -> stop
        self._holders: dict[int, int] = defaultdict(int)

    def owns(self, tensor: Tensor) -> bool:
        return self.base <= tensor.data_ptr() < self.base + self.num_bytes

    def place(self, like: Tensor) -> Tensor:
        """A tensor of that shape, layout and dtype, at the first place with room for it.

        Its storage ends with it: some ops of torch copy all of a storage.
        """
        steps = zip(like.shape, like.stride(), strict=True)
        extent = 1 + sum((size - 1) * stride for size, stride in steps if like.numel())
        num_bytes = -(-extent * like.element_size() // ALIGNMENT) * ALIGNMENT
        at = next((i for i, (low, high) in enumerate(self._free) if high - low >= num_bytes), None)
        assert at is not None, f"the arena of {self.num_bytes} bytes has no room for {num_bytes} more"
        start, high = self._free[at]
        stop = start + num_bytes
        self._taken[start] = stop
        self._free[at : at + 1] = [(stop, high)] if stop < high else []
        return torch.frombuffer(self.area, dtype=like.dtype, count=extent, offset=start).as_strided(like.shape, like.stride())

    def hold(self, value: Any) -> None:
        for start in self._starts(value):
            self._holders[start] += 1

    def release(self, value: Any) -> None:
        """Undo a `hold`; a place without holders is free."""
        for start in self._starts(value):
            self._holders[start] -= 1
        self.free_unheld(self._starts(value))

    def free_unheld(self, starts: set[int]) -> None:
        for start in [start for start in starts if start in self._taken and not self._holders[start]]:
            self._free.append((start, self._taken.pop(start)))
        self._free = list(_joined(sorted(self._free)))

    @property
    def unheld(self) -> set[int]:
        return {start for start in self._taken if not self._holders[start]}

    def _starts(self, value: Any) -> set[int]:
        """Where the places begin that the tensors of a value lie in."""
        taken = sorted(self._taken)
        tensors = [tensor for tensor in tree_iter(value) if isinstance(tensor, Tensor) and self.owns(tensor)]
        return {taken[bisect_right(taken, tensor.data_ptr() - self.base) - 1] for tensor in tensors}


def _joined(free: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    low = high = 0
    for start, stop in free:
        if start != high:
            if low < high:
                yield low, high
            low = start
        high = stop
    if low < high:
        yield low, high


class _Watch(TorchDispatchMode):
    """Puts what a call allocates into the arena, and notes whether torch was asked for anything but allocations and views."""

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena, self.did_more = arena, False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import dynamo, a second of start-up, only to be told to stay away

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in ALLOCATES:
            return self.arena.place(result)
        self.did_more |= not _is_view(result, (args, kwargs))
        return result


def _is_view(result: Any, given: Any) -> bool:
    """Every tensor of the result lies in the memory of one that was given."""
    storages = {tensor.untyped_storage().data_ptr() for tensor in _tensors(given) if tensor.layout is torch.strided}
    return all(tensor.untyped_storage().data_ptr() in storages for tensor in _tensors(result))


@dataclass
class RecordedStep:
    """The calls of a step, the arrays they read, and what they leave behind."""

    inputs: list[np.ndarray]
    calls: list[Call]
    output: Tensor
    kept: list[Any]
    """What does not change from step to step and is pointed to."""

    def run(self, inputs: list[np.ndarray]) -> Tensor:
        """The output [1, N, V], valid until the next step."""
        for mine, given in zip(self.inputs, inputs, strict=True):
            np.copyto(mine, given)
        for function, args in self.calls:
            function(*args)
        return self.output


def can_record(graph: fx.Graph) -> bool:
    """Whether every number in the graph follows from shapes."""
    numbers = [node for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload) and not _gives_tensors(node.target)]
    return all(node.target is torch.ops.aten.sym_size.int for node in numbers)


def _gives_tensors(op: Any) -> bool:
    return op._schema.is_mutable or all("Tensor" in str(result.type) for result in op._schema.returns)


def record(module: fx.GraphModule, inputs: list[np.ndarray], caches: list[Tensor], arena: Arena) -> RecordedStep:
    """Run a step of these shapes, and keep how to run it again. inputs: arrays, one per input of the program."""
    arena.clear()
    mine = [array.copy() for array in inputs]
    given = iter([*map(torch.from_numpy, mine), *caches])
    values: dict[fx.Node, Any] = {}
    changing: set[fx.Node] = set()
    calls: list[Call] = []
    kept: list[Any] = []
    nodes = _kernels_last(module.graph)
    last_use = _last_uses(nodes)
    for node in nodes:
        target: Any = node.target
        if node.op == "placeholder":
            values[node] = next(given)
            changing.add(node)
        elif node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
        elif node.op == "output":
            return RecordedStep(mine, list(_joined_kernels(calls)), values[node.all_input_nodes[0]], kept)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)  # pyright: ignore
            if any(source in changing for source in node.all_input_nodes):
                values[node], more = _record_call(target, args, kwargs, arena)
                calls += more
                changing.add(node)
            else:
                values[node] = target(*args, **kwargs)
                kept.append(values[node])
            arena.hold(values[node])
            arena.free_unheld(arena.unheld)  # what only the call itself needed
        for dead in last_use[node]:
            arena.release(values.pop(dead))
    raise AssertionError("a graph ends with its output")


def _joined_kernels(calls: list[Call]) -> Iterator[Call]:
    """Kernels in a row become one call."""
    for are_kernels, group in groupby(calls, lambda call: isinstance(call[0], Kernel)):
        if are_kernels:
            yield KernelCalls(list(group)), ()  # pyright: ignore[reportArgumentType]
        else:
            yield from group


def _record_call(function: Any, args: Any, kwargs: Any, arena: Arena) -> tuple[Any, list[Call]]:
    """The value of a call, in its place, and how to make it again."""
    with record_kernels() as made, _Watch(arena) as watch:
        value = function(*args, **kwargs)
    if made and not watch.did_more:
        return value, list[Call](made)
    writes = _writes(function)
    if not writes and _is_view(value, (args, kwargs)) and (not watch.did_more or isinstance(function, torch._ops.OpOverload)):
        return value, []
    places = tree_map_only(Tensor, lambda tensor: _placed(tensor, arena), value)
    if function in COPIES:
        return places, [(places.copy_, (args[0],))]
    if function is torch.ops.aten.index_select.default and (call := _rows_taken(places, *args)) is not None:
        return places, [call]
    if isinstance(places, Tensor) and (into := _writing_variant(function)) is not None:
        return places, [(_fastest(into, *args, **kwargs, out=places), ())]
    return places, [(_call_and_copy, (_tensors(places), function, args, kwargs))]


def _rows_taken(places: Tensor, source: Tensor, dim: int, ids: Tensor) -> Call | None:
    """`index_select` by a kernel, so that the calls before and behind it need not come back here; None where it cannot be one."""
    whole = all(tensor.is_contiguous() for tensor in (places, source, ids))
    if not whole or ids.dtype != torch.int64 or math.prod(source.shape[:dim]) != 1 or isinstance(kernels(), BuildError):
        return None
    row_bytes = source.itemsize * math.prod(source.shape[dim + 1 :])
    return _take_rows, (source.data_ptr(), ids.data_ptr(), places.data_ptr(), len(ids), row_bytes, torch.get_num_threads())


@cache
def _writing_variant(function: Any) -> Any:
    """The overload of an aten op that takes the same arguments, and where to write the result; None where there is none."""
    if not isinstance(function, torch._ops.OpOverload):
        return None
    given = [(argument.name, str(argument.type)) for argument in function._schema.arguments]
    for name in function.overloadpacket.overloads():
        other = getattr(function.overloadpacket, name)
        taken = [(argument.name, str(argument.type)) for argument in other._schema.arguments]
        if taken == [*given, ("out", "Tensor")]:
            return other
    return None


def _fastest(into: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """The function in torch of an overload's name, which reads its arguments in half the time, where it takes these."""
    function = getattr(torch, into.overloadpacket.__name__, None)
    with suppress(TypeError):
        if function is not None:
            function(*args, **kwargs)
            return partial(function, *args, **kwargs)
    return partial(into, *args, **kwargs)


def _placed(tensor: Tensor, arena: Arena) -> Tensor:
    return tensor if arena.owns(tensor) else arena.place(tensor).copy_(tensor)


def _call_and_copy(places: list[Tensor], function: Any, args: Any, kwargs: Any) -> None:
    value = function(*args, **kwargs)
    for place, tensor in zip(places, [value] if isinstance(value, Tensor) else _tensors(value), strict=True):
        place.copy_(tensor)


def _tensors(value: Any) -> list[Tensor]:
    return [tensor for tensor in tree_iter(value) if isinstance(tensor, Tensor)]


def _writes(function: Any) -> bool:
    """Whether a call changes what it is given."""
    if function in PROVIDED:
        return bool(PROVIDED[function][0].mutates)
    return isinstance(function, torch._ops.OpOverload) and function._schema.is_mutable


def _kernels_last(graph: fx.Graph) -> list[fx.Node]:
    """The nodes in an order in which what needs no provider comes first, so that it lies between no kernels.

    Readers of what is written keep their place, and all do where torch itself writes: to a view, say, of what others read.
    """
    writers = [node for node in graph.nodes if node.op == "call_function" and _writes(node.target)]
    if any(isinstance(node.target, torch._ops.OpOverload) for node in writers):
        return list(graph.nodes)
    held = {source for node in writers for source in node.all_input_nodes}
    last: set[fx.Node] = set()
    for node in graph.nodes:
        if (
            node.target in PROVIDED
            or node.op == "output"
            or any(source in last or source in held for source in node.all_input_nodes)
        ):
            last.add(node)
    return sorted(graph.nodes, key=last.__contains__)


def _last_uses(nodes: Sequence[fx.Node]) -> Mapping[fx.Node, list[fx.Node]]:
    """Node -> those that nobody needs after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last |= dict.fromkeys([node, *node.all_input_nodes], node)
    dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, user in last.items():
        if user.op != "output" and node.op == "call_function":
            dead[user].append(node)
    return dead


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module

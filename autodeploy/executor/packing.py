"""Parameters as the chosen providers want them: packed once while loading, dense only where something reads them so."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx

from autodeploy.custom_ops import PROVIDED
from autodeploy.custom_ops.op import call_arguments
from autodeploy.program import Program
from autodeploy.weights import Made

M_MMAP_THRESHOLD = -3
"""Of mallopt: the bytes from which on a block is the system's own."""


@dataclass
class ParameterUses:
    """Who reads a parameter of a lowered program."""

    packers: dict[str, Callable[[Any], Any]] = field(default_factory=dict)
    """Attribute of the executable graph -> what makes it of the parameter."""
    dense: bool = False
    """Something reads it as it is."""
    as_integers: bool = False
    """Those that pack it want whole numbers and scales."""
    in_parts: bool = True
    """All that read it take a list of parts in its place."""

    def store(self, tensors: dict[str, Any], name: str, tensor: Made) -> None:
        """Put the parameter among the tensors of the executable graph in every form in which it is read."""
        for attribute, pack in self.packers.items():
            tensors[attribute] = pack(tensor)
        if self.dense:
            tensors[name] = tensor


def parameter_uses(program: Program) -> dict[str, ParameterUses]:
    """By parameter name."""
    uses: dict[str, ParameterUses] = defaultdict(ParameterUses)
    for node in program.graph.graph.nodes:
        for user in node.users if node.op == "get_attr" else ():
            use, packed = uses[str(node.target)], dict(_packed(user, node))
            use.packers |= packed
            provider = PROVIDED[user.target][1] if packed else None
            use.as_integers |= provider is not None and provider.against_format is not None
            use.in_parts &= provider is not None and provider.packs_parts
            if user.all_input_nodes.count(node) and not packed:
                use.dense = True
    return dict(uses)


def bytes_of(value: Any) -> int:
    """Of a tensor, of what a provider packs, of a list of these or of functions over them."""
    if isinstance(value, list | tuple):
        return sum(map(bytes_of, value))
    if isinstance(value, partial):
        return bytes_of(value.args)
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()  # an opaque one too
    return getattr(value, "nbytes", 0)


def release_freed_memory() -> None:
    """Give the heap's free pages back to the system: what loading needed for a moment. Nothing happens where libc cannot."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def returning_blocks() -> Iterator[None]:
    """Large blocks that are freed go back to the system at once, one by one; for loading, since steps would pay for it.

    Else libc keeps what the first parameters needed for a moment among what stays. Afterwards it keeps what it would have kept.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 32 << 20)  # where it ends up by itself


def read_packed(graph: fx.Graph) -> None:
    """Calls of providers that pack read the packed form."""
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        for user in list(node.users):
            for attribute, _ in _packed(user, node):
                with graph.inserting_before(node):
                    user.replace_input_with(node, graph.get_attr(attribute))
        if not node.users:
            graph.erase_node(node)


def _packed(call: fx.Node, parameter: fx.Node) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """(attribute, how it is made) for each argument in which a call reads that parameter packed."""
    if call.target not in PROVIDED:
        return
    _, provider = PROVIDED[call.target]
    arguments = call_arguments(call.target, call.args, call.kwargs)
    for name, pack in provider.packs.items():
        if arguments[name] is parameter:
            how = getattr(pack, "__name__", f"{provider.name}_{name}").removeprefix("pack_")  # who packs alike shares it
            attribute = f"packed_{how}_{str(parameter.target).replace('.', '_')}"
            yield attribute, lambda tensor, pack=pack: pack(tensor, arguments)

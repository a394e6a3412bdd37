"""split_pieces: a lowered program in pieces that a CUDA graph can hold for any step of T tokens, and what lies between them.

What lies between depends on the lengths of requests: attention, recurrent ops, and whatever else reads or gives a value whose
size is not that of the tokens, such as the rows whose logits are wanted. The rest does the same for each token. Nothing is
rewritten: the pieces are names.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.program import Program
from autodeploy.specs import Piece, Pieces, TokenValue
from autodeploy.transforms.rewrite import val


def split_pieces(program: Program) -> Pieces:
    """The pieces in order, captured ones and others in turns. Run one after the other they do what the program does.

    q = rope_append(linear(norm(x)), cache, slot_mapping)           captured
    a = paged_attention(q, cache, page_table, cu_seqlens_q, seq_lens)
    y = linear(a) + x                                               captured
    return linear(y[:, logits_indices])
    """
    program.derive_values()
    calls = _Calls.of(program)
    groups = calls.groups()
    at = {node: i for i, (_, nodes) in enumerate(groups) for node in nodes}
    readers = defaultdict[fx.Node, list[int]](list)
    pieces, read = list[Piece](), list[list[fx.Node]]()
    for i, (_, nodes) in enumerate(groups):
        read.append([node for node in _unique(calls.reads[node] for node in nodes) if at.get(node) != i])
        for node in read[-1]:
            readers[node].append(i)
    for node in program.graph.graph.output_node().all_input_nodes:
        readers[node].append(len(groups))
    for (is_captured, nodes), needed in zip(groups, read, strict=True):
        own = {*nodes}.union(*(calls.copied[node] for node in nodes))
        names = tuple(node.name for node in program.graph.graph.nodes if node in own)
        gives = tuple(node.name for node in nodes if node in readers)
        pieces.append(Piece(names, is_captured, tuple(node.name for node in needed), gives))
    return Pieces(tuple(pieces), _placed(calls, groups, at, readers))


Group = tuple[bool, list[fx.Node]]


@dataclass
class _Calls:
    """Calls that are made once per step. reads: the calls and placeholders whose results each needs.

    Sizes, and what is computed of parameters alone, are computed in every piece that needs them: `copied` of a call.
    """

    program: Program
    tokens: Any
    """T."""
    reads: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    copied: dict[fx.Node, set[fx.Node]] = field(default_factory=dict)
    calls: list[fx.Node] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program) -> _Calls:
        nodes = program.graph.graph.nodes
        found = cls(program, val(next(node for node in nodes if node.name == "input_ids")).shape[1].node.expr)
        copies = set[fx.Node]()
        for node in nodes:
            sources = node.all_input_nodes
            if node.op == "call_function":
                found.reads[node] = list(_unique(found.reads[each] if each in copies else [each] for each in sources))
                found.reads[node] = [each for each in found.reads[node] if each.op != "get_attr"]
                found.copied[node] = {each for each in sources if each in copies}.union(
                    *(found.copied[each] for each in sources if each in copies)
                )
                if isinstance(val(node), int | torch.SymInt) or not (found.reads[node] or node.is_impure()):
                    copies.add(node)
                else:
                    found.calls.append(node)
        return found

    def groups(self) -> list[Group]:
        """(captured or not, calls that follow each other). A part of a result lies where the result does."""
        groups, at = list[Group](), dict[fx.Node, Group]()
        for node in self.calls:
            source = self.reads[node][0] if node.target is operator.getitem else None
            if source not in at:
                if not groups or groups[-1][0] != self.is_per_token(node):
                    groups.append((self.is_per_token(node), []))
                at[node] = groups[-1]
            else:
                at[node] = at[source]
            at[node][1].append(node)
        return groups

    def is_per_token(self, node: fx.Node) -> bool:
        """Whether a call reads and gives nothing but rows of tokens, caches excepted; and no size but T."""
        sizes = [val(each) for each in self.copied[node] if isinstance(val(each), torch.SymInt)]
        values = [val(each) for each in self.reads[node] if each.name not in self.program.caches]
        tensors = [leaf for value in (*values, val(node)) for leaf in _leaves(value)]
        return all(self.dim(tensor) is not None for tensor in tensors) and all(map(self._rows, sizes))

    def dim(self, tensor: Tensor) -> int | None:
        """The one that counts tokens; None where there is none, or one that counts something else."""
        found = [i for i, size in enumerate(tensor.shape) if not isinstance(size, int)]
        return found[0] if len(found) == 1 and self._rows(tensor.shape[found[0]]) else None

    def _rows(self, size: Any) -> int:
        """Per token; 0 where it is no multiple of T."""
        rows = size.node.expr / self.tokens
        return int(rows) if rows.is_Integer else 0

    def value(self, node: fx.Node, place: int) -> TokenValue:
        tensor = val(node)
        dim = self.dim(tensor)
        assert dim is not None, f"{node.name} has no row per token"
        shape = tuple(self._rows(size) if i == dim else int(size) for i, size in enumerate(tensor.shape))
        return TokenValue(shape, dim, str(tensor.dtype).removeprefix("torch."), place)


def _placed(
    calls: _Calls, groups: Sequence[Group], at: Mapping[fx.Node, int], readers: Mapping[fx.Node, list[int]]
) -> dict[str, TokenValue]:
    """The values that captured pieces give or read. A place is free again behind the last piece that reads what is in it."""
    free, num_places, values = defaultdict[Any, list[int]](list), 0, dict[str, TokenValue]()
    held = list[tuple[int, TokenValue]]()  # (last reader, value)
    for i, (is_captured, nodes) in enumerate(groups):
        for last, value in held:
            if last < i:
                free[_kind(value)].append(value.place)
        held = [(last, value) for last, value in held if last >= i]
        for node in (node for node in nodes if node in readers):
            if is_captured or any(groups[j][0] for j in readers[node] if j < len(groups)):
                kind = _kind(calls.value(node, -1))
                place = free[kind].pop() if free[kind] else num_places
                num_places = max(num_places, place + 1)
                values[node.name] = calls.value(node, place)
                held.append((max(readers[node]), values[node.name]))
    return values


def _kind(value: TokenValue) -> tuple[str, int]:
    """Values of one kind may share a place."""
    return value.dtype, prod(value.shape)


def _unique(parts: Iterable[Iterable[fx.Node]]) -> Iterable[fx.Node]:
    return dict.fromkeys(chain.from_iterable(parts))


def _leaves(value: Any) -> list[Tensor]:
    """The tensors of a call's result."""
    return [leaf for leaf in (value if isinstance(value, list | tuple) else [value]) if isinstance(leaf, Tensor)]

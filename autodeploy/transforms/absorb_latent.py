"""absorb_latent: attention over a low-rank latent reads the latent itself, not the keys and values of every head made from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.program import Program, symbols
from autodeploy.recipes import Recipe, Reshape, Slice
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, aten, calls, insert_call, insert_parameter, val
from autodeploy.transforms.trace_moves import Trace

LENGTHS = (2, 3)
"""Numbers of tokens that a layout is read at; it must be the same one."""


@dataclass(frozen=True, kw_only=True)
class AbsorbLatent(Transform):
    """Multi-head latent attention, with the product that makes keys and values of a latent moved to the queries and the result.

    Only where a token's latent is so much smaller than its keys and values that the longer dot products are worth it. H heads,
    Dn and Dr numbers of a key made from the latent [1, 1, T, R] and shared by all heads [1, 1, T, Dr].

    before:  k, v = split(view(linear(latent, kv_b)))
             y = attention(cat([q_nope, q_rope]), cat([k, expand(k_rope)]), v, ...)          keys and values [1, H, T, ...]
    after:   q = cat([q_rope, einsum(q_nope, kv_b's rows for keys)])                         [1, H, T, Dr + R]
             y = einsum(attention(q, cat([k_rope, latent]), latent, ...), kv_b's rows for values)    [1, T, H, Dv]
    """

    name: ClassVar[str] = "absorb_latent"
    effect: ClassVar[Effect] = Effect.PARAMETERS

    def apply(self, program: Program, target: Target) -> int:
        keys: dict[Any, fx.Node] = {}
        rewrites = 0
        for node in calls(program, ops.attention):
            call = arguments(node)
            if call["window"] or call["chunk"]:
                continue  # such a layer keeps few tokens as it is
            if (layout := _layout(program, node)) is not None and layout.pays:
                _absorb(program, node, layout, keys)
                rewrites += 1
        return rewrites


# The layout of one attention call


@dataclass(frozen=True)
class Rows:
    """Rows [H, width] of a linear's weight: head h has those from start + h * stride on."""

    linear: fx.Node
    start: int
    stride: int
    width: int

    @property
    def skipped(self) -> int:
        """How many of a head's `stride` rows come before its first one."""
        return min(self.start, self.stride - self.width)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the whole weight."""
        return val(self.linear.args[1]).shape

    def fit(self, num_heads: int) -> bool:
        return self.start - self.skipped + num_heads * self.stride <= self.shape[0]

    def recipe(self, weight: Recipe, num_heads: int) -> Recipe:
        """Of the whole weight [rows, R] -> [H, width, R]."""
        first = self.start - self.skipped
        if num_heads * self.stride != self.shape[0]:
            weight = Slice(weight, 0, first, first + num_heads * self.stride)
        heads = Reshape(weight, (num_heads, self.stride, self.shape[1]))
        return heads if self.stride == self.width else Slice(heads, 1, self.skipped, self.skipped + self.width)


@dataclass(frozen=True)
class Layout:
    """What the keys and values of an attention call are made of."""

    latent: fx.Node
    """[1, T, R] or with a dim of one more."""
    keys: Rows
    values: Rows
    nope: range
    """Columns of a key (and a query) that are made from the latent."""
    rope: range
    """Those that are the same for all heads."""
    shared: fx.Node | None
    """Holds these, once per token."""
    num_heads: int

    @property
    def pays(self) -> bool:
        """A token takes less memory by a larger factor than its products with a query grow by."""
        rank, one_head = val(self.latent).shape[-1], len(self.nope) + len(self.rope) + self.values.width
        return self.num_heads * one_head * one_head > (rank + len(self.rope)) * (2 * rank + len(self.rope))


def _layout(program: Program, node: fx.Node) -> Layout | None:
    """None where the values, or part of the keys, are anything but a linear of a latent, moved about."""
    symbol = symbols(program)["T"].node.expr
    layouts = [_layout_at(node, Trace(symbol, num_tokens)) for num_tokens in LENGTHS]
    return layouts[0] if layouts[0] == layouts[1] else None


def _layout_at(node: fx.Node, trace: Trace) -> Layout | None:
    q, k, v = node.args[:3]
    num_heads = val(k).shape[1]
    if num_heads < 2 or num_heads != val(q).shape[1] or (values := _rows(trace, trace.run(v))) is None:  # pyright: ignore
        return None
    addresses = trace.run(k)  # pyright: ignore
    if int(addresses.min()) < 0:
        return None
    is_shared = (addresses == addresses[:, :1]).all(dim=2).all(dim=1)[0].tolist()
    rope, nope = (_one_range(is_shared, which) for which in (True, False))
    if rope is None or not nope or (keys := _rows(trace, addresses[..., nope.start : nope.stop])) is None:
        return None
    latent = values.linear.args[0]
    holders = trace.nodes_of(addresses[:, :1, :, rope.start : rope.stop])
    shared = next((holder for holder in holders if _as_one_head(holder) is not None), None)
    if keys.linear.args[0] is not latent or (rope and shared is None) or _as_one_head(latent) is None:
        return None
    return Layout(latent, keys, values, nope, rope, shared if rope else None, num_heads)  # pyright: ignore


def _one_range(flags: list[bool], which: bool) -> range | None:
    """The columns with that flag, when they lie side by side."""
    found = [i for i, flag in enumerate(flags) if flag is which]
    columns = range(found[0], found[-1] + 1) if found else range(0)
    return columns if len(columns) == len(found) else None


def _rows(trace: Trace, addresses: Tensor) -> Rows | None:
    """Which rows of which linear's weight make [1, H, T, D]; None unless it has no bias, and heads follow each other evenly."""
    if (found := trace.source(addresses)) is None:
        return None
    linear, columns = found
    start, stride, width = int(columns[0, 0]), int(columns[1, 0] - columns[0, 0]), columns.shape[1]
    even = start + stride * torch.arange(columns.shape[0])[:, None] + torch.arange(width)
    rows = Rows(linear, start, stride, width)
    return rows if _is_plain(linear) and stride >= width and torch.equal(columns, even) and rows.fit(len(columns)) else None


def _is_plain(node: fx.Node) -> bool:
    """A linear without bias, of a parameter as it is."""
    return node.target is aten.linear.default and len(node.args) == 2 and node.args[1].op == "get_attr"  # pyright: ignore


def _as_one_head(node: Any) -> tuple[Any, ...] | None:
    """Calls (op, *arguments) that make [1, 1, T, D] of one row per token; None when it has another form."""
    shape = [size if isinstance(size, int) else "T" for size in val(node).shape]
    known: dict[tuple[Any, ...], tuple[Any, ...]] = {
        (1, 1, "T"): (),
        (1, "T", 1): ((aten.transpose.int, 1, 2),),
        (1, "T"): ((aten.unsqueeze.default, 1),),
        ("T",): ((aten.unsqueeze.default, 0), (aten.unsqueeze.default, 0)),
    }
    return known.get(tuple(shape[:-1]))


# The rewrite


def _absorb(program: Program, node: fx.Node, layout: Layout, made: dict[Any, fx.Node]) -> None:
    """made: keys that earlier calls were given, which calls with the same latent share."""
    q, _, _, *rest = cast(Any, node.args)
    into_latent = _weight(program, node, layout.keys, layout.num_heads, "keys")
    from_latent = _weight(program, node, layout.values, layout.num_heads, "values")
    absorbed = insert_call(
        program, node, aten.einsum.default, "bhtd,hdr->bhtr", [_columns(program, node, q, layout.nope), into_latent]
    )
    if layout.rope:
        absorbed = insert_call(program, node, aten.cat.default, [_columns(program, node, q, layout.rope), absorbed], -1)
    latent = made.get(layout.latent) or _one_head(program, node, layout.latent)
    keys = made.get((layout.shared, layout.latent)) or _keys(program, node, layout.shared, latent)
    made |= {layout.latent: latent, (layout.shared, layout.latent): keys}
    mixed = insert_call(program, node, ops.attention, absorbed, keys, latent, *rest, **cast(Any, node.kwargs))
    result = insert_call(program, node, aten.einsum.default, "bthr,hdr->bthd", [mixed, from_latent])
    node.replace_all_uses_with(insert_call(program, node, aten.clone.default, result, memory_format=torch.contiguous_format))
    program.graph.graph.erase_node(node)


def _keys(program: Program, before: fx.Node, shared: fx.Node | None, latent: fx.Node) -> fx.Node:
    """[1, 1, T, Dr + R]"""
    if shared is None:
        return latent
    return insert_call(program, before, aten.cat.default, [_one_head(program, before, shared), latent], -1)


def _one_head(program: Program, before: fx.Node, node: fx.Node) -> fx.Node:
    """[1, 1, T, D] of one row per token."""
    for op, *args in _as_one_head(node) or ():
        node = insert_call(program, before, op, node, *args)
    return node


def _columns(program: Program, before: fx.Node, value: fx.Node, columns: range) -> fx.Node:
    """These columns of the last dim; the part itself where the value is just joined of parts."""
    if value.target is aten.cat.default and value.args[1] in (-1, 3):
        start = 0
        for part in value.args[0]:  # pyright: ignore
            width = val(part).shape[-1]
            if range(start, start + width) == columns:
                return part  # pyright: ignore
            start += width
    return insert_call(program, before, aten.slice.Tensor, value, 3, columns.start, columns.stop)


def _weight(program: Program, before: fx.Node, rows: Rows, num_heads: int, suffix: str) -> fx.Node:
    """[H, width, R], cut out of the linear's weight."""
    source = str(rows.linear.args[1].target)  # pyright: ignore
    name, recipe = f"{source.removesuffix('.weight')}.{suffix}", rows.recipe(program.weights[source], num_heads)
    while program.weights.recipes.get(name, recipe) != recipe:
        name += "_"
    program.weights = program.weights.with_recipes({name: recipe})
    dtype = program.parameter(source).dtype
    return insert_parameter(program, before, name, torch.empty(num_heads, rows.width, rows.shape[1], dtype=dtype, device="meta"))

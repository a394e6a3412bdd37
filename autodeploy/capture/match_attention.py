"""Attention that a model computes by code of its own, as one op: products, softmax and all that stands between them.

before:  s = matmul(q, transpose(k)); s = s / 4 + mask; p = softmax(s, -1); y = matmul(p, v)
after:   y = transpose(attention(q, k, v, None, 0.25, window, ...), 1, 2)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy import custom_ops as ops
from autodeploy.capture.scores import ScoreRule, Scores
from autodeploy.custom_ops.attention import Visible
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program, op_name
from autodeploy.recipes import Initial
from autodeploy.transforms.cleanup import is_identity
from autodeploy.transforms.prove_packing import Walk, source_of
from autodeploy.transforms.rewrite import CASTS, arguments, aten, derive_again, erase_dead, insert_call, insert_parameter, val

SOFTMAX = {aten.softmax.int, aten._softmax.default}
PRODUCTS = {aten.matmul.default: (0, 1), aten.bmm.default: (0, 1), aten.baddbmm.default: (1, 2)}
"""Calls that multiply the last two dims of two of their arguments -> which ones."""
KEEPING = {
    *CASTS,
    *(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default, aten.broadcast_to.default),
    *(aten.clone.default, aten.contiguous.default, aten.alias.default, aten.unsqueeze.default, aten.squeeze.dim),
}
"""Calls that may stand between softmax and the product with the values, as long as the last two dims stay."""


@dataclass
class OwnAttention:
    """One attention of the model. result: the call that gives [1, H, T, Dv] or [H, T, Dv]; k may be transposed already."""

    q: fx.Node
    k: fx.Node
    v: fx.Node
    result: fx.Node
    rule: ScoreRule
    k_transposed: bool = False


def match_attention(program: Program, initial: dict[str, Tensor]) -> int:
    """Replace every attention written in plain calls; values of alibi are added to `initial`. Returns how many there were.

    Raises UnsupportedModelError for one that the attention op cannot say.
    """
    matcher = _Matcher(program, initial, Walk.over(program), {})
    found = 0
    for node in list(program.graph.graph.nodes):
        if node.op == "call_function" and node.users and (own := matcher.match(node)):
            _replace(program, initial, own)
            found += 1
    if found:
        program.graph.graph.eliminate_dead_code(lambda node: node.is_impure() and not is_identity(node))  # dropout that is off
        erase_dead(program)
        for node in program.graph.graph.nodes:
            if node.op == "call_function":
                derive_again(program, node)  # strides may have changed
    return found


@dataclass
class _Matcher:
    program: Program
    initial: Mapping[str, Tensor]
    tokens: Walk
    proved: dict[Any, ScoreRule]
    """Signature of a model's scores -> what they mean."""

    def match(self, node: fx.Node) -> OwnAttention | None:
        if node.target is aten.scaled_dot_product_attention.default:
            return self._attention_call(node)
        return self._softmax(node) if node.target in SOFTMAX and self._pairs(node) else None

    def _pairs(self, node: Any) -> bool:
        """Does every token meet every other one in the last two dims?"""
        value = val(node)
        return isinstance(value, Tensor) and value.dim() > 1 and all(map(self.tokens.depends, ([n] for n in value.shape[-2:])))

    def _attention_call(self, node: fx.Node) -> OwnAttention:
        call = arguments(node)
        q, k, v, mask = call["query"], call["key"], call["value"], call["attn_mask"]
        scale = call["scale"] or val(q).shape[-1] ** -0.5
        if mask is None and not call["is_causal"]:
            _refuse(node, "its attention is bidirectional: every token sees all others")
        rule = ScoreRule(1.0, Visible(), None) if mask is None else self._rule(Scores(self.program, self.initial, None, mask))
        return OwnAttention(q, k, v, node, ScoreRule(scale, rule.visible, rule.slopes))

    def _softmax(self, node: fx.Node) -> OwnAttention:
        if node.args[1] not in (-1, val(node).dim() - 1):
            _refuse(node, "its softmax runs over queries")
        product = self._product(node)
        which = PRODUCTS[product.target]  # pyright: ignore
        weighted = self._weighted_sum(node)
        rule = self._rule(Scores(self.program, self.initial, product, node.args[0]))  # pyright: ignore
        q, k = (product.args[i] for i in which)
        return OwnAttention(q, k, weighted.args[1], weighted, rule, k_transposed=True)  # pyright: ignore

    def _product(self, softmax: fx.Node) -> fx.Node:
        """The one product of queries and keys that softmax reads."""
        found, seen, waiting = [], set[fx.Node](), [softmax.args[0]]
        while waiting:
            node: Any = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.target in PRODUCTS and self._pairs(node):
                found.append(node)
            elif self._pairs(node):
                waiting += node.all_input_nodes
        if len(found) != 1:
            what = f"the sum of {len(found)} products" if found else "no plain product"
            _refuse(softmax, f"its attention scores are {what} of queries and keys")
        return found[0]

    def _weighted_sum(self, softmax: fx.Node) -> fx.Node:
        """The product of what softmax gives with the values."""
        node = softmax
        while True:
            users = list(node.users)
            if len(users) != 1 or not (users[0].target in KEEPING or is_identity(users[0]) or users[0].target in PRODUCTS):
                names = ", ".join(op_name(user.target) for user in users)
                _refuse(users[0], f"its attention weights are read by {names}, not by a product with the values alone")
            if users[0].target in PRODUCTS:
                break
            node = users[0]
            if not self._pairs(node):
                _refuse(node, "it reshapes its attention weights across tokens")
        if users[0].target is aten.baddbmm.default or users[0].args[0] is not node:
            _refuse(users[0], "its attention weights are not the first factor of a product with the values")
        return users[0]

    def _rule(self, scores: Scores) -> ScoreRule:
        key = scores.signature()
        if key not in self.proved:
            self.proved[key] = scores.rule()
        return self.proved[key]


def _refuse(node: fx.Node, reason: str) -> Any:
    raise UnsupportedModelError(reason, **source_of(node))


def _replace(program: Program, initial: dict[str, Tensor], own: OwnAttention) -> None:
    result, visible = own.result, own.rule.visible
    v = _in_heads(program, result, own.v)
    dtype = val(v).dtype
    q = _in_dtype(program, result, _in_heads(program, result, own.q), dtype)
    k = _transposed(program, result, own.k) if own.k_transposed else own.k
    k = _in_dtype(program, result, _in_heads(program, result, k), dtype)
    slopes = _slopes(program, initial, own.rule.slopes, int(val(q).shape[1]))
    numbers = (own.rule.scale, visible.window, 0.0, -1, visible.chunk)
    attention = insert_call(program, result, ops.attention, q, k, v, None, *numbers, slopes)
    attention.meta["nn_module_stack"] = result.meta.get("nn_module_stack")
    value = insert_call(program, result, aten.transpose.int, attention, 1, 2)
    if val(result).dim() == 3:
        value = insert_call(program, result, aten.squeeze.dim, value, 0)
    result.replace_all_uses_with(_in_dtype(program, result, value, val(result).dtype))


def _transposed(program: Program, before: fx.Node, node: fx.Node) -> fx.Node:
    """The last two dims swapped: what the node is the transpose of, or a transpose."""
    args: Any = node.args
    if node.target is aten.transpose.int and {dim % val(node).dim() - val(node).dim() for dim in args[1:]} == {-1, -2}:
        return args[0]
    return insert_call(program, before, aten.transpose.int, node, -1, -2)


def _in_heads(program: Program, before: fx.Node, node: fx.Node) -> fx.Node:
    """[H, T, D] or [1, H, T, D] -> [1, H, T, D]."""
    if val(node).dim() == 3:
        return insert_call(program, before, aten.unsqueeze.default, node, 0)
    if val(node).dim() != 4 or val(node).shape[0] != 1:
        _refuse(before, f"its attention runs over {list(val(node).shape)}, which is not one row of heads and tokens")
    return node


def _in_dtype(program: Program, before: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The node in that dtype: what it was cast from, or a cast."""
    if val(node).dtype == dtype:
        return node
    if node.target in CASTS and val(node.args[0]).dtype == dtype:
        return node.args[0]  # pyright: ignore
    return insert_call(program, before, aten.to.dtype, node, dtype)


def _slopes(program: Program, initial: dict[str, Tensor], slopes: Tensor | None, num_heads: int) -> fx.Node | None:
    """The parameter that holds these slopes, at the top of the graph."""
    if slopes is None:
        return None
    slopes = slopes.expand(num_heads).contiguous()
    names = [name for name in initial if name.startswith("constants.alibi_")]
    name = next((name for name in names if torch.equal(initial[name], slopes)), f"constants.alibi_{len(names)}")
    for node in program.graph.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node
    initial[name] = slopes
    program.weights = program.weights.with_recipes({name: Initial(name)})
    first = next(node for node in program.graph.graph.nodes if node.op == "call_function")
    return insert_parameter(program, first, name, slopes.to("meta"))

"""prove_packing: tokens of several requests may share one row, because nothing but attention mixes tokens.

The graph was traced for one sequence of T tokens and will be run on T tokens of many requests. This walk shows that it is right
to do so: every node either does not depend on T, or has exactly one dim that counts tokens and handles each of them by itself.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import sympy
import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.errors import UnsupportedModelError
from autodeploy.program import Program, op_name, symbols
from autodeploy.specs import Target
from autodeploy.transforms.base import Transform
from autodeploy.transforms.rewrite import arguments, aten, calls, insert_call, insert_input, named_op, val

Check = Callable[["Walk", fx.Node], None]


@dataclass(frozen=True, kw_only=True)
class ProvePacking(Transform):
    """Rewrite counting along the row to `position_ids`; refuse everything else that mixes tokens outside attention.

    before:  i = arange(T);                       rows = slice(table, 0, 0, T)
    after:   i = select(position_ids, 0, 0);      rows = index_select(table, 0, select(position_ids, 0, 0))
    """

    name: ClassVar[str] = "prove_packing"

    def apply(self, program: Program, target: Target) -> int:
        rewrites = _rewrite_counting(program) + _rewrite_table_heads(program)
        walk = Walk.over(program)
        for node in program.graph.graph.nodes:
            if node.op == "call_function" and node.users:
                walk.check(node)
        return rewrites


def _rewrite_counting(program: Program) -> int:
    """arange over T, and cumsum of ones over T, are positions of one request alone."""
    tokens, positions, rewrites = Walk.over(program), insert_input(program, "position_ids"), 0
    for node in calls(program, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.cumsum.default):
        if not node.users or (offset := _counts_from(tokens, node)) is None:
            continue
        counted = insert_call(program, node, aten.select.int, positions, 0, 0) if val(node).dim() == 1 else positions
        if offset:
            counted = insert_call(program, node, aten.add.Tensor, counted, offset)
        if val(node).dtype != val(counted).dtype:
            counted = insert_call(program, node, aten.to.dtype, counted, val(node).dtype)
        node.replace_all_uses_with(counted)
        rewrites += 1
    return rewrites


def _rewrite_table_heads(program: Program) -> int:
    """The first T rows of a table, one per token of the row, are the rows at each token's own position."""
    tokens, positions, rewrites = Walk.over(program), insert_input(program, "position_ids"), 0
    for node in calls(program, aten.slice.Tensor):
        given = arguments(node)
        dim, start, step = given["dim"], given["start"], given["step"]
        if not node.users or not _grows(tokens, node) or val(node).shape[dim] != tokens.num_tokens:
            continue
        if not isinstance(start, int | None) or (start or 0) < 0 or step != 1:
            continue
        index = insert_call(program, node, aten.select.int, positions, 0, 0)
        if start:
            index = insert_call(program, node, aten.add.Tensor, index, start)
        node.replace_all_uses_with(insert_call(program, node, aten.index_select.default, node.args[0], dim, index))
        rewrites += 1
    return rewrites


def _grows(walk: Walk, node: fx.Node) -> bool:
    """Does a part of a table have as many rows as there are tokens, although the table does not know them?"""
    return walk.depends(val(node)) and not walk.depends(val(node.args[0]))


def _counts_from(walk: Walk, node: fx.Node) -> int | None:
    """First number of a call that counts tokens in steps of one; None for any other."""
    value = val(node)
    if walk.token_dim(node, value) != value.dim() - 1 or value.shape[-1] != walk.num_tokens or value.shape[:-1].numel() != 1:
        return None
    if node.target is aten.cumsum.default:
        source = node.args[0]
        is_ones = isinstance(source, fx.Node) and (
            source.target in (aten.ones.default, aten.ones_like.default)
            or (source.target is aten.full.default and source.args[1] == 1)
        )
        return 1 if is_ones and node.args[1] in (-1, value.dim() - 1) else None
    if node.target is aten.arange.default:
        return 0
    start, *step = node.args[0], *node.args[2:3]
    return start if isinstance(start, int) and step in ([], [1]) else None


@dataclass
class Walk:
    """The symbol T and what is known about a value's dims."""

    num_tokens: Any
    symbol: Any

    @classmethod
    def over(cls, program: Program) -> Walk:
        size = symbols(program)["T"]
        return cls(size, size.node.expr)

    def check(self, node: fx.Node) -> None:
        values = [val(arg) for arg in node.all_input_nodes]
        if not any(self.depends(value) for value in (*values, val(node))):
            return
        if isinstance(val(node), torch.SymInt | torch.SymFloat | torch.SymBool):
            return  # who computes with it is refused
        rule = RULES.get(node.target)
        if rule is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
            rule = _pointwise
        if rule is None:
            refuse(node, f"{op_name(node.target)} is not known to handle each token by itself")
        for value in (*values, val(node)):
            self.token_dim(node, value)
        rule(self, node)

    def depends(self, value: Any) -> bool:
        if isinstance(value, torch.Tensor):
            return any(self.depends(size) for size in value.shape)
        if isinstance(value, list | tuple):
            return any(self.depends(item) for item in value)
        return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)

    def token_dim(self, node: fx.Node, value: Any) -> int | None:
        """The dim that counts tokens, as c * T; refuses two of them, and groups of tokens."""
        if isinstance(value, list | tuple):
            dims = {self.token_dim(node, item) for item in value}
            return dims.pop() if len(dims) == 1 else None
        if not isinstance(value, torch.Tensor):
            return None
        dims = [i for i, size in enumerate(value.shape) if self.depends(size)]
        if len(dims) > 1:
            refuse(node, "it pairs every token with every other one")
        if dims and not self.coefficient(value, dims[0]):
            refuse(node, f"it cuts the row of tokens into groups ({value.shape[dims[0]]})")
        return dims[0] if dims else None

    def coefficient(self, value: torch.Tensor, dim: int) -> int:
        """c of a dim of size c * T; 0 when it has another form."""
        size: Any = value.shape[dim]
        ratio = sympy.sympify(size.node.expr) / self.symbol
        return int(ratio) if ratio.is_Integer else 0

    def row_stride(self, value: torch.Tensor, dim: int) -> int:
        """Elements from one token to the next in row-major order (T is the outer part of a merged dim)."""
        inner = 1
        for size in value.shape[dim + 1 :]:
            inner *= size
        return inner * self.coefficient(value, dim)

    def forbid(self, node: fx.Node, source: Any, dims: Any, doing: str) -> None:
        """Refuse when one of `dims` of `source` counts tokens."""
        value = val(source)
        token_dim = self.token_dim(node, value)
        rank = value.dim()
        listed = range(rank) if dims is None or dims == [] else (dims if isinstance(dims, list | tuple) else [dims])
        if token_dim is not None and token_dim in {dim % max(rank, 1) for dim in listed}:
            refuse(node, f"{op_name(node.target)} {doing} along the row of tokens")


def refuse(node: fx.Node, reason: str) -> NoReturn:
    """Requests packed in one row would leak into each other here."""
    raise UnsupportedModelError(f"{reason}, so requests packed in one row would mix", **source_of(node))


def source_of(node: fx.Node) -> dict[str, str]:
    """Module path and "file:line" of the model's code behind a node; what is not known is empty."""
    stack = node.meta.get("nn_module_stack") or {}
    path = list(stack.values())[-1][0].removeprefix("model.") if stack else ""
    lines = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [line for line in lines if not re.search(r"/torch/|/autodeploy/(capture|custom_ops)/", line[0])] or lines
    source = f"{own[-1][0].rpartition('site-packages/')[2]}:{own[-1][1]}" if own else ""
    return {"module_path": path, "source": source}


def _allowed(walk: Walk, node: fx.Node) -> None:
    """Keeps tokens apart whatever its arguments."""


def _pointwise(walk: Walk, node: fx.Node) -> None:
    for arg in node.all_input_nodes:
        if not isinstance(val(arg), torch.Tensor) and walk.depends(val(arg)):
            refuse(node, "it computes with the number of tokens in the row")


def _fills(walk: Walk, node: fx.Node) -> None:
    """Sizes may be T, the value may not."""
    given = arguments(node)
    for name in given.keys() & {"fill_value", "s"}:
        if walk.depends(val(given[name])):
            refuse(node, "it computes with the number of tokens in the row")


def _reduces(walk: Walk, node: fx.Node) -> None:
    walk.forbid(node, node.args[0], arguments(node).get("dim"), "reduces or scans")


def _normalizes_last(walk: Walk, node: fx.Node) -> None:
    walk.forbid(node, node.args[0], list(range(-len(node.args[1]), 0)), "reduces")  # pyright: ignore


def _takes_part(walk: Walk, node: fx.Node) -> None:
    if node.target is aten.slice.Tensor and str(val(node).shape) == str(val(node.args[0]).shape):
        return  # all of it
    if node.target in (aten.slice.Tensor, aten.narrow.default) and _grows(walk, node):
        refuse(node, "it takes as many rows of a table as the row has tokens")
    dim = arguments(node)["dimension" if node.target is aten.unfold.default else "dim"]
    walk.forbid(node, node.args[0], dim, "takes part of what lies")


def _joins(walk: Walk, node: fx.Node) -> None:
    for source in node.args[0]:  # pyright: ignore
        walk.forbid(node, source, arguments(node)["dim"] % val(node).dim(), "joins")


def _indexes(walk: Walk, node: fx.Node) -> None:
    """x[i, j, ...]: looking up a table by tokens is fine, picking tokens is not."""
    indexed = [dim for dim, index in enumerate(node.args[1]) if index is not None]  # pyright: ignore
    walk.forbid(node, node.args[0], indexed or [0], "picks")


def _multiplies(walk: Walk, node: fx.Node) -> None:
    a, b = node.args[1:3] if node.target in (aten.addmm.default, aten.baddbmm.default) else node.args[:2]
    walk.forbid(node, a, -1, "sums")
    second = val(b)
    walk.forbid(node, b, -1 if node.target is aten.linear.default or second.dim() == 1 else -2, "sums")


def _sums_letters(walk: Walk, node: fx.Node) -> None:
    equation, operands = node.args[:2]
    inputs, _, result = equation.replace(" ", "").partition("->")  # pyright: ignore
    for letters, operand in zip(inputs.split(","), operands, strict=True):  # pyright: ignore
        summed = [i for i, letter in enumerate(letters) if letter not in result]
        if summed:
            walk.forbid(node, operand, summed, "sums")


def _reshapes(walk: Walk, node: fx.Node) -> None:
    before, after = val(node.args[0]), val(node)
    dim, new_dim = walk.token_dim(node, before), walk.token_dim(node, after)
    if dim is None or new_dim is None or walk.row_stride(before, dim) != walk.row_stride(after, new_dim):
        refuse(node, "it reshapes across tokens")


def _takes_rows(walk: Walk, node: fx.Node) -> None:
    """Experts: row i of the hidden states goes with row i of the router's choice."""
    rows = node.args[: 3 if node.target is ops.moe.overload else 2]
    for arg in rows:
        if walk.token_dim(node, val(arg)) != 0 or str(val(arg).shape[0]) != str(val(node).shape[0]):
            refuse(node, "its experts do not get one row per token")


def _recurs(walk: Walk, node: fx.Node) -> None:
    """Recurrent ops keep requests apart once each has a state of its own; a row per token lies along dim 1."""
    for arg in node.all_input_nodes:
        dim = walk.token_dim(node, val(arg))
        if dim is not None and (dim != 1 or walk.coefficient(val(arg), 1) != 1):
            refuse(node, "its recurrent layer does not get one row per token")


RULE_NAMES: dict[Check, str] = {
    _allowed: """
        permute transpose.int t movedim.int swapaxes numpy_T unsqueeze squeeze squeeze.dim squeeze.dims expand expand_as repeat
        contiguous clone copy to.dtype to.device to.dtype_layout _to_copy type_as alias detach lift_fresh_copy embedding
        zeros ones empty.memory_format zeros_like ones_like new_zeros new_ones new_empty sym_size.int one_hot broadcast_to
        view_as_complex view_as_real stack""",
    _fills: "full full_like new_full scalar_tensor",
    _pointwise: "multiply.Tensor divide.Tensor subtract.Tensor where.ScalarOther where.ScalarSelf where.Scalar polar",
    _reduces: """
        sum sum.dim_IntList mean mean.dim prod.dim_int amax amin max max.dim min min.dim argmax argmin any.dim all.dim
        var.correction var.dim var_mean.correction std.correction std.dim norm.ScalarOpt_dim linalg_vector_norm
        softmax.int log_softmax.int logsumexp cumsum cumprod topk sort argsort glu flip""",
    _takes_part: """
        slice.Tensor select.int narrow split.Tensor split_with_sizes chunk unbind.int unfold index_select gather scatter.src
        scatter.value index_add slice_scatter select_scatter repeat_interleave.self_int""",
    _joins: "cat concat concatenate",
    _indexes: "index.Tensor",
    _multiplies: "matmul bmm mm linear addmm baddbmm",
    _sums_letters: "einsum",
    _reshapes: "reshape reshape_as view view_as _unsafe_view flatten.using_ints unflatten.int",
    _normalizes_last: "layer_norm rms_norm",
}
"""How each aten op is checked; ops tagged pointwise are `_pointwise` without being listed."""


def _rule_table() -> dict[Any, Check]:
    table: dict[Any, Check] = {operator.getitem: _allowed, ops.attention.overload: _allowed}
    table |= dict.fromkeys((ops.moe.overload, ops.expert_linear.overload), _takes_rows)
    table |= dict.fromkeys(RECURRENT_OPS, _recurs)
    for rule, names in RULE_NAMES.items():
        for name in names.split():
            table[named_op(name)] = rule
    return table


RULES = _rule_table()

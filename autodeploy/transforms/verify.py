"""What must hold after every pass: the structure of the program. (Its numbers: `verify_numeric`.)"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.codec import FUNCTIONS, describe
from autodeploy.custom_ops import PROVIDED, SEMANTIC_OPS, symbolic
from autodeploy.custom_ops.attention import SCALED
from autodeploy.custom_ops.recurrent import RECURRENT_OPS
from autodeploy.program import NodeRecord, Program, Snapshot, op_name, symbols
from autodeploy.specs import STATES, Level
from autodeploy.transforms.base import Effect
from autodeploy.transforms.rewrite import arguments, derived_value, kind_of

ONE_DTYPE = {
    torch.ops.aten.linear.default: 3,
    ops.gated_activation.overload: 2,
    ops.add_rms_norm.overload: 2,
    ops.attention.overload: 3,
    ops.kv_append.overload: 3,
    ops.rope_append.overload: 4,
    ops.paged_attention.overload: 2,
}
"""Ops whose first arguments must share a dtype, which deriving their value does not notice; caches of 8 bits suit any."""
TURNED = {ops.rope.overload: (0, 1, 2), ops.rope_append.overload: (0, 5, 6)}
"""Ops that turn something by cos and sin, which must not widen it."""


class VerificationError(Exception):
    """A pass broke the program; `node` is the first node where it shows."""

    def __init__(self, reason: str, node: str = "") -> None:
        super().__init__(f"{node}: {reason}" if node else reason)
        self.node = node


def verify_structure(before: Snapshot, program: Program, effect: Effect) -> None:
    """Lint, level, bookkeeping and values; outputs, inputs and writes as before, unless the effect says otherwise.

    Raises VerificationError.
    """
    try:
        program.graph.graph.lint()
        program.check()
    except (AssertionError, RuntimeError) as error:
        raise VerificationError(str(error)) from error
    _check_level(program)
    _check_values(before, program)
    if effect is not Effect.INPUTS:
        _same("inputs and caches", [*before.program.inputs, *before.program.caches], [*program.inputs, *program.caches])
        _same("order of writes", _writes(record for record in before.nodes), _writes(program.graph.graph.nodes))
        _same("output", _output(before.nodes, before.program, program), _output(program.graph.graph.nodes, program, program))
    if effect not in (Effect.PARAMETERS, Effect.SHARDING, Effect.NUMERICS):
        changed = {name for name in program.weights if before.program.weights.recipes.get(name) != program.weights[name]}
        if changed:
            raise VerificationError(f"recipes of {sorted(changed)[:3]} changed, but the pass does not declare Effect.PARAMETERS")


def _forbidden(program: Program) -> set[Any]:
    """Semantic ops over caches before the graph is lowered; then those that the caches of each kind have replaced."""
    recurrent = list(RECURRENT_OPS.values())
    if program.level is not Level.LOWERED:
        return {
            ops.kv_append.overload,
            ops.rope_append.overload,
            ops.paged_attention.overload,
            *(op.cached.overload for op in recurrent),
        }
    kinds = {spec.pool == STATES for spec in program.caches.values()}
    replaced = {ops.attention.overload} if False in kinds else set()
    return replaced | ({op.whole.overload for op in recurrent} if True in kinds else set())


def _check_level(program: Program) -> None:
    forbidden = _forbidden(program)
    for node in program.graph.graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise VerificationError(f"a graph holds calls of functions only, not {node.op}", node.name)
        if node.op != "call_function":
            continue
        if node.target in forbidden:
            raise VerificationError(f"{op_name(node.target)} may not stand in a graph at level {program.level.value}", node.name)
        if not (isinstance(node.target, torch._ops.OpOverload) or node.target in FUNCTIONS.values() or node.target in PROVIDED):
            raise VerificationError(f"{op_name(node.target)} is neither an op nor a provider of one", node.name)
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and not _is_write(node):
            raise VerificationError(f"{op_name(node.target)} writes into its arguments", node.name)


def _is_write(node: Any) -> bool:
    """A call of an op that writes into one of its arguments (a node, or the record of one)."""
    op = SEMANTIC_OPS.get(symbolic(node.target)) if node.op == "call_function" else None
    return op is not None and bool(op.mutates)


def _check_values(before: Snapshot, program: Program) -> None:
    """Derive anew the value of every call that is new or reads something of another kind than before; all must agree."""
    records = {record.node: record for record in before.nodes}
    names = {size.node.expr: name for name, size in symbols(program).items()}
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or _reads_the_same(node, records.get(node), records):
            continue
        try:
            derived = derived_value(program, node)
        except Exception as error:
            reason = f"{op_name(node.target)} cannot take its arguments: {str(error).splitlines()[0]}"
            raise VerificationError(reason, node.name) from error
        if mixed := _mixed_dtypes(node):
            raise VerificationError(f"{op_name(node.target)} reads {mixed}", node.name)
        if describe(node.meta["val"], names) != describe(derived, names):
            reason = f"its value is noted as {describe(node.meta['val'], names)}, but it gives {describe(derived, names)}"
            raise VerificationError(reason, node.name)
        node.meta["val"] = derived  # the layout may have changed, and then its readers are looked at too


def _mixed_dtypes(node: fx.Node) -> str:
    """Dtypes that a call may not read together."""
    same = [dtype for dtype in _dtypes(node.args[: ONE_DTYPE.get(node.target, 0)]) if dtype not in SCALED]
    turned = _dtypes(node.args[i] for i in TURNED.get(node.target, ()))
    is_wider = bool(turned) and reduce(torch.promote_types, turned) != turned[0]
    wrong = same if len(set(same)) > 1 else turned if is_wider else []
    return " and ".join(sorted({str(dtype) for dtype in wrong}))


def _dtypes(arguments: Iterable[Any]) -> list[torch.dtype]:
    return [arg.meta["val"].dtype for arg in arguments if isinstance(arg, fx.Node)]


def _reads_the_same(node: fx.Node, record: NodeRecord | None, records: dict[fx.Node, NodeRecord]) -> bool:
    """The same call as before, on values of the same kind, with the value noted then."""
    if record is None or record.target is not node.target or record.meta["val"] is not node.meta["val"]:
        return False
    then = fx.map_arg((record.args, record.kwargs), lambda arg: kind_of(records[arg].meta["val"]))  # pyright: ignore
    now = fx.map_arg((node.args, node.kwargs), lambda arg: kind_of(arg.meta["val"]))  # pyright: ignore
    return then == now


def _same(what: str, before: Any, after: Any) -> None:
    if before != after:
        raise VerificationError(f"the {what} changed from {before} to {after}, but the pass does not declare Effect.INPUTS")


def _writes(nodes: Any) -> list[str]:
    """Which caches are written, in order."""
    return [str(_written(node)) for node in nodes if _is_write(node)]


def _written(node: Any) -> Any:
    op = SEMANTIC_OPS[symbolic(node.target)]
    return arguments(node)[op.mutates[0]]


def _output(nodes: Any, owner: Program, program: Program) -> Any:
    listed = list(nodes)
    output: Any = next(node for node in listed if node.op == "output").args[0]
    made = next(node for node in listed if getattr(node, "node", node) is output)  # a record knows the value of its time
    return describe(made.meta["val"], {size.node.expr: name for name, size in symbols(program).items()})

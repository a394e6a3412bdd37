"""quantize: matrices become the nearest ones in a format, as recipes; which kernels gain by it is chosen later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import fx

from autodeploy import custom_ops as ops
from autodeploy.errors import ConfigError
from autodeploy.formats import SCHEMES, Format
from autodeploy.program import Program
from autodeploy.recipes import Quantize as Quantized
from autodeploy.recipes import Recipe, turned
from autodeploy.specs import Target
from autodeploy.transforms.base import Effect, Transform
from autodeploy.transforms.rewrite import arguments, aten, calls, is_named


@dataclass(frozen=True, kw_only=True)
class QuantizeWeights(Transform):
    """Round the weights of linears and experts to the nearest numbers of a scheme; routers stay as they are.

    before:  linear(x, W)                 W = model.layers.0.mlp.up_proj.weight
    after:   linear(x, W)                 W = quantize(model.layers.0.mlp.up_proj.weight, int8)
    """

    name: ClassVar[str] = "quantize"
    effect: ClassVar[Effect] = Effect.NUMERICS
    scheme: str = "int8"
    """Key of `formats.SCHEMES`."""
    group_size: int = 0
    """Columns that share a scale, of int4; 0: 32."""
    lm_head: bool = True
    """Whether the output head is quantized too (to 8 bits where the scheme has fewer), and a table tied to it."""
    exclude: tuple[str, ...] = ()
    """Names of matrices that stay as they are; * stands for anything."""

    def apply(self, program: Program, target: Target) -> int:
        changed: dict[str, Recipe] = {}
        for name, form, is_transposed in self.matrices(program):
            recipe = program.weights[name]
            if _is_quantized(recipe):
                continue
            if (stored := program.weights.format_of(name, is_transposed)) is not None:
                raise ConfigError(
                    f"quantization='{self.scheme}': the checkpoint is quantized already ('{name}' is stored in {stored}). "
                    "Leave 'quantization' out, or give the unquantized checkpoint"
                )
            columns = program.parameter(name).shape[1 if is_transposed else -1]
            if columns % max(form.block[1], 1):
                program.remarks[name] = f"dense, since groups of {form.block[1]} do not divide its {columns} columns"
                continue
            changed[name] = turned(Quantized(turned(recipe), form)) if is_transposed else Quantized(recipe, form)
        program.weights = program.weights.with_recipes(changed)
        return len(changed)

    def matrices(self, program: Program) -> Iterator[tuple[str, Format, bool]]:
        """Parameter, its format, and whether its inputs come before its outputs."""
        linears = calls(program, aten.linear.default)
        for node in linears:
            form = self._head_format() if node is linears[-1] else self._format()
            if form is not None and not _is_router(node):
                yield from self._parameter(node.args[1], form, False)
        for node in calls(program, ops.moe):
            call = arguments(node)
            for argument in (call["gate_up"], call["down"]):
                yield from self._parameter(argument, self._format(), call["transposed"])

    def _parameter(self, argument: Any, form: Format, is_transposed: bool) -> Iterator[tuple[str, Format, bool]]:
        name = str(argument.target)
        if argument.op == "get_attr" and not any(is_named(name, pattern) for pattern in self.exclude):
            yield name, form, is_transposed

    def _format(self) -> Format:
        form = SCHEMES[self.scheme]
        return replace(form, block=(1, self.group_size)) if self.group_size else form

    def _head_format(self) -> Format | None:
        """Of the output head: 4 bits, and floats of 8, cost it more than they save."""
        if not self.lm_head or self.scheme not in HEADS:
            return None
        return SCHEMES[HEADS[self.scheme]]


HEADS = {"int8": "int8", "w8a8": "w8a8", "int4": "w8a8"}
"""What the output head becomes, by the scheme of the rest; it stays dense where there is none."""


def _is_quantized(recipe: Recipe) -> bool:
    return isinstance(recipe, Quantized) or any(map(_is_quantized, recipe.sources))


def _is_router(linear: fx.Node) -> bool:
    """Whether what a linear gives decides which experts are chosen."""
    seen, todo = set[fx.Node](), list(linear.users)
    while todo:
        node = todo.pop()
        if node.target in CHOOSING:
            return True
        if node not in seen and node.target not in ENDS:
            seen.add(node)
            todo += node.users
    return False


CHOOSING = {aten.topk.default, aten.sort.default, aten.argmax.default}
ENDS = {aten.linear.default, ops.moe.overload, ops.attention.overload, ops.gated_activation.overload}

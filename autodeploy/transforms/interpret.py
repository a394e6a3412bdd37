"""Run a program on made-up weights: in float64 throughout, or in its own dtypes."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from autodeploy.custom_ops import PROVIDED
from autodeploy.program import Program
from autodeploy.recipes import Leaf, Part, evaluate


def draw(name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A float64 tensor of numbers that `dtype` can hold, from a seed made of the name.

    Matrices have rows of about unit effect, vectors lie around one (norms, frequencies), integers are zero (a place in a table),
    single ones one (a factor, which would make all that it multiplies zero).
    """
    kept: torch.dtype = getattr(torch, dtype)
    if not kept.is_floating_point:
        return torch.zeros(shape, dtype=kept) if shape else torch.ones(shape, dtype=kept)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = 1 + 0.2 * values if len(shape) < 2 else values / shape[-1] ** 0.5
    return values.to(kept).double()


def parameters(program: Program, data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The program's parameters in float64, through its recipes."""

    def fetch(leaf: Leaf) -> Tensor:
        return leaf.of(data[leaf.name]) if isinstance(leaf, Part) else data[leaf.name]

    return {name: evaluate(recipe, fetch) for name, recipe in program.weights.recipes.items()}


class Interpreter(fx.Interpreter):
    """Runs a graph node by node through the references of its ops; wide: every floating value, constant and cast is float64."""

    def __init__(self, program: Program, tensors: Mapping[str, Tensor], *, wide: bool) -> None:
        super().__init__(program.graph, garbage_collect_values=True)
        self.program, self.tensors, self.wide = program, tensors, wide

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        tensor = self.tensors[target]
        kept = self.program.parameter(target).dtype
        return tensor if self.wide or not tensor.is_floating_point() else tensor.to(kept)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        function = PROVIDED[target][0].reference if target in PROVIDED else target
        if self.wide:
            args, kwargs = map_aggregate((args, kwargs), widened)  # pyright: ignore
        return function(*args, **kwargs)


def widened(value: Any) -> Any:
    """The widest dtype of its kind in place of a dtype that rounds."""
    if not isinstance(value, torch.dtype):
        return value
    return torch.float64 if value.is_floating_point else torch.complex128 if value.is_complex else value

"""What a conversion of transformers does to its tensors, as a recipe: it runs on meta tensors, and each step is written down."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from autodeploy.recipes import Cat, Permute, Recipe, Reshape, Slice, Stack

aten = torch.ops.aten
Rule = Callable[..., Any]
"""(recipes in the place of the call's tensors, the result) -> the result's recipe, or one per result."""


def recipes_of(run: Callable[[], Mapping[str, Tensor]], known: Mapping[Tensor, Recipe]) -> Mapping[str, Recipe | None]:
    """Result name -> its recipe over the `known` meta tensors; None where a step is none of the verbs of recipes."""
    recorder = _Recorder(known)
    with recorder:
        made = run()
    return {name: recorder.recipe(tensor) for name, tensor in made.items()}


class _Recorder(TorchDispatchMode):
    def __init__(self, known: Mapping[Tensor, Recipe]) -> None:
        super().__init__()
        self._known = {id(tensor): (tensor, recipe) for tensor, recipe in known.items()}
        """The tensors are held so that no id is used again."""

    def recipe(self, value: Any) -> Any:
        return self._known.get(id(value), (None, None))[1] if isinstance(value, Tensor) else value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        recipes = tree_map(self.recipe, args)
        if func in RULES and all(recipe is not None for recipe in tree_leaves(recipes)):
            made = RULES[func](result, *recipes)
            several = isinstance(result, list | tuple)
            for tensor, recipe in zip(result if several else [result], made if several else [made], strict=True):
                self._known[id(tensor)] = tensor, recipe
        return result


def _stack(result: Tensor, parts: list[Recipe], dim: int = 0) -> Recipe:
    return Stack(tuple(parts), dim % result.dim())


def _cat(result: Tensor, parts: list[Recipe], dim: int = 0) -> Recipe:
    return Cat(tuple(parts), dim % result.dim())


def _transpose(result: Tensor, source: Recipe, first: int = 0, second: int = 1) -> Recipe:
    dims = list(range(result.dim()))
    dims[first], dims[second] = dims[second], dims[first]
    return Permute(source, tuple(dims))


def _permute(result: Tensor, source: Recipe, dims: list[int]) -> Recipe:
    return Permute(source, tuple(dim % result.dim() for dim in dims))


def _reshape(result: Tensor, source: Recipe, *_: Any) -> Recipe:
    return Reshape(source, tuple(result.shape))


def _same(result: Tensor, source: Recipe, *_: Any) -> Recipe:
    return source


def _split(result: list[Tensor], source: Recipe, sizes: Any, dim: int = 0) -> list[Recipe]:
    dim, start, recipes = dim % result[0].dim(), 0, []
    for part in result:
        recipes.append(Slice(source, dim, start, start + part.shape[dim]))
        start += part.shape[dim]
    return recipes


def _unbind(result: list[Tensor], source: Recipe, dim: int = 0) -> list[Recipe]:
    dim %= result[0].dim() + 1
    return [Reshape(Slice(source, dim, i, i + 1), tuple(part.shape)) for i, part in enumerate(result)]


def _slice(result: Tensor, source: Recipe, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1) -> Any:
    if step != 1 or (start or 0) < 0:
        return None
    return Slice(source, dim % result.dim(), start or 0, (start or 0) + result.shape[dim])


def _select(result: Tensor, source: Recipe, dim: int, index: int) -> Recipe | None:
    return None if index < 0 else Reshape(Slice(source, dim % (result.dim() + 1), index, index + 1), tuple(result.shape))


RULES: dict[Any, Rule] = {
    aten.stack.default: _stack,
    aten.cat.default: _cat,
    aten.transpose.int: _transpose,
    aten.t.default: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _reshape,
    aten._unsafe_view.default: _reshape,
    aten.unsqueeze.default: _reshape,
    aten.squeeze.dim: _reshape,
    aten.clone.default: _same,
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.unbind.int: _unbind,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
}

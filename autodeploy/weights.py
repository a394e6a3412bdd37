"""A program's parameters: the plan of one recipe each, and the loader that evaluates them one parameter at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from autodeploy.errors import CheckpointError
from autodeploy.formats import Format, Integers
from autodeploy.light_torch import for_shapes_alone
from autodeploy.recipes import (
    BrokenTensorError,
    Cast,
    Cat,
    Dequantize,
    Fetch,
    Initial,
    Join,
    Leaf,
    Pad,
    Part,
    Recipe,
    Stack,
    evaluate,
    format_of,
    formats_in,
    integers,
    substitute,
)


@dataclass(frozen=True)
class WeightPlan:
    """Parameter name -> recipe. Passes edit it together with the graph; no tensor exists while they do."""

    recipes: Mapping[str, Recipe]
    formats: Mapping[str, Format] = field(default_factory=dict)
    """Tensor that recipes take -> how it is stored, where it is not dense."""

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    def __getitem__(self, name: str) -> Recipe:
        return self.recipes[name]

    def with_recipes(self, changed: Mapping[str, Recipe]) -> WeightPlan:
        return replace(self, recipes={**self.recipes, **changed})

    def without(self, names: set[str]) -> WeightPlan:
        return replace(self, recipes={name: recipe for name, recipe in self.recipes.items() if name not in names})

    def format_of(self, name: str, is_turned: bool = False) -> Format | None:
        """The format of a parameter, all of it; None: it is dense, or in several. is_turned: of its matrices, turned."""
        return format_of(self.recipes[name], self.formats, is_turned)

    def formats_in(self, name: str) -> set[Format | None]:
        """The formats of the parts of a parameter (None: dense)."""
        return formats_in(self.recipes[name], self.formats)

    def substitute(self, leaves: Mapping[str, Recipe]) -> WeightPlan:
        """The plan over the tensors that `leaves` are made of."""
        return WeightPlan({name: substitute(recipe, leaves) for name, recipe in self.recipes.items()})


class TensorSource(Protocol):
    """Where the leaves come from. What a mapped source answers still lies in a file, and is copied."""

    @property
    def mapped(self) -> bool: ...

    def fetch(self, leaf: Leaf) -> Tensor: ...

    def where(self, name: str) -> str:
        """The file that holds a tensor, for messages."""
        ...


@dataclass
class LiveSource:
    """The tensors of a model in memory (and its initial buffers), shared, never copied."""

    tensors: Mapping[str, Tensor]
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    mapped: bool = False

    def fetch(self, leaf: Leaf) -> Tensor:
        tensor = (self.initial if isinstance(leaf, Initial) else self.tensors)[leaf.name]
        return leaf.of(tensor) if isinstance(leaf, Part) else tensor

    def where(self, name: str) -> str:
        return "the model in memory"


Made = Tensor | Integers | list[Tensor]
"""What is made of a recipe: the tensor, its whole numbers and scales, or the parts of its rows."""


def materialize(
    plan: WeightPlan,
    source: TensorSource,
    device: str = "cpu",
    used_up: Collection[str] = (),
    as_integers: Collection[str] = (),
    in_parts: Collection[str] = (),
) -> Iterator[tuple[str, Made]]:
    """Yield (parameter name, tensor) one at a time: at most one parameter exists beside those already yielded.

    A parameter that is a live tensor unchanged *is* that tensor; one that would still point into a mapped file is copied.
    used_up: names of those that are read at once and not kept, and so need no copy. as_integers: names of those that are not
    made dense. in_parts: names of used up ones that need not be joined. Raises CheckpointError for scales that are not finite.
    """
    for name, recipe in plan.recipes.items():
        try:
            if name in as_integers:
                made = integers(recipe, source.fetch).to(device)
            elif name in in_parts and isinstance(recipe, Cat) and recipe.dim == 0:
                made = [_dense(part, source, True).to(device) for part in recipe.parts]
            else:
                made = _dense(recipe, source, name in used_up).to(device)
        except BrokenTensorError as error:
            raise CheckpointError(f"{source.where(error.tensor)}: {error}") from error
        yield name, made


def _dense(recipe: Recipe, source: TensorSource, is_used_up: bool) -> Tensor:
    fetched: list[Tensor] = []

    def fetch(leaf: Leaf) -> Tensor:
        fetched.append(source.fetch(leaf))
        return fetched[-1]

    tensor = _assembled(recipe, fetch) if _has_parts(recipe) else evaluate(recipe, fetch).detach()
    if source.mapped and not is_used_up and any(_storage(tensor) == _storage(leaf) for leaf in fetched):
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


def _has_parts(recipe: Recipe) -> bool:
    return isinstance(recipe.source if isinstance(recipe, Cast) else recipe, Join)


def _assembled(recipe: Recipe, fetch: Fetch) -> Tensor:
    like = shape_of(recipe, fetch)
    device = next(fetch(leaf).device for leaf in recipe.leaves())  # that of a live model
    result = torch.empty(like.shape, dtype=like.dtype, device=device)
    with torch.no_grad():
        _fill(recipe, result, fetch)
    return result


def shape_of(recipe: Recipe, fetch: Fetch) -> Tensor:
    """A meta tensor of the recipe's shape and dtype."""
    with for_shapes_alone():  # code of transformers in it comes from a model that was traced in this process
        return _shape_of(recipe, fetch)


def _shape_of(recipe: Recipe, fetch: Fetch) -> Tensor:
    """Joins are computed here: torch's own on meta tensors are written in Python, and the first one imports dynamo (2 s)."""
    if isinstance(recipe, Leaf):
        return torch.empty_like(fetch(recipe), device="meta")
    if isinstance(recipe, Dequantize):
        return torch.empty(recipe.shape, dtype=torch.float32, device="meta")
    if isinstance(recipe, Pad):
        source = _shape_of(recipe.source, fetch)
        return source.new_empty([recipe.size if dim == recipe.dim else size for dim, size in enumerate(source.shape)])
    like = [_shape_of(source, fetch) for source in recipe.sources]
    if not isinstance(recipe, Join):
        return recipe.apply(*like)
    shape = list(like[0].shape)
    if isinstance(recipe, Cat):
        shape[recipe.dim] = sum(part.shape[recipe.dim] for part in like)
    else:
        shape.insert(recipe.dim, len(like))
    return torch.empty(shape, dtype=reduce(torch.promote_types, (part.dtype for part in like)), device="meta")


def _fill(recipe: Recipe, out: Tensor, fetch: Fetch) -> None:
    """Write the recipe's tensor into `out`, part by part: nothing larger than one part exists beside it."""
    match recipe:
        case Stack(parts, dim):
            for part, place in zip(parts, out.unbind(dim), strict=True):
                _fill(part, place, fetch)
        case Cat(parts, dim):
            sizes = [shape_of(part, fetch).shape[dim] for part in parts]
            for part, place in zip(parts, out.split(sizes, dim), strict=True):
                _fill(part, place, fetch)
        case Cast(Join() as source, dtype) if dtype == out.dtype:
            _fill(source, out, fetch)  # parts hold numbers as they are stored: they are rounded when they are written
        case _:
            out.copy_(evaluate(recipe, fetch))


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage().data_ptr()

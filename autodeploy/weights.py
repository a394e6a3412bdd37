"""How checkpoint bytes become parameters: one recipe per parameter, evaluated one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """One step from sources to a tensor; a leaf has none. `str()` is the formula shown in program text."""

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return ()

    def leaves(self) -> Iterator[Recipe]:
        """Every `Take` and `Initial` below."""
        if not self.sources:
            yield self
        for source in self.sources:
            yield from source.leaves()

    def apply(self, *tensors: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} is a leaf")


@dataclass(frozen=True)
class Take(Recipe):
    """A tensor of the checkpoint folder or of the live model, by its name there."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Initial(Recipe):
    """A value that no checkpoint holds: a non-persistent buffer or a constant, as the model's constructor made it."""

    name: str

    def __str__(self) -> str:
        return f"initial({self.name})"


@dataclass(frozen=True)
class Unary(Recipe):
    source: Recipe

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Cast(Unary):
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.source}.to({str(self.dtype).removeprefix('torch.')})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return tensors[0].to(self.dtype)


@dataclass(frozen=True)
class Reshape(Unary):
    """The same numbers in row-major order, in another shape."""

    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.source}.reshape({', '.join(map(str, self.shape))})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return tensors[0].reshape(self.shape)


@dataclass(frozen=True)
class Slice(Unary):
    """Elements [start, stop) of one dim."""

    dim: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.source}[{':, ' * self.dim}{self.start}:{self.stop}]"

    def apply(self, *tensors: Tensor) -> Tensor:
        return tensors[0].narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Permute(Unary):
    """The dims in another order, laid out anew."""

    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.source}.permute({', '.join(map(str, self.dims))})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return tensors[0].permute(self.dims).contiguous()


@dataclass(frozen=True)
class Stack(Recipe):
    """Parts of one shape along a new dim, such as the experts of a layer."""

    parts: tuple[Recipe, ...]
    dim: int

    def __str__(self) -> str:
        shown = map(str, self.parts) if len(self.parts) <= 3 else (str(self.parts[0]), "...", str(self.parts[-1]))
        return f"stack({', '.join(shown)}, dim={self.dim})"

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.parts

    def apply(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors, dim=self.dim)


@dataclass(frozen=True)
class Cat(Recipe):
    parts: tuple[Recipe, ...]
    dim: int

    def __str__(self) -> str:
        return f"cat({', '.join(map(str, self.parts))}, dim={self.dim})"

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.parts

    def apply(self, *tensors: Tensor) -> Tensor:
        return torch.cat(tensors, dim=self.dim)


@dataclass(frozen=True, eq=False)
class Convert(Recipe):
    """A conversion that transformers defines and that is none of the verbs above.

    convert maps {pattern: tensors} to {target name: tensor}; `target` is the one wanted here.
    """

    groups: tuple[tuple[str, tuple[Recipe, ...]], ...]
    convert: Callable[[dict[str, list[Tensor]]], Mapping[str, Tensor]]
    target: str

    def __str__(self) -> str:
        return f"convert({', '.join(map(str, self.sources))})"

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return tuple(recipe for _, recipes in self.groups for recipe in recipes)

    def apply(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        collected = {pattern: [next(remaining) for _ in recipes] for pattern, recipes in self.groups}
        return self.convert(collected)[self.target]


Fetch = Callable[[Recipe], Tensor]


def evaluate(recipe: Recipe, fetch: Fetch) -> Tensor:
    """The recipe's tensor; `fetch` answers for the leaves. May share memory with a leaf."""
    if not recipe.sources:
        return fetch(recipe)
    return recipe.apply(*(evaluate(source, fetch) for source in recipe.sources))


def shape_of(recipe: Recipe, fetch: Fetch) -> Tensor:
    """A meta tensor of the recipe's shape and dtype.

    Joins are computed here: torch's own on meta tensors are written in Python, and the first one imports dynamo (2 s).
    """
    if not recipe.sources:
        return torch.empty_like(fetch(recipe), device="meta")
    like = [shape_of(source, fetch) for source in recipe.sources]
    if not isinstance(recipe, Cat | Stack):
        return recipe.apply(*like)
    shape = list(like[0].shape)
    if isinstance(recipe, Cat):
        shape[recipe.dim] = sum(part.shape[recipe.dim] for part in like)
    else:
        shape.insert(recipe.dim, len(like))
    return torch.empty(shape, dtype=reduce(torch.promote_types, (part.dtype for part in like)), device="meta")


def fill(recipe: Recipe, out: Tensor, fetch: Fetch) -> None:
    """Write the recipe's tensor into `out`, part by part: nothing larger than one part exists beside it."""
    match recipe:
        case Stack(parts, dim):
            for part, place in zip(parts, out.unbind(dim), strict=True):
                fill(part, place, fetch)
        case Cat(parts, dim):
            sizes = [shape_of(part, fetch).shape[dim] for part in parts]
            for part, place in zip(parts, out.split(sizes, dim), strict=True):
                fill(part, place, fetch)
        case Cast(Stack() | Cat() as source, dtype) if dtype == out.dtype:
            fill(source, out, fetch)  # parts hold numbers as they are stored: they are rounded when they are written
        case _:
            out.copy_(evaluate(recipe, fetch))


def substitute(recipe: Recipe, leaves: Mapping[str, Recipe]) -> Recipe:
    """The recipe with each `Take(name)` replaced by `leaves[name]`."""
    match recipe:
        case Take(name):
            return leaves.get(name, recipe)
        case Unary():
            return replace(recipe, source=substitute(recipe.source, leaves))
        case Cat() | Stack():
            return replace(recipe, parts=tuple(substitute(part, leaves) for part in recipe.parts))
        case _:
            return recipe


@dataclass(frozen=True)
class WeightPlan:
    """Parameter name -> recipe. Passes edit it together with the graph; no tensor exists while they do."""

    recipes: Mapping[str, Recipe]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recipes)

    def __len__(self) -> int:
        return len(self.recipes)

    def __getitem__(self, name: str) -> Recipe:
        return self.recipes[name]

    def with_recipes(self, changed: Mapping[str, Recipe]) -> WeightPlan:
        return WeightPlan({**self.recipes, **changed})

    def without(self, names: set[str]) -> WeightPlan:
        return WeightPlan({name: recipe for name, recipe in self.recipes.items() if name not in names})

    def substitute(self, leaves: Mapping[str, Recipe]) -> WeightPlan:
        return WeightPlan({name: substitute(recipe, leaves) for name, recipe in self.recipes.items()})


class TensorSource(Protocol):
    """Where the leaves come from. What a mapped source answers still lies in a file, and is copied."""

    @property
    def mapped(self) -> bool: ...

    def fetch(self, leaf: Recipe) -> Tensor: ...


@dataclass
class LiveSource:
    """The tensors of a model in memory (and its initial buffers), shared, never copied."""

    tensors: Mapping[str, Tensor]
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    mapped: bool = False

    def fetch(self, leaf: Recipe) -> Tensor:
        assert isinstance(leaf, Take | Initial)
        return (self.initial if isinstance(leaf, Initial) else self.tensors)[leaf.name]


def materialize(plan: WeightPlan, source: TensorSource, device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Yield (parameter name, tensor) one at a time: at most one parameter exists beside those already yielded.

    A parameter that is a live tensor unchanged *is* that tensor; one that would still point into a mapped file is copied.
    """
    for name, recipe in plan.recipes.items():
        fetched: list[Tensor] = []

        def fetch(leaf: Recipe, fetched: list[Tensor] = fetched) -> Tensor:
            fetched.append(source.fetch(leaf))
            return fetched[-1]

        tensor = _assembled(recipe, fetch) if _has_parts(recipe) else evaluate(recipe, fetch).detach()
        if source.mapped and any(_storage(tensor) == _storage(leaf) for leaf in fetched):
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        yield name, tensor.to(device)


def _has_parts(recipe: Recipe) -> bool:
    return isinstance(recipe.source if isinstance(recipe, Cast) else recipe, Cat | Stack)


def _assembled(recipe: Recipe, fetch: Fetch) -> Tensor:
    like = shape_of(recipe, fetch)
    result = torch.empty(like.shape, dtype=like.dtype)
    with torch.no_grad():
        fill(recipe, result, fetch)
    return result


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage().data_ptr()

"""Recipes: how one parameter is made of checkpoint tensors, as steps that can be shown, saved, composed and evaluated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from autodeploy.errors import CheckpointError
from autodeploy.formats import BrokenPartError, Format, Integers

T = TypeVar("T")
TURNED = (0, 2, 1)
"""The dims of matrices [E, N, K] as they are permuted to [E, K, N]."""
Ranges = tuple[tuple[tuple[int, int], ...], ...]
"""Of each rank, the (start, stop) that it has of a dim, in the order in which they lie there; (-n, 0) stands for n zeros."""


def shown(ranges: Ranges) -> str:
    """0:8|8:16; the first four ranks."""
    few = "|".join("+".join(f"{start}:{stop}" for start, stop in own) for own in ranges[:4])
    return few + ("|..." if len(ranges) > 4 else "")


class BrokenTensorError(CheckpointError):
    """A stored tensor cannot be used. Its file is not known here."""

    def __init__(self, tensor: str, reason: str) -> None:
        super().__init__(f"tensor '{tensor}': {reason}. Download the checkpoint again, or quantize anew.")
        self.tensor = tensor


@dataclass(frozen=True)
class Recipe:
    """One step from sources to a tensor; a leaf has none. `str()` is the formula shown in program text."""

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return ()

    def leaves(self) -> Iterator[Leaf]:
        """Every `Take` and `Initial` below."""
        for source in self.sources:
            yield from source.leaves()

    def apply(self, *tensors: Tensor) -> Tensor:
        """This step alone, of its sources' tensors."""
        raise NotImplementedError


@dataclass(frozen=True)
class Leaf(Recipe):
    """What is fetched by name, not made of anything."""

    name: str

    def leaves(self) -> Iterator[Leaf]:
        yield self


@dataclass(frozen=True)
class Take(Leaf):
    """A tensor of the checkpoint folder or of the live model, by its name there."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Part(Take):
    """A box of such a tensor, which is all that is read of it."""

    bounds: tuple[tuple[int, int, int], ...]
    """(dim, start, stop), by dim; the other dims are whole."""

    def __str__(self) -> str:
        inner = {dim: f"{start}:{stop}" for dim, start, stop in self.bounds}
        return f"{self.name}[{', '.join(inner.get(dim, ':') for dim in range(max(inner) + 1))}]"

    def of(self, tensor: Tensor) -> Tensor:
        """This part of the whole tensor, without a copy."""
        for dim, start, stop in self.bounds:
            tensor = tensor.narrow(dim, start, stop - start)
        return tensor


@dataclass(frozen=True)
class Initial(Leaf):
    """A value that no checkpoint holds: a non-persistent buffer or a constant, as the model's constructor made it."""

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
class Pad(Unary):
    """Zeros behind the last element of a dim, up to a size."""

    dim: int
    size: int

    def __str__(self) -> str:
        return f"pad({self.source}, dim={self.dim}, size={self.size})"

    def apply(self, *tensors: Tensor) -> Tensor:
        (tensor,) = tensors
        shape = list(tensor.shape)
        shape[self.dim] = self.size - shape[self.dim]
        return torch.cat([tensor, tensor.new_zeros(shape)], self.dim)


@dataclass(frozen=True)
class Shard(Unary):
    """What one of several ranks has of a dim: ranges of it, one after the other.

    All ranks have the same recipe; `autodeploy.shards` makes of it what one of them reads.
    """

    dim: int
    """Counted from the last one (-1)."""
    ranges: Ranges

    def __str__(self) -> str:
        return f"shard({self.source}, dim={self.dim}, {shown(self.ranges)})"


@dataclass(frozen=True)
class Numbers(Recipe):
    """Whole numbers that are known beforehand."""

    values: tuple[int, ...]

    def __str__(self) -> str:
        return str(list(self.values))

    def apply(self, *tensors: Tensor) -> Tensor:
        return torch.tensor(self.values)


@dataclass(frozen=True)
class Permute(Unary):
    """The dims in another order, laid out anew."""

    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.source}.permute({', '.join(map(str, self.dims))})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return tensors[0].permute(self.dims).contiguous()


@dataclass(frozen=True)
class Join(Recipe):
    parts: tuple[Recipe, ...]
    dim: int

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.parts


@dataclass(frozen=True)
class Stack(Join):
    """Parts of one shape along a new dim, such as the experts of a layer."""

    def __str__(self) -> str:
        shown = map(str, self.parts) if len(self.parts) <= 3 else (str(self.parts[0]), "...", str(self.parts[-1]))
        return f"stack({', '.join(shown)}, dim={self.dim})"

    def apply(self, *tensors: Tensor) -> Tensor:
        return torch.stack(tensors, dim=self.dim)


@dataclass(frozen=True)
class Cat(Join):
    """Parts one after the other along a dim."""

    def __str__(self) -> str:
        return f"cat({', '.join(map(str, self.parts))}, dim={self.dim})"

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


@dataclass(frozen=True)
class Dequantize(Recipe):
    """The dense matrix, in float32, of a quantized one: its codes, scales and so on are the parts."""

    parts: tuple[Recipe, ...]
    format: Format
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"dequantize({self.parts[0]}, {self.format.name})"

    @property
    def sources(self) -> tuple[Recipe, ...]:
        return self.parts

    def apply(self, *tensors: Tensor) -> Tensor:
        """Raises BrokenTensorError for scales that are not finite."""
        if tensors[0].is_meta:
            return torch.empty(self.shape, dtype=torch.float32, device="meta")
        return self.with_blame(lambda: self.format.dequantize(self.shape, *tensors))

    def with_blame(self, work: Callable[[], T]) -> T:
        """What the work gives; a BrokenPartError of its becomes a BrokenTensorError."""
        try:
            return work()
        except BrokenPartError as error:
            part = self.parts[self.format.parts.index(error.part)]
            raise BrokenTensorError(next(part.leaves()).name, str(error)) from error


@dataclass(frozen=True)
class Quantize(Unary):
    """The matrix that is nearest to the source in a format, dense, in the source's dtype."""

    format: Format

    def __str__(self) -> str:
        return f"quantize({self.source}, {self.format})"

    def apply(self, *tensors: Tensor) -> Tensor:
        (dense,) = tensors
        if dense.is_meta:
            return dense
        return self.format.dequantize(tuple(dense.shape), *self.format.quantize(dense)).to(dense.dtype)


MILLION = 1 << 20
Fetch = Callable[[Leaf], Tensor]


def evaluate(recipe: Recipe, fetch: Fetch) -> Tensor:
    """The recipe's tensor; `fetch` answers for the leaves. May share memory with a leaf."""
    if isinstance(recipe, Leaf):
        return fetch(recipe)
    return recipe.apply(*(evaluate(source, fetch) for source in recipe.sources))


def turned(recipe: Recipe) -> Recipe:
    """The recipe of the same matrices the other way round: without the step that turned them, if there is one."""
    match recipe:
        case Permute(source, dims) if dims == TURNED:
            return source
        case Cast(source, dtype):
            return Cast(turned(source), dtype)
        case _:
            return Permute(recipe, TURNED)


def format_of(recipe: Recipe, stored: Mapping[str, Format], is_turned: bool = False) -> Format | None:
    """The one format in which all numbers of a recipe's tensor are to be had; None where there is none.

    stored: formats of the tensors that `Take` names, where these are not dense. is_turned: of its matrices the other way round.
    """
    match recipe:
        case Take(name):
            form = stored.get(name)
            return replace(form, turned=False) if form is not None and form.turned == is_turned else None
        case Cast(source):
            return format_of(source, stored, is_turned)
        case Permute(source, dims) if dims == TURNED:
            return format_of(source, stored, not is_turned)
        case _ if is_turned:
            return None
        case Dequantize() | Quantize():
            return recipe.format
        case Shard(source, dim, ranges):
            form = format_of(source, stored)
            return form if form is None or dim < -1 or _keeps_groups(form, ranges) else None
        case Join(parts) if _joins_rows(recipe):
            formats = {format_of(part, stored) for part in parts}
            form = formats.pop() if len(formats) == 1 else None
            return None if form is None or "order" in form.parts else form  # each has an order of its own
        case _:
            return None


def formats_in(recipe: Recipe, stored: Mapping[str, Format]) -> set[Format | None]:
    """Every format in which some number of a recipe's tensor is stored (None: dense)."""
    if isinstance(recipe, Dequantize | Quantize):
        return {recipe.format}
    if isinstance(recipe, Take):
        return {stored.get(recipe.name)}
    return {form for source in recipe.sources for form in formats_in(source, stored)}


def _keeps_groups(form: Format, ranges: Ranges) -> bool:
    """Whether every rank has whole groups of columns, and nothing else."""
    bounds = [bound for own in ranges for pair in own for bound in pair]
    return "order" not in form.parts and min(bounds) >= 0 and not any(bound % max(form.block[1], 1) for bound in bounds)


def _joins_rows(recipe: Join) -> bool:
    """Whether rows of matrices are joined, or whole matrices: each keeps its scales."""
    parts = [part.source if isinstance(part, Cast | Quantize) else part for part in recipe.parts]
    return recipe.dim == 0 or (recipe.dim == 1 and isinstance(recipe, Cat) and all(isinstance(part, Stack) for part in parts))


def integers(recipe: Recipe, fetch: Fetch) -> Integers:
    """The tensor of a recipe whose format is one of whole numbers, as such; `fetch` answers for the leaves."""
    match recipe:
        case Dequantize(parts, format, shape):
            return recipe.with_blame(lambda: format.integers(shape, *(evaluate(part, fetch) for part in parts)))
        case Quantize(source, format) if "factor" in format.parts:  # one for all of it
            dense = evaluate(source, fetch)
            return format.integers(tuple(dense.shape), *format.quantize(dense))
        case Quantize(Cast(Join(parts) as joined, dtype), format):
            return integers(Quantize(replace(joined, parts=tuple(Cast(part, dtype) for part in parts)), format), fetch)
        case Quantize(Join(parts) as joined, format) if _joins_rows(joined):  # not all of them need to be dense at a time
            return integers(replace(joined, parts=tuple(Quantize(part, format) for part in parts)), fetch)
        case Quantize(source, format):
            dense = evaluate(source, fetch)
            parts = dense.split(max(1, MILLION // max(1, dense[0].numel())))  # as float32 they should fit in the caches
            return Integers.joined([format.integers(tuple(part.shape), *format.quantize(part)) for part in parts], torch.cat)
        case Cast(source):
            return integers(source, fetch)
        case Slice(source, dim, start, stop):
            return integers(source, fetch).narrow(dim, start, stop)
        case Pad(source, dim, size):
            return integers(source, fetch).padded(dim, size)
        case Join(parts):
            return Integers.joined([integers(part, fetch) for part in parts], lambda tensors: recipe.apply(*tensors))
    raise AssertionError(f"{recipe} is not made of whole numbers")


def substitute(recipe: Recipe, leaves: Mapping[str, Recipe]) -> Recipe:
    """The recipe with each `Take(name)` replaced by `leaves[name]`."""
    match recipe:
        case Take(name):
            return leaves.get(name, recipe)
        case Permute(source, dims) if dims == TURNED:
            return turned(substitute(source, leaves))
        case Unary():
            return replace(recipe, source=substitute(recipe.source, leaves))
        case Join():
            return replace(recipe, parts=tuple(substitute(part, leaves) for part in recipe.parts))
        case Convert(groups):
            made = tuple((pattern, tuple(substitute(part, leaves) for part in parts)) for pattern, parts in groups)
            return replace(recipe, groups=made)
        case _:
            return recipe

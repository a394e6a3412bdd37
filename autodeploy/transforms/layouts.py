"""What each rank has of a value: all of it, ranges of some dims, or one term of a sum. The words that sharding rules speak in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.recipes import Ranges, Recipe, Shard, shown
from autodeploy.transforms.ranges import local_size

MANY_TOKENS = 1_000_003
"""Stands for T where sizes are multiplied: no size of a model has this factor."""


def as_number(size: Any) -> int:
    """A size with `MANY_TOKENS` in place of every symbol."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, MANY_TOKENS)))


def extent(size: Any) -> int:
    """Of a dim of c * T, what there is of each token: ranks share c."""
    number = as_number(size)
    return number // MANY_TOKENS if number % MANY_TOKENS == 0 else number


class Unshardable(Exception):
    """A call cannot work on what ranks have; `argument` is the value that it would need whole, where it is one."""

    def __init__(self, reason: str, argument: Any = None) -> None:
        super().__init__(reason)
        self.argument = argument


@dataclass(frozen=True)
class Layout:
    """Of one value. Without anything: every rank has all of it."""

    dims: Mapping[int, Ranges] = field(default_factory=dict)
    """Dim -> what ranks have of it, where that is not all."""
    is_term: bool = False
    """Whether the value is the sum of what the ranks have."""
    counted: Ranges | None = None
    """What its numbers count: things dealt out like this, each rank its own; the count of them stands for those of others."""

    def __post_init__(self) -> None:
        if self.is_term and self.dims:
            raise Unshardable("ranks would have terms of different parts of it")

    @property
    def is_whole(self) -> bool:
        return not self.dims and not self.is_term and self.counted is None

    def moved(self, dims: Mapping[int, Ranges]) -> Layout:
        """The same of a value whose dims lie elsewhere."""
        return Layout(dims, self.is_term, self.counted)

    def local_shape(self, shape: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of what each rank has of a value of that shape."""
        return tuple(
            size // extent(size) * local_size(self.dims[dim]) if dim in self.dims else size for dim, size in enumerate(shape)
        )

    def recipe(self, whole: Recipe, rank: int) -> Recipe:
        """Of a parameter with this layout, given that of the whole. rank: number of its dims."""
        for dim in sorted(self.dims):
            whole = Shard(whole, dim - rank, self.dims[dim])
        return whole

    def __str__(self) -> str:
        parts = [f"dim {dim} {shown(ranges)}" for dim, ranges in sorted(self.dims.items())]
        parts += ["term of a sum"] if self.is_term else []
        parts += [f"counted {shown(self.counted)}"] if self.counted is not None else []
        return ", ".join(parts) or "whole"


WHOLE, TERM = Layout(), Layout(is_term=True)


def without_whole(dims: Mapping[int, Ranges], shape: Sequence[Any]) -> dict[int, Ranges]:
    """The dims of which some rank does not have all."""
    return {dim: ranges for dim, ranges in dims.items() if any(own != ((0, extent(shape[dim])),) for own in ranges)}


def plain(layout: Any, value: Any) -> Any:
    """A layout, or a list of them for a list of values, that names no dims of which every rank has all."""
    if isinstance(layout, list):
        return [plain(each, part) for each, part in zip(layout, value, strict=True)]
    dims = without_whole(layout.dims, value.shape) if layout.dims else layout.dims
    return layout if len(dims) == len(layout.dims) else layout.moved(dims)


def layout_of_recipe(recipe: Recipe, whole: Recipe, rank: int) -> Layout | None:
    """What a parameter's recipe gives ranks of the whole one; None where it is made of something else."""
    dims = dict[int, Ranges]()
    while isinstance(recipe, Shard) and recipe != whole:
        dims[recipe.dim + rank] = recipe.ranges
        recipe = recipe.source
    return Layout(dims) if recipe == whole else None


@dataclass(frozen=True)
class Demand:
    """What ranks must have of elements [start, stop) of one dim of a value."""

    node: fx.Node
    dim: int
    ranges: Ranges
    start: int
    stop: int

    @classmethod
    def all_of(cls, node: fx.Node, dim: int, ranges: Ranges) -> Demand:
        return cls(node, dim, ranges, 0, extent(node.meta["val"].shape[dim]))


@dataclass(frozen=True)
class Site:
    """A call as the whole model makes it, and what ranks have of what it reads."""

    target: Any
    args: Mapping[str, Any]
    """Arguments by name; values are nodes of the whole model."""
    out: Any
    """The value of the whole model's call."""
    layouts: Mapping[fx.Node, Layout]
    value: Callable[[Any], Any]
    """The whole model's value of a node."""
    num_ranks: int
    wanted: Layout | None = None
    """What is asked of the result, where what is read leaves that open."""

    def layout(self, argument: Any) -> Layout:
        return self.layouts.get(argument, WHOLE) if isinstance(argument, fx.Node) else WHOLE

    def shape(self, argument: Any) -> tuple[Any, ...]:
        return tuple(self.value(argument).shape)

    @property
    def first(self) -> Any:
        """The argument that comes first, mostly the tensor that is worked on."""
        return next(iter(self.args.values()))

    @property
    def tensors(self) -> list[fx.Node]:
        """Every node among the arguments, each once."""
        found = dict[fx.Node, None]()
        fx.map_arg(tuple(self.args.values()), lambda node: found.setdefault(node))
        return [node for node in found if isinstance(self.value(node), Tensor | list | tuple)]

    def whole(self, *arguments: Any) -> None:
        """Raises Unshardable for an argument that ranks have no more than a part of."""
        for argument in arguments:
            if isinstance(argument, fx.Node) and not self.layout(argument).is_whole:
                raise Unshardable(f"it needs all of {argument.name}, and ranks have {self.layout(argument)}", argument)

"""Sharding rules of calls that move numbers: which part of the result ranks have, given their parts of what is read; and back."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from autodeploy.recipes import Ranges
from autodeploy.transforms.layouts import MANY_TOKENS, WHOLE, Demand, Layout, Site, Unshardable, as_number, extent
from autodeploy.transforms.ranges import Unaligned, clipped, followed_by, local_size, merged, shifted, unmerged
from autodeploy.transforms.rewrite import arguments, aten, named_op, val

Dims = Mapping[int, Ranges]


class Rule:
    """Of a call whose arguments ranks must have whole."""

    def forward(self, site: Site) -> Any:
        """What ranks have of the result (a list of it, for a list). Raises Unshardable or Unaligned."""
        site.whole(*site.tensors)
        return [WHOLE] * len(site.out) if isinstance(site.out, list | tuple) else WHOLE

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        """What ranks must have of the arguments, where they shall have these parts of the result."""
        raise Unshardable("no rule says how ranks share it")

    def local(self, site: Site, out: Any) -> dict[str, Any]:
        """The arguments, by name, that are other numbers on a rank. out: as `forward` gives it."""
        return {}

    def target(self, site: Site) -> Any:
        """What a rank calls in its place."""
        return site.target


def positive(dim: int, rank: int) -> int:
    return dim % max(rank, 1)


class DimMap(Rule, ABC):
    """Dims come in another order, go if they are of size 1, or are new: `sources` says which dim of the tensor each one was."""

    @abstractmethod
    def sources(self, site: Site) -> Sequence[int | None]: ...

    def forward(self, site: Site) -> Layout:
        layout, sources = site.layout(site.first), self.sources(site)
        site.whole(*(node for node in site.tensors if node is not site.first))
        if lost := [dim for dim in layout.dims if dim not in sources]:
            raise Unshardable(f"it drops dim {lost[0]}, of which ranks have {layout}", site.first)
        return layout.moved({at: layout.dims[dim] for at, dim in enumerate(sources) if dim is not None and dim in layout.dims})

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        sources = self.sources(site)
        for at, ranges in out.items():
            if (dim := sources[at]) is not None:
                yield Demand.all_of(site.first, dim, ranges)


class Permuted(DimMap):
    """permute, transpose, t, movedim: the dims of a small tensor of their own are moved to see where each goes."""

    def sources(self, site: Site) -> Sequence[int | None]:
        rank = len(site.shape(site.first))
        numbered = torch.empty([2 + dim for dim in range(rank)], device="meta")
        moved = site.target(numbered, *list(site.args.values())[1:])
        return [size - 2 for size in moved.shape]


class Resized(DimMap):
    """unsqueeze, squeeze, select, complex numbers as pairs: one dim more, or dims less."""

    def sources(self, site: Site) -> Sequence[int | None]:
        shape, dim = site.shape(site.first), site.args.get("dim")
        rank = len(shape)
        kept = list(range(rank))
        if site.target is aten.unsqueeze.default:
            at = positive(site.args["dim"], rank + 1)
            return [*kept[:at], None, *kept[at:]]
        if site.target is aten.view_as_real.default:
            return [*kept, None]
        if site.target is aten.view_as_complex.default:
            return kept[:-1]
        if site.target is aten.select.int:
            return [at for at in kept if at != positive(site.args["dim"], rank)]
        listed = kept if dim is None else dim if isinstance(dim, list | tuple) else [dim]
        gone = {positive(each, rank) for each in listed if isinstance(each, int)}
        return [at for at in kept if at not in gone or shape[at] != 1]


class Expanded(DimMap):
    """expand: what is the same along a dim is so for any part of it."""

    def sources(self, site: Site) -> Sequence[int | None]:
        shape, out = site.shape(site.first), site.out.shape
        offset = len(out) - len(shape)
        at = [(dim - offset, size) for dim, size in enumerate(out)]
        return [dim if dim >= 0 and str(shape[dim]) == str(size) else None for dim, size in at]

    def forward(self, site: Site) -> Layout:
        known, sources = super().forward(site), self.sources(site)
        wanted = {} if site.wanted is None else {dim: r for dim, r in site.wanted.dims.items() if sources[dim] is None}
        return known.moved({**known.dims, **wanted})

    def local(self, site: Site, out: Layout) -> dict[str, Any]:
        return _local_sizes(site, "size", out, 0)


def _local_sizes(site: Site, name: str, out: Layout, first: int) -> dict[str, Any]:
    """A list of sizes, those of parts replaced. first: dim of the result that its first one is of."""
    sizes = list(site.args[name])
    for dim, ranges in out.dims.items():
        if 0 <= dim - first < len(sizes) and sizes[dim - first] != -1:
            if not isinstance(site.out.shape[dim], int):
                raise Unshardable("it computes a size with the number of tokens in the row")
            sizes[dim - first] = local_size(ranges)
    return {name: sizes} if sizes != list(site.args[name]) else {}


class Created(Rule):
    """zeros, new_empty, ...: the same everywhere, so any part of it will do."""

    def forward(self, site: Site) -> Layout:
        return WHOLE if site.wanted is None else site.wanted

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        return iter(())

    def local(self, site: Site, out: Layout) -> dict[str, Any]:
        return _local_sizes(site, "size", out, 0)


class Scattered(Rule):
    """slice_scatter: a tensor with part of one dim replaced."""

    def forward(self, site: Site) -> Layout:
        into, source = site.args["self"], site.args["src"]
        layout, dim = site.layout(into), positive(site.args["dim"], site.out.dim())
        if site.layout(source) != layout or dim in layout.dims:
            raise Unshardable("ranks do not share both in the same way, along other dims", source)
        return layout

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        if positive(site.args["dim"], site.out.dim()) in out:
            raise Unshardable("it replaces part of a dim that ranks share", site.first)
        for node in (site.args["self"], site.args["src"]):
            for dim, ranges in out.items():
                yield Demand.all_of(node, dim, ranges)


class Reshaped(Rule):
    """view, reshape, flatten, unflatten: numbers keep their order."""

    def forward(self, site: Site) -> Layout:
        layout = site.layout(site.first)
        found = layout.moved(regrouped(layout.dims, site.shape(site.first), tuple(site.out.shape)))
        if isinstance(other := site.args.get("other"), fx.Node) and site.layout(other).dims != found.dims:
            raise Unshardable("ranks have another part of what it takes the shape of", other)
        return found

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        for dim, ranges in regrouped(out, tuple(site.out.shape), site.shape(site.first)).items():
            yield Demand.all_of(site.first, dim, ranges)
        if isinstance(other := site.args.get("other"), fx.Node):
            for dim, ranges in out.items():
                yield Demand.all_of(other, dim, ranges)

    def local(self, site: Site, out: Layout) -> dict[str, Any]:
        if "sizes" in site.args:  # unflatten
            return _local_sizes(site, "sizes", out, positive(site.args["dim"], len(site.shape(site.first))))
        name = next((name for name in ("size", "shape") if name in site.args), None)
        return {} if name is None else _local_sizes(site, name, out, 0)


def regrouped(dims: Dims, before: tuple[Any, ...], after: tuple[Any, ...]) -> dict[int, Ranges]:
    """What ranks have of a tensor's dims, after it has got another shape."""
    found = dict[int, Ranges]()
    if not dims:
        return found
    a, b = ([as_number(size) for size in shape] for shape in (before, after))
    for mine, theirs in _groups(a, b):
        held = [dim for dim in mine if dim in dims]
        if not held:
            continue
        sizes, others = _of_one_token([a[dim] for dim in mine]), _of_one_token([b[dim] for dim in theirs])
        if len(held) > 1:
            raise Unaligned("two dims that ranks share are merged")
        at, ranges = unmerged(merged(dims[held[0]], sizes, mine.index(held[0])), others)
        found[theirs[at]] = ranges
    return found


def _of_one_token(sizes: list[int]) -> list[int]:
    """Sizes of dims that are merged, of which the outermost may count tokens too. Raises Unaligned where an inner one does."""
    first = next((at for at, size in enumerate(sizes) if size != 1), 0)
    if any(size % MANY_TOKENS == 0 for size in sizes[first + 1 :]):
        raise Unaligned("a dim that ranks share is merged with tokens")
    return [extent(size) for size in sizes]


def _groups(a: Sequence[int], b: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest stretches of dims of two shapes that hold equally many numbers."""
    i = j = 0
    while i < len(a) or j < len(b):
        mine, theirs = [i] if i < len(a) else [], [j] if j < len(b) else []
        i, j = i + len(mine), j + len(theirs)
        while (left := prod(a[dim] for dim in mine)) != (right := prod(b[dim] for dim in theirs)):
            if left < right:
                mine, i = [*mine, i], i + 1
            else:
                theirs, j = [*theirs, j], j + 1
        while i == len(a) and j < len(b) and b[j] == 1:
            theirs, j = [*theirs, j], j + 1
        while j == len(b) and i < len(a) and a[i] == 1:
            mine, i = [*mine, i], i + 1
        yield mine, theirs


class Sliced(Rule):
    """Elements [start, stop) of one dim."""

    def dim(self, site: Site) -> int:
        return positive(site.args["dim"], len(site.shape(site.first)))

    def bounds(self, site: Site) -> tuple[int, int]:
        size, start, end = extent(site.shape(site.first)[self.dim(site)]), site.args["start"] or 0, site.args["end"]
        if site.args["step"] != 1 or isinstance(start, fx.Node) or isinstance(end, fx.Node):
            raise Unshardable("what it takes of a dim that ranks share is no fixed range", site.first)
        start = start + size if start < 0 else start
        return start, size if end is None else end + size if end < 0 else min(end, size)

    def forward(self, site: Site) -> Layout:
        layout, dim = site.layout(site.first), self.dim(site)
        if dim not in layout.dims:
            return layout
        return layout.moved({**layout.dims, dim: clipped(layout.dims[dim], *self.bounds(site))[0]})

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        for at, ranges in out.items():
            if at == self.dim(site):
                yield Demand(site.first, at, ranges, *self.bounds(site))
            else:
                yield Demand.all_of(site.first, at, ranges)

    def local(self, site: Site, out: Layout) -> dict[str, Any]:
        held = site.layout(site.first).dims.get(self.dim(site))
        if held is None:
            return {}
        _, first, last = clipped(held, *self.bounds(site))
        return {"start": first, "end": last}


class Split(Rule):
    """split, chunk, unbind: a list of parts along one dim."""

    def forward(self, site: Site) -> list[Layout]:
        layout = site.layout(site.first)
        dim = positive(site.args["dim"], len(site.shape(site.first)))
        if dim not in layout.dims:
            return [self._part(site, layout, dim)] * len(site.out)
        if site.target is aten.unbind.int:
            raise Unshardable("it takes apart a dim that ranks share", site.first)
        found, start, place = list[Layout](), 0, 0
        for part in site.out:
            ranges, first, last = clipped(layout.dims[dim], start, start + part.shape[dim])
            if first != place:
                raise Unaligned("parts do not follow each other on a rank")
            found.append(layout.moved({**layout.dims, dim: ranges}))
            start, place = start + part.shape[dim], last
        self.local(site, found)
        return found

    def _part(self, site: Site, layout: Layout, dim: int) -> Layout:
        if site.target is not aten.unbind.int:
            return layout
        return layout.moved({at - (at > dim): ranges for at, ranges in layout.dims.items()})

    def local(self, site: Site, out: list[Layout]) -> dict[str, Any]:
        dim = positive(site.args["dim"], len(site.shape(site.first)))
        if dim not in site.layout(site.first).dims:
            return {}
        both = zip(out, site.out, strict=True)
        sizes = [local_size(part.dims[dim]) if dim in part.dims else value.shape[dim] for part, value in both]
        if "split_sizes" in site.args:
            return {"split_sizes": sizes}
        if len(set(sizes)) > 1:
            raise Unaligned(f"parts of one size would be of sizes {sizes} on a rank")
        return {"split_size": sizes[0]} if "split_size" in site.args else {}


class Item(Rule):
    """One of a list."""

    def forward(self, site: Site) -> Any:
        parts: Any = site.layouts.get(site.first)
        return WHOLE if parts is None else parts[site.args["b"]] if isinstance(parts, list) else parts

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        split, number = site.first, site.args["b"]
        if split.target not in SPLITS:
            raise Unshardable("no rule says how ranks share it")
        given = arguments(split)
        source = next(iter(given.values()))
        dim = positive(given["dim"], val(source).dim())
        is_unbound = split.target is aten.unbind.int
        sizes = [] if is_unbound else [part.shape[dim] for part in val(split)]
        for at, ranges in out.items():
            if at == dim and not is_unbound:
                start = sum(sizes[:number])
                yield Demand(source, dim, ranges, start, start + sizes[number])
            else:
                yield Demand.all_of(source, at + (is_unbound and at >= dim), ranges)


class Joined(Rule):
    """cat: parts one after the other along a dim."""

    def forward(self, site: Site) -> Layout:
        parts, dim = site.args["tensors"], positive(site.args["dim"], site.out.dim())
        layouts = [site.layout(part) for part in parts]
        first = layouts[0]
        others = [{at: ranges for at, ranges in layout.dims.items() if at != dim} for layout in layouts]
        mixed = any(other != others[0] for other in others) or len({layout.is_term for layout in layouts}) > 1
        if mixed or len({dim in layout.dims for layout in layouts}) > 1:
            raise Unshardable("it joins what ranks share with what they do not", parts[0])
        if dim not in first.dims:
            return first
        joined, offset = first.dims[dim], site.shape(parts[0])[dim]
        for part, layout in zip(parts[1:], layouts[1:], strict=True):
            joined = followed_by(joined, shifted(layout.dims[dim], offset))
            offset += site.shape(part)[dim]
        return first.moved({**others[0], dim: joined})

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        parts, dim = site.args["tensors"], positive(site.args["dim"], site.out.dim())
        start = 0
        for part in parts:
            size = site.shape(part)[dim]
            for at, ranges in out.items():
                yield Demand.all_of(part, at, clipped(ranges, start, start + size)[0] if at == dim else ranges)
            start = start + size if dim in out else 0


class Stacked(Rule):
    """stack: parts of one shape along a new dim."""

    def forward(self, site: Site) -> Layout:
        parts, dim = site.args["tensors"], positive(site.args["dim"], site.out.dim())
        first = site.layout(parts[0])
        if any(site.layout(part) != first for part in parts):
            raise Unshardable("it joins what ranks share with what they do not", parts[0])
        return first.moved({at + (at >= dim): ranges for at, ranges in first.dims.items()})

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        dim = positive(site.args["dim"], site.out.dim())
        for part in site.args["tensors"]:
            for at, ranges in out.items():
                if at == dim:
                    raise Unshardable("it makes a dim that ranks share")
                yield Demand.all_of(part, at - (at > dim), ranges)


class Selected(Rule):
    """index_select: rows by their numbers."""

    def forward(self, site: Site) -> Layout:
        layout = site.layout(site.first)
        site.whole(site.args["index"])
        if positive(site.args["dim"], len(site.shape(site.first))) in layout.dims:
            raise Unshardable("it picks along a dim that ranks share", site.first)
        return layout

    def backward(self, site: Site, out: Dims) -> Iterator[Demand]:
        for dim, ranges in out.items():
            yield Demand.all_of(site.first, dim, ranges)


SPLITS = {named_op(name) for name in ["split.Tensor", "split_with_sizes", "chunk", "unbind.int"]}
_NAMES: dict[type[Rule], str] = {
    Permuted: "permute transpose.int t movedim.int numpy_T swapaxes",
    Resized: "unsqueeze squeeze squeeze.dim squeeze.dims select.int view_as_real view_as_complex",
    Expanded: "expand broadcast_to",
    Created: "new_empty new_zeros new_ones new_full zeros ones full empty.memory_format",
    Scattered: "slice_scatter",
    Reshaped: "view reshape view_as reshape_as _unsafe_view flatten.using_ints unflatten.int",
    Sliced: "slice.Tensor",
    Joined: "cat concat",
    Stacked: "stack",
    Selected: "index_select",
}
MOVES: dict[Any, Rule] = {named_op(name): kind() for kind, names in _NAMES.items() for name in names.split()}
MOVES |= {operator.getitem: Item(), **dict.fromkeys(SPLITS, Split())}

"""Which part of each parameter one rank reads: the `Shard` recipes that all ranks share, narrowed down to what lies in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from autodeploy.recipes import (
    Cast,
    Cat,
    Dequantize,
    Fetch,
    Join,
    Pad,
    Part,
    Permute,
    Quantize,
    Recipe,
    Reshape,
    Shard,
    Slice,
    Stack,
    Take,
    Unary,
)
from autodeploy.weights import WeightPlan, shape_of


def plan_of_rank(plan: WeightPlan, rank: int, describe: Fetch) -> WeightPlan:
    """The plan of one rank among those that share its layers. describe: a tensor of each leaf's shape and dtype."""
    return replace(plan, recipes={name: of_rank(recipe, rank, describe) for name, recipe in plan.recipes.items()})


def of_rank(recipe: Recipe, rank: int, describe: Fetch) -> Recipe:
    """The recipe with each `Shard` replaced by what the rank has; of tensors that can be read in part, only that is read."""
    match recipe:
        case Shard(source, dim, ranges):
            return _cut(of_rank(source, rank, describe), dim, ranges[rank], describe)
        case Unary(source):
            return replace(recipe, source=of_rank(source, rank, describe))
        case Join(parts):
            return replace(recipe, parts=tuple(of_rank(part, rank, describe) for part in parts))
        case _:
            return recipe


def _cut(recipe: Recipe, dim: int, ranges: tuple[tuple[int, int], ...], describe: Fetch) -> Recipe:
    """Ranges of a dim, one after the other."""
    shape = shape_of(recipe, describe).shape
    dim %= len(shape)
    if ranges == ((0, shape[dim]),):
        return recipe
    made: Recipe | None = None
    size = 0
    for start, stop in ranges:
        size += stop - start
        if start < 0:
            made = Pad(made or Slice(narrowed(recipe, dim, 0, 1, describe), dim, 0, 0), dim, size)
        else:
            part = narrowed(recipe, dim, start, stop, describe)
            made = part if made is None else Cat((*made.parts, part) if isinstance(made, Cat) else (made, part), dim)
    assert made is not None, f"a rank has nothing of {recipe}"
    return made


def narrowed(recipe: Recipe, dim: int, start: int, stop: int, describe: Fetch) -> Recipe:
    """Elements [start, stop) of a dim, asked of the leaves where every step between lets them be told apart."""

    def inner(source: Recipe, at: int = dim, first: int = start, last: int = stop) -> Recipe:
        return narrowed(source, at, first, last, describe)

    match recipe:
        case Part(name, bounds):
            known = {at: (first, last) for at, first, last in bounds}
            known[dim] = (known[dim][0] + start, known[dim][0] + stop) if dim in known else (start, stop)
            return Part(name, tuple((at, *known[at]) for at in sorted(known)))
        case Take(name):
            return Part(name, ((dim, start, stop),))
        case Cast(source):
            return replace(recipe, source=inner(source))
        case Slice(source, at, first, _):
            return inner(source, dim, first + start, first + stop) if at == dim else replace(recipe, source=inner(source))
        case Permute(source, dims):
            return replace(recipe, source=inner(source, dims[dim]))
        case Stack(parts, at):
            if at == dim:
                return replace(recipe, parts=parts[start:stop])
            return replace(recipe, parts=tuple(inner(part, dim - (at < dim)) for part in parts))
        case Cat(parts, at) if at != dim:
            return replace(recipe, parts=tuple(inner(part) for part in parts))
        case Cat(parts):
            return _narrowed_join(recipe, start, stop, describe)
        case Dequantize() if (found := _narrowed_matrix(recipe, dim, start, stop, describe)) is not None:
            return found
        case Quantize(source, format) if "factor" not in format.parts and _keeps_scales(recipe, dim, start, stop, describe):
            return replace(recipe, source=inner(source))
        case Reshape(source, shape) if (whole := shape_of(source, describe).shape)[:dim] == shape[:dim]:
            each = whole[dim] // shape[dim]  # of the source's elements belong to one of these
            if whole[dim] == each * shape[dim]:
                narrow = (*shape[:dim], stop - start, *shape[dim + 1 :])
                return Reshape(inner(source, dim, start * each, stop * each), narrow)
    return Slice(recipe, dim, start, stop)


def _narrowed_join(recipe: Cat, start: int, stop: int, describe: Fetch) -> Recipe:
    """Of parts one after the other, those that [start, stop) touches."""
    parts, offset = list[Recipe](), 0
    for part in recipe.parts:
        size = shape_of(part, describe).shape[recipe.dim]
        first, last = max(start - offset, 0), min(stop - offset, size)
        if first < last:
            parts.append(part if last - first == size else narrowed(part, recipe.dim, first, last, describe))
        offset += size
    return parts[0] if len(parts) == 1 else Cat(tuple(parts), recipe.dim)


def _keeps_scales(recipe: Quantize, dim: int, start: int, stop: int, describe: Fetch) -> bool:
    """Whether a part of the matrix is rounded by itself as it is in the whole."""
    rank, (rows, columns) = shape_of(recipe, describe).dim(), recipe.format.block
    if dim < rank - 1:
        return rows == 1
    return columns > 0 and start % columns == 0 == stop % columns


Box = tuple[int, int, int]
"""Elements [start, stop) of a dim: (dim, start, stop)."""


def _narrowed_matrix(recipe: Dequantize, dim: int, start: int, stop: int, describe: Fetch) -> Dequantize | None:
    """The same format of a part of a quantized matrix, of parts of what is stored; None where these do not fall on borders."""
    parts = list[Recipe]()
    for name, part in zip(recipe.format.parts, recipe.parts, strict=True):
        box = _stored_box(recipe, name, tuple(shape_of(part, describe).shape), (dim, start, stop))
        if box is None:
            return None
        if box:
            at, first, last = box
            part = narrowed(part, at, first, last, describe)
        parts.append(part)
    shape = (*recipe.shape[:dim], stop - start, *recipe.shape[dim + 1 :])
    return replace(recipe, parts=tuple(parts), shape=shape)


def _stored_box(recipe: Dequantize, name: str, stored: tuple[int, ...], box: Box) -> Box | tuple[()] | None:
    """What of one stored part belongs to a box of the matrix; () is all of it, None that it cannot be told."""
    form, rank, (dim, start, stop) = recipe.format, len(recipe.shape), box
    axis = dim - rank
    match name:
        case "factor" | "divisor":
            return () if set(stored) <= {1} else None
        case "codes":
            each = CODES_A_WORD.get(form.layout, lambda bits: 0)(form.bits) if axis == -1 else int(form.layout in CODES_A_WORD)
            counts = recipe.shape[dim] // each if each else 0
        case "scales":
            each = form.block[axis] if axis >= -2 else 1
            if each == 0:
                return ()
            counts = -(-recipe.shape[dim] // each)
        case _:
            return None
    if name == "scales" and len(stored) == rank - 1 and axis == -2:  # one for each row
        stored = (*stored, 1)
    is_on_borders = each > 0 and start % each == 0 and (stop % each == 0 or stop == recipe.shape[dim])
    if len(stored) != rank or not is_on_borders or stored[dim] != counts:
        return None
    return dim, start // each, -(-stop // each)


CODES_A_WORD: dict[str, Callable[[int], int]] = {
    "plain": lambda bits: 1,
    "e2m1": lambda bits: 2,
    "stream": lambda bits: 0 if 32 % bits else 32 // bits,
}
"""Layouts whose rows lie one after the other -> how many numbers of a row share one that is stored, by their bits."""

"""Which part of each parameter one rank reads: the `Shard` recipes that all ranks share, narrowed down to what lies in files."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

from autodeploy.format_parts import NotInPartsError, spacing
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


def _narrowed_matrix(recipe: Dequantize, dim: int, start: int, stop: int, describe: Fetch) -> Recipe | None:
    """Part of a quantized matrix, read from the words and blocks that it touches; None where these are all there are."""
    axis, form = dim - len(recipe.shape), recipe.format
    if axis == -1 and form.block[1] >= recipe.shape[-1]:
        form = replace(form, block=(form.block[0], 0))  # all columns share a scale, those of a part too
    shapes = [tuple(shape_of(part, describe).shape) for part in recipe.parts]
    try:
        found = [spacing(form, name, recipe.shape, shape, axis) for name, shape in zip(form.parts, shapes, strict=True)]
    except NotInPartsError:
        return None
    unit = lcm(*(each.numbers for each in found if each is not None))
    first, last = start // unit * unit, min(-(-stop // unit) * unit, recipe.shape[dim])
    if last - first == recipe.shape[dim]:
        return None
    parts = list[Recipe]()
    for part, shape, each in zip(recipe.parts, shapes, found, strict=True):
        if each is not None:
            end = min(-(-last // each.numbers) * each.stored, shape[each.dim])
            part = narrowed(part, each.dim, first // each.numbers * each.stored, end, describe)
        parts.append(part)
    made = replace(recipe, parts=tuple(parts), format=form, shape=(*recipe.shape[:dim], last - first, *recipe.shape[dim + 1 :]))
    return made if (first, last) == (start, stop) else Slice(made, dim, start - first, stop - first)

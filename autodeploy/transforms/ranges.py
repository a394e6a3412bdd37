"""What ranks have of a dim, and what becomes of it where a dim is cut, joined or merged with others. See `recipes.Ranges`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from itertools import pairwise
from math import prod

from autodeploy.recipes import Ranges

Own = tuple[tuple[int, int], ...]
"""What one rank has."""


class Unaligned(Exception):
    """What ranks have does not fall on the borders that a step needs."""


def even(size: int, num_ranks: int, unit: int = 1) -> Ranges:
    """Whole units of a dim, as evenly as can be; those with fewer have zeros behind theirs."""
    units = -(-size // unit)
    most = -(-units // num_ranks) * unit
    return ranges_of(padded([(min(i * most, size), min((i + 1) * most, size))], most) for i in range(num_ranks))


def padded(own: Iterable[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """With zeros behind, up to a size."""
    kept = [(start, stop) for start, stop in own if stop > start]
    missing = size - sum(stop - start for start, stop in kept)
    return [*kept, (-missing, 0)] if missing else kept


def ranges_of(ranks: Iterable[Iterable[tuple[int, int]]]) -> Ranges:
    """Each rank's ranges, joined where one begins at the end of another."""
    return tuple(_joined(own) for own in ranks)


def _joined(own: Iterable[tuple[int, int]]) -> Own:
    found = list[tuple[int, int]]()
    for start, stop in own:
        if stop <= start:
            continue
        last = found[-1] if found else (0, 0)
        if start < 0 and last[0] < 0:
            found[-1] = (last[0] + start, 0)
        elif found and start >= 0 and last[0] >= 0 and last[1] == start:
            found[-1] = (last[0], stop)
        else:
            found.append((start, stop))
    return tuple(found)


def local_size(ranges: Ranges) -> int:
    """Elements that each rank has. Raises Unaligned when they differ."""
    sizes = {sum(stop - start for start, stop in own) for own in ranges}
    if len(sizes) != 1:
        raise Unaligned(f"ranks would have {sorted(sizes)} elements")
    return sizes.pop()


def scaled(ranges: Ranges, factor: int) -> Ranges:
    """Of a dim each of whose elements has become `factor` ones."""
    return ranges_of(((start * factor, stop * factor) for start, stop in own) for own in ranges)


def divided(ranges: Ranges, factor: int) -> Ranges:
    """Of a dim `factor` elements of which have become one."""
    if any(bound % factor for own in ranges for pair in own for bound in pair):
        raise Unaligned(f"ranks have no whole groups of {factor}")
    return ranges_of(((start // factor, stop // factor) for start, stop in own) for own in ranges)


def shifted(ranges: Ranges, offset: int) -> Ranges:
    return ranges_of(((start + offset, stop + offset) if start >= 0 else (start, stop) for start, stop in own) for own in ranges)


def followed_by(ranges: Ranges, more: Ranges) -> Ranges:
    """What each rank has of two, the second behind the first."""
    return ranges_of((*first, *second) for first, second in zip(ranges, more, strict=True))


def clipped(ranges: Ranges, start: int, stop: int) -> tuple[Ranges, int, int]:
    """What ranks have of [start, stop), counted from `start`, and where it lies among all that each has.

    Zeros belong to what is before them. Raises Unaligned when that is not the same piece for all ranks.
    """
    found = [_clipped(own, start, stop) for own in ranges]
    places = {place for _, place in found}
    if len(places) != 1:
        raise Unaligned(f"what ranks have of {start}:{stop} lies in different places")
    return tuple(own for own, _ in found), *places.pop()


def _clipped(own: Own, start: int, stop: int) -> tuple[Own, tuple[int, int]]:
    pieces, offset, places, inside = list[tuple[int, int]](), 0, list[tuple[int, int]](), False
    for first, last in own:
        if first < 0:
            low, high = (first, 0) if inside else (0, 0)
            at = offset
        else:
            low, high = max(first, start), min(last, stop)
            at, inside = offset + low - first, low < high
        if low < high:
            pieces.append((low - start, high - start) if low >= 0 else (low, high))
            places.append((at, at + high - low))
        offset += last - first
    if not places or any(a[1] != b[0] for a, b in pairwise(places)):
        raise Unaligned(f"a rank's part of {start}:{stop} is not in one piece")
    return _joined(pieces), (places[0][0], places[-1][1])


@cache
def is_partition(ranges: Ranges, size: int) -> bool:
    """Whether every element belongs to exactly one rank."""
    held = sorted(pair for own in ranges for pair in own if pair[0] >= 0)
    return [0, *(stop for _, stop in held)] == [*(start for start, _ in held), size]


def merged(ranges: Ranges, sizes: Sequence[int], dim: int) -> Ranges:
    """What ranks have of dims of these sizes as one dim, given what they have of one of them."""
    outer, size, inner = prod(sizes[:dim]), sizes[dim], prod(sizes[dim + 1 :])
    return ranges_of(
        [
            ((i * size + start) * inner, (i * size + stop) * inner) if start >= 0 else (start * inner, 0)
            for i in range(outer)
            for start, stop in own
        ]
        for own in ranges
    )


def unmerged(ranges: Ranges, sizes: Sequence[int]) -> tuple[int, Ranges]:
    """The inverse: which of the dims it is that ranks have a part of. Raises Unaligned when it is none."""
    for dim, size in enumerate(sizes):
        if size == 1:
            continue
        inner = prod(sizes[dim + 1 :])
        try:
            found = _first(divided(ranges, inner), prod(sizes[:dim]), size)
        except Unaligned:
            continue
        if merged(found, sizes, dim) == ranges:
            return dim, found
    raise Unaligned(f"what ranks have is no part of one dim of {list(sizes)}")


def _first(ranges: Ranges, count: int, size: int) -> Ranges:
    """What ranks have of the first of `count` stretches of a size, if all are alike."""
    if count == 1:
        return ranges
    return clipped(ranges, 0, size)[0]


def once(size: int, num_ranks: int, holders: Collection[int] = (0,)) -> Ranges:
    """All of a dim for some ranks, zeros for the others."""
    return tuple(((0, size),) if rank in holders else ((-size, 0),) for rank in range(num_ranks))


def is_once(ranges: Ranges | None, size: int) -> bool:
    """Whether one rank has all of a dim, and the others zeros."""
    return ranges is not None and sorted(ranges) == sorted(once(size, len(ranges)))

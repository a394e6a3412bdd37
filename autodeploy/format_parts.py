"""Where the parts of a quantized matrix keep what belongs to some of its rows or columns, so that these can be read alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd, prod

from autodeploy.formats import TRANSPOSED, Format

Shape = tuple[int, ...]


class NotInPartsError(Exception):
    """What belongs to some rows or columns does not lie together."""


@dataclass(frozen=True)
class Spacing:
    """Along a stored dim, `stored` elements belong to `numbers` neighbours of a dim of the matrix."""

    dim: int
    numbers: int
    stored: int = 1


def spacing(form: Format, name: str, shape: Shape, stored: Shape, axis: int) -> Spacing | None:
    """Of one stored part; None: all of it belongs to each number. axis: the matrix's dim, counted from the last one (-1).

    Raises NotInPartsError.
    """
    found = _expected(form, name, shape, stored, axis)
    if found is not None:
        count = ceil(shape[axis] * found.stored / found.numbers)
        if found.dim >= len(stored) or stored[found.dim] != count:
            raise NotInPartsError(f"the {name} of {shape} are {stored}")
    return found


def _expected(form: Format, name: str, shape: Shape, stored: Shape, axis: int) -> Spacing | None:
    if form.layout == "nf4":
        return _nf4(form, name, shape, axis)
    match name:
        case "factor" | "divisor" if prod(stored) == 1:
            return None
        case "order" | "columns":
            return Spacing(len(stored) - 1, 1) if axis == -1 else None
        case "codes":
            return _codes(form, shape, stored, axis)
        case "scales" | "zeros":
            return _few(form, name, shape, stored, axis)
        case _:
            raise NotInPartsError(name)


def _at(form: Format, shape: Shape, axis: int) -> int:
    """Which stored dim a dim of the matrix is."""
    if form.layout in TRANSPOSED and len(shape) == 2:
        return -1 - axis
    return len(shape) + axis


def _codes(form: Format, shape: Shape, stored: Shape, axis: int) -> Spacing:
    at = _at(form, shape, axis)
    if form.layout == "e2m1" and len(stored) == len(shape) + 1:  # groups are a dim of their own
        return Spacing(at, 2 * stored[-1] if axis == -1 else 1)
    if len(stored) != len(shape):
        raise NotInPartsError("codes")
    numbers, words = PACKED.get((form.layout, axis), lambda bits: (1, 1))(form.bits)
    return Spacing(at, numbers, words)


def _few(form: Format, name: str, shape: Shape, stored: Shape, axis: int) -> Spacing | None:
    """Of scales and zero points: one to a block."""
    each = form.block[axis] if axis >= -2 else 1
    if each == 0 or prod(stored) == 1 or (axis == -1 and "order" in form.parts):  # columns of any group are neighbours there
        return None
    more = len(stored) - len(shape)
    if any(size != 1 for size in stored[: max(more, 0)]) or more < -1 or (more == -1 and axis == -1):
        raise NotInPartsError(name)
    at = _at(form, shape, axis) + max(more, 0)
    if name == "zeros" and axis == -2 and form.layout in WORDS_OF_ZEROS:
        return Spacing(at, *_of_words(form.bits))
    return Spacing(at, each)


def _nf4(form: Format, name: str, shape: Shape, axis: int) -> Spacing | None:
    """Everything lies in row-major order, so only rows lie together."""
    if name in ("map", "nested_map"):
        return None
    if axis != -2 or len(shape) != 2:
        raise NotInPartsError("columns of nf4")
    size, nested_size, _ = map(int, form.settings)
    each = {"codes": 2, "absmax": size, "nested_absmax": size * nested_size}[name]
    rows = each // gcd(each, shape[1])
    return Spacing(0, rows, rows * shape[1] // each)


def _of_words(bits: int) -> tuple[int, int]:
    """As few numbers of so many bits as fill words of 32 bits, and how many words."""
    common = gcd(32, bits)
    return 32 // common, bits // common


PACKED: dict[tuple[str, int], Callable[[int], tuple[int, int]]] = {
    ("e2m1", -1): lambda bits: (2, 1),
    ("row_pairs", -2): lambda bits: (2, 1),
    ("stream", -1): _of_words,
    ("gptq", -1): _of_words,
    ("awq", -2): _of_words,
}
"""(layout, dim of the matrix) -> how many of its numbers share how many that are stored, by their bits; one has one elsewhere."""
WORDS_OF_ZEROS = ("gptq", "awq", "stream")
"""Layouts whose zero points are packed along the rows."""

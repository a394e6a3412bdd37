"""What choosing a token needs of logits."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant


@triton.jit
def largest_of_rows(x, places, highest, first, width, x_stride, part, HAS_PLACES: tl.constexpr, BLOCK: tl.constexpr):
    """Of each part of a row of x [rows, width] the largest number, NaN if there is one, and where it is first: [rows, parts].

    A program takes a part, which is a multiple of BLOCK. With places [rows, width], that is the place of the number found.
    """
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * part
    lane = tl.arange(0, BLOCK)
    best, column = tl.full((BLOCK,), float("-inf"), tl.float32), start + lane
    for at in range(start, tl.minimum(start + part, width), BLOCK):
        value = tl.load(x + row * x_stride + at + lane, at + lane < width, float("-inf")).to(tl.float32)
        better = (value > best) | (value != value)
        best, column = tl.where(better, value, best), tl.where(better, at + lane, column)
    top = tl.max(best, 0)
    found = tl.minimum(tl.min(tl.where(best == top, column, width), 0), width - 1).to(tl.int64)
    is_odd = tl.max((best != best).to(tl.int32), 0) > 0
    if HAS_PLACES:
        found = tl.load(places + row * x_stride + found)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(highest + at, tl.where(is_odd, float("nan"), top))
    tl.store(first + at, found)


_TYPES = {"x": "*bf16", "places": "*i64", "highest": "*fp32", "first": "*i64"}
VARIANTS = [
    Variant(largest_of_rows, "bf16", _TYPES, {"HAS_PLACES": False, "BLOCK": 1024}, max_registers=48),
    Variant(largest_of_rows, "of parts", {**_TYPES, "x": "*fp32"}, {"HAS_PLACES": True, "BLOCK": 1024}, max_registers=48),
]

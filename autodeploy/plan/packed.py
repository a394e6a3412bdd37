"""What a parameter takes once its provider has packed it: the provider packs a few of its rows, and the rest is in proportion."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

from autodeploy.executor.packing import bytes_of
from autodeploy.formats import TRANSPOSED, Format, Integers

FEW = 256
"""Rows of a matrix that are packed; what providers pad rows to divides it."""
Pack = Callable[[Any], Any]


def packed_bytes(pack: Pack, shape: tuple[int, ...], dtype: torch.dtype, form: Format | None) -> int:
    """Of a parameter of that shape. form: None where the provider packs it dense."""
    if len(shape) < 2:
        return _packed(pack, shape, dtype, form)
    *lead, rows, columns = shape
    few = rows if rows <= 2 * FEW else FEW + rows % FEW
    one = _packed(pack, (1,) * len(lead) + (few, columns), dtype, form)
    more = (rows - few) // FEW * _packed(pack, (1,) * len(lead) + (FEW, columns), dtype, form) if rows > few else 0
    return prod(lead) * (one + more)


def _packed(pack: Pack, shape: tuple[int, ...], dtype: torch.dtype, form: Format | None) -> int:
    return bytes_of(pack(torch.zeros(shape, dtype=dtype) if form is None else _sample(shape, form)))


def _sample(shape: tuple[int, ...], form: Format) -> Integers:
    """Numbers as a checkpoint has them.

    Scales of GPTQ and AWQ are stored in float16, others of 4 bits in bfloat16, unless they are products.
    """
    groups = -(-shape[-1] // form.block[1]) if form.block[1] else 1
    is_product = bool({"factor", "divisor"} & {*form.parts})
    precise = torch.float32 if form.bits == 8 or is_product else torch.float16 if form.layout in TRANSPOSED else torch.bfloat16
    scales = torch.linspace(0.5, 0.999, prod(shape[:-1]) * groups).to(precise).float().reshape(*shape[:-1], groups)
    numbers = torch.zeros(shape, dtype=torch.float8_e4m3fn if form.is_fp8 else torch.int8)
    zeros: Tensor | None = torch.ones_like(scales) if "zeros" in form.parts else None
    order = torch.zeros(shape[-1], dtype=torch.int32) if "order" in form.parts else None
    return Integers(numbers, scales, zeros, order)

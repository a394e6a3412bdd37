"""Formats of quantized weights: how the numbers of a matrix are stored, and the one way back to a dense one.

A matrix [..., N, K] is stored as codes, scales, and sometimes zero points and more. What each producer means by its names is
known where its checkpoints are read (`capture/quantized.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of a 4-bit float stand for; bit 3 is the sign."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight numbers in a word belongs to which column."""


@dataclass(frozen=True)
class Format:
    """How a matrix is stored. dense = (codes - zeros) * scales * factor / divisor * columns, as far as there are such parts."""

    name: str
    """As it is shown: int4, fp8, nvfp4, ..."""
    layout: str
    """Key of `LAYOUTS`: where the codes lie."""
    parts: tuple[str, ...]
    """What each stored tensor is: codes, scales, zeros, order (group of a column), factor, divisor, columns; nf4 has its own."""
    block: tuple[int, int] = (0, 0)
    """Rows and columns that share a scale; 0: all of them."""
    bits: int = 8
    zero_offset: int = 0
    """What a stored zero point is too small by."""
    settings: tuple[float, ...] = ()
    """Of nf4: numbers that share a scale, scales that share one, and what they are too small by."""

    def dequantize(self, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        """The dense matrix in float32. tensors: the parts, in order. Raises ValueError when a scale is not finite."""
        part = dict(zip(self.parts, tensors, strict=True))
        for name, stored in part.items():
            values = as_scale(stored) if name == "scales" else stored
            if name != "codes" and values.is_floating_point() and not bool(values.isfinite().all()):
                raise ValueError(f"its {name} hold something that is not a finite number")
        if self.layout == "nf4":
            return _nf4(part, shape, self.settings)
        numbers = LAYOUTS[self.layout](part["codes"], self.bits, shape).float()
        if "zeros" in part:
            numbers -= self._spread(self._zeros(part["zeros"], shape), shape, part)
        numbers *= self._spread(as_scale(part["scales"]), shape, part)
        if "factor" in part:
            numbers *= part["factor"].float()
        if "divisor" in part:
            numbers /= part["divisor"].float()
        return numbers * part["columns"].float() if "columns" in part else numbers

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """[..., rows, columns] of the scales of a matrix of that shape, as they lie in memory."""
        counts = tuple(1 if size == 0 else -(-whole // size) for whole, size in zip(shape[-2:], self.block, strict=True))
        return (*shape[:-2], *(reversed(counts) if self.layout in TRANSPOSED else counts))

    def _zeros(self, zeros: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Zero points as numbers [N, groups], or [groups, N] where the codes are transposed."""
        match self.layout:
            case "gptq":
                found = unpacked(zeros, self.bits, shape[-2])
            case "awq":
                found = _awq_columns(zeros, shape[-2])
            case "stream":  # packed along the rows, and as far from 0 as the codes are
                found = unpacked(zeros.T.contiguous(), self.bits, shape[-2]).T - (1 << (self.bits - 1))
            case _:
                found = zeros
        return (found + self.zero_offset).float()

    def _spread(self, few: Tensor, shape: tuple[int, ...], part: Mapping[str, Tensor]) -> Tensor:
        """One number per block -> something that broadcasts over the matrix."""
        if few.numel() == 1:
            return few.reshape(())
        few = few.reshape(self.scale_shape(shape))
        few = few.transpose(-1, -2) if self.layout in TRANSPOSED else few
        if "order" in part:
            return few[..., part["order"].long()]
        for dim, size in zip((-2, -1), self.block, strict=True):
            if size > 1:
                few = few.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
        return few


def as_scale(scale: Tensor) -> Tensor:
    """In float32; what is stored in bytes is the exponent of a power of two, less 127 (E8M0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


# Where codes lie. (stored codes, bits, shape [..., N, K]) -> numbers


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Words of 32 bits [..., W] -> their first numbers of `bits` bits [..., count], lowest bits first, none of them signed."""
    wide = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    at = torch.arange(count) * bits
    low, high = wide[..., at // 32] >> (at % 32), wide[..., at // 32 + 1] << (32 - at % 32)
    return (low | high) & ((1 << bits) - 1)


def _plain(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    return codes.float()


def _e2m1(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Two to a byte along K, the first in the low half."""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return table[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()].reshape(shape)


def _row_pairs(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Two output rows to a byte, the even one in the low half, two's complement."""
    halves = torch.stack((codes & 15, codes >> 4), dim=-2).to(torch.int16)
    return ((halves ^ 8) - 8).reshape(shape)


def _stream(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """A row is a stream of bits; stored is the number plus half of what fits."""
    return unpacked(codes, bits, shape[-1]) - (1 << (bits - 1))


def _gptq(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """[K * bits / 32, N]: a column is a stream of bits."""
    return unpacked(codes.T.contiguous(), bits, shape[-1])


def _awq(codes: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """[K, N / 8]: eight columns to a word, in an order of their own."""
    return _awq_columns(codes, shape[-2]).T


def _awq_columns(words: Tensor, count: int) -> Tensor:
    eights = unpacked(words, 4, count).unflatten(-1, (-1, 8))
    return eights[..., list(AWQ_ORDER)].flatten(-2)


def _nf4(part: Mapping[str, Tensor], shape: tuple[int, ...], settings: tuple[float, ...]) -> Tensor:
    """Two to a byte in row-major order, the first in the high half; scales may be quantized themselves."""
    size, nested_size, offset = settings
    absmax = part["absmax"]
    if "nested_absmax" in part:
        outer = part["nested_absmax"].repeat_interleave(int(nested_size))[: absmax.numel()]
        absmax = part["nested_map"][absmax.long()] * outer + offset
    codes = part["codes"].flatten()
    numbers = part["map"][torch.stack((codes >> 4, codes & 15), dim=-1).flatten().long()].float()
    return (numbers * absmax.float().repeat_interleave(int(size))[: numbers.numel()]).reshape(shape)


LAYOUTS: dict[str, Callable[[Tensor, int, tuple[int, ...]], Any]] = {
    "plain": _plain,
    "e2m1": _e2m1,
    "row_pairs": _row_pairs,
    "stream": _stream,
    "gptq": _gptq,
    "awq": _awq,
}
TRANSPOSED = ("gptq", "awq")
"""Layouts whose scales and zero points are [groups, N]."""

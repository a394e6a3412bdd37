"""Formats of quantized weights: how the numbers of a matrix are stored, and the one way back to a dense one.

A matrix [..., N, K] is stored as codes, scales, and sometimes zero points and more. What each producer means by its names is
known where its checkpoints are read (`capture/quantized.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""What the codes 0 to 7 of a 4-bit float stand for; bit 3 is the sign."""
ONE = torch.ones(1)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of the eight numbers in a word belongs to which column."""


class BrokenPartError(ValueError):
    """A stored part cannot be used. part: its name in `Format.parts`."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(reason)
        self.part = part


@dataclass(frozen=True)
class Integers:
    """Matrices [..., N, K] of whole numbers (or floats of 8 bits), as kernels want them: dense = (numbers - zeros) * scales.

    Floats of 4 bits are whole numbers too, of half the scale.
    """

    numbers: Tensor
    """[..., N, K] int8, as if they had a sign; or float8_e4m3fn."""
    scales: Tensor
    """[..., N, groups] float32."""
    zeros: Tensor | None
    """The same; None: all are 0."""
    order: Tensor | None = None
    """[K] int32, which column of the matrix each one here is; None: the same one."""

    @property
    def parts(self) -> tuple[Tensor | None, ...]:
        return self.numbers, self.scales, self.zeros

    def to(self, device: str) -> Integers:
        parts = (None if part is None else part.to(device) for part in (*self.parts, self.order))
        return Integers(*parts)  # pyright: ignore[reportArgumentType]

    def narrow(self, dim: int, start: int, stop: int) -> Integers:
        """Elements [start, stop) of a dim; columns in whole groups, where they are in no other order."""
        groups, first, last = self.scales.shape[-1], start, stop
        if dim == self.numbers.dim() - 1:
            size = self.numbers.shape[-1] // groups
            first, last = (0, 1) if groups == 1 else (start // size, stop // size)
        zeros = None if self.zeros is None else self.zeros.narrow(dim, first, last - first)
        numbers, scales = self.numbers.narrow(dim, start, stop - start), self.scales.narrow(dim, first, last - first)
        return Integers(numbers, scales, zeros, self.order)

    def padded(self, dim: int, size: int) -> Integers:
        """With rows (or matrices) of zeros behind the last one, up to `size`."""

        def pad(part: Tensor) -> Tensor:
            shape = list(part.shape)
            shape[dim] = size - shape[dim]
            return torch.cat([part, torch.zeros(shape, dtype=part.dtype, device=part.device)], dim)

        return Integers(pad(self.numbers), pad(self.scales), None if self.zeros is None else pad(self.zeros), self.order)

    @classmethod
    def joined(cls, several: Sequence[Integers], join: Callable[[list[Tensor]], Tensor]) -> Integers:
        """Matrices of one format as one, each of their parts by `join`."""
        numbers, scales, zeros = zip(*(each.parts for each in several), strict=True)
        return cls(join(list(numbers)), join(list(scales)), None if zeros[0] is None else join(list(zeros)))


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
    activations: int = 0
    """Bits to which what is multiplied with the matrix may be rounded, each row by itself as it comes; 0: not at all."""
    turned: bool = False
    """Of a tensor of the model: whether it is [..., K, N], matrices of this format the other way round."""

    def __str__(self) -> str:
        return self.name

    @property
    def is_integers(self) -> bool:
        """Whether it stands for whole numbers times a scale of their row, or of a group of its columns."""
        return self.name.startswith("int") and set(self.parts) <= {"codes", "scales", "zeros"} and self.block[0] <= 1

    @property
    def without_order(self) -> Format:
        """Of the matrix with its columns sorted by their groups."""
        return replace(self, parts=tuple(part for part in self.parts if part != "order"))

    @property
    def is_fp8(self) -> bool:
        """Whether it stands for floats of 8 bits times a scale of their block of rows and columns."""
        return self.name == "fp8" and self.layout == "plain" and set(self.parts) == {"codes", "scales"}

    @property
    def is_fp4(self) -> bool:
        """Whether it stands for floats of 4 bits times a scale of their group of columns, and one of the whole matrix."""
        return self.layout == "e2m1" and set(self.parts) <= {"codes", "scales", "factor", "divisor"} and self.block[0] <= 1

    def integers(self, shape: tuple[int, ...], *tensors: Tensor) -> Integers:
        """The stored parts as whole numbers (or floats of 8 bits) and scales. Raises BrokenPartError."""
        part = self._checked(tensors)
        if self.is_fp8 or (self.parts == ("codes", "scales") and self.layout == "plain" and part["codes"].dtype == torch.int8):
            return Integers(part["codes"].reshape(shape), self._by_group(as_scale(part["scales"]), shape), None)
        numbers = LAYOUTS[self.layout](part["codes"], self.bits, shape)
        if self.is_fp4:
            scales = as_scale(part["scales"]) / 2 * part.get("factor", ONE).float() / part.get("divisor", ONE).float()
            return Integers((2 * numbers).to(torch.int8), self._by_group(scales, shape), None)
        half = 1 << (self.bits - 1) if self.layout in TRANSPOSED else 0  # those have no sign
        zeros = self._by_group(self._zeros(part["zeros"], shape), shape) - half if "zeros" in part else None
        order = None
        if "order" in part:
            order = self._sorted_columns(part["order"], shape[-1])
            numbers = numbers[..., order]
        return Integers((numbers - half).to(torch.int8), self._by_group(as_scale(part["scales"]), shape), zeros, order)

    def _sorted_columns(self, groups: Tensor, num_columns: int) -> Tensor:
        """The columns, int32, by their groups. Raises BrokenPartError for groups of several sizes."""
        size = self.block[1] or num_columns
        if int(groups.min()) < 0 or groups.bincount().tolist() != [size] * (num_columns // size):
            raise BrokenPartError("order", f"it does not put {size} columns in each group")
        return groups.argsort(stable=True).to(torch.int32)

    def _by_group(self, few: Tensor, shape: tuple[int, ...]) -> Tensor:
        """One number per block -> [..., N, groups]."""
        few = few.float().reshape(self.scale_shape(shape))
        few = few.transpose(-1, -2) if self.layout in TRANSPOSED else few
        if self.block[0] > 1:
            few = few.repeat_interleave(self.block[0], -2).narrow(-2, 0, shape[-2])
        return few.expand(*shape[:-1], few.shape[-1]).contiguous()

    def quantize(self, dense: Tensor) -> tuple[Tensor, ...]:
        """The parts for a dense matrix, each number rounded to the nearest; the largest of a block is the largest there is."""
        blocks = dense.float().unflatten(-1, (-1, self.block[1] or dense.shape[-1]))
        most = blocks.abs().amax(-1)
        codes, scales, *more = ROUNDINGS[self.name](blocks, most.where(most > 0, 1.0))
        return (codes.flatten(-2), scales, *more)

    def dequantize(self, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        """The dense matrix in float32. tensors: the parts, in order. Raises BrokenPartError for a scale that is not finite."""
        part = self._checked(tensors)
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

    def _checked(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parts by name. Raises BrokenPartError for a number that is no code and not finite."""
        part = dict(zip(self.parts, tensors, strict=True))
        for name, stored in part.items():
            values = as_scale(stored) if name == "scales" else stored
            if name != "codes" and values.is_floating_point() and not bool(values.isfinite().all()):
                raise BrokenPartError(name, "it holds something that is not a finite number")
        return part

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
        if "order" in part:  # of all groups, though columns may be few
            few = few.reshape(-1, shape[0]).T if self.layout in TRANSPOSED else few.reshape(shape[0], -1)
            return few[..., part["order"].long()]
        few = few.reshape(self.scale_shape(shape))
        few = few.transpose(-1, -2) if self.layout in TRANSPOSED else few
        for dim, size in zip((-2, -1), self.block, strict=True):
            if size > 1:
                few = few.repeat_interleave(size, dim).narrow(dim, 0, shape[dim])
        return few


def told(formats: Collection[Format | None]) -> str:
    """Several formats in words (None: dense): dense and int4; int4 of several kinds."""
    names = sorted({str(form or "dense") for form in formats})
    return " and ".join(names) if len(names) > 1 else f"{names[0]} of several kinds"


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


# To the nearest. (blocks [..., N, groups, size], largest magnitude of each) -> (codes like the blocks, scales, ...)


def _to_int8(blocks: Tensor, most: Tensor) -> tuple[Tensor, ...]:
    scales = most / 127
    return (blocks / scales[..., None]).round_().clamp_(-127, 127).to(torch.int8), scales


def _to_int4(blocks: Tensor, most: Tensor) -> tuple[Tensor, ...]:
    """Scales are bfloat16: exact in half of the bytes. 7.5 steps to the largest: the one above 7 loses half a step."""
    scales = (most / 7.5).bfloat16()
    return (blocks / scales[..., None]).round_().clamp_(-8, 7).to(torch.int8), scales


def _to_fp8(blocks: Tensor, most: Tensor) -> tuple[Tensor, ...]:
    scales = most / torch.finfo(torch.float8_e4m3fn).max
    return (blocks / scales[..., None]).to(torch.float8_e4m3fn), scales


def _to_mxfp4(blocks: Tensor, most: Tensor) -> tuple[Tensor, ...]:
    exponents = (most.log2().floor() - 2).clamp(-127, 127)  # the largest code is between 4 and 8 times the scale
    return _nearest_e2m1(blocks / exponents.exp2()[..., None]), (exponents + 127).to(torch.uint8)


def _to_nvfp4(blocks: Tensor, most: Tensor) -> tuple[Tensor, ...]:
    factor = most.amax() / (E2M1[-1] * torch.finfo(torch.float8_e4m3fn).max)
    scales = (most / E2M1[-1] / factor).to(torch.float8_e4m3fn)
    return _nearest_e2m1(blocks / (scales.float() * factor).clamp_min(1e-30)[..., None]), scales, factor.reshape(1)


def _nearest_e2m1(values: Tensor) -> Tensor:
    """Codes, two to a byte along the last dim; ties go to the even code, what is too large to the largest."""
    middles = torch.tensor([(low + high) / 2 for low, high in pairwise(E2M1)])
    size = values.abs().contiguous()
    codes = torch.bucketize(size, middles)
    is_tie = size == middles[codes.clamp_max(len(middles) - 1)]
    codes += is_tie & (codes % 2 == 1)
    codes = (codes | torch.where(values < 0, 8, 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4


ROUNDINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "int8": _to_int8,
    "int4": _to_int4,
    "fp8": _to_fp8,
    "mxfp4": _to_mxfp4,
    "nvfp4": _to_nvfp4,
}
_WHOLE_ROW = Format("int8", "plain", ("codes", "scales"), block=(1, 0))
SCHEMES: dict[str, Format] = {
    "int8": _WHOLE_ROW,
    "w8a8": replace(_WHOLE_ROW, activations=8),
    "int4": Format("int4", "plain", ("codes", "scales"), block=(1, 32), bits=4, activations=8),
    "fp8": replace(_WHOLE_ROW, name="fp8"),
    "mxfp4": Format("mxfp4", "e2m1", ("codes", "scales"), block=(1, 32), bits=4),
    "nvfp4": Format("nvfp4", "e2m1", ("codes", "scales", "factor"), block=(1, 16), bits=4),
}
"""What a model can be quantized to while it is compiled."""

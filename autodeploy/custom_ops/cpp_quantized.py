"""Linear layers, experts and embedding tables of whole numbers (kernels/quantized.cpp), for rows of bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops import cpp
from autodeploy.custom_ops.cpp_linear import WIDTH, against_bfloat16, pack_words
from autodeploy.custom_ops.linear import against_bytes, embedding_op, linear_op
from autodeploy.custom_ops.moe import Expert, moe, packed_moe
from autodeploy.custom_ops.op import Provider
from autodeploy.formats import Format, Integers

MAX_INPUTS = 1 << 16
"""Columns whose sum of products of bytes is sure to fit in 32 bits."""

_w8a8 = cpp.Kernel("linear_w8a8", "ppppppppllll")
_w8a16 = cpp.Kernel("linear_w8a16", "ppppppppllll")
_w4a8 = cpp.Kernel("linear_w4a8", "ppppppppplpplllll")
_corrections = cpp.Kernel("corrections", "pplll")
_byte_rows = cpp.Kernel("byte_rows", "pppplll")


@dataclass(frozen=True, slots=True)
class BytePanels:
    """A matrix [num_outputs, num_inputs] of bytes in panels."""

    data: Tensor
    scales: Tensor
    """float32, one for each output; zeros behind the last one."""
    corrections: Tensor
    """int32, the same: what is too large in the sums where inputs are multiplied as bytes without a sign."""
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scales.nbytes + self.corrections.nbytes


@dataclass(frozen=True, slots=True)
class HalfBytePanels:
    """A matrix [num_outputs, num_inputs] of four bits in panels."""

    data: Tensor
    scales: Tensor
    """[panels, groups, 64], bfloat16 where that is exact, else float32."""
    offsets: Tensor | None
    """The same, of what a number is too large by, times its scale; None: by 8."""
    order: Tensor | None
    """int32, which column of the matrix each of the panels is; None: the same one."""
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.data, self.scales, self.offsets, self.order) if part is not None)


def pack_bytes(weight: Integers, call: Mapping[str, Any] | None = None) -> BytePanels:
    """weight: [N, K], a scale to each row, no zero points; K is a multiple of 4."""
    numbers, (num_outputs, num_inputs) = weight.numbers.contiguous(), weight.numbers.shape
    scales = F.pad(weight.scales.flatten(), (0, -num_outputs % WIDTH))
    corrections = torch.zeros(len(scales), dtype=torch.int32)
    _corrections(numbers.data_ptr(), corrections.data_ptr(), num_outputs, num_inputs, torch.get_num_threads())
    return BytePanels(pack_words(numbers), scales, corrections, num_outputs, num_inputs)


def pack_half_bytes(weight: Integers, call: Mapping[str, Any] | None = None) -> HalfBytePanels:
    """weight: [N, K] of four bits, a scale to each group of a row; a group is a multiple of 8 columns."""
    num_outputs, num_inputs = weight.numbers.shape
    eights = (weight.numbers + 8).view(torch.uint8).view(num_outputs, -1, 2, 4)
    words = (eights[:, :, 0] | eights[:, :, 1] << 4).flatten(1)
    offsets = None if weight.zeros is None else (weight.zeros + 8) * weight.scales
    by_panel = [_by_panel(weight.scales), *([] if offsets is None else [_by_panel(offsets)])]
    if all(torch.equal(part.bfloat16().float(), part) for part in by_panel):
        by_panel = [part.bfloat16() for part in by_panel]
    offsets = None if offsets is None else by_panel[1]
    return HalfBytePanels(pack_words(words), by_panel[0], offsets, weight.order, num_outputs, num_inputs)


def _by_panel(scales: Tensor) -> Tensor:
    """[N, groups] -> [panels, groups, 64], zeros behind the last output."""
    padded = F.pad(scales, (0, 0, 0, -scales.shape[0] % WIDTH))
    return padded.unflatten(0, (-1, WIDTH)).transpose(1, 2).contiguous()


def linear_w8a8(x: Tensor, weight: BytePanels, bias: Tensor | None = None) -> Tensor:
    """As `linear`, each row of x rounded to 8 bits by a scale of its own."""
    return _linear_bytes(_w8a8, 1, x, weight, bias)


def linear_w8a16(x: Tensor, weight: BytePanels, bias: Tensor | None = None) -> Tensor:
    """As `linear`, each row of x rounded to 16 bits by a scale of its own: by less than the result is rounded."""
    return _linear_bytes(_w8a16, 2, x, weight, bias)


def _linear_bytes(kernel: cpp.Kernel, num_bytes: int, x: Tensor, weight: BytePanels, bias: Tensor | None) -> Tensor:
    x, rows, num_inputs = x.contiguous(), x.numel() // weight.num_inputs, weight.num_inputs
    out = x.new_empty((*x.shape[:-1], weight.num_outputs))
    num_codes, code = (1, torch.int16) if cpp.widens_bytes() else (num_bytes, torch.uint8)
    codes, scales = x.new_empty(num_codes * x.numel(), dtype=code), x.new_empty(rows, dtype=torch.float32)
    pointers = (x, codes, scales, weight.data, weight.scales, weight.corrections, bias, out)
    kernel(*map(cpp.pointer, pointers), rows, weight.num_outputs, num_inputs, torch.get_num_threads())
    return out


def linear_w4a8(x: Tensor, weight: HalfBytePanels, bias: Tensor | None = None) -> Tensor:
    """As `linear`, each group of columns of a row of x rounded to 8 bits by a scale of its own."""
    x, rows, groups = x.contiguous(), x.numel() // weight.num_inputs, weight.scales.shape[1]
    out = x.new_empty((*x.shape[:-1], weight.num_outputs))
    codes, in_order = x.new_empty(x.numel(), dtype=torch.uint8), None if weight.order is None else x.new_empty(x.shape)
    scales, sums = x.new_empty(rows * groups, dtype=torch.float32), x.new_empty(rows * groups, dtype=torch.int32)
    pointers = (x, weight.order, in_order, codes, scales, sums, weight.data, weight.scales, weight.offsets)
    is_short, sizes = weight.scales.dtype == torch.bfloat16, (rows, weight.num_outputs, weight.num_inputs, groups)
    _w4a8(*map(cpp.pointer, pointers), is_short, cpp.pointer(bias), cpp.pointer(out), *sizes, torch.get_num_threads())
    return out


def byte_embedding(weight: BytePanels, indices: Tensor, *_: object) -> Tensor:
    """As `embedding`, of a table which is then the head's weight too."""
    ids, out = indices.contiguous(), weight.scales.new_empty((*indices.shape, weight.num_inputs), dtype=torch.bfloat16)
    pointers = (ids, weight.data, weight.scales, out)
    _byte_rows(*map(cpp.pointer, pointers), ids.numel(), weight.num_inputs, torch.get_num_threads())
    return out


def moe_w8a8(*args: Any) -> Tensor:
    """As `moe`, by `linear_w8a8`."""
    return packed_moe(*args)


def moe_w8a16(*args: Any) -> Tensor:
    """As `moe`, by `linear_w8a16`."""
    return packed_moe(*args)


def moe_w4a8(*args: Any) -> Tensor:
    """As `moe`, by `linear_w4a8`."""
    return packed_moe(*args)


def _pack_experts(
    pack: Callable[[Integers], Any], multiply: Callable[..., Tensor], weights: Integers, call: Mapping[str, Any]
) -> list[Expert]:
    """Each expert's matrix, packed by itself."""
    zeros = [None] * len(weights.numbers) if weights.zeros is None else weights.zeros
    parts = zip(weights.numbers, weights.scales, zeros, strict=True)
    return [partial(_multiply, multiply, pack(Integers(*part))) for part in parts]


def _multiply(multiply: Callable[..., Tensor], panels: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return multiply(x, panels, bias)


def _against_half_bytes(form: Format) -> list[str]:
    checks = {
        f"the weights are {form.name}": not form.without_order.is_integers or form.bits != 4,
        f"groups of {form.block[1]} columns are no multiple of 8": form.block[1] % 8 > 0,
    }
    return [reason for reason, holds in checks.items() if holds]


def _against_experts(against: Callable[[Format], list[str]], form: Format) -> list[str]:
    """Those against a format for linear layers, which read their inputs in the order of the columns, and this one."""
    return against(form) or (["their columns are in any order"] if "order" in form.parts else [])


def _against_bytes(target: Any, *tensors: Tensor | None) -> list[str]:
    """The reasons against kernels that multiply bytes."""
    reasons = against_bfloat16(target, *tensors)
    return reasons or ([] if cpp.multiplies_bytes() else ["this CPU has neither AVX-512 VNNI nor AVX2 alone"])


def _against_linear(multiple: int, target: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    return _against_bytes(target, input, weight, bias) or _against_columns(multiple, weight)


def _against_moe(multiple: int, target: Any, x: Tensor, gate_up: Tensor, down: Tensor, **call: Any) -> list[str]:
    if call["transposed"]:
        return ["the experts' inputs come before their outputs"]
    matrices = _against_bytes(target, x, gate_up, call["gate_up_bias"])
    return matrices or _against_columns(multiple, gate_up) or _against_columns(multiple, down)


def _against_table(target: Any, weight: Tensor, **_: Any) -> list[str]:
    return _against_bytes(target, weight) or _against_columns(4, weight)


def _against_columns(multiple: int, weight: Tensor) -> list[str]:
    columns = weight.shape[-1]
    return (
        [f"{columns} columns are no multiple of {multiple} up to {MAX_INPUTS}"]
        if columns % multiple or columns > MAX_INPUTS
        else []
    )


for _name, _linear, _moe, _pack, _multiple, _against in (
    ("cpp_w4a8", linear_w4a8, moe_w4a8, pack_half_bytes, 8, _against_half_bytes),
    ("cpp_w8a16", linear_w8a16, moe_w8a16, pack_bytes, 4, partial(against_bytes, rounds=False)),
    ("cpp_w8a8", linear_w8a8, moe_w8a8, pack_bytes, 4, partial(against_bytes, rounds=True)),
):
    linear_op.register(Provider(_name, _linear, partial(_against_linear, _multiple), {"weight": _pack}, _against))
    _packs, _for_experts = partial(_pack_experts, _pack, _linear), partial(_against_experts, _against)
    moe.register(Provider(_name, _moe, partial(_against_moe, _multiple), {"gate_up": _packs, "down": _packs}, _for_experts))
embedding_op.register(
    Provider("cpp_w8", byte_embedding, _against_table, {"weight": pack_bytes}, partial(against_bytes, rounds=False))
)

"""Linear layers of whole numbers by Triton, in its interpreter: what the dense matrix gives, for rows that are rounded or not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops import linear_op
from autodeploy.custom_ops.triton_quantized import (
    HALF_BYTES,
    linear_fp4,
    linear_fp8,
    linear_w4a16,
    linear_w8a8,
    linear_w8a16,
    pack_byte_rows,
    pack_fp4_rows,
    pack_half_byte_rows,
    tile_for,
)
from autodeploy.formats import SCHEMES, Format, Integers
from tests.custom_ops.test_cpp_pointwise import numbers
from tests.custom_ops.test_cpp_quantized import matrix, rounded
from tests.custom_ops.triton_ops import CUDA, error

INT4 = SCHEMES["int4"]
WITH_ZEROS = replace(INT4, parts=("codes", "scales", "zeros"))
KINDS: dict[str, tuple[Format, Any, Any, int]] = {
    "w8a8": (SCHEMES["w8a8"], pack_byte_rows, linear_w8a8, 144),
    "w8a16": (SCHEMES["int8"], pack_byte_rows, linear_w8a16, 144),
    "fp8": (SCHEMES["fp8"], pack_byte_rows, linear_fp8, 144),
    "fp8, groups of 128": (replace(SCHEMES["fp8"], block=(1, 128)), pack_byte_rows, linear_fp8, 384),
    "w4a16": (INT4, pack_half_byte_rows, linear_w4a16, 192),
    "w4a16, a scale a row": (replace(INT4, block=(1, 0)), pack_half_byte_rows, linear_w4a16, 160),
    "w4a16, groups of 128, the half ends within one": (replace(INT4, block=(1, 128)), pack_half_byte_rows, linear_w4a16, 384),
    "w4a16, zeros": (WITH_ZEROS, pack_half_byte_rows, linear_w4a16, 192),
    "mxfp4": (SCHEMES["mxfp4"], pack_fp4_rows, linear_fp4, 192),
    "mxfp4, the half ends within a group": (SCHEMES["mxfp4"], pack_fp4_rows, linear_fp4, 160),
    "nvfp4": (SCHEMES["nvfp4"], pack_fp4_rows, linear_fp4, 96),
}


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def agrees(kind: str, rows: int, num_outputs: int, dtype: torch.dtype, *, biased: bool) -> None:
    """No farther from float64 than 1.2 times rounding the result, and the matrix of four bits, to `dtype`.

    In a row that is rounded to 8 bits a tie (half of the largest) may go the other way than in float64.
    """
    form, pack, linear, num_inputs = KINDS[kind]
    weight, dense = matrix(num_outputs, num_inputs, form)
    x, bias = numbers(1, rows, num_inputs, dtype=dtype), numbers(num_outputs, dtype=dtype) if biased else None
    inputs = rounded(x, 127, num_inputs) if linear is linear_w8a8 else x.double()
    exact = F.linear(inputs, dense, None if bias is None else bias.double())
    ours = linear(x, pack(weight), bias)
    assert (ours.shape, ours.dtype) == (exact.shape, dtype)
    plain = F.linear(inputs, dense.to(dtype).double() if form.bits == 4 else dense, None if bias is None else bias.double())
    assert error(ours, exact) <= 1.2 * error(plain.to(dtype), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_dense_matrix_gives(kind: str, dtype: torch.dtype) -> None:
    agrees(kind, 5, 70, dtype, biased=dtype == torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 16, 40, 150])
@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "fp8, groups of 128", "w4a16, zeros", "mxfp4"])
def test_tiles_for_any_number_of_rows(kind: str, rows: int) -> None:
    assert tile_for(rows, HALF_BYTES) == HALF_BYTES[(rows > 16) + (rows > 64)]
    agrees(kind, rows, 130, torch.bfloat16, biased=False)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "w4a16"])
def test_rows_of_nothing_and_of_what_is_no_number(kind: str) -> None:
    form, pack, linear, num_inputs = KINDS[kind]
    x, packed = numbers(6, num_inputs, dtype=torch.bfloat16), pack(matrix(30, num_inputs, form)[0])
    x[3, 5], x[4, 7], x[5] = float("nan"), float("inf"), 0
    out = linear(x, packed)
    assert out.isfinite().all(1).tolist() == [i not in (3, 4) for i in range(6)] and not out[5].any()
    assert linear(x[:0], packed).shape == (0, 30)
    assert torch.equal(linear(x.repeat(1, 2)[:3, :num_inputs], packed), out[:3])  # rows with a gap between them


@pytest.mark.parametrize("form", [INT4, WITH_ZEROS, replace(INT4, block=(1, 128))], ids=str)
@pytest.mark.parametrize("is_short", [True, False])
def test_half_bytes_are_kept_exactly(form: Format, is_short: bool) -> None:
    """128-column groups: the last one is a part of one."""
    num_inputs = 160 if form.block[1] == 128 else 128
    weight = matrix(20, 128 if num_inputs == 128 else 256, form)[0]
    weight = Integers(weight.numbers[:, :num_inputs], weight.scales, weight.zeros)
    if is_short:
        weight = replace(weight, scales=weight.scales.bfloat16().float())
    packed = pack_half_byte_rows(weight)
    assert (packed.scales.dtype == torch.bfloat16) == is_short and packed.group == form.block[1]
    low, high = packed.data & 15, packed.data >> 4
    assert torch.equal(torch.cat([low, high], 1).int() - 8, weight.numbers.int())
    assert torch.equal(packed.scales.T.float(), weight.scales)
    assert packed.offsets is None or torch.equal(packed.offsets.T.float() - 8, weight.zeros)
    assert packed.nbytes == 20 * (num_inputs // 2 + weight.scales.shape[1] * (2 if is_short else 4)) + (
        0 if packed.offsets is None else packed.offsets.nbytes
    )


@pytest.mark.parametrize("scheme", ["mxfp4", "nvfp4"])
def test_floats_of_four_bits_give_what_their_codes_stand_for(scheme: str) -> None:
    """Each of the 16 codes, down to the smallest scale that a format stores; the product with one is the number itself."""
    form, num_inputs = SCHEMES[scheme], 64
    codes = torch.arange(16, dtype=torch.uint8).repeat(num_inputs // 16)
    codes = (codes[::2] | codes[1::2] << 4)[None]
    factor = [] if scheme == "mxfp4" else [torch.tensor([0.01])]
    exponents = torch.tensor([[90, 130]], dtype=torch.uint8)
    scales = exponents if scheme == "mxfp4" else torch.tensor([[2.0**-9, 448, 1, 3]]).to(torch.float8_e4m3fn)
    stored = (codes, scales, *factor)
    weight, dense = form.integers((1, num_inputs), *stored), form.dequantize((1, num_inputs), *stored)
    torch.testing.assert_close(weight.numbers * weight.scales.repeat_interleave(form.block[1], 1), dense, rtol=1e-6, atol=0)
    packed = pack_fp4_rows(weight)
    assert packed.scales.dtype == (torch.bfloat16 if scheme == "mxfp4" else torch.float32)
    assert packed.nbytes == num_inputs // 2 + packed.scales.nbytes
    found = linear_fp4(torch.eye(num_inputs).bfloat16(), packed)[:, 0]
    torch.testing.assert_close(found.float(), dense[0], rtol=0 if scheme == "mxfp4" else 2**-8, atol=0)


def choice(form: Format | None, x: Tensor, weight: Tensor) -> tuple[str, dict[str, list[str]]]:
    provider, against = linear_op.choose(CUDA, x, weight, parameters={"weight": form})
    return provider.name, against


def test_which_kernel_a_format_gets_and_why_not_another() -> None:
    x, weight = torch.ones(1, 4, 512).bfloat16(), torch.ones(512, 512).bfloat16()
    assert choice(None, x, weight)[0] == "reference"
    assert choice(SCHEMES["w8a8"], x, weight)[0] == "triton_w8a8"
    name, against = choice(SCHEMES["int8"], x, weight)
    assert name == "triton_w8a16" and against["triton_w8a8"] == ["activations may not be rounded"]
    assert choice(INT4, x, weight)[0] == choice(WITH_ZEROS, x, weight)[0] == "triton_w4a16"
    assert choice(SCHEMES["mxfp4"], x, weight)[0] == choice(SCHEMES["nvfp4"], x, weight)[0] == "triton_fp4"
    assert {choice(replace(SCHEMES["fp8"], block=block), x, weight)[0] for block in ((0, 0), (1, 0), (128, 128))} == {
        "triton_fp8"
    }
    for form, reason in {
        replace(SCHEMES["mxfp4"], parts=("codes", "scales", "columns")): "the weights are mxfp4",
        replace(SCHEMES["mxfp4"], block=(1, 8)): "no power of 2 from 16 on",
        replace(SCHEMES["fp8"], block=(1, 24)): "no power of 2 from 16 on",
        replace(SCHEMES["int8"], block=(1, 32)): "groups of columns",
        replace(SCHEMES["int8"], parts=("codes", "scales", "zeros")): "zero points",
        replace(INT4, block=(1, 8)): "no power of 2 from 16 on",
        replace(INT4, block=(1, 48)): "no power of 2 from 16 on",
    }.items():
        name, against = choice(form, x, weight)
        assert name == "reference" and reason in str(against)
    assert "it has no float32" in str(choice(SCHEMES["w8a8"], x.float(), weight.float())[1]["triton_w8a8"])
    assert "no multiple of 32" in str(choice(INT4, x[..., :496], weight[:, :496])[1])

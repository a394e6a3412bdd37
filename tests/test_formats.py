"""Rounding to a format is to the nearest number it has, and whole numbers stand for what the dense matrix holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from autodeploy.formats import E2M1, SCHEMES, BrokenPartError, Integers

CODES = {
    "int8": torch.arange(-127, 128).float(),
    "int4": torch.arange(-8, 8).float(),
    "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0),
    "mxfp4": torch.tensor([*E2M1, *(-value for value in E2M1)]),
    "nvfp4": torch.tensor([*E2M1, *(-value for value in E2M1)]),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_number_becomes_the_nearest_there_is(scheme: str) -> None:
    form, dense = SCHEMES[scheme], torch.randn(6, 128) * torch.logspace(-3, 2, 6)[:, None]
    codes, *rest = form.quantize(dense)
    ones = torch.ones_like(codes) if form.layout == "plain" else torch.full_like(codes, 0x22)  # 1.0 in both halves
    became, steps = (form.dequantize((6, 128), each, *rest) for each in (codes, ones))
    nearest = (dense[..., None] - steps[..., None] * CODES[form.name]).abs().amin(-1)
    assert (((dense - became).abs() - nearest) / dense.abs().amax(1, keepdim=True)).abs().max() < 1e-5


ERRORS = {"int8": 0.01, "w8a8": 0.01, "int4": 0.11, "fp8": 0.03, "mxfp4": 0.16, "nvfp4": 0.11}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_lost(scheme: str) -> None:
    """Relative errors of normal numbers: half of them would be another format, twice as much a defect."""
    dense = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    became = SCHEMES[scheme].dequantize((64, 512), *SCHEMES[scheme].quantize(dense))
    assert ERRORS[scheme] / 2 < float((became - dense).norm() / dense.norm()) < ERRORS[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounding_once_more_changes_nothing_and_zeros_stay(scheme: str) -> None:
    form, dense = SCHEMES[scheme], torch.randn(4, 64)
    dense[1], dense[2, :32] = 0, 0
    once = form.dequantize((4, 64), *form.quantize(dense))
    assert not once[1].any() and not once[2, :32].any() and once.isfinite().all()
    if form.name != "int4":  # whose largest number loses half a step each time
        torch.testing.assert_close(form.dequantize((4, 64), *form.quantize(once)), once, rtol=1e-2, atol=0)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_whole_numbers_stand_for_the_same_matrix(scheme: str) -> None:
    form = SCHEMES[scheme]
    parts = form.quantize(torch.randn(3, 5, 64))
    made = form.integers((3, 5, 64), *parts)
    groups = made.scales.shape[-1]
    assert made.numbers.dtype == torch.int8 and made.zeros is None and groups == (1 if scheme == "int8" else 2)
    dense = made.numbers.float() * made.scales.repeat_interleave(64 // groups, -1)
    assert torch.equal(dense, form.dequantize((3, 5, 64), *parts))


def test_a_scale_that_is_no_number_is_refused() -> None:
    form = SCHEMES["int8"]
    codes, scales = form.quantize(torch.randn(4, 8))
    scales[2] = float("nan")
    with pytest.raises(BrokenPartError, match="not a finite number") as error:
        form.integers((4, 8), codes, scales)
    assert error.value.part == "scales"


def test_columns_are_sorted_by_their_groups() -> None:
    form = replace(SCHEMES["int4"], block=(1, 2), parts=("codes", "scales", "order"))
    codes, scales = torch.arange(8, dtype=torch.int8).reshape(2, 4) - 4, torch.tensor([[1.0, 10.0], [2.0, 20.0]])
    group = torch.tensor([1, 0, 1, 0], dtype=torch.int32)
    made, dense = form.integers((2, 4), codes, scales, group), form.dequantize((2, 4), codes, scales, group)
    assert made.order is not None and made.order.tolist() == [1, 3, 0, 2] and form.without_order.is_integers
    torch.testing.assert_close(made.numbers * made.scales.repeat_interleave(2, 1), dense[:, made.order])
    for wrong in ([0, 0, 0, 1], [-1, -1, -1, -1], [0, 0, 1, 2]):
        with pytest.raises(BrokenPartError, match="does not put 2 columns in each group"):
            form.integers((2, 4), codes, scales, torch.tensor(wrong, dtype=torch.int32))


def test_stored_whole_numbers() -> None:
    form = SCHEMES["int8"]
    assert (
        form.is_integers
        and not replace(form, name="fp8").is_integers
        and not replace(form, parts=("codes", "scales", "order")).is_integers
    )
    assert not replace(form, block=(128, 128)).is_integers


@pytest.mark.parametrize(("block", "scales"), [((0, 0), (1, 1)), ((1, 0), (200, 1)), ((128, 128), (2, 3)), ((1, 128), (200, 3))])
def test_floats_of_8_bits_as_kernels_want_them(block: tuple[int, int], scales: tuple[int, int]) -> None:
    torch.manual_seed(0)
    form, shape = replace(SCHEMES["fp8"], block=block), (200, 300)
    stored = (torch.randn(shape) * 50).to(torch.float8_e4m3fn), torch.rand(scales) + 0.1
    made = form.integers(shape, *stored)
    assert made.numbers.dtype == torch.float8_e4m3fn and made.scales.shape == (200, scales[1])
    spread = made.scales.repeat_interleave(128 if block[1] else 300, 1)[:, :300]
    assert torch.equal(made.numbers.float() * spread, form.dequantize(shape, *stored))
    both = Integers.joined([made, made], torch.cat)
    assert torch.equal(both.numbers.float(), made.numbers.float().repeat(2, 1)) and both.scales.shape[0] == 400

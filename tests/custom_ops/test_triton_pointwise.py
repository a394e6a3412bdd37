"""Norms and gated activations by Triton, in its interpreter: as near to float64 as the references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy import custom_ops as ops
from autodeploy.custom_ops.pointwise import ACTIVATIONS
from tests.custom_ops.test_cpp_pointwise import layouts, numbers
from tests.custom_ops.triton_ops import CUDA, check


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [3, 130])
def test_norms(dtype: torch.dtype, width: int) -> None:
    weight, bias = numbers(width, dtype=dtype), numbers(width, dtype=dtype, scale=0.5)
    for name, x in layouts(width, dtype).items():
        if name == "many":
            continue
        for offset, in_float in ((0.0, False), (1.0, False), (1.0, True)):
            check(ops.rms_norm, x, weight, 1e-6, offset, in_float)
        check(ops.rms_norm, x, None, 1e-2, 0.0, False)
        if x.is_contiguous():
            check(ops.add_rms_norm, x, x.flip(-1), weight, 1e-6, 1.0, True)
            check(ops.add_rms_norm, x, x.flip(-1), None, 1e-6, 0.0, False)
            check(ops.layer_norm, x + 3, weight, bias, 1e-5)
            check(ops.layer_norm, x, None, None, 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gated_activations(dtype: torch.dtype, activation: str) -> None:
    for width in (3, 1031):
        gate, up = numbers(1, 5, 2 * width, dtype=dtype, scale=3.0).split(width, -1)
        check(ops.gated_activation, gate, up, activation)
        check(ops.gated_activation, gate.contiguous()[0], up.contiguous()[0], activation)


def test_what_is_left_to_the_reference() -> None:
    wide: tuple[tuple[Any, Tensor], ...] = ((ops.rms_norm, torch.ones(2, 40000)), (ops.rms_norm, torch.ones(2, 8).double()))
    for (op, x), reason in zip(wide, ("more than 32768", "no float64"), strict=True):
        provider, against = op.choose(CUDA, x, None, 1e-6, 0.0, False)
        assert provider.name == "reference" and reason in str(against["triton"]) and "not on cuda" in str(against["cpp"])

"""Experts of few bits by Triton, in its interpreter: as near to float64 as rounding allows, whatever form they are stored in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.custom_ops import moe
from autodeploy.formats import SCHEMES, Format, Integers
from tests.custom_ops.test_cpp_pointwise import numbers
from tests.custom_ops.test_cpp_quantized import matrix
from tests.custom_ops.triton_ops import CUDA, error

EXPERTS, WIDTH, INNER = 4, 64, 96
SILU = ("halves", "silu", 1.0, 0.0, 0.0)
PAIRS = ("pairs", "swish", 1.7, 0.5, 1.0)
FP8, INT4 = SCHEMES["fp8"], SCHEMES["int4"]
KINDS: dict[str, tuple[Format, str]] = {
    "fp8, a scale a row": (FP8, "triton_fp8"),
    "fp8, groups": (replace(FP8, block=(1, 32)), "triton_fp8"),
    "int8": (SCHEMES["int8"], "triton_w8a16"),
    "int8, rounded rows": (SCHEMES["w8a8"], "triton_w8a8"),
    "int4": (INT4, "triton_w4a16"),
    "int4, zeros": (replace(INT4, parts=("codes", "scales", "zeros")), "triton_w4a16"),
    "mxfp4": (SCHEMES["mxfp4"], "triton_fp4"),
    "nvfp4": (SCHEMES["nvfp4"], "triton_fp4"),
}
HALVES = ("int4", "mxfp4", "nvfp4")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def experts(num_outputs: int, num_inputs: int, form: Format) -> tuple[Integers, Tensor]:
    """As stored, and dense in float64."""
    each = [matrix(num_outputs, num_inputs, form) for _ in range(EXPERTS)]
    return Integers.joined([stored for stored, _ in each], torch.stack), torch.stack([dense for _, dense in each])


def call(form: Format, gate: tuple[Any, ...], dtype: torch.dtype, tokens: int, *, biased: bool) -> tuple[list[Any], list[Any]]:
    """Arguments with the experts as stored, and with dense ones in float64."""
    outputs = INNER if gate[0] == "plain" else 2 * INNER
    (up, dense_up), (down, dense_down) = experts(outputs, WIDTH, form), experts(WIDTH, INNER, form)
    index = torch.stack([(torch.arange(2) + t * t) % (EXPERTS + (t % 5 == 4)) for t in range(tokens)])
    rows = [numbers(tokens, WIDTH, dtype=dtype), index, numbers(tokens, 2, dtype=dtype).abs()]
    biases = [numbers(EXPERTS, size, dtype=dtype) if biased else None for size in (outputs, WIDTH)]
    wide = [bias if bias is None else bias.double() for bias in biases]
    exact = [rows[0].double(), index, rows[2].double(), dense_up, dense_down, *wide, False, *gate]
    return [*rows, up, down, *biases, False, *gate], exact


def chosen(form: Format, given: list[Any], exact: list[Any]) -> tuple[Any, dict[str, list[str]]]:
    dense = [part.to(given[0].dtype) if isinstance(part, Tensor) and part.is_floating_point() else part for part in exact]
    return moe.choose(CUDA, *dense, parameters={"gate_up": form, "down": form})


def agrees(kind: str, gate: tuple[Any, ...], dtype: torch.dtype, tokens: int, *, biased: bool) -> None:
    """No farther from float64 than 1.3 times the op in `dtype`, of the matrices rounded to it; rounded rows differ by more."""
    form, name = KINDS[kind]
    given, exact = call(form, gate, dtype, tokens, biased=biased)
    provider, against = chosen(form, given, exact)
    assert provider.name == name, against
    packed = [provider.packs["gate_up"](given[3], {}), provider.packs["down"](given[4], {})]
    ours, right = provider.function(*given[:3], *packed, *given[5:]), moe.reference(*exact)
    plain = moe.reference(*given[:3], exact[3].to(dtype), exact[4].to(dtype), *given[5:])
    assert (ours.shape, ours.dtype) == (right.shape, dtype)
    assert error(ours, right) <= max(1.3 * error(plain, right), 0.02 * (name == "triton_w8a8"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_dense_experts_give(kind: str, dtype: torch.dtype) -> None:
    is_short = dtype == torch.bfloat16
    agrees(kind, SILU if is_short else PAIRS, dtype, 5, biased=not is_short)


@pytest.mark.parametrize("kind", ["fp8, groups", "int8, rounded rows", "mxfp4"])
@pytest.mark.parametrize("tokens", [60, 160])
def test_larger_tiles(kind: str, tokens: int) -> None:
    agrees(kind, ("plain", "relu2", 1.0, 0.0, 0.0), torch.bfloat16, tokens, biased=False)


def test_packed_experts_take_what_few_bits_take() -> None:
    for scheme, bits in {"mxfp4": 4.5, "int4": 4.5, "int8": 8 + 32 / 64, "nvfp4": 6}.items():
        given, exact = call(SCHEMES[scheme], SILU, torch.bfloat16, 2, biased=False)
        provider, _ = chosen(SCHEMES[scheme], given, exact)
        stored = given[3] if scheme != "int4" else replace(given[3], scales=given[3].scales.bfloat16().float())
        if scheme == "mxfp4":
            stored = replace(stored, scales=stored.scales.log2().floor().exp2())
        assert provider.packs["gate_up"](stored, {}).nbytes == bits / 8 * stored.numbers.numel()


def test_what_is_left_to_others_and_why() -> None:
    form = SCHEMES["mxfp4"]
    given, exact = call(form, SILU, torch.bfloat16, 2, biased=False)
    turned = [part.transpose(1, 2) if i in (3, 4) else part for i, part in enumerate(exact)]
    turned[7] = True
    provider, against = chosen(form, given, turned)
    assert provider.name == "triton" and against["triton_fp4"] == ["the experts' inputs come before their outputs"]
    assert against["triton_w4a16"] == against["triton_fp8"] == ["the weights are mxfp4"] * 2
    narrow = [part[..., :48] if i == 4 else part for i, part in enumerate(exact)]
    assert "48 columns are no multiple of 32" in str(chosen(form, given, narrow)[1]["triton_fp4"])
    given[0] = given[0].float()
    assert chosen(form, given, exact)[1]["triton_fp4"] == ["it has no float32"]

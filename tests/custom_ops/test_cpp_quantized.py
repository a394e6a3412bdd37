"""Linear layers of whole numbers: what the dense matrix gives for rounded rows; the same bits for a row alone and in company."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy import Target
from autodeploy.custom_ops import cpp, cpp_quantized, embedding_op, linear_op, moe
from autodeploy.formats import SCHEMES, Format, Integers
from tests.marks import needs_byte_kernels

SIZES = [(64, 32), (130, 96), (1, 608), (70, 1184)]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def matrix(num_outputs: int, num_inputs: int, form: Format) -> tuple[Integers, Tensor]:
    """Drawn numbers in a format, and the dense matrix by a formula of its own."""
    half, groups = 1 << (form.bits - 1), num_inputs // (form.block[1] or num_inputs)
    numbers = torch.randint(-half, half, (num_outputs, num_inputs), dtype=torch.int8)
    if form.is_fp8:
        numbers = numbers.float().to(torch.float8_e4m3fn)
    if form.is_fp4:
        numbers = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12], dtype=torch.int8)[numbers.int().abs() % 8] * numbers.sign()
    scales = torch.rand(num_outputs, groups) * 0.01 + 0.001
    zeros = torch.randint(-half, half, scales.shape).float() if "zeros" in form.parts else None
    shift = 0 if zeros is None else zeros.double().repeat_interleave(num_inputs // groups, 1)
    return Integers(numbers, scales, zeros), (numbers.double() - shift) * scales.double().repeat_interleave(
        num_inputs // groups, 1
    )


def rounded(x: Tensor, limit: int, size: int) -> Tensor:
    """x with each `size` numbers of a row rounded to whole multiples of their largest / limit."""
    parts = x.double().unflatten(-1, (-1, size))
    steps = parts.abs().amax(-1, keepdim=True) / limit
    return ((parts / steps).round() * steps).flatten(-2)


KINDS: dict[str, tuple[Format, Callable[..., Any], Callable[..., Tensor], int]] = {
    "w8a8": (SCHEMES["w8a8"], cpp_quantized.pack_bytes, cpp_quantized.linear_w8a8, 127),
    "w8a16": (SCHEMES["int8"], cpp_quantized.pack_bytes, cpp_quantized.linear_w8a16, 32767),
    "w4a8": (SCHEMES["int4"], cpp_quantized.pack_half_bytes, cpp_quantized.linear_w4a8, 127),
    "w4a8, groups of 8": (replace(SCHEMES["int4"], block=(1, 8)), cpp_quantized.pack_half_bytes, cpp_quantized.linear_w4a8, 127),
    "w4a8, zeros": (
        replace(SCHEMES["int4"], parts=("codes", "scales", "zeros")),
        cpp_quantized.pack_half_bytes,
        cpp_quantized.linear_w4a8,
        127,
    ),
}


@needs_byte_kernels
@pytest.mark.parametrize("kind", ["w8a8", "w8a16", "w4a8"])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("num_inputs", [1024, 1 << 16])
def test_the_largest_sums_fit(kind: str, rows: int, num_inputs: int) -> None:
    form, pack, linear, _ = KINDS[kind]
    least = -(1 << form.bits - 1)
    groups = num_inputs // (form.block[1] or num_inputs)
    weight = Integers(torch.full((64, num_inputs), least, dtype=torch.int8), torch.ones(64, groups), None)
    for number in (1.0, -1.0):
        ours = linear(torch.full((1, rows, num_inputs), number).bfloat16(), pack(weight))
        assert torch.equal(ours, torch.full((1, rows, 64), number * least * num_inputs).bfloat16())


@needs_byte_kernels
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 4, 5, 6, 7, 12, 33, 200])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), SIZES)
def test_what_the_dense_matrix_gives(kind: str, rows: int, num_outputs: int, num_inputs: int) -> None:
    form, pack, linear, limit = KINDS[kind]
    weight, dense = matrix(num_outputs, num_inputs, form)
    x, bias = torch.randn(1, rows, num_inputs).bfloat16(), torch.randn(num_outputs).bfloat16()
    exact = (
        F.linear(rounded(x, limit, form.block[1] or num_inputs), dense, bias.double()) if rows else x.new_empty(1, 0, num_outputs)
    )
    ours = linear(x, pack(weight), bias)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    assert rows == 0 or float((ours - exact).norm() / exact.norm()) < 2**-7  # a tie may be rounded otherwise
    without = linear(x, pack(weight))
    assert rows == 0 or float((without - (exact - bias)).norm() / exact.norm()) < 2**-7


@needs_byte_kernels
@pytest.mark.parametrize("is_short", [True, False])
def test_scales_are_kept_exactly_and_in_half_where_that_is_exact(is_short: bool) -> None:
    weight, dense = matrix(70, 96, SCHEMES["int4"])
    if is_short:
        weight = replace(weight, scales=weight.scales.bfloat16().float())
        dense = weight.numbers.double() * weight.scales.double().repeat_interleave(32, 1)
    packed = cpp_quantized.pack_half_bytes(weight)
    assert packed.scales.dtype == (torch.bfloat16 if is_short else torch.float32)
    rows = torch.eye(96).bfloat16() * 127  # each is rounded to itself
    torch.testing.assert_close(
        cpp_quantized.linear_w4a8(rows, packed).T.double(), (dense * 127).bfloat16().double(), rtol=2**-8, atol=0
    )


@needs_byte_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_the_rows_beside_it(kind: str) -> None:
    form, pack, linear, _ = KINDS[kind]
    x, packed = torch.randn(300, 1184).bfloat16(), pack(matrix(200, 1184, form)[0])
    together = linear(x, packed)
    for rows in (slice(0, 1), slice(5, 8), slice(100, 132), slice(1, 300)):
        assert torch.equal(linear(x[rows], packed), together[rows])


@needs_byte_kernels
@pytest.mark.parametrize("kind", ["w4a8", "w4a8, zeros"])
def test_columns_in_any_order_meet_their_inputs(kind: str) -> None:
    form, pack, linear, _ = KINDS[kind]
    x, weight, order = torch.randn(300, 1184).bfloat16(), matrix(200, 1184, form)[0], torch.randperm(1184)
    packed, plain = pack(replace(weight, order=order.to(torch.int32))), pack(weight)
    assert packed.nbytes == plain.nbytes + 4 * 1184
    for rows in (1, 3, 300):
        assert torch.equal(linear(x[:rows], packed), linear(x[:rows, order], plain))
    assert not torch.equal(linear(x, packed), linear(x, plain))


@needs_byte_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_nothing_and_of_what_is_no_number(kind: str) -> None:
    form, pack, linear, _ = KINDS[kind]
    x, packed = torch.randn(8, 256).bfloat16(), pack(matrix(64, 128, form)[0])
    assert torch.equal(linear(x[:, :128], packed), linear(x[:, :128].contiguous(), packed))  # rows with a gap between them
    x[3, 5], x[4, 7], x[5] = float("nan"), float("inf"), 0
    out = linear(x[:, :128], packed)
    assert out.isnan().all(1).tolist() == [i in (3, 4) for i in range(8)] and not out[5].any()


@needs_byte_kernels
def test_rows_of_a_table_of_bytes() -> None:
    weight, dense = matrix(130, 96, SCHEMES["int8"])
    ids = torch.randint(0, 130, (1, 20))
    assert torch.equal(cpp_quantized.byte_embedding(cpp_quantized.pack_bytes(weight), ids), dense.bfloat16()[ids])


@needs_byte_kernels
@pytest.mark.parametrize(("scheme", "provider"), [("w8a8", "cpp_w8a8"), ("int8", "cpp_w8a16"), ("int4", "cpp_w4a8")])
def test_experts_of_whole_numbers(scheme: str, provider: str) -> None:
    x, index, weights = torch.randn(9, 64).bfloat16(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2).bfloat16()
    made = {
        name: [matrix(*shape, SCHEMES[scheme]) for _ in range(4)] for name, shape in (("gate_up", (192, 64)), ("down", (64, 96)))
    }
    rest = (None, None, False, "halves", "silu", 1.0, 0.0, 0.0)
    chosen = next(item for item in moe.providers if item.name == provider)
    packed = [
        chosen.packs[name](Integers.joined([each for each, _ in several], torch.stack), {"transposed": False})
        for name, several in made.items()
    ]
    exact = moe.reference(x.double(), index, weights.double(), *(torch.stack([d for _, d in s]) for s in made.values()), *rest)
    assert float((chosen.function(x, index, weights, *packed, *rest) - exact).norm() / exact.norm()) < 2**-5


@needs_byte_kernels
@pytest.mark.skipif(cpp.isas()[0] == "avx2", reason="this CPU has no more than AVX2")
def test_cpus_with_avx2_alone() -> None:
    chosen = "beside_it or largest_sums or (dense_matrix and 130) or rows_of_a_table"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    environment = {**os.environ, "AUTODEPLOY_CPP_ISA": "avx2"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "skipped" not in found.stdout, found.stdout[-2000:]


@pytest.mark.parametrize("isa", cpp.ISAS)
def test_which_cpus_multiply_bytes(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "isa", lambda: isa)
    assert cpp.multiplies_bytes.__wrapped__() == (isa not in ("avx512", "generic"))
    assert cpp.widens_bytes.__wrapped__() == (isa == "avx2")


def choice(form: Format | None, x: Tensor, weight: Tensor) -> tuple[str, dict[str, list[str]]]:
    provider, against = linear_op.choose(Target(), x, weight, parameters={"weight": form})
    return provider.name, against


@needs_byte_kernels
def test_which_kernel_a_format_gets_and_why_not_another() -> None:
    x, weight = torch.randn(1, 4, 512).bfloat16(), torch.randn(512, 512).bfloat16()
    assert choice(None, x, weight) == ("cpp", {})
    assert choice(SCHEMES["w8a8"], x, weight) == ("cpp_w8a8", {})
    assert choice(SCHEMES["int8"], x, weight) == ("cpp_w8a16", {"cpp_w8a8": ["activations may not be rounded"]})
    assert choice(SCHEMES["int4"], x, weight)[0] == "cpp_w4a8"
    assert choice(replace(SCHEMES["int4"], parts=("codes", "scales", "order")), x, weight)[0] == "cpp_w4a8"
    for form, reason in {
        SCHEMES["fp8"]: "the weights are fp8",
        replace(SCHEMES["int8"], block=(1, 32)): "groups of columns",
        replace(SCHEMES["int8"], parts=("codes", "scales", "zeros")): "zero points",
        replace(SCHEMES["int4"], block=(1, 4)): "no multiple of 8",
    }.items():
        name, against = choice(form, x, weight)
        assert name == "cpp" and reason in str(against)
    assert choice(SCHEMES["w8a8"], x.float(), weight.float())[0] == "onednn"  # float32 is kept exact
    assert "no multiple of 4" in str(choice(SCHEMES["w8a8"], x[..., :510], weight[:, :510])[1])
    assert embedding_op.choose(Target(), weight, torch.ones(1, 4), parameters={"weight": SCHEMES["w8a8"]})[0].name == "cpp_w8"

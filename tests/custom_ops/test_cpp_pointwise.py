"""The C++ kernels of pointwise ops: as near to float64 as the references, on any layout they do not refuse, for every CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autodeploy import custom_ops as ops
from autodeploy.custom_ops import SEMANTIC_OPS, cpp, cpp_pointwise
from autodeploy.custom_ops.cpp_sampling import at_least, finite_argmax, largest_of_rows
from autodeploy.custom_ops.pointwise import ACTIVATIONS
from autodeploy.specs import Target
from tests.marks import needs_cpp_kernels

LIMITS = {torch.bfloat16: 0.0, torch.float32: 1e-6}
WIDTHS = (3, 16, 130, 1031)
POINTWISE = (ops.rms_norm, ops.add_rms_norm, ops.layer_norm, ops.rope, ops.gated_activation)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(dtype)


def layouts(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows [..., width] as graphs have them."""
    heads = numbers(1, 5, 4, width + 6, dtype=dtype)
    return {
        "contiguous": numbers(1, 5, width, dtype=dtype),
        "matrix": numbers(5, width, dtype=dtype),
        "many": numbers(1, 70, 16, width, dtype=dtype),
        "part of a product": numbers(1, 5, 3 * width, dtype=dtype)[..., width : 2 * width],
        "heads of a product": heads[..., 3 : width + 3],
        "heads first": heads[..., :width].transpose(1, 2),
        "dense heads first": numbers(1, 5, 4, width, dtype=dtype).transpose(1, 2),
    }


def check(op: Any, *args: Any) -> None:
    """The kernel's results lie as the shape rule says, and are no farther from float64 than 1.2 times the reference's."""
    (provider,) = [provider for provider in op.providers if provider.name == "cpp"]
    assert not op.reasons_against(provider, Target(), *args)
    ours, plain = tree_leaves(provider.function(*args)), tree_leaves(op.reference(*args))
    exact = tree_leaves(op.reference(*tree_map_only(Tensor, lambda x: x.double(), args)))
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        like = torch.empty_like(args[0])
        assert (mine.shape, mine.dtype, mine.stride()) == (like.shape, like.dtype, like.stride())
        errors = [float((result.double() - right).norm() / right.norm()) for result in (mine, theirs)]
        assert errors[0] <= max(1.2 * errors[1], LIMITS[mine.dtype]), errors


@needs_cpp_kernels
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms_are_as_exact_as_the_references(dtype: torch.dtype, width: int) -> None:
    weight, bias = numbers(width, dtype=dtype), numbers(width, dtype=dtype, scale=0.5)
    for x in layouts(width, dtype).values():
        for offset, in_float in ((0.0, False), (0.0, True), (1.0, True)):
            check(ops.rms_norm, x, weight, 1e-6, offset, in_float)
        check(ops.rms_norm, x, None, 1e-2, 0.0, False)
        if x.is_contiguous():
            check(ops.add_rms_norm, x, x.flip(-1), weight, 1e-6, 1.0, True)
            check(ops.add_rms_norm, x, x.flip(-1), None, 1e-6, 0.0, False)
            check(ops.layer_norm, x + 3, weight, bias, 1e-5)
            check(ops.layer_norm, x, None, None, 1e-5)


@needs_cpp_kernels
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("width", [2, 16, 40, 66, 128])
def test_rope_is_as_exact_as_the_reference(dtype: torch.dtype, width: int, interleaved: bool) -> None:
    for x in layouts(width, dtype).values():
        if x.dim() == 4:
            angles = numbers(1, x.shape[2], width, scale=3.0)
            check(ops.rope, x, angles.cos().to(dtype)[:, None], angles.sin().to(dtype), interleaved)


@needs_cpp_kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", LIMITS)
def test_gated_activations_are_as_exact_as_the_reference(dtype: torch.dtype, activation: str) -> None:
    for width in WIDTHS:
        gate, up = numbers(1, 9, 2 * width, dtype=dtype, scale=3.0).split(width, -1)
        check(ops.gated_activation, gate, up, activation)
        check(ops.gated_activation, gate.contiguous()[0], up.contiguous()[0], activation)
    tails = torch.linspace(-9, 9, 5001).to(dtype)[None]
    check(ops.gated_activation, tails, tails.flip(-1), activation)


@needs_cpp_kernels
def test_far_tails_of_gelu_keep_their_digits() -> None:
    x = torch.linspace(-9, -3, 1000)[None]
    ours = cpp_pointwise.gated_activation(x, torch.ones_like(x), "gelu")
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    torch.testing.assert_close(ours.double(), exact, rtol=2e-5, atol=0)


@needs_cpp_kernels
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_row(odd: float) -> None:
    x, weight = numbers(1, 4, 40), numbers(40)
    x[0, 2, 39] = odd
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.rms_norm, (x, weight, 1e-6, 0.0, False)),
        (ops.add_rms_norm, (x, numbers(1, 4, 40), weight, 1e-6, 0.0, False)),
        (ops.layer_norm, (x, weight, weight, 1e-6)),
        (ops.rope, (x[:, None], weight.cos().expand(1, 4, 40).contiguous(), weight.sin().expand(1, 4, 40).contiguous(), False)),
        *((ops.gated_activation, (x, numbers(1, 4, 40), activation)) for activation in ACTIVATIONS),
    ]
    for op, args in calls:
        (provider,) = [provider for provider in op.providers if provider.name == "cpp"]
        exact = tree_leaves(op.reference(*tree_map_only(Tensor, lambda tensor: tensor.double(), args)))
        for mine, right in zip(tree_leaves(provider.function(*args)), exact, strict=True):
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5, equal_nan=True)


@needs_cpp_kernels
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows: int) -> None:
    x, weight = numbers(1, 300, 1024, dtype=torch.bfloat16), numbers(1024, dtype=torch.bfloat16)
    together = cpp_pointwise.rms_norm(x, weight, 1e-6, 0.0, False), cpp_pointwise.gated_activation(x, x, "silu")
    some = x[:, :rows]
    alone = cpp_pointwise.rms_norm(some, weight, 1e-6, 0.0, False), cpp_pointwise.gated_activation(some, some, "silu")
    assert all(torch.equal(mine, all_of_them[:, :rows]) for mine, all_of_them in zip(alone, together, strict=True))


@needs_cpp_kernels
def test_reasons_against_the_kernels() -> None:
    x, weight = numbers(1, 4, 3, 8), numbers(8)
    angles = numbers(1, 3, 8)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "it has no float64": (ops.rms_norm, (x.double(), weight.double(), 1e-6, 0.0, False)),
        "it has no bfloat16 with float32": (ops.rms_norm, (x, weight.bfloat16(), 1e-6, 0.0, True)),
        "the weight or bias is not one vector": (ops.layer_norm, (x, x[0, 0], None, 1e-6)),
        "the rows are not in two dims, or their numbers not neighbours": (
            ops.rms_norm,
            (x.transpose(2, 3), numbers(3), 1e-6, 0.0, False),
        ),
        "its input is not contiguous": (ops.add_rms_norm, (x[..., :4], x[..., :4], None, 1e-6, 0.0, False)),
        "cos or sin is not [1, T, D]": (ops.rope, (x, angles[..., :1].contiguous(), angles, False)),
        "x is not [1, H, T, D] with an even D": (ops.rope, (x[..., :7], angles[..., :7].clone(), angles[..., :7].clone(), False)),
        "it has no tanh": (ops.gated_activation, (x, x, "tanh")),
        "gate and up differ in shape": (ops.gated_activation, (x, x[:, :1], "silu")),
        "the rows are not in one dim, or their numbers not neighbours": (ops.gated_activation, (x[..., :4], x[..., :4], "silu")),
    }
    for reason, (op, args) in calls.items():
        _, against = op.choose(Target(), *args)
        assert against["cpp"] == [reason]


def rows_of_logits(dtype: torch.dtype) -> Tensor:
    logits = numbers(6, 3001, dtype=dtype)[:, :3000]
    logits[1, 2999], logits[2, 0] = 9.0, 9.0
    logits[3, [7, 1500, 2998]] = 9.0  # the first of equals
    logits[4] = -float("inf")
    logits[5, 1234] = float("inf")
    return logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16, torch.float64])
def test_the_largest_of_each_row_is_that_of_torch(dtype: torch.dtype) -> None:
    logits = rows_of_logits(dtype)
    for width in (3000, 2990, 17, 1):
        highest, where = largest_of_rows(logits[:, :width])
        expected = logits[:, :width].max(-1)
        assert torch.equal(highest.double(), expected.values.double()) and torch.equal(where, expected.indices)
    logits[2, 2987] = float("nan")
    assert largest_of_rows(logits)[0].isnan().tolist() == [False, False, True, False, False, False]
    assert largest_of_rows(logits[:, 2987:2988])[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_largest_of_a_row_that_is_cut_into_parts(dtype: torch.dtype) -> None:
    logits = numbers(1, 152_001, dtype=dtype)
    for places in ([], [0], [152_000], [80_000, 70_000, 90_000], [76_000, 75_999]):
        logits[0, places] += 50.0
        expected = logits.max(-1)
        highest, where = largest_of_rows(logits)
        assert torch.equal(highest.double(), expected.values.double()) and torch.equal(where, expected.indices)
        logits[0, places] = 99.0
    for place in (5, 151_999):
        with_nan = logits.clone()
        with_nan[0, place] = float("nan")
        assert largest_of_rows(with_nan)[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_where_the_largest_is_where_all_are_finite(dtype: torch.dtype) -> None:
    logits = rows_of_logits(dtype)[[0, 1, 3]]
    assert np.array_equal(finite_argmax(logits, 2990), logits[:, :2990].argmax(-1))  # pyright: ignore[reportArgumentType]
    for bad in (float("nan"), float("inf")):
        logits[1, 2995] = bad
        assert finite_argmax(logits, 2990) is not None and finite_argmax(logits, 3000) is None
    assert finite_argmax(torch.full((1, 70_000), -float("inf"), dtype=dtype), 70_000) is None


@pytest.mark.parametrize("least", [-float("inf"), -1.0, 0.5, 3.0, 9.0, 10.0])
def test_where_numbers_are_large_enough(least: float) -> None:
    for row in (*rows_of_logits(torch.float32), numbers(5), numbers(5).double()):
        assert torch.equal(at_least(row, least), (row >= least).nonzero().flatten())


@needs_cpp_kernels
@pytest.mark.parametrize("isa", [isa for isa in cpp.isas()[1:] if not isa.startswith("avx512")])
def test_kernels_for_lesser_cpus(isa: str) -> None:
    chosen = "(norms and 130) or (rope_is and 66) or (gated and gelu) or tails or finite or largest or large_enough"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen]
    found = subprocess.run(command, env={**os.environ, "AUTODEPLOY_CPP_ISA": isa}, capture_output=True, text=True, check=False)
    assert found.returncode == 0 and "skipped" not in found.stdout, found.stdout[-2000:]


def test_without_kernels_there_are_the_references_and_the_reason() -> None:
    names = ", ".join(f"ops.{op.name}" for op in POINTWISE)
    assert all(op.overload in SEMANTIC_OPS for op in POINTWISE)
    code = f"""
import torch
from autodeploy import Target, custom_ops as ops
from autodeploy.custom_ops.cpp_sampling import at_least, largest_of_rows
x, cos = torch.ones(1, 2, 3, 4), torch.ones(1, 3, 4)
args = [(x, None, 1e-6, 0.0, False), (x, x, None, 1e-6, 0.0, False), (x, None, None, 1e-6), (x, cos, cos, False), (x, x, "silu")]
for op, given in zip(({names}), args):
    provider, against = op.choose(Target(), *given)
    assert provider.name == "reference" and against["cpp"] == ["AUTODEPLOY_NO_CPP is set"], (provider, against)
assert largest_of_rows(torch.tensor([[1.0, 3.0, 2.0]]))[1].tolist() == [1]
assert at_least(torch.tensor([1.0, 3.0, 2.0]), 2.0).tolist() == [1, 2]
"""
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "AUTODEPLOY_NO_CPP": "1"}, check=True)

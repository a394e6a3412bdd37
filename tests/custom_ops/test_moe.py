"""The expert ops against one token and one expert at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy import custom_ops as ops

TOKENS, TOP_K, EXPERTS, WIDTH, INNER = 23, 3, 6, 10, 7


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def arguments(*, layout: str = "halves", transposed: bool = False, biased: bool = False) -> list[Any]:
    columns = INNER if layout == "plain" else 2 * INNER
    index = torch.stack([torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(t))[:TOP_K] for t in range(TOKENS)])
    gate_up, down = drawn(EXPERTS, columns, WIDTH), drawn(EXPERTS, WIDTH, INNER)
    matrices = [matrix.transpose(1, 2).contiguous() if transposed else matrix for matrix in (gate_up, down)]
    biases = [drawn(EXPERTS, columns), drawn(EXPERTS, WIDTH)] if biased else [None, None]
    return [drawn(TOKENS, WIDTH), index, drawn(TOKENS, TOP_K).abs(), *matrices, *biases]


GATES = {
    "silu": (("halves", "silu", 1.0, 0.0, 0.0), lambda x: F.silu(x[:INNER]) * x[INNER:]),
    "gelu tanh": (("halves", "gelu_tanh", 1.0, 0.0, 0.0), lambda x: F.gelu(x[:INNER], approximate="tanh") * x[INNER:]),
    "limited": (("halves", "silu", 1.0, 0.5, 0.0), lambda x: F.silu(x[:INNER].clamp(max=0.5)) * x[INNER:].clamp(-0.5, 0.5)),
    "clamped pairs": (
        ("pairs", "swish", 1.7, 0.5, 1.0),
        lambda x: x[::2].clamp(max=0.5) * torch.sigmoid(1.7 * x[::2].clamp(max=0.5)) * (x[1::2].clamp(-0.5, 0.5) + 1),
    ),
    "no gate": (("plain", "relu2", 1.0, 0.0, 0.0), lambda x: x.relu() ** 2),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_experts_equal_the_formula(name: str, transposed: bool, biased: bool) -> None:
    gate, formula = GATES[name]
    x, index, weights, gate_up, down, up_bias, down_bias = arguments(layout=gate[0], biased=biased)
    expected = torch.zeros_like(x)
    for t, k in torch.cartesian_prod(torch.arange(TOKENS), torch.arange(TOP_K)).tolist():
        e = index[t, k]
        hidden = gate_up[e] @ x[t] + (up_bias[e] if biased else 0)
        expected[t] += weights[t, k] * (down[e] @ formula(hidden) + (down_bias[e] if biased else 0))
    ours = ops.moe(*arguments(layout=gate[0], transposed=transposed, biased=biased), transposed, *gate)
    torch.testing.assert_close(ours, expected)


def test_a_token_s_result_does_not_depend_on_the_others() -> None:
    x, index, weights, *matrices = arguments()
    together = ops.moe(x, index, weights, *matrices, False, *GATES["silu"][0])
    for t in range(TOKENS):
        alone = ops.moe(x[t : t + 1], index[t : t + 1], weights[t : t + 1], *matrices, False, *GATES["silu"][0])
        torch.testing.assert_close(together[t], alone[0])


def test_an_index_that_no_expert_has_adds_nothing() -> None:
    x, index, weights, *matrices = arguments()
    beyond = torch.cat([index, torch.full((TOKENS, 1), EXPERTS), torch.full((TOKENS, 1), EXPERTS + 4)], dim=1)
    more = torch.cat([weights, torch.ones(TOKENS, 2)], dim=1)
    silu = GATES["silu"][0]
    torch.testing.assert_close(
        ops.moe(x, beyond, more, *matrices, False, *silu), ops.moe(x, index, weights, *matrices, False, *silu)
    )


def test_bfloat16_experts_are_added_up_in_float32() -> None:
    x = torch.ones(1, 1, dtype=torch.bfloat16)
    index, ones = torch.arange(300)[None], torch.ones(1, 300, dtype=torch.bfloat16)
    matrices = torch.ones(300, 1, 1, dtype=torch.bfloat16), torch.ones(300, 1, 1, dtype=torch.bfloat16)
    ours = ops.moe(x, index, ones, *matrices, None, None, False, "plain", "identity", 1.0, 0.0, 0.0)
    assert ours.item() == 300  # in bfloat16 the sum stays at 256
    assert ours.dtype == torch.bfloat16


def test_expert_linear_gives_each_row_its_own_matrix() -> None:
    x, index, weight = drawn(TOKENS, WIDTH), arguments()[1][:, 0], drawn(EXPERTS, 4, WIDTH)
    torch.testing.assert_close(
        ops.expert_linear(x, index, weight), torch.stack([weight[e] @ row for e, row in zip(index, x, strict=True)])
    )

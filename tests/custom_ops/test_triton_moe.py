"""Experts by Triton, in its interpreter: as near to float64 as the reference, whatever the router chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy import custom_ops as ops
from autodeploy.custom_ops import triton_moe
from autodeploy.custom_ops.moe import EXPERT_ACTIVATIONS
from tests.custom_ops.test_cpp_pointwise import numbers
from tests.custom_ops.triton_ops import CUDA, check

EXPERTS, WIDTH, INNER = 4, 40, 37
SILU = ("halves", "silu", 1.0, 0.0, 0.0)


def matrices(dtype: torch.dtype, layout: str = "halves", *, transposed: bool = False, biased: bool = False) -> list[Any]:
    columns = INNER if layout == "plain" else 2 * INNER
    weights = [numbers(EXPERTS, *shape, dtype=dtype, scale=shape[1] ** -0.5) for shape in ((columns, WIDTH), (WIDTH, INNER))]
    if transposed:
        weights = [weight.transpose(1, 2).contiguous() for weight in weights]
    return weights + ([numbers(EXPERTS, size, dtype=dtype) for size in (columns, WIDTH)] if biased else [None, None])


def routed(index: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Rows, the choice, and its weights."""
    return [numbers(len(index), WIDTH, dtype=dtype), index, numbers(*index.shape, dtype=dtype).abs()]


def some_index(tokens: int, top_k: int) -> Tensor:
    return torch.stack([(torch.arange(top_k) + t * t) % EXPERTS for t in range(tokens)])


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate", [SILU, ("pairs", "swish", 1.7, 0.5, 1.0), ("plain", "relu2", 1.0, 0.0, 0.0)], ids=str)
def test_every_layout(gate: tuple[Any, ...], transposed: bool, biased: bool) -> None:
    dtype = torch.float32 if transposed == biased else torch.bfloat16
    weights = matrices(dtype, gate[0], transposed=transposed, biased=biased)
    check(ops.moe, *routed(some_index(3, 2), dtype), *weights, transposed, *gate)


@pytest.mark.parametrize("activation", EXPERT_ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    check(ops.moe, *routed(some_index(1, 2), torch.float16), *matrices(torch.float16), False, "halves", activation, 1.0, 0.4, 0.0)


CHOICES = {
    "one token": torch.tensor([[3, 1]]),
    "one expert for all, the others empty": torch.full((40, 1), 2),
    "several tiles of an expert": torch.cat([torch.zeros(50, 1), torch.ones(50, 1)], 1).long(),
    "an index that no expert has": torch.tensor([[0, EXPERTS, 1], [EXPERTS + 4, 2, EXPERTS], [EXPERTS + 900, 3, 3]]),
    "32 bits": some_index(9, 2).int(),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_the_router_may_choose(name: str) -> None:
    check(ops.moe, *routed(CHOICES[name], torch.bfloat16), *matrices(torch.bfloat16), False, *SILU)


@pytest.mark.parametrize(("rows", "size"), [(16, 16), (64, 64), (128, 128)])
def test_each_size_of_tile(monkeypatch: pytest.MonkeyPatch, rows: int, size: int) -> None:
    tile = next(tile for tile in (triton_moe.FEW, triton_moe.SOME, triton_moe.MANY) if tile.rows == size)
    assert triton_moe.tile_for(rows, triton_moe.DENSE) == tile
    monkeypatch.setattr(triton_moe, "tile_for", lambda *_: tile)
    check(ops.moe, *routed(some_index(40, 2), torch.bfloat16), *matrices(torch.bfloat16, biased=True), False, *SILU)


def test_nobody_is_chosen() -> None:
    x, index, weights = routed(torch.full((3, 2), EXPERTS), torch.float32)
    assert not triton_moe.triton_moe(x, index, weights, *matrices(torch.float32), False, *SILU).any()
    empty = triton_moe.triton_moe(x[:0], index[:0], weights[:0], *matrices(torch.float32), False, *SILU)
    assert empty.shape == (0, WIDTH)


@pytest.mark.parametrize("size", [1, 130, 9000])
def test_places_are_sorted_by_expert_in_their_order(size: int) -> None:
    index = torch.randint(0, 9, (size, 1), generator=torch.Generator().manual_seed(size))
    groups = triton_moe.group_rows(index, 7, triton_moe.DENSE)
    expert, first, end = groups.tiles.tolist()
    pieces = [groups.order[a:b] for a, b in zip(first, end, strict=True)]
    assert torch.equal(torch.cat(pieces), torch.argsort(index.flatten(), stable=True)[: (index < 7).sum()].int())
    assert all((index[piece] == e).all() and len(piece) <= groups.tile.rows for e, piece in zip(expert, pieces, strict=True))


def test_experts_of_several_dtypes_are_left_to_the_reference() -> None:
    weights = matrices(torch.bfloat16)
    provider, against = ops.moe.choose(CUDA, *routed(some_index(3, 2), torch.float32), *weights, False, *SILU)
    assert provider.name == "reference" and against["triton"] == ["its tensors are of several dtypes"]

"""Conversions become recipes by running them; what recipes cannot say is left to the conversion itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autodeploy.capture.conversions import recipes_of
from autodeploy.codec import decode_recipe, encode_recipe
from autodeploy.recipes import Recipe, Take, evaluate

LEAVES = {"a": torch.randn(4, 6), "b": torch.randn(4, 6), "c": torch.randn(2, 3, 4)}
CONVERSIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "stack": lambda a, b, c: torch.stack([a, b]),
    "stack inside": lambda a, b, c: torch.stack([a, b], dim=-1),
    "cat": lambda a, b, c: torch.cat([a, b], dim=1),
    "experts": lambda a, b, c: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "transpose": lambda a, b, c: c.transpose(-1, -2).contiguous(),
    "permute": lambda a, b, c: c.permute(2, 0, -2),
    "interleave": lambda a, b, c: torch.stack([a, b], dim=1).reshape(8, 6),
    "half": lambda a, b, c: a.chunk(2, dim=-1)[1],
    "one of them": lambda a, b, c: torch.stack([c.unbind(1)[2], c[:, 0], c.select(1, 1)]),
    "rope order": lambda a, b, c: a.view(2, 2, 6).transpose(0, 1).reshape(4, 6),
    "rows": lambda a, b, c: a[1:3],
    "new dims": lambda a, b, c: a.unsqueeze(0).squeeze(0)[None],
    "untouched": lambda a, b, c: a,
}


def recorded(conversion: Callable[..., Tensor]) -> Recipe | None:
    meta = {name: tensor.to("meta") for name, tensor in LEAVES.items()}
    known: dict[Tensor, Recipe] = {tensor: Take(name) for name, tensor in meta.items()}
    return recipes_of(lambda: {"made": conversion(**meta)}, known)["made"]


@pytest.mark.parametrize("name", CONVERSIONS)
def test_moves_of_numbers_are_recipes(name: str) -> None:
    recipe = recorded(CONVERSIONS[name])
    assert recipe is not None
    for same in (recipe, decode_recipe(encode_recipe(recipe))):
        assert torch.equal(evaluate(same, lambda leaf: LEAVES[leaf.name]), CONVERSIONS[name](**LEAVES))
    assert decode_recipe(encode_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "conversion",
    [lambda a, b, c: a * 2, lambda a, b, c: torch.cat([a, b.neg()]), lambda a, b, c: a.flip(0), lambda a, b, c: a[::2]],
)
def test_what_changes_numbers_or_skips_them_is_none(conversion: Callable[..., Tensor]) -> None:
    assert recorded(conversion) is None

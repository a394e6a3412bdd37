"""Models that count positions from the token ids, past padding, get them from `position_ids` at the numbers they start from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MAKER = "create_position_ids_from_input_ids"


def count_by_position_ids(model: nn.Module, state: Any) -> None:
    """Replace what makes positions from ids by its equal, as far as a few rows of ids show what it does."""
    for module in model.modules():
        stock, padding = getattr(module, MAKER, None), getattr(module, "padding_idx", None)
        if stock is not None and padding is not None and (made := _numbers(stock, padding)) is not None:
            setattr(module, MAKER, _by_position_ids(state, padding, *made))
            state.counts_itself = True


def _numbers(stock: Callable[..., Tensor], padding: int) -> tuple[int, int] | None:
    """(position of the first token, position of padding) of a function that counts tokens; None for any other."""
    text = padding + 1 + torch.arange(9)[None]
    first, of_padding = int(stock(text, padding)[0, 0]), int(stock(torch.full((1, 9), padding), padding)[0, 0])
    return (first, of_padding) if torch.equal(stock(text, padding), first + torch.arange(9)[None]) else None


def _by_position_ids(state: Any, padding: int, first: int, of_padding: int) -> Callable[..., Tensor]:
    return lambda ids, *_, **__: torch.where(ids == padding, of_padding, state.position_ids + first)

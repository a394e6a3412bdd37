"""What choosing a token needs of logits, by own Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.custom_ops.gpu import DTYPES, Kernel, has_triton

BLOCK, PROGRAMS = 1024, 512
"""Numbers that a program looks at together; programs that keep a GPU busy, about."""
DRAW_BLOCK, DRAW_WARPS = 4096, 16
"""Of a program that draws: it has a whole row to itself."""
_largest_of_rows = Kernel("sampling", "largest_of_rows")
_draw = Kernel("drawing", "draw")


def fits(x: Tensor) -> bool:
    """Whether the kernels can read x [N, V]."""
    return x.is_cuda and x.dtype in DTYPES and x.stride(-1) == 1 and x.numel() > 0 and has_triton()


def largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row of x [N, V], as float32, and where it is first, both [N]; of a row with a NaN, NaN.

    Few rows are cut into parts, the largest of which are then looked at as rows themselves.
    """
    num_rows, width = x.shape
    num_blocks = -(-width // BLOCK)
    part = -(-num_blocks // max(1, PROGRAMS // num_rows)) * BLOCK
    highest, first = _largest_of_parts(x, None, part)
    if highest.shape[1] > 1:
        highest, first = _largest_of_parts(highest, first, num_blocks * BLOCK)
    return highest.squeeze(1), first.squeeze(1)


def _largest_of_parts(x: Tensor, places: Tensor | None, part: int) -> tuple[Tensor, Tensor]:
    """x [N, V], part: columns -> the largest of each part and its column, or what `places` [N, V] has there; [N, parts]."""
    num_rows, width = x.shape
    parts = -(-width // part)
    highest = torch.empty(num_rows, parts, dtype=torch.float32, device=x.device)
    first = torch.empty(num_rows, parts, dtype=torch.int64, device=x.device)
    _largest_of_rows[num_rows, parts](
        x, places, highest, first, width, x.stride(0), part, HAS_PLACES=places is not None, BLOCK=BLOCK
    )
    return highest, first


def draw(x: Tensor, highest: Tensor, settings: Tensor, tokens: Tensor) -> None:
    """Put a drawn token into `tokens` [N] for each column of settings [6, R] float64, which says of which row of x [N, V].

    Below the row: temperature, top_k (0: all), top_p, min_p, and the uniform number in [0, 1) that decides. highest [N]: the
    largest number of each row. All rows are drawn by one launch; of one that is not finite the token is any.
    """
    num_draws, width = settings.shape[1], x.shape[1]
    keys, places = torch.empty(2, num_draws, width, dtype=torch.int32, device=x.device)
    _draw[num_draws,](
        x, highest, settings, keys, places, tokens, width, num_draws, x.stride(0), BLOCK=DRAW_BLOCK, num_warps=DRAW_WARPS
    )

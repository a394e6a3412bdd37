"""Memory in pages of 2 MB, where the system gives them: one page walk, and one fault at the first touch, where there were 512."""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from autodeploy.memory_ahead import HUGE_PAGE, take


def empty(shape: Sequence[int], dtype: torch.dtype, *, grows: bool = False) -> Tensor:
    """A tensor on the CPU that holds nothing yet; its memory becomes resident as it is written, or is already: `memory_ahead`.

    grows: it is one of many that are written from the beginning on, most often not far. So the first 2 MB are in small pages: a
    short prompt would else wait for 2 MB of each to be found and cleared.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    if not grows and (taken := take(num_bytes)) is not None:
        return torch.frombuffer(taken, dtype=dtype).view(shape)
    area = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory gets none
    area.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(area, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE_PAGE
    if grows:
        area.madvise(mmap.MADV_NOHUGEPAGE, first, HUGE_PAGE)
    return whole[first : first + num_bytes].view(dtype).view(shape)

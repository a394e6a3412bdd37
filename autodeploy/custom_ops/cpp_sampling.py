"""What choosing a token needs of logits: by own C++ kernels where this CPU has them, Triton's on a GPU, else by torch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops import triton_sampling
from autodeploy.custom_ops.cpp import BuildError, Kernel, kernels

_largest_of_rows = Kernel("largest_of_rows", "ppplllll")
_at_least = Kernel("at_least", "pflpp")


def largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row of x [N, V] and where it is first, both [N]; of a row with a NaN, NaN and any place.

    As `torch.max`, but that the numbers may be float32 in place of x's dtype.
    """
    if triton_sampling.fits(x):
        return triton_sampling.largest_of_rows(x)
    if not _fits(x, torch.bfloat16, torch.float32):
        highest, indices = x.max(dim=-1)
        return highest, indices
    rows, width = x.shape
    highest, indices = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    _largest_of_rows(
        x.data_ptr(), highest.data_ptr(), indices.data_ptr(), rows, width, x.stride(0), x.itemsize, torch.get_num_threads()
    )
    return highest, indices


def finite_argmax(x: Tensor, width: int) -> np.ndarray | None:
    """Where the largest of the first `width` numbers of each row of x [N, V] is first, [N]; None when one is not finite.

    x is on the CPU. Between two steps of a model nothing of Python is in the caches of the CPU: each call counts.
    """
    if not _fits(x, torch.bfloat16, torch.float32):
        highest, indices = largest_of_rows(x[:, :width])
        return indices.numpy() if highest.isfinite().all() else None
    found = np.empty(len(x), dtype=np.int64)
    _largest_of_rows(x.data_ptr(), 0, found.ctypes.data, len(x), width, x.stride(0), x.itemsize, torch.get_num_threads())
    return None if (found < 0).any() else found


def at_least(x: Tensor, least: float) -> Tensor:
    """Where x [V] is at least that large, in ascending order; x has no NaN."""
    if not _fits(x, torch.float32):
        return (x >= least).nonzero().flatten()
    indices, count = torch.empty(len(x) + 1, dtype=torch.int64), torch.empty((), dtype=torch.int64)
    _at_least(x.data_ptr(), least, len(x), indices.data_ptr(), count.data_ptr())
    return indices[: int(count)]


def _fits(x: Tensor, *dtypes: torch.dtype) -> bool:
    is_plain = x.device.type == "cpu" and x.dtype in dtypes and x.stride(-1) == 1 and x.numel() > 0
    return is_plain and not isinstance(kernels(), BuildError)

"""How a Triton provider is compared with its op, in the interpreter: on CPU tensors, for a GPU as target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autodeploy.specs import Target
from tests.triton_interpreter import install

install()
CUDA = Target("cuda")
LIMITS = {torch.bfloat16: 1e-9, torch.float16: 1e-9, torch.float32: 1e-6}


def provider_of(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The one that a GPU would use, which must be Triton's."""
    provider, against = op.choose(CUDA, *args, **kwargs)
    assert provider.name == "triton", against
    return provider


def error(found: Tensor, exact: Tensor) -> float:
    """Root of the mean square of the difference over that of the exact result."""
    return float((found.double() - exact).norm() / exact.norm())


def check(op: Any, *args: Any, rounding: float = 1.2, **kwargs: Any) -> None:
    """The results lie as the op's shape rule says, and are no farther from float64 than `rounding` times the reference's."""
    functions = (provider_of(op, *args, **kwargs).function, op.reference)
    ours, plain = (tree_leaves(function(*args, **kwargs)) for function in functions)
    wide, more = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, (args, kwargs))
    exact = tree_leaves(op.reference(*wide, **more))
    for mine, theirs, right in zip(ours, plain, exact, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert error(mine, right) <= max(rounding * error(theirs, right), LIMITS[mine.dtype])

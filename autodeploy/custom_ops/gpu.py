"""Own Triton kernels for GPUs: how they are found, what speaks against them, and how they are compiled without a GPU.

The raw kernels lie in kernels/*.py. Those modules alone import triton, and are imported when one of their kernels is first
called: a machine that calls none imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, wraps
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.op import Provider

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_SHARED = 227 * 1024
"""Bytes of shared memory that a program may have on sm_90."""


@dataclass(frozen=True)
class Kernel:
    """The Triton function `name` of kernels/`module`.py: `kernel[grid](*arguments)` launches it."""

    module: str
    name: str

    @cached_property
    def function(self) -> Any:
        return getattr(import_module(f"autodeploy.custom_ops.kernels.{self.module}"), self.name)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.function[grid]


@dataclass(frozen=True)
class Variant:
    """One way in which a kernel is compiled ahead of time, and what it may take; kernels/*.py list theirs as `VARIANTS`."""

    kernel: Any
    label: str
    types: Mapping[str, str]
    """Triton's types of arguments ("*bf16", "fp32"), and of others; those that are neither here nor constants are "i32"."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int = 255
    max_shared: int = MAX_SHARED
    must: tuple[str, ...] = ()
    """Instructions that the machine code must have: HGMMA, QGMMA, IGMMA, HMMA or IMMA for tensor cores."""


@dataclass(frozen=True)
class Tile:
    """The part of a matrix product that one program makes, and how."""

    rows: int
    columns: int
    depth: int
    """What is added up in one step."""
    warps: int
    stages: int
    """Steps whose operands are in shared memory, or on their way there."""

    @property
    def blocks(self) -> dict[str, int]:
        """Constants of a kernel."""
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth}

    @property
    def options(self) -> dict[str, int]:
        """Of a launch, and of a `Variant`."""
        return {"num_warps": self.warps, "num_stages": self.stages}


Tiles = Sequence[Tile]
"""For few, some and many rows."""


def in_other_tiles(provider: Provider, tiles: Tiles) -> Provider:
    """With variants of it, whose function takes `tiles`: without the largest ones, and without the smallest."""
    others = {"small": tiles[:-1], "large": tiles[1:]}
    functions = {f"{provider.name}_{label}": _with_tiles(provider.function, label, others[label]) for label in others}
    return replace(provider, variants=tuple(replace(provider, name=name, function=functions[name]) for name in functions))


def _with_tiles(function: Callable[..., Any], label: str, tiles: Tiles) -> Callable[..., Any]:
    @wraps(function)
    def call(*args: Any) -> Any:
        return function(*args, tiles=tiles)

    call.__name__ = call.__qualname__ = f"{function.__name__}_{label}"
    return call


def tile_for(rows: float, tiles: Tiles) -> Tile:
    """The first that has room for that many rows, or the last."""
    return next((tile for tile in tiles if rows <= tile.rows), tiles[-1])


def against_triton(target: Any, *tensors: Tensor | None) -> list[str]:
    """The reasons against own Triton kernels; tensors: what must be of a dtype that they have."""
    if not target.device.startswith("cuda"):
        return [f"it runs on GPUs, not on {target.device}"]
    if not has_triton():
        return ["triton is not installed"]
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    return [f"it has no {str(dtype).removeprefix('torch.')}" for dtype in sorted(dtypes - set(DTYPES), key=str)]


@cache
def has_triton() -> bool:
    """Whether triton could be imported."""
    return find_spec("triton") is not None


def power_of_2(n: int) -> int:
    """The least one that is not below n."""
    return 1 << max(0, n - 1).bit_length()

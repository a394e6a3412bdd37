"""Linear layers, experts and embedding tables of bfloat16 in the panels of kernels/linear.cpp, whatever the number of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy import huge_pages
from autodeploy.custom_ops import cpp
from autodeploy.custom_ops.linear import embedding_op, linear_op
from autodeploy.custom_ops.moe import Expert, expert_matrices, moe, packed_moe
from autodeploy.custom_ops.op import Provider

WIDTH = 64
"""Outputs of a panel."""
FLOAT_PART = 64
"""Columns of x that lie together as floats; room is made for whole parts (`kernels/float_panels.h`)."""

_pack = cpp.Kernel("pack_panels", "pplll")
_linear = cpp.Kernel("linear", "plppppllll")
_rows = cpp.Kernel("panel_rows", "ppplll")


@dataclass(frozen=True, slots=True)
class Panels:
    """A weight [num_outputs, num_inputs] in panels."""

    data: Tensor
    num_outputs: int
    num_inputs: int

    @property
    def nbytes(self) -> int:
        return self.data.nbytes


def pack_panels(weight: Tensor | Sequence[Tensor], call: Mapping[str, Any] | None = None) -> Panels:
    """weight [N, K] of bfloat16, K even, or the parts of its rows; zeros where a panel is not full."""
    parts = [part.detach() for part in ([weight] if isinstance(weight, Tensor) else weight)]
    return Panels(pack_words(*parts), sum(map(len, parts)), parts[0].shape[1])


def pack_words(*parts: Tensor) -> Tensor:
    """Parts [N, row] of a weight's rows, a row of whole words of 32 bits -> the weight in panels, of their dtype."""
    if any(len(part) % WIDTH for part in parts[:-1]):
        parts = (torch.cat(parts),)
    words = parts[0].shape[1] * parts[0].element_size() // 4
    sizes = [4 * -(-len(part) // WIDTH) * WIDTH * words for part in parts]
    panels = huge_pages.empty([sum(sizes)], torch.uint8)
    for part, place in zip(map(Tensor.contiguous, parts), panels.split(sizes), strict=True):
        _pack(part.data_ptr(), place.data_ptr(), len(part), words, torch.get_num_threads())
    return panels.view(parts[0].dtype)


def panel_linear(x: Tensor, weight: Panels, bias: Tensor | None = None) -> Tensor:
    """As `linear`, of a weight as `pack_panels` has made it."""
    num_inputs, num_outputs = weight.num_inputs, weight.num_outputs
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], num_outputs))
    num_rows, num_parts = x.numel() // num_inputs, -(-num_inputs // FLOAT_PART)
    wide = None if cpp.multiplies_bfloat16() else x.new_empty(num_rows * num_parts * FLOAT_PART, dtype=torch.float32)
    _linear(
        x.data_ptr(),
        num_inputs,
        cpp.pointer(wide),
        weight.data.data_ptr(),
        cpp.pointer(bias),
        out.data_ptr(),
        num_rows,
        num_outputs,
        num_inputs,
        torch.get_num_threads(),
    )
    return out


def panel_embedding(weight: Panels, indices: Tensor, *_: object) -> Tensor:
    """As `embedding`, of a table as `pack_panels` has made it, which is then the head's weight too."""
    out = weight.data.new_empty((*indices.shape, weight.num_inputs))
    ids = indices.contiguous()
    _rows(ids.data_ptr(), weight.data.data_ptr(), out.data_ptr(), ids.numel(), weight.num_inputs // 2, torch.get_num_threads())
    return out


def panel_moe(*args: Any) -> Tensor:
    """As `moe`, of experts as `pack_expert_panels` has made them."""
    return packed_moe(*args)


def pack_expert_panels(weights: Tensor, call: Mapping[str, Any]) -> list[Expert]:
    """Each expert's matrix in panels."""
    return [partial(_panel_expert, pack_panels(matrix)) for matrix in expert_matrices(weights, call)]


def _panel_expert(panels: Panels, x: Tensor, bias: Tensor | None) -> Tensor:
    return panel_linear(x, panels, bias)


def against_bfloat16(target: Any, *tensors: Tensor | None) -> list[str]:
    """The reasons against kernels whose rows are bfloat16."""
    for dtype in {tensor.dtype for tensor in tensors if tensor is not None} - {torch.bfloat16}:
        return [f"it has no {str(dtype).removeprefix('torch.')}"]
    return cpp.against_cpp(target)


def against_panels(target: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """The reasons against a linear layer in panels."""
    return against_bfloat16(target, input, weight, bias) or _against_rows(weight)


def against_table(target: Any, weight: Tensor, **_: Any) -> list[str]:
    """The reasons against a table in panels."""
    return against_bfloat16(target, weight) or _against_rows(weight)


def _against_rows(weight: Tensor) -> list[str]:
    return ["a row of the weight has an odd number of values"] if weight.shape[-1] % 2 else []


def against_expert_panels(target: Any, x: Tensor, gate_up: Tensor, down: Tensor, **_: Any) -> list[str]:
    """The reasons against experts in panels; transposed or not, both dims of a matrix must be even."""
    odd = any(size % 2 for size in (*gate_up.shape[1:], *down.shape[1:]))
    return against_panels(target, x, gate_up, None) or (["a row of a weight has an odd number of values"] if odd else [])


linear_op.register(Provider("cpp", panel_linear, against_panels, {"weight": pack_panels}, packs_parts=True))
embedding_op.register(Provider("cpp", panel_embedding, against_table, {"weight": pack_panels}, packs_parts=True))
moe.register(Provider("cpp", panel_moe, against_expert_panels, {"gate_up": pack_expert_panels, "down": pack_expert_panels}))

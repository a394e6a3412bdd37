"""The ops of `pointwise` by own C++ kernels, and the largest number of each row.

These calls are many and short: a decode step of 28 layers makes two hundred of them. What can be decided once, while kernels are
selected, is decided in `supports`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import pointwise
from autodeploy.custom_ops.cpp import BuildError, Kernel, against_cpp, kernels
from autodeploy.custom_ops.op import Provider

DTYPES = (torch.bfloat16, torch.float32)
ACTIVATIONS = {name: number for number, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "sigmoid"))}
"""The numbers that the kernel knows them by."""
_rms_norm = Kernel("rms_norm", "ppplllllllffll")
_add_rms_norm = Kernel("add_rms_norm", "pppppllffll")
_layer_norm = Kernel("layer_norm", "ppppllfll")
_rope = Kernel("rope", "pppp" + "l" * 12)
_gated_activation = Kernel("gated_activation", "ppp" + "l" * 12)
_largest_of_rows = Kernel("largest_of_rows", "ppplllll")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool) -> Tensor:
    """x [T, C], [B, T, C] or [1, T, H, C] with any strides but the last."""
    out = torch.empty_like(x)
    outer, inner, width = (1, *x.shape)[-3:]
    _rms_norm(
        x.data_ptr(), _pointer(weight), out.data_ptr(), outer, inner, width, *_strides(x), *_strides(out),
        eps, offset, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], contiguous."""
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    _add_rms_norm(
        x.data_ptr(), residual.data_ptr(), _pointer(weight), total.data_ptr(), normed.data_ptr(), x.numel() // width, width,
        eps, offset, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C], contiguous; weight and bias [C]."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    _layer_norm(
        x.data_ptr(), _pointer(weight), _pointer(bias), out.data_ptr(), x.numel() // width, width,
        eps, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [1, H, T, D] with any strides but the last; cos and sin [1, T, D] or [1, 1, T, D]."""
    out = torch.empty_like(x)
    _, heads, tokens, width = x.shape
    _rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), heads, tokens, width,
        *_strides(x), cos.stride(-2), sin.stride(-2), *_strides(out), interleaved, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up [T, I], [B, T, I] or [1, T, H, I] with any strides but the last, such as halves of one product."""
    out = torch.empty_like(gate)
    outer, inner, width = (1, *gate.shape)[-3:]
    _gated_activation(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), outer, inner, width, *_strides(gate), *_strides(up), *_strides(out),
        ACTIVATIONS[activation], gate.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def largest_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of each row of x [N, V] and where it is first; not a number for a row that has such.

    float32 and int64, both [N], where this CPU's kernel can do it; else as `torch.max` gives them.
    """
    fits = x.device.type == "cpu" and x.dtype in DTYPES and x.stride(-1) == 1 and x.numel() > 0
    if not fits or isinstance(kernels(), BuildError):
        highest, indices = x.max(dim=-1)
        return highest, indices
    rows, width = x.shape
    values, indices = torch.empty(rows, dtype=torch.float32), torch.empty(rows, dtype=torch.int64)
    _largest_of_rows(
        x.data_ptr(), values.data_ptr(), indices.data_ptr(), rows, width, x.stride(0), x.itemsize, torch.get_num_threads()
    )
    return values, indices


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _strides(x: Tensor) -> tuple[int, int]:
    """Of the two dims before the last."""
    _, outer, inner, _ = (0, 0, *x.stride())[-4:]
    return outer, inner


def _against(target: Any, x: Tensor, *others: Tensor | None) -> list[str]:
    """The reasons against all of these: the target, and tensors of another dtype than x."""
    if reasons := against_cpp(target):
        return reasons
    dtypes = {tensor.dtype for tensor in (x, *others) if tensor is not None}
    if dtypes != {x.dtype} or x.dtype not in DTYPES:
        return [f"it has no {' with '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"]
    return []


def _against_rows(*tensors: Tensor) -> list[str]:
    """Rows lie in two dims."""
    for x in tensors:
        if not (2 <= x.dim() <= 3 or (x.dim() == 4 and x.shape[0] == 1)):
            return ["it takes rows in two dims only"]
        if x.stride(-1) != 1:
            return ["the numbers of a row are not neighbours"]
    return []


def _against_vectors(x: Tensor, *vectors: Tensor | None) -> list[str]:
    fine = all(vector is None or (vector.dim() == 1 and vector.shape[0] == x.shape[-1]) for vector in vectors)
    return [] if fine else ["the weight or bias is not one vector"]


def _against_layout(*tensors: Tensor) -> list[str]:
    return [] if all(tensor.is_contiguous() for tensor in tensors) else ["its input is not contiguous"]


def against_rms_norm(target: Any, x: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    return _against(target, x, weight) + _against_rows(x) + _against_vectors(x, weight)


def against_add_rms_norm(target: Any, x: Tensor, residual: Tensor, weight: Tensor | None, *_: Any) -> list[str]:
    return _against(target, x, residual, weight) + _against_layout(x, residual) + _against_vectors(x, weight)


def against_layer_norm(target: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    return _against(target, x, weight, bias) + _against_layout(x) + _against_vectors(x, weight, bias)


def against_rope(target: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    checks = {
        "x is not [1, H, T, D] with an even D": x.dim() != 4 or x.shape[0] != 1 or x.shape[-1] % 2 != 0,
        "cos or sin differs between heads": any(angle.dim() == 4 and angle.shape[1] != 1 for angle in (cos, sin)),
        "cos or sin is broadcast": any(angle.shape[-2:] != x.shape[-2:] for angle in (cos, sin)),
        "the numbers of a row are not neighbours": any(tensor.stride(-1) != 1 for tensor in (x, cos, sin)),
    }
    return _against(target, x, cos, sin) + [reason for reason, holds in checks.items() if holds]


def against_gated_activation(target: Any, gate: Tensor, up: Tensor, activation: str) -> list[str]:
    unknown = [] if activation in ACTIVATIONS else [f"it has no {activation}"]
    return _against(target, gate, up) + _against_rows(gate, up) + unknown


pointwise.rms_norm.register(Provider("cpp", rms_norm, against_rms_norm))
pointwise.add_rms_norm.register(Provider("cpp", add_rms_norm, against_add_rms_norm))
pointwise.layer_norm.register(Provider("cpp", layer_norm, against_layer_norm))
pointwise.rope.register(Provider("cpp", rope, against_rope))
pointwise.gated_activation.register(Provider("cpp", gated_activation, against_gated_activation))

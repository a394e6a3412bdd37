"""The ops of `pointwise` by own C++ kernels.

These calls are many and short: a decode step of 28 layers makes two hundred of them. What can be decided once, while kernels are
selected, is decided in `supports`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import pointwise
from autodeploy.custom_ops.cpp import Kernel, against_cpp
from autodeploy.custom_ops.op import Provider

DTYPES = (torch.bfloat16, torch.float32)
ACTIVATIONS = {name: number for number, name in enumerate(("silu", "gelu", "gelu_tanh", "relu", "sigmoid"))}
"""The numbers that the kernel knows them by."""
_rms_norm = Kernel("rms_norm", "ppplllllllffll")
_add_rms_norm = Kernel("add_rms_norm", "pppppllffll")
_layer_norm = Kernel("layer_norm", "ppppllfll")
_rope = Kernel("rope", "pppp" + "l" * 10)
_gated_activation = Kernel("gated_activation", "ppp" + "l" * 7)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool) -> Tensor:
    """x [T, C], [B, T, C] or [1, T, H, C] with any strides but the last."""
    out = torch.empty_like(x)
    _rms_norm(x.data_ptr(), _pointer(weight), out.data_ptr(), *_rows(x, out), eps, offset, x.itemsize, torch.get_num_threads())
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], contiguous."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    _add_rms_norm(
        x.data_ptr(), residual.data_ptr(), _pointer(weight), total.data_ptr(), normed.data_ptr(),
        x.numel() // width, width, eps, offset, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C], contiguous; weight and bias [C]."""
    out, width = torch.empty_like(x), x.shape[-1]
    _layer_norm(
        x.data_ptr(), _pointer(weight), _pointer(bias), out.data_ptr(),
        x.numel() // width, width, eps, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x [1, H, T, D] with any strides but the last; cos and sin [1, T, D] or [1, 1, T, D], contiguous."""
    out = torch.empty_like(x)
    _, heads, tokens, width = x.shape
    _, x_head, x_token, _ = x.stride()
    _, out_head, out_token, _ = out.stride()
    _rope(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), heads, tokens, width,
        x_head, x_token, out_head, out_token, interleaved, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """gate and up contiguous, or halves of one product: [1, T, I] with any stride between rows."""
    out, width = torch.empty_like(gate), gate.shape[-1]
    _gated_activation(
        gate.data_ptr(), up.data_ptr(), out.data_ptr(), gate.numel() // width, width, gate.stride()[-2], up.stride()[-2],
        ACTIVATIONS[activation], gate.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(x: Tensor, out: Tensor) -> tuple[int, int, int, int, int, int, int]:
    """Sizes of [outer, inner, width], and the strides of the first two in x and in out."""
    if x.is_contiguous():
        width = x.shape[-1]
        return 1, x.numel() // width, width, 0, width, 0, width
    outer, inner, width = (1, *x.shape)[-3:]
    x_outer, x_inner, _ = (0, *x.stride())[-3:]
    out_outer, out_inner, _ = (0, *out.stride())[-3:]
    return outer, inner, width, x_outer, x_inner, out_outer, out_inner


def _against(target: Any, x: Tensor, *others: Tensor | None) -> list[str]:
    """The reasons against all of these: the target, and tensors of other dtypes than the kernels'."""
    if reasons := against_cpp(target):
        return reasons
    dtypes = {tensor.dtype for tensor in (x, *others) if tensor is not None}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        return [f"it has no {' with '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"]
    return []


def _against_vectors(x: Tensor, *vectors: Tensor | None) -> list[str]:
    fits = all(vector is None or vector.shape == x.shape[-1:] for vector in vectors)
    return [] if fits else ["the weight or bias is not one vector"]


def _against_layout(*tensors: Tensor) -> list[str]:
    return [] if all(tensor.is_contiguous() for tensor in tensors) else ["its input is not contiguous"]


def against_rms_norm(target: Any, x: Tensor, weight: Tensor | None, **_: Any) -> list[str]:
    in_two_dims = 2 <= x.dim() <= 3 or (x.dim() == 4 and x.shape[0] == 1) or x.is_contiguous()
    reasons = [] if in_two_dims and x.stride(-1) == 1 else ["the rows are not in two dims, or their numbers not neighbours"]
    return _against(target, x, weight) + reasons + _against_vectors(x, weight)


def against_add_rms_norm(target: Any, x: Tensor, residual: Tensor, weight: Tensor | None, **_: Any) -> list[str]:
    return _against(target, x, residual, weight) + _against_layout(x, residual) + _against_vectors(x, weight)


def against_layer_norm(target: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> list[str]:
    return _against(target, x, weight, bias) + _against_layout(x) + _against_vectors(x, weight, bias)


def against_rope(target: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> list[str]:
    checks = {
        "x is not [1, H, T, D] with an even D": x.dim() != 4 or x.shape[0] != 1 or x.shape[-1] % 2 != 0,
        "the numbers of a row are not neighbours": x.stride(-1) != 1,
        "cos or sin is not [1, T, D]": any(
            angle.shape[-2:] != x.shape[-2:] or any(size != 1 for size in angle.shape[:-2]) for angle in (cos, sin)
        ),
    }
    return _against(target, x, cos, sin) + _against_layout(cos, sin) + [reason for reason, holds in checks.items() if holds]


def against_gated_activation(target: Any, gate: Tensor, up: Tensor, activation: str) -> list[str]:
    checks = {
        f"it has no {activation}": activation not in ACTIVATIONS,
        "gate and up differ in shape": gate.shape != up.shape,
        "the rows are not in one dim, or their numbers not neighbours": not (_has_rows(gate) and _has_rows(up)),
    }
    return _against(target, gate, up) + [reason for reason, holds in checks.items() if holds]


def _has_rows(x: Tensor) -> bool:
    """x is rows with the same stride from each to the next."""
    in_one_dim = all(size == 1 for size in x.shape[:-2])
    return x.dim() >= 2 and x.stride(-1) == 1 and (in_one_dim or x.is_contiguous())


pointwise.rms_norm.register(Provider("cpp", rms_norm, against_rms_norm))
pointwise.add_rms_norm.register(Provider("cpp", add_rms_norm, against_add_rms_norm))
pointwise.layer_norm.register(Provider("cpp", layer_norm, against_layer_norm))
pointwise.rope.register(Provider("cpp", rope, against_rope))
pointwise.gated_activation.register(Provider("cpp", gated_activation, against_gated_activation))

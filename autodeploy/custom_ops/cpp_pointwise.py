"""The ops of `pointwise` by own C++ kernels.

These calls are many and short: a decode step of 28 layers makes two hundred of them. What can be decided once, while kernels are
selected, is decided in `supports`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import layouts, pointwise
from autodeploy.custom_ops.cpp import Kernel, against_cpp, pointer
from autodeploy.custom_ops.layouts import rows_of
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
    _rms_norm(x.data_ptr(), pointer(weight), out.data_ptr(), *rows_of(x, out), eps, offset, x.itemsize, torch.get_num_threads())
    return out


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float, weight_in_float: bool
) -> tuple[Tensor, Tensor]:
    """x and residual [..., C], contiguous."""
    total, normed, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    _add_rms_norm(
        x.data_ptr(), residual.data_ptr(), pointer(weight), total.data_ptr(), normed.data_ptr(),
        x.numel() // width, width, eps, offset, x.itemsize, torch.get_num_threads(),
    )  # fmt: skip
    return total, normed


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., C], contiguous; weight and bias [C]."""
    out, width = torch.empty_like(x), x.shape[-1]
    _layer_norm(
        x.data_ptr(), pointer(weight), pointer(bias), out.data_ptr(),
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


def _against(target: Any, x: Tensor, *others: Tensor | None) -> list[str]:
    """The reasons against all of these: the target, and tensors of other dtypes than the kernels'."""
    if reasons := against_cpp(target):
        return reasons
    dtypes = {tensor.dtype for tensor in (x, *others) if tensor is not None}
    if len(dtypes) > 1 or x.dtype not in DTYPES:
        return [f"it has no {' with '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"]
    return []


pointwise.rms_norm.register(Provider("cpp", rms_norm, partial(layouts.against_rms_norm, _against)))
pointwise.add_rms_norm.register(Provider("cpp", add_rms_norm, partial(layouts.against_add_rms_norm, _against)))
pointwise.layer_norm.register(Provider("cpp", layer_norm, partial(layouts.against_layer_norm, _against)))
pointwise.rope.register(Provider("cpp", rope, partial(layouts.against_rope, _against)))
pointwise.gated_activation.register(Provider("cpp", gated_activation, partial(layouts.against_gated_activation, _against)))

"""Convolutions along the tokens of one sequence; what a sequence remembers is its last few inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.recurrent import recurrent_op
from autodeploy.custom_ops.scan import widened

CONV_ACTIVATIONS = {"none": lambda x: x, "silu": F.silu}


def _same(x: Tensor, *_: object) -> Tensor:
    """Shape rule of both."""
    return x.new_empty(x.shape)


@recurrent_op(tokens=("x",), state=lambda x, weight, *_: ((weight.shape[1] - 1, x.shape[2]), x.dtype), output=_same)
def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, state: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = activation(bias + sum over k of weight[:, k] * x_(t - K + 1 + k)), each channel by itself.

    x [N, S, C], weight [C, K], bias [C] or None, state [N, K - 1, C]: the inputs before the first token.
    Summed in float32 or better, rounded to the dtype of the weight for the activation (a key of `CONV_ACTIVATIONS`), then to x's.
    """
    seen = torch.cat([state.to(x.dtype), x], dim=1)
    wide, taps = widened(seen, weight)
    y = wide.new_zeros(x.shape) if bias is None else widened(bias)[0].expand(x.shape)
    for k, tap in enumerate(taps.unbind(1)):
        y = torch.addcmul(y, wide[:, k : k + x.shape[1]], tap)
    return CONV_ACTIVATIONS[activation](y.to(weight.dtype)).to(x.dtype), seen[:, x.shape[1] :]


@recurrent_op(tokens=("x",), state=lambda x: ((1, x.shape[2]), x.dtype), output=_same)
def token_shift(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = x_(t - 1), zeros for a sequence's first token; x [N, S, C], state [N, 1, C]: the input before the first token."""
    return torch.cat([state.to(x.dtype), x[:, :-1]], dim=1), x[:, -1:]

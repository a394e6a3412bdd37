"""Linear attention of RWKV 4: a running average of values, weighted by the exponentials of their keys."""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.custom_ops.recurrent import recurrent_op, state_dtype
from autodeploy.custom_ops.scan import wide_like, widened

NOTHING_SEEN = -1e38
"""Largest exponent before the first token."""


@recurrent_op(tokens=("k", "v"), state=lambda k, *_: ((3, k.shape[2]), state_dtype(k)), output=wide_like)
def wkv(k: Tensor, v: Tensor, decay: Tensor, first: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y_t = (num + exp(first + k_t) v_t) / (den + exp(first + k_t)), then num = exp(decay) num + exp(k_t) v_t; den so, of 1.

    k and v [N, S, C], decay (a logarithm, negative) and first [C] -> y [N, S, C] in float32 (float64 for float64).
    state [N, 3, C]: num and den, both divided by exp(largest), and largest, the largest exponent so far. A sequence that has
    seen a token has den >= 1, so zeros are a fresh state.
    """
    k, v, decay, first, state = widened(k, v, decay, first, state)
    num, den, largest = state.unbind(1)
    largest = torch.where(den == 0, NOTHING_SEEN, largest)
    outputs = []
    for k_t, v_t in zip(k.unbind(1), v.unbind(1), strict=True):
        num_t, den_t, _ = _add(num, den, largest, k_t + first, v_t)
        outputs.append(num_t / den_t)
        num, den, largest = _add(num, den, largest + decay, k_t, v_t)
    return torch.stack(outputs, dim=1), torch.stack((num, den, largest), dim=1)


def _add(num: Tensor, den: Tensor, largest: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Take exp(key) * value into an average kept relative to exp(largest); nothing overflows."""
    new = torch.maximum(largest, key)
    old_weight, weight = (largest - new).exp(), (key - new).exp()
    return old_weight * num + weight * value, old_weight * den + weight, new

"""State-space layers: a state that fades and takes in each token, read out by a vector of the token's own.

All three ops compute and answer in float32 (float64 for float64): x is already what the layer multiplies it with, and time
steps, skips and gates are pointwise work of the graph around them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.custom_ops.recurrent import recurrent_op, state_dtype

CHUNK = 64
"""Tokens whose mutual influence is one matrix product; the state passes from chunk to chunk."""


def widened(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the dtype that states are computed in."""
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def chunks(size: int, *tensors: Tensor) -> zip[tuple[Tensor, ...]]:
    """The tensors cut along the tokens (dim 1), `size` at a time; the last chunk may be shorter."""
    return zip(*(tensor.split(size, dim=1) for tensor in tensors), strict=True)


def pairwise_decay(total: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(total_i - total_j) for j <= i, else 0: what is left of token j at token i. total [N, C, H, ...] -> [N, H, C, C, ...].

    total: running sum of log decays, in float64, since small differences of large sums are taken.
    """
    total = total.transpose(1, 2)
    later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=total.device).triu(1)
    later = later.reshape(*later.shape, *[1] * (total.dim() - 3))
    return (total[:, :, :, None] - total[:, :, None]).masked_fill(later, -torch.inf).to(dtype).exp()


def wide_like(x: Tensor, *_: object) -> Tensor:
    """Shape rule: as the first argument, in the dtype of the state."""
    return x.new_empty(x.shape, dtype=state_dtype(x))


@recurrent_op(
    tokens=("x", "dt", "b", "c"),
    state=lambda x, dt, a, b, c: ((*x.shape[2:], b.shape[3]), state_dtype(x)),
    output=wide_like,
)
def ssd(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t^T and y_t = h_t c_t per head (Mamba 2; lightning attention with dt = 1).

    x [N, S, H, P], dt [N, S, H], a [H], b and c [N, S, G, Ds] shared by H / G heads each, state h [N, H, P, Ds] -> y like x.
    Inside a chunk with running sums L of dt a: y_i = exp(L_i) h c_i + sum over j <= i of exp(L_i - L_j) (b_j . c_i) dt_j x_j.
    """
    x, dt, a, b, c, state = widened(x, dt, a, b, c, state)
    b, c = (tensor.repeat_interleave(x.shape[2] // b.shape[2], dim=2) for tensor in (b, c))
    outputs = []
    for x_, dt_, b_, c_ in chunks(CHUNK, x * dt[..., None], dt, b, c):
        total = (dt_ * a).double().cumsum(1)
        x_, b_, c_ = (part.transpose(1, 2) for part in (x_, b_, c_))
        y, state = _ssd_chunk(x_, b_, c_, total, state)
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1), state


def _ssd_chunk(x: Tensor, b: Tensor, c: Tensor, total: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, head-major: x [N, H, C, P] times its dt, b and c [N, H, C, Ds]; total [N, C, H]."""
    since, until = (log.exp().to(x.dtype).transpose(1, 2)[..., None] for log in (total, total[:, -1:] - total))
    scores = (c @ b.transpose(-1, -2)) * pairwise_decay(total, x.dtype)
    y = scores @ x + since * (c @ state.transpose(-1, -2))
    return y, state * since[:, :, -1:] + x.transpose(-1, -2) @ (b * until)


@recurrent_op(tokens=("x", "dt", "b", "c"), state=lambda x, dt, a, b, c: (a.shape, state_dtype(x)), output=wide_like)
def selective_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t and y_t = h_t . c_t, with a decay per channel and state (Mamba 1).

    x and dt [N, S, C], a [C, Ds], b and c [N, S, Ds], state h [N, C, Ds] -> y [N, S, C].
    """
    x, dt, a, b, c, state = widened(x, dt, a, b, c, state)
    outputs = []
    for x_, dt_, b_, c_ in chunks(CHUNK, x, dt, b, c):
        states = _scan((dt_ * x_)[..., None] * b_[:, :, None], (dt_[..., None] * a).exp(), state)
        outputs.append((states @ c_[..., None]).squeeze(-1))
        state = states[:, -1]
    return torch.cat(outputs, dim=1), state


@recurrent_op(tokens=("x", "decay"), state=lambda x, decay: (x.shape[2:], state_dtype(x)), output=wide_like)
def linear_scan(x: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = decay_t h_(t-1) + x_t, each channel by itself (RG-LRU); x and decay [N, S, C], state h [N, C] -> all h, like x."""
    x, decay, state = widened(x, decay, state)
    states = _scan(x, decay, state)
    return states, states[:, -1]


def _scan(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """All states of h_t = decay_t h_(t-1) + x_t, [N, S, ...]: token by token, each step over everything else at once."""
    states = torch.empty_like(x)
    for t in range(x.shape[1]):
        state = torch.addcmul(x[:, t], decay[:, t], state, out=states[:, t])
    return states

"""The gated delta rule: a memory of keys and values that fades, and corrects what it would answer for the new key."""

from __future__ import annotations

import torch
from torch import Tensor

from autodeploy.custom_ops.recurrent import recurrent_op, state_dtype
from autodeploy.custom_ops.scan import CHUNK, chunks, pairwise_decay, wide_like, widened

CHANNEL_CHUNK = 16
"""As `CHUNK` where each key channel fades by itself: the pairwise decays then take C * C * Dk numbers per head."""


@recurrent_op(
    tokens=("q", "k", "v", "decay", "beta"),
    state=lambda q, k, v, *_: ((v.shape[2], k.shape[3], v.shape[3]), state_dtype(v)),
    output=lambda q, k, v, *_: wide_like(v),
)
def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """M = exp(decay_t) M_(t-1), then M_t = M + k_t (beta_t (v_t - k_t^T M))^T and y_t = q_t^T M_t per head.

    q and k [N, S, Hk, Dk], each serving H / Hk heads in a row, v [N, S, H, Dv], beta [N, S, H], decay (a logarithm) [N, S, H], or
    [N, S, H, Dk] where each channel of the key fades by itself (Kimi), state M [N, H, Dk, Dv] -> y [N, S, H, Dv], in float32
    (float64 for float64). q and k come normalised and scaled.

    Inside a chunk with running sums L of the decay, the corrections u_i = beta_i (v_i - what the memory answers) solve the
    triangular system u_i + beta_i sum over j < i of (k_i . exp(L_i - L_j) k_j) u_j = beta_i (v_i - (exp(L_i) k_i)^T M).
    """
    q, k, v, decay, beta, state = widened(q, k, v, decay, beta, state)
    repeats = v.shape[2] // k.shape[2]
    if repeats > 1:
        q, k = q.repeat_interleave(repeats, dim=2), k.repeat_interleave(repeats, dim=2)
    by_channel = decay.dim() == 4
    outputs = []
    for q_, k_, v_, decay_, beta_ in chunks(CHANNEL_CHUNK if by_channel else CHUNK, q, k, v, decay, beta):
        total = decay_.double().cumsum(1)
        q_, k_, v_, beta_ = (part.transpose(1, 2) for part in (q_, k_, v_, beta_))
        y, state = _delta_chunk(q_, k_, v_, total, beta_, state)
        outputs.append(y.transpose(1, 2))
    return torch.cat(outputs, dim=1), state


def _delta_chunk(q: Tensor, k: Tensor, v: Tensor, total: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, head-major: q, k, v [N, H, C, D], beta [N, H, C]; total [N, C, H] or [N, C, H, Dk]."""
    pairwise = pairwise_decay(total, q.dtype)
    total = total if total.dim() == 4 else total[..., None]
    since, until = (log.exp().to(q.dtype).transpose(1, 2) for log in (total, total[:, -1:] - total))
    correction = beta[..., None] * (v - (k * since) @ state)
    if k.shape[2] > 1:
        system = beta[..., None] * _scores(k, k, pairwise)
        correction = torch.linalg.solve_triangular(system, correction, upper=False, unitriangular=True)
    y = (q * since) @ state + _scores(q, k, pairwise) @ correction
    return y, state * since[:, :, -1, :, None] + (k * until).transpose(-1, -2) @ correction


def _scores(a: Tensor, b: Tensor, pairwise: Tensor) -> Tensor:
    """a_i . (pairwise_ij b_j): a and b [N, H, C, D], pairwise [N, H, C, C] or [N, H, C, C, D] -> [N, H, C, C]."""
    if pairwise.dim() == 4:
        return (a @ b.transpose(-1, -2)) * pairwise
    return ((b[:, :, None] * pairwise) @ a[..., None]).squeeze(-1)

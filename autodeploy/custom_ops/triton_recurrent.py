"""Recurrent ops over the requests of a row by own Triton kernels. Nothing is read on the host, so a CUDA graph can hold them.

Each goes over a request's tokens one by one: as fast as memory for decodes, but slow for a long prompt of few requests. SSD and
the gated delta rule go over prompts of 16-bit numbers by chunks, on tensor cores.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import conv, delta_rule, scan
from autodeploy.custom_ops.gpu import Kernel, against_triton, power_of_2
from autodeploy.custom_ops.op import Provider

MAX_WIDTH = 512
"""Numbers of a state's row (of a column, for the delta rule) that a program keeps in registers, beside others of its kind."""
SSD_NUMBERS, SCAN_NUMBERS, DELTA_NUMBERS = 2048, 512, 1024
"""Numbers of the state that a program keeps."""
SCAN_WARPS, DELTA_WARPS = 4, 1
"""Warps of a program. The delta rule sums over rows twice a token: within one warp no thread waits for others."""
DECODE_CHANNELS, PREFILL_CHANNELS, PREFILL_TOKENS = 256, 64, 16
"""What a program of a convolution computes at a time."""
CONV_PROGRAMS = 2048
"""Of a convolution over prompts, about."""
CHUNK_WIDTH, CHUNK_ROWS = 128, 32
"""The widest state (for the delta rule: keys) that prompts are gone over with by chunks, and a program's rows (columns) of it."""
CHUNKS = {"TOKENS": 16, "num_warps": 4, "num_stages": 1}
_conv = Kernel("conv", "causal_conv1d")
_ssd = Kernel("recurrent", "ssd")
_scan = Kernel("recurrent", "selective_scan")
_delta = Kernel("recurrent", "gated_delta_rule")
_ssd_chunks = Kernel("chunked", "ssd")
_delta_within = Kernel("chunked_delta", "within_chunks")
_delta_across = Kernel("chunked_delta", "across_chunks")


def rows(x: Tensor) -> Tensor:
    """x [1, T, ...] with the numbers of each token side by side: where they are is said by the stride from token to token."""
    return x if x[:, :1].is_contiguous() else x.contiguous()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """x [1, T, C], weight [C, K], bias [C] or None, state_cache [slots, K - 1, C]."""
    x, out = rows(x), x.new_empty(x.shape)
    (num_tokens, width), taps, num_requests = x.shape[1:], weight.shape[1], len(state_slots)
    is_decode = num_tokens == num_requests
    tokens = 1 if is_decode else max(PREFILL_TOKENS, power_of_2(taps))
    block = DECODE_CHANNELS if is_decode else PREFILL_CHANNELS
    blocks = -(-width // block)
    parts = 1 if is_decode else min(-(-num_tokens // tokens), max(1, CONV_PROGRAMS // (num_requests * blocks)))
    if x.numel():
        _conv[num_requests, blocks, parts](
            x, weight.contiguous(), bias, state_cache, state_slots, cu_seqlens_q, seq_lens, out, width, x.stride(1),
            TAPS=taps, HAS_BIAS=bias is not None, ACTIVATION=activation,
            TOKENS=tokens, STATE_ROWS=power_of_2(taps - 1), BLOCK=block, num_warps=2 if is_decode else 4,
        )  # fmt: skip
    return out


def ssd(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """x [1, T, H, P], dt [1, T, H], a [H], b and c [1, T, G, Ds], state_cache [slots, H, P, Ds]."""
    x, dt, b, c = map(rows, (x, dt, b, c))
    out = x.new_empty(x.shape, dtype=torch.float32)
    heads, x_width, state_width = state_cache.shape[1:]
    kernel, block, columns, options = _ssd, *blocks_of(x_width, state_width, SSD_NUMBERS), {"num_warps": SCAN_WARPS}
    is_decode, is_narrow = x.shape[1] == len(state_slots), torch.float32 not in (x.dtype, b.dtype, c.dtype)
    if is_narrow and not is_decode and state_width <= CHUNK_WIDTH:
        kernel, block, columns, options = _ssd_chunks, CHUNK_ROWS, max(16, columns), CHUNKS
    if x.numel():
        kernel[len(state_slots), heads, -(-x_width // block)](
            x, dt, a.contiguous(), b, c, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
            heads, heads // b.shape[2], x_width, state_width, x.stride(1), dt.stride(1), b.stride(1), c.stride(1),
            ROWS=block, COLUMNS=columns, **options,
        )  # fmt: skip
    return out


def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """x and dt [1, T, C], a [C, Ds], b and c [1, T, Ds], state_cache [slots, C, Ds]."""
    x, dt, b, c = map(rows, (x, dt, b, c))
    out = x.new_empty(x.shape, dtype=torch.float32)
    x_width, state_width = state_cache.shape[1:]
    block, columns = blocks_of(x_width, state_width, SCAN_NUMBERS)
    if x.numel():
        _scan[len(state_slots), -(-x_width // block)](
            x, dt, a.contiguous(), b, c, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
            x_width, state_width, x.stride(1), dt.stride(1), b.stride(1), c.stride(1),
            ROWS=block, COLUMNS=columns, num_warps=SCAN_WARPS,
        )  # fmt: skip
    return out


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """q, k [1, T, Hk, Dk], v [1, T, H, Dv], decay [1, T, H] or [1, T, H, Dk], beta [1, T, H], state_cache [slots, H, Dk, Dv]."""
    q, k, v, decay, beta = map(rows, (q, k, v, decay, beta))
    out = v.new_empty(v.shape, dtype=torch.float32)
    heads, k_width, v_width = state_cache.shape[1:]
    block, size = blocks_of(v_width, k_width, DELTA_NUMBERS)
    is_decode, fades_as_a_whole = v.shape[1] == len(state_slots), decay.dim() == 3
    if v.numel() and fades_as_a_whole and not is_decode and v.dtype != torch.float32 and k_width <= CHUNK_WIDTH:
        _delta_chunks(q, k, v, decay, beta, state_cache, state_slots, cu_seqlens_q, seq_lens, out)
    elif v.numel():
        _delta[len(state_slots), heads, -(-v_width // block)](
            q, k, v, decay, beta, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
            heads, heads // k.shape[2], k_width, v_width,
            q.stride(1), k.stride(1), v.stride(1), decay.stride(1), beta.stride(1),
            BY_CHANNEL=decay.dim() == 4, ROWS=size, COLUMNS=block, num_warps=DELTA_WARPS,
        )  # fmt: skip
    return out


def _delta_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    state_cache: Tensor,
    state_slots: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    out: Tensor,
) -> None:
    """`gated_delta_rule` into `out`, by chunks: what is within them for all at once, then from each to the next."""
    (heads, k_width, v_width), num_requests, tokens = state_cache.shape[1:], len(state_slots), CHUNKS["TOKENS"]
    inverses, scores = out.new_empty(2, v.shape[1], heads, tokens)
    per_key, depth = heads // k.shape[2], max(16, power_of_2(k_width) // 4)
    columns = min(CHUNK_ROWS, max(16, power_of_2(v_width)))
    _delta_within[v.shape[1] // tokens + num_requests, heads](
        q, k, decay, beta, cu_seqlens_q, inverses, scores,
        num_requests, heads, per_key, k_width, q.stride(1), k.stride(1), decay.stride(1), beta.stride(1),
        DEPTH=depth, TOKENS=tokens, num_warps=1, num_stages=1,
    )  # fmt: skip
    _delta_across[num_requests, heads, -(-v_width // columns)](
        q, k, v, decay, inverses, scores, state_cache, state_slots, cu_seqlens_q, seq_lens, out,
        heads, per_key, q.stride(1), k.stride(1), v.stride(1), decay.stride(1),
        K_WIDTH=k_width, V_WIDTH=v_width, DEPTH=depth, COLUMNS=columns, **CHUNKS,
    )  # fmt: skip


def blocks_of(cut: int, whole: int, numbers: int) -> tuple[int, int]:
    """The powers of two by which a state is cut along one dim and covered along the other, about that many numbers together."""
    width = power_of_2(whole)
    return min(power_of_2(cut), max(1, numbers // width)), width


def _against(
    target: Any, state_cache: Tensor, state_slots: Tensor, cu_seqlens_q: Tensor, seq_lens: Tensor, **own: Any
) -> list[str]:
    reasons = against_triton(target, state_cache, *(value for value in own.values() if isinstance(value, Tensor)))
    return reasons + ([] if state_cache.is_contiguous() else ["its states are not contiguous"])


def _against_wide(dim: int, target: Any, state_cache: Tensor, **others: Any) -> list[str]:
    """dim: along which a program keeps the whole state."""
    wide = state_cache.shape[dim] > MAX_WIDTH
    return _against(target, state_cache, **others) + ([f"its states have more than {MAX_WIDTH} numbers a row"] if wide else [])


conv.causal_conv1d.cached.register(Provider("triton", causal_conv1d, _against))
scan.ssd.cached.register(Provider("triton", ssd, partial(_against_wide, -1)))
scan.selective_scan.cached.register(Provider("triton", selective_scan, partial(_against_wide, -1)))
delta_rule.gated_delta_rule.cached.register(Provider("triton", gated_delta_rule, partial(_against_wide, -2)))

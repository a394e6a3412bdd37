"""Paged attention, rotary embedding and the writes to the cache by own Triton kernels: all features of the ops, 8-bit caches too.

Nothing here asks the GPU how long a request is: grids are bounds that follow from shapes, so that a step can be captured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops import layouts, pointwise
from autodeploy.custom_ops.attention import SCALED, kv_append, paged_attention, rope_append
from autodeploy.custom_ops.gpu import Kernel, against_triton, power_of_2
from autodeploy.custom_ops.op import Provider
from autodeploy.specs import SCALE_BYTES

LEAST_SPLIT, MOST_SPLITS = 512, 64
"""Keys of a request that one program works on while decoding, at least, and programs that share a request's keys."""
_rope = Kernel("rope", "rope")
_rope_append = Kernel("rope", "rope_append")
_kv_append = Kernel("rope", "kv_append")
_attention = Kernel("paged_attention", "attention_rows")
_merge = Kernel("paged_attention", "merge_splits")


def triton_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As `rope`: x [1, H, T, D] with any strides but the last."""
    out = torch.empty_like(x)
    _, heads, tokens, width = x.shape
    if x.numel():
        _rope[tokens, heads](
            x, cos, sin, out, width, *x.stride()[1:3], *out.stride()[1:3],
            INTERLEAVED=interleaved, HALF=power_of_2(width // 2), num_warps=1,
        )  # fmt: skip
    return out


def triton_rope_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = -1.0,
    offset: float = 0.0,
    weight_in_float: bool = False,
) -> Tensor:
    """As `rope_append`."""
    out = torch.empty_like(q)
    _, heads, tokens, width = q.shape
    if q.numel():
        strides = (stride for x in (q, k, v, out) for stride in x.stride()[1:3])
        _rope_append[tokens, heads + k.shape[1]](
            q, k, v, cache, slot_mapping, cos, sin, q_weight, k_weight, out,
            heads, k.shape[1], width, v.shape[3], cache.shape[3], *strides, eps, offset,
            NORM=eps >= 0, Q_WEIGHT=q_weight is not None, K_WEIGHT=k_weight is not None, IN_FLOAT=weight_in_float,
            INTERLEAVED=interleaved, SCALED=cache.dtype in SCALED,
            HALF=power_of_2(width // 2), BLOCK_V=power_of_2(v.shape[3]), num_warps=1,
        )  # fmt: skip
    return out


def triton_kv_append(k: Tensor, v: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> None:
    """As `kv_append`."""
    _, heads, tokens, width = k.shape
    values = k if v is None else v
    if k.numel():
        _kv_append[tokens, heads](
            k, v, cache, slot_mapping, heads, width, values.shape[3], cache.shape[3], *k.stride()[1:], *values.stride()[1:],
            HAS_V=v is not None, SCALED=cache.dtype in SCALED,
            BLOCK=power_of_2(width), BLOCK_V=power_of_2(values.shape[3]), num_warps=1 if width <= 256 else 4,
        )  # fmt: skip


def triton_paged_attention(
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    head_dim_v: int,
    chunk: int = 0,
    alibi: Tensor | None = None,
) -> Tensor:
    """As `paged_attention`. Where every request has one token its keys are split, in sizes that follow from the page table."""
    _, heads, tokens, head_dim = q.shape
    _, page_size, kv_heads, width = cache.shape
    requests, group = seq_lens.shape[0], heads // kv_heads
    out = q.new_empty(1, tokens, heads, head_dim_v)
    if q.stride(3) != 1:
        q = q.contiguous()
    is_latent = width - (SCALE_BYTES if cache.dtype in SCALED else 0) == head_dim
    decodes = tokens == requests
    block_rows, block_keys, num_warps = _blocks(decodes, tokens * group, max(head_dim, head_dim_v))
    most_keys = page_table.shape[1] * page_size
    split = max(LEAST_SPLIT, power_of_2(-(-most_keys // MOST_SPLITS))) if decodes else most_keys
    splits = max(1, -(-most_keys // split))
    row_blocks = requests * -(-group // block_rows) if decodes else tokens * group // block_rows + requests
    values, weights = out, out
    if splits > 1:
        values = torch.empty(tokens, heads, splits, head_dim_v, dtype=torch.float32, device=q.device)
        weights = torch.empty(tokens, heads, splits, 2, dtype=torch.float32, device=q.device)
    head_part = head_dim - head_dim_v if is_latent else head_dim
    _attention[row_blocks, kv_heads, splits](
        q, cache, page_table, cu_seqlens_q, seq_lens, sinks, alibi, out, values, weights,
        requests, kv_heads, group, head_part, head_dim_v, width, page_size, split, splits,
        q.stride(1), q.stride(2), page_table.stride(0), scale, window, softcap, chunk,
        DECODES=decodes, IS_SPLIT=splits > 1, IS_LATENT=is_latent, SCALED=cache.dtype in SCALED,
        HAS_SINKS=sinks is not None, HAS_ALIBI=alibi is not None, HAS_SOFTCAP=softcap > 0, HAS_HEAD=head_part > 0,
        BLOCK_ROWS=block_rows, BLOCK_KEYS=block_keys,
        BLOCK_D=max(16, power_of_2(head_part)), BLOCK_V=max(16, power_of_2(head_dim_v)),
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _merge[tokens, heads](
            values, weights, sinks, out, heads, head_dim_v, splits,
            HAS_SINKS=sinks is not None, SPLITS=power_of_2(splits), BLOCK_V=power_of_2(head_dim_v), num_warps=4,
        )  # fmt: skip
    return out


def _blocks(decodes: bool, rows: int, head_dim: int) -> tuple[int, int, int]:
    """Rows and keys that a program works on at once, and its warps."""
    if decodes or rows <= 64:
        return 16, 64 if head_dim <= 128 else 32, 4 if head_dim <= 256 else 8
    return (128, 64, 8) if head_dim <= 128 else (64, 32, 8) if head_dim <= 256 else (32, 16, 8)


def against_append(target: Any, k: Tensor, v: Tensor | None, cache: Tensor, **_: Any) -> list[str]:
    """The reasons against writing to this cache."""
    return against_triton(target, k, v) or _against_cache(cache, k, v)


def against_rope_append(
    target: Any, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, **call: Any
) -> list[str]:
    """The reasons against turning queries and keys and writing to this cache."""
    reasons = layouts.against_turning(q, k, v, cos, sin, call["q_weight"], call["k_weight"])
    others = (k, v, cos, sin, call["q_weight"], call["k_weight"])
    return against_triton(target, q) or [*_against_cache(cache, q, *others), *reasons]


def against_attention(target: Any, q: Tensor, cache: Tensor, **_: Any) -> list[str]:
    """The reasons against reading this cache."""
    return against_triton(target, q) or _against_cache(cache, q)


def _against_cache(cache: Tensor, x: Tensor, *beside: Tensor | None) -> list[str]:
    checks = {
        "the cache is of another dtype": cache.dtype not in (x.dtype, *SCALED),
        "what is written is of several dtypes": any(other is not None and other.dtype != x.dtype for other in beside),
        "the cache is not dense": not cache.is_contiguous(),
        f"a head has more than {layouts.MAX_HEAD_DIM} numbers": x.shape[3] > layouts.MAX_HEAD_DIM,
    }
    return [reason for reason, holds in checks.items() if holds]


def _against(target: Any, x: Tensor, *others: Tensor | None) -> list[str]:
    mixed = any(other is not None and other.dtype != x.dtype for other in others)
    return against_triton(target, x) or (["its tensors are of several dtypes"] if mixed else [])


pointwise.rope.register(Provider("triton", triton_rope, partial(layouts.against_rope, _against)))
rope_append.register(Provider("triton", triton_rope_append, against_rope_append))
kv_append.register(Provider("triton", triton_kv_append, against_append))
paged_attention.register(Provider("triton", triton_paged_attention, against_attention))

"""Paged attention and the write to its cache in C++, for CPUs: float32 and bfloat16, caches of 8 bits, every feature of the ops.

A token alone is served by streaming its cache, whole tokens at a time; several tokens of a request in tiles of 64 query rows.
What a request gets depends on the request alone: not on those served beside it, and not on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autodeploy.custom_ops.attention import SCALED, kv_append, paged_attention, rope_append
from autodeploy.custom_ops.cpp import Kernel, against_cpp, pointer
from autodeploy.custom_ops.layouts import against_turning
from autodeploy.custom_ops.op import Provider

DTYPES = (torch.float32, torch.bfloat16)
_append = Kernel("kv_append", "pppp" + "l" * 13)
_rope_append = Kernel("rope_append", "p" * 10 + "l" * 14 + "fflll")
PARTS = {torch.int8: "attention_int8", torch.float8_e4m3fn: "attention_float8"}
"""Libraries of their own."""
_ATTEND = {
    dtype: Kernel(f"paged_{PARTS.get(dtype, 'attention')}", "pppppppp" + "l" * 17 + "ff", PARTS.get(dtype, ""))
    for dtype in (*DTYPES, *SCALED)
}


def cpp_kv_append(k: Tensor, v: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> None:
    """As `kv_append`."""
    _, heads, tokens, head_dim_k = k.shape
    _append(
        k.data_ptr(),
        pointer(v),
        cache.data_ptr(),
        slot_mapping.data_ptr(),
        k.element_size(),
        _kind(cache),
        tokens,
        heads,
        head_dim_k,
        0 if v is None else v.shape[3],
        *k.stride()[1:],
        *(k if v is None else v).stride()[1:],
        torch.get_num_threads(),
    )


def cpp_paged_attention(
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
    """As `paged_attention`."""
    _, heads, tokens, head_dim_k = q.shape
    _, page_size, kv_heads, width = cache.shape
    out = q.new_empty(1, tokens, heads, head_dim_v)
    _ATTEND[cache.dtype](
        q.data_ptr(),
        cache.data_ptr(),
        page_table.data_ptr(),
        cu_seqlens_q.data_ptr(),
        seq_lens.data_ptr(),
        pointer(sinks),
        pointer(alibi),
        out.data_ptr(),
        q.element_size(),
        0 if sinks is None else sinks.element_size(),
        0 if alibi is None else alibi.element_size(),
        seq_lens.shape[0],
        heads,
        kv_heads,
        head_dim_k,
        head_dim_v,
        width,
        page_size,
        *q.stride()[1:],
        page_table.stride(0),
        window,
        chunk,
        torch.get_num_threads(),
        scale,
        softcap,
    )
    return out


def _kind(cache: Tensor) -> int:
    """Bytes of one of its numbers; 0: a float of one byte."""
    return 0 if cache.dtype == torch.float8_e4m3fn else cache.element_size()


def cpp_rope_append(
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
    _rope_append(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        cache.data_ptr(),
        slot_mapping.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        pointer(q_weight),
        pointer(k_weight),
        out.data_ptr(),
        heads,
        k.shape[1],
        tokens,
        width,
        v.shape[3],
        *(stride for x in (q, k, v, out) for stride in x.stride()[1:3]),
        interleaved,
        eps,
        offset,
        q.element_size(),
        _kind(cache),
        torch.get_num_threads(),
    )
    return out


def against_append(target: Any, k: Tensor, v: Tensor | None, cache: Tensor, slot_mapping: Tensor) -> list[str]:
    """The reasons against writing to this cache in C++."""
    return [*_against_cache(cache, k, v), *_against_integers(slot_mapping=(slot_mapping, torch.int64))] or against_cpp(target)


def against_rope_append(
    target: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    **_: Any,
) -> list[str]:
    """The reasons against turning queries and keys and writing to this cache in C++."""
    reasons = against_turning(q, k, v, cos, sin, q_weight, k_weight)
    reasons += _against_integers(slot_mapping=(slot_mapping, torch.int64))
    return [*_against_cache(cache, q, k, v, cos, sin, q_weight, k_weight), *reasons] or against_cpp(target)


def against_attention(
    target: Any,
    q: Tensor,
    cache: Tensor,
    page_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    sinks: Tensor | None,
    alibi: Tensor | None,
    **_: Any,
) -> list[str]:
    """The reasons against reading this cache in C++."""
    integers = _against_integers(
        page_table=(page_table, torch.int64), cu_seqlens_q=(cu_seqlens_q, torch.int32), seq_lens=(seq_lens, torch.int32)
    )
    numbers = [
        f"{name} must be dense, of float32 or bfloat16"
        for name, tensor in (("sinks", sinks), ("alibi", alibi))
        if tensor is not None and (tensor.dtype not in DTYPES or not tensor.is_contiguous())
    ]
    return [*_against_cache(cache, q), *integers, *numbers] or against_cpp(target, PARTS.get(cache.dtype, ""))


def _against_cache(cache: Tensor, x: Tensor, *beside: Tensor | None) -> list[str]:
    """x: keys or queries; the others are of its dtype, and so is the cache, or of 8 bits with scales."""
    checks = {
        f"it has no {_name(x.dtype)}": x.dtype not in DTYPES,
        f"it has no cache of {_name(cache.dtype)}": cache.dtype not in (*DTYPES, *SCALED),
        "the cache is of another dtype": cache.dtype not in (x.dtype, *SCALED),
        "what is written or read is of several dtypes": any(other is not None and other.dtype != x.dtype for other in beside),
        "the cache is not dense": not cache.is_contiguous(),
    }
    return [reason for reason, holds in checks.items() if holds]


def _against_integers(**tensors: tuple[Tensor, torch.dtype]) -> list[str]:
    wrong = {name: dtype for name, (tensor, dtype) in tensors.items() if tensor.dtype != dtype or tensor.stride(-1) != 1}
    return [f"{name} must be dense, of {_name(dtype)}" for name, dtype in wrong.items()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


rope_append.register(Provider("cpp", cpp_rope_append, against_rope_append))
kv_append.register(Provider("cpp", cpp_kv_append, against_append))
paged_attention.register(Provider("cpp", cpp_paged_attention, against_attention))

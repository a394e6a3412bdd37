"""FlashInfer as an attention backend, over the caches of this package. **No GPU has run it yet.**

Nothing imports this module unless it is asked for: `plugins=["autodeploy.custom_ops.flashinfer_attention:use"]`. A step is
planned on the host before it runs, each kind of layer once. Decode steps of one size share a wrapper whose arrays stay in place,
so that a CUDA graph can hold its calls. What is planned belongs to the process: one engine in it at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.attention import kv_append, paged_attention
from autodeploy.custom_ops.attention_backend import AttentionBackend, LoweredAttention, register_attention_backend
from autodeploy.custom_ops.op import Provider, semantic_op
from autodeploy.custom_ops.triton_attention import against_attention, triton_paged_attention
from autodeploy.specs import AttentionLayer, BatchMetadata, Target, input_of_pool

HEAD_DIMS = (64, 128, 256)
WORKSPACE_BYTES = 128 << 20
"""Of the results of parts of requests; one for all wrappers, which run one after the other."""


@dataclass(frozen=True)
class Kind:
    """What layers that share a plan have in common."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_pages: int
    """Of the cache: so many can be planned at once."""
    dtype: torch.dtype
    scale: float
    window: int
    softcap: float
    has_sinks: bool


class FlashInferBackend(AttentionBackend):
    """Keeps a wrapper for each kind of layer: of steps of any shape (size 0), and of decode steps of each number of requests."""

    name = "flashinfer"

    def __init__(self) -> None:
        self.wrappers: dict[tuple[Kind, int], Any] = {}
        self._step: BatchMetadata = {}
        self._planned: set[Kind] = set()
        self._workspace: Tensor | None = None

    def unsupported(self, layer: AttentionLayer, target: Target) -> list[str]:
        if not target.device.startswith("cuda"):
            return [f"it runs on GPUs, not on {target.device}"]
        if find_spec("flashinfer") is None:
            return ["flashinfer is not installed"]
        checks = {
            f"it has no {layer.dtype}": layer.dtype not in ("bfloat16", "float16"),
            "keys and values are of different widths": layer.head_dim_k != layer.head_dim_v,
            f"it has no heads of {layer.head_dim_k}": layer.head_dim_k not in HEAD_DIMS,
            "it has no chunks": layer.chunk > 0,
            "it has no alibi": layer.has_alibi,
            "it has no latent cache": layer.is_latent,
            "it has no softcap beside sinks": layer.has_sinks and layer.softcap > 0,
        }
        return [reason for reason, holds in checks.items() if holds]

    def lower(self, layer: AttentionLayer) -> LoweredAttention:
        return LoweredAttention(kv_append, flashinfer_attention)

    def plan(self, batch: BatchMetadata) -> None:
        """Every kind that steps of this size have had; others when their first layer runs, which is never inside a capture."""
        self._step, size = batch, _size(batch)
        self._planned.clear()
        for kind, of in self.wrappers:
            if of == size:
                self._plan(kind)

    def attend(self, kind: Kind, q: Tensor, cache: Tensor, sinks: Tensor | None) -> Tensor:
        """q [1, H, T, D], cache [pages, page, Hkv, 2 * D], sinks [H] -> [1, T, H, D]."""
        key = (kind, _size(self._step))
        if key not in self.wrappers:
            self.wrappers[key] = self._new_wrapper(*key, cache)
        if kind not in self._planned:
            self._plan(kind)
        extra = () if sinks is None else (sinks.float(), kind.scale)
        parts = cache.split([kind.head_dim, kind.head_dim], -1)
        return self.wrappers[key].run(q[0].transpose(0, 1).contiguous(), parts, *extra)[None]

    def _plan(self, kind: Kind) -> None:
        self._planned.add(kind)
        heads = (kind.num_heads, kind.num_kv_heads, kind.head_dim, kind.page_size)
        self.wrappers[kind, _size(self._step)].plan(
            *pages_of(self._step, kind.page_size, kind.window),
            *heads,
            causal=True,
            sm_scale=kind.scale,
            window_left=kind.window - 1,
            logits_soft_cap=kind.softcap or None,
            q_data_type=kind.dtype,
            kv_data_type=kind.dtype,
        )

    def _new_wrapper(self, kind: Kind, size: int, cache: Tensor) -> Any:
        flashinfer, settings = import_module("flashinfer"), {}
        if self._workspace is None:
            self._workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=cache.device)
        if size:
            lengths = (size + 1, size + 1, kind.num_pages + size, size)  # padding has one page each
            arrays = [torch.zeros(length, dtype=torch.int32, device=cache.device) for length in lengths]
            names = ("qo_indptr_buf", "paged_kv_indptr_buf", "paged_kv_indices_buf", "paged_kv_last_page_len_buf")
            settings = {"use_cuda_graph": True, **dict(zip(names, arrays, strict=True))}
        if not kind.has_sinks:
            return flashinfer.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", **settings)
        settings |= {"q_data_type": kind.dtype, "kv_data_type": kind.dtype, "window_left": kind.window - 1}
        settings |= {"head_dim_qk": kind.head_dim, "head_dim_vo": kind.head_dim}
        return flashinfer.BatchAttentionWithAttentionSinkWrapper(self._workspace, "NHD", **settings)


def _size(batch: BatchMetadata) -> int:
    """Requests of a step in which each has one token; 0 for others."""
    count = len(batch["seq_lens"])
    return count if int(batch["cu_seqlens_q"][-1]) == count else 0


def pages_of(batch: BatchMetadata, page_size: int, window: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First tokens, first pages, the pages themselves and the tokens on the last one, of each request.

    Pages behind the window of a request's first new token are left out: they may be others' by now.
    """
    name = input_of_pool("page_table", f"window_{window}") if window else "page_table"
    table, lengths = batch.get(name, batch.get("page_table")), np.asarray(batch["seq_lens"])
    starts = lengths - np.diff(batch["cu_seqlens_q"])
    first = np.maximum(starts - window + 1, 0) // page_size if window else np.zeros_like(lengths)
    stop = -(-lengths // page_size)
    pages = np.concatenate([row[a:b] for row, a, b in zip(table, first, stop, strict=True)])
    arrays = (batch["cu_seqlens_q"], np.cumsum([0, *(stop - first)]), pages, (lengths - 1) % page_size + 1)
    q_starts, page_starts, numbers, last = (torch.from_numpy(np.array(array, dtype=np.int32)) for array in arrays)
    return q_starts, page_starts, numbers, last


@semantic_op(fake=lambda q, *args: q.new_empty(1, q.shape[2], q.shape[1], args[8]))
def flashinfer_attention(
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
) -> Tensor:
    """`paged_attention` of layers that the backend serves."""
    return paged_attention.reference(q, cache, page_table, cu_seqlens_q, seq_lens, sinks, scale, window, softcap, head_dim_v)


def planned_attention(
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
) -> Tensor:
    """By the wrapper that was planned for this step; tables and lengths were read on the host."""
    shape = (q.shape[1], cache.shape[2], head_dim_v, cache.shape[1], cache.shape[0])
    kind = Kind(*shape, q.dtype, scale, window, softcap, sinks is not None)
    return BACKEND.attend(kind, q, cache, sinks)


def _against(target: Any, q: Tensor, cache: Tensor, **_: Any) -> list[str]:
    if not target.device.startswith("cuda"):
        return [f"it runs on GPUs, not on {target.device}"]
    return [] if cache.dtype == q.dtype else ["the cache is of another dtype"]


def use(pipeline: Any) -> Any:
    """A plugin that changes no pass: importing this module has put the backend before the others."""
    return pipeline


BACKEND = FlashInferBackend()
flashinfer_attention.register(Provider("triton", triton_paged_attention, against_attention))
flashinfer_attention.register(Provider("flashinfer", planned_attention, _against))
register_attention_backend(BACKEND)

"""FlashInfer for paged attention, over the caches of this package, where it is asked for. **No GPU has run it yet.**

Nothing imports flashinfer before a layer runs. A step is planned on the host before it runs, each kind of layer once. Decode
steps of one size share a wrapper whose arrays stay in place, so that a CUDA graph can hold its calls. What is planned belongs to
the process: one engine in it at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autodeploy.custom_ops.attention import paged_attention
from autodeploy.custom_ops.op import Provider, call_arguments
from autodeploy.specs import BatchMetadata, input_of_pool

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


class PlannedAttention:
    """Keeps a wrapper for each kind of layer: of steps of any shape (size 0), and of decode steps of each number of requests."""

    def __init__(self) -> None:
        self.wrappers: dict[tuple[Kind, int], Any] = {}
        self._step: BatchMetadata = {}
        self._planned: set[Kind] = set()
        self._workspace: Tensor | None = None

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


def flashinfer_attention(q: Tensor, cache: Tensor, *rest: Any) -> Tensor:
    """As `paged_attention`, by the wrapper that was planned for this step; tables and lengths were read on the host."""
    call = call_arguments(paged_attention.overload, (q, cache, *rest), {})
    shape = (q.shape[1], cache.shape[2], call["head_dim_v"], cache.shape[1], cache.shape[0])
    kind = Kind(*shape, q.dtype, call["scale"], call["window"], call["softcap"], call["sinks"] is not None)
    return PLANNED.attend(kind, q, cache, call["sinks"])


def plan_step(batch: BatchMetadata) -> None:
    """Before each step."""
    PLANNED.plan(batch)


def against_flashinfer(target: Any, q: Tensor, cache: Tensor, head_dim_v: int, **call: Any) -> list[str]:
    """The reasons against a call of `paged_attention`."""
    if not target.device.startswith("cuda"):
        return [f"it runs on GPUs, not on {target.device}"]
    if find_spec("flashinfer") is None:
        return ["flashinfer is not installed (python -m pip install flashinfer-python)"]
    head_dim = q.shape[3]
    checks = {
        f"it has no {str(q.dtype).removeprefix('torch.')}": q.dtype not in (torch.bfloat16, torch.float16),
        "the cache is of another dtype": cache.dtype != q.dtype,
        "keys and values are of different widths": head_dim != head_dim_v,
        "it has no latent cache": cache.shape[3] == head_dim,
        f"it has no heads of {head_dim}": head_dim not in HEAD_DIMS,
        "it has no chunks": call["chunk"] > 0,
        "it has no alibi": call["alibi"] is not None,
        "it has no softcap beside sinks": call["sinks"] is not None and call["softcap"] > 0,
    }
    return [reason for reason, holds in checks.items() if holds]


PLANNED = PlannedAttention()
paged_attention.register(Provider("flashinfer", flashinfer_attention, against_flashinfer, plan=plan_step, is_asked_for=True))

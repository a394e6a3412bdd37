"""Plain frozen data that the compiler and the executor share. No torch here: dtypes are their names ("float32", "bfloat16").

Shape symbols used in every docstring of the package:

    T  tokens of all requests, packed in one row      B  requests in the batch       P  pages per request (longest)
    N  rows whose logits are wanted                   H  query heads                 Hkv  key/value heads
    D  head dim (Dk of keys, Dv of values)            V  vocabulary
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any


class Level(StrEnum):
    """How far a graph has climbed down: aten as exported, semantic ops, paged ops with chosen kernels."""

    EXPORTED = "exported"
    CANONICAL = "canonical"
    LOWERED = "lowered"


@dataclass(frozen=True)
class Target:
    """What a program is compiled for."""

    device: str = "cpu"
    page_size: int = 32


@dataclass(frozen=True)
class InputSpec:
    """One tensor that the executor fills before each forward. `shape` holds the symbols above or numbers."""

    shape: tuple[str | int, ...]
    dtype: str
    meaning: str = field(compare=False, default="")


INPUTS: dict[str, InputSpec] = {
    "input_ids": InputSpec((1, "T"), "int64", "token ids"),
    "position_ids": InputSpec((1, "T"), "int64", "position of each token in its own request"),
    "rope_len": InputSpec((1, "T"), "int64", "length of the token's own request, for rope that depends on it"),
    "slot_mapping": InputSpec(("T",), "int64", "where each token's key and value go: page * page_size + offset"),
    "page_table": InputSpec(("B", "P"), "int64", "pages of each request in order, padded with 0"),
    "cu_seqlens_q": InputSpec(("B+1",), "int32", "first token of each request in the row, and T"),
    "seq_lens": InputSpec(("B",), "int32", "tokens of each request in the cache after this step"),
    "logits_indices": InputSpec(("N",), "int64", "tokens whose logits are wanted"),
}
"""Every input the executor knows how to build, by name."""

BatchMetadata = Mapping[str, Any]
"""One step's inputs by name: numpy arrays of the shapes and dtypes above."""


@dataclass(frozen=True)
class AttentionLayer:
    """One attention call of the model: what a backend needs to know to serve it."""

    num_heads: int
    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: str
    scale: float
    window: int = 0
    """Tokens a query sees, itself included; 0 is no limit."""
    softcap: float = 0.0
    """Scores become softcap * tanh(scores / softcap); 0 is off."""
    has_sinks: bool = False


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one attention call, in pages of tokens. Owns no memory: it says how much is needed."""

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: str

    def shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """Cache tensor: [num_pages, page_size, Hkv, Dk + Dv]; a token's key and value lie side by side."""
        return (num_pages, page_size, self.num_kv_heads, self.head_dim_k + self.head_dim_v)

    def bytes_per_page(self, page_size: int) -> int:
        return prod(self.shape(1, page_size)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SlidingWindowKV(PagedKV):
    """As `PagedKV`, but no query looks further back than `window` tokens, itself included."""

    window: int = 0


CacheSpec = PagedKV

EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE = 8, 32
"""Sizes of the pool in values that stand for a cache; nothing may depend on them."""

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8, "int32": 4, "bool": 1}

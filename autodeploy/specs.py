"""Plain frozen data that the compiler and the executor share. No torch here: dtypes are their names ("float32", "bfloat16").

Shape symbols used in every docstring of the package:

    T  tokens of all requests, packed in one row      B  requests in the batch       P  pages per request (longest)
    N  rows whose logits are wanted                   H  query heads                 Hkv  key/value heads
    D  head dim (Dk of keys, Dv of values)            V  vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
class Mesh:
    """How processes (ranks) divide a model: `pp` stages of layers, each shared by `tp` ranks. rank = stage * tp + index."""

    tp: int = 1
    """Ranks that share every layer: heads, columns of MLPs, rows of the vocabulary, and experts."""
    ep: int = 1
    """Groups of these ranks that the experts are dealt out to; inside a group an expert's columns are shared. Divides `tp`."""
    pp: int = 1
    """Stages, each with layers of its own."""

    @property
    def size(self) -> int:
        """Ranks altogether."""
        return self.tp * self.pp

    def stage(self, rank: int) -> int:
        return rank // self.tp

    def index(self, rank: int) -> int:
        """Of a rank among those of its stage: which part of each layer is its own."""
        return rank % self.tp

    @property
    def logits_rank(self) -> int:
        """The rank of the last stage that rank 0 has the logits from."""
        return (self.pp - 1) * self.tp


@dataclass(frozen=True)
class Target:
    """What a program is compiled for."""

    device: str = "cpu"
    page_size: int = 32
    mesh: Mesh = Mesh()


@dataclass(frozen=True)
class ModelFacts:
    """What serving needs to know of a model beside its program."""

    eos_token_ids: frozenset[int]
    max_seq_len: int
    vocab_size: int

    @classmethod
    def of(cls, config: Any, generation: Any) -> ModelFacts:
        """From a model's config and its generation config, which may be None."""
        text = config.get_text_config()
        eos = getattr(generation, "eos_token_id", None)
        eos = getattr(text, "eos_token_id", None) if eos is None else eos
        ids = frozenset() if eos is None else frozenset(eos if isinstance(eos, list) else [eos])
        return cls(ids, getattr(text, "max_position_embeddings", None) or 2048, text.vocab_size)


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
    "state_slots": InputSpec(("B",), "int64", "slot of each request's recurrent states"),
    "logits_indices": InputSpec(("N",), "int64", "tokens whose logits are wanted"),
}
"""Every input the executor knows how to build, by name."""


def input_spec(name: str) -> InputSpec:
    """Of an input, or of a window pool's `page_table_window_N` or `slot_mapping_window_N`."""
    return INPUTS[name.partition("_window_")[0]]


BatchMetadata = Mapping[str, Any]
"""One step's inputs by name: numpy arrays of the shapes and dtypes above."""


@dataclass(frozen=True)
class TokenValue:
    """A value with rows of each token, which one piece gives and others read. shape: that of one token, its rows at `dim`."""

    shape: tuple[int, ...]
    dim: int
    dtype: str
    place: int
    """Values of one place are never needed at once, and have equally many numbers per token."""


@dataclass(frozen=True)
class Piece:
    """Calls of a lowered program, by name, and the values of others that they need or others need of them."""

    calls: tuple[str, ...]
    is_captured: bool
    """Whether nothing in it depends on lengths: it is the same for all steps of T tokens."""
    reads: tuple[str, ...] = ()
    gives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """A lowered program in order, and the values that captured pieces read and give, inputs and caches excepted."""

    pieces: tuple[Piece, ...]
    values: Mapping[str, TokenValue]


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
    chunk: int = 0
    """A query sees the keys of its own chunk of that many positions; 0 is no limit."""
    has_sinks: bool = False
    has_alibi: bool = False
    is_latent: bool = False
    """The values are the last `head_dim_v` numbers of the keys."""


@dataclass(frozen=True)
class PagedKV:
    """Keys and values of one attention call, in pages of tokens. Owns no memory: it says how much is needed."""

    num_kv_heads: int
    head_dim_k: int
    head_dim_v: int
    dtype: str

    @property
    def pool(self) -> str:
        """Caches of one pool share their page tables (or slots)."""
        return PAGES

    @property
    def numbers(self) -> int:
        """That are kept of a token, per head: its key, and its value beside it."""
        return self.head_dim_k + self.head_dim_v

    def shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """Cache tensor: [num_pages, page_size, Hkv, C]; C is Dk + Dv, and `SCALE_BYTES` more in a dtype of 8 bits."""
        scales = SCALE_BYTES if self.dtype in SCALED_DTYPES else 0
        return (num_pages, page_size, self.num_kv_heads, self.numbers + scales)

    def bytes_per_unit(self, page_size: int) -> int:
        """Bytes of one page (of one slot, for a state)."""
        return prod(self.shape(1, page_size)) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class SlidingWindowKV(PagedKV):
    """As `PagedKV`, but no query looks further back than `window` tokens, itself included."""

    window: int = 0

    @property
    def pool(self) -> str:
        return f"window_{self.window}"


@dataclass(frozen=True)
class LatentKV(PagedKV):
    """Keys of one head whose last `head_dim_v` numbers are the values too (multi-head latent attention)."""

    @property
    def numbers(self) -> int:
        return self.head_dim_k


@dataclass(frozen=True)
class RecurrentState:
    """What a recurrent layer remembers of a request, whatever its length: one slot."""

    state_shape: tuple[int, ...]
    dtype: str

    @property
    def pool(self) -> str:
        return STATES

    def shape(self, num_slots: int, page_size: int) -> tuple[int, ...]:
        """Cache tensor: [num_slots, *state_shape]."""
        return (num_slots, *self.state_shape)

    def bytes_per_unit(self, page_size: int) -> int:
        return prod(self.state_shape) * DTYPE_BYTES[self.dtype]


CacheSpec = PagedKV | RecurrentState

PAGES, STATES = "pages", "states"
"""Pools of caches: pages that keep all tokens, slots of states; `window_N` keeps the tokens of a window."""


def bytes_per_token(specs: Iterable[CacheSpec]) -> int:
    """Of all paged caches together."""
    return sum(spec.bytes_per_unit(1) for spec in specs if spec.pool != STATES)


def bytes_per_request(specs: Iterable[CacheSpec]) -> int:
    """Of all recurrent states together, whatever the request's length."""
    return sum(spec.bytes_per_unit(1) for spec in specs if spec.pool == STATES)


def window_of_pool(pool: str) -> int:
    """N of the pool `window_N`; 0 for the others."""
    return int(pool.removeprefix("window_")) if pool.startswith("window_") else 0


def input_of_pool(name: str, pool: str) -> str:
    """The name under which a pool's `page_table` or `slot_mapping` is an input."""
    return name if pool == PAGES else f"{name}_{pool}"


EXAMPLE_PAGES, EXAMPLE_PAGE_SIZE = 8, 32
"""Sizes of the pool in values that stand for a cache; nothing may depend on them."""

DTYPE_BYTES = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
}

SCALED_DTYPES = {"int8", "float8_e4m3fn"}
"""Of caches whose numbers are multiples of scales, of which there are two for each head of a token: its key's, its value's."""
SCALE_BYTES = 8
"""Two float32 behind the numbers of a head."""

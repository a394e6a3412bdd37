"""Attention backends: who keeps the keys and values of a layer, in which layout, and which ops read them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from autodeploy.custom_ops.attention import kv_append, paged_attention
from autodeploy.custom_ops.op import SemanticOp
from autodeploy.specs import AttentionLayer, BatchMetadata, LatentKV, PagedKV, SlidingWindowKV, Target


@dataclass(frozen=True)
class LoweredAttention:
    """The two ops of a layer once it has a cache, with the signatures of `kv_append` and `paged_attention`."""

    append: SemanticOp
    attend: SemanticOp


class AttentionBackend(ABC):
    """One way to serve attention. A subclass is registered with `register_attention_backend`; a plugin may do so too."""

    name: str

    def unsupported(self, layer: AttentionLayer, target: Target) -> list[str]:
        """The reasons against serving this layer; empty when there are none."""
        return []

    def cache_spec(self, layer: AttentionLayer) -> PagedKV:
        """What the layer must remember, and how it is laid out."""
        shape = (layer.num_kv_heads, layer.head_dim_k, layer.head_dim_v, layer.dtype)
        if layer.window or layer.chunk:
            return SlidingWindowKV(*shape, window=min(filter(None, (layer.window, layer.chunk))))
        return LatentKV(*shape) if layer.is_latent else PagedKV(*shape)

    @abstractmethod
    def lower(self, layer: AttentionLayer) -> LoweredAttention:
        """The ops that write and read the cache."""

    def plan(self, batch: BatchMetadata) -> None:  # noqa: B027, most have nothing to plan
        """Host work before each forward pass (or replay), from the step's arrays."""


class PagedBackend(AttentionBackend):
    """The paged ops of this package; it serves every layer."""

    name = "paged"

    def lower(self, layer: AttentionLayer) -> LoweredAttention:
        return LoweredAttention(kv_append, paged_attention)


ATTENTION_BACKENDS: list[AttentionBackend] = [PagedBackend()]
"""Preferred ones first; the last one serves every layer."""


def register_attention_backend(backend: AttentionBackend) -> None:
    """Prefer `backend` to those registered before. Registering its name again replaces the earlier one."""
    ATTENTION_BACKENDS[:] = [backend, *(other for other in ATTENTION_BACKENDS if other.name != backend.name)]


def choose_backend(layer: AttentionLayer, target: Target) -> tuple[AttentionBackend, dict[str, tuple[str, ...]]]:
    """The first backend with nothing against the layer, and the reasons against those before it."""
    against: dict[str, tuple[str, ...]] = {}
    for backend in ATTENTION_BACKENDS:
        if not (reasons := backend.unsupported(layer, target)):
            return backend, against
        against[backend.name] = tuple(reasons)
    raise AssertionError("the paged backend serves every layer")


def backend_named(name: str) -> AttentionBackend:
    return next(backend for backend in ATTENTION_BACKENDS if backend.name == name)

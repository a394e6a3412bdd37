"""Semantic ops of the graph, each with its reference and its providers."""

from autodeploy.custom_ops import (  # noqa: F401, isort: skip, they register their providers; those named first come last
    flashinfer_attention,
    triton_attention,
    triton_moe,
    triton_pointwise,
    triton_quantized,
    triton_quantized_moe,
    triton_recurrent,
)
from autodeploy.custom_ops import cpp_attention, cpp_linear, cpp_pointwise, cpp_quantized  # noqa: F401, they register their providers
from autodeploy.custom_ops.attention import attention, kv_append, paged_attention, rope_append
from autodeploy.custom_ops.attention_backend import AttentionBackend, LoweredAttention, register_attention_backend
from autodeploy.custom_ops.collectives import (
    COLLECTIVES,
    all_gather,
    all_reduce,
    local_index,
    sharded_embedding,
    sharded_rms_norm,
)
from autodeploy.custom_ops.conv import causal_conv1d, token_shift
from autodeploy.custom_ops.delta_rule import gated_delta_rule
from autodeploy.custom_ops.linear import embedding_op, linear_op
from autodeploy.custom_ops.linear_attention import wkv
from autodeploy.custom_ops.moe import expert_linear, moe
from autodeploy.custom_ops.op import PROVIDED, SEMANTIC_OPS, Provider, SemanticOp, provider_at_work, semantic_op, symbolic
from autodeploy.custom_ops.pointwise import add_rms_norm, gated_activation, layer_norm, rms_norm, rope
from autodeploy.custom_ops.scan import linear_scan, selective_scan, ssd
from autodeploy.custom_ops.stages import receive, send

__all__ = [
    "COLLECTIVES",
    "PROVIDED",
    "SEMANTIC_OPS",
    "AttentionBackend",
    "LoweredAttention",
    "Provider",
    "SemanticOp",
    "add_rms_norm",
    "all_gather",
    "all_reduce",
    "attention",
    "causal_conv1d",
    "embedding_op",
    "expert_linear",
    "gated_activation",
    "gated_delta_rule",
    "kv_append",
    "layer_norm",
    "linear_op",
    "linear_scan",
    "local_index",
    "moe",
    "paged_attention",
    "provider_at_work",
    "receive",
    "register_attention_backend",
    "rms_norm",
    "rope",
    "rope_append",
    "selective_scan",
    "semantic_op",
    "send",
    "sharded_embedding",
    "sharded_rms_norm",
    "ssd",
    "symbolic",
    "token_shift",
    "wkv",
]

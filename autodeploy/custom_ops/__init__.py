"""Semantic ops of the graph, each with its reference and its providers."""

from autodeploy.custom_ops.attention import attention, kv_append, paged_attention
from autodeploy.custom_ops.op import PROVIDED, SEMANTIC_OPS, Provider, SemanticOp, semantic_op, symbolic
from autodeploy.custom_ops.pointwise import gated_activation, layer_norm, rms_norm, rope

__all__ = [
    "PROVIDED",
    "SEMANTIC_OPS",
    "Provider",
    "SemanticOp",
    "attention",
    "gated_activation",
    "kv_append",
    "layer_norm",
    "paged_attention",
    "rms_norm",
    "rope",
    "semantic_op",
    "symbolic",
]

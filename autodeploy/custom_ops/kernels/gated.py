"""Gated activations."""

import triton
import triton.language as tl

from autodeploy.custom_ops.gpu import Variant


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """One of `pointwise.ACTIVATIONS`, of float32."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "sigmoid")
        return tl.sigmoid(x)


@triton.jit
def gated_activation(gate, up, out, width, gate_stride, up_stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """out [rows, width] = activation(gate) * up, whose rows are that far apart."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    g = tl.load(gate + row * gate_stride + column, mask, 0.0)
    u = tl.load(up + row * up_stride + column, mask, 0.0)
    value = activated(g.to(tl.float32), ACTIVATION).to(g.dtype).to(tl.float32) * u.to(tl.float32)
    tl.store(out + row * width + column, value.to(g.dtype), mask)


_TYPES = {"gate": "*bf16", "up": "*bf16", "out": "*bf16"}
VARIANTS = [
    Variant(gated_activation, f"bf16, {name}", _TYPES, {"ACTIVATION": name, "BLOCK": 1024}, max_registers=64)
    for name in ("silu", "gelu", "gelu_tanh")
]

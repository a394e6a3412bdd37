"""Linear layers and embedding tables: aten's ops, and a provider whose weights are laid out for oneDNN once, while loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.op import Provider, adopted_op
from autodeploy.formats import Format

PACKED_DTYPES = (torch.bfloat16, torch.float32)
ONCE = "sums in float32, rounded once"
"""The rounding of torch's linear layers."""
MIN_WEIGHT = 1 << 16
"""Numbers of the smallest weight worth packing: below, a call costs its dispatch and nothing else."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N]."""
    return F.linear(x, weight, bias)


def embedding(weight: Tensor, indices: Tensor, *_: object) -> Tensor:
    """weight [N, K], indices [...] -> [..., K]; what else aten.embedding is given matters to gradients alone."""
    return F.embedding(indices, weight)


def packed_linear(x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
    """As `linear`, of a weight as `pack_onednn` has made it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def pack_onednn(weight: Tensor, call: Mapping[str, Any] | None = None) -> Any:
    """The weight [N, K] in oneDNN's own layout: opaque, with no storage to look at."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)


def onednn_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 on this CPU: it asks for AVX-512 or, of those with AVX2, for the newest."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def against_packing(target: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> list[str]:
    """The reasons against laying out a weight for oneDNN."""
    checks = {
        f"it runs on CPUs, not on {target.device}": target.device != "cpu",
        "this torch has no oneDNN": not torch.backends.mkldnn.is_available(),
        f"it has no {str(weight.dtype).removeprefix('torch.')}": weight.dtype not in PACKED_DTYPES or input.dtype != weight.dtype,
        "it has no bfloat16 on this CPU": weight.dtype == torch.bfloat16 and not onednn_multiplies_bfloat16(),
        "the bias has another dtype": bias is not None and bias.dtype != weight.dtype,
        "the weight is too small to gain by it": weight.numel() < MIN_WEIGHT,
    }
    return [reason for reason, holds in checks.items() if holds]


def against_bytes(form: Format, *, rounds: bool) -> list[str]:
    """The reasons against a format for kernels of bytes; rounds: they round what they are multiplied with to bytes too."""
    checks = {
        f"the weights are {form.name}": not form.is_integers or form.bits != 8,
        "their scales belong to groups of columns": form.block[1] > 0,
        "they have zero points": "zeros" in form.parts,
        "activations may not be rounded": rounds and form.activations != 8,
    }
    return [reason for reason, holds in checks.items() if holds]


linear_op = adopted_op(torch.ops.aten.linear.default, linear, ONCE)
embedding_op = adopted_op(torch.ops.aten.embedding.default, embedding)
linear_op.register(Provider("onednn", packed_linear, against_packing, {"weight": pack_onednn}, rounding=ONCE))

"""Mixture of experts: one op per layer, from the router's choice to the weighted sum of the chosen experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.custom_ops.linear import against_packing, pack_onednn, packed_linear
from autodeploy.custom_ops.op import Provider, semantic_op
from autodeploy.custom_ops.pointwise import ACTIVATIONS

EXPERT_ACTIVATIONS = {
    **ACTIVATIONS,
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}
"""What `activation` may be, beside "swish", which is x * sigmoid(alpha * x)."""


Expert = Callable[[Tensor, Tensor | None], Tensor]
"""A packed expert's matrix: (rows [S, K], bias [N] or None) -> [S, N]."""


def gate_experts(
    gate_up: Tensor, layout: str, activation: str, alpha: float = 1.0, limit: float = 0.0, offset: float = 0.0
) -> Tensor:
    """activation(gate) * (up + offset), with gate <= limit and -limit <= up <= limit where there is a limit (0: none).

    gate_up [..., 2 * I] -> [..., I]. layout: "halves" (gate, then up), "pairs" (gate and up of each column side by side), or
    "plain": no gate, activation(x) [..., I]. alpha is used by "swish" alone.
    """
    if layout == "plain":
        return _activate(gate_up, activation, alpha)
    gate, up = gate_up.chunk(2, dim=-1) if layout == "halves" else (gate_up[..., ::2], gate_up[..., 1::2])
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return _activate(gate, activation, alpha) * (up + offset if offset else up)


def _activate(x: Tensor, activation: str, alpha: float) -> Tensor:
    return x * torch.sigmoid(alpha * x) if activation == "swish" else EXPERT_ACTIVATIONS[activation](x)


def _moe_fake(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


@semantic_op(fake=_moe_fake)
def moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
) -> Tensor:
    """Sum over each token's k experts of weight * down(gated(gate_up(x))); each token by itself.

    x [T, C], expert_index [T, k], expert_weights [T, k], gate_up [E, 2 * I, C] ([E, I, C] in the plain layout), down [E, C, I]
    -> [T, C]; transposed: gate_up [E, C, 2 * I], down [E, I, C]. Biases [E, 2 * I] and [E, C]. An index that no expert has adds
    nothing. The sum is in float32 or better. Layout, activation, alpha, limit and offset: see `gate_experts`.
    """

    def gated(expert: int, rows: Tensor) -> Tensor:
        hidden = _linear(rows, gate_up, gate_up_bias, expert, transposed)
        return _linear(gate_experts(hidden, layout, activation, alpha, limit, offset), down, down_bias, expert, transposed)

    return _sum_experts(x, expert_index, expert_weights, down.shape[0], gated)


def _sum_experts(
    x: Tensor, expert_index: Tensor, expert_weights: Tensor, num_experts: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts of weight * run(expert, token's row); only experts that were chosen run."""
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    weights = expert_weights.flatten().to(out.dtype)
    for expert, picked in by_expert(expert_index.flatten(), num_experts):
        tokens = picked // expert_index.shape[1]
        out.index_add_(0, tokens, run(expert, x[tokens]) * weights[picked, None])
    return out.to(x.dtype)


def packed_moe(
    x: Tensor,
    expert_index: Tensor,
    expert_weights: Tensor,
    gate_up: list[Expert],
    down: list[Expert],
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    transposed: bool,
    layout: str,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
) -> Tensor:
    """As `moe`, of experts that are packed each by itself."""

    def gated(expert: int, rows: Tensor) -> Tensor:
        hidden = gate_up[expert](rows, None if gate_up_bias is None else gate_up_bias[expert])
        hidden = gate_experts(hidden, layout, activation, alpha, limit, offset)
        return down[expert](hidden.contiguous(), None if down_bias is None else down_bias[expert])

    return _sum_experts(x, expert_index, expert_weights, len(down), gated)


def expert_matrices(weights: Tensor, call: Mapping[str, Any]) -> Iterator[Tensor]:
    """Each expert's [outputs, inputs], of the weights as the call stores them."""
    return (weight.T if call["transposed"] else weight for weight in weights)


def pack_experts(weights: Tensor, call: Mapping[str, Any]) -> list[Expert]:
    """Each expert's matrix in oneDNN's own layout."""
    return [partial(_packed_expert, pack_onednn(matrix)) for matrix in expert_matrices(weights, call)]


def _packed_expert(packed: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return packed_linear(x, packed, bias)


def _against_packing(target: Any, x: Tensor, gate_up: Tensor, **_: Any) -> list[str]:
    return against_packing(target, x, gate_up, None)


def _draw_choice(call: dict[str, Any]) -> dict[str, Any]:
    """Experts that are chosen alike often."""
    index = call["expert_index"]
    return {"expert_index": torch.randint_like(index, 0, len(call["down"]))}


moe.draw = _draw_choice
moe.register(Provider("onednn", packed_moe, _against_packing, {"gate_up": pack_experts, "down": pack_experts}))


def _expert_linear_fake(x: Tensor, expert_index: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@semantic_op(fake=_expert_linear_fake)
def expert_linear(x: Tensor, expert_index: Tensor, weight: Tensor) -> Tensor:
    """Each row through the matrix of its own expert: x [R, C], expert_index [R], weight [E, O, C] -> [R, O]."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in by_expert(expert_index, weight.shape[0]):
        out[rows] = F.linear(x[rows], weight[expert])
    return out


def by_expert(chosen: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """(expert, places in `chosen` [S] that name it), for those that are named."""
    order = torch.argsort(chosen, stable=True)
    counts = torch.bincount(chosen, minlength=num_experts).tolist()[:num_experts]
    for expert, places in enumerate(order[: sum(counts)].split(counts)):
        if len(places):
            yield expert, places


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, transposed: bool) -> Tensor:
    chosen = weight[expert].T if transposed else weight[expert]
    return F.linear(x, chosen, None if bias is None else bias[expert])

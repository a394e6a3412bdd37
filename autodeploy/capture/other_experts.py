"""Experts outside transformers' registry: a traceable equal of each method that groups tokens by expert.

Stock code loops over the experts that were hit, or over all of them; neither has a fixed shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy import custom_ops as ops
from autodeploy.capture.experts import Gate, find_gate, numbers_of, refuse_gate


@dataclass(frozen=True)
class Equal:
    """`function(module, gate, ...)` in the place of a method; gate: the last arguments of `ops.moe`.

    activation: the module's attribute with the activation of gate * up, or "" where there is none.
    """

    owner: str
    method: str
    function: Callable[..., Any]
    activation: str = ""


def replace_methods(*equals: Equal) -> Callable[[nn.Module, Any], None]:
    """A patch that gives every module of a named class another method of that name."""

    def apply(model: nn.Module, state: Any) -> None:
        for module in model.modules():
            for equal in equals:
                if type(module).__name__ == equal.owner:
                    setattr(module, equal.method, partial(equal.function, module, _gate(module, equal.activation)))

    return apply


def _gate(module: Any, activation: str) -> tuple[Any, ...]:
    if not activation:
        return ()
    function = attrgetter(activation)(module)
    found = find_gate(function, numbers_of(module, function), gated=False) or refuse_gate(module, activation)
    return astuple(Gate("halves", found.activation, found.alpha))


def _input_weighted(self: Any, gate: tuple[Any, ...], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Llama 4: the router's score multiplies what the expert reads, not what it gives. hidden [..., C] -> [T, C], logits."""
    hidden = hidden.reshape(-1, self.hidden_dim)
    scores, logits = self.router(hidden)
    index = logits.topk(self.top_k, dim=1).indices
    rows = (hidden[:, None] * scores.gather(1, index)[..., None]).reshape(-1, self.hidden_dim)
    experts, chosen = self.experts, index.reshape(-1, 1)
    weights = (experts.gate_up_proj, experts.down_proj, None, None, True, *gate)
    routed = ops.moe(rows, chosen, torch.ones_like(chosen, dtype=hidden.dtype), *weights)
    return self.shared_expert(hidden) + routed.reshape(-1, self.top_k, self.hidden_dim).sum(1), logits


def _flat_weights(self: Any, gate: tuple[Any, ...], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """DBRX: three matrices [E * I, C], the last one applied transposed. hidden [1, T, C] -> [1, T, C]."""
    shape = (self.num_experts, self.ffn_hidden_size, self.hidden_size)
    gate_up = torch.cat([self.mlp.w1.view(shape), self.mlp.v1.view(shape)], dim=1)
    down = self.mlp.w2.view(shape).transpose(1, 2)
    rows = hidden.reshape(-1, self.hidden_size)
    return ops.moe(rows, top_k_index, top_k_weights, gate_up, down, None, None, False, *gate).view(hidden.shape)


def _identity_experts(self: Any, gate: tuple[Any, ...], hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """LongCat: the last experts return what they read. hidden [T, C] -> [T, C]."""
    kept = top_k_weights.masked_fill(top_k_index < self.num_routed_experts, 0).sum(-1, keepdim=True)
    weights = (self.gate_up_proj, self.down_proj, None, None, False, *gate)
    return ops.moe(hidden, top_k_index, top_k_weights, *weights) + (hidden * kept).to(hidden.dtype)


def _choose(router: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """JetMoE's router without its sorting: logits [T, E], index and weights [T, k]."""
    logits = router.layer(rows).float()
    values, index = logits.topk(router.top_k, dim=1)
    return logits, index, torch.softmax(values, dim=1).type_as(rows)


def _jet_experts(self: Any, gate: tuple[Any, ...], hidden: Tensor) -> Tensor:
    """hidden [1, T, C] -> [1, T, C]."""
    rows = hidden.reshape(-1, self.input_size)
    _, index, weights = _choose(self.router, rows)
    matrices = (self.input_linear.weight, self.output_linear.weight, None, None, False, *gate)
    return ops.moe(rows, index, weights, *matrices).view(hidden.shape) + self.bias


def _jet_queries(self: Any, gate: tuple[Any, ...], hidden: Tensor) -> tuple[Tensor, Tensor, Any]:
    """Queries of the k chosen experts of each token: hidden [1, T, C] -> [1, T, k, D], logits, the choice."""
    rows = hidden.reshape(-1, self.input_size)
    logits, index, weights = _choose(self.router, rows)
    repeated = rows[:, None].expand(-1, self.top_k, -1).reshape(-1, self.input_size)
    queries = ops.expert_linear(repeated, index.reshape(-1), self.input_linear.weight)
    return queries.view(*hidden.shape[:2], self.top_k, -1), logits, (index, weights)


def _jet_outputs(self: Any, gate: tuple[Any, ...], attended: Tensor, choice: tuple[Tensor, Tensor]) -> Tensor:
    """attended [1, T, k, D] through the output projections of the same experts -> [1, T, C]."""
    index, weights = choice
    rows = ops.expert_linear(attended.reshape(-1, self.hidden_size), index.reshape(-1), self.output_linear.weight)
    weighted = rows.view(*index.shape, self.input_size) * weights[..., None]
    return weighted.sum(1).view(*attended.shape[:2], self.input_size) + self.bias


INPUT_WEIGHTED = (Equal("Llama4TextMoe", "forward", _input_weighted, "experts.act_fn"),)
FLAT_WEIGHTS = (Equal("DbrxExperts", "forward", _flat_weights, "mlp.activation_fn"),)
IDENTITY_EXPERTS = (Equal("LongcatFlashExperts", "forward", _identity_experts, "act_fn"),)
ATTENTION_EXPERTS = (
    Equal("JetMoeMoE", "forward", _jet_experts, "activation"),
    Equal("JetMoeMoA", "map", _jet_queries),
    Equal("JetMoeMoA", "reduce", _jet_outputs),
)

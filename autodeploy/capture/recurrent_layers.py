"""Recurrent layers with code of their own, found by what they hold: lightning attention by its buffers, RWKV by its flag."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy import custom_ops as ops


def scan_lightning(model: nn.Module, state: Any) -> None:
    """Lightning attention is found by the buffers it computes its blocks with."""
    for module in model.modules():
        if {"slope_rate", "query_decay", "key_decay", "diagonal_decay"} <= module._buffers.keys():
            module.forward = MethodType(_lightning_attention, module)


def _lightning_attention(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Linear attention with one fixed decay per head: hidden_states [N, T, C] -> [N, T, C]."""
    shape = (*hidden_states.shape[:2], self.num_attention_heads, 3 * self.head_dim)
    q, k, v = self.act_fn(self.qkv_proj(hidden_states)).reshape(shape).split(self.head_dim, dim=3)
    y = ops.ssd(v, v.new_ones(shape[:3]), -self.slope_rate[:, 0, 0], k, q).to(v.dtype)
    return self.out_proj(torch.sigmoid(self.output_gate(hidden_states)) * self.norm(y.flatten(2))), None


def scale_outputs(model: nn.Module, state: Any) -> None:
    """RWKV divides weights by powers of two when it first runs, in place; dividing what they give is the same."""
    for module in _unscaled(model):
        for i, block in enumerate(module.blocks):
            if (by := 2 ** (i // module.config.rescale_every)) > 1:
                for linear in (block.attention.output, block.feed_forward.value):
                    linear.register_forward_hook(lambda _, __, y, by=by: y / by)
        module.layers_are_rescaled = True


def weights_still_to_scale(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a live model's weights that it will change when it first runs."""
    blocks = [block for module in _unscaled(model) for block in module.blocks]
    wanted = {id(linear.weight) for block in blocks for linear in (block.attention.output, block.feed_forward.value)}
    return {name: weight.detach().clone() for name, weight in model.named_parameters() if id(weight) in wanted}


def _unscaled(model: nn.Module) -> list[Any]:
    found: list[Any] = [module for module in model.modules() if getattr(module, "layers_are_rescaled", None) is False]
    return [module for module in found if module.config.rescale_every > 0]

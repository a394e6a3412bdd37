"""A small twin of a large model: the same kinds of layers, few and narrow, so that its passes can be verified in float64."""

from __future__ import annotations

import copy
from typing import Any

import torch

from autodeploy.capture.export import Captured, capture
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.errors import AutoDeployError, ConfigError

VOCAB, HEAD_DIM, WIDTH, HEADS = 256, 16, 128, 8


def capture_twin(config: Any, dtype: torch.dtype, max_bytes: int) -> Captured:
    """Capture the smallest twin that can be built and whose float64 weights fit `max_bytes`. Raises ConfigError."""
    reasons = []
    for shrink in (_cut_and_narrow, _cut):
        for periods in (1, 2, 4):
            try:
                small = shrink(copy.deepcopy(config), periods)
                skeleton: Any = build_skeleton(small, dtype)
                if (num_bytes := 8 * sum(p.numel() for p in skeleton.parameters())) > max_bytes:
                    reasons.append(f"{num_bytes / 2**30:.1f} GiB of float64 weights")
                    continue
                return capture(skeleton, dict(skeleton.named_buffers()))
            except (AutoDeployError, ValueError, RuntimeError, IndexError, KeyError, TypeError, AttributeError) as error:
                reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ConfigError(f"no small twin of this model could be made ({reasons[0]}); use verify='structure'")


def _cut(config: Any, periods: int) -> Any:
    """A few periods of the layer pattern, and a small vocabulary."""
    total = config.num_hidden_layers
    kept = min(total, periods * _period(getattr(config, "layer_types", None) or [None]))
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total:
            setattr(config, name, value[:kept])
        elif isinstance(value, int) and "vocab" in name:
            setattr(config, name, min(value, VOCAB))
        elif name.endswith("token_id") and value is not None:
            setattr(config, name, 0)
    config.num_hidden_layers = kept
    return config


def _period(kinds: list[Any]) -> int:
    """Smallest p with which the list of layer kinds repeats."""
    return next(p for p in range(1, len(kinds) + 1) if all(kind == kinds[i % p] for i, kind in enumerate(kinds)))


def _cut_and_narrow(config: Any, periods: int) -> Any:
    """Fewer heads in the same proportion, small heads and narrow layers as well."""
    _cut(config, periods)
    heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = max(heads // kv_heads, 1)
    config.num_attention_heads = min(heads, max(HEADS // group, 1) * group)
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = config.num_attention_heads // group
    if getattr(config, "head_dim", None):
        config.head_dim = HEAD_DIM
    config.hidden_size = config.num_attention_heads * HEAD_DIM
    if hasattr(config, "intermediate_size"):
        width = config.intermediate_size
        config.intermediate_size = [WIDTH] * len(width) if isinstance(width, list) else WIDTH
    return config

"""A small twin of a large model: the same kinds of layers, few and narrow, so that its passes can be verified in float64."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from autodeploy.capture.export import Captured, capture
from autodeploy.capture.shrink import LADDER, shrink
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.errors import AutoDeployError, ConfigError

REFUSALS = (
    AutoDeployError,
    StrictDataclassError,
    ArithmeticError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
)
"""What a constructor or an export raises when sizes do not fit."""
SIZES = [dataclasses.replace(sizes, layers=1) for sizes in LADDER if not sizes.fill]
"""What to try, smallest first."""


def capture_twin(config: Any, dtype: torch.dtype, max_bytes: int) -> Captured:
    """Capture the smallest twin that can be built and whose float64 weights fit `max_bytes`. Raises ConfigError."""
    reasons = []
    for sizes in SIZES:
        try:
            skeleton: Any = build_skeleton(shrink(config, sizes), dtype)
            if (num_bytes := 8 * sum(p.numel() for p in skeleton.parameters())) > max_bytes:
                reasons.append(f"{num_bytes / 2**30:.1f} GiB of float64 weights")
                continue
            return capture(skeleton, dict(skeleton.named_buffers()))
        except REFUSALS as error:
            reasons.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
    raise ConfigError(f"no small twin of this model could be made ({reasons[0]}); use verify='structure'")

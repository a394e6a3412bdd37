"""Skeletons: models without weights, built from a folder's config or copied from a model in memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from autodeploy.checkpoint import raw_config
from autodeploy.errors import CheckpointError, UnsupportedModelError, did_you_mean


def skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of a live model whose parameters and buffers are meta tensors; the model itself is not touched."""
    tensors = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()}
    tensors |= {id(b): b.to("meta") for b in model.buffers()}
    return copy.deepcopy(model, dict(tensors)).eval()


def read_config(folder: Path) -> PreTrainedConfig:
    """The folder's config, of a class in transformers. Remote code is never run."""
    raw = raw_config(folder)
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        remote = " Its auto_map asks for code of its own, which is never run." if "auto_map" in raw else ""
        near = did_you_mean(str(model_type), CONFIG_MAPPING.keys())
        raise UnsupportedModelError(
            f"{folder}: model_type '{model_type}' is not in transformers.{remote}{near} "
            "Use a version of transformers that has it, or a conversion of the model to one it has."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(config).pop("quantization_config", None)  # how weights are stored is not for the model's code to know
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder}: transformers refuses config.json ({reason}). Correct it, or download it again."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"{folder}: transformers has no causal language model for model_type '{model_type}'. Use a decoder-only model."
        )
    return config


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a config with parameters on meta and real buffers."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    model.tie_weights()
    cast_floats(model, dtype)
    return model.eval()


def cast_floats(model: Any, dtype: torch.dtype) -> None:
    """Floating parameters to dtype, as `from_pretrained(dtype=...)` does; those the model keeps in float32 stay."""
    strict, loose = (getattr(model, f"_keep_in_fp32_modules{suffix}", None) or () for suffix in ("_strict", ""))
    kept = set(strict if dtype in (torch.float16, torch.bfloat16) else ()) | set(loose if dtype is torch.float16 else ())
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)

"""A small model of every model type, built from its config class's own defaults."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autodeploy.capture.shrink import LADDER, shrink
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.coverage.hints import HINTS
from autodeploy.errors import ConfigError, did_you_mean

MOST_PARAMETERS = 30_000_000
PROBE = 41
"""Tokens of the row that tells whether eager is causal."""


class NotDecoderOnlyError(Exception):
    """Not a model that this project is about; the message says why."""


class NoSmallModelError(Exception):
    """No rule makes a model that eager can run."""


def model_types() -> list[str]:
    """Every entry of transformers' mapping for causal language models."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def chosen_types(families: str | None) -> list[str]:
    """All model types, or those of a comma-separated list. Raises ConfigError for one that is not in the mapping."""
    known = model_types()
    chosen = [name.strip() for name in families.split(",")] if families else known
    for name in chosen:
        if name not in known:
            raise ConfigError(f"'{name}' is not a causal language model of transformers.{did_you_mean(name, known)}")
    return chosen


def small_model(model_type: str, hints: dict[str, Any] | None = None) -> Any:
    """A small decoder-only model, eager, float32, every weight perturbed. Raises NotDecoderOnlyError or NoSmallModelError.

    hints: None for those of `HINTS`.
    """
    hints = HINTS.get(model_type, {}) if hints is None else hints
    if getattr(CONFIG_MAPPING[model_type], "is_encoder_decoder", False):
        raise NotDecoderOnlyError("it has an encoder")
    model = _first_that_runs(model_type, hints)
    refuse_unless_causal(model)
    return model


def _first_that_runs(model_type: str, hints: dict[str, Any]) -> Any:
    reasons: list[tuple[bool, str]] = []
    for sizes in LADDER:
        is_built = False
        try:
            config = shrink(CONFIG_MAPPING[model_type](), sizes, hints)
            if config.is_encoder_decoder:
                raise NotDecoderOnlyError("it has an encoder")
            model = perturbed(build(config))
            is_built = True
            logits_of(model, torch.full((1, PROBE), 5))
            return model
        except NotDecoderOnlyError:
            raise
        except ImportError as error:
            raise NotDecoderOnlyError(f"not built here: {_line(error)}") from error
        except Exception as error:  # whatever a constructor or a forward raises: the next sizes may do
            reasons.append((is_built, _line(error)))
    if all(is_built for is_built, _ in reasons):
        raise NotDecoderOnlyError(f"eager does not run on token ids alone: {reasons[0][1]}")
    if not _defaults_build(model_type):
        raise NotDecoderOnlyError(f"its class's defaults build no model: {reasons[0][1]}")
    raise NoSmallModelError(reasons[0][1])


def _line(error: Exception) -> str:
    """The error as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]


def _defaults_build(model_type: str) -> bool:
    try:
        build_skeleton(CONFIG_MAPPING[model_type](), torch.float32)
    except Exception:  # as above: a constructor may raise anything
        return False
    return True


def build(config: Any, seed: int = 0) -> Any:
    """The model of a small config. Raises ValueError when it is not small."""
    num_parameters = sum(p.numel() for p in build_skeleton(config, torch.float32).parameters())
    if num_parameters > MOST_PARAMETERS:
        raise ValueError(f"{num_parameters} parameters are not small")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval().float()


def perturbed(model: nn.Module, seed: int = 1) -> nn.Module:
    """Move every weight off its initial value, norms, biases and sinks too, so that a lost one shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[1, tokens, V]."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def refuse_unless_causal(model: Any) -> None:
    """Changing the last token may not change the logits before it."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 250, (1, PROBE), generator=generator)
    other = ids.clone()
    other[0, -1] = 3 + (ids[0, -1] - 2) % 247
    before, after = (logits_of(model, row)[:, :-1] for row in (ids, other))
    if not bool(torch.isfinite(before).all()):
        raise NoSmallModelError("eager's logits are not finite")
    change = float((after - before).abs().max() / before.abs().max())
    if change > 1e-5:
        raise NotDecoderOnlyError(f"eager is not causal: a later token changes earlier logits by {change:.0e}")

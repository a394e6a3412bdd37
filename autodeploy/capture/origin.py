"""Where a model comes from, memory or a folder: its skeleton, and how its tensors reach the names of the skeleton."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from autodeploy.capture.checkpoint import checkpoint_dtype, checkpoint_recipes
from autodeploy.capture.expected_formats import expected_recipes
from autodeploy.capture.quantized import dense_view, quantization_settings
from autodeploy.capture.recurrent_layers import weights_still_to_scale
from autodeploy.capture.skeleton import build_skeleton, cast_floats, read_config, skeleton_of
from autodeploy.checkpoint import CheckpointSource, raw_config, read_json
from autodeploy.formats import Format
from autodeploy.recipes import Cast, Recipe, Take, format_of, substitute
from autodeploy.specs import ModelFacts
from autodeploy.weights import LiveSource


@dataclass(frozen=True)
class Origin:
    """A model before capture."""

    config: Any
    skeleton: Any
    recipes: Mapping[str, Recipe]
    """Tensor of the skeleton, by name -> recipe over the source."""
    buffers: Mapping[str, Tensor]
    source: LiveSource | CheckpointSource
    facts: ModelFacts
    remarks: Mapping[str, str] = field(default_factory=dict)
    """Of its stored tensors; see `Program.remarks`."""

    @property
    def formats(self) -> dict[str, Format]:
        """Of the tensors of the skeleton that are not stored dense."""
        found = dict[str, Format]()
        for name, recipe in self.recipes.items():
            if (stored := format_of(recipe, {})) is not None:
                found[name] = stored
            elif (stored := format_of(recipe, {}, is_turned=True)) is not None:
                found[name] = replace(stored, turned=True)
        return found

    def source_with(self, initial: Mapping[str, Tensor]) -> LiveSource | CheckpointSource:
        """The source, knowing the values of a captured program's initial buffers too."""
        self.source.initial = initial
        return self.source


def origin_of(model: Any, dtype: str, ignore_unexpected: bool) -> Origin:
    """model: a transformers model in memory, or a folder. dtype: a name, or auto for the model's own."""
    return _in_memory(model, dtype) if isinstance(model, nn.Module) else _in_folder(Path(model), dtype, ignore_unexpected)


def origin_of_config(folder: Path, dtype: str) -> Origin:
    """From config.json alone: a model whose weights are known by its own names, and cannot be loaded."""
    config = read_config(folder)
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    skeleton: Any = build_skeleton(config, stored if dtype == "auto" else getattr(torch, dtype))
    recipes: dict[str, Recipe] = {name: Take(name) for name in skeleton.state_dict()}
    if (settings := quantization_settings(raw_config(folder), folder)) is not None:
        recipes |= expected_recipes(settings, skeleton)
    facts = ModelFacts.of(config, _generation_config(folder))
    return Origin(config, skeleton, recipes, dict(skeleton.named_buffers()), LiveSource({}), facts)


def _in_memory(model: Any, dtype: str) -> Origin:
    skeleton: Any = skeleton_of(model)
    stored = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    if dtype != "auto":
        cast_floats(skeleton, getattr(torch, dtype))
    recipes = {name: _cast(Take(name), stored[name], tensor.dtype) for name, tensor in skeleton.state_dict().items()}
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tensors |= weights_still_to_scale(model)
    facts = ModelFacts.of(model.config, getattr(model, "generation_config", None))
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}  # they are computed with, on the CPU, while matching
    return Origin(model.config, skeleton, recipes, buffers, LiveSource(tensors), facts)


def _in_folder(folder: Path, dtype: str, ignore_unexpected: bool) -> Origin:
    config, source = read_config(folder), CheckpointSource(folder)
    view = dense_view(raw_config(folder), source)
    skeleton: Any = build_skeleton(config, checkpoint_dtype(config, view) if dtype == "auto" else getattr(torch, dtype))
    wanted = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
    found = checkpoint_recipes(skeleton, view, ignore_unexpected)
    stored = {name: view.describe(recipe.name).dtype if isinstance(recipe, Take) else None for name, recipe in found.items()}
    recipes = {name: _cast(substitute(recipe, view.recipes), stored[name], wanted[name]) for name, recipe in found.items()}
    facts = ModelFacts.of(config, _generation_config(folder))
    return Origin(config, skeleton, recipes, dict(skeleton.named_buffers()), source, facts, view.remarks)


def _cast(recipe: Recipe, stored: torch.dtype | None, wanted: torch.dtype) -> Recipe:
    return recipe if stored == wanted else Cast(recipe, wanted)


def _generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    return GenerationConfig.from_dict(read_json(path)) if path.exists() else None

"""The recipes from the tensors of a checkpoint folder to those of the model."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from autodeploy.capture.conversions import recipes_of
from autodeploy.capture.quantized import DenseView
from autodeploy.checkpoint import some
from autodeploy.errors import CheckpointError, did_you_mean
from autodeploy.recipes import Convert, Recipe, Take, evaluate


def checkpoint_dtype(config: PreTrainedConfig, source: DenseView) -> torch.dtype:
    """What the config says, else what its first floating tensor is stored in that is not quantized."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = (source.describe(name).dtype for name in source.names() if name not in source.recipes)
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def checkpoint_recipes(model: Any, source: DenseView, ignore_unexpected: bool = False) -> dict[str, Recipe]:
    """Model tensor name -> recipe over the checkpoint, with transformers' own renames, conversions and ties.

    Raises CheckpointError for tensors that are missing, unexpected or of the wrong shape.
    """
    expected: dict[str, Tensor] = model.state_dict()
    recipes, unexpected = _renamed(model, source, expected)
    for alias, target in getattr(model, "all_tied_weights_keys", {}).items():
        for name, other in ((alias, target), (target, alias)):
            if name not in recipes and other in recipes and expected[name].shape == expected[other].shape:
                recipes[name] = recipes[other]
    _refuse_unexpected(model, source, unexpected, ignore_unexpected)
    missing = sorted(set(expected) - set(recipes))
    if missing:
        near = did_you_mean(missing[0], unexpected)
        raise CheckpointError(
            f"{source.folder}: tensors {some(missing)} are missing.{near} Check that config.json belongs to these weights."
        )
    _check_shapes(source, recipes, expected)
    return recipes


def _renamed(model: Any, source: DenseView, expected: Mapping[str, Tensor]) -> tuple[dict[str, Recipe], list[str]]:
    """Recipes found by name, and the checkpoint names that lead nowhere."""
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    meta: Any = dict(expected)
    recipes: dict[str, Recipe] = {}
    gathered: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    unexpected: list[str] = []
    for key in sorted(source.names(), key=_natural):
        target, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if target not in expected and key in expected:
            target, pattern = key, None
        if target not in expected:
            unexpected.append(key)
        elif pattern is None:
            recipes[target] = Take(key)
        else:
            gathered[target][pattern].append(key)
    for target, groups in gathered.items():
        converter = by_pattern[next(iter(groups))]
        recipes |= _converted(model, source, target, groups, converter)
    return recipes, unexpected


def _converted(
    model: Any, source: DenseView, target: str, groups: Mapping[str, list[str]], converter: WeightConverter
) -> dict[str, Recipe]:
    """One conversion may make several tensors; what they are called and made of is found by running it on meta tensors."""
    convert = _conversion(model, target, converter)
    stored = {pattern: [source.describe(key) for key in keys] for pattern, keys in groups.items()}
    known = {tensor: Take(key) for pattern, keys in groups.items() for key, tensor in zip(keys, stored[pattern], strict=True)}
    sources = tuple((pattern, tuple(map(Take, keys))) for pattern, keys in groups.items())
    made = recipes_of(lambda: convert(stored), known)
    return {name: recipe or Convert(sources, convert, name) for name, recipe in made.items()}


def _conversion(model: Any, target: str, converter: WeightConverter) -> Callable[[dict[str, list[Tensor]]], dict[str, Tensor]]:
    def convert(tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        once: Any = copy.deepcopy(converter)
        once.collected_tensors = {
            pattern: [lambda tensor=tensor: tensor for tensor in parts] for pattern, parts in tensors.items()
        }
        made = once.convert(target, model=model, config=model.config)
        return {name: parts[0] if isinstance(parts, list) else parts for name, parts in made.items()}

    return convert


def _refuse_unexpected(model: Any, source: DenseView, unexpected: list[str], ignore: bool) -> None:
    known = {
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"\.attn\.(masked_)?bias$",
    }
    strangers = [name for name in unexpected if not any(re.search(pattern, name) for pattern in known)]
    if strangers and not ignore:
        raise CheckpointError(
            f"{source.folder}: tensors {some(strangers)} are not in the model. Check that config.json belongs to these weights, "
            "or pass ignore_unexpected_weights=True to go without them."
        )


def _check_shapes(source: DenseView, recipes: Mapping[str, Recipe], expected: Mapping[str, Tensor]) -> None:
    for name, recipe in recipes.items():
        have, want = list(evaluate(recipe, source.describe_leaf).shape), list(expected[name].shape)
        if have != want:
            stored = f"tensor '{recipe.name}' has" if isinstance(recipe, Take) else f"{recipe} has"
            raise CheckpointError(
                f"{source.folder}: {stored} shape {have}, but the model has {want} for '{name}'. "
                "Check that config.json belongs to these weights."
            )


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10, as transformers does."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

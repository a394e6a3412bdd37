"""The safetensors of a checkpoint folder, and the recipes from their names to the model's tensors."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from autodeploy.capture.skeleton import read_json
from autodeploy.errors import CheckpointError, did_you_mean
from autodeploy.weights import Convert, Initial, Recipe, Take

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class CheckpointSource:
    """The safetensors of a folder, mapped: a tensor's bytes are read when they are first touched. Also answers for `initial`."""

    mapped = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.initial: Mapping[str, Tensor] = {}
        self._files: dict[str, Any] = {}
        self._file_of = self._read_index()

    def _read_index(self) -> dict[str, str]:
        """Tensor name -> file name. Raises CheckpointError for what is missing, unsafe or broken."""
        if (self.folder / INDEX).exists():
            listed: dict[str, str] = read_json(self.folder / INDEX).get("weight_map", {})
            for name in sorted(set(listed.values())):
                self._open(name)
            absent = sorted(key for key, name in listed.items() if key not in self._files[name].keys())  # noqa: SIM118
            if absent:
                raise CheckpointError(
                    f"{self.folder}: {INDEX} lists {_some(absent)}, not in the files it names. Download the folder again."
                )
            return listed
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        unsafe = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if unsafe:
            raise CheckpointError(
                f"{self.folder} holds only pickle weights ({_some(unsafe)}), and loading those can run code. Convert them "
                "once, where you trust them: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(another_folder)."
            )
        raise CheckpointError(f"{self.folder} holds no {SINGLE} and no {INDEX}. Point to a folder written by save_pretrained.")

    def _open(self, name: str) -> Any:
        path = self.folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing, though {INDEX} names it. Download the folder again.")
        try:
            self._files[name] = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is truncated or corrupt ({error}). Download it again.") from error
        return self._files[name]

    def names(self) -> list[str]:
        return list(self._file_of)

    def describe(self, name: str) -> Tensor:
        """A meta tensor with the stored tensor's shape and dtype."""
        stored = self._files[self._file_of[name]].get_slice(name)
        return torch.empty(stored.get_shape(), dtype=_DTYPES.get(stored.get_dtype(), torch.uint8), device="meta")

    def fetch(self, leaf: Recipe) -> Tensor:
        if isinstance(leaf, Initial):
            return self.initial[leaf.name]
        assert isinstance(leaf, Take)
        return self._files[self._file_of[leaf.name]].get_tensor(leaf.name)


_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}


def checkpoint_dtype(config: PreTrainedConfig, source: CheckpointSource) -> torch.dtype:
    """What the config says, else what its first floating tensor is stored in."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    stored = (source.describe(name).dtype for name in source.names())
    return next((dtype for dtype in stored if dtype.is_floating_point), torch.float32)


def checkpoint_recipes(model: Any, source: CheckpointSource, ignore_unexpected: bool = False) -> dict[str, Recipe]:
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
            f"{source.folder}: tensors {_some(missing)} are missing.{near} Check that config.json belongs to these weights."
        )
    _check_shapes(source, recipes, expected)
    return recipes


def _renamed(model: Any, source: CheckpointSource, expected: Mapping[str, Tensor]) -> tuple[dict[str, Recipe], list[str]]:
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
    model: Any, source: CheckpointSource, target: str, groups: Mapping[str, list[str]], converter: WeightConverter
) -> dict[str, Recipe]:
    """One conversion may make several tensors; what they are called is found by running it on meta tensors."""
    sources = tuple((pattern, tuple(Take(key) for key in keys)) for pattern, keys in groups.items())
    convert = _conversion(model, target, converter)
    made = convert({pattern: [source.describe(key) for key in keys] for pattern, keys in groups.items()})
    return {name: Convert(sources, convert, name) for name in made}


def _conversion(model: Any, target: str, converter: WeightConverter) -> Callable[[dict[str, list[Tensor]]], dict[str, Tensor]]:
    def convert(tensors: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        once: Any = copy.deepcopy(converter)
        once.collected_tensors = {
            pattern: [lambda tensor=tensor: tensor for tensor in parts] for pattern, parts in tensors.items()
        }
        made = once.convert(target, model=model, config=model.config)
        return {name: parts[0] if isinstance(parts, list) else parts for name, parts in made.items()}

    return convert


def _refuse_unexpected(model: Any, source: CheckpointSource, unexpected: list[str], ignore: bool) -> None:
    known = {
        *(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        r"rotary_emb\.inv_freq",
        r"\.attn\.(masked_)?bias$",
    }
    strangers = [name for name in unexpected if not any(re.search(pattern, name) for pattern in known)]
    if strangers and not ignore:
        raise CheckpointError(
            f"{source.folder}: tensors {_some(strangers)} are not in the model. Check that config.json belongs to these weights, "
            "or pass ignore_unexpected_weights=True to go without them."
        )


def _check_shapes(source: CheckpointSource, recipes: Mapping[str, Recipe], expected: Mapping[str, Tensor]) -> None:
    for name, recipe in recipes.items():
        if isinstance(recipe, Take) and source.describe(recipe.name).shape != expected[name].shape:
            have, want = list(source.describe(recipe.name).shape), list(expected[name].shape)
            raise CheckpointError(
                f"{source.folder}: tensor '{recipe.name}' has shape {have}, but the model has {want} for '{name}'. "
                "Check that config.json belongs to these weights."
            )


def _natural(name: str) -> list[Any]:
    """Sorts layer 2 before layer 10, as transformers does."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _some(names: list[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

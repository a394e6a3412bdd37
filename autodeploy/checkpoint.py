"""A checkpoint folder as it is read: its JSON files, and its safetensors by name. transformers is not needed for that."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autodeploy.errors import CheckpointError, did_you_mean
from autodeploy.recipes import Initial, Leaf, Part

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


SETTINGS = re.compile(r"\.(weight_shape|quant_state\..*)$")
"""Names of tensors that hold settings of a format, which recipes are made with, not weights."""
MODELOPT_FILE = "hf_quant_config.json"
"""What ModelOpt writes beside config.json."""


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
            held = {name: set(file.keys()) for name, file in self._files.items()}
            absent = sorted(key for key, name in listed.items() if key not in held[name])
            if absent:
                raise CheckpointError(
                    f"{self.folder}: {INDEX} lists {some(absent)}, not in the files it names. Download the folder again."
                )
            return listed
        if (self.folder / SINGLE).exists():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        unsafe = sorted(path.name for pattern in PICKLES for path in self.folder.glob(pattern))
        if unsafe:
            raise CheckpointError(
                f"{self.folder} holds only pickle weights ({some(unsafe)}), and loading those can run code. Convert them "
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

    def kind(self, name: str) -> str:
        """dtype[shape] of a stored tensor, as its file says it."""
        stored = self._files[self._file_of[name]].get_slice(name)
        return f"{stored.get_dtype()}{stored.get_shape()}"

    def where(self, name: str) -> str:
        """The path of the file that holds a tensor; of the folder, where none does."""
        return str(self.folder / self._file_of.get(name, ""))

    def describe(self, name: str) -> Tensor:
        """A meta tensor with the stored tensor's shape and dtype."""
        stored = self._files[self._file_of[name]].get_slice(name)
        return torch.empty(stored.get_shape(), dtype=_DTYPES.get(stored.get_dtype(), torch.uint8), device="meta")

    def describe_leaf(self, leaf: Leaf) -> Tensor:
        stored = self.describe(leaf.name)
        return leaf.of(stored) if isinstance(leaf, Part) else stored

    def fetch(self, leaf: Leaf) -> Tensor:
        if isinstance(leaf, Initial):
            return self.initial[leaf.name]
        tensor = self._files[self._file_of[leaf.name]].get_tensor(leaf.name)
        return leaf.of(tensor) if isinstance(leaf, Part) else tensor


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights, usable or not, or is no folder of a model at all."""
    patterns = (INDEX, "*.safetensors", *PICKLES)
    return not (folder / "config.json").exists() or any(next(folder.glob(pattern), None) for pattern in patterns)


def raw_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json as it stands. Raises CheckpointError where there is none."""
    if not folder.is_dir():
        near = did_you_mean(folder.name, [path.name for path in folder.parent.glob("*/")])
        where = "" if folder.is_absolute() else f" (relative to {Path.cwd()})"
        raise CheckpointError(f"{folder} is not a folder{where}.{near} Give the path of a folder written by save_pretrained.")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} has no config.json. Give the path of a folder written by save_pretrained.")
    return read_json(folder / "config.json")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Download it again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__} in place of an object. Download it again.")
    return value


def some(names: list[str]) -> str:
    """The first three names, quoted, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"

"""A quantized checkpoint as files: the tensors and settings of compressed-tensors, which others read too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from autodeploy.checkpoint import SINGLE, CheckpointSource, raw_config
from autodeploy.formats import Format, Integers
from autodeploy.recipes import Take


def write_folder(
    folder: Path,
    output: Path,
    source: CheckpointSource,
    made: Mapping[str, Integers],
    forms: Mapping[str, Format],
    changed: Mapping[str, Tensor],
) -> None:
    """The checkpoint with the matrices `made`, each in its format; whatever else lies in the folder comes along."""
    tensors = {name: source.fetch(Take(name)).clone() for name in source.names() if name not in made}
    tensors |= {name: tensor.to(tensors[name].dtype) for name, tensor in changed.items() if name in tensors}
    for name, each in made.items():
        prefix, dtype = name.removesuffix(".weight"), source.describe(name).dtype
        scales = each.scales.to(dtype) if torch.equal(each.scales.to(dtype).float(), each.scales) else each.scales
        tensors[f"{prefix}.weight_scale"] = scales.contiguous()
        if forms[name].bits == 4:
            tensors[f"{prefix}.weight_packed"] = _words(each.numbers)
            tensors[f"{prefix}.weight_shape"] = torch.tensor(each.numbers.shape)
        else:
            tensors[name] = each.numbers.contiguous()
    output.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_file() and not path.name.endswith((".safetensors", ".index.json")):
            shutil.copy(path, output)
    save_file(tensors, output / SINGLE, {"format": "pt"})
    kept = [name for name, tensor in tensors.items() if name.endswith(".weight") and tensor.dim() == 2 and name not in made]
    settings = _settings({name: forms[name] for name in made}, kept)
    (output / "config.json").write_text(json.dumps({**raw_config(folder), "quantization_config": settings}, indent=2))


def _words(numbers: Tensor) -> Tensor:
    """Numbers of 4 bits [N, K] -> words of 32 bits [N, K / 8], eight to a word, the first lowest, 8 too much each."""
    eights = (numbers.long() + 8).unflatten(-1, (-1, 8)) << (4 * torch.arange(8))
    words = eights.sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _settings(forms: Mapping[str, Format], kept: list[str]) -> dict[str, Any]:
    """`quantization_config`: a group for each format, that of the most matrices for all that no other names."""
    members: dict[Format, list[str]] = {}
    for name, form in forms.items():
        members.setdefault(form, []).append(name.removesuffix(".weight"))
    most, *others = sorted(members, key=lambda form: -len(members[form]))
    targets = {most: ["Linear"], **{form: sorted(members[form]) for form in others}}
    groups = {f"group_{i}": _group(form, names) for i, (form, names) in enumerate(targets.items())}
    return {
        "quant_method": "compressed-tensors",
        "format": "mixed-precision" if others else groups["group_0"]["format"],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(name.removesuffix(".weight") for name in kept),
    }


def _group(form: Format, targets: list[str]) -> dict[str, Any]:
    weights: dict[str, Any] = {"num_bits": form.bits, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": form.block[1]} if form.bits == 4 else {"strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs if form.bits == form.activations == 8 else None,
        "format": "pack-quantized" if form.bits == 4 else "int-quantized",
    }

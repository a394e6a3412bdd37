"""How matrices of a quantized checkpoint are stored, from its `quantization_config` alone: for plans, which read no weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatch
from typing import Any, TypeVar

import torch
from torch import nn

from autodeploy.errors import UnsupportedModelError, did_you_mean
from autodeploy.formats import SCHEMES, Format
from autodeploy.recipes import TURNED, Cast, Dequantize, Permute, Recipe, Take

LEFT_OUT = ("modules_to_not_convert", "ignore", "exclude_modules", "llm_int8_skip_modules")
"""Settings that list what stays dense."""
Settings = Mapping[str, Any]
T = TypeVar("T")


def expected_recipes(settings: Settings, skeleton: Any) -> dict[str, Recipe]:
    """Quantized tensor of the skeleton, by name -> its recipe, over parts that nobody has.

    The head, and what the settings leave out, is dense. Raises UnsupportedModelError for a format that is not read.
    """
    format_of = method_in(FORMATS, settings, "config.json", "Give the config.json of the unquantized checkpoint.")
    is_turned = settings["quant_method"] == "mxfp4"  # gpt-oss; the model has inputs before outputs there
    made = dict[str, Recipe]()
    for name, tensor, is_expert in _matrices(skeleton, settings):
        if is_turned and not is_expert:
            continue
        shape = tuple(tensor.shape[dim] for dim in TURNED) if is_turned else tuple(tensor.shape)
        if (form := format_of(settings, name.removesuffix(".weight"), shape)) is not None:
            stored: Recipe = Dequantize(tuple(Take(f"{name}.{part}") for part in form.parts), form, shape)
            made[name] = Cast(Permute(stored, TURNED) if is_turned else stored, tensor.dtype)
    return made


def method_in(known: Mapping[str, T], settings: Settings, where: object, remedy: str) -> T:
    """What belongs to the settings' method. Raises UnsupportedModelError for one that is not known."""
    method = str(settings.get("quant_method"))
    if method not in known:
        reason = f"quant_method '{method}' is not read.{did_you_mean(method, known)} Known: {', '.join(known)}."
        raise UnsupportedModelError(f"{where}: {reason} {remedy}")
    return known[method]


def _matrices(skeleton: Any, settings: Settings) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, tensor, whether it is that of experts, all in one)."""
    left_out = [str(pattern) for key in LEFT_OUT for pattern in settings.get(key) or ()]
    head = None if settings.get("lm_head") else skeleton.get_output_embeddings()
    for prefix, module in skeleton.named_modules():
        if module is head or any(_names(pattern, prefix) for pattern in left_out):
            continue
        is_linear = isinstance(module, nn.Linear)
        for name, tensor in module.named_parameters(recurse=False):
            is_expert = tensor.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd)
            if is_expert or (is_linear and tensor.dim() == 2):
                yield f"{prefix}.{name}", tensor, is_expert


def _names(pattern: str, module: str) -> bool:
    """Whether a setting means a module: by its name or a part of it between dots, with *, or as a regular expression (re:)."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return fnmatch(module, pattern) or f".{pattern}." in f".{module}."


# By quant_method: (settings, module, shape) -> how its matrix is stored, None: dense


def _fp8(settings: Settings, module: str, shape: tuple[int, ...]) -> Format:
    rows, columns = settings.get("weight_block_size") or (0, 0)
    return _floats(rows, columns)


def _floats(rows: int, columns: int) -> Format:
    return Format("fp8", "plain", ("codes", "scales"), (rows, columns))


def _gptq(settings: Settings, module: str, shape: tuple[int, ...]) -> Format:
    return _words("gptq", int(settings["bits"]), settings, shape, ordered=bool(settings.get("desc_act")))


def _awq(settings: Settings, module: str, shape: tuple[int, ...]) -> Format:
    return _words("awq", 4, settings, shape)


def _words(layout: str, bits: int, settings: Settings, shape: tuple[int, ...], ordered: bool = False) -> Format:
    size = int(settings.get("group_size") or -1)
    parts = ("codes", "scales", "zeros", *(("order",) if ordered else ()))
    return Format(f"int{bits}", layout, parts, (1, size if size > 0 else shape[-1]), bits)


def _compressed_tensors(settings: Settings, module: str, shape: tuple[int, ...]) -> Format | None:
    groups = [group for group in (settings.get("config_groups") or {}).values() if group.get("weights")]
    named = [group for group in groups if any(_names(target, module) for target in group.get("targets") or ())]
    group = next(iter(named or [group for group in groups if "Linear" in (group.get("targets") or ())]), None)
    if group is None:
        return None
    weights, acted = group["weights"], group.get("input_activations") or {}
    bits, size = int(weights.get("num_bits") or 4), int(weights.get("group_size") or 0)
    is_float, zeros = weights.get("type") == "float", () if weights.get("symmetric", True) else ("zeros",)
    if bits == 8 and is_float:
        by_row = (1, 0) if weights.get("strategy") == "channel" else (0, 0)
        return _floats(*(weights.get("block_structure") or by_row))
    if is_float:
        return _half_floats("mxfp4" if size == 32 else "nvfp4", "divisor")
    block = (1, max(size, 0))
    if bits == 8:
        return Format("int8", "plain", ("codes", "scales", *zeros), block, activations=8 if acted.get("num_bits") == 8 else 0)
    ordered = ("order",) if weights.get("actorder") == "group" else ()
    return Format(f"int{bits}", "stream", ("codes", "scales", *zeros, *ordered), block, bits)


def _half_floats(name: str, factor: str) -> Format:
    form = SCHEMES[name]
    return replace(form, parts=tuple(factor if part == "factor" else part for part in form.parts))


def _modelopt(settings: Settings, module: str, shape: tuple[int, ...]) -> Format | None:
    own = (settings.get("quantized_layers") or {}).get(module)
    if own is None and settings.get("quant_algo") == "MIXED_PRECISION":
        return None
    algorithm, size = str((own or settings).get("quant_algo")), int((own or settings).get("group_size") or 128)
    if algorithm.startswith("W8A8") or algorithm == "W8A16":
        return Format("int8", "plain", ("codes", "scales"), (1, 0), activations=8 if algorithm.startswith("W8A8") else 0)
    if "MXFP8" in algorithm:
        return Format("mxfp8", "plain", ("codes", "scales"), (1, 32))
    if "FP4" in algorithm:
        return _half_floats("nvfp4" if "NVFP4" in algorithm else "mxfp4", "factor")
    if "AWQ" in algorithm:
        return Format("int4", "row_pairs", ("codes", "scales", "columns"), (1, size), 4)
    return _floats(128, 128) if "PB" in algorithm else _floats(*((1, 0) if "CHANNEL" in algorithm else (0, 0)))


def _bitsandbytes(settings: Settings, module: str, shape: tuple[int, ...]) -> Format:
    if settings.get("load_in_8bit") or settings.get("bnb_4bit_quant_type", "nf4") != "nf4":
        raise UnsupportedModelError("config.json: of bitsandbytes only nf4 is read. Give that of the unquantized checkpoint.")
    return Format("nf4", "nf4", ("codes", "absmax", "map"), bits=4, settings=(64, 256, 0.0))


FORMATS: dict[str, Callable[[Settings, str, tuple[int, ...]], Format | None]] = {
    "modelopt": _modelopt,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": lambda settings, module, shape: _half_floats("mxfp4", "divisor"),
}

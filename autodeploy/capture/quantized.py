"""Quantized checkpoints: which stored tensors make up each dense matrix, by the names and settings of every producer.

transformers is not asked: it reads some of these formats wrongly without telling (per-tensor FP8 of ModelOpt, blocks of rows that
128 does not divide), and needs further packages for others.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autodeploy.capture.expected_formats import method_in
from autodeploy.checkpoint import MODELOPT_FILE, CheckpointSource, read_json
from autodeploy.errors import CheckpointError, UnsupportedModelError
from autodeploy.format_parts import NotInPartsError, spacing
from autodeploy.formats import SCHEMES, Format
from autodeploy.recipes import TURNED, Dequantize, Leaf, Permute, Recipe, Take, evaluate

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
NOT_WEIGHTS = re.compile(
    r"\.(input_scale|activation_scale|input_global_scale|output_scale|input_zero_point|[qkv]_scale|kv_scale)$"
)
"""Scales of activations and of the KV cache: both are rounded by scales of their own."""
OF_CACHE = re.compile(r"\.([kv]_scale|kv_scale)$")
NO_CACHE_SCALES = "not needed, since each head of a token in a cache of 8 bits has scales of its own"


@dataclass
class DenseView:
    """A checkpoint as if its matrices were dense: what `checkpoint_recipes` asks of a source."""

    source: CheckpointSource
    recipes: dict[str, Recipe] = field(default_factory=dict)
    """Name of a dense matrix -> how it is made."""
    hidden: set[str] = field(default_factory=set)
    """Stored tensors that only these are made of, or that nobody reads."""

    @property
    def folder(self) -> Any:
        return self.source.folder

    @property
    def remarks(self) -> dict[str, str]:
        """Stored tensors that say how to round, and are not asked -> why."""
        return {name: NO_CACHE_SCALES for name in sorted(self.hidden) if OF_CACHE.search(name)}

    def names(self) -> list[str]:
        return [name for name in self.source.names() if name not in self.hidden and name not in self.recipes] + [*self.recipes]

    def describe(self, name: str) -> Tensor:
        if name in self.recipes:
            return evaluate(self.recipes[name], self.source.describe_leaf)
        return self.source.describe(name)

    def describe_leaf(self, leaf: Leaf) -> Tensor:
        return self.describe(leaf.name)


def dense_view(raw: Mapping[str, Any], source: CheckpointSource) -> DenseView:
    """raw: config.json. Raises UnsupportedModelError for a format that is not read, CheckpointError for one that is broken."""
    settings, view = quantization_settings(raw, source.folder), DenseView(source)
    if settings is None:
        return view
    read = method_in(READERS, settings, source.folder, "Use the unquantized checkpoint.")
    view.hidden |= {name for name in source.names() if NOT_WEIGHTS.search(name)}
    read(_Reader(view, settings))
    _refuse_codes_without_scales(view)
    return view


def quantization_settings(raw: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of config.json, or what ModelOpt writes beside it; None for a dense checkpoint."""
    if given := raw.get("quantization_config"):
        return dict(given)
    path = folder / MODELOPT_FILE
    if not path.exists():
        return None
    return {"quant_method": "modelopt", **read_json(path).get("quantization", {})}


def _half_floats(name: str) -> dict[str, Any]:
    """What a format is made of, without its parts: 4-bit floats, two to a byte."""
    form = SCHEMES[name]
    return {"name": name, "layout": form.layout, "block": form.block, "bits": form.bits}


def _refuse_codes_without_scales(view: DenseView) -> None:
    for name in view.names():
        if name not in view.recipes and view.source.describe(name).dtype in (*FLOAT8, torch.int8, torch.uint8):
            raise CheckpointError(
                f"{view.source.where(name)}: tensor '{name}' holds codes ({view.source.kind(name)}), but no scales belong to it. "
                "Download the checkpoint again."
            )


@dataclass
class _Reader:
    """What the readers of all producers do alike."""

    view: DenseView
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        self.source = self.view.source
        self.stored = set(self.source.names())

    def prefixes(self, suffix: str) -> list[str]:
        """What stands before that suffix, of all names that end with it."""
        return sorted(name.removesuffix(suffix) for name in self.stored if name.endswith(suffix))

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.stored:
            raise CheckpointError(f"{self.view.folder}: tensor '{name}' is missing. Download the checkpoint again.")
        return tuple(self.source.describe(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        self.shape(name)
        return self.source.describe(name).dtype

    def value(self, name: str) -> Tensor:
        self.shape(name)
        return self.source.fetch(Take(name))

    def add(self, dense: str, form: dict[str, Any], shape: tuple[int, ...], **parts: str) -> Recipe:
        """A dense matrix of these stored tensors. Raises CheckpointError for a part that is missing or of the wrong shape."""
        made, codes = Format(**form, parts=tuple(parts)), parts["codes"]
        for role, name in parts.items():
            if name not in self.stored:
                where = self.source.where(codes)
                raise CheckpointError(
                    f"{where}: tensor '{name}' is missing, though '{codes}' is there. Download the checkpoint again."
                )
            self._check_part(made, role, shape, name)
        recipe = Dequantize(tuple(map(Take, parts.values())), made, shape)
        self.view.recipes[dense] = recipe
        self.view.hidden |= set(parts.values())
        return recipe

    def _check_part(self, form: Format, role: str, shape: tuple[int, ...], name: str) -> None:
        have, where, block = self.shape(name), f"{self.source.where(name)}: tensor '{name}'", form.block[1]
        if role == "scales" and form.block[0] == 1 and block > 1 and shape[-1] % block:
            raise CheckpointError(
                f"{where}: groups of {block} do not divide the {shape[-1]} columns of the matrix that it scales. "
                "Quantize anew with a group size that does."
            )
        matrix, remedy = f"a matrix {list(shape)} in {form.name}", "Check that config.json belongs to these weights."
        if role == "scales" or (role == "zeros" and form.layout == "plain"):
            want = form.scale_shape(shape)
            if [size for size in have if size > 1] != [size for size in want if size > 1]:
                raise CheckpointError(f"{where} has shape {list(have)}, but {matrix} needs {role} {list(want)}. {remedy}")
            return
        try:
            for axis in (-2,) if form.layout == "nf4" else (-2, -1):
                spacing(form, role, shape, have, axis)
        except NotInPartsError as error:
            raise CheckpointError(f"{where} has shape {list(have)}, which does not fit {matrix} ({role}). {remedy}") from error

    def block_of(self, scales: str, shape: tuple[int, ...], block: tuple[int, int] | None) -> tuple[int, int]:
        """Which rows and columns share a scale, by how many scales there are. block: that of a grid of scales."""
        have = [size for size in self.shape(scales) if size > 1]
        if not have:
            return 0, 0
        if have == [shape[0]]:
            return 1, 0
        return block or (1, 0)

    def unsupported(self, what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.view.folder}: {what} is not read. Use the unquantized checkpoint.")


# ModelOpt


def _modelopt(reader: _Reader) -> None:
    settings = reader.settings
    whole = str(settings.get("quant_algo"))
    layers: dict[str, Any] = settings.get("quantized_layers") or {}
    for prefix in reader.prefixes(".weight_scale"):
        own = layers.get(prefix, {})
        algorithm = str(own.get("quant_algo", whole))
        group = own.get("group_size", _first(settings, "group_size"))
        _modelopt_matrix(reader, prefix, algorithm, group)
    reader.view.hidden |= {f"{prefix}.pre_quant_scale" for prefix in reader.prefixes(".pre_quant_scale")}


def _modelopt_matrix(reader: _Reader, prefix: str, algorithm: str, group: int | None) -> None:
    weight, scales = f"{prefix}.weight", f"{prefix}.weight_scale"
    rows, columns = reader.shape(weight)
    more = {"columns": f"{prefix}.pre_quant_scale"} if f"{prefix}.pre_quant_scale" in reader.stored else {}
    match algorithm:
        case "FP8" | "FP8_PER_CHANNEL_PER_TOKEN" | "FP8_PB_WO" | "FP8_PB_REAL":
            shape = (rows, columns)
            form = {"name": "fp8", "layout": "plain", "block": reader.block_of(scales, shape, (128, 128))}
        case "W8A8_SQ_PER_CHANNEL" | "W8A16":
            bits = 8 if algorithm.startswith("W8A8") else 0
            shape, form = (rows, columns), {"name": "int8", "layout": "plain", "block": (1, 0), "activations": bits}
        case "MXFP8":
            shape, form = (rows, columns), {"name": "mxfp8", "layout": "plain", "block": (1, 32)}
        case "NVFP4" | "NVFP4_AWQ" | "W4A16_NVFP4" | "W4A8_NVFP4_FP8":
            shape, form = (rows, 2 * columns), _half_floats("nvfp4")
            more["factor"] = f"{prefix}.weight_scale_2"
        case "MXFP4" | "W4A8_MXFP4_FP8":
            shape, form = (rows, 2 * columns), _half_floats("mxfp4")
        case "W4A16_AWQ" | "W4A8_AWQ":  # the second scale of W4A8 says how its kernel rounds what these stand for to fp8
            reader.view.hidden.add(f"{prefix}.weight_scale_2")
            shape = (2 * rows, columns)
            size = group or columns // reader.shape(scales)[-1]
            form = {"name": "int4", "layout": "row_pairs", "block": (1, size), "bits": 4}
        case _:
            raise reader.unsupported(f"ModelOpt's quant_algo '{algorithm}' (of '{prefix}')")
    reader.add(weight, form, shape, codes=weight, scales=scales, **more)


def _first(settings: Mapping[str, Any], key: str) -> Any:
    """A setting of the whole checkpoint, or of the weights of its first group."""
    groups = (settings.get("config_groups") or {}).values()
    return settings.get(key) or next((group["weights"].get(key) for group in groups if group.get("weights")), None)


# Block FP8, as DeepSeek introduced it


def _fp8(reader: _Reader) -> None:
    block = tuple(reader.settings.get("weight_block_size") or ()) or None
    for suffix in ("_scale_inv", "_scale"):  # both multiply
        for name in reader.prefixes(suffix):
            if name in reader.stored and reader.dtype(name) in FLOAT8:
                shape = reader.shape(name)
                form = {"name": "fp8", "layout": "plain", "block": reader.block_of(name + suffix, shape, block)}
                reader.add(name, form, shape, codes=name, scales=name + suffix)


# compressed-tensors


def _compressed_tensors(reader: _Reader) -> None:
    for prefix in reader.prefixes(".weight_packed"):
        _packed_matrix(reader, prefix)
    for prefix in reader.prefixes(".weight_scale"):
        weight, scales = f"{prefix}.weight", f"{prefix}.weight_scale"
        if weight not in reader.stored or f"{prefix}.weight_packed" in reader.stored:
            continue
        shape, is_float = reader.shape(weight), reader.dtype(weight) in FLOAT8
        exponents = reader.dtype(scales) == torch.uint8
        weights = _weights_of(reader, prefix)
        columns = int(weights.get("group_size") or 0)
        grid = (1, 32) if exponents else tuple(weights.get("block_structure") or ()) or ((1, columns) if columns > 0 else None)
        name = ("mxfp8" if exponents else "fp8") if is_float else "int8"
        zeros = _zero_points(reader, prefix)
        form = {"name": name, "layout": "plain", "block": reader.block_of(scales, shape, grid)}
        if name == "int8":
            form["activations"] = 8 if (_group_of(reader, prefix).get("input_activations") or {}).get("num_bits") == 8 else 0
        reader.add(weight, form, shape, codes=weight, scales=scales, **zeros)


def _packed_matrix(reader: _Reader, prefix: str) -> None:
    packed, scales = f"{prefix}.weight_packed", f"{prefix}.weight_scale"
    if reader.dtype(packed) == torch.uint8:
        rows, half = reader.shape(packed)
        shape, more = (rows, 2 * half), dict[str, str]()
        name = "mxfp4" if reader.dtype(scales) == torch.uint8 else "nvfp4"
        if name == "nvfp4":
            more["divisor"] = f"{prefix}.weight_global_scale"
        reader.add(f"{prefix}.weight", _half_floats(name), shape, codes=packed, scales=scales, **more)
        return
    rows, columns = (int(size) for size in reader.value(f"{prefix}.weight_shape").tolist())
    weights = _weights_of(reader, prefix)
    bits, parts = int(weights.get("num_bits") or 4), {"codes": packed, "scales": scales, **_zero_points(reader, prefix)}
    size = int(weights.get("group_size") or 0)
    if weights.get("actorder") == "group" or f"{prefix}.weight_g_idx" in reader.stored:
        parts["order"] = f"{prefix}.weight_g_idx"
    block = (1, size) if size > 0 else (1, 0)
    reader.add(
        f"{prefix}.weight", {"name": f"int{bits}", "layout": "stream", "block": block, "bits": bits}, (rows, columns), **parts
    )
    reader.view.hidden.add(f"{prefix}.weight_shape")


def _zero_points(reader: _Reader, prefix: str) -> dict[str, str]:
    name, symmetric = f"{prefix}.weight_zero_point", _weights_of(reader, prefix).get("symmetric")
    return {"zeros": name} if name in reader.stored or symmetric is False else {}


def _weights_of(reader: _Reader, prefix: str) -> dict[str, Any]:
    """How the weights of a module are quantized."""
    return _group_of(reader, prefix)["weights"]


def _group_of(reader: _Reader, prefix: str) -> dict[str, Any]:
    """How a module is quantized: a target is a class, a name, or `re:` and what names begin with."""
    groups = [group for group in (reader.settings.get("config_groups") or {}).values() if group.get("weights")]
    for group in groups:
        for target in group.get("targets") or ():
            pattern = target.removeprefix("re:")
            if prefix == target or (target.startswith("re:") and re.match(pattern, prefix)):
                return group
    found = [group for group in groups if "Linear" in (group.get("targets") or ())] or groups
    if not found:
        raise CheckpointError(f"{reader.view.folder}: config.json does not say how '{prefix}' is quantized (config_groups).")
    return found[0]


# GPTQ, AWQ


def _gptq(reader: _Reader) -> None:
    settings = reader.settings
    bits, is_first = int(settings["bits"]), settings.get("checkpoint_format", settings.get("format", "gptq")) != "gptq_v2"
    if bits not in (2, 4, 8) or settings.get("dynamic"):
        raise reader.unsupported(f"GPTQ with {bits} bits" if bits not in (2, 4, 8) else "GPTQ with settings per module (dynamic)")
    for prefix in reader.prefixes(".qweight"):
        words, rows = reader.shape(f"{prefix}.qweight")
        shape = (rows, words * 32 // bits)
        size = int(settings.get("group_size", -1))
        parts = {"codes": "qweight", "scales": "scales", "zeros": "qzeros"}
        if settings.get("desc_act"):
            parts["order"] = "g_idx"
        reader.view.hidden.add(f"{prefix}.g_idx")  # of a matrix that is not in any order it says that groups are of neighbours
        form = {
            "name": f"int{bits}",
            "layout": "gptq",
            "block": (1, size if size > 0 else shape[1]),
            "bits": bits,
            "zero_offset": int(is_first),
        }
        reader.add(f"{prefix}.weight", form, shape, **{role: f"{prefix}.{suffix}" for role, suffix in parts.items()})


def _awq(reader: _Reader) -> None:
    settings = reader.settings
    if (version := str(settings.get("version", "gemm")).lower()) != "gemm" or int(settings.get("bits", 4)) != 4:
        raise reader.unsupported(f"AWQ of version '{version}' with {settings.get('bits')} bits")
    for prefix in reader.prefixes(".qweight"):
        columns, words = reader.shape(f"{prefix}.qweight")
        size = int(settings.get("group_size", 128))
        form = {"name": "int4", "layout": "awq", "block": (1, size if size > 0 else columns), "bits": 4}
        parts = {"codes": "qweight", "scales": "scales", "zeros": "qzeros"}
        reader.add(f"{prefix}.weight", form, (8 * words, columns), **{role: f"{prefix}.{name}" for role, name in parts.items()})


# bitsandbytes, gpt-oss


def _bitsandbytes(reader: _Reader) -> None:
    for name in reader.prefixes(".absmax"):
        states = [key for key in reader.stored if key.startswith(f"{name}.quant_state.bitsandbytes__")]
        if len(states) != 1 or not states[0].endswith("nf4"):
            raise reader.unsupported(f"'{name}' of bitsandbytes (only nf4 is, and its quant_state must be there)")
        state = json.loads(bytes(reader.value(states[0]).tolist()).decode())
        parts = {"codes": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map"}
        if f"{name}.nested_absmax" in reader.stored:
            parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
        settings = (state["blocksize"], state.get("nested_blocksize", 256), state.get("nested_offset", 0.0))
        reader.add(name, {"name": "nf4", "layout": "nf4", "bits": 4, "settings": settings}, tuple(state["shape"]), **parts)
        reader.view.hidden.add(states[0])
    for name in reader.prefixes(".SCB"):
        raise reader.unsupported(f"int8 of bitsandbytes ('{name}.SCB')")


def _mxfp4(reader: _Reader) -> None:
    for name in reader.prefixes("_blocks"):
        experts, rows, groups, half = reader.shape(f"{name}_blocks")
        form = _half_floats("mxfp4") | {"block": (1, 2 * half)}
        stored = reader.add(name, form, (experts, rows, 2 * half * groups), codes=f"{name}_blocks", scales=f"{name}_scales")
        reader.view.recipes[name] = Permute(stored, TURNED)  # the model has inputs before outputs


READERS: dict[str, Callable[[_Reader], None]] = {
    "modelopt": _modelopt,
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "gptq": _gptq,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "mxfp4": _mxfp4,
}

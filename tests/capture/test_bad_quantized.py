"""Quantized checkpoints with something wrong in them: an error that names tensor and file, or served right with a remark."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import autodeploy
from autodeploy import CheckpointError, UnsupportedModelError
from autodeploy.capture.quantized import dense_view
from autodeploy.checkpoint import CheckpointSource, raw_config
from autodeploy.report.tables import remark_texts
from autodeploy.weights import WeightPlan, materialize
from tests.capture.quantized_formats import Producer
from tests.capture.test_quantized import BY_NAME, IDS, LLAMA, logits, write
from tests.models.families import make_model

Q_PROJ = "model.layers.0.self_attn.q_proj."
SECOND = "model-00002-of-00002.safetensors"


def in_two_files(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> Path:
    """The checkpoint after an edit, what there is of the query projection in a file of its own; that file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    files = {name: SECOND if name.startswith(Q_PROJ) else "model-00001-of-00002.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder / SECOND


def read(folder: Path, as_integers: bool = False) -> None:
    """All matrices, as far as that is possible without a model."""
    source = CheckpointSource(folder)
    recipes = dense_view(raw_config(folder), source).recipes
    for _ in materialize(WeightPlan(recipes), source, as_integers=recipes if as_integers else ()):
        pass


def drop(suffix: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(Q_PROJ + suffix)


def put(suffix: str, *shape: int, value: float = 1) -> Callable[[dict[str, Tensor]], Any]:
    """Ones (or another value) of that shape in the place of a tensor."""

    def edit(tensors: dict[str, Tensor]) -> None:
        name = Q_PROJ + suffix
        tensors[name] = torch.full(shape, value).to(tensors[name].dtype)

    return edit


BROKEN: dict[str, tuple[str, Callable[[dict[str, Tensor]], Any], str, str]] = {
    "a scale is missing": ("block fp8", drop("weight_scale_inv"), "weight", "no scales belong to it"),
    "scales are missing beside codes": (
        "gptq",
        drop("scales"),
        "scales",
        "is missing, though 'model.layers.0.*qweight' is there",
    ),
    "zero points are missing": ("gptq", drop("qzeros"), "qzeros", "is missing"),
    "zero points that the settings promise": (
        "compressed-tensors w4a16 asymmetric",
        drop("weight_zero_point"),
        "weight_zero_point",
        "is missing",
    ),
    "the order of columns is missing": ("gptq act-order", drop("g_idx"), "g_idx", "is missing"),
    "the same, of another producer": (
        "compressed-tensors w4a16 act-order",
        drop("weight_g_idx"),
        "weight_g_idx",
        "is missing",
    ),
    "scales of another shape": (
        "block fp8",
        put("weight_scale_inv", 3, 2),
        "weight_scale_inv",
        r"has shape \[3, 2\], but a matrix \[192, 192\] in fp8 needs scales \[2, 2\]",
    ),
    "scales by groups where there are none": (
        "compressed-tensors int8",
        put("weight_scale", 192, 2),
        "weight_scale",
        r"has shape \[192, 2\], but .* needs scales \[192, 1\]",
    ),
    "a scale of all that is two": ("modelopt nvfp4", put("weight_scale_2", 2), "weight_scale_2", r"has shape \[2\]"),
    "factors of other columns": ("modelopt w4a16 awq", put("pre_quant_scale", 96), "pre_quant_scale", r"\[96\]"),
    "zero points of another shape": ("awq", put("qzeros", 6, 48), "qzeros", r"has shape \[6, 48\], which does not fit"),
    "scales of another number": ("bitsandbytes nf4", put("weight.absmax", 600), "weight.absmax", r"has shape \[600\]"),
    "codes of another shape": ("compressed-tensors w4a16", put("weight_packed", 192, 30), "weight_packed", "does not fit"),
    "a scale that is no number": (
        "awq",
        put("scales", 6, 192, value=float("nan")),
        "scales",
        "it holds something that is not a finite number",
    ),
    "a scale of all that is no number": (
        "modelopt nvfp4",
        put("weight_scale_2", value=float("inf")),
        "weight_scale_2",
        "it holds",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_matrix_is_refused_by_the_names_of_its_tensor_and_file(what: str, tmp_path: Path) -> None:
    name, edit, suffix, message = BROKEN[what]
    quantized, _ = write(tmp_path, BY_NAME[name], make_model("llama", **LLAMA))
    file = in_two_files(quantized, edit)
    named = re.escape(f"{file}: tensor '{Q_PROJ}{suffix}'")
    with pytest.raises(CheckpointError, match=f"^{named}.*{message}"):
        read(quantized)


def test_a_scale_that_is_no_number_ends_the_start_with_the_name_of_its_file(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, BY_NAME["gptq"], make_model("llama", **LLAMA))
    file = in_two_files(quantized, put("scales", 6, 192, value=float("nan")))
    for dtype in ("bfloat16", "float32"):  # as whole numbers where kernels take them, and dense
        with pytest.raises(CheckpointError, match=re.escape(f"{file}: tensor '{Q_PROJ}scales': it holds")):
            autodeploy.compile(quantized, dtype=dtype)


@pytest.mark.parametrize("value", [0, -1])
def test_an_order_of_columns_that_fills_no_groups_is_refused(value: int, tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, BY_NAME["gptq act-order"], make_model("llama", **LLAMA))
    file = in_two_files(quantized, put("g_idx", 192, value=value))
    with pytest.raises(CheckpointError, match=re.escape(f"{file}: tensor '{Q_PROJ}g_idx': it does not put 32 columns in each")):
        read(quantized, as_integers=True)


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors w4a16", "compressed-tensors int8"])
def test_groups_that_do_not_divide_the_columns_are_refused(name: str, tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, BY_NAME[name], make_model("llama", **LLAMA))
    config, scales = raw_config(quantized), "weight_scale" if "tensors" in name else "scales"
    settings: Any = config["quantization_config"]
    (settings["config_groups"]["group_0"]["weights"] if "tensors" in name else settings)["group_size"] = 128
    (quantized / "config.json").write_text(json.dumps(config))
    in_two_files(quantized, (lambda t: t) if name != "compressed-tensors int8" else put("weight_scale", 192, 2))
    with pytest.raises(
        CheckpointError, match=rf"safetensors: tensor '.*\.{scales}': groups of 128 do not divide the \d+ columns"
    ):
        read(quantized)


def test_formats_nobody_reads_are_refused_by_name(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, BY_NAME["awq"], make_model("llama", **LLAMA))
    config = raw_config(quantized)
    for settings, message in (
        ({"quant_method": "gptqq"}, "quant_method 'gptqq' is not read. Did you mean 'gptq'"),
        ({**config["quantization_config"], "version": "gemv"}, "AWQ of version 'gemv'"),
    ):
        (quantized / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
        with pytest.raises(UnsupportedModelError, match=message):
            autodeploy.compile(quantized)


def test_layers_of_one_input_in_several_formats_are_served_apart_and_the_report_says_so(tmp_path: Path) -> None:
    """Keys are in fp8 and the up projection dense, all else in int4: query and value still are whole numbers."""
    int4, fp8 = BY_NAME["compressed-tensors w4a16"], BY_NAME["compressed-tensors fp8 block"]
    (few,), (many,) = (producer.settings["config_groups"].values() for producer in (int4, fp8))
    groups = {"group_0": few, "group_1": {**many, "targets": ["re:.*k_proj"]}}
    mixed = Producer("mixed", {**int4.settings, "config_groups": groups}, int4.make)
    quantized, dense = write(tmp_path, mixed, make_model("llama", **LLAMA))
    tensors, exact = load_file(quantized / "model.safetensors"), load_file(dense / "model.safetensors")
    key, up = "model.layers.0.self_attn.k_proj.", "model.layers.0.mlp.up_proj."
    parts, numbers = fp8.make(*exact[f"{key}weight"].shape)
    exact[f"{key}weight"] = numbers.float()
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith((key, up))}
    kept |= {key + suffix: part for suffix, part in parts.items()} | {f"{up}weight": exact[f"{up}weight"]}
    save_file(kept, quantized / "model.safetensors")
    save_file(exact, dense / "model.safetensors")
    compiled = autodeploy.compile(quantized, dtype="float32")
    texts = remark_texts(compiled.program)
    assert texts == [
        "not joined, since what reads the same is stored in several formats (fp8 and int4): 2 "
        "(model.layers.0.self_attn.q_proj_v_proj.weight, model.layers.0.self_attn.k_proj.weight)",
        "not joined, since what reads the same is stored in several formats (dense and int4): 2 "
        "(model.layers.0.mlp.gate_proj.weight, model.layers.0.mlp.up_proj.weight)",
    ]
    assert all(text in compiled.report() for text in texts)
    assert (compiled(IDS) - logits(dense)).abs().max() < 1e-4
    compiled.shutdown()


def test_experts_that_are_stored_in_several_ways_are_made_dense_and_the_report_says_so(tmp_path: Path) -> None:
    quantized, dense = write(tmp_path, BY_NAME["gptq"], make_model("qwen3_moe", moe_intermediate_size=64, num_hidden_layers=1))
    tensors, exact = load_file(quantized / "model.safetensors"), load_file(dense / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.up_proj"
    kept = {key: tensor for key, tensor in tensors.items() if not key.startswith(name)}
    save_file({**kept, f"{name}.weight": exact[f"{name}.weight"]}, quantized / "model.safetensors")
    compiled = autodeploy.compile(quantized, dtype="float32")
    (text,) = remark_texts(compiled.program)
    assert text == (
        "dense, since its parts are stored in several formats (dense and int4): 1 (model.layers.0.mlp.experts.gate_up_proj)"
    )
    assert text in compiled.report() and (compiled(IDS) - logits(dense)).abs().max() < 1e-4
    compiled.shutdown()

"""Quantized checkpoints are read as their producers mean them: a dense model of the same numbers gives the same logits."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import autodeploy
from autodeploy import ConfigError, SamplingParams, UnsupportedModelError
from autodeploy.capture.quantized import dense_view
from autodeploy.checkpoint import CheckpointSource, raw_config
from autodeploy.recipes import evaluate
from tests.capture.quantized_formats import PRODUCERS, Producer, integers, pairs
from tests.marks import has_byte_kernels, needs_byte_kernels
from tests.models.families import make_model

LLAMA = {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 1}
"""128 divides neither: a grid of blocks has one that is cut off."""
ROOT = Path(__file__).parents[2]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])
BY_NAME = {producer.name: producer for producer in PRODUCERS}


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.dim() == 2 and re.search(r"_proj\.weight$", name) is not None


def write(folder: Path, producer: Producer, model: Any) -> tuple[Path, Path]:
    """The checkpoint of a model with other weights: quantized, and dense."""
    torch.manual_seed(0)
    quantized, dense = folder / "quantized", folder / "dense"
    model.save_pretrained(dense)
    stored, exact = load_file(dense / "model.safetensors"), dict[str, Tensor]()
    kept = dict(stored)
    for name, tensor in stored.items():
        if is_linear(name, tensor):
            made, numbers = producer.make(*tensor.shape)
            del kept[name]
            kept |= {f"{name.removesuffix('weight')}{suffix}": part.contiguous() for suffix, part in made.items()}
            exact[name] = numbers.float().contiguous()
    save_file(stored | exact, dense / "model.safetensors")
    quantized.mkdir()
    save_file(kept, quantized / "model.safetensors")
    config = json.loads((dense / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": producer.settings}))
    return quantized, dense


def logits(folder: Path, **options: Any) -> Tensor:
    compiled = autodeploy.compile(folder, dtype="float32", **options)
    found = compiled(IDS)
    compiled.shutdown()
    return found


@pytest.mark.parametrize("name", BY_NAME)
def test_a_tiny_llama_in_every_format(name: str, tmp_path: Path) -> None:
    quantized, dense = write(tmp_path, BY_NAME[name], make_model("llama", **LLAMA))
    source = CheckpointSource(quantized)
    view, exact = dense_view(raw_config(quantized), source), load_file(dense / "model.safetensors")
    assert set(view.recipes) == {key for key, tensor in exact.items() if is_linear(key, tensor)}
    for key, recipe in view.recipes.items():
        torch.testing.assert_close(evaluate(recipe, source.fetch), exact[key], rtol=1e-6, atol=1e-9)
    assert (logits(quantized) - logits(dense)).abs().max() < 1e-4


COMPRESSORS = {
    "compressed-tensors fp8 tensor": "float-quantized",
    "compressed-tensors fp8 block": "float-quantized",
    "compressed-tensors int8": "int-quantized",
    "compressed-tensors int8 asymmetric": "int-quantized",
    "compressed-tensors w4a16": "pack-quantized",
    "compressed-tensors w4a16 asymmetric": "pack-quantized",
    "compressed-tensors w3a16": "pack-quantized",
    "compressed-tensors nvfp4": "nvfp4-pack-quantized",
    "compressed-tensors mxfp4": "mxfp4-pack-quantized",
}
"""What the library calls them; it no longer reads columns in any order."""


@pytest.mark.parametrize("name", COMPRESSORS)
def test_the_library_of_the_format_reads_the_same_numbers(name: str) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    kinds = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(0)
    producer, shape = BY_NAME[name], (192, 320)
    (group,) = producer.settings["config_groups"].values()
    weights = kinds.QuantizationArgs(**group["weights"])
    parts, numbers = producer.make(*shape)
    compressor = base.BaseCompressor.get_value_from_registry(COMPRESSORS[name])
    scheme = kinds.QuantizationScheme(targets=["Linear"], weights=weights)
    theirs = compressor.decompress({key: part.clone() for key, part in parts.items()}, scheme)["weight"]
    torch.testing.assert_close(
        theirs.double(), numbers.double(), rtol=1e-6 if theirs.dtype == torch.float32 else 2**-8, atol=1e-9
    )


@pytest.mark.parametrize("name", ["block fp8", "compressed-tensors w4a16", "modelopt nvfp4", "gptq", "gptq act-order", "awq"])
def test_experts_that_are_stored_one_by_one(name: str, tmp_path: Path) -> None:
    quantized, dense = write(tmp_path, BY_NAME[name], make_model("qwen3_moe", moe_intermediate_size=64))
    assert any(".experts.1." in key for key in dense_view(raw_config(quantized), CheckpointSource(quantized)).recipes)
    exact = logits(dense)
    assert (logits(quantized) - exact).abs().max() < 1e-4
    if name in KERNELS_OF_EXPERTS and has_byte_kernels:
        compiled = autodeploy.compile(quantized, dtype="bfloat16")
        found, providers = compiled(IDS), {choice.provider for choice in compiled.program.providers["moe"]}
        compiled.shutdown()
        assert providers == {KERNELS_OF_EXPERTS[name]} and float((found - exact).norm() / exact.norm()) < 0.06


KERNELS = {
    "compressed-tensors int8": "cpp_w8a16",
    "compressed-tensors w8a8": "cpp_w8a8",
    "compressed-tensors w4a16": "cpp_w4a8",
    "compressed-tensors w4a16 asymmetric": "cpp_w4a8",
    "gptq": "cpp_w4a8",
    "gptq v2": "cpp_w4a8",
    "gptq 8 bit, one group": "cpp",
    "gptq act-order": "cpp_w4a8",
    "compressed-tensors w4a16 act-order": "cpp_w4a8",
    "awq": "cpp_w4a8",
    "modelopt w4a16 awq": "cpp",
    "modelopt nvfp4": "cpp",
    "block fp8": "cpp",
}
KERNELS_OF_EXPERTS = {**KERNELS, "gptq act-order": "cpp"}


@needs_byte_kernels
@pytest.mark.parametrize("name", KERNELS)
def test_stored_whole_numbers_are_what_kernels_multiply_with(name: str, tmp_path: Path) -> None:
    producer = BY_NAME[name.replace("w8a8", "int8")]
    if "w8a8" in name:
        (group,) = producer.settings["config_groups"].values()
        settings = {
            **producer.settings,
            "config_groups": {"group_0": {**group, "input_activations": {"num_bits": 8, "dynamic": True}}},
        }
        producer = replace(producer, settings=settings)
    quantized, dense = write(tmp_path, producer, make_model("llama", **LLAMA))
    compiled = autodeploy.compile(quantized, dtype="bfloat16")
    found, providers = compiled(IDS), {choice.provider for choice in compiled.program.providers["linear"]}
    compiled.shutdown()
    assert providers == {"cpp", KERNELS[name]}  # the head is dense
    exact = logits(dense)
    assert float((found - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(("method", "where"), [("modelopt", "{}_proj.{}_scale"), ("compressed-tensors", "{1}_scale")])
def test_scales_of_the_cache_are_passed_over_and_the_report_says_so(method: str, where: str, tmp_path: Path) -> None:
    make_model("llama", **LLAMA).save_pretrained(tmp_path / "dense")
    shutil.copytree(tmp_path / "dense", tmp_path / "scaled")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    names = [f"model.layers.0.self_attn.{where.format(x, x)}" for x in "kv"]
    save_file({**tensors, **{name: torch.tensor(0.25) for name in names}}, tmp_path / "scaled" / "model.safetensors")
    settings = {
        "modelopt": {"quant_algo": None, "kv_cache_quant_algo": "FP8"},
        "compressed-tensors": {"config_groups": {}, "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"}},
    }
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, **settings[method]}
    (tmp_path / "scaled" / "config.json").write_text(json.dumps(config))
    compiled = autodeploy.compile(tmp_path / "scaled", dtype="float32", kv_cache_config={"dtype": "fp8"})
    assert f"scales of its own: 2 ({', '.join(names)})" in compiled.report()
    plain = logits(tmp_path / "dense", kv_cache_config={"dtype": "fp8"})
    assert torch.equal(compiled(IDS), plain)
    compiled.shutdown()


def write_gpt_oss(folder: Path, **overrides: Any) -> tuple[Path, Path]:
    """As `write`, of gpt-oss with experts in MXFP4 as they are published."""
    torch.manual_seed(0)
    quantized, dense, made = folder / "quantized", folder / "dense", dict[str, Tensor]()
    quantized.mkdir()
    make_model("gpt_oss", **overrides).save_pretrained(dense)
    exact = load_file(dense / "model.safetensors")
    for name, tensor in list(exact.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        codes, exponents = integers(0, 16, experts, rows, columns), integers(118, 122, experts, rows, columns // 32)
        table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
        numbers = table[codes].unflatten(-1, (-1, 32)) * 2.0 ** (exponents - 127)[..., None]
        exact[name] = numbers.flatten(-2).transpose(1, 2).contiguous()
        made |= {f"{name}_blocks": pairs(codes).unflatten(-1, (-1, 16)), f"{name}_scales": exponents.to(torch.uint8)}
    assert len(made) > len(exact)
    save_file(exact, dense / "model.safetensors")
    save_file(made, quantized / "model.safetensors")
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = json.loads((dense / "config.json").read_text()) | {"quantization_config": settings}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, dense


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    quantized, dense = write_gpt_oss(tmp_path)
    assert (logits(quantized) - logits(dense)).abs().max() < 1e-4
    with pytest.raises(ConfigError, match=r"experts\..*is stored in mxfp4"):
        autodeploy.compile(quantized, quantization="int8")


def test_settings_in_a_file_of_their_own_and_of_single_layers(tmp_path: Path) -> None:
    quantized, dense = write(tmp_path, BY_NAME["modelopt fp8"], make_model("llama", **LLAMA))
    config = raw_config(quantized)
    del config["quantization_config"]
    (quantized / "config.json").write_text(json.dumps(config))
    layers = {"model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}, "model.layers.0.self_attn.q_proj": {"quant_algo": "W9"}}
    settings = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (quantized / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": settings}))
    assert (logits(quantized) - logits(dense)).abs().max() < 1e-4
    (quantized / "hf_quant_config.json").write_text(json.dumps({"quantization": {**settings, "quantized_layers": layers}}))
    with pytest.raises(UnsupportedModelError, match=r"'W9' \(of 'model\.layers\.0\.self_attn\.q_proj'\)"):
        autodeploy.compile(quantized)


def test_text_from_a_quantized_folder_is_that_of_a_second_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE_DIR", str(tmp_path / "cache"))
    quantized, _ = write(tmp_path, BY_NAME["bitsandbytes nf4 nested"], make_model("llama", **LLAMA))
    params, tokens = SamplingParams(max_tokens=8, ignore_eos=True, temperature=0.0), []
    for _ in range(2):
        compiled = autodeploy.compile(quantized)
        tokens.append(compiled.generate([1, 2, 3], params).outputs[0].token_ids)
        compiled.shutdown()
    assert tokens[0] == tokens[1]


def test_the_eager_backend_refuses_what_transformers_may_read_wrongly(tmp_path: Path) -> None:
    quantized, _ = write(tmp_path, BY_NAME["modelopt fp8"], make_model("llama", **LLAMA))
    with pytest.raises(UnsupportedModelError, match="backend='pytorch' reads no quantized checkpoint"):
        autodeploy.LLM(quantized, backend="pytorch", skip_tokenizer_init=True)


def test_the_documented_table_has_every_format() -> None:
    text = (ROOT / "docs" / "quantization.md").read_text().partition("## Quantized checkpoints")[2]
    rows = re.findall(r"^\| ([^|]+?) \| .* \| .* \|$", text, re.MULTILINE)[1:]
    assert [row for row in rows if row not in ("---", "gpt-oss mxfp4")] == [*BY_NAME] and len(BY_NAME) >= 18

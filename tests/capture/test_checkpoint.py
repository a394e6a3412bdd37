"""Folders written by transformers load with its own renames, ties, shards and conversions, equal to the model in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import autodeploy
from autodeploy.capture.checkpoint import checkpoint_recipes
from autodeploy.capture.skeleton import build_skeleton
from autodeploy.checkpoint import CheckpointSource
from autodeploy.recipes import evaluate
from tests.models.families import COMMON, make_model
from tests.models.parity import eager_logits, relative_error

IDS = torch.randint(3, 256, (1, 17), generator=torch.Generator().manual_seed(0))


def loads_like(model: Any, folder: Path, **options: Any) -> float:
    """Relative error of the folder's logits against eager's."""
    compiled = autodeploy.compile(str(folder), **options)
    ours = compiled(IDS)[0]
    compiled.shutdown()
    return relative_error(ours, eager_logits(model, IDS[0].tolist()))


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "gpt2",
        "granite_swa",
        pytest.param("gemma3n_text", marks=pytest.mark.slow),
        pytest.param("opt", marks=pytest.mark.slow),
    ],
)
def test_a_saved_model_loads_as_it_was_in_memory(name: str, tmp_path: Path) -> None:
    model = make_model(name)
    model.save_pretrained(tmp_path)
    assert loads_like(model, tmp_path) <= 1e-5


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    assert loads_like(model, tmp_path) <= 1e-5


def test_a_tied_head_is_found_under_its_twin_s_name(tmp_path: Path) -> None:
    model = make_model("qwen3", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert loads_like(model, tmp_path) <= 1e-5


def test_a_base_model_without_its_prefix_loads(tmp_path: Path) -> None:
    model = make_model("gpt2", tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    assert loads_like(model, tmp_path) <= 1e-5


def test_a_tensor_saved_under_an_older_name_is_renamed(tmp_path: Path) -> None:
    model = make_model("gpt_neox")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(
        {name.replace("lm_head.", "embed_out."): tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"}
    )
    assert "embed_out.weight" in load_file(path)
    assert loads_like(model, tmp_path) <= 1e-5


def test_conversions_of_transformers_are_recipes_over_the_saved_tensors(tmp_path: Path) -> None:
    config = MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path)
    source = CheckpointSource(tmp_path)
    recipes = checkpoint_recipes(build_skeleton(config, torch.float32), source)
    stacked = recipes["model.layers.0.mlp.experts.gate_up_proj"]
    assert str(stacked).startswith("cat(stack(model.layers.0.block_sparse_moe.experts.0.w1.weight, ...")
    assert len(list(stacked.leaves())) == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(evaluate(recipes[name], source.fetch), tensor), name


def test_dtype_is_the_config_s_unless_asked_otherwise(tmp_path: Path) -> None:
    model = make_model("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    for options, dtype in (
        ({}, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": torch.float64}, torch.float64),
    ):
        compiled = autodeploy.compile(str(tmp_path), **options)
        assert compiled(IDS).dtype == dtype
        assert {spec.dtype for spec in compiled.program.caches.values()} == {str(dtype).removeprefix("torch.")}
        compiled.shutdown()
    in_float64 = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager")
    assert loads_like(in_float64, tmp_path, dtype="float64") <= 1e-6  # eager rounds norms and softmax to float32, we do not


def test_loaded_weights_do_not_point_into_the_files(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)
    compiled = autodeploy.compile(str(tmp_path))
    before = compiled(IDS)
    (tmp_path / "model.safetensors").write_bytes(b"")  # would be a bus error
    torch.testing.assert_close(compiled(IDS), before)
    compiled.shutdown()
